"""An engine without a model, for tests of what is around engines: completions follow from their seeds, after a while.

`engine` is the factory that a recipe names. It imports neither torch nor vLLM, so a process with it starts in a second or two.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from distill.records import Completion, Request, Sampling, TopK

SECONDS = 0.02
"""Of a completion; `batch_size` of them are under way at a time."""


class CountingEngine:
    def __init__(self, batch_size: int, max_model_len: int, seconds: float = SECONDS) -> None:
        self.vocab_size, self.max_model_len, self.version = 1000, max_model_len, 0
        self._batch, self._seconds = batch_size, seconds

    def generate(self, requests: Iterable[Request], sampling: Sampling, *, top_k: int = 0) -> Iterator[Completion]:
        source, live = iter(requests), []
        while True:
            while len(live) < self._batch and (request := next(source, None)) is not None:
                live.append((time.monotonic() + self._seconds, request))
            if not live:
                return
            due, request = live.pop(0)
            time.sleep(max(0.0, due - time.monotonic()))
            yield self._completion(request, sampling.max_tokens, top_k)

    def _completion(self, request: Request, max_tokens: int, top_k: int) -> Completion:
        rng = np.random.default_rng(request.seed)
        ids_T = rng.integers(5, 900, 1 + request.seed % max_tokens).astype(np.int32)
        logp_T = -rng.random(len(ids_T)).astype(np.float32)
        top = None
        if top_k:
            ids_TK = ids_T[:, None] + np.arange(top_k)
            top = TopK.from_dense(ids_TK, logp_T[:, None] - 1 - np.arange(top_k, dtype=np.float32))
        return Completion(request.request_id, ids_T, logp_T, top, "stop", self.version)

    def score(self, requests: Iterable[Request], *, top_k: int = 0) -> Iterator[Completion]:
        raise NotImplementedError

    def sync(self, weights: Iterable[tuple[str, Any]], version: int) -> None:
        self.version = version

    def close(self) -> None:
        pass


def engine(model_dir: Path, config: Any, *, max_model_len: int, max_top_k: int, seed: int) -> CountingEngine:
    return CountingEngine(config.batch_size, max_model_len)
