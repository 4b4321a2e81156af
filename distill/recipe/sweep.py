"""Expand `sweep: {max_traces: [64, 128]}` of a stage into one stage for each value.

The copies of stage `kl` are `kl-64` and `kl-128`. Stages that read a swept stage are copied too, each reading the copy of the same
value; a comparison has an arm for each copy instead. Training seeds are expanded afterwards: `kl-64@1`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pydantic

from distill.recipe.seeds import COPIED, renamed
from distill.recipe.stage import StageConfig
from distill.recipe.tree import Recipe, order
from distill.records import UserError

Copies = Mapping[str, Mapping[str, str]]
"""By stage: the names of its copies, by the value's label."""


def label(value: Any) -> str:
    """Return a value as a part of a stage's name: 64, 1e-04, 0_5, forward_kl."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return re.sub(r"[^A-Za-z0-9_-]", "_", text)


def expand_sweeps(recipe: Recipe, where: str) -> Recipe:
    """Return the recipe with a stage for each value of a sweep, or the same recipe if it has none. Raises UserError."""
    if all(stage.sweep is None for stage in recipe.stages.values()):
        return recipe
    copies: dict[str, dict[str, str]] = {}
    stages: dict[str, StageConfig] = {}
    for name in order(recipe, where):
        stage, here = recipe.stages[name], f"{where}: stages.{name}"
        if (with_copies := stage.with_sweeps(copies, here)) is not None:
            stages[name] = with_copies
            continue
        changes = _changes(stage, copies, here)
        if changes is None:
            stages[name] = stage
            continue
        copies[name] = {one: f"{name}-{one}" for one in changes}
        for one, changed in changes.items():
            copy = copies[name][one]
            if copy in recipe.stages:
                raise UserError(f"{here}.sweep: there is a stage {copy!r} already; rename one.")
            try:
                stages[copy] = type(stage).model_validate(stage.model_dump() | {"sweep": None} | changed)
            except pydantic.ValidationError as error:
                first = error.errors()[0]
                key = ".".join(str(part) for part in first["loc"]) or "sweep"
                raise UserError(f"{here}.sweep: {key}: {first['msg'].removeprefix('Value error, ')}.") from None
    return recipe.model_copy(update={"stages": stages})


def _changes(stage: StageConfig, copies: Copies, here: str) -> dict[str, dict[str, Any]] | None:
    """The changed fields of each copy of a stage, by label; None if it is not copied."""
    inherited = {each.name: copies[each.name] for each in stage.inputs() if each.name in copies}
    if stage.sweep is not None:
        if inherited:
            raise UserError(
                f"{here}.sweep: its input {next(iter(inherited))!r} is swept too, and each copy reads the one of the same value; sweep one "
                "of the two."
            )
        ((field, values),) = stage.sweep.items()
        return {label(value): {field: value} for value in values}
    if not inherited:
        return None
    labels = [list(one) for one in inherited.values()]
    if any(one != labels[0] for one in labels):
        raise UserError(
            f"{here}: its inputs {' and '.join(inherited)} are swept over different values; they must be the same."
        )
    fields = {each.field.partition(".")[0] for each in stage.inputs() if each.sort in COPIED}
    return {
        one: {
            field: renamed(getattr(stage, field), {old: new[one] for old, new in copies.items() if one in new})
            for field in fields
        }
        for one in labels[0]
    }
