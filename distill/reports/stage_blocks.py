"""The report's tables of stages: what each took and wrote, and how far that is from the prediction.

The copies of a stage for its training seeds are one row, and so are the evaluations of a comparison, while their status is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from distill.reports.block_kinds import Block, Heading, Table, Text
from distill.reports.columns import amounts, times, titled
from distill.reports.run_report import Amounts, RunReport, StageRow, measured
from distill.reports.wording import money

KEYS = ("tokens", "bytes", "flops", "seconds")


@dataclass(frozen=True, slots=True)
class Row:
    """Stages that are shown as one. took, guess: their sums, with the largest memory; guess is None without a prediction."""

    name: str
    kind: str
    status: str
    dtype: str
    took: Amounts
    guess: Amounts | None
    filtered: float
    failed: float


def stage_blocks(report: RunReport) -> list[Block]:
    rows = rows_of(report["stages"])
    found: list[Block] = [Heading("Stages"), stage_table(rows)]
    found += [Text(f"{stage['name']} failed: {stage['error']}") for stage in report["stages"] if stage.get("error")]
    return found


def prediction_blocks(report: RunReport) -> list[Block]:
    """Nothing for a run without predictions."""
    rows = [row for row in rows_of(report["stages"]) if row.status != "pending"]
    if not any(row.guess is not None for row in rows):
        return []
    return [
        Heading("Predicted and measured"),
        prediction_table(rows),
        Text("Each × is a measured value divided by the one that distill check predicted: above 1, it took more."),
    ]


def rows_of(stages: Sequence[StageRow]) -> list[Row]:
    """The rows of the stages, in order."""
    together: dict[tuple[str, str, str], list[StageRow]] = {}
    for stage in stages:
        whole, _, below = stage["name"].partition(".")
        base = whole.partition("@")[0] if not below else f"{whole}.*"
        together.setdefault((base, stage["kind"], stage["status"]), []).append(stage)
    return [_row(base, kind, status, found) for (base, kind, status), found in together.items()]


def _row(base: str, kind: str, status: str, stages: Sequence[StageRow]) -> Row:
    name = stages[0]["name"]
    if len(stages) > 1:
        below = base.endswith(".*")
        name = f"{base.removesuffix('.*')}, {len(stages)} {'arms' if below else 'seeds'}"
    predicted = [stage["predicted"] for stage in stages if "predicted" in stage]
    return Row(
        name=name,
        kind=kind,
        status=status,
        dtype=", ".join(dict.fromkeys(stage["dtype"] for stage in stages if stage.get("dtype"))) or "–",
        took=total([measured(stage) for stage in stages]),
        guess=total(predicted) if predicted else None,
        filtered=sum(stage["cost"].get("samples_filtered", 0) for stage in stages),
        failed=sum(stage["cost"].get("samples_failed", 0) for stage in stages),
    )


def total(found: Sequence[Amounts]) -> Amounts:
    """The sum of amounts; of memory the largest."""
    summed: Amounts = {
        "tokens": sum(one["tokens"] for one in found),
        "bytes": sum(one["bytes"] for one in found),
        "flops": sum(one["flops"] for one in found),
        "seconds": sum(one["seconds"] for one in found),
        "memory": max((one.get("memory", 0.0) for one in found), default=0.0),
    }
    if written := sum(one.get("written", 0.0) for one in found):
        summed["written"] = written
    if paid := sum(one.get("dollars", 0.0) for one in found):
        summed["dollars"] = paid
    return summed


def stage_table(rows: Sequence[Row]) -> Table:
    begun = [row.status != "pending" for row in rows]
    columns: list[tuple[str, list[str]]] = []

    def add(name: str, unit_and_cells: tuple[str, list[str]], suffix: str = "") -> None:
        unit, cells = unit_and_cells
        columns.append((titled(name, unit + suffix), cells))

    def of(key: str) -> list[float | None]:
        return [float(cast(float, row.took.get(key, 0.0))) if on else None for row, on in zip(rows, begun, strict=True)]

    rates = [row.took["tokens"] / row.took["seconds"] if row.took["seconds"] > 0 else 0.0 for row in rows]
    add("time", times(of("seconds")))
    add("tokens", amounts([value or None for value in of("tokens")]))
    columns.append(("tokens/s", amounts_plain(rates)))
    add("compute", amounts([value or None for value in of("flops")], "FLOP"))
    add("written", amounts([value or None for value in of("written")], "B", least=1))
    if any(row.filtered for row in rows):
        columns.append(("filtered", [f"{row.filtered:,.0f}" for row in rows]))
    if any(row.failed for row in rows):
        columns.append(("failed", [f"{row.failed:,.0f}" for row in rows]))
    if any(row.took.get("dollars") for row in rows):
        columns.append(("paid", [money(row.took.get("dollars", 0.0)) for row in rows]))
    cells = [
        [row.name, row.kind, row.status, row.dtype, *(column[n] for _, column in columns)] for n, row in enumerate(rows)
    ]
    header = ["stage", "kind", "status", "dtype", *(name for name, _ in columns)]
    return Table(header, cells, "llll" + "r" * len(columns))


def amounts_plain(values: Sequence[float]) -> list[str]:
    """Whole numbers, "–" for none."""
    return [f"{value:,.0f}" if value else "–" for value in values]


def prediction_table(rows: Sequence[Row]) -> Table:
    pairs = [(row.name, row.guess, row.took) for row in rows if row.guess is not None]
    if len(pairs) > 1:
        pairs.append(("total", total([guess for _, guess, _ in pairs]), total([took for *_, took in pairs])))
    guesses, tooks = [guess for _, guess, _ in pairs], [took for *_, took in pairs]
    num = len(pairs)
    both = [one["seconds"] for one in (*guesses, *tooks)]
    time_unit, seconds = times(both)
    remembered = [g.get("memory", 0.0) > 0 and t.get("memory", 0.0) > 0 for g, t in zip(guesses, tooks, strict=True)]
    memory_unit, memory = amounts(
        [
            one.get("memory") if on else None
            for ones in (guesses, tooks)
            for one, on in zip(ones, remembered, strict=True)
        ],
        "B",
        least=1,
    )
    priced = any("dollars" in one and one["dollars"] for one in (*guesses, *tooks))
    cells = []
    for n, (name, guess, took) in enumerate(pairs):
        row = [name, seconds[n], seconds[num + n], ratio(guess["seconds"], took["seconds"])]
        row += [
            memory[n],
            memory[num + n],
            ratio(guess.get("memory", 0.0), took.get("memory", 0.0)) if remembered[n] else "–",
        ]
        row += [ratio(guess[key], took[key]) for key in ("tokens", "flops", "bytes")]
        row += [money(guess.get("dollars", 0.0)), money(took.get("dollars", 0.0))] if priced else []
        cells.append(row)
    header = ["stage", titled("predicted time", time_unit), titled("time", time_unit), "time ×"]
    header += [titled("predicted memory", memory_unit), titled("memory", memory_unit), "memory ×"]
    header += ["tokens ×", "FLOPs ×", "bytes ×", *(["predicted cost", "paid"] if priced else [])]
    return Table(header, cells, "l" + "r" * (len(header) - 1))


def ratio(guess: float, took: float) -> str:
    """Measured by predicted; "–" without a prediction or a measured value."""
    return f"{took / guess:.2f}" if guess and took else "–"
