"""The context that a stage runs in, and the result that it returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill import machine, models, plug, run_folder
from distill.files import SHIPPED, whole_folder
from distill.machine import Machine, Width
from distill.progress import Live, Screen
from distill.recipe import Recipe, TaskConfig, served_models
from distill.recipe.paths import RULE
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
        """The seed of the stage's random draws: its own, or the recipe's."""
        own = self.recipe.stages[self.name.partition(".")[0]].seed
        return self.recipe.seed if own is None else own

    def live(self, total: int, unit: str, done: int = 0) -> Live:
        """A live progress line on the terminal."""
        return self.screen.live(total, unit, done)

    def phase(self, text: str) -> None:
        """Show a step that may take seconds, until the next phase or live line."""
        self.screen.phase(text)

    def say(self, text: str) -> None:
        """Print a plain line."""
        self.screen.say(text)

    def say_note(self, engine: Any) -> None:
        """Print an engine's note on how it runs the model, if it has one (an optional attribute of engines)."""
        if note := getattr(engine, "note", ""):
            self.say(note)

    def model_dir(self, reference: str) -> Path:
        """Return the folder of a model of the recipe or of a stage; without weights if only an endpoint runs the model.

        A model of the hub is that of the commit which the run first loaded, whatever the hub has now. Raises UserError if a
        stage's model is no longer what the stage wrote.
        """
        if reference in self.recipe.stages:
            folder = self.run / reference / "model"
            models.verify(folder, f"Put back a copy, or make it again with --redo {reference}.")
            return folder
        model = self.recipe.models[reference]
        weights = reference not in served_models(self.recipe)
        kept = run_folder.commit_of(self.run, model)
        if kept is not None:
            # Known only after all but the weights was there.
            there = models.cached_folder(model.source, kept)
            if there is not None and (not weights or models.is_whole(there)):
                return there
        folder = models.resolve(run_folder.at_commit(self.run, model), self.phase, weights=weights)
        if kept is None and (commit := models.commit_of(folder)) is not None:
            run_folder.keep_commit(self.run, model, commit)
        return folder

    def trusts(self, reference: str) -> bool:
        """Return whether the recipe allows a model's own code to run (trust_remote_code); a stage's model: that of its input."""
        if reference in self.recipe.models:
            return self.recipe.models[reference].trust_remote_code
        stage = self.recipe.stages.get(reference)
        return stage is not None and any(self.trusts(name) for name in stage.reads("model"))

    def data_path(self, reference: str) -> Path:
        """Return the path of a stage's traces, or of a file or folder."""
        if reference in self.recipe.stages:
            return self.run / reference / "traces"
        path = find_data(reference)
        if path is None:
            raise UserError(f"stages.{self.name}.data: {reference!r} does not exist. {RULE} ({Path.cwd()}).")
        return path

    def machine(self, width: Width) -> Machine:
        """Return this machine from the run's environment.json; measure it now if the width is missing there."""
        return machine.in_stage(self.run, width, models.cache_home() / "machine")

    def task(self, reference: str) -> Task:
        """A task of the recipe."""
        return make_task(reference, self.recipe.tasks[reference])


def find_data(reference: str) -> Path | None:
    """Find a file or folder of a recipe: relative to the working directory, or among the files shipped with the package."""
    given = Path(reference).expanduser()
    return next((path for path in (given, SHIPPED / given) if path.exists()), None)


def make_task(name: str, config: TaskConfig) -> Task:
    """Make the task that a recipe describes. Raises UserError for an unknown task or a wrong option."""
    from distill.tasks import templates

    function = plug.bind(config.fn, config.options, "distill.tasks", f"tasks.{name}")
    with templates.given_options(config.template_options):
        task: Task = function(name)
    if dict(task.template.options) != config.template_options:
        raise UserError(f"tasks.{name}.template_options: {config.fn} makes its template without them.")
    return task


def save_model(model: Any, tokenizer: Any, context: Context, dtype: str, *, trust_remote_code: bool = False) -> str:
    """Write the stage's model atomically and prove it by loading it; return the weights' fingerprint. Casts the model in place."""
    folder = context.folder / "model"
    model = models.cast(model, dtype)
    models.check_finite(model, f"stages.{context.name}")
    with whole_folder(folder) as building:
        models.save(model, tokenizer, building)
        context.phase("comparing the saved model with the one in memory")
        if note := models.prove_saved(model, building, trust_remote_code):
            context.say(note)
        models.seal(building)
    return models.weights_fingerprint(folder)


def fingerprint_of(path: Path) -> str:
    """Return the fingerprint of a file's bytes, or of the names, sizes and times of a folder's files."""
    if path.is_file():
        return models.file_hash(path)[:16]
    files = sorted(p for p in path.rglob("*") if p.is_file())
    return stable_hash(*[f"{p.relative_to(path)}:{p.stat().st_size}:{p.stat().st_mtime_ns}" for p in files])
