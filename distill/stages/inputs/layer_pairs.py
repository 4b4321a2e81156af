"""Where the layers of a pruned model come from, by the records of the prune stages; imports no torch.

In: the recipe, and the results of finished prune stages. Out: for each layer its index in the model that was pruned first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distill import run_folder
from distill.recipe import PruneStage, Recipe
from distill.records import UserError


def prune_stages(recipe: Recipe, model: str) -> list[str]:
    """Return the prune stages that a model went through, the first one first; stages that trained it lie between."""
    found: list[str] = []
    while model in recipe.stages:
        stage = recipe.stages[model]
        if isinstance(stage, PruneStage):
            found.append(model)
        if not stage.reads("model"):
            break
        model = stage.reads("model")[0]
    return found[::-1]


def different_widths(where: str, model: str, teacher: str, mine: int, theirs: int) -> str:
    return (
        f"{where}.hidden: the student {model} has hidden states of width {mine}, its teacher {teacher} of width {theirs}, and they "
        "are compared value by value. Prune layers only, or remove hidden."
    )


def different_depths(where: str, model: str, teacher: str, mine: int, theirs: int, total: int | None) -> str:
    made = (
        f"was pruned from one with {total} layers"
        if total is not None and total != mine
        else "was not pruned in this recipe"
    )
    return (
        f"{where}.hidden: the student {model} has {mine} layers and {made}, and its teacher {teacher} has {theirs}: which layer "
        "belongs to which is not known. Set teacher to the model that the student was pruned from (or one trained from it), or remove hidden."
    )


@dataclass(frozen=True, slots=True)
class KeptLayers:
    """kept: for each of a model's layers, its index in the model that the first prune stage read. total: that model's layers."""

    kept: Sequence[int]
    total: int | None


def layers_kept(recipe: Recipe, run: Path, model: str, depth: int) -> KeptLayers:
    """Return where a model's layers come from, by the results of the prune stages that it went through.

    A model without any is compared layer by layer: it has `depth` layers of its own.
    """
    kept: Sequence[int] = ()
    total = None
    for stage in prune_stages(recipe, model):
        state = run_folder.read(run / stage)
        found = None if state is None else state.metrics.get("layers_kept")
        if state is None or found is None:
            raise UserError(
                f"{run / stage}: there is no record of the layers that {stage} kept. Do it again: --redo {stage}."
            )
        if total is None:
            total, kept = state.metrics.get("layers_before"), [int(index) for index in found]
        else:
            kept = [kept[int(index)] for index in found]
    return KeptLayers(kept or range(depth), total if kept else depth)
