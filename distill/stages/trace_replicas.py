"""Many engines whose actors judge and write their own traces, where one process could not keep up with them.

In: problems of which traces are missing. Out: shards, each actor's under its own writer name. A problem counts as answered when
its traces are on the disk, so a successor of a dead actor finds out what is left of its problems. All engines of up to
DRIVER_WRITES replicas send their completions to the stage's process instead (`engines.ray`).
"""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.engines.fleet import Feed, requests_held
from distill.recipe import EvalStage, GenerateStage

if TYPE_CHECKING:
    from distill.engines.fleet import Fleet
    from distill.engines.ray_replica import Start
    from distill.stages.context import Context
    from distill.stages.trace_rewards import RewardedCompletion
    from distill.stages.trace_rows import Generation, SamplingCounts, WantedProblem
    from distill.traces.schema import Metadata
    from distill.traces.writer import StoredRows

DRIVER_WRITES = 8
"""Up to this many replicas the stage's process judges and writes (about 7 microseconds a position)."""
SLICE = 0.05
"""Seconds after which a call returns the problems that are on the disk."""
NO_ANSWER = 1.0
"""Seconds after which a call returns without any."""


def writes_itself(config: GenerateStage | EvalStage) -> bool:
    """Return whether the stage's actors write."""
    return isinstance(config, GenerateStage) and config.engine.replicas > DRIVER_WRITES


@dataclass(frozen=True, slots=True)
class Work:
    """What an actor needs besides its engine. run, name: of the stage. folder: of the traces."""

    config: GenerateStage
    run: Path
    name: str
    folder: Path
    metadata: Metadata
    generation: Generation


@dataclass(slots=True)
class Answer:
    """A problem's traces are on the disk. counts: of those that the call's actor sampled. text: of one of them."""

    counts: SamplingCounts
    text: str = ""


@dataclass(slots=True)
class _Open:
    """A problem in progress. left: its rows that are not on the disk yet."""

    number: int
    left: int
    answer: Answer


class TraceReplica:
    """An actor: an engine, the judge and rewards, and a writer of its own. Imports come late, after the environment is set."""

    def __init__(self) -> None:
        self._feed: Feed[WantedProblem] = Feed()
        self._open: dict[str, _Open] = {}
        self._rows: Iterator[RewardedCompletion] | None = None
        self._block: list[RewardedCompletion] = []

    def start(self, start: Start, work: Work, writer: str) -> None:
        """Open the engine, the task and the writer."""
        from distill.engines.ray_replica import Replica

        self._replica = Replica()
        self._replica.start(start)

        from distill import models, run_folder
        from distill.progress import Screen
        from distill.stages.context import Context
        from distill.stages.inputs.named_rewards import named_rewards
        from distill.stages.sampling import Grader

        models.pin_date(run_folder.environment(work.run)["date"])
        context = Context(run_folder.recipe(work.run), work.run, work.name, Screen(io.StringIO()))
        folder, trust = context.model_dir(work.config.model), context.trusts(work.config.model)
        tokenizer = models.load_tokenizer(folder, trust_remote_code=trust)
        grader = Grader.of(context.task(work.config.task), tokenizer)
        rewards = named_rewards(work.config, f"stages.{work.name}")
        self.prepare(work, writer, grader, rewards, self._replica.engine)

    def prepare(self, work: Work, writer: str, grader: Any, rewards: Any, engine: Any) -> None:
        """Take up what `start` has opened, and open the writer."""
        from distill.traces.writer import StoredRows, TraceWriter

        self._work, self._grader, self._rewards, self._engine = work, grader, rewards, engine
        self._writer = TraceWriter(
            work.folder, work.metadata, shard_rows=work.config.shard_rows, writer=writer, only_own=True
        )
        self._stored: StoredRows[str] = StoredRows(self._writer)

    def facts(self) -> Any:
        return self._replica.facts()

    def work(self, problems: list[tuple[int, WantedProblem]]) -> list[tuple[int, Answer]]:
        """Take further problems; return those that are on the disk."""
        from distill.stages.trace_rows import BLOCK_ROWS

        answers = self._take(problems)
        began = time.monotonic()
        while time.monotonic() - began < (SLICE if answers else NO_ANSWER):
            if self._rows is None:
                if not self._feed:
                    self._flush()
                    self._writer.flush()
                    answers += self._written()
                    break
                self._rows = self._sample()
            row = next(self._rows, None)
            if row is None:
                self._rows = None
                continue
            self._block.append(row)
            if len(self._block) >= BLOCK_ROWS:
                self._flush()
            answers += self._written()
        return answers

    def _take(self, problems: list[tuple[int, WantedProblem]]) -> list[tuple[int, Answer]]:
        """Queue the problems that lack traces; return those of which a predecessor has written all."""
        from distill.stages.trace_rewards import stored_completions
        from distill.stages.trace_rows import SamplingCounts, WantedProblem

        generation, answers = self._work.generation, []
        for number, wanted in problems:
            problem = wanted.prompt.problem.problem_id
            lacking = tuple(n for n in wanted.samples if generation.trace_id(problem, n) not in self._writer)
            answer = Answer(SamplingCounts())
            if not lacking:
                answers.append((number, answer))
                continue
            stored = wanted.stored
            if len(lacking) < len(wanted.samples) and self._rewards is not None:
                there = [generation.request(wanted.prompt, n) for n in wanted.samples if n not in lacking]
                by_id = {request.request_id: request for request in there}
                stored += tuple(stored_completions(self._work.folder, by_id, self._grader)[problem])
            self._open[problem] = _Open(number, len(lacking), answer)
            self._feed.extend([WantedProblem(wanted.prompt, lacking, stored)])
        return answers

    def _sample(self) -> Iterator[RewardedCompletion]:
        from distill.stages.trace_rows import RowSampler, SamplingCounts

        work = self._work
        sampler = RowSampler(work.config, work.generation, self._grader, work.metadata, SamplingCounts(), self._rewards)
        return sampler.rows(self._engine, self._feed)

    def _flush(self) -> None:
        """Give the rows that wait to the writer."""
        from distill.stages.trace_rows import as_traces

        if not self._block:
            return
        for row in self._block:
            answer = self._open[row.graded.request.prompt.problem.problem_id].answer
            answer.counts.count(row.graded)
            answer.counts.completions_unrewarded += row.failed
            answer.text = row.graded.text[:200]
        self._stored.added(row.graded.request.prompt.problem.problem_id for row in self._block)
        self._writer.add(as_traces(self._block))
        self._block = []

    def _written(self) -> list[tuple[int, Answer]]:
        """Return the problems of which the last row has reached the disk."""
        answers = []
        for problem in self._stored.take():
            one = self._open[problem]
            one.left -= 1
            if not one.left:
                del self._open[problem]
                answers.append((one.number, one.answer))
        return answers

    def finish(self) -> dict[str, int]:
        """Close the writer; return how often each reward failed."""
        self._writer.close()
        return self._rewards.failures if self._rewards is not None else {}


