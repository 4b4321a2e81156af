"""Run a recipe: its nodes in order, each in a process of its own. Finished nodes are skipped.

`run.nodes` lists the nodes; `run.decide` decides what to do with each.
"""

from __future__ import annotations

import itertools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from distill import interrupt, machine, run_folder, world
from distill.errors import STATUSES, debugging
from distill.files import locked, read_digested, write_atomic, write_digested
from distill.machine import Machine
from distill.models import cache_home
from distill.progress import working
from distill.recipe import EngineConfig, OptimStage, Recipe
from distill.records import stable_hash
from distill.run import launch
from distill.run.decide import decide, input_fingerprints
from distill.run.nodes import Node, nodes
from distill.run.readiness import check_ready
from distill.run.unfinished import kept

if TYPE_CHECKING:
    from distill.run.predictions.row import Row


TRIED = ".tried"
"""The file of a run that names the recipe and the stages whose trials have passed, so that a run that goes on does not repeat them."""


@dataclass(slots=True)
class Runner:
    """One `distill run`: a recipe, its file (or its text), the run's folder, the stages to do again, and whether the cheap trials
    are made first."""

    recipe: Recipe
    source: Path | str
    run: Path
    redo: tuple[str, ...] = ()
    trials: bool = True

    def do(self, wanted: Iterable[Node]) -> None:
        """Run the wanted nodes in order. Raises UserError or StageError at the first failure; finished nodes stay."""
        self.run.mkdir(parents=True, exist_ok=True)
        refusal = (
            f"{self.run} is in use by another `distill run` ({{holder}}); wait for it, or give this run another name."
        )
        with locked(self.run / ".lock", refusal):
            wanted = list(wanted)
            with working("checking the recipe"):
                due = self._due(wanted)
                self._refuse_early(due)
                here = self._machine()
                rows = self._predictions(here)
            self._check_memory_and_time(due, rows, here)
            if self.trials:
                self._try(due, rows)
            predictions = {row.name: row.amounts for row in rows}
            run_folder.write_recipe(self.run, self.recipe, self.source, here)
            seconds = {name: amounts["seconds"] for name, amounts in predictions.items()}
            write_atomic(self.run / run_folder.PREDICTED, json.dumps(seconds))
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
        """The predicted cost of every node."""
        from distill.run import plan

        return plan.predict(self.recipe, here)

    def _due(self, wanted: Iterable[Node]) -> list[Node]:
        """The wanted nodes that are not done."""
        standing = [(node, run_folder.read(self.run / node.name)) for node in wanted]
        return [node for node, stage in standing if stage is None or stage.status != "done"]

    def _check_memory_and_time(self, due: list[Node], rows: Sequence[Row], here: Machine) -> None:
        """Warn about nodes that take long; refuse those that do not fit this machine's memory."""
        from distill.run import advice

        names = {node.name for node in due}
        ahead = [row for row in rows if row.name in names]
        advice.refuse(ahead, here)
        for line in (*advice.memory_lines(ahead, here), *advice.short_lines(ahead)):
            print(line, flush=True)

    def _try(self, due: list[Node], rows: Sequence[Row]) -> None:
        """Make the cheap trials of the stages that are due. Prints warnings; raises UserError if one fails."""
        stages = dict.fromkeys(node.name.partition(".")[0] for node in due)
        recipe = stable_hash(self.recipe.model_dump_json())
        tried = _tried(self.run / TRIED, recipe)
        if not stages.keys() - tried:
            return
        from distill.run import trials

        with working("trying prompts, tokenizers, judges and rewards"):
            found = list(trials.cheap(self.recipe, self.run, list(stages), rows))
        trials.refuse_failed(found)
        for trial in found:
            if trial.status == "warn":
                print(f"warning: {trial.subject}: {trial.name}: {trial.figure}. {trial.remedy}", flush=True)
        write_digested(self.run / TRIED, {"recipe": recipe, "stages": sorted(tried | stages.keys())})

    def _machine(self) -> Machine:
        """This machine; measured once per run and machine."""
        from distill.run import plan

        return machine.of_run(self.run, plan.widths(self.recipe), cache_home() / "machine")

    def _refuse_early(self, due: list[Node]) -> None:
        """Decide for every node before anything is written or moved, so that a refusal changes nothing."""
        for node in nodes(self.recipe):
            if all(run_folder.read(self.run / ref) for ref in node.stages_read(self.recipe)):
                decide(node, self.recipe, self.run, self.redo)
        if due:
            from distill.run import plan

            plan.check_plugs(self.recipe)
        for node in due:
            check_ready(node)

    def _prepare(self, node: Node, number: int, num: int, predictions: Mapping[str, dict[str, float]]) -> str | None:
        """Write the stage.json that a node starts from. Return the reason to run the node, or None if it is finished.

        number: the node's position among the `num` wanted nodes, from 1.
        """
        with working(f"checking what {node.name} reads"):
            decision = decide(node, self.recipe, self.run, self.redo)
        folder = self.run / node.name
        if decision.action == "skip":
            print(f"[{number}/{num}] {node.name}: done already")
            return None
        if decision.action == "redo":
            self._move_to_old(node.name)
        inputs = input_fingerprints(node, self.recipe, self.run)
        standing = run_folder.read(folder)
        if standing is not None:
            run_folder.add_killed_time(folder, standing)
        if standing is None or decision.action == "run":
            lost = standing.seconds if standing is not None else 0.0
            standing = run_folder.State(kind=node.kind, config={}, inputs={}, seconds=lost)
        standing.config, standing.inputs = node.config.model_dump(mode="json"), inputs
        standing.status, standing.predicted = "running", predictions.get(node.name, {})
        standing.attempts += 1
        standing.began = 0.0  # set by its process when it starts
        run_folder.write(folder, standing)
        return f" ({decision.action}: {decision.why})" if decision.why else ""

    def _move_to_old(self, name: str) -> None:
        """Move a stage's former output to RUN/.old before it is done again."""
        old = self.run / ".old"
        old.mkdir(exist_ok=True)
        number = 1 + len(list(old.glob(f"{name}-*")))
        shutil.move(self.run / name, old / f"{name}-{number}")
        print(f"    the former {name} is kept in {old / f'{name}-{number}'}")

    def _spawn(self, nodes: list[Node]) -> None:
        command = self._command(nodes)
        env = {**os.environ, **self._environment(nodes[0])}
        for key in world.ENVIRONMENT:
            env.pop(key, None)
        process = None
        launched = time.monotonic()
        try:
            with interrupt.held_back():
                process = subprocess.Popen(command, env=env)
            status = process.wait()
        except KeyboardInterrupt as stopped:
            number = getattr(stopped, "number", signal.SIGINT)
            if process is not None:
                if number == interrupt.TERMINATE and isinstance(nodes[0].config, OptimStage):
                    print("SIGTERM: ending after a checkpoint; another signal ends it at once", flush=True)
                    interrupt.end_after_checkpoint(process)
                else:
                    interrupt.end(process)
            node = self._fail(nodes, time.monotonic() - launched)
            raise interrupt.Interrupted(number, self._kept(node)) from None
        if status == 0:
            return
        node = self._fail(nodes, time.monotonic() - launched)
        message_file = self.run / node.name / "error.txt"
        message = message_file.read_text(encoding="utf-8") if message_file.is_file() else ""
        log = launch.failed_log(self.run / node.name)
        for number in interrupt.SIGNALS:
            if status in (128 + number, -number):
                raise interrupt.Interrupted(number, self._kept(node))
        if status in STATUSES and message:
            raise STATUSES[status](message)
        if status == -signal.SIGKILL:
            message = (
                "The process was killed, most likely because memory ran out: lower micro_tokens (train) or engine.batch_size "
                "and engine.kv_cache_gib (generate, eval), then run the same command; the stage resumes."
            )
        raise StageError(
            f"stage {node.name!r} failed with status {status}. {message}\n"
            + (
                f"The last lines of {log}:\n{_tail(log)}"
                if debugging() or not message
                else f"Its log is {log}; --debug shows the end of it."
            )
        )

    def _command(self, nodes: list[Node]) -> list[str]:
        """Return the command of the nodes' process: itself, or what starts its processes on this node or on all."""
        first = nodes[0]
        if not isinstance(first.config, OptimStage) or not first.config.parallel.launched:
            names = [node.name for node in nodes]
            return [sys.executable, "-m", "distill.run.stage_process", str(self.run), *names]
        parallel = first.config.parallel
        here = launch.command(self.run, first.name)
        if parallel.launcher is not None:
            return [*shlex.split(parallel.launcher), *here]
        if parallel.nodes > 1:
            print(
                f"    on each of the other {parallel.nodes - 1} nodes, in the same folder: {shlex.join(here)}",
                flush=True,
            )
        return here

    def _kept(self, node: Node) -> str:
        found = kept(self.run / node.name, node.config)
        return f"in {node.name}{', which keeps ' if found else ''}{found}"

    def _fail(self, nodes: list[Node], lived: float) -> Node:
        """Mark the unfinished nodes of a process as failed and return the one that was running. lived: seconds of the process."""
        unfinished = []
        for node in nodes:
            standing = run_folder.read(self.run / node.name)
            if standing is not None and standing.status == "running":
                unfinished.append(node)
                standing.status = "failed"
                if standing.began:
                    # The clock may be set meanwhile: an attempt took no less than nothing, and no more than its process.
                    standing.seconds += min(max(time.time() - standing.began, 0.0), lived)
                    standing.began = 0.0
                run_folder.write(self.run / node.name, standing)
        return unfinished[0] if unfinished else nodes[-1]

    def _environment(self, node: Node) -> dict[str, str]:
        # OpenMP threads that spin at the end of a parallel region are a few percent faster on an idle machine, but many
        # times slower as soon as another process uses one of the cores.
        mine = {"TOKENIZERS_PARALLELISM": "false", "OMP_WAIT_POLICY": "PASSIVE"}
        mine = {key: value for key, value in mine.items() if key not in os.environ}
        engine = getattr(node.config, "engine", None)
        if isinstance(engine, EngineConfig) and not node.config.children():
            from distill import engines

            mine |= engines.environment(engine, getattr(node.config, "tail_draws", 0))
        return mine


def _process(node: Node) -> tuple[str, str]:
    """The key of a node's process: adjacent nodes with the same key (evaluations of one comparison) share a process."""
    return node.kind, node.stage if node.config.shares_process else node.name


def _announce(doing: Mapping[int, tuple[Node, str]], num: int) -> None:
    """Print one line about the nodes of a process. doing: (node, reason) by number."""
    first, last = min(doing), max(doing)
    place = f"{first}" if first == last else f"{first}-{last}"
    names = ", ".join(f"{node.name}{why if len(doing) > 1 else ''}" for node, why in doing.values())
    node, why = doing[first]
    more = why if len(doing) == 1 else ", in one process"
    print(f"[{place}/{num}] {names}: {node.kind}{more}", flush=True)


class StageError(Exception):
    """A stage failed because of a bug or the machine, not because of a user error."""


def _tried(file: Path, recipe: str) -> set[str]:
    """Return the stages whose trials have passed with this recipe."""
    try:
        known = read_digested(file)
    except (OSError, ValueError):
        return set()
    return set(known.get("stages", ())) if known.get("recipe") == recipe else set()


def _tail(log: Path, lines: int = 15) -> str:
    if not log.is_file():
        return "(there is none)"
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
