"""What a trial says, and what all trials of a recipe share: models, tokenizers and tasks, each loaded once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from distill import models
from distill.errors import MachineError
from distill.recipe import Recipe, StageConfig, served_models
from distill.recipe.lineage import origin
from distill.records import Problem, Split, Task, UserError
from distill.run.model_checks import local_folder
from distill.stages.context import make_task

Status = Literal["pass", "fail", "warn", "skip"]


@dataclass(frozen=True, slots=True)
class Trial:
    """The outcome of one trial.

    name: what was tried. subject: the part of the recipe it is about. status: "fail" ends a run before it begins, "warn" does not,
    "skip" could not be tried. figure: what was found, with its number. remedy: what to change; empty unless it failed.
    shown: lines to be read by the user, such as a rendered prompt.
    """

    name: str
    subject: str
    status: Status
    figure: str
    remedy: str = ""
    shown: tuple[str, ...] = ()


@dataclass(slots=True, eq=False)
class LocalModel:
    """The folder and tokenizer of a model of the recipe, by its name there; the weights need not be there."""

    source: str
    folder: Path
    tokenizer: Any


@dataclass(slots=True, eq=False)
class TrialSetup:
    """A recipe on trial. run: the folder of its run, which need not exist. due: the stages that are still to be run.

    fetches: whether a tokenizer that is not on this machine may be fetched from the hub.
    """

    recipe: Recipe
    run: Path
    due: tuple[str, ...]
    fetches: bool = False
    _models: dict[str, LocalModel | str] = field(default_factory=dict)
    _tasks: dict[str, Task | UserError] = field(default_factory=dict)
    _problems: dict[tuple[str, Split], list[Problem]] = field(default_factory=dict)

    def stages(self, *kinds: type[StageConfig]) -> Iterator[tuple[str, Any]]:
        """Yield the due stages of some kinds, with their names."""
        for name in self.due:
            if isinstance(self.recipe.stages[name], kinds):
                yield name, self.recipe.stages[name]

    def local(self, model: str) -> LocalModel | str:
        """Return the folder and tokenizer of a model of the recipe, or of the one that a stage's model was made from; or the
        reason why it cannot be had."""
        source = origin(self.recipe, model)
        if source not in self._models:
            self._models[source] = self._load(source)
        return self._models[source]

    def _load(self, source: str) -> LocalModel | str:
        if source not in self.recipe.models:
            return f"{source} is made by a stage"
        model = self.recipe.models[source]
        packaged = model.source.startswith(models.PACKAGE)
        folder = local_folder(model)
        if folder is None and (packaged or self.fetches):
            try:
                folder = models.resolve(model, weights=packaged and source not in served_models(self.recipe))
            except UserError as error:
                return str(error)
        if folder is None:
            return f"{model.source} is not on this machine yet"
        return LocalModel(source, folder, models.load_tokenizer(folder, trust_remote_code=model.trust_remote_code))

    def has_weights(self, model: str) -> bool:
        """Whether the weights of a model's origin are on this machine."""
        config = self.recipe.models.get(origin(self.recipe, model))
        if config is None or origin(self.recipe, model) in served_models(self.recipe):
            return False
        return config.source.startswith(models.PACKAGE) or local_folder(config) is not None

    def task(self, name: str) -> Task:
        """Return a task of the recipe. Raises UserError if it cannot be made."""
        if name not in self._tasks:
            try:
                self._tasks[name] = make_task(name, self.recipe.tasks[name])
            except UserError as error:
                self._tasks[name] = error
        found = self._tasks[name]
        if isinstance(found, UserError):
            raise found
        return found

    def problems(self, name: str, split: Split, most: int) -> list[Problem]:
        """Return the first problems of a task, fewer where it has fewer. Raises UserError if it has none."""
        key = (name, split)
        if key not in self._problems or len(self._problems[key]) < most:
            task = self.task(name)
            num = most if task.is_endless else None
            self._problems[key] = list(islice(task.problems(split, num, self.recipe.seed), most))
        return self._problems[key][:most]

    def every_problem(self, name: str, split: Split, most: int | None) -> list[Problem]:
        """Return all problems of a task's split; of an endless task `most`.

        Raises UserError if there are fewer than `most`, or none; MachineError if they cannot be reached.
        """
        return list(self.task(name).problems(split, most, self.recipe.seed))

    def some_problems(self, name: str, most: int) -> tuple[Split, list[Problem]]:
        """Return a split and its first problems: train ones, or held-out ones where there are no others.

        Raises UserError if the task has none, MachineError if they cannot be reached.
        """
        try:
            if found := self.problems(name, "train", most):
                return "train", found
        except MachineError:
            raise
        except UserError:
            pass  # a task for evaluation has no train problems
        return "held_out", self.problems(name, "held_out", most)


Step = Callable[[TrialSetup], Iterator[Trial]]
"""Makes the trials of one sort."""
