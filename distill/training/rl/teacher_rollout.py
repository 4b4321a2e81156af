"""On-policy distillation: the student's own completions, scored by the teacher, as the loop's steps.

In: a sampler, and the teacher's engine or none. Out: `Step`s. Without an engine the batches hold the student's tokens only,
for a loss with a teacher in the trainer. With one they hold the teacher's top entries and tail, and an advantage a token,
log p - log q, whose policy gradient is that of the reverse KL. A share of the traces may be stored ones (GKD's lambda,
arXiv 2306.13649).
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np

from distill import world
from distill.recipe import OnPolicyStage
from distill.records import Array, Completion, Engine, GradedGroup, GroupSampler, Request, rest
from distill.training.loss.cross_tokenizer.alignment import Retokenizer
from distill.training.packing import Example, pack
from distill.training.policy import Policy
from distill.training.rank_split import ATTENTION
from distill.training.rl.ahead import Journal, rollout_source
from distill.training.rl.completion_metrics import completion_metrics, count_completions
from distill.training.step import Step, WorkCounts


@dataclass(slots=True, eq=False)
class TeacherRollout:
    """This process's completions of a step, and what the teacher's engine says of them (None without one)."""

    groups: list[GradedGroup]
    scored: list[list[Completion]] | None
    counts: WorkCounts
    generate_seconds: float
    score_seconds: float


@dataclass(frozen=True, slots=True, eq=False)
class TeacherRollouts:
    """A source of steps (see loop.Source), one rollout each.

    teacher: the engine that scores the completions (None: the loss does, in the trainer). retokenizer: for a
    teacher with another tokenizer; completions that it cannot re-tokenise are left out. offline(first, num):
    `num` stored traces from the `first` on, deterministic. on_rollout(step, groups): called for each rollout before training on it. attention: see
    `rank_split`. journal: of the sampler, if rollouts are sampled one ahead. Every process samples and scores its share of the
    prompts.
    """

    sampler: GroupSampler
    config: OnPolicyStage
    teacher: Engine | None = None
    retokenizer: Retokenizer | None = None
    offline: Callable[[int, int], list[Example]] | None = None
    on_rollout: Callable[[int, list[GradedGroup]], None] | None = None
    attention: float = ATTENTION
    journal: Journal | None = None

    def steps(self, start: int, policy: Policy) -> Iterator[Step]:
        """Yield optimiser steps from `start` on, without end."""
        make = rollout_source(self.config, self.sampler, policy, self.journal, self._sample)
        for step in itertools.count(start):
            made, metrics = make(step)
            groups, scored, counts = made.groups, made.scored, made.counts
            every = world.joined(groups)
            metrics |= completion_metrics(every) | {"generate_seconds": made.generate_seconds}
            if self.on_rollout is not None:
                self.on_rollout(step + 1, every)
            if scored is not None:
                metrics["score_seconds"] = made.score_seconds
                metrics["kl_teacher"] = _reverse_kl(every, world.joined(scored))
            of_groups = world.joined(self._examples(step, groups, scored))
            examples = [example for group in of_groups for example in group]
            if self.offline is not None and (num := self._num_offline(step)):
                size = self.config.group_size
                examples += self.offline(self._offline_before(step) * size, num * size)
            batches = pack(
                examples,
                micro_tokens=self.config.micro_tokens,
                rank=world.rank(),
                world=world.size(),
                attention=self.attention,
            )
            yield Step(batches, metrics, counts)

    def _num_offline(self, step: int) -> int:
        """The number of a step's prompts whose traces are stored ones; over the steps their share is `offline_share`."""
        return self._offline_before(step + 1) - self._offline_before(step)

    def _offline_before(self, step: int) -> int:
        return math.floor(step * self.config.prompts * Fraction(str(self.config.offline_share)))

    def _sample(self, step: int, version: int) -> TeacherRollout:
        """Sample a step's completions with the engine's weights, and let the teacher's engine score them."""
        counts = WorkCounts()
        began = time.perf_counter()
        groups = self.sampler.groups(step, self.config.prompts - self._num_offline(step), version=version)
        rest(self.sampler.engine, self.config.engine.sleep)
        count_completions(counts, groups)
        sampled = time.perf_counter()
        scored = self._score(groups, counts)
        return TeacherRollout(groups, scored, counts, sampled - began, time.perf_counter() - sampled)

    def _score(self, groups: Sequence[GradedGroup], counts: WorkCounts) -> list[list[Completion]] | None:
        if self.teacher is None:
            return None
        requests = [
            Request(f"{n}/{i}", group.prompt.ids, completion_ids=completion.ids_T)
            for n, group in enumerate(groups)
            for i, completion in enumerate(group.completions)
        ]
        top_k = 0 if self.config.loss.fn == "policy_gradient" else self.config.top_logprobs
        scored = iter(self.teacher.score(requests, top_k=top_k))
        found = [[next(scored) for _ in group.completions] for group in groups]
        counts.teacher_tokens += sum(len(r.prompt_ids) + len(_completion_ids(r)) for r in requests)
        counts.teacher_head_tokens += sum(len(_completion_ids(r)) for r in requests)
        return found

    def _examples(
        self, step: int, groups: Sequence[GradedGroup], scored: list[list[Completion]] | None
    ) -> list[list[Example]]:
        """Return the examples of each group."""
        return [
            [
                example
                for i, own in enumerate(group.completions)
                if (example := self._example(step, group, i, own, scored[n][i] if scored is not None else None))
                is not None
            ]
            for n, group in enumerate(groups)
        ]

    def _example(
        self, step: int, group: GradedGroup, index: int, own: Completion, scored: Completion | None
    ) -> Example | None:
        """Return a completion as an example; None if it cannot be re-tokenised for the teacher."""
        example = Example(f"rollout-{step}/{group.prompt.problem.problem_id}/{index}", group.prompt.ids, own.ids_T)
        if scored is None:
            if self.retokenizer is None:
                return example
            retokenized = self.retokenizer(group.prompt.problem.messages, own.ids_T)
            return None if retokenized is None else replace(example, retokenized=retokenized)
        if scored.top is not None:
            return replace(example, top=scored.top.truncate(top_k=self.config.top_logprobs, mass=self.config.mass))
        return replace(example, advantage=scored.logprob_T - own.logprob_T, engine_logp=own.logprob_T)


def _completion_ids(request: Request) -> Array:
    assert request.completion_ids is not None
    return request.completion_ids


def _reverse_kl(groups: Sequence[GradedGroup], scored: Sequence[Sequence[Completion]]) -> float:
    """Mean over the sampled tokens of log q - log p, an estimate of the reverse KL, nats a token."""
    gaps = [
        own.logprob_T - teacher.logprob_T
        for group, completions in zip(groups, scored, strict=True)
        for own, teacher in zip(group.completions, completions, strict=True)
    ]
    return float(np.concatenate(gaps).mean(dtype=np.float64))
