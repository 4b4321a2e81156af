"""The state of a run at this moment, read from its folder: which stage is under way, how far, how long still. Nothing is written.

A run that was killed leaves its stage "running": the run is under way only if the process that holds its lock lives.
"""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from distill import progress, run_folder
from distill.errors import UserError
from distill.files import read_json
from distill.recipe import Recipe
from distill.run.nodes import nodes
from distill.stages import shown_completions

FRESH = 10.0
"""Seconds after which a stage's progress is old: its process is gone, or busy with something that lets no thread run."""


@dataclass(frozen=True, slots=True)
class StageNow:
    """A node of the run. share: done, in [0, 1]; None if not known. seconds_left: estimate. doing: what it does, in words."""

    name: str
    kind: str
    status: Literal["pending", "running", "stopped", "failed", "done"]
    share: float | None = None
    seconds_left: float | None = None
    doing: str = ""


@dataclass(frozen=True, slots=True)
class RunNow:
    """A run at this moment.

    status: "absent" (not begun), "running", "stopped" (killed, interrupted, or not all of its stages were wanted), "failed",
    "done" (all stages). seconds_left: of the whole run, by predictions for the stages to come; None if unknown.
    completions: of the stage under way, (question, text, correct); rollout: the one that they are of, for a policy. fault: why the
    folder cannot be read.
    """

    status: Literal["absent", "running", "stopped", "failed", "done"]
    stages: tuple[StageNow, ...] = ()
    seconds_left: float | None = None
    completions: tuple[tuple[str, str, bool | None], ...] = ()
    rollout: int | None = None
    fault: str = ""

    @property
    def current(self) -> StageNow | None:
        """The stage under way, or the one that stopped."""
        return next((stage for stage in self.stages if stage.status in ("running", "stopped", "failed")), None)


class Looker:
    """Looks at a run's folder; the recipe is read again only when it changes."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self._recipe: tuple[int, Recipe] | None = None

    def now(self) -> RunNow:
        """Return the state of the run."""
        if not run_folder.is_run(self.run):
            return RunNow("running" if _is_held(self.run) else "absent")
        try:
            return self._read()
        except (UserError, OSError) as error:
            return RunNow("stopped", fault=str(error))

    def _read(self) -> RunNow:
        held, recipe = _is_held(self.run), self._resolved()
        predicted = _json(self.run / run_folder.PREDICTED)
        found = [self._stage(node.name, node.kind, held) for node in nodes(recipe)]
        done = all(stage.status == "done" for stage in found)
        failed = any(stage.status == "failed" for stage in found)
        status: Any = "running" if held else "done" if done else "failed" if failed else "stopped"
        current = next((stage for stage in found if stage.status == "running"), None)
        rollout, completions = _completions(self.run / current.name) if current else (None, ())
        left = _left(found, predicted) if held else None
        return RunNow(status, tuple(found), left, completions, rollout)

    def _resolved(self) -> Recipe:
        written = (self.run / run_folder.RESOLVED).stat().st_mtime_ns
        if self._recipe is None or self._recipe[0] != written:
            self._recipe = written, run_folder.recipe(self.run)
        return self._recipe[1]

    def _stage(self, name: str, kind: str, held: bool) -> StageNow:
        standing = run_folder.read(self.run / name)
        if standing is None:
            return StageNow(name, kind, "pending")
        if standing.status == "done":
            return StageNow(name, kind, "done", 1.0, 0.0)
        if standing.status == "failed":
            return StageNow(name, kind, "failed", doing=_first_lines(self.run / name / "error.txt"))
        activity = _json(self.run / name / progress.FILE)
        old = time.time() - activity.get("at", 0.0) > FRESH
        if not held or (old and not standing.began):
            # One of several nodes of a process that has not come to it yet, if the run is under way.
            return StageNow(name, kind, "pending" if held else "stopped")
        total = activity.get("total") or 0
        share = activity.get("done", 0) / total if total else None
        return StageNow(name, kind, "running", share, activity.get("seconds_left"), activity.get("text", ""))


def _left(stages: list[StageNow], predicted: dict[str, Any]) -> float | None:
    """Return the time left: the estimate of the stage under way, and the predictions for the stages to come."""
    left = 0.0
    for stage in stages:
        if stage.status == "running":
            whole = predicted.get(stage.name)
            rest = stage.seconds_left if stage.seconds_left is not None else whole
            if rest is None:
                return None
            left += rest
        elif stage.status != "done":
            if stage.name not in predicted:
                return None
            left += predicted[stage.name]
    return left


def _completions(folder: Path) -> tuple[int | None, tuple[tuple[str, str, bool | None], ...]]:
    shown = _json(folder / shown_completions.FILE)
    rows = tuple((row["question"], row["text"], row["correct"]) for row in shown.get("rows", ()))
    return shown.get("rollout"), rows


def _is_held(run: Path) -> bool:
    """Return whether the process that holds the run's lock lives; on another machine it is taken to live."""
    holder = _json(run / ".lock.holder")
    if not holder:
        return False
    return holder.get("host") != socket.gethostname() or psutil.pid_exists(holder.get("pid", -1))


def _json(path: Path) -> dict[str, Any]:
    """Return a small JSON object; empty if it is not there or not whole."""
    try:
        found = read_json(path)
    except (OSError, UserError):
        return {}
    return found if isinstance(found, dict) else {}


def _first_lines(path: Path, num: int = 3) -> str:
    try:
        return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[:num])
    except OSError:
        return ""
