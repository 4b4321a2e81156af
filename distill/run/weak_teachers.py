"""Warn in the report of students that learn the distributions of a teacher which is often wrong.

In: the recipe, and the states of its finished stages (the share of right completions among a `generate` stage's traces). Out:
sentences for the report's notes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from distill.recipe import FilterStage, GenerateStage, Recipe, TrainStage, data_of, teachers_of
from distill.run_folder import State

WEAK = 0.9
"""A teacher that is right in a smaller share of its completions than this is weak."""
TEXT_LOSSES = frozenset({"cross_entropy", "ce_kl", "policy_gradient"})
"""Losses that learn the text of the traces, alone or besides the distributions."""


def weak_teachers(recipe: Recipe, states: Mapping[str, State]) -> list[str]:
    """Return a warning for each weak teacher whose distributions on its correct traces a stage learns, without a share of
    cross entropy."""
    found: dict[tuple[str, float], list[str]] = {}
    for name, stage in recipe.stages.items():
        if isinstance(stage, TrainStage) and stage.loss.fn not in TEXT_LOSSES:
            for traces in _correct_traces_of(recipe, stage):
                writer = recipe.stages[traces]
                assert isinstance(writer, GenerateStage)
                right = states[traces].metrics.get("correct_rate") if traces in states else None
                is_teacher = not stage.teacher or writer.model in teachers_of(stage.teacher)
                if right is not None and not math.isnan(right) and right < WEAK and is_teacher:
                    found.setdefault((writer.model, right), []).append(name)
    return [
        f"warning: {', '.join(names)}: the teacher {teacher} was right in only {right:.0%} of its traces. KL on correct traces "
        "still teaches the teacher's whole distribution, errors included, while SFT on them is a step of rejection sampling "
        "beyond it. loss: {fn: ce_kl} has both; so does a teacher that is trained until it is right more often."
        for (teacher, right), names in found.items()
    ]


def _correct_traces_of(recipe: Recipe, stage: TrainStage) -> Iterator[str]:
    """Yield the `generate` stages whose traces the stage reads through filters, one of which keeps the correct ones."""
    for data in data_of(stage.data):
        only_correct = False
        while isinstance(one := recipe.stages.get(data), FilterStage):
            only_correct = only_correct or any(keep.fn == "correct" for keep in one.keep)
            data = one.data
        if only_correct and isinstance(one, GenerateStage):
            yield data
