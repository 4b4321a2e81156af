"""The predicted cost of a recipe, stage by stage: tokens, bytes, FLOPs, memory and seconds. No model is loaded.

Lengths are estimated from a few problems of the task and from the texts that the models learn from; costs follow from
counts by `compute.estimate`. A size that cannot be looked up (a hub model without a network) is reported as unverified.
"""

from __future__ import annotations

from dataclasses import replace

from distill import machine as machines
from distill import plug
from distill.compute import estimate
from distill.machine import Machine, Width
from distill.models import cache_home
from distill.recipe import EngineConfig, Recipe, order
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


def predict(recipe: Recipe, machine: Machine | None = None) -> list[Row]:
    """The predictions for all stages, inputs first. machine: None = measure this machine.

    Raises UserError for mistakes that are found without running the recipe.
    """
    machine = machine or measured(recipe)
    known = Known(recipe)
    rows: list[Row] = []
    for name in order(recipe):
        config = recipe.stages[name]
        before = len(known.notes)
        made: list[Row] = config.predict(name, known, machine)
        if not made:
            known.notes.append(f"{name}: the cost of a stage of kind {config.kind} is not known")
            known.assume(name, config)
            made = [Row(name, config.kind, make_amounts(seconds=estimate.LIGHT_START))]
        rows += [*made[:-1], replace(made[-1], notes=tuple(known.notes[before:]))]
    return rows


def check_plugs(recipe: Recipe) -> None:
    """Check every model and stage, and that every named engine exists. Raises UserError."""
    for name, config in recipe.stages.items():
        config.check(name, recipe)
        if isinstance(engine := getattr(config, "engine", None), EngineConfig):
            plug.find(engine.fn, "distill.engines.factories", f"stages.{name}.engine.fn")
    check_models(recipe)
