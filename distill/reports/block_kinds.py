"""The kinds of blocks that a report consists of, without markup. `report_blocks` makes them, `pages` renders them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Heading:
    text: str


@dataclass(frozen=True, slots=True)
class Text:
    text: str


@dataclass(frozen=True, slots=True)
class Table:
    """A table. align: l or r for each column. stacked: on a narrow screen each row is a block of lines, heading and value."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    align: str
    stacked: bool = False


@dataclass(frozen=True, slots=True)
class Code:
    """Text to show verbatim."""

    text: str
    language: str = "text"


@dataclass(frozen=True, slots=True)
class Figure:
    """A self-contained SVG. file: its name beside the report. alt: alternative text. narrow: the version for narrow
    screens. label: its name in a choice of figures."""

    file: str
    svg: str
    alt: str
    narrow: str | None = None
    label: str = ""


@dataclass(frozen=True, slots=True)
class Views:
    """A choice of figures; the page shows one at a time."""

    name: str
    figures: Sequence[Figure]


@dataclass(frozen=True, slots=True)
class Panels:
    """Small figures side by side."""

    title: str
    figures: Sequence[Figure]


@dataclass(frozen=True, slots=True)
class Answer:
    """A completion of one arm. judged: correct, wrong or not judged, with the extracted answer."""

    arm: str
    judged: str
    correct: bool | None
    text: str


@dataclass(frozen=True, slots=True)
class Folded:
    """Collapsible blocks under a summary."""

    summary: str
    blocks: Sequence[Text | Code | Answer]


Block = Heading | Text | Table | Code | Figure | Views | Panels | Folded
