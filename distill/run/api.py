"""The functions of `distill` for scripts: run a recipe, check it, open the results of a run.

They do what the command line does, by the same code: a run that one of them began can be continued by the other. Mistakes are
raised (UserError, MachineError, DataError, StageError), never printed with an exit.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml

from distill import run_folder
from distill.errors import UserError
from distill.plug import nearest
from distill.recipe import Recipe, load, validate
from distill.recipe.load import find, with_overrides
from distill.reports import pages
from distill.reports.run_report import RunReport
from distill.run import advice, collect, decide, model_card, nodes, pipeline, plan
from distill.run import trials as trying
from distill.run.readiness import check_ready

RUNS = "runs"
"""The folder that holds the runs unless another is named."""

AnyRecipe = str | Path | Mapping[str, Any] | Recipe
"""A recipe: the path of a YAML file, the name of a shipped recipe, a mapping of the same form, or a loaded Recipe."""
Overrides = Mapping[str, Any] | Sequence[str]
"""Fields to set: {"stages.kl.lr": 1e-4} or ["stages.kl.lr=1e-4"]."""


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a run holds.

    folder: RUNS/name. recipe: the one that ran, with every default. report: what report.json says (arms, comparisons, costs; all
    numbers raw: shares in [0, 1], tokens, bytes, FLOPs, seconds). models: by stage, the folder of a finished model, in
    transformers' format. traces: by stage, a folder for `load_traces`.
    """

    folder: Path
    recipe: Recipe
    report: RunReport
    models: dict[str, Path]
    traces: dict[str, Path]

    @property
    def metrics(self) -> dict[str, list[dict[str, Any]]]:
        """By stage, what its metrics.jsonl holds: one record for each step."""
        folders = (self.folder / row["name"] for row in self.report["stages"])
        return {
            each.name: _records(each / run_folder.LOGGED) for each in folders if (each / run_folder.LOGGED).is_file()
        }

    @property
    def html(self) -> Path:
        """The report as a page."""
        return self.folder / "report.html"


@dataclass(frozen=True, slots=True)
class PlannedStage:
    """The prediction for a stage, or for an evaluation of a comparison (`verdict.kl`).

    action: what `run` would do: "run", "skip" (done already), "resume", "grow" or "redo". bytes: written. memory: peak bytes.
    """

    name: str
    kind: str
    action: str
    tokens: float
    bytes: float
    flops: float
    memory: float
    seconds: float
    dollars: float


@dataclass(frozen=True, slots=True)
class Plan:
    """What a recipe will cost on this machine, and what stands in its way.

    notes: what could not be looked up. warnings: stages that take long or may not fit. problems: why a stage cannot run here or
    now; empty if nothing is known to prevent it.
    """

    stages: list[PlannedStage]
    notes: list[str]
    warnings: list[str]
    problems: list[str]

    @property
    def seconds(self) -> float:
        """Predicted seconds of the stages that are not done."""
        return sum(stage.seconds for stage in self.stages if stage.action != "skip")


def load_recipe(recipe: AnyRecipe, overrides: Overrides = ()) -> Recipe:
    """Return a recipe with every default, seed and sweep written out. Raises UserError with a line for each mistake."""
    return _read(recipe, overrides)[0]


def run(
    recipe: AnyRecipe,
    overrides: Overrides = (),
    *,
    runs: str | Path = RUNS,
    only: str | None = None,
    start: str | None = None,
    redo: Sequence[str] = (),
    kinds: Sequence[str] = (),
    trials: bool = True,
) -> RunResult:
    """Run a recipe: finished stages are skipped, interrupted ones resumed. Each stage runs in a process of its own.

    runs: folder that holds the runs. only: run this stage alone. start: this stage and all after it. redo: finished stages to
    run again, with those that depend on them. kinds: only stages of these kinds. trials: try prompts, tokenizers, judges and
    rewards before the first stage.

    RUN/recipe.yaml is the recipe as given (a mapping is written as YAML), RUN/resolved.yaml what ran; `distill run
    RUN/recipe.yaml` continues the run from a terminal. A function of your own belongs into a module that can be imported
    (`package.module:function`), because the stage's process imports it.

    Raises UserError for a mistake in the recipe, MachineError, DataError, and StageError if a stage fails; KeyboardInterrupt at
    Ctrl-C, after which the same call continues.
    """
    resolved, source = _read(recipe, overrides)
    folder = Path(runs) / resolved.name
    wanted = select(resolved, folder, only=only, start=start, redo=redo, kinds=kinds)
    runner = pipeline.Runner(resolved, source, folder, tuple(redo), trials=trials)
    runner.do(wanted)
    named = folder / "recipe.yaml" if isinstance(source, str) or not isinstance(recipe, str | Path) else recipe
    write_report(resolved, folder, command(named, overrides, runs))
    return open_run(folder)


def open_run(folder: str | Path) -> RunResult:
    """Return the results of a run, finished or not. folder: the run's, or its name under runs/. Raises UserError, DataError."""
    folder = Path(folder) if Path(folder).is_dir() else Path(RUNS) / folder
    if not run_folder.is_run(folder):
        raise UserError(f"{folder}: not the folder of a run: it holds no {run_folder.RESOLVED}.")
    recipe = run_folder.recipe(folder)
    written = folder / "report.json"
    report = pages.read_report(written) if written.is_file() else collect.collect_run(folder)
    done = [name for name in recipe.stages if _is_done(folder / name)]

    def kept(what: str) -> dict[str, Path]:
        return {name: folder / name / what for name in done if (folder / name / what).is_dir()}

    return RunResult(folder, recipe, report, kept("model"), kept("traces"))


