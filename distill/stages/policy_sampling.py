"""Sample groups of the policy's completions for grpo and on_policy: the engine, and the choice of problems."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from distill import engines, models, world
from distill.recipe import EngineConfig, PolicyStage
from distill.records import Array, Completion, Engine, GradedGroup, Prompt, Sampling, Task, UserError, draw_seed
from distill.stages import beside
from distill.stages.context import Context
from distill.stages.sampling import (
    CompletionRequest,
    GradedCompletion,
    Grader,
    context_length,
    context_limit,
    fitting_prompts,
    sample_completions,
)
from distill.stages.shown_completions import ShownCompletions
from distill.training.rl.ahead import Journal

UNKNOWN_ROLLOUTS = 64
"""With a FLOP budget: the number of rollouts with new problems; later rollouts repeat these problems."""


@dataclass(frozen=True, slots=True, eq=False)
class PolicySampler:
    """A `GroupSampler` on an engine; completions are judged while the engine generates.

    prompts(rollout, attempt, num): the prompts to use, of which a process samples its share. Draws depend only on (seed,
    rollout, attempt, problem, sample); where a prompt is used twice, the samples of the second time are numbered on, so that no
    completion is drawn twice. journal: keeps the completions, if rollouts are sampled one ahead. show: called with each rollout.
    """

    engine: Engine
    grader: Grader
    prompts: Callable[[int, int, int], Sequence[Prompt]]
    sampling: Sampling
    group_size: int
    seed: int
    journal: Journal | None = None
    show: Callable[[int, Sequence[GradedGroup]], None] = lambda rollout, groups: None

    def groups(self, rollout: int, num: int, *, version: int, attempt: int = 0) -> list[GradedGroup]:
        """See `GroupSampler`. Raises RuntimeError if the engine answers with weights of another version."""
        shared = world.share(_numbered(self.prompts(rollout, attempt, num)))
        prompts = [prompt for prompt, _ in shared]
        requests = [
            CompletionRequest(
                f"{n}/{sample}",
                prompt,
                time * self.group_size + sample,
                draw_seed(
                    self.seed, rollout, attempt, prompt.problem.problem_id, time * self.group_size + sample, "rollout"
                ),
            )
            for n, (prompt, time) in enumerate(shared)
            for sample in range(self.group_size)
        ]

        def current(completion: Completion) -> Completion:
            if completion.version != version:
                raise RuntimeError(
                    f"the engine wrote a completion with weights of version {completion.version}; the policy is at "
                    f"{version}."
                )
            return completion

        by_id = {one.request.request_id: one for one in self._graded(requests, f"{rollout}/{attempt}", current)}
        seed = draw_seed(self.seed, rollout, attempt, "reward")
        groups = [
            self._group(prompt, [by_id[f"{n}/{sample}"] for sample in range(self.group_size)], seed)
            for n, prompt in enumerate(prompts)
        ]
        self.show(rollout, groups)
        return groups

    def _graded(
        self, requests: list[CompletionRequest], where: str, current: Callable[[Completion], Completion]
    ) -> Iterator[GradedCompletion]:
        """Sample and judge; completions that the journal knows are judged again and not sampled."""
        journal = self.journal
        if journal is None:
            return sample_completions(self.engine, requests, self.sampling, self.grader, receive=current)

        def key(request: CompletionRequest) -> str:
            return f"{where}/{request.prompt.problem.problem_id}/{request.sample}"

        keys = {request.request_id: key(request) for request in requests}
        known = {each.request_id: one for each in requests if (one := journal.known(keys[each.request_id])) is not None}

        def received(completion: Completion) -> Completion:
            journal.add(keys[completion.request_id], completion)
            return current(completion)

        new = [request for request in requests if request.request_id not in known]
        again = (
            self.grader.grade(request, one, self.grader.decode(one.ids_T))
            for request in requests
            if (one := known.get(request.request_id)) is not None
        )
        return chain(again, sample_completions(self.engine, new, self.sampling, self.grader, receive=received))

    def _group(self, prompt: Prompt, graded: list[GradedCompletion], seed: int) -> GradedGroup:
        group = self.grader.group(graded, self.sampling.max_tokens, seed)
        return GradedGroup(prompt, [one.completion for one in graded], group, sum(one.seconds for one in graded))


def _numbered(prompts: Sequence[Prompt]) -> list[tuple[Prompt, int]]:
    """Each prompt, and how many times its problem came before."""
    times: Counter[str] = Counter()
    found = []
    for prompt in prompts:
        key = prompt.problem.problem_id
        found.append((prompt, times[key]))
        times[key] += 1
    return found


@dataclass(frozen=True, slots=True, eq=False)
class PromptPool:
    """The train problems of a stage, and the choice of problems for each rollout.

    The first epoch takes them in the task's order, later ones in shuffled orders; groups that are sampled again
    take random other problems. A rollout holds no problem twice, also where one epoch ends in it, unless there are fewer problems
    than it needs.
    """

    prompts: list[Prompt]
    a_rollout: int
    seed: int
    too_long: int = 0

    @staticmethod
    def of(config: PolicyStage, context: Context, task: Task, tokenizer: Any, limit: int) -> PromptPool:
        """Render the problems that leave room for a completion in the context. Raises UserError if there are too few."""
        a_rollout = config.prompts_a_rollout
        rollouts = config.steps // config.steps_a_rollout if config.steps else UNKNOWN_ROLLOUTS
        num = config.problems or rollouts * a_rollout
        try:
            problems = list(task.problems("train", num, context.seed))
        except UserError as error:
            hint = "" if config.problems else f" Set stages.{context.name}.problems to use fewer and repeat them."
            raise error.within(f"{error}{hint}") from None
        fitting, too_long = fitting_prompts(problems, tokenizer, task.template, limit, context.say)
        if len(fitting) < min(a_rollout, num):
            raise UserError(
                f"stages.{context.name}: only {len(fitting)} of {num} prompts fit the context of {limit} tokens, but a "
                f"rollout needs {a_rollout}."
            )
        seed = draw_seed(context.seed, context.name, "prompts")
        return PromptPool(fitting, a_rollout, seed, too_long)

    def __call__(self, rollout: int, attempt: int, num: int) -> Sequence[Prompt]:
        """Return `num` prompts of a rollout; deterministic for the arguments."""
        size = len(self.prompts)
        first = range(rollout * self.a_rollout, (rollout + 1) * self.a_rollout)
        orders = {
            epoch: epoch_order(self.seed, size, self.a_rollout, epoch) for epoch in {slot // size for slot in first}
        }
        regular = [orders[slot // size][slot % size] for slot in first]
        if attempt == 0:
            return [self.prompts[n] for n in regular[:num]]
        others = np.setdiff1d(np.arange(size), regular)
        candidates = others if len(others) >= num else np.arange(size)
        rng = np.random.default_rng(draw_seed(self.seed, rollout, attempt))
        chosen = rng.choice(candidates, num, replace=len(candidates) < num)
        return [self.prompts[n] for n in chosen]


@functools.lru_cache(maxsize=4)
def epoch_order(seed: int, size: int, a_rollout: int, epoch: int) -> Array:
    """Return the order [size] of an epoch's problems, read-only: in epoch 0 as they are, then shuffled.

    Problems of the rollout in which the last epoch ended come after what is missing of that rollout, if there are enough others.
    """
    start = epoch
    while start * size % a_rollout and size >= a_rollout:
        start -= 1  # that epoch's order depends on the one before
    order = np.arange(size)
    for number in range(start, epoch + 1):
        before, order = order, np.arange(size)
        if number:
            order = np.random.default_rng(draw_seed(seed, number)).permutation(size)
        if (begun := number * size % a_rollout) and size >= a_rollout:
            rest = order[~np.isin(order, before[size - begun :])][: a_rollout - begun]
            order = np.concatenate([rest, order[~np.isin(order, rest)]])
    order.setflags(write=False)
    return order


def read_prompts(config: PolicyStage, context: Context, tokenizer: Any) -> tuple[PromptPool, Task, int]:
    """Return the train problems, their task, and the context length that their completions need."""
    task = context.task(config.task)
    models.check_template(tokenizer, task.template, f"tasks.{config.task}")
    limit = context_limit(config.engine, context.model_dir(config.model))
    context.phase(f"reading the task {config.task}")
    pool = PromptPool.of(config, context, task, tokenizer, limit)
    longest = max(len(prompt.ids) for prompt in pool.prompts) + config.sampling.max_tokens
    return pool, task, context_length(longest, limit)


@contextmanager
def open_policy_sampler(
    config: PolicyStage, context: Context, tokenizer: Any, settings: EngineConfig, read: tuple[PromptPool, Task, int]
) -> Iterator[PolicySampler]:
    """Start the policy's engine with `settings` on the stage's model; closed at the end of the context.

    read: the result of `read_prompts`.
    """
    pool, task, max_model_len = read
    context.phase(f"starting the {settings.fn} engine")
    folder = context.model_dir(config.model)
    engine = engines.open_engine(settings, folder, max_model_len=max_model_len, max_top_k=0)
    with beside.opened(engine, settings, context):
        yield PolicySampler(
            engine=engine,
            grader=Grader.of(task, tokenizer),
            prompts=pool,
            sampling=config.sampling.record(),
            group_size=config.group_size,
            seed=draw_seed(context.seed, context.name, "rollouts"),
            journal=Journal() if config.ahead else None,
            show=ShownCompletions(context.folder).latest,
        )
