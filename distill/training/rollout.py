"""Rollouts: problems through an engine, rewards and advantages, into the same batches that stored traces become.

In: an engine, problems, a judge and rewards (all handed in: this room knows none of theirs). Out: `Step`s for the
loop, with `advantage_T`, `engine_logp_T` and, where the loss needs them, `old_logp_T` and `ref_logp_T`. A rollout is
prompts x mini_batches problems with group_size completions each; it gives mini_batches x passes steps. With one step
a rollout the policy that learns is the one that wrote: no old log-probabilities, no forward pass for them.
A rollout depends on its number, the seed and the weights only, so a resumed run writes the same ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np

from distill.recipe import GrpoStage
from distill.records import (
    Array,
    Batch,
    Completion,
    Engine,
    Group,
    Problem,
    Request,
    Scores,
    Template,
    Verdict,
    draw_seed,
)
from distill.training.loop import Step, Tally
from distill.training.objective import PolicyObjective, advantages
from distill.training.packing import Example, pack
from distill.training.policy import Policy

JUDGES = 4
"""Threads that wait for verdicts while the engine goes on."""


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """A problem as the engine is asked it."""

    problem: Problem
    ids: Array


@dataclass(slots=True, eq=False)
class Sampled:
    """A prompt's completions, judged and rewarded. advantage [G]; counted [G]: takes part in the loss."""

    prompt: Prompt
    completions: list[Completion]
    group: Group
    scores: Scores
    advantage: Array
    counted: Array


@dataclass(slots=True)
class Rollout:
    """What one call of the sampler gave, and what it took."""

    sampled: list[Sampled]
    num_groups: int = 0
    num_all_equal: int = 0
    generate_seconds: float = 0.0
    reward_seconds: float = 0.0
    tally: Tally = field(default_factory=Tally)


