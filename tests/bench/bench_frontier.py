"""Bytes a position against what they buy: the gradient's error, and the trained student's distance from its teacher.

    python tests/bench/bench_frontier.py [--keep] [--svg tests/bench/frontier.svg] [the sizes of bench_targets.py]

The capture and the students of `bench_targets.py`, at more settings of k and mass. Bytes are those of the columns that hold
the distribution, as written. The gradient is that of forward KL by the student's last hidden states on held-out
positions, its error relative to the exact one over the whole vocabulary (norm of the difference by the norm), for the
untrained start and for the student that learned from exact targets.

Shapes: T positions, D hidden size, V vocabulary, K entries.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import bench_targets as targets
import chat_traces
import harness
import torch
from bench_targets import ONLINE, TEXT, Arm, HeldOut, Sizes
from torch import Tensor

from distill.records import Array
from distill.reports.statistics import bca
from distill.tail_draws import weights
from distill.traces.reader import open_traces
from distill.traces.schema import DISTRIBUTION_COLUMNS, DRAW_COLUMNS
from distill.training.loss import divergences, sparse
from distill.training.loss.dense import Logits, dense_loss
from distill.training.loss.head import HeadForm, Targets, head_loss

SETTINGS = ((4, 1.0), (8, 0.9), (16, 0.95), (32, 0.95), (64, 0.98), (64, 1.0), (128, 1.0))
MARKS = {
    ("bucket", False): "", ("own_token", False): " own", ("own_token", True): " half own", ("draws", False): f" {targets.DRAWS} draws",
}  # fmt: skip
"""How the plot calls an estimate of the tail."""
STRIDE = 4
"""Every STRIDE-th held-out position is in the gradient's error."""


def main() -> None:
    asked, sizes = targets.arguments(__doc__, svg=Path(__file__).with_name("frontier.svg"))
    targets.capture(sizes)
    held_out, (seed, *_) = HeldOut.of(sizes), asked.seeds
    arms = [ONLINE, TEXT, *(Arm(k, mass) for k, mass in SETTINGS)]
    arms += [arm for setting in targets.TAILS for arm in targets.tails(*setting) if arm not in arms]
    students = {arm: targets.train(arm, sizes, seed, keep=asked.keep) for arm in arms}
    found = {arm: held_out.kl(student) for arm, student in students.items()}
    stored = {arm: cut_columns(arm, sizes) for arm in arms[2:]}
    for name, student in (("start", targets.start(sizes)), ("trained", students[ONLINE])):
        errors = gradient_errors(held_out, student, sizes, list(stored))
        for arm, error in errors.items():
            stored[arm][f"gradient error, {name}"] = error
    rows = [
        {"targets": arm.name, **stored.get(arm, {}), **targets.kl_columns(found[arm]),
         **targets.beside(found[arm], found[ONLINE])}
        for arm in arms
    ]  # fmt: skip
    harness.report("frontier", rows, targets.OUT)
    plot(stored, found, asked.svg)


def cut_columns(arm: Arm, sizes: Sizes) -> dict[str, Any]:
    """What the stored targets of an arm weigh: entries and bytes a position."""
    assert arm.top_k is not None
    folder = targets.stored(arm, sizes)
    reader = open_traces(folder)
    positions = int(reader.lengths().completion.sum())
    entries = sum(shard.entries for shard in reader.shards)
    columns = (*DISTRIBUTION_COLUMNS, *DRAW_COLUMNS)
    size = sum(chat_traces.column_bytes(file.read_bytes(), columns) for file in folder.glob("*.parquet"))
    return {"k": arm.top_k, "mass": arm.mass, "tail": arm.tail, "entries": entries / positions, "bytes": size / positions}  # fmt: skip


