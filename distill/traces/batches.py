"""Batches of stored traces for one's own trainer: rows of a trace each, padded into tensors.

`collate` pads rows into a `TraceBatch`, which the losses of `distill.losses` and the trainers of `distill.integrations` take. A row
is a dictionary with the columns of a shard: flat as the shard holds them (`rows_of`), or with a list or a row of a tensor for
each position, as `distill.load_traces` and its `datasets` view have them.

Alignment, the same for every key of a batch: the value at [b, t] is about the token input_ids[b, t], as `labels` are in
transformers. A model predicts that token at position t - 1. The losses make this shift (`distill.losses.predicting`);
nothing else has to.

Shapes: B traces, T tokens of the longest, K stored entries, N draws from the tail.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypedDict, cast

import numpy as np
import torch
from torch import Tensor

from distill.records import IGNORED as IGNORED
from distill.records import Array, Draws, TopK, Traces, UserError
from distill.tail_draws import weights


class TraceRow(TypedDict, total=False):
    """One trace. Arrays, tensors or lists; P prompt tokens, C completion tokens, E entries over all C positions.

    prompt_ids, completion_ids   int [P], [C]: what the engine read and sampled
    logprob                      float [C]: log-probability of each completion token under the model that wrote or scored it
    top_count                    int [C]: entries at each position; 0: no distribution was stored there. Without it top_ids and
                                 top_logprobs are nested: lists of each position's entries, or arrays [C, K] with -inf where there is none
    top_ids, top_logprobs        int, float [E]: the entries, position after position, by descending probability
    tail_logprob                 float [C]: log of the mass outside the entries
    draw_count, draw_ids, draw_logprobs   draws from the tail, if there are any, laid out as the entries
    draw_mass                    float [C]: the mass that one draw of a position stands for
    """

    trace_id: str
    problem_id: str
    prompt_ids: Any
    completion_ids: Any
    logprob: Any
    top_count: Any
    top_ids: Any
    top_logprobs: Any
    tail_logprob: Any
    draw_count: Any
    draw_ids: Any
    draw_logprobs: Any
    draw_mass: Any


class TraceBatch(TypedDict, total=False):
    """A batch of traces, padded at the right. Every value at [b, t] is about the token input_ids[b, t].

    input_ids         int64 [B, T]: prompt and completion
    attention_mask    int64 [B, T]: 1 at tokens, 0 at padding
    labels            int64 [B, T]: the token where it is learned, else -100: prompts, padding, and positions without a
                      stored distribution if the traces have distributions
    top_ids          int64 [B, T, K]: the teacher's stored ids for this token, likeliest first; -1 = no entry
    top_logprobs     float32 [B, T, K]: their log-probabilities, normalised over the whole vocabulary; -inf = no entry
    tail_logprob      float32 [B, T]: log of the teacher's mass outside these ids; -inf = none
    logprob   float32 [B, T]: log-probability of the token itself under the model that wrote or scored the trace
    draw_ids, draw_logprobs, draw_mass   int64 [B, T, N] (-1 = none), float32 [B, T, N], float32 [B, T]: draws from the tail

    The last five groups are there if the rows have them.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    top_ids: Tensor
    top_logprobs: Tensor
    tail_logprob: Tensor
    logprob: Tensor
    draw_ids: Tensor
    draw_logprobs: Tensor
    draw_mass: Tensor


