"""SIGINT (Ctrl-C) and SIGTERM: an exception in the command's process, and the end of its child processes.

Stages can be killed at any instant without loss, so `end` sends a signal, waits a moment and then kills the child and all
processes below it: C code (a matrix product, an engine's step) may not return to Python in time.
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
"""Seconds that a process has to clean up after a signal."""

DYING = 0.3
"""The longest wait, in seconds, for killed processes below the child to end."""


class Interrupted(KeyboardInterrupt):
    """A signal ended the command. kept: a description of what the running stage has stored; empty if unknown."""

    def __init__(self, number: int = signal.SIGINT, kept: str = "") -> None:
        super().__init__(number)
        self.number, self.kept = number, kept

    @property
    def status(self) -> int:
        """The exit status by the shells' convention: 128 + the signal."""
        return 128 + self.number


@contextmanager
def interruptible() -> Iterator[None]:
    """Make SIGINT and SIGTERM raise Interrupted, even if the parent process had them ignored."""

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
    """Defer signals until the end of the block; a child started in it begins with them blocked (see `receive`)."""
    came: list[int] = []

    def handler(number: int, _: FrameType | None) -> None:
        came.append(number)

    # Blocking signals in this thread only affects the child: another thread of this process may still receive them.
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
    """Unblock signals in a child that was started within `held_back`: the first one raises Interrupted.

    Further ones are ignored while it cleans up; its parent kills it if that takes long.
    """

    def handler(number: int, _: FrameType | None) -> None:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        raise Interrupted(number)

    for number in SIGNALS:
        signal.signal(number, handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def end(process: subprocess.Popen[Any]) -> None:
    """End a child and all processes below it: by a signal first, killed after GRACE seconds or at the next signal.

    Signals during the kill are ignored.
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
