"""Print a run's report in the terminal: verdict, arms with intervals, curves as sparklines, stages.

Renders a `RunReport` with rich; the run may be unfinished. Untrusted text goes through `Text`, which interprets no markup,
with control characters replaced.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from distill.printable import printable
from distill.reports.curves import by_stage, shown_keys
from distill.reports.run_report import RunReport, measured
from distill.reports.wording import duration, interval_text, money, percent, reading, scaled, verdict

BLOCKS = "▁▂▃▄▅▆▇█"
STATUS_STYLES = {
    "done": "green",
    "skipped": "dim",
    "running": "yellow",
    "failed": "red",
    "pending": "dim",
}


def show(report: RunReport, console: Console | None = None) -> None:
    """Print a run."""
    console = console or Console()
    console.print(_text(report["name"], "bold"))
    console.print(_text(report.get("verdict") or verdict(report)))
    if report["arms"]:
        console.print()
        console.print(arm_table(report))
    if report["comparisons"]:
        console.print()
        console.print(comparison_table(report))
    curves = curve_table(report)
    if curves.row_count:
        console.print()
        console.print(curves)
    console.print()
    console.print(stage_table(report))


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


def stage_table(report: RunReport) -> Table:
    paid = any(measured(stage).get("dollars") for stage in report["stages"])
    more = [">paid", ">predicted"] if paid else []
    table = _table("stage", "kind", "status", "dtype", ">time", ">predicted", ">tokens", ">tokens/s", *more)
    for stage in report["stages"]:
        took = measured(stage)
        rate = took["tokens"] / took["seconds"] if took["seconds"] > 0 else 0.0
        table.add_row(
            _text(stage["name"]),
            stage["kind"],
            Text(stage["status"], STATUS_STYLES.get(stage["status"], "")),
            stage.get("dtype") or "–",
            duration(took["seconds"]),
            duration(stage["predicted"]["seconds"]) if "predicted" in stage else "–",
            scaled(took["tokens"]),
            scaled(rate) if rate else "–",
            *([money(took.get("dollars", 0.0)), money(stage.get("predicted", {}).get("dollars", 0.0))] if paid else []),
        )
    return table


def curve_table(report: RunReport) -> Table:
    """A sparkline for each quantity that has a panel in the report; with several training seeds, of the first."""
    table = _table("stage", "curve", "", ">first", ">last")
    for stage in (copies[0] for copies in by_stage(report["stages"])):
        before = None
        for name in shown_keys(stage):
            values = stage["curves"][name]
            known = [value for value in values if value is not None]
            line = _text(sparkline(values), "cyan" if "/" not in name else "dim")
            ends = (f"{known[0]:.4g}", f"{known[-1]:.4g}")
            table.add_row(_text("" if before else stage["name"]), _text(name), line, *ends)
            before = name
    return table


def arm_table(report: RunReport) -> Table:
    """Every arm with its interval, the best first."""
    arms = report["arms"]
    end = min(1.0, max(arm["accuracy"]["high"] for arm in arms.values()) * 1.1) or 1.0
    ks = sorted({int(k) for arm in arms.values() for k in arm["pass_at"]} - {1})[-1:]
    header = ["arm", f"0 to {percent(end)}", ">accuracy", *(f">pass@{k}" for k in ks), ">truncated"]
    paid = any(arm["cost"]["with_teacher"].get("dollars") for arm in arms.values())
    table = _table(*header, ">seeds", ">FLOPs", ">with teacher", ">time", *([">paid"] if paid else []))
    for name, arm in sorted(arms.items(), key=lambda item: -item[1]["accuracy"]["value"]):
        more = [arm["pass_at"].get(str(k)) for k in ks]
        bar = {key: arm["accuracy"][key] for key in ("low", "value", "high")}
        table.add_row(
            _text(name),
            Text(interval_bar(bar, end=end), "cyan" if arm["role"] == "student" else "dim"),
            Text(interval_text(arm["accuracy"])),
            *(percent(one["value"]) if one else "–" for one in more),
            percent(arm["clipped_ratio"]),
            str(arm["seeds"]),
            scaled(arm["flops"], "FLOP"),
            scaled(arm["cost"]["with_teacher"]["flops"], "FLOP"),
            duration(arm["seconds"]),
            *([money(arm["cost"]["with_teacher"].get("dollars", 0.0))] if paid else []),
        )
    return table


def comparison_table(report: RunReport) -> Table:
    table = _table("pair", ">points", "reading")
    for row in report["comparisons"]:
        points = Text(interval_text(row["difference"], signed=True))
        table.add_row(_text(f"{row['a']} − {row['b']}"), points, reading(row))
    return table


def _table(*columns: str) -> Table:
    """An empty table with these headings; a leading > aligns a column to the right."""
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column.lstrip(">"), justify="right" if column.startswith(">") else "left")
    return table


def _text(text: str, style: str = "") -> Text:
    return Text(" ".join(printable(text).split()) if "\n" in text else printable(text), style)
