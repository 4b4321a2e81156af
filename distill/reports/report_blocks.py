"""The content of a report as blocks: headings, sentences, tables, figures, collapsible examples.

Input: a `RunReport`. Output: a list of blocks without markup. Markdown and HTML are both rendered from it, so they agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distill.reports import arm_plots, curves
from distill.reports.arm_groups import Group, groups
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
)
from distill.reports.cost_blocks import VIEWS as VIEWS
from distill.reports.cost_blocks import compute_blocks, ledger_blocks
from distill.reports.divergence_blocks import distance_blocks, divergence_blocks
from distill.reports.headline import verdict
from distill.reports.run_report import ArmRow, ExampleRow, RunReport, StageRow
from distill.reports.stage_blocks import prediction_blocks, stage_blocks
from distill.reports.trace_curve_blocks import trace_curve_blocks
from distill.reports.wording import interval_text, p_text, percent, reading

# ---------------------------------------------------------------------------------------------- blocks


def blocks(report: RunReport) -> list[Block]:
    """All blocks of a report, in order; empty sections are left out."""
    found: list[Block] = [Text(report.get("verdict") or verdict(report))]
    if report["description"]:
        found.append(Text(report["description"]))
    ended = all(stage["status"] in ("done", "skipped") for stage in report["stages"])
    if not ended:
        found += stage_blocks(report)
    for group in groups(report):
        found += about_blocks(group)
        found += accuracy_blocks(group)
        if group.comparisons:
            found += [Heading(group.heading("Differences")), comparison_table(group), Text(_how_compared(group))]
        if any("divergence" in arm for arm in group.arms.values()):
            found += divergence_blocks(group)
        found += compute_blocks(group)
    if measured := report.get("measurements"):
        found += measurement_blocks(report, measured)
    found += distance_blocks(report)
    found += trace_curve_blocks(report)
    found += ledger_blocks(report)
    found += curve_blocks(report["stages"])
    examples = [example for group in groups(report) for example in group.examples]
    if examples:
        found += [Heading("Won and lost"), *example_blocks(examples)]
    if ended:
        found += stage_blocks(report)
    found += prediction_blocks(report)
    found += settings_blocks(report)
    return found


def about_blocks(group: Group) -> list[Block]:
    """What each arm is, a line an arm; nothing for reports of earlier versions, which do not say it."""
    known = {name: (arm, arm["about"]) for name, arm in group.arms.items() if "about" in arm}
    if not known:
        return []
    columns = {
        "trained by": [row["training"] for _, row in known.values()],
        "on": [row["data"] for _, row in known.values()],
        "steps": [row["steps"] for _, row in known.values()],
        "seeds": [str(arm["seeds"]) if row["steps"] else "" for arm, row in known.values()],
        "from": [row["start"] for _, row in known.values()],
        "parameters": [row["size"] for _, row in known.values()],
    }
    bases = dict.fromkeys(row["base"] for _, row in known.values() if row["base"])
    if len(bases) > 1:
        columns["base model"] = [row["base"] for _, row in known.values()]
    shown = {title: cells for title, cells in columns.items() if any(cells)}
    rows = [
        [name, arm["role"], *(cells[number] or "–" for cells in shown.values())]
        for number, (name, (arm, _)) in enumerate(known.items())
    ]
    align = "ll" + "".join("r" if title in ("steps", "seeds") else "l" for title in shown)
    found: list[Block] = [Heading(group.heading("Arms")), Table(["arm", "role", *shown], rows, align, stacked=True)]
    if len(bases) == 1:
        found.append(Text(f"All were made from {next(iter(bases))}."))
    return found


def accuracy_blocks(group: Group) -> list[Block]:
    arms = group.arms
    found: list[Block] = [
        Heading(group.heading("Accuracy")),
        Figure(
            group.file("accuracy"),
            arm_plots.accuracy_svg(arms),
            arm_plots.describe(arms),
            arm_plots.accuracy_svg(arms, arm_plots.NARROW),
        ),
        accuracy_table(arms),
        Text(
            "Brackets are 95% intervals with the problem as the unit: Wilson's interval if each problem is either always "
            "or never solved, otherwise a bootstrap over problems. For an arm with several training seeds they are over "
            "seeds and problems. Completions cut off at the token limit count as wrong."
        ),
    ]
    if any(len(arm.get("by_seed", [])) > 1 for arm in arms.values()):
        found.append(seed_table(arms))
    if arm_plots.has_pass_curve(arms):
        figure = Figure(
            group.file("pass_at_k"),
            arm_plots.pass_svg(arms),
            "Probability that at least one of k samples is correct, by k",
            arm_plots.pass_svg(arms, arm_plots.NARROW),
        )
        found += [
            Heading(group.heading("pass@k")),
            figure,
            Text("Unbiased estimates over the samples of each problem; bars are 95% intervals."),
        ]
    return found


def measurement_blocks(report: RunReport, measured: Mapping[str, ArmRow]) -> list[Block]:
    """Evaluations under other conditions than those of the arms: their numbers cannot be compared with the arms'."""
    tops = {max((int(k) for k in arm["pass_at"]), default=1) for arm in measured.values()}
    rows = []
    for name, arm in measured.items():
        row = report.get("evaluations", {}).get(arm.get("evaluation", ""))
        k = max((int(one) for one in arm["pass_at"]), default=1)
        several = f"{f'pass@{k} ' if len(tops) > 1 else ''}{interval_text(arm['pass_at'][str(k)])}" if k > 1 else "–"
        rows.append(
            [
                name,
                arm["stage"],
                interval_text(arm["accuracy"]),
                *([several] if max(tops) > 1 else []),
                row["task"] if row else "–",
                f"{arm['problems']} × {arm['samples']}",
                row["sampling"] if row else "–",
            ]
        )
    header = ["measurement", "model", "accuracy (pass@1)"]
    header += [f"pass@{max(tops)}" if len(tops) == 1 else "of several"] if max(tops) > 1 else []
    align = "ll" + "r" * (len(header) - 2) + "lrl"
    return [
        Heading("Other measurements"),
        Table([*header, "task", "problems × samples", "sampling"], rows, align, stacked=True),
        Text(
            "Under other conditions than the arms above (task, problems or sampling), so not to be compared with them."
        ),
    ]


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
        if figures and (flat := curves.left_out(copies[0])):
            found.append(Text(f"Constant, not drawn: {'; '.join(flat)}."))
    return [Heading("Training curves"), *found] if found else []


