"""From problems of which traces are missing to rows: completions with their verdicts and rewards.

generate and eval use it in their own process (`trace_sampling`), and many engines in their actors (`trace_replicas`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np

from distill import tail_draws
from distill.recipe import EvalStage, GenerateStage
from distill.records import (
    NO_TAIL,
    Completion,
    Draws,
    Engine,
    Group,
    Prompt,
    Ragged,
    TopK,
    Traces,
    UserError,
    draw_seed,
    stable_hash,
)
from distill.stages.captured_positions import keep_positions
from distill.stages.sampling import CompletionRequest, GradedCompletion, Grader, sample_completions
from distill.stages.trace_rewards import RewardedCompletion, by_verdict, rewarded
from distill.tasks.combined_reward import CombinedReward
from distill.traces.schema import Metadata

BLOCK_ROWS = 32
"""The number of rows passed to the writer together."""


@dataclass(slots=True)
class SamplingCounts:
    """The counts of one attempt at sampling.

    judged: completions with a verdict, of which `correct` are right. rewards_failed: the number of groups that each named reward failed on. completions_unrewarded: completions in such groups.
    completions_unmapped: completions of an endpoint whose tokens are not those of the model's tokenizer.
    """

    tokens_generated: int = 0
    completions: int = 0
    prompts_too_long: int = 0
    judged: int = 0
    correct: int = 0
    judge_seconds: float = 0.0
    completions_unrewarded: int = 0
    completions_unmapped: int = 0
    rewards_failed: dict[str, int] = field(default_factory=dict)

    def count(self, graded: GradedCompletion) -> None:
        """Count a completion."""
        self.completions += 1
        self.tokens_generated += len(graded.completion.ids_T)
        self.judged += graded.verdict.correct is not None
        self.correct += graded.verdict.correct is True
        self.judge_seconds += graded.seconds

    def add(self, other: SamplingCounts) -> None:
        """Add another process's counts."""
        for one in fields(self):
            mine, theirs = getattr(self, one.name), getattr(other, one.name)
            if one.name == "rewards_failed":
                mine = {name: mine.get(name, 0) + theirs.get(name, 0) for name in {**mine, **theirs}}
            else:
                mine += theirs
            setattr(self, one.name, mine)


@dataclass(frozen=True, slots=True, eq=False)
class WantedProblem:
    """A problem of which traces are missing. samples: their numbers. stored: the traces that exist, if rewards see them."""

    prompt: Prompt
    samples: tuple[int, ...]
    stored: tuple[GradedCompletion, ...] = ()


@dataclass(frozen=True, slots=True)
class Generation:
    """How the traces of a stage are identified and drawn. mark: hash of weights, template and sampling. seed: the stage's."""

    mark: str
    seed: int
    stage: str

    @staticmethod
    def of(metadata: Metadata, seed: int, stage: str) -> Generation:
        mark = stable_hash(metadata.weights, metadata.tokenizer, metadata.template, metadata.sampling, metadata.task)
        return Generation(mark, seed, stage)

    def tail_seed(self, trace_id: str) -> int:
        """Return the seed of a trace's draws from the tail."""
        return draw_seed(self.seed, self.stage, trace_id, "tail")

    def trace_id(self, problem_id: str, sample: int) -> str:
        return stable_hash(problem_id, sample, self.mark)

    def request(self, prompt: Prompt, sample: int) -> CompletionRequest:
        problem = prompt.problem.problem_id
        seed = draw_seed(self.seed, self.stage, problem, sample, "generate")
        return CompletionRequest(self.trace_id(problem, sample), prompt, sample, seed)


def cut_to(metadata: Metadata, completion: Completion, seed: int) -> Completion:
    """Return a completion with the entries that are stored, and with draws from the tail that this leaves.

    seed: of the trace's draws. Raises UserError for an engine that does not draw.
    """
    full = completion.top
    if full is None:
        return completion
    top, draws = full.truncate(top_k=metadata.top_k, mass=metadata.mass), None
    if metadata.tail_draws:
        if completion.beyond is None:
            raise UserError(f"tail_draws: the engine {metadata.engine!r} gives no draws from the tail; remove the key.")
        draws = tail_draws.draw(full, top, completion.beyond, metadata.tail_draws, seed, NO_TAIL)
    return replace(completion, top=top, beyond=None, draws=draws)