@dataclass(frozen=True, slots=True, eq=False)
class Rollouts:
    """A source of steps (see loop.Source).

    prompts(rollout, attempt, num): the problems to sample; attempt counts from 0 where groups are sampled again.
    judge: the task's verdict on a completion's text, the template's prefill in front. decode: completion ids to
    text. rewards: scores a group each. watch(step, rollout): called for each rollout before it is learned from.
    Raises RuntimeError when the engine answers with other weights than it was given.
    """

    engine: Engine
    config: GrpoStage
    objective: PolicyObjective
    template: Template
    prompts: Callable[[int, int, int], Sequence[Prompt]]
    judge: Callable[[Problem, str, bool], Verdict]
    decode: Callable[[Array], str]
    rewards: Callable[[Sequence[Group]], list[Scores]]
    seed: int
    watch: Callable[[int, Rollout], None] | None = None

    def steps(self, start: int, policy: Policy) -> Iterator[Step]:
        """Optimiser steps from `start` on, which begins a rollout."""
        config = self.config
        a_rollout = config.mini_batches * config.passes
        for first in range(start, config.steps, a_rollout):
            if config.reference_every and first and first % config.reference_every == 0:
                policy.refresh_reference()
            began = time.perf_counter()
            self.engine.sync(policy.weights(), version=first)
            sync_seconds = time.perf_counter() - began
            rollout = self.sample(first // a_rollout, version=first)
            if self.watch is not None:
                self.watch(first + 1, rollout)
            metrics = _metrics(rollout) | {"sync_seconds": sync_seconds}
            began = time.perf_counter()
            mini_batches = self.mini_batches(rollout, first // a_rollout, policy)
            metrics["prepare_seconds"] = time.perf_counter() - began
            for number in range(a_rollout):
                yield Step(
                    mini_batches[number % config.mini_batches],
                    metrics,
                    rollout.tally if number == 0 else Tally(),
                    resumable=number == a_rollout - 1,
                )

    # ------------------------------------------------------------------------------------------- sampling

    def sample(self, index: int, version: int) -> Rollout:
        """Rollout `index`: enough groups for its mini-batches, those with nothing to learn from sampled again."""
        wanted = self.config.prompts * self.config.mini_batches
        rollout = Rollout([])
        equal: list[Sampled] = []
        for attempt in range(self.objective.resample):
            missing = wanted - len(rollout.sampled)
            for sampled in self._groups(index, attempt, missing, version, rollout):
                keep = self.objective.resample == 1 or sampled.advantage.any()
                (rollout.sampled if keep else equal).append(sampled)
            if len(rollout.sampled) >= wanted:
                break
        rollout.sampled += equal[: wanted - len(rollout.sampled)]
        return rollout

    def _groups(
        self, index: int, attempt: int, num: int, version: int, rollout: Rollout
    ) -> list[Sampled]:
        prompts = self.prompts(index, attempt, num)
        began = time.perf_counter()
        completions, texts, verdicts = self._generate(prompts, index, attempt, version, rollout)
        rollout.generate_seconds += time.perf_counter() - began
        began = time.perf_counter()
        groups = [
            Group(
                problem=prompt.problem,
                template=self.template,
                texts=tuple(texts[n]),
                num_tokens=tuple(len(c.ids_T) for c in completions[n]),
                finished=tuple(c.finish_reason == "stop" for c in completions[n]),
                verdicts=tuple(verdict.result() for verdict in verdicts[n]),
                max_tokens=self.config.sampling.max_tokens,
                seed=draw_seed(self.seed, index, attempt, "reward"),
            )
            for n, prompt in enumerate(prompts)
        ]
        scores = self.rewards(groups)
        sampled = [
            self._advantages(*parts)
            for parts in zip(prompts, completions, groups, scores, strict=True)
        ]
        seconds = time.perf_counter() - began
        rollout.reward_seconds += seconds
        rollout.tally.verifier_seconds += seconds
        rollout.num_groups += len(sampled)
        rollout.num_all_equal += sum(not s.advantage.any() for s in sampled)
        return sampled

    def _generate(
        self, prompts: Sequence[Prompt], index: int, attempt: int, version: int, rollout: Rollout
    ) -> tuple[list[list[Completion]], list[list[str]], list[list[Future[Verdict]]]]:
        """Completions, texts and verdicts to come, by prompt and sample; verdicts are made while the engine goes on."""
        size = self.config.group_size
        requests = [
            Request(
                f"{n}/{sample}",
                prompt.ids,
                draw_seed(self.seed, index, attempt, prompt.problem.problem_id, sample, "rollout"),
            )
            for n, prompt in enumerate(prompts)
            for sample in range(size)
        ]
        found: dict[str, tuple[Completion, str, Future[Verdict]]] = {}
        with ThreadPoolExecutor(JUDGES) as pool:
            for completion in self.engine.generate(requests, self.config.sampling.record()):
                if completion.version != version:
                    raise RuntimeError(
                        f"the engine wrote a completion with weights of version {completion.version}; the policy is at "
                        f"{version}."
                    )
                n = int(completion.request_id.partition("/")[0])
                text = self.template.prefill + self.decode(completion.ids_T)
                finished = completion.finish_reason == "stop"
                verdict = pool.submit(self.judge, prompts[n].problem, text, finished)
                found[completion.request_id] = completion, text, verdict
                rollout.tally.completions += 1
                rollout.tally.prompt_tokens += len(prompts[n].ids)
                rollout.tally.generated_tokens += len(completion.ids_T)
        rows = [[found[f"{n}/{sample}"] for sample in range(size)] for n in range(len(prompts))]
        completions, texts, verdicts = (
            [[row[part] for row in group] for group in rows] for part in range(3)
        )
        return completions, texts, verdicts  # type: ignore[return-value]

    def _advantages(
        self, prompt: Prompt, completions: list[Completion], group: Group, scores: Scores
    ) -> Sampled:
        counted = np.ones(len(group), bool)
        if self.objective.truncated == "mask":
            counted = np.array(group.finished, bool)
        known = [
            total if counts else None for total, counts in zip(scores.total, counted, strict=True)
        ]
        advantage = advantages(known, scale=self.objective.scale)
        return Sampled(prompt, completions, group, scores, advantage, counted)

    # -------------------------------------------------------------------------------------------- batches

    def mini_batches(self, rollout: Rollout, index: int, policy: Policy) -> list[list[Batch]]:
        """The rollout's problems, shuffled and split; each part packed, with the log-probabilities the loss reads.

        Completions without an advantage and without a KL have no gradient, so they are not computed; the denominators
        count them all the same.
        """
        config = self.config
        order = np.random.default_rng(draw_seed(self.seed, index, "order")).permutation(
            len(rollout.sampled)
        )
        several = config.mini_batches * config.passes > 1
        parts = []
        for part in np.array_split(order, config.mini_batches):
            chosen = [rollout.sampled[n] for n in part]
            batches = pack(
                [
                    example
                    for sampled in chosen
                    for example in self._examples(sampled, f"rollout-{index}")
                ],
                micro_tokens=config.micro_tokens,
                normalise="sequence" if self.objective.normalise == "sequence" else "token",
                denominator=self._denominator(chosen),
            )
            for n, batch in enumerate(batches):
                if several:
                    batch = replace(batch, old_logp_T=policy.logp(batch))
                    _count_scored(rollout.tally, batch)
                if self.objective.reference:
                    batch = replace(batch, ref_logp_T=policy.reference_logp(batch))
                    _count_scored(rollout.tally, batch)
                batches[n] = batch
            parts.append(batches)
        return parts

    def _examples(self, sampled: Sampled, rollout: str) -> Iterator[Example]:
        for n, completion in enumerate(sampled.completions):
            learns = sampled.advantage[n] != 0 or self.objective.reference
            if sampled.counted[n] and learns and len(completion.ids_T):
                yield Example(
                    f"{rollout}/{sampled.prompt.problem.problem_id}/{n}",
                    sampled.prompt.ids,
                    completion.ids_T,
                    advantage=float(sampled.advantage[n]),
                    engine_logp=completion.logprob_T,
                )

    def _denominator(self, chosen: Sequence[Sampled]) -> float:
        """Of one optimiser step: completions, their tokens, or completions x max_tokens; at least 1."""
        lengths = [
            length
            for sampled in chosen
            for length, counts in zip(sampled.group.num_tokens, sampled.counted, strict=True)
            if counts
        ]
        match self.objective.normalise:
            case "fixed":
                num = sum(len(sampled.group) for sampled in chosen)
                return float(num * self.config.sampling.max_tokens)
            case "token":
                return max(float(sum(lengths)), 1.0)
            case "sequence":
                return max(float(len(lengths)), 1.0)


def _count_scored(tally: Tally, batch: Batch) -> None:
    tally.scored_tokens += len(batch.ids_T)
    tally.scored_head_tokens += int(np.count_nonzero(batch.weight_T))
    tally.scored_squared_lengths += batch.squared_lengths


def _metrics(rollout: Rollout) -> dict[str, float]:
    """What one watches in RL, over all completions of the rollout that take part.

    reward and reward/<name>: means of what could be judged, left out where nothing could. length: mean tokens. truncated: share cut at the
    limit. entropy: mean of -log pi at the sampled tokens, which is the policy's entropy in expectation, nats a
    token. all_equal: share of the sampled groups without any advantage. unjudged: share of completions without
    a total.
    """
    groups = [s.group for s in rollout.sampled]
    completions = [c for s in rollout.sampled for c in s.completions]
    totals = [t for s in rollout.sampled for t in s.scores.total]
    tokens = sum(len(c.ids_T) for c in completions)
    scores = {"reward": totals}
    for name in rollout.sampled[0].scores.parts:
        scores[f"reward/{name}"] = [v for s in rollout.sampled for v in s.scores.parts[name]]
    known = {key: [v for v in values if v is not None] for key, values in scores.items()}
    metrics = {key: float(np.mean(values)) for key, values in known.items() if values}
    return metrics | {
        "length": tokens / len(completions),
        "truncated": 1.0 - float(np.mean([f for g in groups for f in g.finished])),
        "entropy": -float(sum(c.logprob_T.sum(dtype=np.float64) for c in completions)) / tokens,
        "all_equal": rollout.num_all_equal / rollout.num_groups,
        "groups": float(rollout.num_groups),
        "unjudged": sum(t is None for t in totals) / len(totals),
        "generate_seconds": rollout.generate_seconds,
        "reward_seconds": rollout.reward_seconds,
    }
