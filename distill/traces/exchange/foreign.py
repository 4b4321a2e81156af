"""One row of another program's data set of distributions, and traces from it.

A row is a text in tokens, which of them are learned, and a rectangle of entries for each position of the model: row j of it is about
the token ids[j + 1]. Several texts may be packed into one row. Every run of learned tokens becomes a trace: what comes before
it in its text is the prompt, the run the completion. So a conversation with several answers becomes several traces, and a trainer
that shares prefixes computes what they have in common once.

Shapes: L tokens of a row, R positions with entries (L or L - 1), K entries.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from distill.errors import DataError
from distill.records import IGNORED, Array, Ragged, TopK, Traces

NOTHING = -1000.0
"""Log-probabilities below this mark places without an entry. Other programs fill them with -1e4 or -1e9, where -inf would give NaN."""
MASS_ABOVE_1 = 0.05
"""The mass of a position's entries may be this far above 1, by the rounding of a lossy format; they are then scaled to 1."""
SURELY = 1e-5
"""Masses that are this near to 1 at all positions were divided by their sum."""

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True, slots=True, eq=False)
class ForeignRow:
    """A row. ids_L int64; learned_L bool; doc_L int: which of several packed texts a token belongs to.

    entry_ids_RK int64 and entry_logp_RK float32, -inf where there is none: row j is about the token ids_L[j + 1].
    """

    ids_L: Array
    learned_L: Array
    doc_L: Array
    entry_ids_RK: Array
    entry_logp_RK: Array


@dataclass(frozen=True, slots=True, eq=False)
class Span:
    """A run of learned tokens in a row: prompt ids[start:first], completion ids[first:stop]. end: of the text that it belongs to."""

    start: int
    first: int
    stop: int
    end: int


def learned(labels: Array | None, num: int) -> Array:
    """Return which tokens are learned, by transformers' labels; without labels all."""
    return np.ones(num, bool) if labels is None else np.asarray(labels) != IGNORED


def spans(row: ForeignRow) -> Iterator[Span]:
    """Yield the runs of learned tokens that have entries. The first token of a text is never predicted."""
    num = len(row.ids_L)
    if not num - 1 <= len(row.entry_ids_RK) <= num:
        raise DataError(
            f"a row has {len(row.entry_ids_RK)} positions with entries for {num} tokens; there is one for each token but the first, or "
            "one more, for the token after the end."
        )
    if np.isnan(row.entry_logp_RK).any():
        raise DataError("some log-probabilities of entries are not numbers.")
    about_L = np.zeros(num, bool)
    about_L[1:] = (row.entry_logp_RK[: num - 1] > NOTHING).any(1)
    begins_L = np.diff(row.doc_L, prepend=row.doc_L[:1] - 1) != 0
    usable_L = row.learned_L & about_L & ~begins_L
    edges = np.flatnonzero(np.diff(np.concatenate([[False], usable_L, [False]]).astype(np.int8)))
    bounds = [*np.flatnonzero(begins_L).tolist(), num]
    for first, stop in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        text = int(np.searchsorted(bounds, first, side="right"))
        yield Span(bounds[text - 1], first, stop, bounds[text])


def distribution(row: ForeignRow, span: Span) -> TopK:
    """Return the entries about a span's completion, sorted, with the mass that they leave as the tail.

    Raises DataError if they are no log-probabilities.
    """
    rows = slice(span.first - 1, span.stop - 1)
    logp_TK = np.where(row.entry_logp_RK[rows] > NOTHING, row.entry_logp_RK[rows], -np.inf).astype(np.float32)
    mass_T = np.exp(logp_TK.astype(np.float64)).sum(1)
    if mass_T.max() > 1 + MASS_ABOVE_1:
        raise DataError(
            f"the entries of a position have a mass of {mass_T.max():.4g}, so they are no log-probabilities of temperature 1 (logits, or "
            "another temperature). The mass outside them cannot be known."
        )
    over_T = mass_T >= 1
    logp_TK = logp_TK - np.where(over_T, np.log(mass_T), 0.0)[:, None].astype(np.float32)
    with np.errstate(divide="ignore"):
        tail_T = np.where(over_T, -np.inf, np.log1p(-np.where(over_T, 0.0, mass_T))).astype(np.float32)
    return TopK.from_dense(row.entry_ids_RK[rows], logp_TK, tail_T)


