"""Which tokens matter: a share of the tokens against all of them, by FLOPs and bytes to the same held-out KL.

    python tests/bench/bench_token_weights.py [--every 4] [--ways all,entropy-0.5,...] [the sizes of bench_targets.py]

The student learns stored distributions (k 64, mass .98) from the same traces in the same batches, with `weights` or without.
FLOPs: of an arm where its KL is first within 10% of what all tokens reach at their end, by all their FLOPs (`flops`). Bytes:
of the columns that hold the distributions, if only the positions that count had been captured. Intervals are over held-out
traces, paired.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import bench_targets as targets
import harness
import learning_curves

from distill import plug
from distill.token_choice import TokenValues, choose, only
from distill.traces.reader import open_traces
from distill.traces.writer import TraceWriter

ALL = "all"
ARMS = (ALL, "entropy-0.5", "entropy-0.25", "divergence-0.5", "prefix-0.5", "prefix-0.25")
WITHIN = 0.1


def main() -> None:
    asked, sizes = targets.arguments(__doc__, every=Path("4"), ways=Path(",".join(ARMS)))
    arms = str(asked.ways).split(",")
    targets.capture(sizes)
    whole = targets.cut(sizes, 64, 0.98)
    held_out = learning_curves.HeldOut.of(sizes)
    rows = []
    for seed in asked.seeds:
        found = {}
        for arm in arms:
            stage = {"data": str(whole), "loss": {"fn": "forward_kl"}, **weights_of(arm)}
            found[arm] = learning_curves.curve(
                f"weights-{arm.replace('.', '')}", stage, sizes, seed, held_out, int(str(asked.every))
            )
            ratio, low, high = found[arm].reaches_each(found[ALL], WITHIN, "flops")
            rows.append(
                {
                    "seed": seed, "arm": arm, "B/position": learning_curves.bytes_a_position(captured(whole, arm)),
                    "all FLOPs": found[arm].flops[-1] / found[ALL].flops[-1],
                    **learning_curves.beside(found[arm], found[ALL]),
                    "FLOPs to it": ratio, "from": low, "to": high,
                }
            )  # fmt: skip
            harness.report("token_weights", rows, targets.OUT)


def weights_of(arm: str) -> dict[str, dict[str, object]]:
    """The stage's `weights`."""
    fn, _, share = arm.partition("-")
    return {} if arm == ALL else {"weights": {"fn": fn, "share": float(share)}}


def captured(whole: Path, arm: str) -> Path:
    """The traces as a stage with these weights stores them; divergence cannot choose at capture, and needs all."""
    fn, _, share = arm.partition("-")
    if fn in (ALL, "divergence"):
        return whole
    folder = whole.with_name(f"{whole.name}-{arm}")
    shutil.rmtree(folder, ignore_errors=True)
    reader = open_traces(whole)
    score = plug.find(fn, "distill.token_weights")
    metadata = reader.metadata.model_copy(update={"positions": fn, "position_share": float(share)})
    with TraceWriter(folder, metadata) as writer:
        for block in reader.blocks():
            kept = [
                only(top, choose(score, TokenValues.of(block.completion_ids[n], top), float(share), arm))
                for n in range(len(block))
                if (top := block.top_of(n)) is not None
            ]
            writer.add(dataclasses.replace(block, top=type(kept[0]).concat(kept)))
    return folder


if __name__ == "__main__":
    main()
