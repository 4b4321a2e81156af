"""What a comparison measures beside accuracy: held-out KL to the teacher, and what a distribution is worth in traces of text."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from distill.recipe import CompareStage, Recipe, TrainStage, divergence_name
from distill.recipe.lineage import traces_learned
from distill.reports.arms import ArmResults
from distill.reports.divergence import FILE, TraceSums, kl_difference, summary, text
from distill.reports.run_report import DivergencePairRow, TraceRatioRow
from distill.reports.statistics import Floats, problem_means
from distill.reports.trace_curves import ratio
from distill.reports.wording import ratio_text
from distill.stages.context import Context


def pairs_to_compare(config: CompareStage, recipe: Recipe) -> Callable[[str, str], bool]:
    """Return which pairs of arms are compared: not two that learned from different numbers of traces (max_traces)."""
    models = {arm: next(iter(runs.values()))[1] for arm, runs in config.evaluations().items()}
    numbers = {arm: found[1] for arm, model in models.items() if (found := traces_learned(recipe, model))}
    return lambda a, b: a not in numbers or b not in numbers or numbers[a] == numbers[b]


def trace_ratios(
    config: CompareStage, context: Context, arms: Mapping[str, Mapping[int, ArmResults]]
) -> list[TraceRatioRow]:
    """The ratios of every way of training to text alone, where arms differ in max_traces; empty without an arm of text."""
    models = {arm: next(iter(runs.values()))[1] for arm, runs in config.evaluations().items()}
    learned = {arm: found for arm, model in models.items() if (found := traces_learned(context.recipe, model))}
    curves: dict[str, dict[str, dict[int, Floats]]] = {"accuracy": {}, "kl": {}}
    text: set[str] = set()
    for arm, (stage, number) in learned.items():
        way, trained = arm.removesuffix(f"-{number}"), context.recipe.stages[stage]
        if stage == models[arm] and isinstance(trained, TrainStage) and trained.loss.fn == "cross_entropy":
            text.add(way)
        correct = [results.correct for results in arms[arm].values()]
        judged = [problem_means([one[key] for key in sorted(one)]) for one in correct]
        curves["accuracy"].setdefault(way, {})[number] = np.array(judged)
        if config.targets is not None:
            far = [sums.per_token("kl") for sums in _sums(config, context, arm)]
            curves["kl"].setdefault(way, {})[number] = -np.array(far)
    if len(text) != 1:
        return []
    (of_text,) = text
    rows: list[TraceRatioRow] = []
    for measure, ways in curves.items():
        for way, curve in ways.items():
            if (
                way != of_text
                and min(len(curve), len(ways[of_text])) > 1
                and _same_shape([*curve.values(), *ways[of_text].values()])
            ):
                rows.append({**ratio(way, curve, ways[of_text], measure, context.seed), "comparison": context.name})
    for row in rows:
        context.say(f"traces of text for one trace of {row['way']}, by {row['measure']}: {ratio_text(row)}")
    return rows


def _same_shape(values: Sequence[Floats]) -> bool:
    """Whether all arms have the same number of seeds, and a judged sample of every problem."""
    return len({one.shape for one in values}) == 1 and not any(bool(np.isnan(one).any()) for one in values)


def _sums(config: CompareStage, context: Context, arm: str) -> list[TraceSums]:
    """The sums of an arm's divergence stages, by training seed."""
    names = [name for name, _ in config.evaluations()[arm].values()]
    return [TraceSums.read(context.run / f"{context.name}.{divergence_name(name)}" / FILE) for name in names]


def divergences(config: CompareStage, context: Context, students: Sequence[str]) -> dict[str, Any]:
    """The arms' distances from the teacher on its held-out traces, and the paired differences of the students."""
    sums = {arm: _sums(config, context, arm) for arm in config.evaluations()}
    among = pairs_to_compare(config, context.recipe)
    found = {arm: summary(seeds) for arm, seeds in sums.items()}
    for arm, row in found.items():
        context.say(f"{arm}: KL to the teacher {text(row['kl'])} nats a token on {row['traces']} held-out traces")
    pairs = [
        DivergencePairRow(a=a, b=b, difference=kl_difference(sums[a], sums[b], seed=context.seed))
        for a, b in itertools.combinations(students, 2)
        if among(a, b)
    ]
    return {"divergence": found, "divergence_pairs": pairs}
