"""Pack traces into batches: the one place where labels and distributions are shifted against the inputs.

An `Example` is a prompt and a completion in ids, optionally with the teacher's distribution over each completion token.
`pack` lays the examples of one optimiser step end to end into micro-batches of about `micro_tokens`:
positions restart at each trace, attention does not cross (`doc_offsets`), only completion tokens have a weight, and
the final EOS is among them. Every micro-batch carries the same denominator, that of the whole step, so any
split into micro-batches gives the same gradient.

Traces whose prompts have a common prefix share it: the prefix is computed once, as a doc of its own, and the traces' docs
name it as their `parent`. A prefix may have a parent itself: the system prompt of all traces, then one question's prompt,
then its completions. Results are identical; only the amount of compute changes.

Alignment: input token t predicts token t + 1. Completion token j (of a prompt of P tokens) stands at input
P + j and is predicted at row P + j - 1, which gets its label, its weight and the teacher's row j.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Protocol

import numpy as np

from distill.records import Array, Draws, TopK, Traces
from distill.tail_draws import weights
from distill.training.batch import Batch, CrossTokenizerBatch
from distill.training.loss.cross_tokenizer.alignment import Alignment, RetokenizedTrace
from distill.training.loss.multi_teacher import TeacherMixture
from distill.training.prefix_sharing import ExampleGroup, ExampleWithPrefix, SharedPrefix, group_by_prefix, num_tokens
from distill.training.rank_split import ATTENTION, split

WINDOW = 2048
"""Traces whose work is divided over processes at a time."""


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One trace to learn from: prompt_ids int [P], completion_ids int [C], and what a loss needs of it.

    top: distributions of one teacher or several, C rows each, or None. advantage (rollouts): one number, or one a
    completion token. draws: from the teacher's tail, with draw_mass [C], the mass that one draw of a position stands for.
    teacher_logp: log-probability of each completion token under the teacher, float32 [C]. engine_logp (rollouts): the engine's log-probability of each completion token, float32 [C].
    retokenized: the trace re-tokenised for a teacher with another tokenizer.
    weighted: bool [C], the tokens that may have a weight; None = all. num_weighted: the number of those that have one in the loss;
    None = as many as weighted. A loss that chooses them itself, in the step, chooses as many.
    """

    trace_id: str
    prompt_ids: Array
    completion_ids: Array
    top: TopK | TeacherMixture | None = None
    advantage: float | Array | None = None
    engine_logp: Array | None = None
    retokenized: RetokenizedTrace | None = None
    draws: Draws | None = None
    draw_mass: Array | None = None
    teacher_logp: Array | None = None
    weighted: Array | None = None
    num_weighted: int | None = None

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)

    @property
    def num_learned(self) -> int:
        """The number of completion tokens that count in the loss."""
        if self.num_weighted is not None:
            return self.num_weighted
        return len(self.completion_ids) if self.weighted is None else int(self.weighted.sum())

    def first(self, num: int) -> Example:
        """Return the example with the first `num` tokens of its completion, and what it holds of those."""
        changes: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, np.ndarray) and f.name != "prompt_ids":
                changes[f.name] = value[:num]
            elif hasattr(value, "slice"):  # distributions
                changes[f.name] = value.slice(0, num)
        return replace(self, **changes)


class Source(Protocol):
    """Examples to train on; an epoch's sequence is the same at every call."""

    @property
    def num_examples(self) -> int: ...

    @property
    def fingerprint(self) -> str: ...

    def epoch(self, index: int, skip: int = 0) -> Iterator[Example]:
        """Yield an epoch's examples in that epoch's order, without the first `skip`."""
        ...

    def complete(self, examples: list[Example]) -> list[Example]:
        """Add what `epoch` leaves out where several processes train: distributions, which only their owner reads."""
        ...


