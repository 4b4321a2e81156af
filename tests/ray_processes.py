"""The processes of Ray actors below a driver's."""

from __future__ import annotations

import re

import psutil


def started(actor: str, driver: int | None = None) -> set[int]:
    """Return the processes of a class of actors that are past their start; driver: None = this process."""
    found = set()
    try:
        below = psutil.Process(driver).children(recursive=True)
    except psutil.NoSuchProcess:
        return found
    for process in below:
        try:
            title = " ".join(process.cmdline()).strip()
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
        if re.search(rf"ray::{actor}(\.work|\.facts|$)", title):
            found.add(process.pid)
    return found
