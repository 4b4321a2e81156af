"""The report's section on held-out KL: each arm's distance from the teacher, and the students' paired differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from distill.reports.arm_groups import Group
from distill.reports.block_kinds import Block, Heading, Table, Text
from distill.reports.divergence import text
from distill.reports.run_report import DivergencePairRow, DivergenceRow, RunReport
from distill.reports.wording import interval_text, minus


def divergence_blocks(group: Group) -> list[Block]:
    """The tables of the arms that were measured; the caller leaves the section out if there is none."""
    measured = {name: arm["divergence"] for name, arm in group.arms.items() if "divergence" in arm}
    found = [Heading(group.heading("Held-out KL")), *_measured(measured)]
    if pairs := group.divergence_pairs:
        found += [pair_table(pairs), Text("Paired, trace by trace; below 0 the first arm is nearer to the teacher.")]
    return found


def distance_blocks(report: RunReport) -> list[Block]:
    """The models that stages measure by themselves; nothing if there is none."""
    measured = {stage["name"]: stage["divergence"] for stage in report["stages"] if "divergence" in stage}
    return [Heading("Held-out KL, by stage"), *_measured(measured)] if measured else []


def _measured(measured: Mapping[str, DivergenceRow]) -> list[Block]:
    return [
        divergence_table(measured),
        Text(
            "On traces that the teacher sampled from held-out problems, in nats a token. KL: of the teacher to the arm over the whole "
            "vocabulary, an unbiased estimate; at least: with all tokens that are not stored as one outcome; label NLL: of the teacher's "
            "tokens, the KL plus the teacher's entropy. Overconfidence: the probability of the arm's likeliest token minus how often "
            "the teacher wrote it, in points. Brackets are 95% intervals with the trace as the unit, and over training seeds if an arm "
            "has several."
        ),
    ]


def divergence_table(measured: Mapping[str, DivergenceRow]) -> Table:
    rows = [
        [
            name,
            text(row["kl"]),
            minus(f"{row['bound']['value']:.3f}"),
            text(row["label_nll"]),
            interval_text(row["overconfidence"], signed=True),
            str(row["traces"]),
            str(row["tokens"]),
        ]
        for name, row in measured.items()
    ]
    header = ["arm, nats a token", "KL to the teacher", "at least", "label NLL", "overconfidence", "traces", "tokens"]
    return Table(header, rows, "l" + "r" * (len(header) - 1))


def pair_table(pairs: Sequence[DivergencePairRow]) -> Table:
    rows = [[f"{row['a']} − {row['b']}", text(row["difference"], signed=True)] for row in pairs]
    return Table(["pair", "difference in KL"], rows, "lr")