def check(recipe: AnyRecipe, overrides: Overrides = (), *, runs: str | Path = RUNS) -> Plan:
    """Check a recipe and predict time, memory and disk space of each stage on this machine; loads no weights, writes nothing.

    Prompts, tokenizers, judges and rewards of the stages that are due are tried, as `distill check` does.

    Raises UserError for mistakes in the recipe.
    """
    resolved = load_recipe(recipe, overrides)
    folder = Path(runs) / resolved.name
    plan.check_plugs(resolved)
    machine = plan.measured(resolved)
    rows = plan.predict(resolved, machine)
    by_name = {node.name: node for node in nodes.nodes(resolved)}
    actions = {name: decide.decide(node, resolved, folder).action for name, node in by_name.items()}
    ahead = [row for row in rows if actions[row.name] != "skip"]
    problems: list[str] = []
    for row in ahead:
        try:
            check_ready(by_name[row.name])
        except UserError as error:
            problems.append(str(error))
    due = list(dict.fromkeys(row.name.partition(".")[0] for row in ahead))
    tried: dict[str, list[str]] = {"warn": [], "fail": problems}
    for trial in trying.cheap(resolved, folder, due, ahead) if due else ():
        if trial.status in tried:
            tried[trial.status].append(f"{trial.subject}: {trial.name}: {trial.figure}. {trial.remedy}")
    return Plan(
        stages=[PlannedStage(row.name, row.kind, actions[row.name], **row.amounts) for row in rows],
        notes=[note for row in rows for note in row.notes],
        warnings=[*advice.memory_lines(ahead, machine), *advice.long_lines(resolved, ahead, machine), *tried["warn"]],
        problems=[*problems, *advice.too_large(ahead, machine)],
    )


def select(
    recipe: Recipe,
    folder: Path,
    *,
    only: str | None = None,
    start: str | None = None,
    redo: Iterable[str] = (),
    kinds: Iterable[str] = (),
    ready: bool = True,
) -> list[nodes.Node]:
    """Return the nodes to run. Raises UserError for a stage that the recipe does not have and, if `ready`, for one whose inputs
    are not done."""
    wanted = nodes.select(recipe, kinds=tuple(kinds), only=only, start=start)
    known = {name for node in nodes.nodes(recipe) for name in node.stages}
    if unknown := [name for name in redo if name not in known]:
        raise UserError(f"--redo: there is no stage {unknown[0]!r}.{nearest(unknown[0], known)}")
    if ready:
        nodes.require_inputs(recipe, folder, wanted)
    return wanted


def write_report(recipe: Recipe, folder: Path, command: str) -> dict[str, Path]:
    """Write the report of a run, and the cards of its models; return the report's files by name. command: what repeats the run."""
    stages = [node.name for node in nodes.nodes(recipe)]
    report = collect.collect(recipe, folder, stages, command)
    written = pages.write_report(report, folder)
    model_card.write_all(recipe, folder, report)
    return written


def command(recipe: str | Path, overrides: Overrides, runs: str | Path) -> str:
    """Return the command line that runs a recipe."""
    texts = (
        [f"{key}={json.dumps(value)}" for key, value in overrides.items()]
        if isinstance(overrides, Mapping)
        else list(overrides)
    )
    elsewhere = [] if str(runs) == RUNS else ["--runs", str(runs)]
    return shlex.join(["distill", "run", str(recipe), *texts, *elsewhere])


def _read(recipe: AnyRecipe, overrides: Overrides) -> tuple[Recipe, Path | str]:
    """Return a recipe with overrides, and its file, or its text if it has none."""
    given = overrides if isinstance(overrides, Mapping) else list(overrides)
    if isinstance(recipe, str | Path):
        return load(recipe, given), find(Path(recipe))
    if isinstance(recipe, Recipe):
        tree: Any = recipe.model_dump(mode="json")
        resolved = validate(with_overrides(tree, given)) if given else recipe
        resolved._folder = recipe._folder
    elif isinstance(recipe, Mapping):
        tree = _plain(recipe)
        resolved = validate(with_overrides(tree, given))
        resolved._folder = Path.cwd()
    else:
        raise UserError(f"recipe: a path, a name, a mapping or a Recipe is needed, not {type(recipe).__name__}.")
    return resolved, yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def _plain(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return a mapping as a tree that YAML can hold: paths become text, tuples lists. Raises UserError for other objects."""

    def plain(value: Any, where: str) -> Any:
        if isinstance(value, Mapping):
            return {str(key): plain(inner, f"{where}{key}.") for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [plain(inner, where) for inner in value]
        if isinstance(value, Path):
            return str(value)
        if value is None or isinstance(value, str | int | float | bool):
            return value
        hint = " Name a function as package.module:function." if callable(value) else ""
        raise UserError(f"recipe: {where.rstrip('.')}: a {type(value).__name__} cannot be written into a recipe.{hint}")

    return cast(dict[str, Any], plain(recipe, ""))


def _is_done(folder: Path) -> bool:
    standing = run_folder.read(folder)
    return standing is not None and standing.status == "done"


def _records(path: Path) -> list[dict[str, Any]]:
    """Return the records of a metrics.jsonl; a last line that is still being written is left out."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError):
            records.append(json.loads(line))
    return records
