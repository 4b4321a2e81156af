"""A simulated fleet: the real scheduler, judge and writer; workers are threads of this process, and their engines sleep.

Each engine decodes 16 completions at a time, 4 s each (4 rows/s): what is measured is what the driver and the writers add.
linear: rows a second by the replicas' number x those of one. Then, with --rows, that many rows through the driver (their
workers answer at once and write nothing): the memory of the process after a tenth of them and after all; and the time to open
a folder that holds as many rows and to find the one that is missing.

    python tests/bench/bench_fleet.py [--replicas 1 8 32 64] [--rows 10000000]
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from harness import report

HERE = Path(__file__).parent
sys.path += [str(HERE.parent / name) for name in ("engines", "traces")]

# ruff: noqa: E402
from counting_engine import CountingEngine
from thread_workers import ThreadCalls, ThreadWorker
from trace_samples import metadata

from distill.engines.fleet import Fleet
from distill.recipe import GenerateStage
from distill.records import Problem, Prompt, Ragged, Traces, Verdict
from distill.stages.sampling import Grader
from distill.stages.trace_replicas import Answer, TraceReplica, Work, fill, window
from distill.stages.trace_rows import Generation, SamplingCounts, WantedProblem
from distill.stages.trace_sampling import Survey, missing_problems
from distill.tasks.templates import raw
from distill.traces.reader import open_traces
from distill.traces.writer import TraceWriter

BATCH, SECONDS = 16, 4.0
TOP_K = 4


def prompts(num: int) -> list[Prompt]:
    ids = np.arange(5, 25, dtype=np.int32)
    return [
        Prompt(Problem(f"{n:016x}", "toy", str(n), ({"role": "user", "content": str(n)},), "1"), ids)
        for n in range(num)
    ]


def stage(samples: int) -> GenerateStage:
    return GenerateStage(
        kind="generate", model="m", task="t", problems=1, samples=samples, top_logprobs=TOP_K,
        sampling={"max_tokens": 30}, engine={"fn": "counting_engine:engine", "batch_size": BATCH}, shard_rows=64,
    )  # fmt: skip


def grader() -> Grader:
    return Grader(raw, lambda problem, text, finished: Verdict(True, 1.0, text), lambda ids: " ".join(map(str, ids)))


def rows_per_second(replicas: int, seconds: float) -> tuple[float, float]:
    """Fill a folder with as many rows as the engines make in about `seconds`; return rows/s, and this process's CPU cores."""
    num = int(replicas * BATCH / SECONDS * seconds)
    with tempfile.TemporaryDirectory() as folder:
        config = stage(1)
        meta = metadata(top_k=TOP_K)
        generation = Generation.of(meta, 0, "traces")
        work = Work(config, Path(folder), "traces", Path(folder) / "traces", meta, generation)
        names = iter(range(10 * replicas))

        def make() -> TraceReplica:
            replica = TraceReplica()
            engine = CountingEngine(BATCH, 64, SECONDS)
            replica.prepare(work, f"r{next(names)}", grader(), None, engine)
            return replica

        fleet = Fleet(replicas, ThreadCalls(), lambda: ThreadWorker(make), lambda worker, number: [])
        counts = SamplingCounts()
        with TraceWriter(work.folder, meta) as writer:
            every = prompts(num)
            problems = missing_problems(every, Survey.of(every, 1, generation, writer).lacking, {})
            began, cpu = time.monotonic(), time.process_time()
            fill(fleet, config, problems, counts, lambda text: None)
            took, cpu = time.monotonic() - began, time.process_time() - cpu
        fleet.close()
        assert sum(shard.rows for shard in open_traces(work.folder).shards) == counts.completions == num
    return num / took, cpu / took


class Instant:
    """A worker that answers at once and writes nothing."""

    def work(self, given: list[tuple[int, WantedProblem]]) -> list[tuple[int, Answer]]:
        return [(number, Answer(SamplingCounts(completions=len(problem.samples)))) for number, problem in given]


def resident() -> float:
    """Resident memory of this process, MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def through_the_driver(rows: int, samples: int = 10) -> dict[str, object]:
    """Hand out `rows` rows; the problems are made once, before."""
    every = prompts(rows // samples)
    fleet = Fleet(8, ThreadCalls(), lambda: ThreadWorker(Instant), lambda worker, number: [])
    done, memory = 0, []
    began = time.monotonic()
    jobs: Iterator[WantedProblem] = missing_problems(every, np.ones((len(every), samples), bool), {})
    for _, _, answer in fleet.run(jobs, lambda worker, given: worker.work.remote(given), window(stage(samples))):
        done += answer.counts.completions
        if done >= (len(memory) + 1) * rows // 10:
            memory.append(resident())
    fleet.close()
    assert done == rows
    return {
        "rows": rows, "rows/s": rows / (time.monotonic() - began), "MiB at a tenth": memory[0], "MiB at the end": memory[-1],
    }  # fmt: skip


def resumed(rows: int, samples: int = 10) -> dict[str, object]:
    """Write `rows` rows less one without distributions, and time how a stage begins again."""
    every, generation = prompts(rows // samples), Generation("0" * 16, 0, "traces")
    meta = metadata(top_k=0)
    block = 50_000
    with tempfile.TemporaryDirectory() as folder:
        with TraceWriter(folder, meta, shard_rows=block) as writer:
            ids = ((p, s) for p in every for s in range(samples))
            next(ids)
            left = rows - 1
            while left:
                some = [next(ids) for _ in range(min(block, left))]
                left -= len(some)
                writer.add(bare(some, generation))
        began = time.monotonic()
        with TraceWriter(folder, meta) as writer:
            opened = time.monotonic() - began
            survey = Survey.of(every, samples, generation, writer)
            assert survey.missing == 1
            found = next(missing_problems(every, survey.lacking, {}))
            assert found.samples == (0,)
        return {"rows": rows, "open s": opened, "resume s": time.monotonic() - began, "MiB at the end": resident()}


def bare(some: list[tuple[Prompt, int]], generation: Generation) -> Traces:
    one = np.ones(1, np.int32)
    num = len(some)
    return Traces(
        trace_id=[generation.trace_id(prompt.problem.problem_id, sample) for prompt, sample in some],
        problem_id=[prompt.problem.problem_id for prompt, _ in some],
        sample=np.array([sample for _, sample in some], np.int32),
        messages=[prompt.problem.messages for prompt, _ in some],
        completion=["1"] * num,
        answer=["1"] * num,
        gold=["1"] * num,
        prompt_ids=Ragged.from_rows([one] * num, np.int32),
        completion_ids=Ragged.from_rows([one] * num, np.int32),
        logprob=Ragged.from_rows([-one] * num, np.float32),
        top=None,
        reward=[1.0] * num,
        rewards={"accuracy": [1.0] * num},
        correct=[True] * num,
        finish_reason=["stop"] * num,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replicas", type=int, nargs="*", default=[1, 8, 32, 64])
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--rows", type=int, default=0)
    options = parser.parse_args()
    rows: list[dict[str, object]] = []
    one = 0.0
    for replicas in options.replicas:
        speed, cpu = rows_per_second(replicas, options.seconds)
        one = one or speed / replicas
        rows.append({"replicas": replicas, "rows/s": speed, "linear": speed / replicas / one, "cores used": cpu})
    if options.rows:
        rows.append(through_the_driver(options.rows))
        rows.append(resumed(options.rows))
    report("fleet", rows, HERE / "out")


if __name__ == "__main__":
    main()
