"""Which checkpoint is the best by a metric, the mean of its values since the checkpoint before."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from distill.recipe import OptimStage
from distill.records import UserError

SMALLER_IS_BETTER = ("loss", "nll", "kl", "kl_teacher", "kl_ref", "divergence")
"""Last parts of the names of metrics of which a smaller value is better."""


@dataclass(slots=True)
class BestCheckpoint:
    """The best checkpoint so far. metric: "" = not followed. step, value: of the best one."""

    metric: str = ""
    greater: bool = False
    step: int | None = None
    value: float | None = None
    seen: list[float] = field(default_factory=list)

    @staticmethod
    def of(config: OptimStage) -> BestCheckpoint:
        metric = config.metric_for_best_model or ""
        greater = config.greater_is_better
        if greater is None:
            last = metric.rpartition("/")[2]
            greater = not any(last == name or last.endswith(f"_{name}") for name in SMALLER_IS_BETTER)
        return BestCheckpoint(metric, greater)

    def add(self, metrics: Mapping[str, float]) -> None:
        """Take up one step's value. Raises UserError if the steps have no such metric."""
        if not self.metric:
            return
        if self.metric not in metrics:
            raise UserError(
                f"metric_for_best_model: there is no metric {self.metric!r}; this stage has {', '.join(sorted(metrics))}."
            )
        self.seen.append(metrics[self.metric])

    def decide(self, step: int) -> dict[str, Any] | None:
        """Compare the mean since the last checkpoint with the best one so far; return the best (step, value), or None."""
        finite = [value for value in self.seen if math.isfinite(value)]
        self.seen = []
        if finite:
            mean = sum(finite) / len(finite)
            if self.value is None or (mean > self.value if self.greater else mean < self.value):
                self.step, self.value = step, mean
        return {"step": self.step, "value": self.value} if self.step is not None else None

    def load(self, stored: Mapping[str, Any] | None) -> None:
        """Continue from what a checkpoint holds."""
        if stored and self.metric:
            self.step, self.value = stored["step"], stored["value"]
