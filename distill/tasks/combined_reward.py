"""Combine several rewards into one weighted score, with time limits and tolerance of rare failures.

A completion that cannot be judged gets None and is excluded. A reward that raises or hangs loses its group's scores only,
unless it happens often. The rewards are in `rewards`; advantages are computed by the trainer.
"""

from __future__ import annotations

import collections
import math
import numbers
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from distill.records import Group, Reward, Scores, UserError

MIN_CALLS = 20
"""The least number of calls for which a failure rate is computed."""
WINDOW = 100
"""The failure rate of a reward is over this many of its last calls."""
ATTEMPTS = 2
WATCH_EVERY_S = 0.2
"""Seconds between checks for calls past their limit."""


class _HungError(Exception):
    """A reward did not return in time."""


@dataclass(slots=True)
class _WeightedReward:
    """One reward, its weight, and the outcome of its calls."""

    name: str
    weight: float
    reward: Reward
    returned: bool = False
    failures: int = 0
    unjudged: int = 0
    failed: collections.deque[bool] = field(default_factory=lambda: collections.deque(maxlen=WINDOW))


class CombinedReward:
    """Scores groups with several rewards: `rewards` holds (name, weight, function); a repeated name gets #2.

    limit_s: seconds that one reward may take for one group; after them it is abandoned in its thread and the group's
    scores are None. first_limit_s: the same until its first result, because it may have to load a model. max_failed: the
    share of a reward's last calls (at least 20) that may fail (two exceptions in a row, or past the limit) before a
    UserError ends the run. num_threads: parallel calls, for rewards that wait for processes or sandboxes.
    """

    def __init__(
        self,
        rewards: Sequence[tuple[str, float, Reward]],
        *,
        limit_s: float = 60.0,
        first_limit_s: float = 600.0,
        max_failed: float = 0.1,
        num_threads: int = 4,
    ) -> None:
        for name, weight, _ in rewards:
            if not math.isfinite(weight):
                raise UserError(f"rewards.{name}: weight {weight} is not a finite number.")
        if not any(weight for _, weight, _ in rewards):
            raise UserError("rewards: no reward has a weight other than 0. Give at least one such a weight.")
        self._parts: list[_WeightedReward] = []
        for name, weight, reward in rewards:
            self._parts.append(_WeightedReward(self._unused(name), weight, reward))
        self.limit_s, self.first_limit_s = limit_s, first_limit_s
        self.max_failed, self.num_threads = max_failed, num_threads

    def _unused(self, name: str) -> str:
        taken, unused, n = self.names, name, 1
        while unused in taken:
            n += 1
            unused = f"{name}#{n}"
        return unused

    @property
    def names(self) -> list[str]:
        """The rewards' names in order: the keys of `Scores.parts`."""
        return [part.name for part in self._parts]

    @property
    def failures(self) -> dict[str, int]:
        """The number of groups on which each reward has failed."""
        return {part.name: part.failures for part in self._parts}

    @property
    def unjudged(self) -> dict[str, int]:
        """The number of completions that each reward gave no score, failures included."""
        return {part.name: part.unjudged for part in self._parts}

    def __call__(self, groups: Sequence[Group]) -> list[Scores]:
        """Return the scores of each group, in order. Raises UserError for a reward that fails too often or returns no scores."""
        calls = [(group, part) for group in groups for part in self._parts]
        results = iter(_RewardCalls(self, calls).results())
        return [self._combined([next(results) for _ in self._parts], len(group)) for group in groups]

    def _combined(self, results: list[list[float | None] | None], num: int) -> Scores:
        """Combine the scores of one group of `num` completions. results: each reward's; None if it failed."""
        columns: list[list[float | None]] = [[None] * num if result is None else result for result in results]
        weighted = [(part.weight, column) for part, column in zip(self._parts, columns, strict=True) if part.weight]
        total: list[float | None] = []
        for n in range(num):
            terms = [weight * score for weight, column in weighted if (score := column[n]) is not None]
            total.append(sum(terms) if len(terms) == len(weighted) else None)
        failed = tuple(name for name, result in zip(self.names, results, strict=True) if result is None)
        return Scores(total, dict(zip(self.names, columns, strict=True)), failed)


