"""The context that a stage runs in, and the result that it returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill import machine, models, plug
from distill.files import SHIPPED, whole_folder
from distill.machine import Machine, Width
from distill.progress import Live, Screen
from distill.recipe import PlugConfig, Recipe
from distill.records import Cost, Task, UserError, stable_hash
from distill.stages.shared_engine import SharedEngine


@dataclass(frozen=True, slots=True)
class Result:
    """The result of a stage.

    cost: of the stage. teacher_cost: of the teachers' forward passes. metrics: for the report. fingerprint: of the
    output's content; when it changes, the stages that read this output are done again.
    """

    cost: Cost
    metrics: Mapping[str, Any]
    fingerprint: str
    teacher_cost: Cost = field(default_factory=Cost)


@dataclass(slots=True)
class Context:
    """The context of one stage of a run: the recipe, its folders, the terminal and the engine.

    folder: the stage's folder, kept between attempts. engine: the engine of this process, shared with the stages that
    run in it later.
    """

    recipe: Recipe
    run: Path
    name: str
    screen: Screen
    engine: SharedEngine = field(default_factory=SharedEngine)

    @property
    def folder(self) -> Path:
        return self.run / self.name

    @property
    def seed(self) -> int:
        """The random seed of the stage: its own, or the recipe's."""
        own = self.recipe.stages[self.name.partition(".")[0]].seed
        return self.recipe.seed if own is None else own

    def live(self, total: int, unit: str, done: int = 0) -> Live:
        """A live progress line on the terminal."""
        return self.screen.live(total, unit, done)

    def phase(self, text: str) -> None:
        """Show the name of a phase that may take seconds, until the next phase or live line."""
        self.screen.phase(text)

    def say(self, text: str) -> None:
        """Print a plain line."""
        self.screen.say(text)

    def model_dir(self, reference: str) -> Path:
        """The folder of a model of the recipe, or of the model that a stage made."""
        if reference in self.recipe.stages:
            return self.run / reference / "model"
        return models.resolve(self.recipe.models[reference], self.phase)

    def trusts(self, reference: str) -> bool:
        """Whether the recipe allows Python code that comes with the model to run."""
        return reference in self.recipe.models and self.recipe.models[reference].trust_remote_code

    def data_path(self, reference: str) -> Path:
        """The path of a stage's traces, or of a file or folder. Raises UserError if it does not exist."""
        if reference in self.recipe.stages:
            return self.run / reference / "traces"
        path = find_data(reference)
        if path is None:
            raise UserError(f"stages.{self.name}.data: {reference!r} does not exist (looked in {Path.cwd()}).")
        return path

    def machine(self, width: Width) -> Machine:
        """This machine, from the run's environment.json; measured now if the width is missing there."""
        return machine.in_stage(self.run, width, models.cache_home() / "machine")

    def task(self, reference: str) -> Task:
        """A task of the recipe."""
        return make_task(reference, self.recipe.tasks[reference])


def find_data(reference: str) -> Path | None:
    """The file or folder at a recipe's path, relative to the working directory or to the package's data; None if absent."""
    given = Path(reference).expanduser()
    return next((path for path in (given, SHIPPED / given) if path.exists()), None)


def make_task(name: str, config: PlugConfig) -> Task:
    """Make the task that a recipe describes. Raises UserError for an unknown task or a wrong option."""
    function = plug.bind(config.fn, config.options, "distill.tasks", f"tasks.{name}")
    task: Task = function(name)
    return task


def save_model(model: Any, tokenizer: Any, folder: Path, dtype: str) -> str:
    """Write the model to folder/model atomically and return the weights' fingerprint. Casts it to `dtype` in place."""
    with whole_folder(folder / "model") as building:
        models.save(models.cast(model, dtype), tokenizer, building)
    return models.weights_fingerprint(folder / "model")


def fingerprint_of(path: Path) -> str:
    """Fingerprint of a path outside the run: of a file's bytes, or of the names, sizes and times of a folder's files."""
    if path.is_file():
        return models.file_hash(path)[:16]
    files = sorted(p for p in path.rglob("*") if p.is_file())
    return stable_hash(*[f"{p.relative_to(path)}:{p.stat().st_size}:{p.stat().st_mtime_ns}" for p in files])