def writer_name(number: int) -> str:
    """Return the writer name of a replica."""
    return f"r{number}"


def fill_by_replicas(
    config: GenerateStage,
    context: Context,
    folder: Path,
    metadata: Metadata,
    generation: Generation,
    length: int,
    wanted: Iterable[WantedProblem],
    counts: SamplingCounts,
    begin: Callable[[], None],
    show: Callable[[str], None],
) -> None:
    """Sample and write the wanted problems with the stage's replicas.

    begin: called when the engines are there. show: called with a completion's text, for progress.
    """
    from distill.engines.ray import Replicas

    context.engine.close()
    context.phase(f"starting {config.engine.replicas} {config.engine.fn} engines")
    with Replicas(
        config.engine, context.model_dir(config.model), max_model_len=length, max_top_k=metadata.top_k
    ) as replicas:
        work = Work(config, context.run.resolve(), context.name, folder.resolve(), metadata, generation)
        fleet = replicas.fleet(
            TraceReplica,
            lambda actor, number: [actor.start.remote(replicas.start, work, writer_name(number))],
            sticky=True,
        )
        fleet.call(lambda actor: actor.facts.remote())
        begin()
        fill(fleet, config, wanted, counts, show)


def fill(
    fleet: Fleet[WantedProblem],
    config: GenerateStage,
    wanted: Iterable[WantedProblem],
    counts: SamplingCounts,
    show: Callable[[str], None],
) -> None:
    """Give the wanted problems to a fleet of TraceReplicas until all are on the disk, and let them finish."""
    from distill.stages.trace_rows import SamplingCounts

    for _, _, answer in fleet.run(wanted, lambda actor, given: actor.work.remote(given), window(config)):
        counts.add(answer.counts)
        if answer.counts.completions:
            show(answer.text)
    for failures in fleet.call(lambda actor: actor.finish.remote()):
        counts.add(SamplingCounts(rewards_failed=failures))


def window(config: GenerateStage) -> int:
    """Return the problems that an actor holds: those that it decodes, some more, and those that wait for their shard."""
    return math.ceil((requests_held(config.engine.batch_size) + config.shard_rows) / config.samples) + 1
