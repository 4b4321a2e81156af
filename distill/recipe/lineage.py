"""The stage graph: the upstream stages of a stage, the training history of a model, and its role in a comparison."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from distill.recipe.engine import EngineConfig
from distill.recipe.fields import base_name
from distill.recipe.stage import Input
from distill.recipe.tree import Recipe

Role = Literal["start", "teacher", "student"]
NOT_UPSTREAM = ("task", "budget")
"""Sorts of inputs that are not part of a model's origin."""


def parents_of(recipe: Recipe) -> dict[str, list[Input]]:
    """Return each stage's inputs."""
    return {name: list(config.inputs()) for name, config in recipe.stages.items()}


def upstream_stages(recipe: Recipe, name: str) -> Iterator[str]:
    """Return the stage and all its ancestors, nearest first."""
    parents = parents_of(recipe)
    yield from _reachable([name], parents, lambda one: _upstream_inputs(one, parents))


def served_models(recipe: Recipe) -> frozenset[str]:
    """Return the models of the recipe that only endpoints run: their weights are not needed on this machine."""
    served: set[str] = set()
    local: set[str] = set()
    for stage in recipe.stages.values():
        at_endpoint = isinstance(engine := getattr(stage, "engine", None), EngineConfig) and engine.is_served
        names = {each.name for each in stage.inputs() if each.sort in ("model", "teacher")}
        (served if at_endpoint else local).update(names & recipe.models.keys())
    return frozenset(served - local)


def training_line(recipe: Recipe, model: str) -> list[str]:
    """The training history of a model: the model, the one it was trained from, and so on, newest first.

    A model that a stage wrote without training it, such as a pruned model, ends the search.
    """
    found = [model]
    while found[-1] in recipe.stages:
        stage = recipe.stages[found[-1]]
        before = None if stage.writes == "model" and not stage.trains else next(iter(stage.reads("model")), None)
        if before is None:
            break
        found.append(before)
    return found


def writers_of_first_data(recipe: Recipe, model: str) -> set[str]:
    """The models whose traces a model learned from first: those of the earliest stage of its training line with such traces.

    Teachers in the trainer and models that scored the traces count too; the model's own line does not. Empty if it learned
    from no model of the recipe.
    """
    line, parents = training_line(recipe, model), parents_of(recipe)
    for name in reversed(line):
        if name not in recipe.stages:
            continue
        data = _reachable(
            _upstream_inputs(name, parents, "data"), parents, lambda one: _upstream_inputs(one, parents, "data")
        )
        found = {writer for one in data for writer in _upstream_inputs(one, parents, "model")}
        found = (found | {*_upstream_inputs(name, parents, "teacher")}) - {*line}
        if found:
            return found
    return set()


def traces_learned(recipe: Recipe, model: str) -> tuple[str, int] | None:
    """The stage of a model's training line that has max_traces, the last one, and the number; None if no stage has."""
    for name in training_line(recipe, model):
        number = getattr(recipe.stages.get(name), "max_traces", None)
        if number is not None:
            return name, number
    return None


def origin(recipe: Recipe, name: str) -> str:
    """The original model that `name` was made from by training and pruning: a model of the recipe, or a stage that
    reads no model."""
    while name in recipe.stages and (before := recipe.stages[name].reads("model")):
        name = before[0]
    return name


# -------------------------------------------------------------------------------------------------- roles


def role_of(recipe: Recipe, model: str) -> Role:
    """The role of a model: "teacher" if it teaches another model, else "student" if the recipe trains it, else "start".

    A model teaches if it is an input of sort `teacher`, or if it wrote traces for a stage that trains a model of another
    training history. A model that learns from its own completions is not its own teacher.
    """
    parents = parents_of(recipe)
    for name, inputs in parents.items():
        if any(each.sort == "teacher" and each.name == model for each in inputs):
            return "teacher"
        if name in recipe.stages and not recipe.stages[name].trains:
            continue
        data = _reachable(
            _upstream_inputs(name, parents, "data"), parents, lambda one: _upstream_inputs(one, parents, "data")
        )
        writers = {writer for one in data for writer in _upstream_inputs(one, parents, "model")}
        if model in writers and model not in training_line(recipe, name):
            return "teacher"
    trained = model in recipe.stages and recipe.stages[model].trains
    return "student" if trained else "start"


def roles_of(recipe: Recipe, models: Iterable[str]) -> dict[str, Role]:
    """The role of each model in a comparison: a student from which all other students were trained is their "start"."""
    roles = {model: role_of(recipe, model) for model in models}
    students = [model for model in roles if roles[model] == "student"]
    for model in students:
        others = [other for other in students if base_name(other) != base_name(model)]
        if others and all(model in training_line(recipe, other) for other in others):
            roles[model] = "start"
    return roles


# -------------------------------------------------------------------------------------------------- costs


@dataclass(frozen=True, slots=True)
class Ancestors:
    """The upstream stages of a model; each stage is in one list.

    own: the stages that trained the model. self_written: data stages whose model is of this training history.
    inference: the other data stages. teacher: all other stages.
    """

    own: list[str]
    self_written: list[str]
    inference: list[str]
    teacher: list[str]


def ancestors(name: str, trains: Mapping[str, bool], parents: Mapping[str, Sequence[Input]]) -> Ancestors:
    """The upstream stages of the model `name`, grouped by how they contributed to it.

    trains: for each stage that counts, whether it trains its model. parents: the inputs of every stage; names that are
    not in `trains` (models, files, tasks) end the search. Inputs of sort `model` lead to the model's own earlier
    training, `data` inputs to the traces that it learned from, all others to its teachers. The model that a student was
    pruned from counts as a teacher too.
    """

    def own_models(one: str) -> list[str]:
        return _upstream_inputs(one, parents, "model") if trains[one] else []

    own = _reachable([name], trains, own_models)
    own_line = {name, *own, *(model for one in own for model in own_models(one))}
    first = [value for one in own for value in _upstream_inputs(one, parents, "data")]
    data = _reachable(first, trains, lambda one: _upstream_inputs(one, parents, "data"))
    self_written = [one for one in data if _written_by(one, own_line, parents)]
    inference = [one for one in data if one not in self_written]
    every = _reachable([*own, *inference], trains, lambda one: _upstream_inputs(one, parents))
    return Ancestors(own, self_written, inference, [one for one in every if one not in {*own, *data}])


def _written_by(name: str, own_line: set[str], parents: Mapping[str, Sequence[Input]]) -> bool:
    """Whether every model upstream of a data stage is in `own_line`."""
    models, frontier = [], [name]
    while frontier:
        for each in parents.get(frontier.pop(), ()):
            if each.sort == "data":
                frontier.append(each.name)
            elif each.sort not in NOT_UPSTREAM:
                models.append(each.name)
    return bool(models) and all(model in own_line for model in models)


def _upstream_inputs(name: str, parents: Mapping[str, Sequence[Input]], *sorts: str) -> list[str]:
    """The names of a stage's upstream inputs, all or of the given sorts."""
    return [
        each.name
        for each in parents.get(name, ())
        if each.sort not in NOT_UPSTREAM and (not sorts or each.sort in sorts)
    ]


def _reachable(starts: Iterable[str], among: Mapping[str, object], follow: Callable[[str], list[str]]) -> list[str]:
    """Every stage of `among` that can be reached from `starts` by `follow`, the starts included."""
    found, frontier = [], list(starts)
    while frontier:
        name = frontier.pop()
        if name in among and name not in found:
            found.append(name)
            frontier.extend(follow(name))
    return found
