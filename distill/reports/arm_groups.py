"""The arms of a report that can be compared with one another: one group for each way in which the run evaluates.

In a group, arms stand best first, in charts and tables alike, and under their own names: `sft`, not `verdict.sft`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from distill.reports.run_report import ArmRow, ComparisonRow, DivergencePairRow, ExampleRow, RunReport


@dataclass(frozen=True, slots=True)
class Group:
    """Arms of one evaluation, best first, and what was found about them. key: "" for the only group of a run. title: its task."""

    key: str
    title: str
    arms: dict[str, ArmRow]
    comparisons: list[ComparisonRow]
    divergence_pairs: list[DivergencePairRow]
    examples: list[ExampleRow]

    def heading(self, text: str) -> str:
        """A heading of this group, with its task if the report has several groups."""
        return f"{text}: {self.title}" if self.key else text

    def file(self, name: str) -> str:
        """The file of one of the group's plots."""
        return f"plots/{name}_{self.key}.svg" if self.key else f"plots/{name}.svg"


def groups(report: RunReport) -> list[Group]:
    """The groups of a report, in the order of the recipe."""
    by_evaluation: dict[str, list[str]] = {}
    for name, arm in report["arms"].items():
        by_evaluation.setdefault(arm.get("evaluation", ""), []).append(name)
    alone = len(by_evaluation) == 1
    return [_group(report, key, names, alone) for key, names in by_evaluation.items()]


def _group(report: RunReport, key: str, names: list[str], alone: bool) -> Group:
    evaluation = report.get("evaluations", {}).get(key)
    short = _short_names(report, names, evaluation["stages"] if evaluation else [])

    def named(row: str) -> str:
        return short.get(row, row)

    pairs = [row for row in report["comparisons"] if row["a"] in short and row["b"] in short]
    far = [row for row in report.get("divergence_pairs", []) if row["a"] in short and row["b"] in short]
    ranked = sorted(names, key=lambda name: -report["arms"][name]["accuracy"]["value"])
    return Group(
        "" if alone else key,
        f"{evaluation['task']}" if evaluation else "",
        {short[name]: _renamed(report["arms"][name], named) for name in ranked},
        _ordered([{**row, "a": named(row["a"]), "b": named(row["b"])} for row in pairs], report, ranked, named),
        [{**row, "a": named(row["a"]), "b": named(row["b"])} for row in far],
        [_example(row, named) for row in report["examples"] if row["won_by"] in short],
    )


def _ordered(
    rows: list[ComparisonRow], report: RunReport, ranked: list[str], named: Callable[[str], str]
) -> list[ComparisonRow]:
    """The comparisons as the better arm minus the other: those of two students first, each in the order of the arms."""
    rank = {named(name): n for n, name in enumerate(ranked)}
    students = {named(name) for name in ranked if report["arms"][name]["role"] == "student"}
    turned = [row if rank[row["a"]] <= rank[row["b"]] else flipped(row) for row in rows]
    return sorted(turned, key=lambda row: (not {row["a"], row["b"]} <= students, rank[row["a"]], rank[row["b"]]))


def flipped(row: ComparisonRow) -> ComparisonRow:
    """The same comparison with its two arms exchanged."""
    ends = row["difference"]
    turned: ComparisonRow = {**row, "a": row["b"], "b": row["a"]}
    turned["difference"] = {**ends, "value": -ends["value"], "low": -ends["high"], "high": -ends["low"]}
    if "wins" in row and "losses" in row:
        turned["wins"], turned["losses"] = row["losses"], row["wins"]
    return turned


def _short_names(report: RunReport, names: list[str], stages: list[str]) -> dict[str, str]:
    """The names of arms to show: without the stage that compares them, and the model's for a stage that evaluates one model, where
    that leaves them distinct."""

    def short(name: str) -> str:
        if name in stages:
            return report["arms"][name]["stage"]
        return next((name.removeprefix(f"{stage}.") for stage in stages if name.startswith(f"{stage}.")), name)

    found = {name: short(name) for name in names}
    return found if len({*found.values()}) == len(found) else {name: name for name in names}


def _renamed(arm: ArmRow, named: Callable[[str], str]) -> ArmRow:
    if "about" not in arm:
        return arm
    about = arm["about"]
    lists = {key: [named(one) for one in about[key]] for key in ("builds_on", "teachers", "begins_with")}
    return {**arm, "about": {**about, **lists}}  # type: ignore[typeddict-item]


def _example(row: ExampleRow, named: Callable[[str], str]) -> ExampleRow:
    answers = [{**one, "arm": named(one["arm"])} for one in row["answers"]]
    return {**row, "won_by": named(row["won_by"]), "lost_by": named(row["lost_by"]), "answers": answers}  # type: ignore[typeddict-item]
