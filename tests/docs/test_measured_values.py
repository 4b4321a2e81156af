"""Every value with an interval that a page or the README states is in tests/bench/RESULTS.md: none is invented, and none stays when its measurement changes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
INTERVAL = re.compile(r"(?<![\w.])([-+−]?[\d.]+)(?:%| points| nats)? \[([-+−]?[\d.]+), ([-+−]?[\d.]+)\]")
Triple = tuple[float, float, float]


def intervals(text: str) -> Iterator[Triple]:
    """The values with intervals in a text, as (value, low, high)."""
    for found in INTERVAL.finditer(text):
        yield tuple(float(each.replace("−", "-").rstrip(".")) for each in found.groups())  # type: ignore[misc]


def measured() -> set[Triple]:
    """Those of the results, and of the differences the other way round."""
    found = set(intervals((ROOT / "tests" / "bench" / "RESULTS.md").read_text(encoding="utf-8")))
    return found | {(-value, -high, -low) for value, low, high in found}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_values_with_intervals_are_those_of_the_results(page: Path) -> None:
    known = measured()
    assert [found for found in intervals(page.read_text(encoding="utf-8")) if found not in known] == []


def test_a_value_that_nobody_measured_is_found() -> None:
    known = measured()
    assert (98.8, 97.5, 99.5) in known
    assert set(intervals("**98.9% [97.5, 99.5]**, −.3 [−1.9, +1.2]")) - known == {(98.9, 97.5, 99.5)}