class _Requests:
    """The requests of wanted problems, one after the other. Goes on after it was empty if the problems do."""

    def __init__(self, wanted: Iterable[WantedProblem], generation: Generation) -> None:
        self._wanted, self._generation = iter(wanted), generation
        self._of_one: Iterator[CompletionRequest] = iter(())
        self.stored: dict[str, Sequence[GradedCompletion]] = {}

    def __iter__(self) -> _Requests:
        return self

    def __next__(self) -> CompletionRequest:
        while (request := next(self._of_one, None)) is None:
            problem = next(self._wanted)
            if problem.stored:
                self.stored[problem.prompt.problem.problem_id] = problem.stored
            self._of_one = (self._generation.request(problem.prompt, sample) for sample in problem.samples)
        return request


@dataclass(frozen=True, slots=True, eq=False)
class RowSampler:
    """Samples wanted problems of a stage and counts the work.

    rewards: the stage's named rewards; None = the verdict's score. watch: called with each graded completion.
    """

    config: GenerateStage | EvalStage
    generation: Generation
    grader: Grader
    metadata: Metadata
    counts: SamplingCounts
    rewards: CombinedReward | None = None
    watch: Callable[[GradedCompletion], None] = lambda graded: None

    def rows(self, engine: Engine, wanted: Iterable[WantedProblem]) -> Iterator[RewardedCompletion]:
        """Yield the missing completions with their rewards."""
        config, requests = self.config, _Requests(wanted, self.generation)
        graded = self._graded(engine, requests)
        if self.rewards is None:
            yield from by_verdict(graded)
            return
        seed = draw_seed(self.generation.seed, self.generation.stage, "reward")

        def group_of(graded: Sequence[GradedCompletion]) -> Group:
            return self.grader.group(graded, config.sampling.max_tokens, seed)

        for row in rewarded(graded, requests.stored, config.samples, group_of, self.rewards):
            self.counts.completions_unrewarded += row.failed
            yield row

    def _graded(self, engine: Engine, requests: Iterable[CompletionRequest]) -> Iterator[GradedCompletion]:
        """Yield the missing completions as they finish."""
        counts, metadata = self.counts, self.metadata
        keep = keep_positions(self.config, f"stages.{self.generation.stage}")

        def truncated(completion: Completion) -> Completion:
            cut = cut_to(metadata, completion, self.generation.tail_seed(completion.request_id))
            return keep(cut)

        sampling = self.config.sampling.record()
        messages = self.grader.chat_messages if self.config.engine.is_served else None
        for graded in sample_completions(
            engine,
            requests,
            sampling,
            self.grader,
            top_k=metadata.top_k,
            tail_draws=metadata.tail_draws,
            receive=truncated,
            messages=messages,
        ):
            if metadata.top_k and graded.completion.top is None:
                counts.completions_unmapped += 1
                continue
            counts.count(graded)
            self.watch(graded)
            yield graded


def as_traces(rows: Sequence[RewardedCompletion]) -> Traces:
    """Return rows as a block of traces."""
    graded = [row.graded for row in rows]
    requests = [one.request for one in graded]
    completions = [one.completion for one in graded]
    tops = [completion.top for completion in completions if completion.top is not None]
    draws = [completion.draws for completion in completions if completion.draws is not None]
    return Traces(
        trace_id=[request.request_id for request in requests],
        problem_id=[request.prompt.problem.problem_id for request in requests],
        sample=np.array([request.sample for request in requests], np.int32),
        messages=[request.prompt.problem.messages for request in requests],
        completion=[one.text for one in graded],
        answer=[one.verdict.answer for one in graded],
        gold=[request.prompt.problem.gold for request in requests],
        prompt_ids=Ragged.from_rows([request.prompt.ids for request in requests], np.int32),
        completion_ids=Ragged.from_rows([completion.ids_T for completion in completions], np.int32),
        logprob=Ragged.from_rows([completion.logprob_T for completion in completions], np.float32),
        top=TopK.concat(tops) if tops else None,
        reward=[row.reward for row in rows],
        rewards={name: [row.rewards[name] for row in rows] for name in rows[0].rewards},
        correct=[one.verdict.correct for one in graded],
        finish_reason=[completion.finish_reason for completion in completions],
        draws=Draws.concat(draws) if draws else None,
    )
