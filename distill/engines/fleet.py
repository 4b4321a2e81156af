"""Spreads numbered jobs over workers that may die, so that every job is answered exactly once.

A worker, such as a Ray actor, gets jobs in small calls, two calls at a time, so that it never waits for the next one; the jobs
that it holds are bounded. When a worker dies, a successor takes its place, and the jobs that were not answered are asked again.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from distill.records import UserError

Job = TypeVar("Job")
Numbered = list[tuple[int, Any]]

CALLS = 2
"""Calls that a worker has at a time: one that it works on, and the next."""
MAX_DEATHS = 3
"""A worker that dies this many times in a row without an answer in between is an error."""


class WorkerLostError(Exception):
    """A worker's process or machine has ended; the message says how."""


class Feed(Generic[Job]):
    """An iterator that grows: it ends when it is empty, and goes on when there is more."""

    def __init__(self) -> None:
        self._items: deque[Job] = deque()

    def extend(self, items: Iterable[Job]) -> None:
        self._items.extend(items)

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Feed[Job]:
        return self

    def __next__(self) -> Job:
        if not self._items:
            raise StopIteration
        return self._items.popleft()


def requests_held(batch_size: int) -> int:
    """Return the requests that a worker with an engine holds: those that it decodes, and some that come next."""
    return batch_size + max(4, batch_size // 4)


class Calls(Protocol):
    """How workers are called. A call returns a reference at once."""

    def get(self, reference: Any) -> Any:
        """Return a call's result. Raises what the call raised, and WorkerLostError if its worker has ended."""
        ...

    def wait(self, references: list[Any]) -> list[Any]:
        """Wait until a call has ended; return all that have."""
        ...

    def end(self, worker: Any) -> None:
        """End a worker, if it has not."""
        ...


@dataclass(slots=True, eq=False)
class Slot:
    """The place of one worker. calls: what it was asked and has not returned, in order; (reference, whether it brings answers).

    unanswered: its jobs by number. deaths: in a row, without an answer in between. resends: whether a successor must be given
    the unanswered jobs. absent: whether the worker is dead and has no successor yet.
    """

    number: int
    worker: Any = None
    calls: deque[tuple[Any, bool]] = field(default_factory=deque)
    unanswered: dict[int, Any] = field(default_factory=dict)
    deaths: int = 0
    resends: bool = False
    absent: bool = False


class Fleet(Generic[Job]):
    """`num` workers. One run at a time.

    spawn(): make a worker. prepare(worker, number): the calls that a new worker must have made before it gets jobs. sticky: a dead
    worker's jobs wait for its successor, who knows what has become of them; else any worker gets them. may_replace(): whether a
    dead worker gets a successor now; else at the next `revive`. say: called with a message when a worker is replaced.
    """

    def __init__(
        self,
        num: int,
        calls: Calls,
        spawn: Callable[[], Any],
        prepare: Callable[[Any, int], list[Any]],
        *,
        sticky: bool = False,
        may_replace: Callable[[], bool] = lambda: True,
        say: Callable[[str], None] = print,
    ) -> None:
        self._calls, self._spawn, self._prepare, self._sticky, self._say = calls, spawn, prepare, sticky, say
        self._may_replace = may_replace
        self.slots = [Slot(number) for number in range(num)]
        self.replaced = 0
        for slot in self.slots:
            self._fill(slot)

    def _fill(self, slot: Slot) -> None:
        slot.worker = self._spawn()
        slot.calls = deque((reference, False) for reference in self._prepare(slot.worker, slot.number))

    def call(self, ask: Callable[[Any], Any]) -> list[Any]:
        """Make one call to every worker; return the results in the workers' order. A worker that dies is replaced and asked."""
        return self.call_each(lambda worker, number: ask(worker))

    def call_each(self, ask: Callable[[Any, int], Any]) -> list[Any]:
        """As `call`; ask(worker, its slot's number)."""
        for slot in self.present():
            self._prepared(slot)
        asked = [(slot, ask(slot.worker, slot.number)) for slot in self.present()]
        return [self._called(slot, reference, ask) for slot, reference in asked]

    def revive(self) -> None:
        """Give every worker that is absent a successor, and wait until it is prepared."""
        revived = [slot for slot in self.slots if slot.absent]
        for slot in revived:
            slot.absent = False
            self._fill(slot)
        for slot in revived:
            self._prepared(slot)

    def present(self) -> list[Slot]:
        """Return the places that have a worker."""
        return [slot for slot in self.slots if not slot.absent]

    def _called(self, slot: Slot, reference: Any, ask: Callable[[Any, int], Any]) -> Any:
        while True:
            try:
                return self._calls.get(reference)
            except WorkerLostError as died:
                self._replace(slot, died)
                if slot.absent:
                    raise UserError(
                        f"engine.replicas: replica {slot.number} ended while it was given new weights ({died}); run again to go on "
                        "from the last checkpoint."
                    ) from None
                self._prepared(slot)
                reference = ask(slot.worker, slot.number)

    def _prepared(self, slot: Slot) -> None:
        """Wait until a worker is prepared."""
        while slot.calls:
            try:
                self._calls.get(slot.calls.popleft()[0])
            except WorkerLostError as died:
                self._replace(slot, died)

    def run(
        self,
        jobs: Iterable[Job],
        ask: Callable[[Any, list[tuple[int, Job]]], Any],
        window: int,
        may_take: Callable[[], bool] = lambda: True,
    ) -> Iterator[tuple[int, Job, Any]]:
        """Yield (number, job, answer) of every job as answers come; jobs are numbered from 0 and taken lazily.

        ask(worker, numbered jobs): a call that returns answers as (number, answer). A worker holds at most `window` jobs.
        may_take: whether further jobs may be taken now. Raises UserError if a worker dies again and again.
        """
        source = enumerate(jobs)
        pending: deque[tuple[int, Job]] = deque()
        try:
            while True:
                held, present = sum(len(slot.unanswered) for slot in self.slots), len(self.present())
                if may_take():
                    pending.extend(itertools.islice(source, max(0, window * present - held - len(pending))))
                self._give(pending, held, ask, window)
                if not any(slot.calls for slot in self.slots):
                    return
                for slot in self._ready():
                    for number, answer in self._answers(slot, pending):
                        job = slot.unanswered.pop(number, None)
                        slot.deaths = 0
                        if job is not None:
                            yield number, job, answer
        finally:
            for slot in self.slots:
                slot.calls = deque(call for call in slot.calls if not call[1])
                slot.unanswered.clear()

    def _give(self, pending: deque[tuple[int, Job]], held: int, ask: Any, window: int) -> None:
        """Give every worker its even share of the jobs, and ask those that hold jobs but have no call for answers."""
        present = self.present()
        share = min(window, math.ceil((held + len(pending)) / len(present)))
        for slot in sorted(present, key=lambda slot: len(slot.unanswered)):
            if slot.resends:
                slot.calls.append((ask(slot.worker, list(slot.unanswered.items())), True))
                slot.resends = False
            wanted = share - len(slot.unanswered)
            if pending and wanted > 0 and len(slot.calls) < CALLS:
                given = [pending.popleft() for _ in range(min(wanted, len(pending)))]
                slot.unanswered.update(given)
                slot.calls.append((ask(slot.worker, given), True))
            elif slot.unanswered and not any(brings for _, brings in slot.calls):
                slot.calls.append((ask(slot.worker, []), True))

    def _ready(self) -> list[Slot]:
        """Wait for a worker's next call to return; return all workers of whom one has."""
        first = {slot.calls[0][0]: slot for slot in self.slots if slot.calls}
        return [first[reference] for reference in self._calls.wait(list(first))]

    def _answers(self, slot: Slot, pending: deque[tuple[int, Job]]) -> Numbered:
        reference, brings = slot.calls.popleft()
        try:
            found = self._calls.get(reference)
        except WorkerLostError as died:
            again = len(slot.unanswered)
            if not self._sticky:
                pending.extendleft(reversed(slot.unanswered.items()))
                slot.unanswered.clear()
            self._replace(slot, died, again)
            return []
        return found if brings else []

    def _replace(self, slot: Slot, died: WorkerLostError, again: int = 0) -> None:
        """Put a successor into a dead worker's place; its preparation is under way."""
        slot.deaths += 1
        self.replaced += 1
        if slot.deaths >= MAX_DEATHS:
            raise UserError(
                f"engine.replicas: replica {slot.number} ended {slot.deaths} times in a row without an answer ({died}). What "
                "it printed is in the stage's log.txt; lower engine.batch_size or engine.kv_cache_gib if memory ran out."
            )
        self._calls.end(slot.worker)
        if not self._may_replace():
            slot.absent = True
            slot.calls.clear()
            if not self.present():
                raise UserError(
                    f"engine.replicas: every replica has ended ({died}); run again to go on from the last checkpoint."
                )
            self._say(
                f"replica {slot.number} ended ({died}); {again} requests are asked again, and it is replaced at the next sync"
            )
            return
        self._say(f"replica {slot.number} ended ({died}); it is replaced, and {again} requests are asked again")
        self._fill(slot)
        slot.resends = self._sticky and bool(slot.unanswered)

    def close(self) -> None:
        """End all workers."""
        for slot in self.slots:
            self._calls.end(slot.worker)
