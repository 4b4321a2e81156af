"""The figures of the pages on methods, drawn from the tables of tests/bench/RESULTS.md with the report's own drawing code.

    python docs/site/figures.py      write docs/images/*.svg

`tests/docs/test_figures.py` draws them again, so a figure cannot differ from its table. A value is read with its interval: `.007 [.001, .012]`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from distill.files import write_atomic
from distill.reports.svg import Canvas, Scale, group, linear, linear_ticks, logarithmic

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "tests" / "bench" / "RESULTS.md"
IMAGES = ROOT / "docs" / "images"
WIDTH, HEIGHT = 720, 330
_VALUE = re.compile(r"\**([−-]?[\d.]+)%? \[([−-]?[\d.]+), ([−-]?[\d.]+)\]\**")


class Value(NamedTuple):
    """A measured value with its interval."""

    value: float
    low: float
    high: float


class Mark(NamedTuple):
    """A point of a figure: where, what it says, and whether its label is drawn."""

    x: float
    y: Value
    label: str


def main() -> None:
    """Write all figures."""
    for name, svg in figures().items():
        write_atomic(IMAGES / name, svg)


def figures() -> dict[str, str]:
    """Draw every figure; file name -> SVG."""
    return {"targets.svg": targets(), "quickstart_kl.svg": quickstart_kl(), "traces_kl.svg": traces_kl()}


# ------------------------------------------------------------------------------------------------- figures


def targets() -> str:
    """Held-out KL above exact targets against bytes a position: the bucket, and draws from the tail."""
    rows = table("## What targets buy", 0)
    bucket = [
        Mark(float(row["B/position"]), value(row["over online"]), _setting(row["targets"]))
        for row in rows
        if row["B/position"] and row["targets"] != "k 64"  # beside the default, and nearly the same
    ]
    tails = table("### The tail's estimates", 1)
    filled: list[Mapping[str, str]] = []
    for row in tails:  # an empty first cell repeats the one above
        filled.append({**row, "targets": row["targets"] or filled[-1]["targets"]})
    draws = [
        Mark(
            float(row["B/position"]), value(row["over online"]), f"{_setting(row['targets']).partition(',')[0]} + draws"
        )
        for row in filled
        if row["tail"].startswith("draws")
    ]
    (text,) = (value(row["over online"]) for row in rows if row["targets"].startswith("the text"))
    canvas = Canvas(
        WIDTH, HEIGHT, "Held-out KL above exact targets, in percent, against bytes a position", top=34.0, bottom=44.0
    )
    x = logarithmic(8, 320, canvas.left, canvas.end)
    y = linear(-1.5, 20, canvas.floor, canvas.top)
    canvas.x_axis([(x(b), f"{b:g}") for b in (10, 20, 40, 80, 160, 320)], "bytes a position", grid=False)
    canvas.y_axis([(y(p), f"{p:g}%") for p in (0, 5, 10, 15, 20)], "held-out KL above that of exact targets")
    level = y(text.value)
    canvas.add(f'<line class="level" x1="{canvas.left}" x2="{canvas.end}" y1="{level}" y2="{level}"/>')
    canvas.text(canvas.end, level - 6, f"the text alone: {text.value:g}% [{text.low:g}, {text.high:g}]", "end", "quiet")
    for marks, shape, line in ((bucket, 0, True), (draws, 3, False)):
        _series(canvas, x, y, marks, "arm", shape, line=line, placed=False)
        for mark in marks:  # above the bars, and below those of the draws
            height = y(mark.y.high) - 7 if line else y(mark.y.low) + 15
            canvas.text(x(mark.x), height, mark.label, "middle", "" if line else "quiet")
    return canvas.render()


def quickstart_kl() -> str:
    """Held-out KL to the teacher of the quickstart's arms, five training seeds each."""
    rows = table("## The quickstart with five training seeds", 0)
    arms = [(row["arm"].replace("`", ""), value(row["held-out KL"])) for row in rows if "[" in row["held-out KL"]]
    canvas = Canvas(WIDTH, 60 + 34 * len(arms), "Held-out KL to the teacher by arm", left=150.0, top=8.0, bottom=44.0)
    x = linear(0, 0.05, canvas.left, canvas.end)
    canvas.x_axis([(x(t), f"{t:g}") for t in linear_ticks(0, 0.05)], "KL to the teacher, nats a token (95% interval)")
    for number, (arm, found) in enumerate(arms):
        y = canvas.top + 20 + 34 * number
        canvas.text(canvas.left - 12, y + 4, arm, "end")
        canvas.add(group("arm", f"{arm}: {found.value:g} [{found.low:g}, {found.high:g}]"))
        canvas.add(f'<path class="bar" d="M{x(found.low)} {y}H{x(found.high)}" fill="none"/>')
        canvas.mark(x(found.value), y, 0)
        canvas.add("</g>")
    return canvas.render()


