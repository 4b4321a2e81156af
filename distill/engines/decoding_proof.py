"""The start-up proof of the transformers engine: batches and key-value caches against the model's plain forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

import numpy as np
import torch

from distill.records import Array, Completion, Request, Sampling

PROMPTS = (21, 12)
"""Tokens of the two prompts; the shorter one is the beginning of the longer one, but for its last tokens."""
NEW = 6


class Decoding(NamedTuple):
    """How an engine decodes. batched: several sequences at once, padded. cached: with a key-value cache or a state."""

    batched: bool = True
    cached: bool = True
    note: str = ""


class Provable(Protocol):
    """What the proof needs of an engine."""

    vocab_size: int
    max_model_len: int
    decoding: Decoding

    def plain_logits(self, ids_T: torch.Tensor) -> torch.Tensor:
        """Return float32 logits [T, V] of one sequence by the model's plain forward pass."""
        ...

    def scored(self, requests: Iterable[Request], top_k: int) -> Iterator[Completion]: ...

    def sampled(self, requests: Iterable[Request], sampling: Sampling, top_k: int) -> Iterator[Completion]: ...


WAYS = (
    Decoding(),
    Decoding(
        batched=False, note="sequences are decoded one at a time: together they would change this model's results"
    ),
    Decoding(
        False,
        False,
        "each token is computed from the whole text before it (slow): this model's cache changes its results",
    ),
)


def prove_decoding(engine: Provable, tolerance: float) -> Decoding:
    """Return the fastest way of decoding whose log-probabilities are those of the plain forward pass.

    tolerance: nats, by which one position in ten may differ. Changes `engine.decoding`.
    """
    for way in WAYS[:-1]:
        engine.decoding = way
        try:
            gap = _gap(engine, way)
        # Any architecture may raise anything where its cache or padding is not what this engine expects.
        except Exception:
            continue
        if np.isfinite(gap).all() and np.quantile(gap, 0.9) <= tolerance:
            return way
    return WAYS[-1]


def _gap(engine: Provable, way: Decoding) -> Array:
    """Return the differences of the log-probabilities of scored and of sampled tokens from the plain forward pass, nats."""
    rng = np.random.default_rng(0)
    size, longest = engine.vocab_size, min(PROMPTS[0], engine.max_model_len - NEW)
    ids = rng.integers(0, size, longest)
    short = np.concatenate([ids[: max(longest - 12, 1)], rng.integers(0, size, 3)])[: engine.max_model_len - NEW]
    requests = [
        Request(str(n), prompt, seed=n, completion_ids=rng.integers(0, size, NEW))
        for n, prompt in enumerate((ids, short))
    ]
    groups = [requests] if way.batched else [[request] for request in requests]
    found: list[Completion] = []
    for group in groups:
        found += engine.scored(group, 0)
        found += engine.sampled(group, Sampling(max_tokens=NEW), 0)
    gaps = []
    for completion in found:
        prompt = requests[int(completion.request_id)].prompt_ids
        whole = torch.as_tensor(np.concatenate([prompt, completion.ids_T]), dtype=torch.long)
        logp = engine.plain_logits(whole)[len(prompt) - 1 : -1].log_softmax(-1).cpu()
        own = logp.gather(1, whole[len(prompt) :, None])[:, 0].numpy()
        gaps.append(np.abs(own - completion.logprob_T))
    return np.concatenate(gaps)
