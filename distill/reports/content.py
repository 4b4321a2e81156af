"""What a report says, as blocks: headings, sentences, tables, figures, folded examples.

Comes in: a `RunReport`. Goes out: a list of blocks that Markdown and HTML both render, so the two cannot
disagree. Left out on purpose: any markup, and the numbers' wording (`wording`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distill.reports import plot
from distill.reports.schema import Amounts, RunReport, measured
from distill.reports.wording import (
    duration,
    interval_text,
    p_text,
    percent,
    reading,
    scaled,
    verdict,
)


@dataclass(frozen=True, slots=True)
class Heading:
    text: str


@dataclass(frozen=True, slots=True)
class Text:
    text: str


@dataclass(frozen=True, slots=True)
class Table:
    """align: one of l and r a column."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    align: str


@dataclass(frozen=True, slots=True)
class Code:
    """Text to be shown as it is, whatever it holds."""

    text: str
    language: str = "text"


@dataclass(frozen=True, slots=True)
class Figure:
    """A self-contained SVG; file is its name beside the report, alt what it shows in words."""

    file: str
    svg: str
    alt: str


@dataclass(frozen=True, slots=True)
class Folded:
    """Blocks that are folded away where the page can fold."""

    summary: str
    blocks: Sequence[Text | Code]


Block = Heading | Text | Table | Code | Figure | Folded

VIEWS = {
    "student": "own training",
    "with_inference": "+ teacher inference",
    "with_teacher": "+ teacher training",
}


# ---------------------------------------------------------------------------------------------- blocks


def blocks(report: RunReport) -> list[Block]:
    """The whole report, top to bottom; sections that have nothing to say are left out."""
    found: list[Block] = [Text(report.get("verdict") or verdict(report))]
    if report["description"]:
        found.append(Text(report["description"]))
    if report["arms"]:
        found += [Heading("Accuracy"), accuracy_table(report)]
        found.append(
            Figure("accuracy.svg", plot.accuracy_svg(report["arms"]), plot.describe(report["arms"]))
        )
        found.append(
            Text(
                "Brackets are 95% intervals with the problem as the unit: Wilson where each problem is "
                "either solved or not, otherwise a bootstrap over problems. Unfinished completions are wrong."
            )
        )
    if report["comparisons"]:
        found += [Heading("Differences"), comparison_table(report)]
        found.append(
            Text(
                "Paired on the same problems; p after Holm's correction over the pairs of the table. Only "
                "several training seeds an arm can support a statement about a way of training."
            )
        )
    if report["arms"]:
        found += [Heading("What each arm cost"), cost_table(report)]
        found.append(
            Text(
                "Each view contains the one before it, and is left out where it adds nothing. Own training "
                "holds all stages of the model's own line, its own rollouts included."
            )
        )
    found += [Heading("Stages"), stage_table(report)]
    if any("predicted" in stage for stage in report["stages"]):
        found += [Heading("Predicted and measured"), prediction_table(report)]
    if report["examples"]:
        found += [Heading("Examples"), *example_blocks(report)]
    found += settings_blocks(report)
    return found


def accuracy_table(report: RunReport) -> Table:
    arms = report["arms"]
    ks = sorted({int(k) for arm in arms.values() for k in arm["pass_at"]} - {1})
    votes = sorted({int(k) for arm in arms.values() for k in arm["maj_at"]})
    header = ["arm", "accuracy (pass@1)", *(f"pass@{k}" for k in ks), *(f"maj@{k}" for k in votes)]
    header += ["truncated", "mean tokens", "problems", "samples", "seeds"]
    rows = []
    for name, arm in arms.items():
        curve = [arm["pass_at"].get(str(k)) for k in ks] + [
            arm["maj_at"].get(str(k)) for k in votes
        ]
        rows.append(
            [
                name,
                interval_text(arm["accuracy"]),
                *(interval_text(one) if one else "–" for one in curve),
                percent(arm["truncation"]),
                f"{arm['mean_length']:.1f}",
                str(arm["problems"]),
                str(arm["samples"]),
                str(arm["seeds"]),
            ]
        )
    return Table(header, rows, "l" + "r" * (len(header) - 1))


def comparison_table(report: RunReport) -> Table:
    rows = [
        [
            f"{row['a']} − {row['b']}",
            interval_text(row["difference"], signed=True),
            p_text(row["p_value"]),
            p_text(row["p_holm"]),
            f"{row.get('wins', 0)} / {row.get('losses', 0)}" if "wins" in row else "–",
            row["method"],
            reading(row),
        ]
        for row in report["comparisons"]
    ]
    header = ["pair", "points", "p", "p (Holm)", "won / lost", "method", "reading"]
    return Table(header, rows, "lrrrrll")


