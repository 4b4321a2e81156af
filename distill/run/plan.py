"""The predicted cost of a recipe, stage by stage: tokens, bytes, FLOPs, memory and seconds. No model is loaded.

Lengths are estimated from a few problems of the task and from the texts that the models learn from; costs follow from
counts by `compute.estimate`. A size that cannot be looked up (a hub model without a network) is reported as unverified.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from distill import machine as machines
from distill import plug
from distill.compute import estimate
from distill.engines import NO_RAY
from distill.errors import MachineError
from distill.machine import Machine, Width
from distill.models import cache_home
from distill.recipe import EngineConfig, Recipe, StageConfig, order
from distill.run.known_sizes import Known, model_shape
from distill.run.model_checks import check_models
from distill.run.predictions.row import Row, make_amounts


def widths(recipe: Recipe) -> list[Width]:
    """The width of every model of the recipe; estimated from the number of parameters if it cannot be looked up."""
    shapes = [model_shape(model)[0] for model in recipe.models.values()]
    return [(shape.hidden, shape.intermediate) for shape in shapes]


def measured(recipe: Recipe) -> Machine:
    """This machine, measured at the width of every model of the recipe."""
    return machines.measured(widths(recipe), cache_home() / "machine")


@dataclass(frozen=True, slots=True)
class Planned:
    """A stage's predictions, and the means to predict it again with other settings. before: sizes known before the stage."""

    name: str
    config: StageConfig
    rows: list[Row]
    before: Known

    def with_changes(self, changes: Mapping[str, Any], machine: Machine) -> list[Row]:
        """Predict the stage with some fields changed; a section's fields are merged into the section."""
        tree = self.config.model_dump()
        for key, value in changes.items():
            merge = isinstance(value, Mapping) and isinstance(tree[key], Mapping)
            tree[key] = {**tree[key], **value} if merge else value
        changed = type(self.config).model_validate(tree)
        return list(changed.predict(self.name, self.before.copy(), machine))


def planned(recipe: Recipe, machine: Machine) -> Iterator[Planned]:
    """Yield the predictions for all stages, inputs first. Raises UserError for mistakes found without running the recipe."""
    known = Known(recipe)
    for name in order(recipe):
        config, before = recipe.stages[name], known.copy()
        made: list[Row] = config.predict(name, known, machine)
        if not made:
            known.notes.append(f"{name}: the cost of a stage of kind {config.kind} is not known")
            known.assume(name, config)
            made = [Row(name, config.kind, make_amounts(seconds=estimate.LIGHT_START))]
        notes = tuple(known.notes[len(before.notes) :])
        yield Planned(name, config, [*made[:-1], replace(made[-1], notes=notes)], before)


def predict(recipe: Recipe, machine: Machine | None = None) -> list[Row]:
    """The predictions for all stages, inputs first. machine: None = measure this machine.

    Raises UserError for mistakes that are found without running the recipe.
    """
    return [row for each in planned(recipe, machine or measured(recipe)) for row in each.rows]


def check_plugs(recipe: Recipe) -> None:
    """Check every model and stage, and that every named engine exists. Raises UserError."""
    for name, config in recipe.stages.items():
        config.check(name, recipe)
        if isinstance(engine := getattr(config, "engine", None), EngineConfig):
            plug.find(engine.fn, "distill.engines.factories", f"stages.{name}.engine.fn")
            if engine.ray is not None and importlib.util.find_spec("ray") is None:
                raise MachineError(f"stages.{name}.engine.ray: {NO_RAY}")
    check_models(recipe)
