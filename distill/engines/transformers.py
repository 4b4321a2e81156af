"""Plain transformers as an engine: a batch is decoded together with a key-value cache until all its rows end.

Prompts are padded on the left; rows leave the batch as they finish. Each request draws from its own
generator, one uniform number a token. With a batch of one nothing depends on anything but the request:
that, in float32, is the reference engine. Log-probabilities are raw: before temperature and top-p.

Shapes: B rows of the batch, V vocabulary, K candidates, T positions, P prompt tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distill import models
from distill.engines import rows
from distill.engines.head32 import Float32Head
from distill.records import Array, Completion, Request, Sampling

CHUNK = 256
"""Positions scored at a time: bounds the logits to [CHUNK, vocabulary]."""


@dataclass(slots=True)
class _Row:
    """A completion being written."""

    request: Request
    limit: int
    generator: torch.Generator
    ids: list[Array] = field(default_factory=list)
    logp: list[Array] = field(default_factory=list)


class TransformersEngine:
    """A model of transformers as an engine (see distill.records.Engine)."""

    def __init__(
        self,
        model_dir: Path,
        *,
        max_model_len: int,
        dtype: str = "bfloat16",
        batch_size: int = 64,
        device: str | None = None,
    ) -> None:
        rows.check_context(model_dir, max_model_len)
        self.vocab_size, self._stop_ids = rows.vocabulary(model_dir)
        self.max_model_len = max_model_len
        self.version = 0
        self._batch_size = batch_size
        self._device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._model = models.load(model_dir, dtype=dtype).to(self._device).eval()
        self._head = Float32Head()
        if dtype != "float32":
            layer = self._model.get_output_embeddings()
            layer.forward = lambda hidden: self._head(hidden, layer.weight, layer.bias)

    def generate(
        self, requests: Iterable[Request], sampling: Sampling, *, top_k: int = 0
    ) -> Iterator[Completion]:
        """Completions as they finish; batch_size requests are drawn at a time."""
        source = iter(requests)
        while batch := list(itertools.islice(source, self._batch_size)):
            yield from self._decode(batch, sampling, top_k)

    def _decode(self, batch: list[Request], sampling: Sampling, top_k: int) -> Iterator[Completion]:
        version = self.version
        limits = [rows.room(r, self.max_model_len, sampling.max_tokens) for r in batch]
        live = [
            _Row(r, limit, torch.Generator().manual_seed(r.seed))
            for r, limit in zip(batch, limits, strict=True)
        ]
        ids_BP, mask_BP = _left_padded(batch, self._device)
        cache: Any = None
        while live:
            logits_BV, cache = self._forward(ids_BP, mask_BP, cache)
            next_B = _draw(logits_BV, sampling, [row.generator for row in live])
            ids_BK, logp_BK = _head_rows(logits_BV, next_B, top_k)
            kept = []
            for index, row in enumerate(live):
                row.ids.append(ids_BK[index])
                row.logp.append(logp_BK[index])
                if int(ids_BK[index, 0]) in self._stop_ids or len(row.ids) == row.limit:
                    yield self._completion(row, top_k, version)
                else:
                    kept.append(index)
            if len(kept) < len(live):
                index_B = torch.tensor(kept, device=self._device, dtype=torch.long)
                live = [live[index] for index in kept]
                mask_BP, next_B = mask_BP[index_B], next_B[index_B]
                cache.batch_select_indices(index_B)
            ids_BP = next_B[:, None]
            mask_BP = torch.cat([mask_BP, mask_BP.new_ones(len(live), 1)], dim=1)

    def _completion(self, row: _Row, top_k: int, version: int) -> Completion:
        ids, logp = np.stack(row.ids), np.stack(row.logp)
        return rows.completion(
            row.request,
            ids[:, 0],
            ids,
            logp,
            top_k=top_k,
            stop_ids=self._stop_ids,
            version=version,
        )

    def score(self, requests: Iterable[Request], *, top_k: int = 0) -> Iterator[Completion]:
        """The given completions' log-probabilities, teacher-forced, one request after another."""
        for request in requests:
            given_T = rows.given(request, self.max_model_len)
            parts = list(self._score_chunks(request.prompt_ids, given_T, top_k))
            yield rows.completion(
                request,
                given_T,
                np.concatenate([ids for ids, _ in parts]),
                np.concatenate([logp for _, logp in parts]),
                top_k=top_k,
                stop_ids=self._stop_ids,
                version=self.version,
            )

    def _score_chunks(
        self, prompt_ids: Array, given_T: Array, top_k: int
    ) -> Iterator[tuple[Array, Array]]:
        label_T = torch.as_tensor(given_T, dtype=torch.long, device=self._device)
        fed = torch.as_tensor(prompt_ids, dtype=torch.long, device=self._device)
        cache: Any = None
        # The prompt's last position is about the completion's first token, and so on: its last is fed to nothing.
        for start in range(0, len(label_T), CHUNK):
            label_C = label_T[start : start + CHUNK]
            fed = torch.cat([fed, label_C[:-1]])
            logits_CV, cache = self._forward(fed[None], None, cache, keep=len(label_C))
            yield _head_rows(logits_CV, label_C, top_k)
            fed = label_C[-1:]

    @torch.inference_mode()
    def _forward(
        self, ids_BP: torch.Tensor, mask_BP: torch.Tensor | None, cache: Any, keep: int = 1
    ) -> tuple[torch.Tensor, Any]:
        """float32 logits of the last `keep` positions, [B * keep, V], over the tokenizer's ids, and the cache."""
        length = ids_BP.shape[1]
        if mask_BP is None:
            start = cache.get_seq_length() if cache is not None else 0
            position_BP = torch.arange(start, start + length, device=self._device)[None]
        else:
            position_BP = (mask_BP.cumsum(1) - 1).clamp(min=0)[:, -length:]
        out = self._model(
            input_ids=ids_BP,
            attention_mask=mask_BP,
            position_ids=position_BP,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=keep,
        )
        logits = out.logits[:, :, : self.vocab_size].float()
        return logits.reshape(-1, self.vocab_size), out.past_key_values

    @torch.no_grad()
    def sync(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Copy new weights in, by their names in the checkpoint; raises ValueError for unknown or missing ones."""
        mine = self._model.state_dict()
        needed = {name for name, _ in self._model.named_parameters()}
        for name, tensor in weights:
            if name not in mine:
                raise ValueError(f"the model has no weight called {name!r}.")
            mine[name].copy_(tensor.detach())
            needed.discard(name)
        if needed:
            raise ValueError(f"weights are missing: {', '.join(sorted(needed)[:5])}.")
        self._head.forget()
        self.version = version

    def close(self) -> None:
        """Free the model."""
        del self._model
        if self._device == "cuda":
            torch.cuda.empty_cache()


def _left_padded(batch: list[Request], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompt ids and attention mask [B, P]."""
    width = max(len(request.prompt_ids) for request in batch)
    ids_BP = torch.zeros(len(batch), width, dtype=torch.long)
    mask_BP = torch.zeros(len(batch), width, dtype=torch.long)
    for index, request in enumerate(batch):
        length = len(request.prompt_ids)
        ids_BP[index, width - length :] = torch.as_tensor(request.prompt_ids, dtype=torch.long)
        mask_BP[index, width - length :] = 1
    return ids_BP.to(device), mask_BP.to(device)


@torch.inference_mode()
def _draw(
    logits_BV: torch.Tensor, sampling: Sampling, generators: list[torch.Generator]
) -> torch.Tensor:
    """One token a row [B]: the inverse of the cumulative distribution at one uniform number of its generator."""
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    prob_BV = (logits_BV.double() / sampling.temperature).softmax(-1)
    order_BV = None
    if sampling.top_p < 1:
        prob_BV, order_BV = prob_BV.sort(stable=True, dim=-1, descending=True)
        before_BV = prob_BV.cumsum(-1) - prob_BV
        prob_BV = prob_BV.masked_fill(before_BV >= sampling.top_p, 0.0)
    uniform_B = torch.stack([torch.rand(1, generator=g, dtype=torch.float64) for g in generators])
    cumulative_BV = prob_BV.cumsum(-1)
    point_B = uniform_B.to(prob_BV.device) * cumulative_BV[:, -1:]
    index_B = torch.searchsorted(cumulative_BV, point_B, right=True).clamp(max=prob_BV.shape[1] - 1)
    if order_BV is not None:
        index_B = order_BV.gather(-1, index_B)
    return index_B[:, 0]


@torch.inference_mode()
def _head_rows(logits_BV: torch.Tensor, token_B: torch.Tensor, top_k: int) -> tuple[Array, Array]:
    """ids and raw log-probabilities [B, 1 + K]: the token itself, then the top_k most probable."""
    logp_BV = logits_BV.log_softmax(-1)
    top = logp_BV.topk(min(top_k, logp_BV.shape[1]), dim=-1)
    token_B1 = token_B[:, None]
    ids_BK = torch.cat([token_B1, top.indices], dim=1)
    logp_BK = torch.cat([logp_BV.gather(1, token_B1), top.values], dim=1)
    return ids_BK.to(torch.int32).cpu().numpy(), logp_BK.cpu().numpy()