def gradient_errors(held_out: HeldOut, student: Path, sizes: Sizes, arms: list[Arm]) -> dict[Arm, float]:
    """|error| / |gradient| of each arm's stored targets by the student's hidden states, over the positions together."""
    hidden_TD, head_VD = targets.hidden_and_head(student, held_out.traces)
    pick = torch.arange(0, len(hidden_TD), STRIDE)
    hidden_TD = hidden_TD[pick].requires_grad_()
    form, num = HeadForm(len(head_VD)), len(pick)
    label_T = torch.from_numpy(held_out.traces.completion_ids.values.astype("int64"))[pick]
    plain = Targets(label_T, torch.full((num,), 1 / num))
    teacher = Logits(held_out.teacher_TD[pick], held_out.head_VD, form)
    exact = dense_loss(Logits(hidden_TD, head_VD, form), [teacher], divergences.forward_kl, plain)  # fmt: skip
    (exact_TD,) = torch.autograd.grad(exact.loss, hidden_TD)
    errors = {}
    for arm in arms:
        options = {"tail": arm.tail, "bucket_share": arm.bucket_share}
        loss = functools.partial(sparse.forward_kl, **options)
        out = head_loss(hidden_TD, head_VD, loss, stored_targets(arm, sizes, plain, pick))
        (mine_TD,) = torch.autograd.grad(out.loss, hidden_TD)
        errors[arm] = float((mine_TD - exact_TD).norm() / exact_TD.norm())
    return errors


def stored_targets(arm: Arm, sizes: Sizes, plain: Targets, pick: Tensor) -> Targets:
    """The held-out positions as this arm's folder would hold them."""
    assert arm.top_k is not None
    folder = targets.stored(arm, sizes, held_out=True)
    (block,) = open_traces(folder).blocks(sizes.held_out)
    assert block.top is not None
    ids_TK, logp_TK = (torch.from_numpy(column)[pick] for column in block.top.dense())
    tail_T = torch.from_numpy(block.top.tail_T.copy())[pick]
    sampled = {"teacher_label_T": torch.from_numpy(block.logprob.values.copy())[pick]}
    if block.draws is not None:
        for name, column in zip(("draw_ids_TN", "draw_logp_TN"), block.draws.dense(block.draws.width), strict=True):
            sampled[name] = torch.from_numpy(column)[pick]
        sampled["draw_mass_T"] = torch.from_numpy(weights(block.top.tail_T, arm.draws))[pick]
    return Targets(plain.label_T, plain.weight_T, ids_TK, logp_TK, tail_T, **sampled)


# ----------------------------------------------------------------------------------------------- the plot


def plot(stored: dict[Arm, dict[str, Any]], found: dict[Arm, Array], path: Path) -> None:
    """Two panels over bytes a position: the gradient's error; the held-out KL beside the online student's and the text's."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "distill", "font.size": 9}
    from matplotlib import pyplot, ticker

    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(7, 6.4), layout="constrained")  # fmt: skip
    bytes_A = [row["bytes"] for row in stored.values()]
    for name, colour, marker in (("trained", "#1f5fa8", "o"), ("start", "#c2571a", "s")):
        errors = [row[f"gradient error, {name}"] for row in stored.values()]
        above.plot(bytes_A, errors, marker, color=colour, label=f"student: {name}")
    above.set(xscale="log", yscale="log", ylabel="gradient error, relative")
    above.legend(frameon=False)
    exact = found[ONLINE].mean()
    for arm, row in stored.items():
        # How far each is from the online student is known much better than where both are: the interval is of that.
        more = bca(found[arm] - found[ONLINE])
        bar = [[more.value - more.low], [more.high - more.value]]
        below.errorbar(row["bytes"], exact + more.value, bar, fmt="o", color="#1f5fa8", capsize=3)
        place = {"textcoords": "offset points", "ha": "left", "va": "center", "fontsize": 7}
        name = f"{arm.top_k}, {arm.mass:g}".replace("0.", ".") + MARKS[arm.tail, bool(arm.bucket_share)]
        below.annotate(name, (row["bytes"], exact + more.value), (6, 0), **place)
    below.axhline(exact, color="#3b7d3b", linestyle="--", label="online: exact targets")
    below.axhline(found[TEXT].mean(), color="#888888", linestyle=":", label="text alone (SFT)")
    below.set(xlabel="bytes a position", ylabel="held-out KL to the teacher, nats a token")
    below.set_xticks([8, 16, 32, 64, 128, 256])
    below.margins(y=0.12)
    above.set_yticks([0.05, 0.1, 0.2, 0.5])
    for axis in (below.xaxis, above.yaxis):
        axis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(ticker.NullFormatter())
    below.legend(frameon=False, title="stored: k, mass", loc="center right")
    for axes in (above, below):
        axes.grid(which="both", color="#dddddd", linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    main()
