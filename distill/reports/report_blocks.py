"""The content of a report as blocks: headings, sentences, tables, figures, collapsible examples.

Input: a `RunReport`. Output: a list of blocks without markup. Markdown and HTML are both rendered from it, so they agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distill.reports import arm_plots, curves
from distill.reports.block_kinds import (
    Answer,
    Block,
    Code,
    Figure,
    Folded,
    Heading,
    Panels,
    Table,
    Text,
    Views,
)
from distill.reports.divergence_blocks import divergence_blocks
from distill.reports.run_report import Amounts, ExampleRow, RunReport, StageRow, measured
from distill.reports.trace_curve_blocks import trace_curve_blocks
from distill.reports.wording import (
    duration,
    interval_text,
    money,
    p_text,
    percent,
    reading,
    scaled,
    verdict,
)

VIEWS = {
    "student": "own training",
    "with_inference": "+ teacher inference",
    "with_teacher": "+ teacher training",
}


# ---------------------------------------------------------------------------------------------- blocks


def blocks(report: RunReport) -> list[Block]:
    """All blocks of a report, in order; empty sections are left out."""
    found: list[Block] = [Text(report.get("verdict") or verdict(report))]
    if report["description"]:
        found.append(Text(report["description"]))
    if report["arms"]:
        found += accuracy_blocks(report)
    if report["comparisons"]:
        found += [Heading("Differences"), comparison_table(report), Text(_how_compared(report))]
    found += trace_curve_blocks(report)
    if any("divergence" in arm for arm in report["arms"].values()):
        found += divergence_blocks(report)
    if report["arms"]:
        found += compute_blocks(report)
    found += curve_blocks(report["stages"])
    if report["examples"]:
        found += [Heading("Won and lost"), *example_blocks(report["examples"])]
    found += [Heading("Stages"), stage_table(report)]
    if any("predicted" in stage for stage in report["stages"]):
        found += [
            Heading("Predicted and measured"),
            prediction_table(report),
            Text("× is the measured value divided by the one that `check` predicted."),
        ]
    found += settings_blocks(report)
    return found


def accuracy_blocks(report: RunReport) -> list[Block]:
    arms = report["arms"]
    found: list[Block] = [
        Heading("Accuracy"),
        Figure(
            "plots/accuracy.svg",
            arm_plots.accuracy_svg(arms),
            arm_plots.describe(arms),
            arm_plots.accuracy_svg(arms, arm_plots.NARROW),
        ),
        accuracy_table(report),
        Text(
            "Brackets are 95% intervals with the problem as the unit: Wilson's interval if each problem is either always "
            "or never solved, otherwise a bootstrap over problems. For an arm with several training seeds they are over "
            "seeds and problems. Completions cut off at the token limit count as wrong."
        ),
    ]
    if any(len(arm.get("by_seed", [])) > 1 for arm in arms.values()):
        found.append(seed_table(report))
    if arm_plots.has_pass_curve(arms):
        figure = Figure(
            "plots/pass_at_k.svg",
            arm_plots.pass_svg(arms),
            "Probability that at least one of k samples is correct, by k",
            arm_plots.pass_svg(arms, arm_plots.NARROW),
        )
        found += [
            Heading("pass@k"),
            figure,
            Text("Unbiased estimates over the samples of each problem; bars are 95% intervals."),
        ]
    return found


def compute_blocks(report: RunReport) -> list[Block]:
    arms = report["arms"]
    figures = [
        Figure(
            f"plots/compute_{view}.svg",
            arm_plots.compute_svg(arms, view),
            f"Accuracy against FLOPs, {label}. {arm_plots.describe(arms)}",
            arm_plots.compute_svg(arms, view, arm_plots.NARROW),
            label,
        )
        for view, label in VIEWS.items()
        if view == "student" or any(_differs(arm, view) for arm in arms.values())
    ]
    return [
        Heading("Accuracy against compute"),
        Views("View of the cost", figures) if len(figures) > 1 else figures[0],
        cost_table(report),
        Text(
            "FLOPs; each column includes the one before it. Own training covers all stages that trained the model, with "
            "its own rollouts. The cost of a teacher's training is divided among its students."
        ),
    ]


def _differs(arm: Any, view: str) -> bool:
    return bool(arm["cost"][view]["flops"] != arm["cost"]["student"]["flops"])


def curve_blocks(stages: Sequence[StageRow]) -> list[Block]:
    found: list[Block] = []
    for copies in curves.by_stage(stages):
        name, kind = copies[0]["name"].partition("@")[0], copies[0]["kind"]
        if len(copies) == 1:
            drawn, title = curves.panels(copies[0]), f"{name} ({kind})"
        else:
            drawn = curves.seed_panels(copies)
            title = f"{name} ({kind}, {len(copies)} training seeds)"
        figures = [Figure(f"plots/{name}_{stem}.svg", svg, label) for stem, label, svg in drawn]
        if figures:
            found.append(Panels(title, figures))
    return [Heading("Training curves"), *found] if found else []


def _how_compared(report: RunReport) -> str:
    methods = sorted({row["method"] for row in report["comparisons"]})
    return (
        "Paired on the same problems; p (Holm) is corrected for the number of pairs. A statement about a way of training "
        f"needs several training seeds per arm. Methods: {'; '.join(methods)}."
    )


def accuracy_table(report: RunReport) -> Table:
    arms = report["arms"]
    ks = sorted({int(k) for arm in arms.values() for k in arm["pass_at"]} - {1})[-1:]
    votes = sorted({int(k) for arm in arms.values() for k in arm["maj_at"]})[-1:]
    header = ["arm", "accuracy (pass@1)", *(f"pass@{k}" for k in ks), *(f"maj@{k}" for k in votes)]
    unjudged = any(arm["unjudged"] for arm in arms.values())
    header += [
        "truncated",
        *(["not judged (wrong)"] if unjudged else []),
        "mean tokens",
        "problems",
        "samples",
        "seeds",
    ]
    rows = []
    for name, arm in arms.items():
        curve = [arm["pass_at"].get(str(k)) for k in ks] + [arm["maj_at"].get(str(k)) for k in votes]
        rows.append(
            [
                name,
                interval_text(arm["accuracy"]),
                *(interval_text(one) if one else "–" for one in curve),
                percent(arm["clipped_ratio"]),
                *([str(arm["unjudged"])] if unjudged else []),
                f"{arm['mean_length']:.1f}",
                str(arm["problems"]),
                str(arm["samples"]),
                str(arm["seeds"]),
            ]
        )
    return Table(header, rows, "l" + "r" * (len(header) - 1))


def seed_table(report: RunReport) -> Table:
    """Accuracy with a row per arm and a column per training seed."""
    by_arm = {name: {one["seed"]: one for one in arm.get("by_seed", [])} for name, arm in report["arms"].items()}
    seeds = sorted({seed for found in by_arm.values() for seed in found})
    rows = [
        [name, *(interval_text(found[s]["accuracy"]) if s in found else "–" for s in seeds)]
        for name, found in by_arm.items()
        if found
    ]
    header = ["arm, by training seed", *(f"seed {seed}" for seed in seeds)]
    return Table(header, rows, "l" + "r" * len(seeds))


def comparison_table(report: RunReport) -> Table:
    rows = [
        [
            f"{row['a']} − {row['b']}",
            interval_text(row["difference"], signed=True),
            p_text(row["p_value"]),
            p_text(row["p_holm"]),
            f"{row['wins']} / {row['losses']}" if "wins" in row and "losses" in row else "–",
            reading(row),
        ]
        for row in report["comparisons"]
    ]
    header = ["pair", "points", "p", "p (Holm)", "won / lost", "reading"]
    return Table(header, rows, "lrrrrl")


def cost_table(report: RunReport) -> Table:
    shown = {
        view: label
        for view, label in VIEWS.items()
        if view == "student" or any(_differs(arm, view) for arm in report["arms"].values())
    }
    paid = any(arm["cost"]["with_teacher"].get("dollars") for arm in report["arms"].values())
    rows = [
        [
            name,
            *(scaled(arm["cost"][view]["flops"]) for view in shown),  # type: ignore[index]
            scaled(arm["cost"]["student"]["tokens"]),
            duration(arm["cost"]["student"]["seconds"]),
            duration(arm["cost"]["with_teacher"]["seconds"]),
            *([money(arm["cost"]["with_teacher"].get("dollars", 0.0))] if paid else []),
        ]
        for name, arm in report["arms"].items()
    ]
    header = ["arm, FLOPs", *shown.values(), "own tokens", "own time", "with teacher", *(["paid"] if paid else [])]
    return Table(header, rows, "l" + "r" * (len(header) - 1))


def stage_table(report: RunReport) -> Table:
    rows = []
    paid = any(measured(stage).get("dollars") for stage in report["stages"])
    for stage in report["stages"]:
        took = measured(stage)
        rate = took["tokens"] / took["seconds"] if took["seconds"] > 0 else 0.0
        left_out = stage["cost"].get("samples_filtered", 0)
        rows.append(
            [
                stage["name"],
                stage["kind"],
                stage["status"],
                stage.get("dtype") or "–",
                duration(took["seconds"]),
                scaled(took["tokens"]),
                scaled(rate) if rate else "–",
                scaled(took["flops"], "FLOP"),
                scaled(took["bytes"], "B"),
                f"{left_out:.0f}",
                f"{stage['cost'].get('samples_failed', 0):.0f}",
                *([money(took.get("dollars", 0.0))] if paid else []),
            ]
        )
    header = ["stage", "kind", "status", "dtype", "time", "tokens", "tokens/s", "FLOPs", "written"]
    more = ["filtered", "failed", *(["paid"] if paid else [])]
    return Table([*header, *more], rows, "llll" + "r" * (len(header) + len(more) - 4))


def prediction_table(report: RunReport) -> Table:
    pairs = [(stage["name"], stage["predicted"], measured(stage)) for stage in report["stages"] if "predicted" in stage]
    if len(pairs) > 1:
        pairs.append(("total", _total([p for _, p, _ in pairs]), _total([m for *_, m in pairs])))
    priced = any("dollars" in amounts for _, *both in pairs for amounts in both)
    rows = [
        [
            name,
            duration(guess["seconds"]),
            duration(took["seconds"]),
            _ratio(guess["seconds"], took["seconds"]),
            scaled(guess["tokens"]) if guess["tokens"] else "–",
            scaled(took["tokens"]) if guess["tokens"] else "–",
            *(_ratio(guess[key], took[key]) for key in ("tokens", "flops", "bytes")),
            *_memory_cells(guess, took),
            *([money(guess.get("dollars", 0.0)), money(took.get("dollars", 0.0))] if priced else []),
        ]
        for name, guess, took in pairs
    ]
    header = ["stage", "predicted", "time", "×", "predicted", "tokens", "×", "FLOPs ×", "bytes ×"]
    more = ["predicted", "memory", "×", *(["predicted", "paid"] if priced else [])]
    return Table([*header, *more], rows, "l" + "r" * (len(header) + len(more) - 1))


def _memory_cells(guess: Amounts, took: Amounts) -> list[str]:
    expected, peak = guess.get("memory", 0.0), took.get("memory", 0.0)
    if not expected or not peak:
        return ["–", "–", "–"]
    return [scaled(expected, "B"), scaled(peak, "B"), _ratio(expected, peak)]


def _ratio(guess: float, took: float) -> str:
    return f"{took / guess:.2f}" if guess else "–"


def _total(amounts: Sequence[Amounts]) -> Amounts:
    total: Amounts = {
        "tokens": sum(one["tokens"] for one in amounts),
        "bytes": sum(one["bytes"] for one in amounts),
        "flops": sum(one["flops"] for one in amounts),
        "seconds": sum(one["seconds"] for one in amounts),
        "memory": max((one.get("memory", 0.0) for one in amounts), default=0.0),
    }
    if paid := sum(one.get("dollars", 0.0) for one in amounts):
        total["dollars"] = paid
    return total


def example_blocks(examples: Sequence[ExampleRow]) -> list[Folded]:
    found = []
    for example in examples:
        inside: list[Text | Code | Answer] = [Code(example["question"])]
        gold = f"reference answer {example['gold']}; " if example["gold"] is not None else ""
        inside.append(Text(f"{gold}problem {example['problem_id']}"))
        order = {example["won_by"]: 0, example["lost_by"]: 1}
        for one in sorted(example["answers"], key=lambda one: order.get(one["arm"], 2)):
            judged = {True: "correct", False: "wrong", None: "not judged"}[one["correct"]]
            cut = ", cut off at the token limit" if one["finish_reason"] == "length" else ""
            answer = f", answer {one['answer']}" if one["answer"] is not None else ", no answer"
            inside.append(Answer(one["arm"], f"{judged}{answer}{cut}", one["correct"], one["completion"]))
        question = " ".join(example["question"].split())
        shown = question if len(question) <= 80 else question[:79] + "…"
        found.append(Folded(f"{example['won_by']} won, {example['lost_by']} lost: {shown}", inside))
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
    """Nested settings as rows with dotted keys."""
    rows = []
    for key, value in tree.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{key}.")
        else:
            rows.append([f"{prefix}{key}", str(value)])
    return rows
