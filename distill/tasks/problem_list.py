"""A task that is a list of problems: the common part of file tasks and hub tasks.

The seed and the problems' ids decide their order, so it does not depend on the file's order, and every shorter list is a
prefix of a longer one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

from distill.errors import DataError
from distill.records import Message, Problem, Split, Template, UserError, Verdict, draw_seed
from distill.tasks import splits
from distill.tasks.judge import worker_pool
from distill.tasks.judge.verdict import exact_verdict, judge, math_verdict, why_unreadable

Judge = Literal["math", "exact", "none"]
"""How answers are compared: as mathematics, as text, or not at all (questions without answers)."""
Rejected = list[tuple[int, str]]
MAX_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Row:
    """A question with its answer, if it has one, and its line or row number."""

    number: int
    messages: tuple[Message, ...]
    answer: str | None
    split: Split | None = None

    @property
    def question(self) -> str:
        """The last user message."""
        return str(next(m["content"] for m in reversed(self.messages) if m["role"] == "user"))

    @property
    def content(self) -> str:
        """The text that identifies the problem: the whole conversation without the system message."""
        return "\n".join(m["content"] for m in self.messages if m["role"] != "system")


@dataclass(slots=True)
class Loaded:
    """The problems by split, and (number, reason) of every rejected row."""

    by_split: dict[Split, list[Problem]] = field(default_factory=lambda: {"train": [], "held_out": []})
    rejected: Rejected = field(default_factory=list)


class FiniteTask:
    """A task whose problems come from a file or data set, read when they are first needed."""

    def __init__(
        self,
        name: str,
        template: Template,
        fingerprint: str,
        judge: Judge,
        load: Callable[[], Loaded],
        origin: str,
    ) -> None:
        self.name, self.template, self.fingerprint = name, template, fingerprint
        self.origin = origin
        self._compare = exact_verdict if judge == "exact" else math_verdict
        self.is_judged = judge != "none"
        self._load = load
        self._loaded: Loaded | None = None
        self._held_out: frozenset[str] | None = None

    def _problems(self) -> Loaded:
        if self._loaded is None:
            loaded = self._load()
            if not any(loaded.by_split.values()):
                raise DataError(f"tasks.{self.name}: {self.origin} has no usable problem.{describe(loaded.rejected)}")
            self._loaded = loaded
        return self._loaded

    @property
    def rejected(self) -> Rejected:
        """The (line or row number, reason) of every rejected row."""
        return self._problems().rejected

    def problems(self, split: Split, num: int | None, seed: int) -> Iterator[Problem]:
        loaded = self._problems()
        chosen = loaded.by_split[split]
        if not chosen and loaded.by_split["train" if split == "held_out" else "held_out"]:
            raise UserError(
                f"tasks.{self.name}: {self.origin} has no {split} problems, only "
                f"{'held-out ones: it is for evaluation' if split == 'train' else 'train ones'}."
            )
        if num is not None and num > len(chosen):
            raise UserError(
                f"tasks.{self.name}: {num} {split} problems are wanted, but {self.origin} has "
                f"{len(chosen)}.{describe(loaded.rejected)}"
            )
        ordered = sorted(chosen, key=lambda problem: draw_seed(seed, problem.problem_id))
        return iter(ordered[:num])

    @property
    def is_endless(self) -> bool:
        return False

    def holds_out(self, question: str) -> bool:
        if self._held_out is None:
            held_out = self._problems().by_split["held_out"]
            self._held_out = frozenset(splits.content_hash(problem.question) for problem in held_out)
        return splits.content_hash(question) in self._held_out

    def judge(self, problem: Problem, completion: str, finished: bool = True) -> Verdict:
        if not self.is_judged:
            return Verdict(None, None, self.template.extract(completion), "not judged")

        def score(answer: str) -> Verdict:
            assert problem.gold is not None
            return self._compare(answer, problem.gold)

        return judge(self.template, completion, finished, score)

    def same_answer(self, one: str, other: str) -> bool:
        return self._compare(one, other).correct is True


def describe(rejected: Rejected) -> str:
    """Return ' 3 rows were rejected: row 2: ...', or an empty text."""
    if not rejected:
        return ""
    shown = "; ".join(f"{number}: {reason}" for number, reason in rejected[:MAX_SHOWN])
    more = f"; and {len(rejected) - MAX_SHOWN} more" if len(rejected) > MAX_SHOWN else ""
    return f" Rejected {len(rejected)}, by line or row: {shown}{more}."


def assemble(task: str, source: str, rows: Sequence[Row], judge: Judge, rejected: Rejected) -> Loaded:
    """Convert rows to problems; gold answers that cannot be compared and repeated questions are rejected.

    A question in both official splits is held out.
    """
    loaded = Loaded(rejected=rejected)
    reasons = _unreadable_golds([row.answer for row in rows if row.answer]) if judge == "math" else {}
    seen: dict[str, Row] = {}
    for row in sorted(rows, key=lambda row: row.split != "held_out"):
        reason = reasons.get(row.answer or "")
        key = splits.content_hash(row.content)
        if reason is None and (first := seen.get(key)) is not None:
            reason = f"the same question as {first.number}"
            if first.answer != row.answer:
                reason += f", with another answer ({first.answer!r})"
        if reason is not None:
            rejected.append((row.number, reason))
            continue
        seen[key] = row
        loaded.by_split[row.split or splits.split_of(row.content)].append(
            Problem(
                problem_id=splits.problem_id(source, row.content),
                task=task,
                question=row.question,
                messages=row.messages,
                gold=row.answer,
            )
        )
    rejected.sort()
    return loaded


def _unreadable_golds(golds: Sequence[str]) -> dict[str, str]:
    distinct = list(dict.fromkeys(golds))
    with ThreadPoolExecutor(worker_pool.NUM_WORKERS) as threads:
        reasons = threads.map(why_unreadable, distinct)
        return {gold: f"{reason} ({gold[:80]!r})" for gold, reason in zip(distinct, reasons, strict=True) if reason}
