"""The base class of all stage kinds, and what a stage says of its inputs."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from distill import plug
from distill.recipe import served
from distill.recipe.engine import EngineConfig
from distill.recipe.fields import Config, Seeds
from distill.records import UserError

Sort = Literal["model", "teacher", "data", "task", "questions", "budget"]


@dataclass(frozen=True, slots=True)
class Input:
    """One input of a stage: its sort, its name in the recipe (or a path), and the stage's field that names it.

    Sorts: "model" is a model that the stage trains, prunes, runs or evaluates; "teacher" a model that the stage learns
    from; "data" traces, by stage or path; "task" a task; "questions" a task or a file of problems; "budget" a training
    stage of which only the FLOPs are read.
    """

    sort: Sort
    name: str
    field: str = ""

    def __post_init__(self) -> None:
        if not self.field:
            object.__setattr__(self, "field", self.sort)


class StageConfig(Config):
    """A stage kind: the fields that every stage has, and the kind's attributes and methods.

    Your own kind is a subclass in a module beside the recipe (`kind: mymodule:MyStage`): its fields, `inputs`,
    the attributes below and `run(self, context) -> Result`. With `predict`, `distill check` also predicts its cost.

    writes: the output that later stages may read. "model": a model in <folder>/model; "traces": shards or a selection
    in <folder>/traces.
    trains: whether the stage trains its `model`. A budget can name such a stage. A model that a stage writes without
    training it counts as a new model: the costs of its own training start at zero.
    adds_to: input fields. When only the content of these inputs changed, the stage processes the additions; when any
    other input changed, the stage is done again.
    shares_process: whether the stages of this kind in one comparison run in one process.
    """

    writes: ClassVar[Literal["model", "traces", "nothing"]] = "nothing"
    trains: ClassVar[bool] = False
    adds_to: ClassVar[frozenset[str]] = frozenset()
    shares_process: ClassVar[bool] = False

    kind: str
    seed: int | None = Field(None, ge=0, description="random seed of the stage; None = the recipe's seed")
    seeds: Seeds | None = Field(
        None, description="training seeds: the stage, and every stage that reads it, is run once for each seed"
    )
    sweep: dict[str, list[Any]] | None = Field(
        None,
        description="one field with several values, such as {max_traces: [64, 256]}: the stage, and every stage that reads it, is run once "
        "for each value, as `stage-64`",
    )

    def inputs(self) -> Iterator[Input]:
        """Every input of this stage."""
        yield from ()

    def reads(self, sort: Sort) -> list[str]:
        """The names of this stage's inputs of one sort."""
        return [each.name for each in self.inputs() if each.sort == sort]

    def children(self) -> dict[str, StageConfig]:
        """Stages that this one expands into, by name; the full name is `<this stage>.<name>`."""
        return {}

    def evaluations(self) -> dict[str, dict[int, tuple[str, str]]]:
        """The evaluations that this stage makes: arm -> training seed -> (child stage, model).

        The child "" is this stage itself.
        """
        return {}

    def held_out_problems(self, task: str) -> int | None:
        """The number of the task's held-out problems that this stage evaluates on; None if it evaluates none."""
        return None

    def with_copies(self, seeds: Mapping[str, list[int]], where: str) -> StageConfig | None:
        """This stage with all seed copies of its inputs; None if the stage itself is copied for each seed.

        seeds: the training seeds of each copied stage. where: the stage's place in the recipe, for error messages.
        """
        return None

    def with_sweeps(self, copies: Mapping[str, Mapping[str, str]], where: str) -> StageConfig | None:
        """This stage with all copies of its swept inputs; None if the stage itself is copied for each value.

        copies: by stage, the names of its copies by value. where: the stage's place in the recipe, for error messages.
        """
        return None

    def half_the_work(self, stage: str) -> str:
        """Return how to halve the work of `stage`, in words and with its own keys; "" if it has no such key."""
        return ""

    @model_validator(mode="after")
    def _one_sweep(self) -> StageConfig:
        if self.sweep is None:
            return self
        fields = set(type(self).model_fields) - {"kind", "seed", "seeds", "sweep"}
        key = next(iter(self.sweep), "")
        if len(self.sweep) != 1 or key not in fields:
            raise ValueError(
                f"sweep: names one field of the stage and its values, such as {{max_traces: [64, 256]}}, not {self.sweep}"
            )
        if not self.sweep[key] or len({str(value) for value in self.sweep[key]}) < len(self.sweep[key]):
            raise ValueError(f"sweep: {key}: give distinct values")
        return self

    @model_validator(mode="after")
    def _sleeps_beside_a_trainer(self) -> StageConfig:
        engine = getattr(self, "engine", None)
        if isinstance(engine, EngineConfig) and engine.sleep and not self.trains:
            raise ValueError("engine.sleep: nothing trains in this stage, so its engine never sleeps; remove the key")
        return self

    @property
    def is_built_in(self) -> bool:
        return ":" not in self.kind

    def implementation(self) -> Callable[[Any, Any], Any]:
        """The function that runs the stage, `(config, context) -> Result`. Imports the stage's module."""
        own = getattr(type(self), "run", None)
        return own or importlib.import_module(f"distill.stages.{self.kind}").run  # type: ignore[no-any-return]

    def check(self, name: str, recipe: Any) -> None:
        """Check the functions that the stage names and their options. Raises UserError."""
        check = plug.names("distill.run.checks").get(self.kind)
        if check is not None:
            check(name, self, recipe)

    def check_environment(self, where: str) -> None:
        """Check what the stage needs beside the recipe: the variable with an endpoint's key. Raises UserError."""
        if isinstance(engine := getattr(self, "engine", None), EngineConfig):
            try:
                served.secret(engine.key)
            except UserError as error:
                raise error.within(f"{where}.{error}") from None

    def predict(self, name: str, known: Any, machine: Any) -> list[Any]:
        """Predicted cost: one `run.predictions.row.Row` for each process of the stage; empty if it is unknown."""
        if not self.is_built_in:
            return []
        rows: list[Any] = plug.find(self.kind, "distill.run.predictions")(name, self, known, machine)
        return rows
