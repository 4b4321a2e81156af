"""Untrusted programs a second, at each isolation level there is here: one fresh sandbox a program.

Three kinds of work: a function called with three inputs, a program run with three inputs, and HumanEval's canonical
solutions with their checks. As many run at a time as there are cores. The rounds alternate between the variants.

    python tests/bench/bench_sandbox.py [--rounds 3] [--programs 60]
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import harness

from distill.tasks import humaneval
from distill.tasks.code import code_verdicts
from distill.tasks.sandbox import NUM_AT_ONCE, Isolation, Limits, isolation

CALLED = {
    "entry_point": "solve",
    "tests": [{"args": [n], "expected": sum(range(n))} for n in (1, 10, 100)],
}
RUN = {"tests": [{"stdin": f"{n}\n", "stdout": f"{sum(range(n))}\n"} for n in (1, 10, 100)]}
LIMITS = Limits(test_s=30, problem_s=60)
_unique = itertools.count()


def levels() -> list[Isolation]:
    try:
        return [isolation.bubblewrap(), isolation.limits_only()]
    except isolation.UnavailableError as error:
        print(f"without bubblewrap: {error}")
        return [isolation.limits_only()]


def programs(source: str, number: int) -> list[str]:
    """So many programs that differ, since no program is judged twice."""
    return [f"# {next(_unique)}\n{source}" for _ in range(number)]


def rate(source: str, payload: dict, held: Isolation, number: int) -> float:
    answers = programs(source, number)
    started = time.perf_counter()
    verdicts = code_verdicts(answers, payload, held, LIMITS)
    assert all(verdict.correct for verdict in verdicts), verdicts[0]
    return number / (time.perf_counter() - started)


def humaneval_rate(held: Isolation, number: int) -> float:
    problems = list(humaneval("bench").problems("held_out", number, 0))
    started = time.perf_counter()
    with ThreadPoolExecutor(NUM_AT_ONCE) as threads:
        verdicts = threads.map(
            lambda p: code_verdicts([f"{p.gold}\n    # {next(_unique)}"], p.payload, held, LIMITS)[0],
            problems,
        )
        assert all(verdict.correct for verdict in verdicts)
    return number / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--programs", type=int, default=60)
    args = parser.parse_args()
    number = args.programs
    variants: dict[tuple[str, str], Callable[[], float]] = {}
    for held in levels():
        name = f"{held.level} ({held.summary})"
        variants[name, "function, 3 calls"] = lambda held=held: rate(
            "def solve(n): return sum(range(n))", CALLED, held, number
        )
        variants[name, "program, 3 runs"] = lambda held=held: rate("print(sum(range(int(input()))))", RUN, held, number)
        variants[name, "HumanEval"] = lambda held=held: humaneval_rate(held, number)
    measured = harness.interleaved({" | ".join(key): run for key, run in variants.items()}, args.rounds)
    rows = [
        {
            "level": level,
            "work": work,
            "programs/s": statistics.median(values),
            "slowest round": min(values),
            "at once": NUM_AT_ONCE,
        }
        for (level, work), values in zip(variants, measured.values(), strict=True)
    ]
    harness.report("sandbox", rows, Path(__file__).parent / "out")


if __name__ == "__main__":
    main()
