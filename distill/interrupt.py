"""SIGINT (Ctrl-C) and SIGTERM: an exception in this process, and termination of the stage processes that it started.

A stage can be killed at any time and resumed, so `end` sends SIGINT, waits GRACE seconds and then kills the process and
its descendants. C code, such as a matrix product or an engine step, may not return to Python in time to handle a signal.
"""

from __future__ import annotations

import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import psutil

SIGNALS = (signal.SIGINT, signal.SIGTERM)
TERMINATE = signal.SIGTERM
GRACE = 0.5
"""Seconds between SIGINT and SIGKILL: time for a process to clean up."""

REAP_TIMEOUT = 0.3
"""Maximum seconds to wait until the killed descendants are gone; a busy machine takes some time for that."""


class Interrupted(KeyboardInterrupt):
    """A signal that ends the command. kept: the progress that the running stage has saved, in words; "" if unknown."""

    def __init__(self, number: int = signal.SIGINT, kept: str = "") -> None:
        super().__init__(number)
        self.number, self.kept = number, kept

    @property
    def status(self) -> int:
        """Exit status by the shells' convention: 128 + signal number."""
        return 128 + self.number


@contextmanager
def interruptible() -> Iterator[None]:
    """In this context SIGINT and SIGTERM raise Interrupted, even if the process was started with them ignored."""

    def handler(number: int, _: FrameType | None) -> None:
        raise Interrupted(number)

    previous = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler_before in previous.items():
            signal.signal(number, handler_before)


@contextmanager
def held_back() -> Iterator[None]:
    """Delay SIGINT and SIGTERM until the end of this context; a child started in it has them blocked (see `receive`)."""
    received: list[int] = []

    def handler(number: int, _: FrameType | None) -> None:
        received.append(number)

    # The mask is only for the child, which inherits it: another thread of this process may still receive the signal.
    previous = _handled_by(handler)
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        _restore(previous)
        if received:
            signal.raise_signal(received[0])


def receive() -> None:
    """Unblock the signals in a child started under `held_back`; the first one raises Interrupted.

    Later ones are ignored while the child cleans up. The parent kills it if that takes too long.
    """

    def handler(number: int, _: FrameType | None) -> None:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        raise Interrupted(number)

    for number in SIGNALS:
        signal.signal(number, handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


@contextmanager
def noted() -> Iterator[Callable[[], bool]]:
    """In this context SIGTERM is only noted, and the function returned says so; schedulers may send it several times.

    Without effect outside the main thread.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return

    def handler(number: int, _: FrameType | None) -> None:
        received.append(number)

    before = signal.signal(TERMINATE, handler)
    try:
        yield lambda: bool(received)
    finally:
        signal.signal(TERMINATE, before)


def end_after_checkpoint(process: subprocess.Popen[Any]) -> None:
    """Pass SIGTERM on to a training stage and wait until it has ended; `end` it at the next signal."""
    try:
        process.send_signal(TERMINATE)
        process.wait()
    except KeyboardInterrupt:
        end(process)


def end(process: subprocess.Popen[Any]) -> None:
    """End a child and its descendants: SIGINT first, SIGKILL after GRACE seconds or at the next signal.

    Signals that arrive during the killing are ignored.
    """
    descendants: list[psutil.Process] = []
    try:
        descendants += _descendants(process.pid)
        process.send_signal(signal.SIGINT)
        process.wait(GRACE)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        pass
    finally:
        previous = _handled_by(signal.SIG_IGN)
        if process.poll() is None:
            descendants += _descendants(process.pid)
            process.kill()
            process.wait()
        for each in descendants:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        psutil.wait_procs(descendants, timeout=REAP_TIMEOUT)
        _restore(previous)


def _handled_by(handler: Any) -> dict[int, Any]:
    """Set the handler of SIGNALS and return the former ones. Only the main thread may: in another one nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.signal(number, handler) for number in SIGNALS}


def _restore(handlers: dict[int, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        found: list[psutil.Process] = psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return found
