"""The rollout path of every stage: problems go through an engine, and completions are judged while it generates.

In: problems and an engine. Out: graded completions. generate and eval write them as traces (`trace_sampling`); grpo and
on_policy learn from them in groups (`policy_sampling`).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from distill import models
from distill.reasoning import canonical
from distill.recipe import EngineConfig
from distill.records import (
    Array,
    Completion,
    Engine,
    Group,
    Messages,
    Problem,
    Prompt,
    Request,
    Sampling,
    Task,
    Template,
    Verdict,
)

JUDGE_THREADS = 4
"""The number of verdicts computed at a time; most of them wait for a process or a sandbox."""
MAX_WAITING = 64
"""The largest number of completions waiting for a verdict before the engine waits too: programs may be slow."""
CONTEXT_STEP = 64
"""Context lengths are rounded up to a multiple of this, so that a slightly longer prompt needs no new engine."""

Item = TypeVar("Item")
Done = TypeVar("Done")


# ------------------------------------------------------------------------------------------ prompts, contexts


def context_limit(engine: EngineConfig, model_dir: Path) -> int:
    """Return the largest number of tokens, prompt and completion together, that the model and the recipe allow."""
    own = models.config_of(model_dir).get("max_position_embeddings")
    limits = [n for n in (own, engine.max_model_len) if n]
    return min(limits) if limits else 1 << 20


def context_length(longest: int, limit: int) -> int:
    """Return the context length to start an engine with: the longest text in tokens, rounded up, within the limit."""
    return min(limit, -(-longest // CONTEXT_STEP) * CONTEXT_STEP)


def fitting_prompts(
    problems: Iterable[Problem], tokenizer: Any, template: Template, limit: int, say: Callable[[str], None]
) -> tuple[list[Prompt], int]:
    """Return the prompts that leave room for a completion in the context, and the number of the others.

    say: called with a message about the others.
    """
    prompts = [Prompt(p, models.render_prompt(tokenizer, template, p.messages)) for p in problems]
    fitting = [prompt for prompt in prompts if len(prompt.ids) < limit]
    too_long = len(prompts) - len(fitting)
    if too_long:
        say(f"{too_long} prompts skipped: longer than the context of {limit} tokens")
    return fitting, too_long


# ---------------------------------------------------------------------------------------- completions, graded


@dataclass(frozen=True, slots=True, eq=False)
class CompletionRequest:
    """A request for one completion. request_id: unique within one call. seed: random seed of the completion."""

    request_id: str
    prompt: Prompt
    sample: int
    seed: int


@dataclass(frozen=True, slots=True, eq=False)
class GradedCompletion:
    """A completion with its text (without the template's prefill) and its verdict. seconds: the judge's time."""

    request: CompletionRequest
    completion: Completion
    text: str
    verdict: Verdict
    seconds: float


@dataclass(frozen=True, slots=True, eq=False)
class Grader:
    """Decodes and judges completions.

    judge: the task's verdict on a completion's text. decode: completion ids -> text. begun: the text with which a prompt has
    begun the completion: the template's prefill, or the thinking that the chat template opens. chat_messages: a problem's
    messages -> those of its prompt, for an endpoint that renders the prompt itself.
    """

    template: Template
    judge: Callable[[Problem, str, bool], Verdict]
    decode: Callable[[Array], str]
    begun: str = ""
    chat_messages: Callable[[Messages], Messages] | None = None

    @staticmethod
    def of(task: Task, tokenizer: Any) -> Grader:
        """Make the grader of a task, which decodes without special tokens."""

        def decode(ids_T: Array) -> str:
            return models.decode(tokenizer, ids_T)

        def chat_messages(messages: Messages) -> Messages:
            return models.chat_messages(tokenizer, task.template, messages)

        return Grader(
            task.template, task.judge, decode, models.opened_thinking(tokenizer, task.template), chat_messages
        )

    def seen(self, text: str) -> str:
        """Return a completion's text as judges and rewards see it: what the prompt began, and `<think>` for any marker."""
        return canonical(text if self.begun and text.startswith(self.begun) else self.begun + text)

    def grade(self, request: CompletionRequest, completion: Completion, text: str) -> GradedCompletion:
        """Judge a completion."""
        began = time.monotonic()
        finished = completion.finish_reason == "stop"
        verdict = self.judge(request.prompt.problem, self.seen(text), finished)
        return GradedCompletion(request, completion, text, verdict, time.monotonic() - began)

    def group(self, graded: Sequence[GradedCompletion], max_tokens: int, seed: int) -> Group:
        """Group all completions of one problem for the rewards. max_tokens: their sampling limit."""
        return Group(
            problem=graded[0].request.prompt.problem,
            template=self.template,
            texts=tuple(self.seen(one.text) for one in graded),
            num_tokens=tuple(len(one.completion.ids_T) for one in graded),
            finished=tuple(one.completion.finish_reason == "stop" for one in graded),
            verdicts=tuple(one.verdict for one in graded),
            max_tokens=max_tokens,
            seed=seed,
        )


def sample_completions(
    engine: Engine,
    requests: Iterable[CompletionRequest],
    sampling: Sampling,
    grader: Grader,
    *,
    top_k: int = 0,
    tail_draws: int = 0,
    receive: Callable[[Completion], Completion] = lambda completion: completion,
    messages: Callable[[Messages], Messages] | None = None,
) -> Iterator[GradedCompletion]:
    """Yield graded completions in the order in which the engine finishes them; threads judge while it generates.

    receive: called with each completion when it arrives, before its verdict. An iterator `requests` that goes on after it
    was empty is asked again as long as the engine works. tail_draws: number of draws a position from the ids beyond the top_k.
    messages: a problem's messages -> those of its prompt, for an engine
    that may need them beside the ids.
    """
    open_requests: dict[str, CompletionRequest] = {}

    def asked(request: CompletionRequest) -> Request:
        open_requests[request.request_id] = request
        prompt = request.prompt
        if messages is None:
            return Request(request.request_id, prompt.ids, request.seed, tail_draws=tail_draws)
        told = messages(prompt.problem.messages)
        return Request(request.request_id, prompt.ids, request.seed, messages=told, opened=grader.begun)

    def written() -> Iterator[tuple[CompletionRequest, Completion, str]]:
        for completion in engine.generate(map(asked, requests), sampling, top_k=top_k):
            kept = receive(completion)
            text = grader.decode(kept.ids_T) if kept.text is None else kept.text
            yield open_requests.pop(kept.request_id), kept, text

    return map_in_threads(lambda one: grader.grade(*one), written(), JUDGE_THREADS, MAX_WAITING)


def map_in_threads(
    work: Callable[[Item], Done], items: Iterable[Item], num_threads: int, max_waiting: int
) -> Iterator[Done]:
    """Yield work(item) of every item, in the items' order; threads work while the next items are made.

    At most `max_waiting` results are pending; then the next item is requested only after the oldest result.
    """
    waiting: deque[Future[Done]] = deque()
    with ThreadPoolExecutor(num_threads) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                while waiting and (len(waiting) > max_waiting or waiting[0].done()):
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
