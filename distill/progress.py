"""One live line on a terminal, plain lines elsewhere: what is done, of how much, how fast, how long still."""

from __future__ import annotations

import sys
import time
from typing import TextIO


class Live:
    """Progress of one piece of work. `update` may be called as often as one likes; it draws a few times a second.

    On a terminal the line is redrawn in place; elsewhere one is printed every `plain_every` seconds, and the last.
    """

    def __init__(
        self,
        label: str,
        total: int,
        unit: str,
        *,
        stream: TextIO | None = None,
        done: int = 0,
        plain_every: float = 15.0,
    ) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.stream = stream or sys.stdout
        self.terminal = self.stream.isatty()
        self.first = done
        self.done = done
        self.metrics: dict[str, float | str] = {}
        self.began = time.monotonic()
        self.every = 0.2 if self.terminal else plain_every
        self.drawn = self.began - self.every

    def update(self, done: int, **metrics: float | str) -> None:
        """`metrics` are shown by name; a rate is called for example tokens_per_second."""
        self.done, self.metrics = done, metrics
        now = time.monotonic()
        if now - self.drawn >= self.every or done >= self.total:
            self.drawn = now
            self._draw(end="\r" if self.terminal else "\n")

    def close(self) -> None:
        """Leave the last state standing."""
        if self.terminal and self.done > self.first:
            self._draw(end="\n")

    def line(self) -> str:
        elapsed = time.monotonic() - self.began
        share = f"{self.done}/{self.total} {self.unit}"
        shown = [
            f"{name.replace('_per_second', '/s').replace('_', ' ')} {_number(v)}"
            for name, v in self.metrics.items()
        ]
        fresh = self.done - self.first
        if fresh > 0 and self.done < self.total:
            shown.append(f"ETA {clock(elapsed / fresh * (self.total - self.done))}")
        return "  ".join([f"{self.label:<12}", share, *shown])

    def _draw(self, end: str) -> None:
        clear = "\x1b[2K" if self.terminal else ""
        self.stream.write(f"{clear}  {self.line()}{end}")
        self.stream.flush()


def clock(seconds: float) -> str:
    """75 -> 1:15; 3700 -> 1:01:40."""
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _number(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
