"""The rewards stored with traces: the verdict's score, or a stage's named rewards over a problem's whole group."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from distill.records import Completion, FinishReason, Group, Scores
from distill.stages.sampling import CompletionRequest, GradedCompletion, Grader, map_in_threads
from distill.traces.reader import open_traces

REWARD_BATCH = 32
"""The least number of completions whose rewards are computed together."""
MAX_WAITING_BATCHES = 2
"""The number of batches pending for rewards before the engine waits."""

Item = TypeVar("Item")
StoredCompletions = Mapping[str, Sequence[GradedCompletion]]
"""Completions that are in a folder already, by problem."""


@dataclass(frozen=True, slots=True, eq=False)
class RewardedCompletion:
    """A graded completion with its `reward` and its named rewards, as stored in a trace.

    failed: whether a reward failed on its group, by an exception or by its limit.
    """

    graded: GradedCompletion
    reward: float | None
    rewards: Mapping[str, float | None]
    failed: bool = False


def by_verdict(graded: Iterable[GradedCompletion]) -> Iterator[RewardedCompletion]:
    """Use the verdict's score as the reward, plus accuracy, for a stage without named rewards."""
    for one in graded:
        correct = one.verdict.correct
        yield RewardedCompletion(one, one.verdict.score, {"accuracy": None if correct is None else float(correct)})


def rewarded(
    graded: Iterable[GradedCompletion],
    stored: StoredCompletions,
    group_size: int,
    group_of: Callable[[Sequence[GradedCompletion]], Group],
    rewards: Callable[[Sequence[Group]], list[Scores]],
) -> Iterator[RewardedCompletion]:
    """Yield the completions with their named rewards and weighted sum, problem by problem, computed in a thread.

    stored: existing completions of the same problems, which rewards see but which are not yielded. group_size: completions of
    a problem, stored ones included.
    """

    def score(groups: list[list[GradedCompletion]]) -> list[tuple[list[GradedCompletion], Scores]]:
        return list(zip(groups, rewards([group_of(group) for group in groups]), strict=True))

    batches = in_blocks(_whole_groups(graded, stored, group_size), REWARD_BATCH, len)
    for batch in map_in_threads(score, batches, 1, MAX_WAITING_BATCHES):
        for group, scores in batch:
            known = {one.request.request_id for one in stored.get(group[0].request.prompt.problem.problem_id, ())}
            for n, one in enumerate(group):
                if one.request.request_id not in known:
                    named = {name: column[n] for name, column in scores.parts.items()}
                    yield RewardedCompletion(one, scores.total[n], named, bool(scores.failed))


def stored_completions(
    folder: Path, wanted: Mapping[str, CompletionRequest], grader: Grader
) -> dict[str, list[GradedCompletion]]:
    """Judge completions of `folder` again; returns them by problem. wanted: by trace id."""
    found: dict[str, list[GradedCompletion]] = defaultdict(list)
    if not wanted:
        return found
    for block in open_traces(folder).blocks(1024, ["trace_id", "completion_ids", "finish_reason"]):
        for n, trace_id in enumerate(block.trace_id):
            if request := wanted.get(trace_id):
                ids_T = block.completion_ids[n]
                reason: FinishReason = "stop" if block.finish_reason[n] == "stop" else "length"
                completion = Completion(trace_id, ids_T, np.zeros(len(ids_T), np.float32), None, reason)
                graded = grader.grade(request, completion, grader.decode(ids_T))
                found[request.prompt.problem.problem_id].append(graded)
    return found


def _whole_groups(
    graded: Iterable[GradedCompletion], stored: StoredCompletions, group_size: int
) -> Iterator[list[GradedCompletion]]:
    """Yield each problem's completions by sample, as soon as its last one arrives."""
    waiting: dict[str, list[GradedCompletion]] = {}
    for one in graded:
        problem = one.request.prompt.problem.problem_id
        group = waiting.setdefault(problem, list(stored.get(problem, ())))
        group.append(one)
        if len(group) == group_size:
            yield sorted(waiting.pop(problem), key=lambda each: each.request.sample)


def in_blocks(
    items: Iterable[Item], min_size: int, size: Callable[[Item], int] = lambda item: 1
) -> Iterator[list[Item]]:
    """Yield lists of items whose sizes add up to at least `min_size`; the last list has the rest."""
    block: list[Item] = []
    total = 0
    for item in items:
        block.append(item)
        total += size(item)
        if total >= min_size:
            yield block
            block, total = [], 0
    if block:
        yield block
