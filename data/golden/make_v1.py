"""Write the golden shards of trace schema 1: one folder quantised, one exact, and the original numbers.

    python data/golden/make_v1.py FOLDER

The committed files stay unchanged: tests compare their SHA-256, and every later version must read them. Twelve traces:
ordinary ones, an empty completion, certain tokens, no tail, a tail with nearly all the mass, an entry 40 nats below the
first, ids at the end of a vocabulary of 2^32, and text with unusual characters.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from distill.records import Ragged, Sampling, TopK, Traces
from distill.traces.schema import Metadata
from distill.traces.writer import TraceWriter

VOCAB = 2**32
TOP_K = 300
TEXTS = ("plain", "", "⅓ + ½ = ⅚", "<script>alert('1')</script>", "nul \x00, bell \x07, line\u2028", "🦆" * 20,
         "a\tb\r\nc", "'; drop table traces; --", "<think>no end", '{"json": [1, 2]}', "مرحبا", "z" * 5000)  # fmt: skip


def position(number: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, float]:
    """ids, float64 log-probabilities of the entries, log of the tail."""
    if number == 0:  # certainty: the tail is nothing, or lost in rounding
        return np.array([7]), np.array([0.0]), -np.inf
    if number == 1:
        return np.array([7]), np.log1p(np.array([-1e-9])), np.log(1e-9)
    if number == 2:  # no tail
        return np.array([3, 1, 2]), np.log([0.5, 0.3, 0.2]), -np.inf
    if number == 3:  # nearly all of it in the tail
        return np.array([VOCAB - 1, 0]), np.log([2e-4, 1e-4]), float(np.log1p(-3e-4))
    if number == 4:  # far below the first
        return np.array([5, 6, 4]), np.array([-1e-12, -29.0, -40.0]), -35.0
    num = TOP_K if number == 5 else int(rng.integers(1, 40))
    logits = np.sort(rng.gumbel(size=num + 1) * rng.uniform(0.5, 3.0))[::-1]
    logits = logits - np.logaddexp.reduce(logits)
    ids = rng.choice(VOCAB, num, replace=False)
    return ids, logits[:num], float(logits[num])


def build() -> tuple[Traces, dict[str, np.ndarray]]:
    rng = np.random.default_rng(20)
    lengths = [6, 0, 9, 4, 1, 12, 7, 3, 0, 15, 8, 5]
    drawn = [position(number, rng) for number in range(sum(lengths))]
    truth = {
        "count": np.array([len(ids) for ids, _, _ in drawn], np.int32),
        "ids": np.concatenate([ids for ids, _, _ in drawn]),
        "logp": np.concatenate([logp for _, logp, _ in drawn]),
        "tail": np.array([tail for _, _, tail in drawn]),
        "completion_ids": rng.integers(0, VOCAB, sum(lengths)),
        "logprob": -rng.exponential(size=sum(lengths)),
        "lengths": np.array(lengths),
    }
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    traces = Traces(
        trace_id=[f"golden{n:02d}" for n in range(12)],
        problem_id=[f"problem{n // 2}" for n in range(12)],
        sample=np.arange(12, dtype=np.int32) % 2,
        messages=[({"role": "user", "content": text},) for text in TEXTS],
        completion=list(TEXTS),
        answer=[None if n % 3 == 0 else str(n) for n in range(12)],
        gold=[str(n) for n in range(12)],
        prompt_ids=Ragged(np.arange(36), np.arange(13) * 3),
        completion_ids=Ragged(truth["completion_ids"], offsets),
        logprob=Ragged(truth["logprob"].astype(np.float32), offsets),
        top=TopK(truth["count"], truth["ids"], truth["logp"].astype(np.float32), truth["tail"].astype(np.float32)),
        reward=[None, 0.0, 1.0] * 4,
        rewards={"accuracy": [None, 0.0, 1.0] * 4, "format": [0.25] * 12},
        correct=[None, False, True] * 4,
        finish_reason=["stop", "length"] * 6,
    )  # fmt: skip
    return traces, truth


def metadata(exact: bool) -> Metadata:
    return Metadata(
        model="golden", weights="w", tokenizer="t", chat_template="c", vocab_size=VOCAB, task="none",
        task_fingerprint="f", template="none", sampling=Sampling(), top_k=TOP_K, mass=1.0, exact=exact,
        engine="none", versions={"distill": "0.1"},
    )  # fmt: skip


def main(folder: Path) -> None:
    traces, truth = build()
    for name, exact in (("v1", False), ("v1_exact", True)):
        if (folder / name).exists():
            sys.exit(f"{folder / name} is there: golden shards are made once")
        with TraceWriter(folder / name, metadata(exact), shard_rows=8) as writer:
            writer.add(traces)
    np.savez_compressed(folder / "v1_expected.npz", **truth)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
