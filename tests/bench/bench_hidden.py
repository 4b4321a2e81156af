"""Matching hidden states of a pruned student: price of a step, and steps to the same held-out KL.

    python tests/bench/bench_hidden.py [--every 2] [--ways plain,mse-1,...] [the sizes of bench_targets.py]

The teacher is in the trainer (forward KL over the whole vocabulary); an arm `mse-W` or `cosine-W` adds `hidden` with weight W on
all layers, `last-W` on the last one. All see the same batches from the same start. Steps: of an arm where its KL is first what
plain reaches at its end, by all of plain's steps. A step's price is the median over the steps of its seconds by plain's;
arms are not interleaved, so on a busy machine it is rough. Intervals are over held-out traces, paired.
"""

from __future__ import annotations

import statistics
from pathlib import Path

import bench_targets as targets
import harness
import learning_curves

PLAIN = "plain"
ARMS = (PLAIN, "mse-1", "mse-0.1", "cosine-1")


def main() -> None:
    asked, sizes = targets.arguments(__doc__, every=Path("2"), ways=Path(",".join(ARMS)))
    targets.capture(sizes)
    data = str(targets.cut(sizes, 1, 1.0))
    held_out, rows = learning_curves.HeldOut.of(sizes), []
    for seed in asked.seeds:
        found = {}
        for arm in str(asked.ways).split(","):
            stage = {"data": data, "loss": {"fn": "forward_kl"}, "teacher": "teacher", **hidden_of(arm)}
            name = f"hidden-{arm.replace('.', '')}"
            found[arm] = learning_curves.curve(name, stage, sizes, seed, held_out, int(str(asked.every)))
            ratio, low, high = found[arm].reaches_each(found[PLAIN], 0.0, "steps")
            pairs = zip(found[arm].seconds[1:], found[PLAIN].seconds[1:], strict=True)
            rows.append(
                {
                    "seed": seed, "arm": arm, **learning_curves.beside(found[arm], found[PLAIN]),
                    "steps to it": ratio, "from": low, "to": high,
                    "step": statistics.median(mine / plain for mine, plain in pairs),
                }
            )  # fmt: skip
            harness.report("hidden", rows, targets.OUT)


def hidden_of(arm: str) -> dict[str, dict[str, object]]:
    """The stage's `hidden`."""
    fn, _, weight = arm.partition("-")
    if arm == PLAIN:
        return {}
    if fn == "last":
        return {"hidden": {"layers": "last", "weight": float(weight)}}
    return {"hidden": {"fn": fn, "weight": float(weight)}}


if __name__ == "__main__":
    main()
