"""Sessions: one untrusted program each, from its start until all its processes have ended.

A `Session` is a new process (a new sandbox at level 2) for one program, never used for another. As many run
at a time as there are cores; further ones wait. Open, use and close it in one thread: bubblewrap kills
its child when the thread that started it ends.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from distill.tasks.sandbox import syscalls, wire
from distill.tasks.sandbox.isolation import Isolation
from distill.tasks.sandbox.wire import FaultError

NUM_AT_ONCE = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
START_LIMIT_S = 60.0
MAX_OUTPUT_BYTES = 2**20
_ENDED_LIMIT_S = 10.0
_MARK = "DISTILL_SANDBOX"


class SandboxError(Exception):
    """The sandbox did not start; the program was not tried."""


class RaisedError(Exception):
    """The program's function raised an exception: the name of its class, and its message."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(f"{name}: {message}" if message else name)
        self.name, self.message = name, message


@dataclass(frozen=True, slots=True)
class Limits:
    """Resource limits of a program.

    test_s: wall-clock seconds for one test (the first one includes loading the program). problem_s: wall-clock seconds
    for all tests of a problem. memory_mb: address space of each process. num_processes: maximum number of processes,
    threads included.
    """

    test_s: float = 5.0
    problem_s: float = 20.0
    memory_mb: int = 512
    num_processes: int = 16

    def rlimits(self) -> dict[str, int]:
        return {
            "CPU": int(self.problem_s) + 2,
            "AS": self.memory_mb * 2**20,
            "FSIZE": 16 * 2**20,
            "NOFILE": 64,
            "CORE": 0,
        }


