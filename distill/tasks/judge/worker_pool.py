"""Worker processes for computations that may never end; a worker that does not answer in time is killed and replaced.

They compare expressions symbolically (`math`), run scorers that evaluate their input (`score`), and run tests
that are written as code on a program in its sandbox (`check`).
They are plain child processes over pipes instead of a pool of `multiprocessing` (or pebble): the caller's main module is
not imported again, no process with threads or a GPU is forked, and PYTHONHASHSEED can be fixed, so generators that iterate
over sets give the same items in all workers. Started on first use, from any thread; ended at exit. A forked child starts
its own.
"""

from __future__ import annotations

import atexit
import json
import os
import queue
import select
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Literal

import psutil

Job = Literal["math", "score", "check"]

NUM_WORKERS = max(1, min(4, (os.cpu_count() or 1) // 2))
NUM_CHECKERS = os.cpu_count() or 1
"""The number of workers of the job `check`, which mostly wait for the program."""

LIMIT_S: dict[Job, float] = {"math": 5.0, "score": 30.0, "check": 300.0}
"""Seconds for one request; a generator may have to make its item again first."""

START_LIMIT_S = 120.0


class StuckError(Exception):
    """There is no reply. The message is the reason: `timeout`, or that the worker ended."""


class SlowError(StuckError):
    """There is no reply to a request within its limit. busy_s: seconds of the processor that the worker has spent on it."""

    def __init__(self, busy_s: float = 0.0) -> None:
        super().__init__("timeout")
        self.busy_s = busy_s


class _Worker:
    def __init__(self, job: Job) -> None:
        root = str(Path(__file__).resolve().parents[3])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-P",
                "-W",
                "ignore",
                "-m",
                "distill.tasks.judge.worker",
                job,
                str(LIMIT_S[job]),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "0"},
            start_new_session=True,
        )
        try:
            self._line(START_LIMIT_S)  # "ready", once the heavy imports are done
        except BaseException:
            self.kill()
            raise

    def ask(self, request: list[object], limit_s: float) -> Any:
        assert self.process.stdin is not None
        before = self._busy_s()
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
        except OSError:
            raise StuckError("the judge's worker ended") from None
        try:
            return json.loads(self._line(limit_s))
        except SlowError:
            raise SlowError(self._busy_s() - before) from None

    def _busy_s(self) -> float:
        try:
            times = psutil.Process(self.process.pid).cpu_times()
        except psutil.Error:
            return 0.0
        return float(times.user + times.system)

    def _line(self, limit_s: float) -> bytes:
        """Return the next line of the output; raises SlowError after the limit and StuckError at the end of the output."""
        assert self.process.stdout is not None
        pipe, deadline, read = self.process.stdout.fileno(), time.monotonic() + limit_s, b""
        while not read.endswith(b"\n"):
            ready, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise SlowError
            chunk = os.read(pipe, 4096)
            if not chunk:
                raise StuckError("the judge's worker ended")
            read += chunk
        return read.strip()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except OSError:
                    continue  # buffered output can no longer be written


class Pool:
    """A pool of workers; a slot is empty until it is first used, and after its worker was killed."""

    def __init__(self, job: Job, num_workers: int) -> None:
        self._job = job
        self._slots: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        self._started: set[_Worker] = set()
        for _ in range(num_workers):
            self._slots.put(None)

    def ask(self, *request: object, limit_s: float) -> Any:
        """Return the reply to one request; raises StuckError without a reply within the limit."""
        worker = self._slots.get()
        try:
            if worker is None:
                worker = _Worker(self._job)
                self._started.add(worker)
            return worker.ask(list(request), limit_s)
        except BaseException:
            # Also on Ctrl-C: otherwise the worker's late reply would answer the next request.
            if worker is not None:
                self._started.discard(worker)
                worker.kill()
                worker = None
            raise
        finally:
            self._slots.put(worker)

    def close(self) -> None:
        """End every worker; the pool may be used again."""
        for worker in list(self._started):
            self._started.discard(worker)
            worker.kill()


_pools: dict[Job, Pool] = {}
_lock = threading.Lock()


def ask(job: Job, *request: object, limit_s: float | None = None) -> Any:
    """Send a request to this process's pool for a job; raises StuckError without a reply within the limit.

    A worker that had hardly any of the processor within the limit was held up by the machine: it is asked once more.
    """
    with _lock:
        pool = _pools.setdefault(job, Pool(job, NUM_CHECKERS if job == "check" else NUM_WORKERS))
    limit_s = LIMIT_S[job] if limit_s is None else limit_s
    try:
        return pool.ask(*request, limit_s=limit_s)
    except SlowError as slow:
        if job != "math" or slow.busy_s > limit_s / 4:
            raise
    return pool.ask(*request, limit_s=limit_s)


def _in_forked_child() -> None:
    global _lock
    _pools.clear()  # the pipes belong to the parent process
    _lock = threading.Lock()


@atexit.register
def close() -> None:
    """End all workers; new ones start when they are needed."""
    for pool in list(_pools.values()):
        pool.close()


os.register_at_fork(after_in_child=_in_forked_child)
