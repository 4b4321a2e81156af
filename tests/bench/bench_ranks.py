"""Work divided over 8 to 512 processes, simulated: packing alone, no process is started and nothing is computed.

busiest / mean: compute of the busiest process by the mean. useful: mean by busiest, the share of the time in which the
processes have work. Compute is that of a Llama-like model 1,024 wide, attention included, prompts shared. `by number` gives
each process equally many traces in order.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from harness import report

from distill.training.packing import Example
from distill.training.prefix_sharing import assign_prefixes
from distill.training.rank_split import ATTENTION, split

HERE = Path(__file__).parent


def traces(rng: np.random.Generator, lengths: Sequence[int], group: int) -> list[Example]:
    """Make traces; `group` of them share each prompt of 100 tokens."""
    made, prompt = [], np.empty(0)
    for n, length in enumerate(lengths):
        if n % group == 0:
            prompt = rng.integers(0, 30_000, 100)
        made.append(Example(str(n), prompt, rng.integers(0, 30_000, max(length - 100, 1))))
    return made


def compute(examples: Sequence[Example]) -> float:
    """Return the compute of traces after their prompts are shared, in tokens."""
    total, seen = 0.0, set()
    for placed in assign_prefixes(examples):
        own, before = len(placed.example) - placed.prefix_length, placed.prefix_length
        total += own + ATTENTION * (own**2 + 2 * own * before)
        prefix = placed.prefix
        while prefix is not None and id(prefix) not in seen:
            seen.add(id(prefix))
            length, ahead = len(prefix.ids), prefix.end - len(prefix.ids)
            total += length + ATTENTION * (length**2 + 2 * length * ahead)
            prefix = prefix.parent
    return total


def balance(shares: Sequence[Sequence[Example]]) -> float:
    """Return the compute of the busiest share by the mean."""
    work = [compute(share) for share in shares]
    return max(work) / (sum(work) / len(work))


def row(name: str, examples: list[Example], ranks: int) -> dict[str, object]:
    ours = balance(split(examples, ranks))
    each = -(-len(examples) // ranks)
    by_number = balance([examples[n * each : (n + 1) * each] for n in range(ranks)])
    return {
        "traces": name,
        "ranks": ranks,
        "busiest / mean": round(ours, 3),
        "useful": round(1 / ours, 3),
        "by number: useful": round(1 / by_number, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE / "out")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    rows = [row("64 of 500 tokens", traces(rng, [500] * 64, 1), 8)]
    rows.append(row("10 prompts x 8 of 500 tokens", traces(rng, [500] * 80, 8), 8))
    for ranks in (8, 16, 32, 64):
        lengths = np.exp(rng.normal(6.5, 0.7, 512)).clip(101, 8192).astype(int)
        rows.append(row("512, lognormal", traces(rng, lengths, 1), ranks))
    for ranks in (64, 128, 256, 512):
        lengths = np.exp(rng.normal(6.5, 0.7, 32 * ranks)).clip(101, 8192).astype(int)
        rows.append(row("32 a rank, lognormal", traces(rng, lengths, 1), ranks))
    report("ranks", rows, args.out)


if __name__ == "__main__":
    main()
