"""Ends a process of a stage as soon as another one on its node is gone: it would wait for it in an exchange forever."""

from __future__ import annotations

import os
import socket
import threading
import time

import psutil

from distill import world
from distill.run.launch import PEER_LOST

EVERY = 0.1
"""Seconds between two looks."""


class Watcher:
    """A thread that looks after the other processes of this node; made by all processes at once, after `world.join`."""

    def __init__(self) -> None:
        here = socket.gethostname()
        everyone = world.gather((here, os.getpid()))
        self.others = [pid for host, pid in everyone if host == here and pid != os.getpid() and psutil.pid_exists(pid)]
        self._ended = threading.Event()
        if self.others:
            threading.Thread(target=self._watch, daemon=True, name="watcher").start()

    def end(self) -> None:
        """Stop looking, and wait for all processes: from here on each may end."""
        self.stop()
        world.wait()

    def stop(self) -> None:
        """Stop looking: all processes are about to end."""
        self._ended.set()

    def lost(self, patience: float = 1.0) -> bool:
        """Return whether another process is gone, within `patience` seconds: its connections close before it is gone."""
        until = time.monotonic() + patience
        while not any(_gone(pid) for pid in self.others):
            if time.monotonic() > until:
                return False
            time.sleep(0.05)
        return True

    def _watch(self) -> None:
        while not self._ended.wait(EVERY):
            if any(_gone(pid) for pid in self.others):
                os._exit(PEER_LOST)


def _gone(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD))
    except psutil.NoSuchProcess:
        return True
