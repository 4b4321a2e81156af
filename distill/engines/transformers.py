"""The engine on plain transformers: decodes a batch with a key-value cache and removes rows as they finish.

When half of the rows are done, new requests fill the batch. Prompts are padded on the left. The common prefix of a batch's
prompts is computed once, and so is a repeated prompt. Each request has its own random generator, which draws one uniform
number per token. With a batch size of one a result depends only on its request; in float32, that is the reference engine.
Log-probabilities are raw: before temperature and top-p.

Shapes: B rows of the batch, V vocabulary, K candidates, T positions, P prompt tokens, U distinct prompts.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from distill import models
from distill.engines import completions
from distill.engines.decoding_proof import Decoding, prove_decoding
from distill.engines.float32_head import Float32Head
from distill.engines.kv_cache import GrowingCache, Replay, growing
from distill.engines.tail_rows import HeadRows, head_rows
from distill.records import Array, Completion, Request, Sampling
from distill.tail_draws import uniforms

CHUNK = 256
"""Maximum positions scored at once of a single completion; limits the logits to [CHUNK, V]."""
SCORED = 1024
"""Maximum positions scored at once of several completions; limits the logits to [SCORED, V]."""
FED = 4096
"""Maximum tokens of several completions and their prompts in one forward pass; limits the activations."""


@dataclass(slots=True)
class _Row:
    """A completion being generated. limit: maximum tokens. version: of the weights when it began."""

    request: Request
    limit: int
    version: int
    generator: torch.Generator
    ids: list[Array] = field(default_factory=list)
    logp: list[Array] = field(default_factory=list)
    tail: list[float] = field(default_factory=list)


@dataclass(slots=True)
class _Running:
    """The batch being decoded: its rows, attention mask [B, P], logits of the next tokens [B, V] and cache.

    joins: whether rows can be added to the cache.
    """

    rows: list[_Row]
    mask_BP: torch.Tensor
    logits_BV: torch.Tensor
    cache: Any
    joins: bool

    def keep(self, kept: list[int], next_B: torch.Tensor) -> torch.Tensor:
        """Keep only these rows, in this order; returns their next tokens."""
        if len(kept) == len(self.rows):
            return next_B
        index_B = torch.tensor(kept, device=next_B.device)
        self.rows = [self.rows[index] for index in kept]
        self.mask_BP = self.mask_BP[index_B]
        self.cache.batch_select_indices(index_B)
        return next_B[index_B]

    def join(self, new: _Running) -> _Running:
        """Append the rows of a new batch. Leading positions that are masked in all own rows are dropped."""
        skip = int(self.mask_BP.any(0).long().argmax())
        self.cache.join(new.cache, skip)
        mine, theirs = self.mask_BP[:, skip:], new.mask_BP
        width = max(mine.shape[1], theirs.shape[1])
        mask_BP = torch.cat([F.pad(mask, (width - mask.shape[1], 0)) for mask in (mine, theirs)], dim=0)
        logits_BV = torch.cat([self.logits_BV, new.logits_BV])
        return _Running(self.rows + new.rows, mask_BP, logits_BV, self.cache, True)


class TransformersEngine:
    """A transformers model as an engine (see `distill.records.Engine`)."""

    def __init__(
        self,
        model_dir: Path,
        *,
        max_model_len: int,
        dtype: str = "bfloat16",
        batch_size: int = 64,
        device: str | None = None,
    ) -> None:
        completions.check_context(model_dir, max_model_len)
        self.vocab_size, self._stop_ids = completions.vocabulary(model_dir)
        self.max_model_len = max_model_len
        self.version = 0
        self._batch_size = batch_size
        self._device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._model = models.load(model_dir, dtype=dtype).to(self._device).eval()
        self._freed: list[tuple[torch.nn.Parameter, torch.Size]] = []
        self._head = Float32Head()
        if dtype != "float32":
            layer = self._model.get_output_embeddings()
            layer.forward = lambda hidden: self._head(hidden, layer.weight, layer.bias)
        self.decoding = Decoding()
        self.decoding = prove_decoding(self, 2e-3 if dtype == "float32" else 0.2)
        self._head.forget()
        self.note = self.decoding.note
        if not self.decoding.batched:
            self._batch_size = 1

    def generate(self, requests: Iterable[Request], sampling: Sampling, *, top_k: int = 0) -> Iterator[Completion]:
        """Yield completions as they finish; at most batch_size requests run at a time."""
        return self.sampled(requests, sampling, top_k)

    def sampled(self, requests: Iterable[Request], sampling: Sampling, top_k: int) -> Iterator[Completion]:
        """Yield completions as they finish, in the way of `decoding`."""
        source = iter(requests)
        live: _Running | None = None
        while True:
            if live is None or (live.joins and len(live.rows) <= self._batch_size // 2):
                free = self._batch_size - (len(live.rows) if live else 0)
                if batch := list(itertools.islice(source, free)):
                    new = self._start(batch, sampling)
                    live = new if live is None else live.join(new)
            if live is None:
                return
            next_B = _draw(live.logits_BV, sampling, [row.generator for row in live.rows])
            requests = [row.request for row in live.rows]
            found = _rows(live.logits_BV, next_B, top_k, requests, [len(row.ids) for row in live.rows])
            kept = list(range(len(live.rows)))
            for index in reversed(range(len(kept))):
                row = live.rows[index]
                row.ids.append(found.ids[index])
                row.logp.append(found.logp[index])
                row.tail.append(found.tail_B[index])
                if int(found.ids[index, 0]) in self._stop_ids or len(row.ids) == row.limit:
                    # The last row takes its place, so that few rows are copied.
                    kept[index] = kept[-1]
                    kept.pop()
                    yield self._completion(row, top_k)
            if not kept:
                live = None
                continue
            next_B = live.keep(kept, next_B)
            live.mask_BP = torch.cat([live.mask_BP, live.mask_BP.new_ones(len(kept), 1)], dim=1)
            live.logits_BV, live.cache = self._forward(next_B[:, None], live.mask_BP, live.cache)

    def _start(self, batch: list[Request], sampling: Sampling) -> _Running:
        """Run the prompts of new requests, up to the logits of their first tokens."""
        rows_B = [
            _Row(
                request,
                completions.room(request, self.max_model_len, sampling.max_tokens),
                self.version,
                torch.Generator().manual_seed(request.seed),
            )
            for request in batch
        ]
        prompts: dict[bytes, int] = {}
        which_B = [prompts.setdefault(_key(request), len(prompts)) for request in batch]
        distinct = [np.frombuffer(key, np.int64) for key in prompts]
        logits_UV, mask_UP, cache = self._prefill(distinct)
        which = torch.tensor(which_B, device=self._device)
        cache.batch_select_indices(which)
        joins = isinstance(cache, GrowingCache)
        return _Running(rows_B, mask_UP[which], logits_UV[which], cache, joins)

    def _prefill(self, ids: list[Array], keep: int = 1) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """Logits [B * keep, V] of the last `keep` positions of several sequences, their mask [B, P] and the cache.

        The common prefix is computed once if the model's cache supports that.
        """
        decoding = self.decoding
        cache = growing(self._model.config) if decoding.batched and decoding.cached else None
        shared = 0 if cache is None else _common(ids, keep)
        if cache is not None and shared:
            self._forward(torch.tensor(ids[0][None, :shared], device=self._device), None, cache)
            cache.batch_select_indices(torch.zeros(len(ids), dtype=torch.long, device=self._device))
        ids_BP, mask_BP = _left_padded([each[shared:] for each in ids], self._device)
        mask_BP = torch.cat([mask_BP.new_ones(len(ids), shared), mask_BP], dim=1)
        logits_BV, held = self._forward(ids_BP, mask_BP, cache, keep)
        return logits_BV, mask_BP, held

    def _completion(self, row: _Row, top_k: int) -> Completion:
        ids, logp = np.stack(row.ids), np.stack(row.logp)
        return completions.completion(
            row.request,
            ids[:, 0],
            ids,
            logp,
            top_k=top_k,
            stop_ids=self._stop_ids,
            version=row.version,
            tail_T=np.array(row.tail, np.float32),
        )

    def score(self, requests: Iterable[Request], *, top_k: int = 0) -> Iterator[Completion]:
        """Yield the log-probabilities of the given completions (teacher-forcing), in the order of the requests."""
        return self.scored(requests, top_k)

    def scored(self, requests: Iterable[Request], top_k: int) -> Iterator[Completion]:
        """Yield the given completions\' log-probabilities, in the way of `decoding`."""
        for group in self._groups(requests):
            for request, (ids, logp, tail_T) in zip(group, self._score_group(group, top_k), strict=True):
                yield completions.completion(
                    request,
                    completions.given(request, self.max_model_len),
                    ids,
                    logp,
                    top_k=top_k,
                    stop_ids=self._stop_ids,
                    version=self.version,
                    tail_T=tail_T,
                )

    def _groups(self, requests: Iterable[Request]) -> Iterator[list[Request]]:
        """Split requests, in order, into groups to score together: at most SCORED positions and FED tokens, padded."""
        group: list[Request] = []
        longest = whole = 0
        for request in requests:
            length = len(completions.given(request, self.max_model_len))
            longest = max(longest, length)
            whole = max(whole, length + len(request.prompt_ids))
            num = len(group) + 1
            if group and (num > self._batch_size or num * longest > SCORED or num * whole > FED):
                yield group
                group, longest, whole = [], length, length + len(request.prompt_ids)
            group.append(request)
        if group:
            yield group

    def _score_group(self, group: list[Request], top_k: int) -> Iterator[tuple[Array, Array, Array]]:
        """Return the rows of each request's completion: ids, log-probabilities [T, 1 + K + N] and the log of the tail [T]."""
        given = [completions.given(request, self.max_model_len) for request in group]
        if len(group) == 1:
            ids, logp, tail_T = map(np.concatenate, zip(*self._score_chunks(group[0], given[0], top_k), strict=True))
            yield ids, logp, tail_T
            return
        # The logits of a token are at the position before it, so the last token is not fed.
        fed = [np.concatenate([r.prompt_ids, g[:-1]]) for r, g in zip(group, given, strict=True)]
        keep = max(map(len, given))
        logits_BV, _, _ = self._prefill(fed, keep)
        logits_BKV = logits_BV.reshape(len(group), keep, -1)
        for row_KV, given_T, request in zip(logits_BKV, given, group, strict=True):
            label_T = torch.as_tensor(given_T, dtype=torch.long, device=self._device)
            num = len(given_T)
            found = _rows(row_KV[keep - num :], label_T, top_k, [request] * num, range(num))
            yield found.ids, found.logp, found.tail_B

    def _score_chunks(self, request: Request, given_T: Array, top_k: int) -> Iterator[tuple[Array, Array, Array]]:
        label_T = torch.as_tensor(given_T, dtype=torch.long, device=self._device)
        fed = torch.as_tensor(request.prompt_ids, dtype=torch.long, device=self._device)
        cache: Any = None
        # The logits of a token are at the position before it: the prompt's last position gives those of the first
        # completion token, and the last completion token is not fed.
        for start in range(0, len(label_T), CHUNK):
            label_C = label_T[start : start + CHUNK]
            fed = torch.cat([fed, label_C[:-1]])
            logits_CV, cache = self._forward(fed[None], None, cache, keep=len(label_C))
            num = len(label_C)
            found = _rows(logits_CV, label_C, top_k, [request] * num, range(start, start + num))
            yield found.ids, found.logp, found.tail_B
            fed = label_C[-1:]

    @torch.inference_mode()
    def _forward(
        self, ids_BP: torch.Tensor, mask_BP: torch.Tensor | None, cache: Any, keep: int = 1
    ) -> tuple[torch.Tensor, Any]:
        """float32 logits [B * keep, V] of the last `keep` positions, without the padding of V, and the cache."""
        length = ids_BP.shape[1]
        if not self.decoding.cached:
            ids_BP = ids_BP if cache is None else torch.cat([cache.ids_BP, ids_BP], dim=1)
            logits_BPV = torch.stack([self.plain_logits(ids)[-keep:] for ids in ids_BP])
            return logits_BPV.reshape(-1, self.vocab_size), Replay(ids_BP)
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

    @torch.inference_mode()
    def plain_logits(self, ids_T: torch.Tensor) -> torch.Tensor:
        """Return float32 logits [T, V] of one sequence by the model's plain forward pass, over the tokenizer's ids."""
        logits: torch.Tensor = self._model(input_ids=ids_T[None].to(self._device), use_cache=False).logits[
            0, :, : self.vocab_size
        ]
        return logits.float()

    @torch.no_grad()
    def sync(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Copy new weights in, by their names in the checkpoint. Raises ValueError for unknown or missing names."""
        for parameter, shape in self._freed:
            parameter.data = torch.empty(shape, dtype=parameter.dtype, device=self._device)
        self._freed = []
        models.copy_weights(self._model, weights)
        self._head.forget()
        self.version = version

    def sleep(self) -> None:
        """Free the memory of the weights until the next `sync`, which brings all of them; buffers stay."""
        for parameter in self._model.parameters():
            if parameter.numel():  # an engine that sleeps already has none
                self._freed.append((parameter, parameter.shape))
                parameter.data = parameter.data.new_empty(0)
        self._head.forget()
        if self._device == "cuda":
            torch.cuda.empty_cache()

    def close(self) -> None:
        """Free the model."""
        del self._model
        if self._device == "cuda":
            torch.cuda.empty_cache()


def _key(request: Request) -> bytes:
    return np.asarray(request.prompt_ids, np.int64).tobytes()


def _common(sequences: list[Array], keep: int) -> int:
    """Length of the common prefix of the sequences without their last `keep` tokens; 0 for a single sequence."""
    width = min(len(ids) for ids in sequences) - keep
    if len(sequences) < 2 or width <= 0:
        return 0
    same = np.all(np.stack([ids[:width] for ids in sequences]) == sequences[0][:width], axis=0)
    return width if same.all() else int(same.argmin())


def _left_padded(prompts: list[Array], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompt ids and attention mask [B, P], padded on the left."""
    width = max(map(len, prompts))
    ids_BP = torch.zeros(len(prompts), width, dtype=torch.long)
    mask_BP = torch.zeros(len(prompts), width, dtype=torch.long)
    for index, ids in enumerate(prompts):
        ids_BP[index, width - len(ids) :] = torch.tensor(ids)
        mask_BP[index, width - len(ids) :] = 1
    return ids_BP.to(device), mask_BP.to(device)


@torch.inference_mode()
def _draw(logits_BV: torch.Tensor, sampling: Sampling, generators: list[torch.Generator]) -> torch.Tensor:
    """Sample one token per row [B]: the inverse of the cumulative distribution at a uniform random number."""
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


@dataclass(frozen=True, slots=True)
class _Rows:
    """`HeadRows` as numpy arrays."""

    ids: Array
    logp: Array
    tail_B: Array


@torch.inference_mode()
def _rows(
    logits_BV: torch.Tensor, token_B: torch.Tensor, top_k: int, requests: Sequence[Request], position_B: Sequence[int]
) -> _Rows:
    """Return each row's token, candidates and draws from the raw distribution; requests and positions: whose rows they are."""
    num = requests[0].tail_draws
    if any(request.tail_draws != num for request in requests):
        raise ValueError("the requests of one call ask for the same number of tail draws.")
    uniform_BN = None
    if num and top_k:
        seed_B = np.array([request.seed for request in requests], np.uint64)
        uniform_BN = torch.from_numpy(uniforms(seed_B, np.asarray(position_B), num))
    found: HeadRows = head_rows(logits_BV.log_softmax(-1), token_B, top_k, uniform_BN)
    return _Rows(found.ids.cpu().numpy(), found.logp.cpu().numpy(), found.tail_B.cpu().numpy())
