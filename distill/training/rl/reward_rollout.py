"""Rollouts with rewards: the policy's completions and their advantages, as the loop's steps.

Every process samples and judges its share of a rollout's prompts; then all have all groups, and each trains on its share of
the work.

In: a sampler and rewards (`records` has their protocols). Out: `Step`s with `advantage_T`, `engine_logp_T` and, if the loss
needs them, `old_logp_T` and `ref_logp_T`. A rollout is prompts x mini_batches problems with group_size completions each; it
gives mini_batches x num_iterations steps. With one step a rollout the policy that learns is the one that sampled, so old
log-probabilities need no forward pass. A rollout depends only on its number, the seed and the weights, so a resumed run
makes the same ones.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from distill import world
from distill.recipe import GrpoStage
from distill.records import Array, GradedGroup, Group, GroupSampler, Scores, draw_seed, rest
from distill.training.batch import Batch
from distill.training.packing import Example, pack
from distill.training.policy import Policy
from distill.training.rank_split import ATTENTION
from distill.training.rl.advantages import PolicyObjective, advantages
from distill.training.rl.ahead import Journal, rollout_source
from distill.training.rl.completion_metrics import completion_metrics, count_completions
from distill.training.step import Step, WorkCounts


@dataclass(slots=True, eq=False)
class ScoredGroup:
    """A group with its scores. advantage [G]; counted [G] bool: whether a completion is part of the loss."""

    graded: GradedGroup
    scores: Scores
    advantage: Array
    counted: Array


@dataclass(slots=True)
class Rollout:
    """The groups of a rollout, and the work of making them.

    groups: those used for training. sampled: all, of every attempt.
    """

    groups: list[ScoredGroup]
    sampled: list[ScoredGroup] = field(default_factory=list)
    generate_seconds: float = 0.0
    reward_seconds: float = 0.0
    counts: WorkCounts = field(default_factory=WorkCounts)


@dataclass(frozen=True, slots=True, eq=False)
class RewardRollouts:
    """A source of steps (see loop.Source).

    rewards: returns one `Scores` a group. on_rollout(step, rollout): called for each rollout before training on it.
    attention: see `rank_split`. journal: of the sampler, if rollouts are sampled one ahead.
    """

    sampler: GroupSampler
    config: GrpoStage
    objective: PolicyObjective
    rewards: Callable[[Sequence[Group]], list[Scores]]
    seed: int
    on_rollout: Callable[[int, Rollout], None] | None = None
    attention: float = ATTENTION
    journal: Journal | None = None

    def steps(self, start: int, policy: Policy) -> Iterator[Step]:
        """Yield optimiser steps from `start` on, without end; `start` is the first step of a rollout."""
        config = self.config
        a_rollout = config.steps_a_rollout
        make = rollout_source(
            config, self.sampler, policy, self.journal, lambda index, version: self.sample(index, version=version)
        )
        for first in itertools.count(start, a_rollout):
            if config.reference_every and first and first % config.reference_every == 0:
                policy.sync_reference()
            rollout, made = make(first)
            rest(self.sampler.engine, config.engine.sleep)
            if self.on_rollout is not None:
                self.on_rollout(first + 1, rollout)
            metrics = _metrics(rollout) | made
            began = time.perf_counter()
            mini_batches = self.mini_batches(rollout, first // a_rollout, policy)
            metrics["prepare_seconds"] = time.perf_counter() - began
            for number in range(a_rollout):
                yield Step(
                    mini_batches[number % config.mini_batches],
                    metrics,
                    rollout.counts if number == 0 else WorkCounts(),
                    resumable=number == a_rollout - 1,
                )

    # ------------------------------------------------------------------------------------------- sampling

    def sample(self, index: int, version: int) -> Rollout:
        """Sample rollout `index`: enough groups for its mini-batches; groups without an advantage are sampled again."""
        wanted = self.config.prompts * self.config.mini_batches
        rollout = Rollout([])
        equal: list[ScoredGroup] = []
        for attempt in range(self.objective.resample):
            missing = wanted - len(rollout.groups)
            for scored in self._groups(index, attempt, missing, version, rollout):
                keep = self.objective.resample == 1 or scored.advantage.any()
                (rollout.groups if keep else equal).append(scored)
            if len(rollout.groups) >= wanted:
                break
        rollout.groups += equal[: wanted - len(rollout.groups)]
        return rollout

    def _groups(self, index: int, attempt: int, num: int, version: int, rollout: Rollout) -> list[ScoredGroup]:
        began = time.perf_counter()
        graded = self.sampler.groups(index, num, version=version, attempt=attempt)  # of this process's prompts
        count_completions(rollout.counts, graded)
        rollout.generate_seconds += time.perf_counter() - began
        began = time.perf_counter()
        scores = self.rewards([one.group for one in graded])
        scored = [self.score(one, s) for one, s in zip(graded, scores, strict=True)]
        seconds = time.perf_counter() - began
        rollout.reward_seconds += seconds
        rollout.counts.judge_seconds += seconds
        rollout.counts.samples_failed += sum(len(one.scores.total) for one in scored if one.scores.failed)
        scored = world.joined(scored)
        rollout.sampled += scored
        return scored

    def score(self, graded: GradedGroup, scores: Scores) -> ScoredGroup:
        """Return the group with its advantages, by the objective's conventions."""
        group = graded.group
        counted = np.ones(len(group), bool)
        if self.objective.mask_truncated:
            counted = np.array(group.finished, bool)
        known = [total if counts else None for total, counts in zip(scores.total, counted, strict=True)]
        advantage = advantages(known, scale=self.objective.scale)
        return ScoredGroup(graded, scores, advantage, counted)

    # -------------------------------------------------------------------------------------------- batches

    def mini_batches(self, rollout: Rollout, index: int, policy: Policy) -> list[list[Batch]]:
        """Shuffle, split and pack the rollout's groups, and add the log-probabilities that the loss reads.

        Completions without an advantage and without a KL have no gradient, so they are not computed; the denominators
        include them.
        """
        config = self.config
        order = np.random.default_rng(draw_seed(self.seed, index, "order")).permutation(len(rollout.groups))
        several = config.mini_batches * config.num_iterations > 1
        parts = []
        for part in np.array_split(order, config.mini_batches):
            chosen = [rollout.groups[n] for n in part]
            batches = pack(
                [example for scored in chosen for example in self._examples(scored, f"rollout-{index}")],
                micro_tokens=config.micro_tokens,
                normalise="sequence" if self.objective.normalise == "sequence" else "token",
                denominator=self._denominator(chosen),
                rank=world.rank(),
                world=world.size(),
                attention=self.attention,
            )
            for n, batch in enumerate(batches):
                if several:
                    batch = replace(batch, old_logp_T=policy.logp(batch))
                    _count_scored(rollout.counts, batch)
                if self.objective.reference:
                    batch = replace(batch, ref_logp_T=policy.reference_logp(batch))
                    _count_scored(rollout.counts, batch)
                batches[n] = batch
            parts.append(batches)
        return parts

    def _examples(self, scored: ScoredGroup, rollout: str) -> Iterator[Example]:
        for n, completion in enumerate(scored.graded.completions):
            learns = scored.advantage[n] != 0 or self.objective.reference
            if scored.counted[n] and learns and len(completion.ids_T):
                yield Example(
                    f"{rollout}/{scored.graded.prompt.problem.problem_id}/{n}",
                    scored.graded.prompt.ids,
                    completion.ids_T,
                    advantage=float(scored.advantage[n]),
                    engine_logp=completion.logprob_T,
                )

    def _denominator(self, chosen: Sequence[ScoredGroup]) -> float:
        """Return one step's denominator: completions, their tokens, or completions x max_tokens; at least 1."""
        lengths = [
            length
            for scored in chosen
            for length, is_counted in zip(scored.graded.group.num_tokens, scored.counted, strict=True)
            if is_counted
        ]
        match self.objective.normalise:
            case "fixed":
                num = sum(len(scored.graded.group) for scored in chosen)
                return float(num * self.config.sampling.max_tokens)
            case "token":
                return max(float(sum(lengths)), 1.0)
            case "sequence":
                return max(float(len(lengths)), 1.0)


