"""The report's sections on compute: accuracy against the FLOPs of each arm, and the ledger of what the run spent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distill.reports import arm_plots
from distill.reports.arm_groups import Group
from distill.reports.block_kinds import Block, Figure, Heading, Table, Text, Views
from distill.reports.columns import amounts, times, titled
from distill.reports.run_report import ArmRow, RunReport
from distill.reports.wording import money

VIEWS = {
    "student": "own training",
    "with_inference": "+ teacher inference",
    "with_teacher": "+ teacher training",
}
USED_BY = 4
"""The largest number of arms that a row of the ledger names."""


def compute_blocks(group: Group) -> list[Block]:
    arms = group.arms
    figures = [
        Figure(
            group.file(f"compute_{view}"),
            arm_plots.compute_svg(arms, view),
            f"Accuracy against FLOPs, {label}. {arm_plots.describe(arms)}",
            arm_plots.compute_svg(arms, view, arm_plots.NARROW),
            label,
        )
        for view, label in _views(arms).items()
    ]
    return [
        Heading(group.heading("Accuracy against compute")),
        Views("View of the cost", figures) if len(figures) > 1 else figures[0],
        cost_table(arms),
        Text(
            "What one arm alone takes; each column includes the one before it. Own training: all stages that trained the model, with its "
            "own rollouts. Teacher training: also the training of the model that a student was pruned from. A stage that several arms "
            "share is counted in full for each of them here, so the rows do not add up; the ledger lists it once."
        ),
    ]


def _views(arms: Mapping[str, ArmRow]) -> dict[str, str]:
    """The views of the cost that differ for some arm."""
    return {
        view: label
        for view, label in VIEWS.items()
        if view == "student" or any(_differs(arm, view) for arm in arms.values())
    }


def _differs(arm: Any, view: str) -> bool:
    return bool(arm["cost"][view]["flops"] != arm["cost"]["student"]["flops"])


def cost_table(arms: Mapping[str, ArmRow]) -> Table:
    shown = _views(arms)
    flops = [arm["cost"][view]["flops"] for view in shown for arm in arms.values()]  # type: ignore[index]
    seconds = [arm["cost"][view]["seconds"] for view in ("student", "with_teacher") for arm in arms.values()]
    flop_unit, flop_cells = amounts(flops, "FLOP")
    time_unit, time_cells = times(seconds)
    token_unit, token_cells = amounts([arm["cost"]["student"]["tokens"] for arm in arms.values()])
    paid = any(arm["cost"]["with_teacher"].get("dollars") for arm in arms.values())
    num, rows = len(arms), []
    for n, (name, arm) in enumerate(arms.items()):
        row = [name, *flop_cells[n::num], token_cells[n], *time_cells[n::num]]
        rows.append([*row, money(arm["cost"]["with_teacher"].get("dollars", 0.0))] if paid else row)
    header = [
        "arm",
        *(titled(label, flop_unit) for label in shown.values()),
        titled("own tokens", token_unit),
        titled("own time", time_unit),
        titled("time with teacher", time_unit),
        *(["paid"] if paid else []),
    ]
    return Table(header, rows, "l" + "r" * (len(header) - 1))


def ledger_blocks(report: RunReport) -> list[Block]:
    """What the run spent, each stage once; nothing for reports of earlier versions, which do not hold it."""
    ledger = report.get("ledger", [])
    if not ledger:
        return []
    total = {key: sum(row[key] for row in ledger) for key in ("flops", "seconds")}
    flop_unit, flops = amounts([*(row["flops"] for row in ledger), total["flops"]], "FLOP")
    time_unit, seconds = times([*(row["seconds"] for row in ledger), total["seconds"]])
    dollars = [row.get("dollars", 0.0) for row in ledger]
    rows = []
    for n, row in enumerate(ledger):
        share = f"{100 * row['flops'] / total['flops']:.0f}%" if total["flops"] else "–"
        rows.append([", ".join(row["stages"]), _used_by(row["what"], row["arms"]), flops[n], share, seconds[n]])
    rows.append(["total", "", flops[-1], "100%" if total["flops"] else "–", seconds[-1]])
    header = ["stages", "needed by", titled("compute", flop_unit), "share", titled("time", time_unit)]
    if any(dollars):
        header.append("paid")
        rows = [[*row, money(paid)] for row, paid in zip(rows, [*dollars, sum(dollars)], strict=True)]
    return [
        Heading("Where the compute went"),
        Table(header, rows, "ll" + "r" * (len(header) - 2)),
        Text("All that the run has spent, each stage once: what several arms need is shared by them."),
    ]


def _used_by(what: str, arms: list[str]) -> str:
    if what == "evaluation":
        return "evaluation"
    if not arms:
        return "no arm"
    return (
        ", ".join(arms)
        if len(arms) <= USED_BY
        else f"{', '.join(arms[: USED_BY - 1])} and {len(arms) - USED_BY + 1} more"
    )
