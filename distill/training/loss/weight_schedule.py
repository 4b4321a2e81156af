"""Weights that change while training goes on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LinearWeight:
    """From start at the first step to end at the last, in a straight line; end None: start all the way."""

    start: float
    end: float | None = None

    def at(self, progress: float) -> float:
        """Its value once a share `progress` of the steps is done."""
        return self.start if self.end is None else self.start + (self.end - self.start) * progress