def _count_scored(counts: WorkCounts, batch: Batch) -> None:
    if not batch.weight_T.any():  # it only keeps the processes in step
        return
    counts.scored_tokens += len(batch.ids_T)
    counts.scored_head_tokens += int(np.count_nonzero(batch.weight_T))
    counts.scored_squared_lengths += batch.squared_lengths


def _metrics(rollout: Rollout) -> dict[str, float]:
    """Compute a rollout's metrics: `completion_metrics`, and those of rewards, over all completions that were sampled.

    reward and reward/<name>: means of the known values, absent if there are none. frac_reward_zero_std: share of the
    sampled groups without any advantage. unjudged: share of completions without a total. kept/<metric>: the same over the groups
    that are trained on, where groups without an advantage were sampled again (DAPO): those are not like the others.
    """
    metrics = _quality(rollout.sampled)
    if len(rollout.groups) < len(rollout.sampled):
        metrics |= {f"kept/{key}": value for key, value in _quality(rollout.groups).items()}
    return metrics | {
        "frac_reward_zero_std": sum(not one.advantage.any() for one in rollout.sampled) / len(rollout.sampled),
        "groups": float(len(rollout.sampled)),
        "generate_seconds": rollout.generate_seconds,
        "reward_seconds": rollout.reward_seconds,
    }


def _quality(groups: Sequence[ScoredGroup]) -> dict[str, float]:
    totals = [t for s in groups for t in s.scores.total]
    scores = {"reward": totals}
    for name in groups[0].scores.parts:
        scores[f"reward/{name}"] = [v for s in groups for v in s.scores.parts[name]]
    known = {key: [v for v in values if v is not None] for key, values in scores.items()}
    return {
        **{key: float(np.mean(values)) for key, values in known.items() if values},
        **completion_metrics([s.graded for s in groups]),
        "unjudged": sum(t is None for t in totals) / len(totals),
    }
