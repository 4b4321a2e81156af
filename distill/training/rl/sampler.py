"""The policy's own completions, by problem, each judged: what every source that learns from rollouts starts with.

Left out on purpose: what is made of them (`rollout`: rewards and advantages; `on_policy`: a teacher's opinion).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from distill.records import (
    JUDGES,
    Array,
    Completion,
    Engine,
    Group,
    Problem,
    Request,
    Sampling,
    Template,
    Verdict,
    draw_seed,
)
from distill.training.loop import WorkCounts


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """A problem as the engine is asked it."""

    problem: Problem
    ids: Array


@dataclass(frozen=True, slots=True, eq=False)
class Written:
    """A prompt's completions, and what rewards see of them."""

    prompt: Prompt
    completions: list[Completion]
    group: Group


@dataclass(frozen=True, slots=True, eq=False)
class Sampler:
    """Asks an engine for groups of completions.

    prompts(rollout, attempt, num): the problems to take; attempt counts from 0 where groups are sampled again.
    judge: the task's verdict on a completion's text, the template's prefill in front. decode: completion ids to
    text. Draws depend on (seed, rollout, attempt, problem, sample) only.
    """

    engine: Engine
    template: Template
    prompts: Callable[[int, int, int], Sequence[Prompt]]
    judge: Callable[[Problem, str, bool], Verdict]
    decode: Callable[[Array], str]
    sampling: Sampling
    group_size: int
    seed: int

    def groups(self, index: int, num: int, *, version: int, tally: WorkCounts, attempt: int = 0) -> list[Written]:
        """`num` groups of rollout `index`, what they took added to the tally.

        Raises RuntimeError when the engine answers with weights of another version.
        """
        prompts = self.prompts(index, attempt, num)
        requests = [
            Request(
                f"{n}/{sample}",
                prompt.ids,
                draw_seed(self.seed, index, attempt, prompt.problem.problem_id, sample, "rollout"),
            )
            for n, prompt in enumerate(prompts)
            for sample in range(self.group_size)
        ]
        found: dict[str, tuple[Completion, str, Future[Verdict]]] = {}
        # Verdicts are made while the engine goes on.
        with ThreadPoolExecutor(JUDGES) as pool:
            for completion in self.engine.generate(requests, self.sampling):
                if completion.version != version:
                    raise RuntimeError(
                        f"the engine wrote a completion with weights of version {completion.version}; the policy is at "
                        f"{version}."
                    )
                prompt = prompts[int(completion.request_id.partition("/")[0])]
                text = self.template.prefill + self.decode(completion.ids_T)
                finished = completion.finish_reason == "stop"
                verdict = pool.submit(self.judge, prompt.problem, text, finished)
                found[completion.request_id] = completion, text, verdict
                tally.completions += 1
                tally.prompt_tokens += len(prompt.ids)
                tally.generated_tokens += len(completion.ids_T)
        return [
            self._written(
                prompt,
                [found[f"{n}/{sample}"] for sample in range(self.group_size)],
                draw_seed(self.seed, index, attempt, "reward"),
            )
            for n, prompt in enumerate(prompts)
        ]

    def _written(self, prompt: Prompt, rows: list[tuple[Completion, str, Future[Verdict]]], seed: int) -> Written:
        completions = [completion for completion, _, _ in rows]
        group = Group(
            problem=prompt.problem,
            template=self.template,
            texts=tuple(text for _, text, _ in rows),
            num_tokens=tuple(len(c.ids_T) for c in completions),
            finished=tuple(c.finish_reason == "stop" for c in completions),
            verdicts=tuple(verdict.result() for _, _, verdict in rows),
            max_tokens=self.sampling.max_tokens,
            seed=seed,
        )
        return Written(prompt, completions, group)


def written_metrics(groups: Sequence[Written]) -> dict[str, float]:
    """length: mean tokens. clipped_ratio: share cut at the limit. entropy: mean of -log pi at the sampled tokens, which is
    the policy's entropy in expectation, nats a token. correct: share of those that could be judged.
    """
    completions = [c for g in groups for c in g.completions]
    tokens = sum(len(c.ids_T) for c in completions)
    verdicts = [v.correct for g in groups for v in g.group.verdicts if v.correct is not None]
    metrics = {
        "length": tokens / len(completions),
        "clipped_ratio": sum(c.finish_reason == "length" for c in completions) / len(completions),
        "entropy": -float(sum(c.logprob_T.sum(dtype="float64") for c in completions)) / tokens,
    }
    return metrics | ({"correct": sum(verdicts) / len(verdicts)} if verdicts else {})
