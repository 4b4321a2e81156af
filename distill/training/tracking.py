"""Experiment trackers (tensorboard, wandb, trackio, ...) through accelerate, on the main process."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from distill import world
from distill.recipe import OptimStage
from distill.records import UserError


class Trackers:
    """The configured trackers, running inside the context. Raises UserError for one that is not installed."""

    def __init__(self, config: OptimStage, folder: Path, name: str) -> None:
        self._accelerator: Any = None
        if not config.trackers:
            return
        from accelerate import Accelerator
        from accelerate.tracking import get_available_trackers

        installed = {str(tracker) for tracker in get_available_trackers()}
        if missing := [tracker for tracker in config.trackers if tracker not in installed]:
            raise UserError(
                f"trackers: {', '.join(missing)} cannot be used here: unknown, or its package is not installed."
            )
        accelerator = Accelerator(log_with=list(config.trackers), project_dir=str(folder))
        assert accelerator.num_processes == world.size(), "accelerate joins the group that `world` made"
        accelerator.init_trackers(name, config=_flat(config.model_dump(exclude={"trackers"})))
        self._accelerator = accelerator

    def __enter__(self) -> Trackers:
        return self

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log one step's metrics."""
        if self._accelerator is not None:
            self._accelerator.log(dict(metrics), step=step)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._accelerator is not None:
            for tracker in self._accelerator.trackers:
                tracker.finish()


def _flat(config: dict[str, Any]) -> dict[str, str | float | int | bool]:
    """Return a config as a flat mapping of plain values, which is all that trackers take."""
    return {k: v if isinstance(v, str | float | int | bool) else json.dumps(v) for k, v in config.items()}
