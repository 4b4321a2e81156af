"""Traces become packed batches. The one place where labels and distributions are shifted against the inputs.

An `Example` is a prompt and a completion in ids, with the teacher's distribution over each completion token or
without. `pack` lays the examples of one optimiser step end to end into micro-batches of about `micro_tokens`:
positions restart at each trace, attention does not cross (`doc_offsets`), only completion tokens have a weight, and
the final EOS is among them. Every micro-batch carries the same denominator, that of the whole step, so any
split into micro-batches gives the same gradient.

Short traces of one prompt share it: all but its last token is computed once (a doc of its own, the others' `parent`), and
each trace goes on with the last one. It changes the work, not the numbers.

Alignment: input token t predicts token t + 1. Completion token j (of a prompt of P tokens) stands at input
P + j and is predicted at row P + j - 1, which gets its label, its weight and the teacher's row j.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np

from distill.records import SHORT, Array, Batch, Beside, TopK, Traces
from distill.training.alignment import Alignment, Reading
from distill.training.several import Blend


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """What is learned from one trace. prompt_ids and completion_ids int [P], [C]; top, of one teacher or several, has C rows or is None.

    Of a rollout also: its advantage (one number, or one a completion token), and the engine's log-probability of each completion token, float32 [C].
    reading: the trace in the tokens of a teacher that has others.
    """

    trace_id: str
    prompt_ids: Array
    completion_ids: Array
    top: TopK | Blend | None = None
    advantage: float | Array | None = None
    engine_logp: Array | None = None
    reading: Reading | None = None

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)


class Source(Protocol):
    """Examples to train on, the same sequence for the same epoch each time it is asked for."""

    @property
    def num_examples(self) -> int: ...

    @property
    def fingerprint(self) -> str: ...

    def epoch(self, index: int, skip: int = 0) -> Iterator[Example]:
        """The examples of an epoch in its own order, without the first `skip`."""
        ...


def examples_of(traces: Traces, *, with_top: bool = True) -> Iterator[Example]:
    """The traces of a block as examples."""
    for n, trace_id in enumerate(traces.trace_id):
        top = traces.top_of(n) if with_top else None
        yield Example(trace_id, traces.prompt_ids[n], traces.completion_ids[n], top)


def steps(source: Source, *, batch_traces: int, start: int = 0) -> Iterator[list[Example]]:
    """The examples of optimiser steps start, start + 1, ... without end; the last of an epoch may be smaller."""
    first, within = divmod(start, steps_per_epoch(source.num_examples, batch_traces))
    for epoch in itertools.count(first):
        examples = source.epoch(epoch, skip=within * batch_traces)
        while taken := list(itertools.islice(examples, batch_traces)):
            yield taken
        within = 0


def steps_per_epoch(num_examples: int, batch_traces: int) -> int:
    return -(-num_examples // batch_traces)


def pack(
    examples: Sequence[Example],
    *,
    micro_tokens: int,
    normalise: Literal["token", "sequence"] = "token",
    denominator: float | None = None,
    rank: int = 0,
    world: int = 1,
) -> list[Batch]:
    """Micro-batches of one optimiser step for one process, numpy, by descending length so that bins fill well.

    normalise "token": every completion token counts 1; "sequence": every trace counts 1, spread over its tokens.
    denominator: None = what they count together.
    With several processes each gets every world-th micro-batch, and all get equally many: a process that
    runs out is given an empty one (weight 0), so that ranks stay in step.
    An example longer than micro_tokens has a micro-batch of its own. Examples with a reading (all or none): the spans
    that both sides cut the text in are what counts equally, or share their trace's 1.
    """
    if denominator is None:
        counts = [len(e.completion_ids) for e in examples]
        denominator = float(sum(counts) if normalise == "token" else np.count_nonzero(counts))
    bins = _bins(_units(examples, micro_tokens), micro_tokens)
    empty = [[min(examples, key=len)]] if examples else []
    while len(bins) % world:
        bins.append([])
    spans = [e.reading.alignment.num_spans for e in examples if e.reading is not None]
    num_spans = float(sum(spans) if normalise == "token" else np.count_nonzero(spans))
    batches = []
    for chosen in bins[rank::world]:
        batch = _batch(chosen or empty, normalise, max(denominator, 1.0), masked=not chosen)
        if spans:
            together = [e for unit in chosen or empty for e in unit]
            beside = _beside(together, normalise, max(num_spans, 1.0), masked=not chosen)
            batch = replace(batch, beside=beside)
        batches.append(batch)
    return batches


Unit = list[Example]
"""Examples that are computed together: one, or several of the same prompt."""


def _size(unit: Unit) -> int:
    """Tokens that a unit is computed with."""
    if len(unit) == 1:
        return len(unit[0])
    return len(unit[0].prompt_ids) - 1 + sum(len(e.completion_ids) + 1 for e in unit)


def _units(examples: Sequence[Example], micro_tokens: int) -> list[Unit]:
    """Short examples of one prompt together, as many as fit a micro-batch; all others alone."""
    units: list[Unit] = []
    open_units: dict[bytes, Unit] = {}
    for example in examples:
        unit = open_units.get(key := example.prompt_ids.tobytes())
        if unit is not None and len(example) <= SHORT and _size([*unit, example]) <= micro_tokens:
            unit.append(example)
            continue
        units.append([example])
        if len(example) <= SHORT and len(example.prompt_ids) > 1:
            open_units[key] = units[-1]
    return units


def _bins(units: Sequence[Unit], micro_tokens: int) -> list[list[Unit]]:
    """First-fit decreasing; ties keep their order, so the result depends on nothing else."""
    bins: list[list[Unit]] = []
    room: list[int] = []
    for unit in sorted(units, key=_size, reverse=True):
        size = _size(unit)
        fitting = next((i for i, left in enumerate(room) if left >= size), None)
        if fitting is None:
            bins.append([])
            room.append(micro_tokens)
            fitting = len(bins) - 1
        bins[fitting].append(unit)
        room[fitting] -= size
    return bins


def _batch(units: Sequence[Unit], normalise: str, denominator: float, *, masked: bool) -> Batch:
    examples = [e for unit in units for e in unit]
    # What of its prompt each example has computed before it, by another doc, and which.
    ahead = [len(e.prompt_ids) - 1 if len(unit) > 1 else 0 for unit in units for e in unit]
    prefixes = [unit[0].prompt_ids[:-1] for unit in units if len(unit) > 1]
    parent, shared = [], len(examples)
    for unit in units:
        parent += [shared if len(unit) > 1 else -1] * len(unit)
        shared += len(unit) > 1
    parent += [-1] * len(prefixes)
    lengths = [len(e) - done for e, done in zip(examples, ahead, strict=True)]
    lengths += [len(prefix) for prefix in prefixes]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    total = int(offsets[-1])
    ids_T, label_T = np.empty(total, np.int64), np.zeros(total, np.int64)
    weight_T, place_T = np.zeros(total, np.float32), np.zeros(total, np.int64)
    rows_of: list[slice] = []
    for prefix, start in zip(prefixes, offsets[len(examples) :], strict=False):
        ids_T[start : start + len(prefix)] = prefix
    for example, done, start, stop in zip(examples, ahead, offsets, offsets[1:], strict=False):
        ids_T[start:stop] = np.concatenate([example.prompt_ids[done:], example.completion_ids])
        label_T[start : stop - 1] = ids_T[start + 1 : stop]
        first = start + len(example.prompt_ids) - done - 1
        if first < start and len(example.completion_ids):
            raise ValueError(
                f"trace {example.trace_id}: an empty prompt leaves nothing to predict the first token from"
            )
        rows = slice(first, stop - 1)
        if not masked:
            weight_T[rows] = (
                1.0 if normalise == "token" else 1.0 / max(len(example.completion_ids), 1)
            )
        place_T[rows] = np.arange(len(example.completion_ids))
        rows_of.append(rows)
    starts = [*ahead, *[0] * len(prefixes)]
    position_T = np.arange(total) - np.repeat(offsets[:-1] - starts, lengths)
    return Batch(
        ids_T=ids_T,
        position_T=position_T,
        doc_offsets=offsets,
        parent=np.array(parent, np.int64),
        place_T=place_T,
        label_T=label_T,
        weight_T=weight_T,
        denominator=denominator,
        trace_ids=tuple(e.trace_id for e in examples),
        **_taught(examples, rows_of, total),
        **_rolled_out(examples, rows_of, total),
    )


def _taught(examples: Sequence[Example], rows_of: Sequence[slice], total: int) -> dict[str, Any]:
    """The teacher's streams, where every example has them; rows_of: where each example's completion is predicted."""
    tops = [e.top for e in examples if e.top is not None]
    if len(tops) < len(examples):
        return {}
    width = max((top.width for top in tops), default=0)
    found: dict[str, Any] = {
        "teacher_ids_TK": np.full((total, width), -1, np.int64),
        "teacher_logp_TK": np.full((total, width), -np.inf, np.float32),
        "teacher_tail_T": np.full(total, -np.inf, np.float32),
    }
    blends = [top for top in tops if isinstance(top, Blend)]
    if blends:
        num = blends[0].each_tail_CM.shape[1]
        found["each_logp_TMK"] = np.full((total, num, width), -np.inf, np.float32)
        found["each_tail_TM"] = np.full((total, num), -np.inf, np.float32)
    for top, rows in zip(tops, rows_of, strict=True):
        found["teacher_ids_TK"][rows], found["teacher_logp_TK"][rows] = top.dense(width)
        found["teacher_tail_T"][rows] = top.tail_T
        if isinstance(top, Blend):
            found["each_logp_TMK"][rows] = top.each(width)
            found["each_tail_TM"][rows] = top.each_tail_CM
    return found


def _rolled_out(
    examples: Sequence[Example], rows_of: Sequence[slice], total: int
) -> dict[str, Any]:
    """A rollout's streams, where every example is one."""
    if any(e.advantage is None for e in examples):
        return {}
    advantage_T, engine_logp_T = np.zeros((2, total), np.float32)
    for example, rows in zip(examples, rows_of, strict=True):
        advantage_T[rows], engine_logp_T[rows] = example.advantage, example.engine_logp
    return {"advantage_T": advantage_T, "engine_logp_T": engine_logp_T}


