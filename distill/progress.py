"""Progress display: one live line on a terminal, plain lines in a file or pipe.

A `Screen` writes to one stream and shows one activity at a time: a phase ("loading base") or a counter (`Live`). On a
terminal its line is redrawn in place. Elsewhere the line is printed when the activity begins, and again with the elapsed
time after QUIET seconds without output. `ticking` starts a thread for both, so that they also work during a slow step. The same thread
writes the activity to a file for other programs (`distill watch`), once a second.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO, TypedDict

FILE = "progress.json"
"""The file of a stage's folder that holds what the stage does (`Activity`), and the time of that."""
QUIET = 25.0
"""Not on a terminal: seconds without output after which the current activity is printed again."""
PLAIN_EVERY = 15.0
"""Not on a terminal: minimum seconds between two lines of a counter."""
REDRAW = 0.2
"""On a terminal: minimum seconds between two redraws of a counter."""
TICK = 1.0
"""Seconds between two calls of `Screen.tick` in the thread of `ticking`."""
SLOW = 2.0
"""Seconds without an update after which a counter shows how long the next step has been under way."""
PATIENCE = 2.0
"""Seconds before a phase that is usually quick is shown."""
LABEL = 12
"""Width of the label column."""
CLEAR = "\x1b[2K"
"""Terminal control sequence: erase the line."""


class Activity(TypedDict):
    """What a process does: its progress line; done of total units (0 of 0 without a counter); the estimate of the time left, s."""

    text: str
    done: int
    total: int
    unit: str
    seconds_left: float | None


class Screen:
    """The progress output of one process. label: the text at the start of each progress line, such as the stage's name. file: where
    each tick writes the activity as JSON (`Activity`); None: nowhere."""

    def __init__(
        self,
        stream: TextIO | None = None,
        label: str = "",
        *,
        now: Callable[[], float] = time.monotonic,
        file: Path | None = None,
    ) -> None:
        self.stream = stream or sys.stdout
        self.label = label
        self.terminal = self.stream.isatty()
        self.now = now
        self.file = file
        self._lock = threading.RLock()
        self._current: _Phase | Live | None = None
        self._shown_at = now()
        self._shown = True
        self._hidden_until = now()

    def say(self, text: str) -> None:
        """Print a plain line above the progress line."""
        with self._lock:
            self._print(f"  {text}")
            if self.terminal:
                self._draw(0.0)

    def phase(self, text: str, *, after: float = 0.0) -> None:
        """Show that a phase begins; it lasts until the next phase or counter.

        after: seconds before it is first shown, for work that usually ends sooner.
        """
        with self._lock:
            self._current = _Phase(text, self.now())
            self._hidden_until = self.now() + after
            self._shown = False
            self._draw(0.0)

    def live(self, total: int, unit: str, done: int = 0) -> Live:
        """Start and show a counter from `done` to `total`. unit: what is counted, in the plural."""
        with self._lock:
            live = Live(self, total, unit, done)
            self._current = live
            self._hidden_until = self.now()
            self._draw(0.0)
        return live

    def pause(self) -> None:
        """On a terminal, erase the progress line, before something is written there by others; the next tick shows it again."""
        with self._lock:
            if self.terminal:
                self.stream.write(CLEAR)
                self.stream.flush()

    def tick(self) -> None:
        """Show the current activity again: on a terminal always, elsewhere after QUIET seconds without output."""
        self._draw(0.0 if self.terminal or not self._shown else QUIET)
        if self.file is not None and self._current is not None:
            with self._lock:
                activity = self._current.activity(self.now())
            # What it holds is worth nothing a second later: no fsync, and a full disk is reported by what must be kept.
            temporary = self.file.with_name(f".{self.file.name}.tmp")
            with suppress(OSError):
                temporary.write_text(json.dumps({**activity, "at": time.time()}), encoding="utf-8")
                os.replace(temporary, self.file)

    @contextmanager
    def ticking(self) -> Iterator[Screen]:
        """Call `tick` every TICK seconds in a thread; the end of the context erases the terminal's progress line."""
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
                if self._current is not None:
                    self.pause()
                self._current = None

    def _draw(self, every: float) -> None:
        """Show the current activity unless something was shown less than `every` seconds ago."""
        with self._lock:
            now = self.now()
            if self._current is None or now < self._hidden_until or now - self._shown_at < every:
                return
            self._shown = True
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
        """On a terminal, keep the last state of a counter as a plain line; elsewhere it has been printed already."""
        with self._lock:
            if self.terminal and live.done > live.first:
                self._draw(0.0)
                self.stream.write("\n")
            self._current = _Phase("finishing", self.now())
            if self.terminal:
                self._draw(0.0)


@dataclass(frozen=True, slots=True)
class _Phase:
    """An activity without a counter, and the time at which it began."""

    what: str
    began: float

    def text(self, now: float) -> str:
        seconds = now - self.began
        return f"{self.what}  {clock(seconds)}" if seconds >= 1 else self.what

    def activity(self, now: float) -> Activity:
        return Activity(text=self.text(now), done=0, total=0, unit="", seconds_left=None)


class Live:
    """A counter with metrics and an estimate of the remaining time. `update` is cheap: redraws are rate-limited."""

    def __init__(self, screen: Screen, total: int, unit: str, done: int = 0) -> None:
        self.screen, self.total, self.unit = screen, total, unit
        self.first = self.done = done
        self.metrics: dict[str, float | str] = {}
        self.began = self.advanced = screen.now()

    def update(self, done: int, **metrics: float | str) -> None:
        """Set the count and the metrics shown beside it, by name; `tokens_per_second` is shown as tokens/s."""
        self.done, self.metrics, self.advanced = done, metrics, self.screen.now()
        self.screen._advanced(self)

    def close(self) -> None:
        """End the counter; on a terminal its last state stays visible."""
        self.screen._closed(self)

    def seconds_left(self) -> float | None:
        """The estimate of the time until the total; None before the first step and at the end."""
        num_new = self.done - self.first
        if num_new <= 0 or self.done >= self.total:
            return None
        return (self.advanced - self.began) / num_new * (self.total - self.done)

    def activity(self, now: float) -> Activity:
        return Activity(
            text=self.text(now), done=self.done, total=self.total, unit=self.unit, seconds_left=self.seconds_left()
        )

    def text(self, now: float) -> str:
        shown = [f"{self.done}/{self.total} {self.unit}"]
        shown += [
            f"{name.replace('_per_second', '/s').replace('_', ' ')} {_number(v)}" for name, v in self.metrics.items()
        ]
        num_new, waited = self.done - self.first, now - self.advanced
        if (seconds := self.seconds_left()) is not None:
            shown.append(f"ETA {clock(seconds)}")
        if self.done < self.total and (not num_new or waited >= SLOW):
            which = "next" if self.done else "first"
            shown.append(f"{which} under way" + (f" for {clock(waited)}" if waited >= 1 else ""))
        return "  ".join(shown)


@contextmanager
def working(text: str) -> Iterator[Screen]:
    """Progress on stderr for a command whose stdout is its result; shown only after PATIENCE seconds."""
    screen = Screen(sys.stderr)
    with screen.ticking():
        screen.phase(text, after=PATIENCE)
        yield screen


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss: 75 -> 1:15, 3700 -> 1:01:40."""
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _number(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
