"""Print a run's report in the terminal: verdict, arms with intervals, curves as sparklines, stages.

Renders a `RunReport` with rich; the run may be unfinished. Untrusted text goes through `Text`, which interprets no markup,
with control characters replaced.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from distill.printable import printable
from distill.reports.arm_groups import Group, groups
from distill.reports.curves import by_stage, shown_keys
from distill.reports.headline import verdict
from distill.reports.run_report import RunReport
from distill.reports.stage_blocks import rows_of
from distill.reports.wording import duration, interval_text, minus, money, percent, reading, scaled

GAP = 2
"""Spaces between two columns."""
BLOCKS = "▁▂▃▄▅▆▇█"
STATUS_STYLES = {
    "done": "green",
    "skipped": "dim",
    "running": "yellow",
    "failed": "red",
    "pending": "dim",
}


def show(report: RunReport, console: Console | None = None) -> None:
    """Print a run. Tables leave out their least important columns where the terminal is narrow."""
    console = console or Console()
    console.print(_text(report["name"], "bold"))
    for line in (report.get("verdict") or verdict(report)).split("\n"):
        console.print(_text(line))
    parts: list[Table | None] = []
    for group in groups(report):
        parts.append(arm_table(group, console.width))
        parts.append(comparison_table(group, console.width) if group.comparisons else None)
    parts += [measurement_table(report, console.width), curve_table(report, console.width)]
    parts.append(stage_table(report, console.width))
    for part in parts:
        if part is not None and part.row_count:
            console.print()
            console.print(part)


def sparkline(values: Sequence[float | None], width: int = 40) -> str:
    """A curve as one line of block characters: the means of `width` segments, scaled from lowest to highest.

    Non-finite values (null in JSON) are left out; a segment without values is a space; a constant curve is drawn low.
    """
    if not values:
        return ""
    width = min(width, len(values))
    means = []
    for i in range(width):
        segment = values[i * len(values) // width : (i + 1) * len(values) // width]
        finite = [value for value in segment if value is not None and math.isfinite(value)]
        means.append(sum(finite) / len(finite) if finite else math.nan)
    known = [mean for mean in means if not math.isnan(mean)]
    if not known:
        return " " * width
    low, high = min(known), max(known)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(" " if math.isnan(mean) else BLOCKS[round((mean - low) * scale)] for mean in means)


def interval_bar(interval: Mapping[str, float], width: int = 20, end: float = 1.0) -> str:
    """Draw an estimate between 0 and `end` with its interval, `width` cells wide: ····├──●──┤····"""
    low, value, high = (min(width - 1, max(0, int(interval[key] / end * width))) for key in ("low", "value", "high"))
    cells = ["·"] * width
    cells[low : high + 1] = "─" * (high + 1 - low)
    cells[low], cells[high] = "├", "┤"
    cells[value] = "●"
    return "".join(cells)


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table. title: a leading > aligns it to the right. need: of columns that do not fit the largest goes first."""

    title: str
    cells: Sequence[Text]
    need: int = 0

    @property
    def width(self) -> int:
        return max(cell_len(self.title.lstrip(">")), *(cell.cell_len for cell in self.cells), 0) + GAP


def table_of(columns: Sequence[Column], width: int) -> Table:
    """A table of the columns that fit into `width`; the first, with the names, is always there, and is cut if it must be."""
    kept = [column for column in columns if column.cells]
    while len(kept) > 2 and sum(column.width for column in kept) > width:
        last = max(kept, key=lambda column: column.need)
        if last.need == 0:
            break
        kept.remove(last)
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, GAP, 0, 0))
    for number, column in enumerate(kept):
        side: Literal["left", "right"] = "right" if column.title.startswith(">") else "left"
        table.add_column(
            column.title.lstrip(">"), justify=side, no_wrap=True, overflow="ellipsis", min_width=4 if number else 8
        )
    for row in zip(*(column.cells for column in kept), strict=True):
        table.add_row(*row)
    return table


def stage_table(report: RunReport, width: int) -> Table:
    """The stages; the copies for seeds and the arms of a comparison are a row each."""
    rows = rows_of(report["stages"])
    took = [row.took if row.status != "pending" else None for row in rows]
    guessed = [row.guess.get("dollars", 0.0) if row.guess else 0.0 for row in rows]
    paid = any(guessed) or any(row.took.get("dollars") for row in rows)
    rates = [one["tokens"] / one["seconds"] if one and one["seconds"] > 0 else 0.0 for one in took]
    columns = [
        Column("stage", [_text(row.name) for row in rows]),
        Column("kind", [_text(row.kind) for row in rows], 3),
        Column("status", [Text(row.status, STATUS_STYLES.get(row.status, "")) for row in rows]),
        Column(">time", _texts(duration(one["seconds"]) if one else "–" for one in took)),
        Column(">predicted", _texts(duration(row.guess["seconds"]) if row.guess else "–" for row in rows), 1),
        Column(">tokens", _texts(scaled(one["tokens"]) if one and one["tokens"] else "–" for one in took), 2),
        Column(">tokens/s", _texts(scaled(rate) if rate else "–" for rate in rates), 4),
        Column("dtype", _texts(row.dtype for row in rows), 5),
    ]
    if paid:
        columns.append(Column(">paid", _texts(money(row.took.get("dollars", 0.0)) for row in rows)))
        columns.append(Column(">of", _texts(map(money, guessed)), 4))
    return table_of(columns, width)