def _beside(
    examples: Sequence[Example], normalise: str, denominator: float, *, masked: bool
) -> Beside:
    """The readings of a batch's examples, packed one after another in the same order."""
    readings = [e.reading for e in examples if e.reading is not None]
    theirs = [
        Example(e.trace_id, r.prompt_ids, r.completion_ids)
        for e, r in zip(examples, readings, strict=True)
    ]
    batch = _batch([[one] for one in theirs], normalise, denominator, masked=masked)
    found = Alignment.concat([] if masked else [r.alignment for r in readings])
    counts = [r.alignment.num_spans for r in readings if not masked]
    each = [1.0 if normalise == "token" else 1.0 / max(count, 1) for count in counts]
    split_G = found.is_split()
    student_piece_M, teacher_piece_N = (
        np.flatnonzero((span_T >= 0) & np.append(split_G, False)[span_T])
        for span_T in (found.student_span_T, found.teacher_span_T)
    )
    return Beside(
        batch=batch,
        rows=batch.weight_T.nonzero()[0],
        student_start_G=found.student_start_G,
        teacher_start_G=found.teacher_start_G,
        split_G=split_G,
        student_piece_M=student_piece_M,
        student_span_M=found.student_span_T[student_piece_M],
        teacher_piece_N=teacher_piece_N,
        teacher_span_N=found.teacher_span_T[teacher_piece_N],
        weight_G=np.repeat(np.array(each, np.float32), counts),
        denominator=denominator,
    )
