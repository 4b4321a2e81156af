"""A whole recipe, the check of its references, and the order of its stages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pydantic
from pydantic import Field

from distill.plug import nearest
from distill.recipe.engine import EngineConfig
from distill.recipe.fields import (
    Config,
    DistributedConfig,
    ModelConfig,
    Name,
    Seeds,
    StageName,
    TaskConfig,
)
from distill.recipe.stage import StageConfig
from distill.recipe.stages import KINDS, CompareStage, GenerateStage
from distill.records import UserError


class Recipe(Config):
    _folder: Path | None = pydantic.PrivateAttr(None)
    """The folder that the recipe's own Python modules are imported from; None = the working directory."""
    name: Name = Field(description="name of the run; its folder is runs/<name>")
    description: str = Field("", description="one sentence about the run, shown in the report")
    seed: int = Field(17, ge=0, description="random seed of every stage that has none of its own")
    seeds: Seeds | None = Field(
        None, description="training seeds: every stage but a comparison is run once for each seed"
    )
    distributed: DistributedConfig | None = Field(
        None, description="processes, nodes and sharding of every stage that trains and has no `distributed` of its own"
    )
    models: dict[Name, ModelConfig] = Field(
        {}, description="models by name, each a source or a section with source, revision, ..."
    )
    tasks: dict[Name, TaskConfig] = Field({}, description="tasks by name, each fn and its options")
    stages: dict[StageName, pydantic.SerializeAsAny[StageConfig]] = Field(
        min_length=1, description="stages by name, each a kind and its fields"
    )

    def __eq__(self, other: object) -> bool:
        """Whether all fields are equal; where a recipe's modules lie is no part of it."""
        return isinstance(other, Recipe) and self.__dict__ == other.__dict__

    __hash__ = None  # type: ignore[assignment]

    @pydantic.field_validator("models", mode="before")
    @classmethod
    def _short_models(cls, models: Any) -> Any:
        if not isinstance(models, Mapping):
            return models
        return {key: {"source": value} if isinstance(value, str) else value for key, value in models.items()}


def check_references(recipe: Recipe, where: str) -> None:
    """Check that every stage input exists and is of the right sort, and that no stage is its own ancestor."""
    for name in recipe.stages:
        if name in recipe.models:
            raise UserError(f"{where}: {name!r} is both a model and a stage; rename one.")
    for name, stage in recipe.stages.items():
        for each in stage.inputs():
            value, here = each.name, f"{where}: stages.{name}.{each.field}"
            if each.sort == "task":
                if value not in recipe.tasks:
                    raise UserError(f"{here}: there is no task {value!r}.{nearest(value, recipe.tasks)}")
            elif each.sort == "questions":
                if value not in recipe.tasks and not _looks_like_path(value):
                    raise UserError(
                        f"{here}: there is no task {value!r}.{nearest(value, recipe.tasks)} "
                        "To name a file, write a path with a slash, such as ./problems.jsonl."
                    )
            elif each.sort == "data":
                if value not in recipe.stages and not _looks_like_path(value):
                    raise UserError(
                        f"{here}: there is no stage {value!r}.{nearest(value, recipe.stages)} "
                        "To name a file or folder, write a path with a slash, such as ./traces."
                    )
                _check_kind(recipe, here, value, lambda stage: stage.writes == "traces")
            elif each.sort == "budget":
                if value not in recipe.stages:
                    raise UserError(f"{here}.flops_of: there is no stage {value!r}.{nearest(value, recipe.stages)}")
                _check_kind(recipe, f"{here}.flops_of", value, lambda stage: stage.trains)
            else:
                known = [*recipe.models, *recipe.stages]
                if value not in known:
                    raise UserError(f"{here}: there is no model or stage {value!r}.{nearest(value, known)}")
                _check_kind(recipe, here, value, lambda stage: stage.writes == "model")
                engine = getattr(recipe.stages[name], "engine", None)
                if value in recipe.stages and isinstance(engine, EngineConfig) and engine.is_served:
                    raise UserError(
                        f"{here}: {value!r} is a stage, but an endpoint runs the model that it was started with: name the served "
                        "model's entry in `models`, or use an engine of this machine."
                    )
    order(recipe, where)
    _check_splits(recipe, where)


def _check_splits(recipe: Recipe, where: str) -> None:
    """Check that no stage trains on traces of held-out problems, and that a comparison's targets are such traces."""
    for name, stage in recipe.stages.items():
        for data in stage.reads("data"):
            source, seen = data, {data}
            while (config := recipe.stages.get(source)) is not None and (before := config.reads("data")):
                source = before[0]
                if source in seen:
                    break
                seen.add(source)
            held_out = isinstance(config, GenerateStage) and config.split == "held_out"
            if stage.trains and held_out:
                raise UserError(
                    f"{where}: stages.{name}.data: {source!r} generates traces of held-out problems, which would spoil every "
                    "evaluation; train on a generate stage with split: train."
                )
            if isinstance(stage, CompareStage) and isinstance(config, GenerateStage):
                fault = _fault_of_targets(config) if source == data else f"{data!r} is not a generate stage"
                if fault:
                    raise UserError(
                        f"{where}: stages.{name}.targets: {fault}; name a generate stage of the teacher with split: held_out, "
                        "top_logprobs above 0, and temperature and top_p 1."
                    )


def _fault_of_targets(config: GenerateStage) -> str:
    """Return why students cannot be measured on a generate stage's traces; "" if they can."""
    if config.split != "held_out":
        return "its problems are train problems, which students may have learned"
    if config.top_logprobs == 0:
        return "it stores no distributions (top_logprobs: 0)"
    if config.sampling.temperature != 1.0 or config.sampling.top_p != 1.0:
        return "it does not sample from the teacher's own distribution"
    return ""


def _check_kind(recipe: Recipe, here: str, value: str, fits: Callable[[type[StageConfig]], bool]) -> None:
    stage = recipe.stages.get(value)
    if stage is not None and not fits(type(stage)):
        kinds = " or ".join(name for name, kind in KINDS.items() if fits(kind))
        raise UserError(f"{here}: {value!r} is a stage of kind {stage.kind}, but this key needs a {kinds} stage.")


def _looks_like_path(value: str) -> bool:
    return "/" in value or value.startswith(".") or Path(value).exists()


def order(recipe: Recipe, where: str = "recipe") -> list[str]:
    """Return the stage names, inputs first, otherwise in the order of the file. Raises UserError that names a cycle."""
    done: list[str] = []

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            cycle = " -> ".join((*path[path.index(name) :], name))
            raise UserError(f"{where}: stages: {cycle} is a cycle; a stage cannot depend on its own output.")
        if name not in done:
            for each in recipe.stages[name].inputs():
                if each.name in recipe.stages:
                    visit(each.name, (*path, name))
            done.append(name)

    for name in recipe.stages:
        visit(name, ())
    return done
