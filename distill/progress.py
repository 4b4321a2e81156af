"""Progress of running work: one live line on a terminal, plain lines elsewhere.

A `Screen` owns a stream and shows one thing at a time: a phase ("loading base") or a count (`Live`). On a terminal its line
is redrawn in place. Elsewhere, where rich's progress prints nothing before the end, the line is printed when the work
begins, and again with the elapsed time after QUIET seconds without another line. `ticking` starts the thread that does
both, so that they work during a slow step too.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TextIO

QUIET = 25.0
"""Without a terminal: seconds without a line after which the running work is printed again."""
PLAIN_EVERY = 15.0
"""Without a terminal: seconds between two lines of a count."""
REDRAW = 0.2
"""On a terminal: seconds between two updates of a count."""
TICK = 1.0
SLOW = 2.0
"""Seconds without progress after which a live line shows the time since the last progress."""
PATIENCE = 2.0
"""Seconds after which a command that is usually quick shows what it is doing."""
LABEL = 12
CLEAR = "\x1b[2K"


class Screen:
    """The lines of one process. label: a name in front of them, for example a stage's."""

    def __init__(
        self,
        stream: TextIO | None = None,
        label: str = "",
        *,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stream = stream or sys.stdout
        self.label = label
        self.terminal = self.stream.isatty()
        self.now = now
        self._lock = threading.RLock()
        self._current: _Phase | Live | None = None
        self._shown_at = now()
        self._told = True
        self._silent_until = now()

    def say(self, text: str) -> None:
        """Print a plain line above the running work's line."""
        with self._lock:
            self._print(f"  {text}")
            if self.terminal:
                self._draw(0.0)

    def phase(self, text: str, *, after: float = 0.0) -> None:
        """Show the work that begins now, until the next phase or live line begins.

        after: seconds before it is shown, for work that is usually done by then.
        """
        with self._lock:
            self._current = _Phase(text, self.now())
            self._silent_until = self.now() + after
            self._told = False
            self._draw(0.0)

    def live(self, total: int, unit: str, done: int = 0) -> Live:
        """A count from `done` to `total`, shown at once; unit: what is counted, in the plural."""
        with self._lock:
            live = Live(self, total, unit, done)
            self._current = live
            self._silent_until = self.now()
            self._draw(0.0)
        return live

    def tick(self) -> None:
        """Show the running work again: on a terminal always, elsewhere after QUIET seconds without a line."""
        self._draw(0.0 if self.terminal or not self._told else QUIET)

    @contextmanager
    def ticking(self) -> Iterator[Screen]:
        """Tick every second in a thread; at the end clear the terminal's last line."""
        ended = threading.Event()

        def run() -> None:
            while not ended.wait(TICK):
                self.tick()

        threading.Thread(target=run, daemon=True, name="screen").start()
        try:
            yield self
        finally:
            ended.set()
            with self._lock:
                if self.terminal and self._current is not None:
                    self.stream.write(CLEAR)
                    self.stream.flush()
                self._current = None

    def _draw(self, every: float) -> None:
        """Show the running work unless something was shown less than `every` seconds ago."""
        with self._lock:
            now = self.now()
            if self._current is None or now < self._silent_until or now - self._shown_at < every:
                return
            self._told = True
            label = f"{self.label:<{LABEL}}  " if self.label else ""
            text = f"  {label}{self._current.text(now)}"
            if self.terminal:
                self._shown_at = now
                self.stream.write(f"{CLEAR}{text[: self._columns() - 1]}\r")
                self.stream.flush()
            else:
                self._print(text)

    def _print(self, line: str) -> None:
        self._shown_at = self.now()
        self.stream.write(f"{CLEAR if self.terminal else ''}{line}\n")
        self.stream.flush()

    def _columns(self) -> int:
        return os.get_terminal_size(self.stream.fileno()).columns or 80

    def _advanced(self, live: Live) -> None:
        finished = live.done >= live.total
        self._draw(0.0 if finished else REDRAW if self.terminal else PLAIN_EVERY)

    def _closed(self, live: Live) -> None:
        """Leave the last state of a live line standing on a terminal; elsewhere it has been printed."""
        with self._lock:
            if self.terminal and live.done > live.first:
                self._draw(0.0)
                self.stream.write("\n")
            self._current = _Phase("finishing", self.now())
            if self.terminal:
                self._draw(0.0)


@dataclass(frozen=True, slots=True)
class _Phase:
    """Work without a count, and when it began."""

    what: str
    began: float

    def text(self, now: float) -> str:
        seconds = now - self.began
        return f"{self.what}  {clock(seconds)}" if seconds >= 1 else self.what


class Live:
    """A count. `update` may be called often: it draws at most a few times a second."""

    def __init__(self, screen: Screen, total: int, unit: str, done: int = 0) -> None:
        self.screen, self.total, self.unit = screen, total, unit
        self.first = self.done = done
        self.metrics: dict[str, float | str] = {}
        self.began = self.advanced = screen.now()

    def update(self, done: int, **metrics: float | str) -> None:
        """`metrics` are shown by name; a rate is called for example tokens_per_second."""
        self.done, self.metrics, self.advanced = done, metrics, self.screen.now()
        self.screen._advanced(self)

    def close(self) -> None:
        """End the live line; its last state stays."""
        self.screen._closed(self)

    def text(self, now: float) -> str:
        shown = [f"{self.done}/{self.total} {self.unit}"]
        shown += [
            f"{name.replace('_per_second', '/s').replace('_', ' ')} {_number(v)}" for name, v in self.metrics.items()
        ]
        fresh, waited = self.done - self.first, now - self.advanced
        if fresh > 0 and self.done < self.total:
            seconds = (self.advanced - self.began) / fresh * (self.total - self.done)
            shown.append(f"ETA {clock(seconds)}")
        if self.done < self.total and (not fresh or waited >= SLOW):
            which = "next" if self.done else "first"
            shown.append(f"{which} under way" + (f" for {clock(waited)}" if waited >= 1 else ""))
        return "  ".join(shown)


@contextmanager
def working(text: str) -> Iterator[Screen]:
    """For a command whose output is its result: show progress on stderr if it takes long."""
    screen = Screen(sys.stderr)
    with screen.ticking():
        screen.phase(text, after=PATIENCE)
        yield screen


def clock(seconds: float) -> str:
    """75 -> 1:15; 3700 -> 1:01:40."""
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _number(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
