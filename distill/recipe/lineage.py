"""The stage graph: what a stage rests on, the line of training that a model belongs to, and its role in a
comparison."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from distill.recipe.fields import Input, base_name
from distill.recipe.tree import Recipe

Role = Literal["start", "teacher", "student"]
NO_PARENTS = ("task", "budget")
"""Sorts of inputs that are not part of a model's origin."""


def parents_of(recipe: Recipe) -> dict[str, list[Input]]:
    """Return each stage's inputs."""
    return {name: list(config.inputs()) for name, config in recipe.stages.items()}


def rests_on(recipe: Recipe, name: str) -> Iterator[str]:
    """Return the stage and all its ancestors, nearest first."""
    parents = parents_of(recipe)
    yield from _reach([name], parents, lambda one: _above(one, parents))


def line(recipe: Recipe, model: str) -> list[str]:
    """A model and those that it was trained from, the last one first. A model that a stage wrote without training it (a
    pruned one) begins a line."""
    found = [model]
    while found[-1] in recipe.stages:
        stage = recipe.stages[found[-1]]
        before = None if stage.writes == "model" and not stage.trains else next(iter(stage.reads("model")), None)
        if before is None:
            break
        found.append(before)
    return found


def origin(recipe: Recipe, name: str) -> str:
    """The first of a model's line of `model` inputs, through pruned ones: a model of the recipe, or a stage that reads
    no model."""
    while name in recipe.stages and (before := recipe.stages[name].reads("model")):
        name = before[0]
    return name


# -------------------------------------------------------------------------------------------------- roles


def role_of(recipe: Recipe, model: str) -> Role:
    """A model that teaches another is a teacher; any other is a student where the recipe trains it, and else a start.

    To teach is to be an input of sort `teacher`, or to have written the traces of a stage whose model is not of its own
    line: a model that learns from its own completions is not its own teacher.
    """
    parents = parents_of(recipe)
    for name, inputs in parents.items():
        if any(each.sort == "teacher" and each.name == model for each in inputs):
            return "teacher"
        data = _reach(_above(name, parents, "data"), parents, lambda one: _above(one, parents, "data"))
        writers = {writer for one in data for writer in _above(one, parents, "model")}
        if model in writers and model not in line(recipe, name):
            return "teacher"
    trained = model in recipe.stages and recipe.stages[model].trains
    return "student" if trained else "start"


def roles_of(recipe: Recipe, models: Iterable[str]) -> dict[str, Role]:
    """The role of each model beside the others: a trained one that all other students go on from is their start."""
    roles = {model: role_of(recipe, model) for model in models}
    students = [model for model in roles if roles[model] == "student"]
    for model in students:
        others = [other for other in students if base_name(other) != base_name(model)]
        if others and all(model in line(recipe, other) for other in others):
            roles[model] = "start"
    return roles


# -------------------------------------------------------------------------------------------------- costs


@dataclass(frozen=True, slots=True)
class Ancestors:
    """The stages that a model rests on, each in one list.

    own: the model's stage and those that it was trained from. self_written: data that this line of models wrote.
    inference: other data. teacher: everything else.
    """

    own: list[str]
    self_written: list[str]
    inference: list[str]
    teacher: list[str]


def ancestors(name: str, trains: Mapping[str, bool], parents: Mapping[str, Sequence[Input]]) -> Ancestors:
    """What a model rests on, by what it is to the model.

    trains: the stages that count, and whether each trains its model. parents: every stage's inputs; names that are not
    in `trains` (models, files, tasks) end the search. Inputs of sort `model` lead to the model's own earlier training,
    `data` to the traces that it learned from, all others to its teachers; so does the model that a student was pruned
    from, which is another model.
    """

    def own_models(one: str) -> list[str]:
        return _above(one, parents, "model") if trains[one] else []

    own = _reach([name], trains, own_models)
    own_line = {name, *own, *(model for one in own for model in own_models(one))}
    first = [value for one in own for value in _above(one, parents, "data")]
    data = _reach(first, trains, lambda one: _above(one, parents, "data"))
    self_written = [one for one in data if _written_by(one, own_line, parents)]
    inference = [one for one in data if one not in self_written]
    every = _reach([*own, *inference], trains, lambda one: _above(one, parents))
    return Ancestors(own, self_written, inference, [one for one in every if one not in {*own, *data}])


def _written_by(name: str, own_line: set[str], parents: Mapping[str, Sequence[Input]]) -> bool:
    """Whether every model that a data stage rests on is of the line."""
    models, frontier = [], [name]
    while frontier:
        for each in parents.get(frontier.pop(), ()):
            if each.sort == "data":
                frontier.append(each.name)
            elif each.sort not in NO_PARENTS:
                models.append(each.name)
    return bool(models) and all(model in own_line for model in models)


def _above(name: str, parents: Mapping[str, Sequence[Input]], *sorts: str) -> list[str]:
    """The names of a stage's inputs of some sorts; of all that a model can come from where none is said."""
    return [
        each.name for each in parents.get(name, ()) if each.sort not in NO_PARENTS and (not sorts or each.sort in sorts)
    ]


def _reach(starts: Iterable[str], among: Mapping[str, object], follow: Callable[[str], list[str]]) -> list[str]:
    """All stages that lead from the first ones, step by step, themselves included."""
    found, frontier = [], list(starts)
    while frontier:
        name = frontier.pop()
        if name in among and name not in found:
            found.append(name)
            frontier.extend(follow(name))
    return found