class _RewardCalls:
    """The calls of one `CombinedReward.__call__`, made by daemon threads; a thread that hangs is abandoned and replaced."""

    def __init__(self, reward: CombinedReward, calls: list[tuple[Group, _WeightedReward]]) -> None:
        self._reward, self._calls = reward, calls
        self._results: list[list[float | None] | None] = [None] * len(calls)
        self._next, self._open = 0, len(calls)
        self._busy: dict[int, tuple[int, float, float]] = {}  # worker -> call, its limit, deadline
        self._num_workers = 0
        self._error: BaseException | None = None
        self._changed = threading.Condition()

    def results(self) -> list[list[float | None] | None]:
        """Return each call's scores, in order; None for a call that failed."""
        with self._changed:
            try:
                for _ in range(min(self._reward.num_threads, len(self._calls))):
                    self._start_worker()
                while self._open and self._error is None:
                    self._changed.wait(WATCH_EVERY_S)
                    self._abandon_hung()
                if self._error is not None:
                    raise self._error
            finally:
                self._next = len(self._calls)  # threads that still run take no further call
                self._busy.clear()
        return self._results

    def _start_worker(self) -> None:
        self._num_workers += 1
        name = f"reward-{self._num_workers}"
        threading.Thread(target=self._work, args=(self._num_workers,), name=name, daemon=True).start()

    def _abandon_hung(self) -> None:
        """Abandon the calls that are past their limit."""
        now = time.monotonic()
        for worker, (n, limit, deadline) in list(self._busy.items()):
            if deadline <= now:
                del self._busy[worker]
                self._settle(n, _HungError(f"no scores within {limit:g} s"))
                self._start_worker()

    def _work(self, worker: int) -> None:
        while True:
            with self._changed:
                n = self._next
                if n >= len(self._calls) or self._error is not None:
                    return
                self._next += 1
                limit = self._limit(self._calls[n][1])
                self._busy[worker] = n, limit, time.monotonic() + limit
            outcome = _attempt(*self._calls[n])
            with self._changed:
                if self._busy.pop(worker, None) is None:
                    return  # too late: abandoned
                self._settle(n, outcome)
                if not self._open or self._error is not None:
                    self._changed.notify_all()

    def _limit(self, part: _WeightedReward) -> float:
        limit_s = self._reward.limit_s
        return limit_s if part.returned else max(limit_s, self._reward.first_limit_s)

    def _settle(self, n: int, outcome: list[float | None] | BaseException) -> None:
        group, part = self._calls[n]
        self._open -= 1
        part.returned = part.returned or not isinstance(outcome, _HungError)
        if isinstance(outcome, UserError):
            self._error = self._error or outcome
            return
        failed = isinstance(outcome, BaseException)
        self._results[n] = None if isinstance(outcome, BaseException) else outcome
        part.unjudged += len(group) if isinstance(outcome, BaseException) else outcome.count(None)
        part.failures += failed
        part.failed.append(failed)
        num, num_failed = len(part.failed), sum(part.failed)
        if failed and num >= MIN_CALLS and num_failed > self._reward.max_failed * num:
            self._error = self._error or UserError(
                f"rewards.{part.name}: failed on {num_failed} of the last {num} groups, last on problem "
                f"{group.problem.problem_id} with {type(outcome).__name__.lstrip('_')}: {outcome}. "
                "Fix the reward and run the same command; finished work is kept."
            )


def _attempt(group: Group, part: _WeightedReward) -> list[float | None] | BaseException:
    error: BaseException | None = None
    for _ in range(ATTEMPTS):
        try:
            return _checked(part.name, part.reward(group), len(group))
        except UserError as mistake:
            return mistake  # trying again would not help
        except BaseException as raised:  # a reward's SystemExit is a failure too
            error = raised
    assert error is not None
    return error


def _checked(name: str, scores: object, num: int) -> list[float | None]:
    """Return the scores as floats, None if not finite. Raises UserError if they are not a list of `num` numbers."""
    if isinstance(scores, str | bytes | dict) or not hasattr(scores, "__len__"):
        raise UserError(
            f"rewards.{name}: returned a {type(scores).__name__}, not a list with a score (or None) for each completion."
        )
    listed = list(scores)  # type: ignore[call-overload]
    if len(listed) != num:
        raise UserError(
            f"rewards.{name}: returned {len(listed)} scores for {num} completions. Return one for each, in order, and None "
            "for a completion that cannot be judged."
        )
    checked: list[float | None] = []
    for score in listed:
        if score is not None and not isinstance(score, numbers.Real):
            raise UserError(
                f"rewards.{name}: returned {score!r:.80} ({type(score).__name__}) as a score. Return a number or None."
            )
        checked.append(float(score) if score is not None and math.isfinite(score) else None)
    return checked