def examples_of(traces: Traces, *, with_top: bool = True, tail_draws: int = 0) -> Iterator[Example]:
    """The traces of a block as examples, with what was read of their distributions. tail_draws: of the traces' metadata."""
    has_logprob = bool(traces.logprob.offsets[-1])
    for n, trace_id in enumerate(traces.trace_id):
        top = traces.top_of(n) if with_top else None
        draws = traces.draws_of(n) if with_top else None
        yield Example(
            trace_id,
            traces.prompt_ids[n],
            traces.completion_ids[n],
            top,
            draws=draws,
            draw_mass=weights(top.tail_T, tail_draws) if top is not None and draws is not None else None,
            teacher_logp=traces.logprob[n] if with_top and has_logprob else None,
        )


def steps(source: Source, *, batch_traces: int, start: int = 0) -> Iterator[list[Example]]:
    """Yield the examples of optimiser steps start, start + 1, … without end; an epoch's last step may be smaller."""
    first, within = divmod(start, steps_per_epoch(source.num_examples, batch_traces))
    for epoch in itertools.count(first):
        examples = source.epoch(epoch, skip=within * batch_traces)
        while taken := list(itertools.islice(examples, batch_traces)):
            yield taken
        within = 0


def steps_per_epoch(num_examples: int, batch_traces: int) -> int:
    return -(-num_examples // batch_traces)


def packed_steps(
    source: Source,
    *,
    batch_traces: int,
    micro_tokens: int,
    normalise: Literal["token", "sequence"] = "token",
    start: int = 0,
    rank: int = 0,
    world: int = 1,
    attention: float = ATTENTION,
) -> Iterator[list[Batch]]:
    """Yield one process's micro-batches of optimiser steps start, start + 1, … without end.

    With several processes the work of about WINDOW traces is divided ahead, so that a process reads its own ones at once.
    """
    every = steps(source, batch_traces=batch_traces, start=start)
    ahead = max(1, WINDOW // batch_traces) if world > 1 else 1
    while window := list(itertools.islice(every, ahead)):
        mine = [e for examples in window for e in split(examples, world, attention)[rank]] if world > 1 else []
        read = {example.trace_id: example for example in source.complete(mine)}

        def complete(examples: list[Example], read: dict[str, Example] = read) -> list[Example]:
            if all(example.trace_id in read for example in examples):
                return [read[example.trace_id] for example in examples]
            return source.complete(examples)

        for examples in window:
            yield pack(
                examples,
                micro_tokens=micro_tokens,
                normalise=normalise,
                rank=rank,
                world=world,
                attention=attention,
                complete=complete,
            )


def pack(
    examples: Sequence[Example],
    *,
    micro_tokens: int,
    normalise: Literal["token", "sequence"] = "token",
    denominator: float | None = None,
    rank: int = 0,
    world: int = 1,
    attention: float = ATTENTION,
    complete: Callable[[list[Example]], list[Example]] = list,
) -> list[Batch]:
    """Pack the examples of one optimiser step into one process's micro-batches (numpy).

    normalise "token": every completion token that counts has weight 1; "sequence": every trace has weight 1, spread over them.
    denominator: None = the sum of all weights.
    With several processes each gets its share of the work (`split`), and all get equally many micro-batches: a process
    with fewer gets empty ones (weight 0), so that ranks stay in step. complete: adds to this process's examples what was
    not read for planning.
    An example longer than micro_tokens has a micro-batch of its own. For re-tokenised examples (all or none) the spans
    of text between common cuts take the place of tokens.
    """
    if denominator is None:
        counts = [e.num_learned for e in examples]
        denominator = float(sum(counts) if normalise == "token" else np.count_nonzero(counts))
    spans = [e.retokenized.alignment.num_spans for e in examples if e.retokenized is not None]
    num_spans = float(sum(spans) if normalise == "token" else np.count_nonzero(spans))
    shares = split(examples, world, attention) if world > 1 else [list(examples)]
    num_batches = max((len(_bins(group_by_prefix(share, micro_tokens), micro_tokens)) for share in shares), default=0)
    mine = complete(shares[rank])
    bins = _bins(group_by_prefix(mine, micro_tokens), micro_tokens)
    filler: list[Example] = []
    if len(bins) < num_batches:
        filler = [min(mine, key=len)] if mine else complete([min(examples, key=len)])
        bins += [[] for _ in range(num_batches - len(bins))]
    batches = []
    for chosen in bins:
        group = chosen or [ExampleWithPrefix(each) for each in filler]
        batch = _batch(group, normalise, max(denominator, 1.0), masked=not chosen)
        if spans:
            together = [placed.example for placed in group]
            cross_tokenizer = _cross_tokenizer(together, normalise, max(num_spans, 1.0), masked=not chosen)
            batch = replace(batch, cross_tokenizer=cross_tokenizer)
        batches.append(batch)
    return batches


def _bins(groups: Sequence[ExampleGroup], micro_tokens: int) -> list[ExampleGroup]:
    """Put groups into micro-batches, first-fit decreasing; ties keep their order, so the result is deterministic."""
    bins: list[ExampleGroup] = []
    room: list[int] = []
    for group in sorted(groups, key=num_tokens, reverse=True):
        size = num_tokens(group)
        fitting = next((i for i, left in enumerate(room) if left >= size), None)
        if fitting is None:
            bins.append([])
            room.append(micro_tokens)
            fitting = len(bins) - 1
        bins[fitting] += group
        room[fitting] -= size
    return bins


def _batch(group: ExampleGroup, normalise: str, denominator: float, *, masked: bool) -> Batch:
    """Build one micro-batch: a doc for each example, then one for each shared prefix."""
    prefixes = list(dict.fromkeys(prefix for placed in group for prefix in placed.prefixes()))
    index: dict[SharedPrefix | None, int] = {p: n for n, p in enumerate(prefixes, len(group))}
    index[None] = -1
    docs = [np.concatenate([p.example.prompt_ids, p.example.completion_ids])[p.prefix_length :] for p in group]
    starts = [placed.prefix_length for placed in group]
    docs += [prefix.ids for prefix in prefixes]
    starts += [prefix.end - len(prefix.ids) for prefix in prefixes]
    parent = [index[p.prefix] for p in group] + [index[p.parent] for p in prefixes]
    lengths = [len(ids) for ids in docs]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    total = int(offsets[-1])
    ids_T = np.concatenate([np.empty(0, np.int64), *docs]).astype(np.int64)
    label_T = np.zeros(total, np.int64)
    weight_T, place_T = np.zeros(total, np.float32), np.zeros(total, np.int64)
    examples, rows_of = [placed.example for placed in group], []
    for placed, start, stop in zip(group, offsets, offsets[1:], strict=False):
        example, num = placed.example, len(placed.example.completion_ids)
        if num and not len(example.prompt_ids):
            raise ValueError(
                f"trace {example.trace_id}: an empty prompt leaves nothing to predict the first token from"
            )
        label_T[start : stop - 1] = ids_T[start + 1 : stop]
        rows = slice(stop - num - 1, stop - 1)
        if not masked:
            each = 1.0 if normalise == "token" else 1.0 / max(example.num_learned, 1)
            weight_T[rows] = each if example.weighted is None else np.where(example.weighted, each, 0.0)
        place_T[rows] = np.arange(num)
        rows_of.append(rows)
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
        **_teacher_fields(examples, rows_of, total),
        **_tail_fields(examples, rows_of, total),
        **_rollout_fields(examples, rows_of, total),
    )


def _teacher_fields(examples: Sequence[Example], rows_of: Sequence[slice], total: int) -> dict[str, Any]:
    """Return the teacher's streams if every example has them. rows_of: the rows that predict each example's completion."""
    tops = [e.top for e in examples if e.top is not None]
    if len(tops) < len(examples):
        return {}
    width = max((top.width for top in tops), default=0)
    fields: dict[str, Any] = {
        "teacher_ids_TK": np.full((total, width), -1, np.int64),
        "teacher_logp_TK": np.full((total, width), -np.inf, np.float32),
        "teacher_tail_T": np.full(total, -np.inf, np.float32),
    }
    mixtures = [top for top in tops if isinstance(top, TeacherMixture)]
    if mixtures:
        num = mixtures[0].each_tail_CM.shape[1]
        fields["each_logp_TMK"] = np.full((total, num, width), -np.inf, np.float32)
        fields["each_tail_TM"] = np.full((total, num), -np.inf, np.float32)
    for top, rows in zip(tops, rows_of, strict=True):
        fields["teacher_ids_TK"][rows], fields["teacher_logp_TK"][rows] = top.dense(width)
        fields["teacher_tail_T"][rows] = top.tail_T
        if isinstance(top, TeacherMixture):
            fields["each_logp_TMK"][rows] = top.each(width)
            fields["each_tail_TM"][rows] = top.each_tail_CM
    return fields


def _tail_fields(examples: Sequence[Example], rows_of: Sequence[slice], total: int) -> dict[str, Any]:
    """Return the draws from the teacher's tail and its log-probabilities of the labels, where every example has them."""
    fields: dict[str, Any] = {}
    draws = [e.draws for e in examples if e.draws is not None]
    if examples and len(draws) == len(examples):
        width = max(each.width for each in draws)
        fields["draw_ids_TN"] = np.full((total, width), -1, np.int64)
        fields["draw_logp_TN"] = np.full((total, width), -np.inf, np.float32)
        fields["draw_mass_T"] = np.zeros(total, np.float32)
        for example, drawn, rows in zip(examples, draws, rows_of, strict=True):
            fields["draw_ids_TN"][rows], fields["draw_logp_TN"][rows] = drawn.dense(width)
            fields["draw_mass_T"][rows] = example.draw_mass
    if examples and all(e.teacher_logp is not None for e in examples):
        fields["teacher_label_T"] = np.zeros(total, np.float32)
        for example, rows in zip(examples, rows_of, strict=True):
            fields["teacher_label_T"][rows] = example.teacher_logp
    return fields


def _rollout_fields(examples: Sequence[Example], rows_of: Sequence[slice], total: int) -> dict[str, Any]:
    """Return a rollout's streams if every example has them."""
    if any(e.advantage is None for e in examples):
        return {}
    advantage_T, engine_logp_T = np.zeros((2, total), np.float32)
    for example, rows in zip(examples, rows_of, strict=True):
        advantage_T[rows], engine_logp_T[rows] = example.advantage, example.engine_logp
    return {"advantage_T": advantage_T, "engine_logp_T": engine_logp_T}


def _cross_tokenizer(
    examples: Sequence[Example], normalise: str, denominator: float, *, masked: bool
) -> CrossTokenizerBatch:
    """Pack the re-tokenised examples of a batch one after another, in the same order."""
    retokenized = [e.retokenized for e in examples if e.retokenized is not None]
    teacher_examples = [
        ExampleWithPrefix(Example(e.trace_id, r.prompt_ids, r.completion_ids))
        for e, r in zip(examples, retokenized, strict=True)
    ]
    batch = _batch(teacher_examples, normalise, denominator, masked=masked)
    found = Alignment.concat([] if masked else [r.alignment for r in retokenized])
    counts = [r.alignment.num_spans for r in retokenized if not masked]
    each = [1.0 if normalise == "token" else 1.0 / max(count, 1) for count in counts]
    split_G = found.is_split()
    student_piece_M, teacher_piece_N = (
        np.flatnonzero((span_T >= 0) & np.append(split_G, False)[span_T])
        for span_T in (found.student_span_T, found.teacher_span_T)
    )
    return CrossTokenizerBatch(
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