def curve_table(report: RunReport, width: int) -> Table:
    """A sparkline for each quantity that has a panel in the report; with several training seeds, of the first."""
    rows: list[tuple[str, str, Sequence[float | None]]] = []
    for stage in (copies[0] for copies in by_stage(report["stages"])):
        keys = shown_keys(stage)
        rows += [(stage["name"] if not n else "", key, stage["curves"][key]) for n, key in enumerate(keys)]
    known = [[value for value in values if value is not None] for *_, values in rows]
    line = max(8, min(40, width - 44))
    columns = [
        Column("stage", [_text(name) for name, *_ in rows]),
        Column("curve", [_text(key) for _, key, _ in rows]),
        Column("", [_text(sparkline(values, line), "cyan" if "/" not in key else "dim") for _, key, values in rows]),
        Column(">first", _texts(minus(f"{values[0]:.3g}") for values in known), 1),
        Column(">last", _texts(minus(f"{values[-1]:.3g}") for values in known)),
    ]
    return table_of(columns, width)


def arm_table(group: Group, width: int) -> Table:
    """Every arm with its interval, the best first."""
    arms = group.arms
    end = min(1.0, max(arm["accuracy"]["high"] for arm in arms.values()) * 1.1) or 1.0
    ks = sorted({int(k) for arm in arms.values() for k in arm["pass_at"]} - {1})[-1:]
    paid = any(arm["cost"]["with_teacher"].get("dollars") for arm in arms.values())
    bar = 20 if width >= 100 else 12
    bars = [
        Text(
            interval_bar({key: arm["accuracy"][key] for key in ("low", "value", "high")}, bar, end),
            "cyan" if arm["role"] == "student" else "dim",
        )
        for arm in arms.values()
    ]
    columns = [
        Column(group.heading("arm"), [_text(name) for name in arms]),
        Column(f"0 to {end:.0%}", bars, 4),
        Column(">accuracy", _texts(interval_text(arm["accuracy"]) for arm in arms.values())),
    ]
    for k in ks:
        several = [arm["pass_at"].get(str(k)) for arm in arms.values()]
        columns.append(Column(f">pass@{k}", _texts(percent(one["value"]) if one else "–" for one in several), 5))
    columns += [
        Column(">truncated", _texts(percent(arm["clipped_ratio"]) for arm in arms.values()), 6),
        Column(">seeds", _texts(str(arm["seeds"]) for arm in arms.values()), 2),
        Column(">own FLOPs", _texts(scaled(arm["flops"]) for arm in arms.values()), 1),
        Column(">with teacher", _texts(scaled(arm["cost"]["with_teacher"]["flops"]) for arm in arms.values()), 7),
        Column(">time", _texts(duration(arm["seconds"]) for arm in arms.values()), 3),
    ]
    if paid:
        columns.append(
            Column(">paid", _texts(money(a["cost"]["with_teacher"].get("dollars", 0.0)) for a in arms.values()), 1)
        )
    return table_of(columns, width)


def comparison_table(group: Group, width: int) -> Table:
    rows = group.comparisons
    columns = [
        Column(group.heading("pair"), [_text(f"{row['a']} − {row['b']}") for row in rows]),
        Column(">points", _texts(interval_text(row["difference"], signed=True) for row in rows)),
        Column("reading", _texts(reading(row) for row in rows), 1),
    ]
    return table_of(columns, width)


def measurement_table(report: RunReport, width: int) -> Table | None:
    """What was evaluated under other conditions than the arms."""
    measured = report.get("measurements", {})
    if not measured:
        return None
    evaluations = report.get("evaluations", {})
    how = [evaluations.get(arm.get("evaluation", "")) for arm in measured.values()]
    columns = [
        Column("measurement", [_text(name) for name in measured]),
        Column("model", [_text(arm["stage"]) for arm in measured.values()]),
        Column(">accuracy", _texts(interval_text(arm["accuracy"]) for arm in measured.values())),
        Column(">problems", _texts(f"{arm['problems']} × {arm['samples']}" for arm in measured.values()), 1),
        Column("sampling", _texts(row["sampling"] if row else "–" for row in how), 2),
    ]
    return table_of(columns, width)


def _texts(cells: Iterable[str]) -> list[Text]:
    return [_text(cell) for cell in cells]


def _text(text: str, style: str = "") -> Text:
    return Text(" ".join(printable(text).split()) if "\n" in text else printable(text), style)
