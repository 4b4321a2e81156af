"""What the training loop consumes: steps of micro-batches, how long to train, and counts of the work done."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Protocol

from distill.training.batch import Batch

if TYPE_CHECKING:
    from distill.training.policy import Policy

ASSUMED_STEPS = 50
"""The number of steps assumed for a FLOP budget until the first step shows the cost of one."""


@dataclass(slots=True)
class WorkCounts:
    """Counts of a stage's work, from which its FLOPs follow.

    tokens through the body and head_tokens through the head, forward and backward, with the sum over traces of
    length squared; scored_*: the same, forward only; teacher_*: through a teacher's engine or a teacher with another
    tokenizer; ranked_head_tokens: through the head, forward only, to choose those that are learned; prompt_tokens and generated_tokens of completions sampled.
    """

    tokens: int = 0
    head_tokens: int = 0
    squared_lengths: int = 0
    scored_tokens: int = 0
    scored_head_tokens: int = 0
    scored_squared_lengths: int = 0
    teacher_tokens: int = 0
    teacher_head_tokens: int = 0
    teacher_squared_lengths: int = 0
    ranked_head_tokens: int = 0
    completions: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    samples_failed: int = 0
    judge_seconds: float = 0.0
    steps: int = 0
    bad_steps: int = 0
    seconds: float = 0.0

    def add_batch(self, batch: Batch, num_rows: int, num_chosen: int | None = None) -> None:
        """Count the training on a micro-batch, of which num_rows tokens have a weight; one without any only fills in.

        num_chosen: the number of tokens that the loss chose among them in the step; None = it took them all.
        """
        if not num_rows:
            return
        self.tokens += len(batch.ids_T)
        if num_chosen is None:
            self.head_tokens += num_rows
        else:
            self.head_tokens += num_chosen
            self.ranked_head_tokens += num_rows
        self.squared_lengths += batch.squared_lengths
        if batch.cross_tokenizer is not None:
            self.teacher_tokens += len(batch.cross_tokenizer.batch.ids_T)
            self.teacher_head_tokens += len(batch.cross_tokenizer.rows)
            self.teacher_squared_lengths += batch.cross_tokenizer.batch.squared_lengths

    def add(self, other: WorkCounts) -> None:
        for f in fields(WorkCounts):
            setattr(self, f.name, getattr(self, f.name) + getattr(other, f.name))


@dataclass(frozen=True, slots=True)
class Step:
    """One optimiser step's work.

    batches: micro-batches, numpy; without any, the step's gradient is zero. metrics: logged beside the loss. counts: the
    work of making the step. resumable: whether training can resume after this step.
    """

    batches: list[Batch]
    metrics: Mapping[str, float] = field(default_factory=dict)
    counts: WorkCounts = field(default_factory=WorkCounts)
    resumable: bool = True


class Source(Protocol):
    """(first step, the model in training) -> the steps from there on; a lazy iterator: each step sees the updated weights."""

    def __call__(self, start: int, policy: Policy, /) -> Iterator[Step]: ...


@dataclass(frozen=True, slots=True)
class Length:
    """Train for a number of optimiser steps."""

    num_steps: int

    def steps(self, counts: WorkCounts) -> int:
        """Return the number of steps."""
        return self.num_steps

    def reached(self, counts: WorkCounts) -> bool:
        return counts.steps >= self.num_steps


@dataclass(frozen=True, slots=True)
class Budget:
    """Train until a number of FLOPs is spent, as `count` computes them; the step nearest to it is the last."""

    flops: float
    count: Callable[[WorkCounts], float]

    def steps(self, counts: WorkCounts) -> int:
        """Estimate the total number of steps from the work done so far."""
        if not counts.steps:
            return ASSUMED_STEPS
        return max(counts.steps, round(self.flops / self.count(counts) * counts.steps))

    def reached(self, counts: WorkCounts) -> bool:
        if not counts.steps:
            return False
        spent = self.count(counts)
        return spent + spent / counts.steps / 2 >= self.flops