class Session:
    """A program in its sandbox: `run` it with a standard input, or `call` its function; either any number of times.

    `entry_point`: None to run, a function's name (or Class.method) to call. Every wait ends at the
    test's limit or when `budget_s` is used up (default: the problem's limit), counted from when the
    sandbox is ready. FaultError and RaisedError are faults of the program, SandboxError is not; after a FaultError the
    session has ended.
    """

    def __init__(
        self,
        isolation: Isolation,
        source: str,
        *,
        entry_point: str | None = None,
        limits: Limits | None = None,
        budget_s: float | None = None,
    ) -> None:
        self.limits = limits or Limits()
        self._budget_s = self.limits.problem_s if budget_s is None else budget_s
        self._isolation, self._source, self._entry_point = isolation, source, entry_point
        self._mark = secrets.token_hex(16)
        self._process: subprocess.Popen[bytes] | None = None
        self._home: Path | None = None

    def __enter__(self) -> Session:
        _slots().acquire()
        try:
            self._start()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end()

    def run(self, stdin: str) -> tuple[int, str]:
        """Run the program; return its exit status (minus the signal if killed) and standard output."""
        kind, rest = self._ask(stdin.encode("utf-8", "surrogatepass"))
        if kind == "flood":
            raise FaultError("output too long")
        match kind, rest:
            case "ran", [int(status), str(stdout)] if not isinstance(status, bool):
                return status, stdout
        raise FaultError("bad reply")

    def call(self, /, *args: Any, **kwargs: Any) -> Any:
        """Call the function. Arguments are of built-in types, passed by value; others raise SandboxError."""
        try:
            kind, rest = self._ask(args, kwargs)
        except ValueError as error:
            raise SandboxError(f"the arguments cannot be sent: {error}") from error
        match kind, rest:
            case "value", [value]:
                return wire.decode(value)
            case "unsendable", [str(message)]:
                raise FaultError(message)
        raise self._raised(kind, rest)

    @property
    def left_s(self) -> float:
        """Return the remaining seconds of the budget."""
        return max(0.0, self._deadline - time.monotonic())

    def _start(self) -> None:
        isolation = self._isolation
        self._uid = isolation.new_uid()
        if isolation.level == 3:
            self._home = Path(tempfile.mkdtemp(prefix="sandbox-"))
            os.chown(self._home, self._uid or -1, self._uid or -1)
        environment = {
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "HOME": str(self._home or "/tmp"),
            "TMPDIR": str(self._home or "/tmp"),
            "LANG": "C.UTF-8",
            "PYTHONHASHSEED": "0",
            _MARK: self._mark,
        }
        try:
            with isolation.command() as (argv, files):
                self._process = subprocess.Popen(
                    argv,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    env=None if isolation.level == 1 else environment,  # docker needs the user's environment
                    cwd=self._home,
                    pass_fds=files,
                    start_new_session=True,
                )
        except OSError as error:
            raise SandboxError(str(error)) from error
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._to, self._from = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._to, False)
        try:
            kind, _ = self._exchange(self._hello(), self._mark, time.monotonic() + START_LIMIT_S)
        except FaultError as fault:
            raise SandboxError(f"the sandbox did not start: {fault}") from None
        if kind != "ready":
            raise SandboxError("the sandbox did not start")
        self.loaded = self._entry_point is None
        self._deadline = time.monotonic() + self._budget_s

    def _hello(self) -> dict[str, Any]:
        level = self._isolation.level
        limits = self.limits.rlimits()
        if level != 1:
            others = 0 if self._uid else _num_tasks(os.getuid(), int(time.monotonic() / 5))
            limits["NPROC"] = others + self.limits.num_processes
        return {
            "nonce": self._mark,
            "uid": self._uid,
            "limits": limits,
            "calls": None if level == 2 else syscalls.allowed(namespaces=level == 1),
            "die_with_parent": level == 3,
            "source": self._source,
            "entry_point": self._entry_point,
            "max_output": MAX_OUTPUT_BYTES,
        }

    def _ask(self, *parts: Any) -> tuple[str, list[Any]]:
        now = time.monotonic()
        if now >= self._deadline:
            raise FaultError("timeout")
        limit = min(now + self.limits.test_s, self._deadline)
        if not self.loaded:
            kind, rest = self._receive(self._mark, limit)
            if kind != "loaded":
                raise self._raised(kind, rest)
            self.loaded = True
        nonce = secrets.token_hex(16)
        return self._exchange((nonce, *parts), nonce, limit)

    def _exchange(self, message: Any, nonce: str, deadline: float) -> tuple[str, list[Any]]:
        wire.send(self._to, message, deadline)
        return self._receive(nonce, deadline)

    def _receive(self, nonce: str, deadline: float) -> tuple[str, list[Any]]:
        tag, kind, *rest = wire.receive(self._from, deadline)
        if tag != nonce:
            raise FaultError("bad reply")
        return kind, rest

    def _raised(self, kind: str, rest: list[Any]) -> Exception:
        match kind, rest:
            case "raised", [str(name), str(message)]:
                return RaisedError(name, message)
        return FaultError("bad reply")

    def _end(self) -> None:
        """Kill all processes of the program, and only then let the next session start."""
        process = self._process
        try:
            if process is not None:
                for pipe in (process.stdin, process.stdout):
                    if pipe is not None:
                        pipe.close()
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            if self._home is not None:
                self._kill_leftovers()
                shutil.rmtree(self._home, ignore_errors=True)
        finally:
            _slots().release()

    def _kill_leftovers(self) -> None:
        """Kill processes that left the group (level 3 has no process namespace): find them by their user or mark."""
        deadline = time.monotonic() + _ENDED_LIMIT_S
        while time.monotonic() < deadline:
            left = list(_processes_of(self._uid, f"{_MARK}={self._mark}".encode()))
            if not left:
                return
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


@functools.cache
def _slots() -> threading.Semaphore:
    return threading.Semaphore(NUM_AT_ONCE)


os.register_at_fork(after_in_child=_slots.cache_clear)


def _processes_of(uid: int, mark: bytes) -> Iterator[int]:
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        folder = Path("/proc", entry)
        try:
            status = (folder / "status").read_text()
            if "\nState:\tZ" in status:
                continue
            if (uid and f"\nUid:\t{uid}\t" in status) or (not uid and mark in (folder / "environ").read_bytes()):
                yield int(entry)
        except OSError:
            continue  # ended meanwhile, or not readable


@functools.lru_cache(maxsize=1)
def _num_tasks(uid: int, _when: int) -> int:
    """Return the number of a user's threads within the last seconds, which its limit on processes already counts."""
    total = 0
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            text = status.read_text()
        except OSError:
            continue
        if f"\nUid:\t{uid}\t" in text:
            total += int(text.partition("\nThreads:\t")[2].partition("\n")[0])
    return total
