"""What some tests need of the machine, and how fast it is just now."""

from __future__ import annotations

import os
import time
from typing import NoReturn

import pytest


def missing(what: str, reason: str) -> NoReturn:
    """Skip the test; fail it where the environment's REQUIRE names what is missing, as CI's does for all that it has."""
    if what in os.environ.get("REQUIRE", "").split():
        pytest.fail(f"{what} is required here, but {reason}")
    pytest.skip(reason)


def slowness() -> float:
    """How many times slower than an idle core this process runs now, by the wall clock; at least 1.

    Limits that only tell a hang from work are multiplied by it, so that they hold on a busy machine.
    """
    began = time.perf_counter()
    total = 0
    for number in range(3_000_000):
        total += number * number % 7
    return max(1.0, (time.perf_counter() - began) / 0.15)
