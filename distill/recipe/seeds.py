"""Expand `seeds: [1, 2, 3]`, on a stage or on the recipe, into one copy of the stage per training seed.

The copies of stage `kl` are `kl@1`, `kl@2` and `kl@3`, each with its own random seed. Stages that read a copied stage
are copied too. A compare stage is not copied: all copies of an arm's model become the training seeds of that arm.
"""

from __future__ import annotations

from typing import Any

from distill.recipe.fields import copy_name
from distill.recipe.stage import StageConfig
from distill.recipe.tree import Recipe, order
from distill.records import UserError

COPIED = ("model", "teacher", "data", "budget")
"""Sorts of inputs that a stage's copy for a seed reads from the copies for the same seed."""


def expand(recipe: Recipe, where: str) -> Recipe:
    """Return the recipe with a copy of stages for each seed, or the same recipe if it has no seeds. Raises UserError."""
    if recipe.seeds is None and all(stage.seeds is None for stage in recipe.stages.values()):
        return recipe
    seeds: dict[str, list[int]] = {}
    stages: dict[str, StageConfig] = {}
    for name in order(recipe, where):
        stage = recipe.stages[name]
        if (with_copies := stage.with_copies(seeds, f"{where}: stages.{name}")) is not None:
            stages[name] = with_copies
            continue
        wanted = _seeds_of(name, stage, recipe, seeds, where)
        if wanted is None:
            stages[name] = stage
            continue
        seeds[name] = wanted
        for seed in wanted:
            names = {other: copy_name(other, seed) for other in seeds}
            fields = {each.field.partition(".")[0] for each in stage.inputs() if each.sort in COPIED}
            reading = {field: renamed(getattr(stage, field), names) for field in fields}
            changed = stage.model_dump() | reading | {"seed": seed, "seeds": None}
            stages[copy_name(name, seed)] = type(stage).model_validate(changed)
    return recipe.model_copy(update={"stages": stages, "seeds": None})


def _seeds_of(
    name: str, stage: StageConfig, recipe: Recipe, seeds: dict[str, list[int]], where: str
) -> list[int] | None:
    """The seeds of a stage: its own, the recipe's, or those of its inputs. Raises UserError if its inputs' seeds differ."""
    inherited = {value: seeds[value] for value in (each.name for each in stage.inputs()) if value in seeds}
    wanted = stage.seeds or recipe.seeds or next(iter(inherited.values()), None)
    for other, theirs in inherited.items():
        if theirs != wanted:
            raise UserError(
                f"{where}: stages.{name}: has seeds {wanted}, but its input {other!r} has seeds {theirs}. Each copy reads "
                "the input's copy of the same seed, so the lists must be the same."
            )
    return wanted


def renamed(value: Any, names: dict[str, str]) -> Any:
    """The value with every stage name in it, keys included, replaced by the name of the copy."""
    if isinstance(value, str):
        return names.get(value, value)
    if isinstance(value, dict):
        return {names.get(key, key): renamed(inner, names) for key, inner in value.items()}
    if hasattr(value, "model_dump"):
        return renamed(value.model_dump(), names)
    return value
