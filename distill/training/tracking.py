"""Experiment trackers (tensorboard, wandb, trackio, ...) through accelerate, on the main process.

They get what metrics.jsonl gets: the same names, values and steps. A tracker's project is the run, and its run is the stage; both ends of
an interrupted stage belong to one run of the tracker, of which STAGE/trackers.json holds the id. Steps that are repeated after
a checkpoint have been logged already (their values are the same), so they are not logged again.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from distill import world
from distill.files import read_json, write_atomic
from distill.recipe import OptimStage
from distill.records import UserError

FILE = "trackers.json"


class Trackers:
    """The configured trackers, running inside the context. folder: the stage's, whose metrics.jsonl says which steps they have.

    Raises UserError for one that is not installed.
    """

    def __init__(self, config: OptimStage, folder: Path) -> None:
        self._accelerator: Any = None
        self._logged = 0
        if not config.trackers:
            return
        from accelerate import Accelerator
        from accelerate.tracking import get_available_trackers

        installed = {str(tracker) for tracker in get_available_trackers()}
        if missing := [tracker for tracker in config.trackers if tracker not in installed]:
            raise UserError(
                f"trackers: {', '.join(missing)} cannot be used here: unknown, or its package is not installed."
            )
        folder = folder.resolve()
        resumed, id = self._id(folder)
        self._logged = _last_step(folder / "metrics.jsonl") if resumed else 0
        accelerator = Accelerator(log_with=list(config.trackers), project_dir=str(folder))
        assert accelerator.num_processes == world.size(), "accelerate joins the group that `world` made"
        flat = _flat(config.model_dump(exclude={"trackers"}))
        settings: dict[str, dict[str, Any]] = {
            "wandb": {"name": folder.name, "id": id, "resume": "allow", "dir": str(folder)},
            # It forgets the config of a run that is resumed without one.
            "trackio": {"name": f"{folder.name}-{id}", "resume": "allow", "config": flat},
        }
        accelerator.init_trackers(
            folder.parent.name,
            config=None if resumed else flat,
            init_kwargs={name: settings[name] for name in config.trackers if name in settings},
        )
        self._accelerator = accelerator

    @staticmethod
    def _id(folder: Path) -> tuple[bool, str]:
        """Return whether the stage has been tracked before, and the id of its run; a new one is kept. Every process calls this."""
        file = folder / FILE
        found: tuple[bool, str] = (False, secrets.token_hex(4))
        if world.is_main():
            if file.is_file():
                found = True, str(read_json(file, "Remove it: the trackers then begin a new run.")["id"])
            else:
                write_atomic(file, json.dumps({"id": found[1]}))
        return world.broadcast(found)

    def __enter__(self) -> Trackers:
        return self

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log one step's metrics, unless an attempt before has."""
        if self._accelerator is not None and step > self._logged:
            self._accelerator.log(dict(metrics), step=step)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._accelerator is not None:
            for tracker in self._accelerator.trackers:
                tracker.finish()


def _last_step(lines: Path) -> int:
    """Return the last step of a metrics.jsonl, 0 without one."""
    last = 0
    if lines.is_file():
        for line in lines.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError, TypeError, KeyError, RecursionError):
                last = max(last, int(json.loads(line)["step"]))
    return last


def _flat(config: dict[str, Any]) -> dict[str, str | float | int | bool]:
    """Return a config as a flat mapping of plain values, which is all that trackers take."""
    return {k: v if isinstance(v, str | float | int | bool) else json.dumps(v) for k, v in config.items()}
