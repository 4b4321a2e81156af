"""compare: paired comparison of several models on the same held-out problems. Each evaluation is a stage of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from distill.recipe import CompareStage, Recipe, base_name
from distill.recipe.lineage import role_of, roles_of, training_line
from distill.records import Cost, stable_hash
from distill.reports.arms import ArmResults, examples, score_seeds
from distill.reports.comparison import check_same_start, compare_trained
from distill.reports.run_report import comparison_row
from distill.stages import compare_measures
from distill.stages.context import Context, Result
from distill.stages.eval import read_results, snapshot_rows
from distill.stages.snapshots import snapshots_of


def run(config: CompareStage, context: Context) -> Result:
    context.phase("comparing the evaluations")
    check_start(config, context.recipe)
    folders = {
        arm: {seed: context.run / f"{context.name}.{name}" for seed, (name, _) in runs.items()}
        for arm, runs in config.evaluations().items()
    }
    arms = {
        arm: {seed: read_results(folder / "traces") for seed, folder in by_seed.items()}
        for arm, by_seed in folders.items()
    }
    correct = {arm: {seed: results.correct for seed, results in runs.items()} for arm, runs in arms.items()}
    pairs = compare_trained(correct, seed=context.seed, among=compare_measures.pairs_to_compare(config, context.recipe))
    rows = [comparison_row(a, b, result) for (a, b), result in pairs.items()]
    merged = {arm: ArmResults.merge(runs.values()) for arm, runs in arms.items()}
    questions = {
        key: messages[-1]["content"] for results in merged.values() for key, messages in results.messages.items()
    }
    # Recipes list their students last; the report shows problems that only one of the last two arms solves.
    models = {arm: next(iter(runs.values()))[1] for arm, runs in config.evaluations().items()}
    roles = roles_of(context.recipe, models.values())
    students = sorted(arms, key=lambda arm: roles[models[arm]] == "student")[-2:]
    same = context.task(config.task).same_answer
    metrics: dict[str, Any] = {
        "comparisons": rows,
        "examples": examples(merged, students[0], students[1], questions),
        "arms": {
            arm: score_seeds(runs, config.pass_at, same)
            | {"snapshots": _snapshot_rows(config, context.run, arm, folders[arm])}
            for arm, runs in arms.items()
            if len(runs) > 1
        },
    }
    if config.targets is not None:
        metrics |= compare_measures.divergences(
            config, context, [arm for arm in arms if roles[models[arm]] == "student"]
        )
    metrics["trace_ratios"] = compare_measures.trace_ratios(config, context, arms)
    return Result(Cost(), metrics, stable_hash(json.dumps(metrics, sort_keys=True)))


def _snapshot_rows(config: CompareStage, run: Path, arm: str, folders: dict[int, Path]) -> list[dict[str, object]]:
    kept = [snapshots_of(run / model) for _, model in config.evaluations()[arm].values()]
    if not config.snapshot_problems:
        return []
    return [dict(row) for row in snapshot_rows(list(folders.values()), kept)]


def check_start(config: CompareStage, recipe: Recipe) -> None:
    """Raise UserError if the students among the arms were not trained from the same start checkpoint.

    Copies of a start for several training seeds count as the same start if the arms are paired seed by seed.
    """
    starts: dict[str, str] = {}
    for arm, runs in config.evaluations().items():
        for _, model in runs.values():
            if role_of(recipe, model) == "student":
                starts[arm] = base_name(training_line(recipe, model)[-1])
    check_same_start(starts)
