"""Write the golden shards of trace schema 2: those of schema 1 with draws from the tails, one folder quantised, one exact.

    python data/golden/make_v2.py FOLDER

The committed files stay unchanged: tests compare their SHA-256, and every later version must read them. The traces are those of
make_v1.py; positions have none to four draws, an id sometimes twice, and ids at the end of a vocabulary of 2^32.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import make_v1
import numpy as np

from distill.records import Draws, Traces
from distill.traces.schema import Metadata
from distill.traces.writer import TraceWriter

DRAWS = 4


def build() -> tuple[Traces, dict[str, np.ndarray]]:
    traces, _ = make_v1.build()
    rng = np.random.default_rng(21)
    assert traces.top is not None
    # A position without a tail has no draws.
    count_T = np.where(traces.top.tail_T > -10, rng.integers(0, DRAWS + 1, len(traces.top)), 0).astype(np.int32)
    num = int(count_T.sum())
    ids_E = rng.choice(np.array([8, 9, 300, 70_000, make_v1.VOCAB - 2]), num)
    truth = {"count": count_T, "ids": ids_E, "logp": -rng.exponential(3.0, num) - 1}
    return dataclasses.replace(traces, draws=Draws(count_T, ids_E, truth["logp"].astype(np.float32))), truth


def metadata(exact: bool) -> Metadata:
    return Metadata(**(make_v1.metadata(exact).tree() | {"schema_version": 2, "tail_draws": DRAWS}))


def main(folder: Path) -> None:
    traces, truth = build()
    for name, exact in (("v2", False), ("v2_exact", True)):
        if (folder / name).exists():
            sys.exit(f"{folder / name} is there: golden shards are made once")
        with TraceWriter(folder / name, metadata(exact), shard_rows=8) as writer:
            writer.add(traces)
    np.savez_compressed(folder / "v2_expected.npz", **truth)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