def own_logprobs(top: TopK, ids_T: Array) -> Array:
    """Return the log-probability of each token where it is among the entries, elsewhere the most that it can be: the tail's mass."""
    ids_TK, logp_TK = top.dense()
    own_T = np.where(ids_TK == np.asarray(ids_T)[:, None], logp_TK, -np.inf).max(1, initial=-np.inf)
    least_T = np.where(logp_TK > -np.inf, logp_TK, np.inf).min(1, initial=np.inf)
    bound_T = np.minimum(np.maximum(top.tail_T, np.float32(-50.0)), least_T)
    return np.where(own_T > -np.inf, own_T, bound_T).astype(np.float32)


def traces_of(row: ForeignRow, number: int, decode: Decode, ends: frozenset[int]) -> Traces:
    """Return the traces of a row, the `number`-th of its data set. ends: ids that end a completion.

    A run at the end of its text that does not end with one of them counts as cut ("length").

    The prompt's text is the only message: what the conversation was before it was rendered is not known.
    """
    found = list(spans(row))
    tops = [distribution(row, span) for span in found]
    prompts = [row.ids_L[span.start : span.first] for span in found]
    completions = [row.ids_L[span.first : span.stop] for span in found]
    marks = [hashlib.sha256(np.asarray(p, "<i8").tobytes()).hexdigest()[:16] for p in prompts]
    ids = [
        hashlib.sha256(f"{number}/{n}/{marks[n]}".encode() + np.asarray(c, "<i8").tobytes()).hexdigest()[:24]
        for n, c in enumerate(completions)
    ]
    nothing = [None] * len(found)
    return Traces(
        trace_id=ids,
        problem_id=marks,
        sample=np.zeros(len(found), np.int32),
        messages=[({"role": "user", "content": decode(p.tolist())},) for p in prompts],
        completion=[decode(c.tolist()) for c in completions],
        answer=list(nothing),
        gold=list(nothing),
        prompt_ids=Ragged.from_rows(prompts, np.int64),
        completion_ids=Ragged.from_rows(completions, np.int64),
        logprob=Ragged.from_rows([own_logprobs(t, c) for t, c in zip(tops, completions, strict=True)], np.float32),
        top=TopK.concat(tops),
        reward=list(nothing),
        rewards={},
        correct=list(nothing),
        finish_reason=[
            "stop" if span.stop < span.end or int(row.ids_L[span.stop - 1]) in ends else "length" for span in found
        ],
    )


@dataclass(frozen=True, slots=True, eq=False)
class ExportRow:
    """A trace as others lay it out: ids_L int64, labels_L with IGNORED at the prompt, and R = L - 1 positions of entries.

    entry_ids_RK, entry_logp_RK: row j about ids_L[j + 1]; count_R: how many of a row's K places are entries. Positions of the
    prompt have none.
    """

    ids_L: Array
    labels_L: Array
    entry_ids_RK: Array
    entry_logp_RK: Array
    count_R: Array


def export_row(traces: Traces, n: int, width: int) -> ExportRow:
    """Return trace n of a block. width: K. Raises DataError for a trace without distributions."""
    top = traces.top_of(n)
    if top is None:
        raise DataError("the traces hold no distributions (top_k 0), which is what this format is for.")
    prompt, completion = np.asarray(traces.prompt_ids[n], np.int64), np.asarray(traces.completion_ids[n], np.int64)
    ids_L = np.concatenate([prompt, completion])
    labels_L = np.concatenate([np.full(len(prompt), IGNORED), completion])
    num = max(len(ids_L) - 1, 0)
    ids_RK, logp_RK = np.zeros((num, width), np.int64), np.full((num, width), -np.inf, np.float32)
    count_R = np.zeros(num, np.int64)
    if len(completion):
        rows = slice(len(prompt) - 1, num)
        ids_TK, logp_RK[rows] = top.dense(width)
        ids_RK[rows] = np.maximum(ids_TK, 0)
        count_R[rows] = top.count_T
        labels_L[len(prompt) :][np.asarray(top.count_T) == 0] = IGNORED
    return ExportRow(ids_L, labels_L, ids_RK, logp_RK, count_R)