def rows_of(traces: Traces, *, tail_draws: int = 0) -> Iterator[TraceRow]:
    """Yield the traces of a block as rows, with what was read of their distributions. tail_draws: of the traces' metadata."""
    has_logprob = bool(traces.logprob.offsets[-1])
    for n, trace_id in enumerate(traces.trace_id):
        row = TraceRow(
            trace_id=trace_id,
            problem_id=traces.problem_id[n],
            prompt_ids=traces.prompt_ids[n],
            completion_ids=traces.completion_ids[n],
        )
        if has_logprob:
            row["logprob"] = traces.logprob[n]
        top, draws = traces.top_of(n), traces.draws_of(n)
        if top is not None:
            row |= TraceRow(
                top_count=top.count_T, top_ids=top.ids_E, top_logprobs=top.logp_E, tail_logprob=top.tail_T
            )  # fmt: skip
        if top is not None and draws is not None:
            row |= TraceRow(
                draw_count=draws.count_T,
                draw_ids=draws.ids_E,
                draw_logprobs=draws.logp_E,
                draw_mass=weights(top.tail_T, tail_draws),
            )
        yield row


def collate(
    rows: Sequence[Mapping[str, Any]],
    *,
    pad_id: int = 0,
    max_length: int | None = None,
    pad_to_multiple_of: int | None = None,
    tail_draws: int = 0,
) -> TraceBatch:
    """Pad traces into a batch.

    rows: `TraceRow`s, or rows of a `datasets` table with the same columns. Columns that one row lacks are left out of the batch.
    max_length: tokens of a trace; what lies beyond is cut off, with its distributions. pad_to_multiple_of: of the batch's length T.
    tail_draws: of the traces' metadata, for rows with draws that do not have draw_mass.

    Raises UserError for a trace without a prompt (nothing predicts its first token), or whose columns contradict each other.
    """
    if not rows:
        raise UserError("collate: there are no traces to put into a batch.")
    ids = [_ids(row, max_length) for row in rows]
    width = max(len(each) for each in ids)
    if pad_to_multiple_of:
        width = -(-width // pad_to_multiple_of) * pad_to_multiple_of
    shape = (len(rows), width)
    input_ids, labels = np.full(shape, pad_id, np.int64), np.full(shape, IGNORED, np.int64)
    mask = np.zeros(shape, np.int64)
    places = []
    for b, (row, each) in enumerate(zip(rows, ids, strict=True)):
        start = len(row["prompt_ids"])
        input_ids[b, : len(each)], mask[b, : len(each)] = each, 1
        labels[b, start : len(each)] = each[start:]
        places.append((b, slice(start, max(start, len(each)))))
    streams: dict[str, Array] = {"input_ids": input_ids, "attention_mask": mask, "labels": labels}
    if _all_have(rows, "top_ids"):
        streams |= _distributions(rows, places, shape, labels)
    if _all_have(rows, "draw_ids") and (tail_draws or _all_have(rows, "draw_mass")):
        streams |= _draws(rows, places, shape, tail_draws)
    if _all_have(rows, "logprob") and all(len(row["logprob"]) or not len(row["completion_ids"]) for row in rows):
        streams["logprob"] = np.zeros(shape, np.float32)
        for row, (b, cells) in zip(rows, places, strict=True):
            values = np.asarray(row["logprob"], np.float32)
            _check(row, "logprob", len(values), "completion_ids")
            streams["logprob"][b, cells] = values[: cells.stop - cells.start]
    return cast(TraceBatch, {name: torch.from_numpy(stream) for name, stream in streams.items()})


def _ids(row: Mapping[str, Any], max_length: int | None) -> Array:
    """Return a trace's tokens, cut to max_length."""
    if not len(row["prompt_ids"]):
        raise UserError(
            f"trace {row.get('trace_id', '?')}: has an empty prompt, so nothing predicts its first token. Leave it out, or put the "
            "tokenizer's first token before it."
        )
    whole = np.concatenate([np.asarray(row["prompt_ids"]), np.asarray(row["completion_ids"])])
    return np.asarray(whole[:max_length])


def _all_have(rows: Sequence[Mapping[str, Any]], column: str) -> bool:
    return all(row.get(column) is not None for row in rows)


def _check(row: Mapping[str, Any], column: str, found: int, like: str) -> None:
    expected = len(row[like])
    if found != expected:
        raise UserError(
            f"trace {row.get('trace_id', '?')}: {column} has {found} values for {expected} of {like}; the columns of a trace belong "
            "together, so none of them can be cut or filtered alone."
        )


def _distributions(
    rows: Sequence[Mapping[str, Any]], places: Sequence[tuple[int, slice]], shape: tuple[int, int], labels: Array
) -> dict[str, Array]:
    """Return the teacher's streams. Labels of tokens without a distribution become IGNORED."""
    tops = []
    for row, (_, cells) in zip(rows, places, strict=True):
        top = TopK(*_entries(row, "top"), np.asarray(row["tail_logprob"], np.float32))
        _check(row, "tail_logprob", len(top.tail_T), "completion_ids")
        tops.append(top.slice(0, cells.stop - cells.start))
    width = max((top.width for top in tops), default=0)
    found: dict[str, Array] = {
        "top_ids": np.full((*shape, width), -1, np.int64),
        "top_logprobs": np.full((*shape, width), -np.inf, np.float32),
        "tail_logprob": np.full(shape, -np.inf, np.float32),
    }
    for top, (b, cells) in zip(tops, places, strict=True):
        found["top_ids"][b, cells], found["top_logprobs"][b, cells] = top.dense(width)
        found["tail_logprob"][b, cells] = top.tail_T
        labels[b, cells] = np.where(np.asarray(top.count_T) > 0, labels[b, cells], IGNORED)
    return found


def _entries(row: Mapping[str, Any], kind: str) -> tuple[Array, Array, Array]:
    """Return counts [C], ids [E] and log-probabilities [E] of a trace's entries (top) or draws (draw), from either layout."""
    ids, logps, counts = row[f"{kind}_ids"], row[f"{kind}_logprobs"], row.get(f"{kind}_count")
    if counts is None and getattr(logps, "ndim", 1) == 2:
        padded_CK = np.asarray(logps, np.float32)
        kept_CK = padded_CK > -np.inf
        counts, ids, logps = kept_CK.sum(1), np.asarray(ids)[kept_CK], padded_CK[kept_CK]
    elif counts is None:
        counts = [len(each) for each in ids]
        ids = np.concatenate([np.empty(0, np.int64), *(np.asarray(each, np.int64) for each in ids)])
        logps = np.concatenate([np.empty(0, np.float32), *(np.asarray(each, np.float32) for each in logps)])
    counts = np.asarray(counts, np.int64)
    _check(row, f"{kind}_count", len(counts), "completion_ids")
    for name, values in ((f"{kind}_ids", ids), (f"{kind}_logprobs", logps)):
        if len(values) != int(counts.sum()):
            raise UserError(
                f"trace {row.get('trace_id', '?')}: {name} has {len(values)} values where {kind}_count adds up to {int(counts.sum())}."
            )
    return counts, np.asarray(ids, np.int64), np.asarray(logps, np.float32)


def _draws(
    rows: Sequence[Mapping[str, Any]], places: Sequence[tuple[int, slice]], shape: tuple[int, int], tail_draws: int
) -> dict[str, Array]:
    drawn = []
    for row, (_, cells) in zip(rows, places, strict=True):
        drawn.append(Draws(*_entries(row, "draw")).slice(0, cells.stop - cells.start))
    width = max((each.width for each in drawn), default=0)
    found: dict[str, Array] = {
        "draw_ids": np.full((*shape, width), -1, np.int64),
        "draw_logprobs": np.full((*shape, width), -np.inf, np.float32),
        "draw_mass": np.zeros(shape, np.float32),
    }
    for row, each, (b, cells) in zip(rows, drawn, places, strict=True):
        found["draw_ids"][b, cells], found["draw_logprobs"][b, cells] = each.dense(width)
        mass = row.get("draw_mass")
        mass = weights(np.asarray(row["tail_logprob"]), tail_draws) if mass is None else np.asarray(mass, np.float32)
        found["draw_mass"][b, cells] = mass[: cells.stop - cells.start]
    return found