def _how_compared(group: Group) -> str:
    methods = sorted({row["method"] for row in group.comparisons})
    return (
        "Paired on the same problems; p (Holm) is corrected for the number of pairs. A statement about a way of training "
        f"needs several training seeds per arm. Methods: {'; '.join(methods)}."
    )


def accuracy_table(arms: Mapping[str, ArmRow]) -> Table:
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


def seed_table(arms: Mapping[str, ArmRow]) -> Table:
    """Accuracy with a row per arm and a column per training seed."""
    by_arm = {name: {one["seed"]: one for one in arm.get("by_seed", [])} for name, arm in arms.items()}
    seeds = sorted({seed for found in by_arm.values() for seed in found})
    rows = [
        [name, *(interval_text(found[s]["accuracy"]) if s in found else "–" for s in seeds)]
        for name, found in by_arm.items()
        if found
    ]
    header = ["arm, by training seed", *(f"seed {seed}" for seed in seeds)]
    return Table(header, rows, "l" + "r" * len(seeds))


def comparison_table(group: Group) -> Table:
    rows = [
        [
            f"{row['a']} − {row['b']}",
            interval_text(row["difference"], signed=True),
            p_text(row["p_value"]),
            p_text(row["p_holm"]),
            f"{row['wins']} / {row['losses']}" if "wins" in row and "losses" in row else "–",
            reading(row),
        ]
        for row in group.comparisons
    ]
    header = ["pair", "points", "p", "p (Holm)", "won / lost", "reading"]
    return Table(header, rows, "lrrrrl")


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
