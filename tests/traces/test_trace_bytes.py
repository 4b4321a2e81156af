"""The bytes that `check` predicts, compared with the files that the writer makes."""

from __future__ import annotations

import numpy as np
import pytest
from trace_samples import distribution, metadata, settled

from distill.compute.estimate import predict_trace_bytes
from distill.records import Ragged, TopK, Traces, stable_hash
from distill.traces.writer import TraceWriter

WORDS = [f"{a}{b}" for a in ["time", "force", "water", "light", "number", "even", "house"] for b in "sro"]


def one(token: int) -> TopK:
    """Return the stored distribution of a nearly certain position."""
    return TopK.from_dense(np.array([[token]]), np.array([[-1e-4]], np.float32))


def sums(num: int, rng: np.random.Generator, captured: bool) -> Traces:
    """Answers of a trained model: one formula, each digit its own token, nine of ten positions certain."""
    terms = rng.integers(10, 100, (num, 2))
    texts = [f"<think>{a} + {b} = {a + b}</think><answer>{a + b}</answer>" for a, b in terms]
    ids = [np.array([ord(c) for c in text], np.int32) for text in texts]
    logprobs = [-rng.exponential(0.5, len(row)) * (rng.random(len(row)) < 0.3) for row in ids]
    flat = np.concatenate(ids)
    tops = [one(int(i)) if rng.random() < 0.9 else distribution(1, rng) for i in flat] if captured else []
    questions = [f"Calculate {a} + {b}." for a, b in terms]
    return rows(questions, texts, ids, logprobs, TopK.concat(tops) if captured else None)


def prose(num: int, rng: np.random.Generator, captured: bool) -> Traces:
    """Answers of an untrained model: words by Zipf's law, no position certain."""
    picks = [rng.zipf(1.2, rng.integers(20, 120)) % 5000 for _ in range(num)]
    texts = [" ".join(f"{WORDS[n % len(WORDS)]}{n // 7:x}" for n in row) for row in picks]
    ids = [(row * 7919 % 49152).astype(np.int32) for row in picks]
    logprobs = [-rng.exponential(2.0, len(row)) for row in ids]
    top = distribution(sum(map(len, ids)), rng, top_k=8) if captured else None
    return rows([f"Write about {n}." for n in range(num)], texts, ids, logprobs, top)


def rows(questions, texts, ids, logprobs, top) -> Traces:
    num = len(texts)
    return Traces(
        trace_id=[stable_hash("trace", n) for n in range(num)],
        problem_id=[stable_hash("problem", n) for n in range(num)],
        sample=np.zeros(num, np.int32),
        messages=[({"role": "user", "content": q},) for q in questions],
        completion=texts,
        answer=[text[-12:-9] for text in texts],
        gold=[text[-12:-9] for text in texts],
        prompt_ids=Ragged.from_rows([np.array([ord(c) for c in q]) for q in questions], np.int32),
        completion_ids=Ragged.from_rows(ids, np.int32),
        logprob=Ragged.from_rows([row.astype(np.float32) for row in logprobs], np.float32),
        top=settled(top) if top is not None else None,
        reward=[float(n % 3 > 0) for n in range(num)],
        rewards={"accuracy": [float(n % 3 > 0) for n in range(num)]},
        correct=[n % 3 > 0 for n in range(num)],
        finish_reason=["stop"] * num,
    )


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("num", [4, 150])
@pytest.mark.parametrize("kind", [sums, prose])
def test_bytes_are_predicted_within_a_factor_of_two(tmp_path, kind, num, captured):
    traces = kind(num, np.random.default_rng(0), captured)
    with TraceWriter(tmp_path, metadata(top_k=16 * captured), shard_rows=64) as writer:
        writer.add(traces)
    measured = sum(file.stat().st_size for file in tmp_path.glob("*.parquet"))
    positions = len(traces.completion_ids.values)
    entries = len(traces.top.ids_E) / positions if traces.top is not None else 0.0
    predicted = predict_trace_bytes(num, positions, entries, shard_rows=64)
    assert 0.5 < predicted / measured < 2, (predicted, measured, positions, entries)
