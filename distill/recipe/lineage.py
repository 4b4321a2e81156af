"""The stage graph: which models and data a stage rests on, and what role a model plays in a comparison."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from distill.recipe.seeds import base_name
from distill.recipe.tree import Recipe

NO_PARENTS = ("task", "budget")
"""Inputs that no part of a model comes from."""


def role_of(recipe: Recipe, model: str) -> Any:
    """A model that teaches another is a teacher; of the others, one that nothing was trained into is a start.

    To teach is to be an input called `teacher`, or to have written the traces of a stage whose model is not of its own
    line: what a model learns from its own completions is its own doing.
    """
    for name, config in recipe.stages.items():
        inputs = list(config.inputs())
        if any(key.startswith("teacher") and value == model for key, value in inputs):
            return "teacher"
        writers = {
            value
            for stage in _data_above(recipe, name)
            for key, value in recipe.stages[stage].inputs()
            if key == "model"
        }
        if model in writers and model not in line(recipe, name):
            return "teacher"
    trained = model in recipe.stages and recipe.stages[model].trains
    return "student" if trained else "start"


def roles_of(recipe: Recipe, models: Iterable[str]) -> dict[str, Any]:
    """The role of each model beside the others: a trained one that all other students go on from is their start."""
    roles = {model: role_of(recipe, model) for model in models}
    students = [model for model in roles if roles[model] == "student"]
    for model in students:
        others = [other for other in students if base_name(other) != base_name(model)]
        if others and all(model in line(recipe, other) for other in others):
            roles[model] = "start"
    return roles


def line(recipe: Recipe, model: str) -> list[str]:
    """A model and those that it was trained from, the last one first; a pruned model begins a line."""
    found = [model]
    while found[-1] in recipe.stages and recipe.stages[found[-1]].trains:
        before = dict(recipe.stages[found[-1]].inputs()).get("model")
        if before is None:
            break
        found.append(before)
    return found


def parents_of(recipe: Recipe) -> dict[str, list[tuple[str, str]]]:
    """(field, name) of what each stage reads."""
    return {name: list(config.inputs()) for name, config in recipe.stages.items()}


def rests_on(recipe: Recipe, name: str) -> Iterator[str]:
    """The stage itself and every stage that its output is made of, nearest first."""
    frontier, found = [name], []
    while frontier:
        one = frontier.pop()
        if one in recipe.stages and one not in found:
            found.append(one)
            yield one
            frontier += [value for key, value in recipe.stages[one].inputs() if key not in NO_PARENTS]


def origin(recipe: Recipe, name: str) -> str:
    """The first of a model's line of `model` inputs: a model of the recipe, or a stage that reads no model."""
    while name in recipe.stages and (before := dict(recipe.stages[name].inputs()).get("model")) is not None:
        name = before
    return name


def _data_above(recipe: Recipe, name: str) -> list[str]:
    """The stages that the data of a stage comes from."""
    found: list[str] = []
    frontier = [name]
    while frontier:
        for key, value in recipe.stages[frontier.pop()].inputs():
            if key == "data" and value in recipe.stages and value not in found:
                found.append(value)
                frontier.append(value)
    return found