def traces_kl() -> str:
    """Held-out KL against the number of traces, of text and of distributions, a panel a task."""
    rows = table("## A trace with its distribution in traces of text", 0)
    curves: dict[str, dict[str, list[Mark]]] = {"plain": {}, "worded": {}}
    way = ""
    kl_of = {"plain": "held-out KL", "worded": "held-out KL#2"}
    for row in rows:
        way = row["way"] or way
        if row["traces"] and way in ("sft", "kl"):
            for task, column in kl_of.items():
                marks = curves[task].setdefault(way, [])
                marks.append(Mark(float(row["traces"].replace(",", "")), value(row[column]), way))
    canvas = Canvas(WIDTH, HEIGHT, "Held-out KL against the number of traces, on two tasks", top=44.0, bottom=44.0)
    half = (canvas.end - canvas.left) / 2
    y = linear(0, 0.07, canvas.floor, canvas.top)
    canvas.y_axis([(y(t), f"{t:g}") for t in linear_ticks(0, 0.06, 3)])
    canvas.text(0, 14, "KL to the teacher, nats a token", kind="quiet")
    canvas.x_axis([], "traces learned from", grid=False)
    for number, (task, ways) in enumerate(curves.items()):
        start = canvas.left + number * half
        x = logarithmic(48, 1500, start + 20, start + half - 95)
        for traces in (64, 256, 1024):
            canvas.text(x(traces), canvas.floor + 15, f"{traces:,}", "middle", "quiet")
        said = "one wording" if task == "plain" else "several right words"
        canvas.text(start + 8, 34, f"{task}: {said}", bold=True)
        for shape, (name, marks) in enumerate(ways.items()):
            shown = [mark._replace(label="") for mark in marks[:-1]] + [
                marks[-1]._replace(label={"sft": "text", "kl": "distributions"}[name])
            ]
            shifted = [mark._replace(x=mark.x * (1.04 if shape else 0.96)) for mark in shown]
            _series(canvas, x, y, shifted, "arm other" if name == "sft" else "arm", 1 - shape, line=True)
    return canvas.render()


def _series(
    canvas: Canvas, x: Scale, y: Scale, marks: Sequence[Mark], kind: str, shape: int, *, line: bool, placed: bool = True
) -> None:
    """Draw one series: a line, error bars, marks, then labels where they find a place."""
    canvas.add(f'<g class="{kind}">')
    if line:
        path = "L".join(f"{x(mark.x)} {y(mark.y.value)}" for mark in marks)
        canvas.add(f'<path class="line" d="M{path}"/>')
    for mark in marks:
        canvas.add(group("", f"{mark.label} {mark.y.value:g} [{mark.y.low:g}, {mark.y.high:g}]".strip()))
        canvas.upright(x(mark.x), y(mark.y.low), y(mark.y.high))
        canvas.mark(x(mark.x), y(mark.y.value), shape)
        canvas.add("</g>")
    for mark in marks:
        if mark.label and placed:
            canvas.place(x(mark.x), y(mark.y.value), mark.label)
    canvas.add("</g>")


def _setting(targets: str) -> str:
    """`k 64, mass .98` as a label."""
    found = re.search(r"k (\d+)(?:, mass (\.\d+))?", targets)
    assert found is not None, targets
    return found[1] + (f", mass {found[2]}" if found[2] else " entries")


# ---------------------------------------------------------------------------------------------- the tables


def table(heading: str, number: int) -> list[dict[str, str]]:
    """Return the rows of a table below a heading: cells by column; a column's second of the same name has `#2`."""
    found = list(_tables(RESULTS.read_text(encoding="utf-8"), heading))
    head, _, *rows = found[number]
    head = [name.strip("`") for name in head]
    names = [
        name if name not in head[:place] else f"{name}#{head[: place + 1].count(name)}"
        for place, name in enumerate(head)
    ]
    return [dict(zip(names, row, strict=True)) for row in rows]


def _tables(text: str, heading: str) -> Iterator[list[list[str]]]:
    _, found, below = text.partition(f"\n{heading}")
    assert found, f"RESULTS.md has no heading that begins with {heading!r}"
    level = heading.partition(" ")[0]
    below = re.split(rf"\n#{{1,{len(level)}}} ", below)[0]
    for block in re.findall(r"(?:^\|.*\n)+", below, re.MULTILINE):
        yield [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in block.splitlines()]


def value(cell: str) -> Value:
    """The value with its interval in a cell."""
    found = _VALUE.fullmatch(cell)
    assert found is not None, f"no value with an interval: {cell!r}"
    return Value(*(float(each.replace("−", "-")) for each in found.groups()))


if __name__ == "__main__":
    main()
