"""compare: several models on the same held-out problems, paired. The evaluations are stages of their own."""

from __future__ import annotations

import json

from distill.recipe import CompareStage, Recipe
from distill.records import Cost, stable_hash
from distill.reports.arms import examples
from distill.reports.compare import check_same_start, compare_arms
from distill.reports.schema import comparison_row
from distill.stages.collect import line, role_of
from distill.stages.context import Context, Result
from distill.stages.eval import read_results


def run(config: CompareStage, context: Context) -> Result:
    check_start(config, context.recipe)
    arms = {
        arm: read_results(context.run / f"{context.name}.{arm}" / "traces") for arm in config.arms
    }
    pairs = compare_arms({arm: results.correct for arm, results in arms.items()}, seed=context.seed)
    rows = [comparison_row(a, b, result) for (a, b), result in pairs.items()]
    questions = {
        key: json.loads(messages)[-1]["content"]
        for results in arms.values()
        for key, messages in results.messages.items()
    }
    # A recipe writes its students last: theirs are the problems won and lost that the report shows.
    roles = {arm: role_of(context.recipe, model) for arm, model in config.arms.items()}
    students = sorted(arms, key=lambda arm: roles[arm] == "student")[-2:]
    metrics = {"comparisons": rows, "examples": examples(arms, students[0], students[1], questions)}
    return Result(Cost(), metrics, stable_hash(json.dumps(metrics, sort_keys=True)))


def check_start(config: CompareStage, recipe: Recipe) -> None:
    """Raise UserError where the students among the arms were not trained from one start checkpoint."""
    students = {
        arm: model for arm, model in config.arms.items() if role_of(recipe, model) == "student"
    }
    check_same_start({arm: line(recipe, model)[-1] for arm, model in students.items()})
