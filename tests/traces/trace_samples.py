"""Test traces: determined by their number, ragged, with edge cases."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from distill.records import Ragged, Sampling, TopK, Traces
from distill.traces import quantisation as coding
from distill.traces.reader import open_traces
from distill.traces.schema import Metadata
from distill.traces.writer import TraceWriter

VOCAB = 49152


def metadata(**changes) -> Metadata:
    values = {
        "model": "teacher", "weights": "w0", "tokenizer": "t0", "chat_template": "c0", "vocab_size": VOCAB,
        "task": "sums", "task_fingerprint": "f0", "template": "think_answer", "sampling": Sampling(),
        "top_k": 16, "mass": 0.98, "engine": "reference", "versions": {"distill": "0"},
    }  # fmt: skip
    return Metadata(**(values | changes))


def distribution(num: int, rng: np.random.Generator, top_k: int = 16) -> TopK:
    """Peaked and flat positions in turn, cut at mass .98, as they are after one rounding (a second changes nothing)."""
    sharpness = rng.gamma(2.0, 1.5, size=(num, 1)) + 0.2
    logits = np.sort(rng.gumbel(size=(num, 200)), axis=1)[:, ::-1] * sharpness
    logp = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    ids = np.argsort(rng.random((num, 200)), axis=1)[:, :top_k] * 199 + 7
    full = TopK.from_dense(ids, logp[:, :top_k].astype(np.float32))
    return settled(full.truncate(mass=0.98, top_k=top_k))


def settled(top: TopK) -> TopK:
    """Return a distribution as it is decoded after it was stored in steps."""
    steps_E, tail_T = coding.quantise(top)
    return TopK(top.count_T, top.ids_E, coding.dequantise(top.count_T, steps_E, tail_T), tail_T)


def traces(numbers: Iterable[int], *, tokens: int = 24, samples: int = 2, top: bool = True) -> Traces:
    """One trace a number; number n is sample n % samples of problem n // samples."""
    numbers = list(numbers)
    rngs = [np.random.default_rng(n) for n in numbers]
    lengths = [n % 7 and int(rng.integers(1, 2 * tokens)) for n, rng in zip(numbers, rngs, strict=True)]
    drawn = list(zip(lengths, rngs, strict=True))
    tops = [distribution(length, rng) for length, rng in drawn]
    return Traces(
        trace_id=[f"trace{n:06d}" for n in numbers],
        problem_id=[f"problem{n // samples:06d}" for n in numbers],
        sample=np.array([n % samples for n in numbers], np.int32),
        messages=[({"role": "user", "content": f"{n} + ⅓ = ?"},) for n in numbers],
        completion=[f"<think>{n}</think><answer>{n}</answer>" for n in numbers],
        answer=[None if n % 5 == 0 else str(n) for n in numbers],
        gold=[str(n) for n in numbers],
        prompt_ids=Ragged.from_rows([rng.integers(0, VOCAB, 5) for rng in rngs], np.int64),
        completion_ids=Ragged.from_rows([rng.integers(0, VOCAB, k) for k, rng in drawn], np.int64),
        logprob=Ragged.from_rows(
            [coding.round_logprobs(-rng.exponential(size=k)) for k, rng in drawn], np.float32
        ),
        top=TopK.concat(tops) if top else None,
        reward=[None if n % 5 == 0 else (n % 3) / 2 for n in numbers],
        rewards={"accuracy": [None if n % 5 == 0 else float(n % 2) for n in numbers], "format": [0.5] * len(numbers)},
        correct=[None if n % 5 == 0 else n % 2 == 1 for n in numbers],
        finish_reason=["length" if n % 4 == 3 else "stop" for n in numbers],
    )  # fmt: skip


def write(path: Path, num: int, *, shard_rows: int = 16, block: int = 5, source: str = "", **options) -> Path:
    """Write a folder of traces 0..num in blocks that do not match the shards."""
    with TraceWriter(path, metadata(source=source), shard_rows=shard_rows) as writer:
        for start in range(0, num, block):
            writer.add(traces(range(start, min(start + block, num)), **options))
    return path


def row_digests(path: Path) -> dict[str, str]:
    """Return a digest of each trace's content by its id; fails if an id occurs twice."""
    digests: dict[str, str] = {}
    for block in open_traces(path).blocks(rows=7):
        for n, trace_id in enumerate(block.trace_id):
            assert trace_id not in digests
            digests[trace_id] = digest(block, n)
    return digests


def digest(block: Traces, n: int) -> str:
    texts = (block.problem_id[n], int(block.sample[n]), list(block.messages[n]), block.completion[n],
             block.answer[n], block.gold[n], block.reward[n], block.correct[n], block.finish_reason[n],
             sorted((name, column[n]) for name, column in block.rewards.items()))  # fmt: skip
    hasher = hashlib.sha256(repr(texts).encode())
    arrays = [
        (block.prompt_ids[n], "<i8"),
        (block.completion_ids[n], "<i8"),
        (block.logprob[n], "<f4"),
    ]
    top = block.top_of(n)
    if top is not None:
        arrays += [
            (top.count_T, "<i4"),
            (top.ids_E, "<i8"),
            (top.logp_E, "<f4"),
            (top.tail_T, "<f4"),
        ]
    for array, dtype in arrays:
        hasher.update(array.astype(dtype).tobytes() + b"|")
    return hasher.hexdigest()


def expected_digests(numbers: Iterable[int], **options) -> dict[str, str]:
    block = traces(numbers, **options)
    return {trace_id: digest(block, n) for n, trace_id in enumerate(block.trace_id)}
