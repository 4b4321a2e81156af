"""The figures of the pages are those that their tables give, and a table that is gone or has no interval is an error."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def drawn():
    """The module docs/site/figures.py."""
    spec = importlib.util.spec_from_file_location("figures", ROOT / "docs" / "site" / "figures.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_figures_are_those_of_the_tables(drawn):
    style = re.compile("<style>.*?</style>", re.DOTALL)  # the report's own, which may change for other reasons
    for name, svg in drawn.figures().items():
        stored = style.sub("", (drawn.IMAGES / name).read_text())
        assert stored == style.sub("", svg), f"{name} is out of date: run python docs/site/figures.py"


def test_every_figure_is_shown_on_a_page(drawn):
    pages = "".join(page.read_text() for page in (ROOT / "docs").glob("*.md"))
    assert all(f"(images/{name})" in pages for name in drawn.figures())


def test_a_value_is_read_with_its_interval(drawn):
    assert drawn.value("**1.2% [0.5, 2.1]**") == (1.2, 0.5, 2.1)
    assert drawn.value(".003 [−.001, .006]") == (0.003, -0.001, 0.006)
    with pytest.raises(AssertionError, match="no value"):
        drawn.value("1.2%")
    with pytest.raises(AssertionError, match="no heading"):
        drawn.table("## No such heading", 0)


def test_a_table_of_the_results_is_read(drawn):
    rows = drawn.table("## What targets buy", 0)
    (default,) = [row for row in rows if row["targets"].startswith("**k 64")]
    assert default["B/position"] == "111"
    assert drawn.value(default["over online"]) == (2.5, 1.5, 3.8)