def cost_table(report: RunReport) -> Table:
    rows = []
    for name, arm in report["arms"].items():
        before = None
        for key, label in VIEWS.items():
            cost = arm["cost"][key]  # type: ignore[index]
            if cost == before:
                continue
            before = cost
            rows.append(
                [
                    name if key == "student" else "",
                    label,
                    scaled(cost["tokens"]),
                    scaled(cost["flops"], "FLOP"),
                    duration(cost["seconds"]),
                ]
            )
    return Table(["arm", "view", "tokens", "FLOPs", "time"], rows, "llrrr")


def stage_table(report: RunReport) -> Table:
    rows = []
    for stage in report["stages"]:
        took = measured(stage)
        rate = took["tokens"] / took["seconds"] if took["seconds"] > 0 else 0.0
        left_out = stage["cost"].get("samples_filtered", 0)
        rows.append(
            [
                stage["name"],
                stage["kind"],
                stage["status"],
                duration(took["seconds"]),
                scaled(took["tokens"]),
                scaled(rate) if rate else "–",
                scaled(took["flops"], "FLOP"),
                scaled(took["bytes"], "B"),
                f"{left_out:.0f}",
                f"{stage['cost'].get('samples_failed', 0):.0f}",
            ]
        )
    header = ["stage", "kind", "status", "time", "tokens", "tokens/s", "FLOPs", "written"]
    return Table([*header, "filtered", "failed"], rows, "lllrrrrrrr")


def prediction_table(report: RunReport) -> Table:
    wording = {
        "tokens": scaled,
        "bytes": lambda value: scaled(value, "B"),
        "flops": lambda value: scaled(value, "FLOP"),
        "seconds": duration,
    }
    rows = []
    pairs = [
        (stage["name"], stage["predicted"], measured(stage))
        for stage in report["stages"]
        if "predicted" in stage
    ]
    if len(pairs) > 1:
        pairs.append(
            ("all of them", _total([p for _, p, _ in pairs]), _total([m for *_, m in pairs]))
        )
    for name, predicted, took in pairs:
        shown = [key for key in wording if predicted[key] or took[key]]  # type: ignore[literal-required]
        for i, key in enumerate(shown):
            guess, real = predicted[key], took[key]  # type: ignore[literal-required]
            ratio = f"{real / guess:.2f}" if guess else "–"
            rows.append(
                [
                    name if i == 0 else "",
                    key.replace("flops", "FLOPs"),
                    wording[key](guess),
                    wording[key](real),
                    ratio,
                ]
            )
    return Table(["stage", "what", "predicted", "measured", "ratio"], rows, "llrrr")


def _total(amounts: Sequence[Amounts]) -> Amounts:
    return {
        "tokens": sum(one["tokens"] for one in amounts),
        "bytes": sum(one["bytes"] for one in amounts),
        "flops": sum(one["flops"] for one in amounts),
        "seconds": sum(one["seconds"] for one in amounts),
    }


def example_blocks(report: RunReport) -> list[Folded]:
    found = []
    for example in report["examples"]:
        inside: list[Text | Code] = [Code(example["question"])]
        if example["gold"] is not None:
            inside.append(Text(f"Reference answer: {example['gold']}"))
        for one in example["answers"]:
            judged = {True: "correct", False: "wrong", None: "not judged"}[one["correct"]]
            cut = ", cut off at the token limit" if one["finish_reason"] == "length" else ""
            answer = f", answer {one['answer']}" if one["answer"] is not None else ", no answer"
            inside += [Text(f"{one['arm']}: {judged}{answer}{cut}"), Code(one["completion"])]
        found.append(
            Folded(
                f"{example['won_by']} won, {example['lost_by']} lost: {example['problem_id']}",
                inside,
            )
        )
    return found


def settings_blocks(report: RunReport) -> list[Block]:
    found: list[Block] = []
    if report["notes"]:
        found += [Heading("Notes"), *(Text(note) for note in report["notes"])]
    found.append(Heading("Settings and how to reproduce"))
    settings = {"created": report["created"], "seed": report["seed"], "task": report["task"]}
    rows = [*_flat(settings), *_flat(report["environment"])]
    found.append(Table(["setting", "value"], rows, "ll"))
    if report["reproduce"]:
        found.append(Code("\n".join(report["reproduce"]), "sh"))
    if report["recipe"]:
        found.append(Folded("Recipe, resolved", [Code(report["recipe"], "yaml")]))
    return found


def _flat(tree: Mapping[str, Any], prefix: str = "") -> list[list[str]]:
    """Nested settings as dotted rows."""
    rows = []
    for key, value in tree.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{key}.")
        else:
            rows.append([f"{prefix}{key}", str(value)])
    return rows
