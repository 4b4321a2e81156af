"""Ctrl-C and its kin: an exception in the command's process, and an end of the processes that it started.

Stages can be killed at any instant without loss, so `end` asks once, waits a moment and then kills, the processes below
included: a product of matrices or an engine's step in C code does not come back to Python in time to be asked.
"""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import psutil

SIGNALS = (signal.SIGINT, signal.SIGTERM)
GRACE = 0.5
"""Seconds that a process is given to leave things in order."""

DYING = 0.3
"""Seconds at most that killed processes below the child are waited for: on a busy machine dying takes its turn too."""


class Interrupted(KeyboardInterrupt):
    """A signal came that ends the command. kept: in words, what the stage under way has kept; empty where unknown."""

    def __init__(self, number: int = signal.SIGINT, kept: str = "") -> None:
        super().__init__(number)
        self.number, self.kept = number, kept

    @property
    def status(self) -> int:
        """Exit status, as shells have it."""
        return 128 + self.number


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGINT and SIGTERM raise Interrupted, also where whoever started this process had it ignore them."""

    def handler(number: int, _: FrameType | None) -> None:
        raise Interrupted(number)

    former = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, before in former.items():
            signal.signal(number, before)


@contextmanager
def held_back() -> Iterator[None]:
    """Signals wait until the end of the block; a child started in it begins with them blocked (see `receive`)."""
    came: list[int] = []

    def handler(number: int, _: FrameType | None) -> None:
        came.append(number)

    # Blocking them in this thread is for the child alone: another thread may still be the one that gets them.
    former = {number: signal.signal(number, handler) for number in SIGNALS}
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        for number, before in former.items():
            signal.signal(number, before)
        if came:
            signal.raise_signal(came[0])


def receive() -> None:
    """In a child that was started with the signals held back: the first one raises Interrupted from here on.

    Further ones do not disturb its cleaning up: its parent ends it if it takes long.
    """

    def handler(number: int, _: FrameType | None) -> None:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        raise Interrupted(number)

    for number in SIGNALS:
        signal.signal(number, handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def end(process: subprocess.Popen[Any]) -> None:
    """End a child and all below it: asked to first, killed after GRACE seconds or at the next signal.

    Signals that come while it kills are ignored.
    """
    below: list[psutil.Process] = []
    try:
        below += _below(process.pid)
        process.send_signal(signal.SIGINT)
        process.wait(GRACE)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        pass
    finally:
        former = {number: signal.signal(number, signal.SIG_IGN) for number in SIGNALS}
        if process.poll() is None:
            below += _below(process.pid)
            process.kill()
            process.wait()
        for each in below:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        psutil.wait_procs(below, timeout=DYING)
        for number, before in former.items():
            signal.signal(number, before)


def _below(pid: int) -> list[psutil.Process]:
    try:
        found: list[psutil.Process] = psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return found
