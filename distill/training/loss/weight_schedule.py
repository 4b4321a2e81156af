"""Loss weights that change during training."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LinearWeight:
    """A weight that goes linearly from start at the first step to end at the last; end None: constant."""

    start: float
    end: float | None = None

    def at(self, progress: float) -> float:
        """Return the weight when a share `progress` of the steps is done."""
        return self.start if self.end is None else self.start + (self.end - self.start) * progress
