"""train: a model learns from stored traces, or from a file of worked conversations."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distill import jsonl, models, plug
from distill.recipe import TrainStage
from distill.records import UserError, draw_seed
from distill.stages.context import Context, Result, fingerprint_of
from distill.stages.costs import tally_cost, teachers_cost
from distill.stages.resolve import LOSSES, load_teachers, resolve_loss
from distill.stages.sources import AS_IT_IS
from distill.stages.trainee import keep_trainee, load_trainee
from distill.traces.reader import TraceReader, open_traces
from distill.training import loop, losses
from distill.training.loop import Step
from distill.training.packing import Example, Source, examples_of, pack, steps, steps_per_epoch
from distill.training.policy import Policy


def run(config: TrainStage, context: Context) -> Result:
    where = f"stages.{context.name}"
    objective = resolve_loss(config, where)
    folder, trust = context.model_dir(config.model), context.trusts(config.model)
    tokenizer = models.load_tokenizer(folder, trust_remote_code=trust)
    teachers = load_teachers(config, context, tokenizer)
    source = open_source(config, context, tokenizer)
    num_steps = config.steps or (config.epochs or 1) * steps_per_epoch(
        source.num_examples, config.batch_traces
    )

    model = load_trainee(config, context)

    def source_steps(start: int, _: Policy) -> Iterator[Step]:
        for examples in steps(
            source, batch_traces=config.batch_traces, num_steps=num_steps, start=start
        ):
            yield Step(pack(examples, micro_tokens=config.micro_tokens, normalise=config.normalise))

    live = context.live(num_steps, "steps")

    def show(step: int, metrics: dict[str, float]) -> None:
        shown = {key: metrics[key] for key in ("loss", "tokens_per_second")}
        live.update(step, **shown)

    tally = loop.train(
        model,
        source_steps,
        objective,
        config,
        num_steps=num_steps,
        vocab_size=len(tokenizer),
        folder=context.folder,
        teachers=teachers,
        name=context.name,
        show=show,
    )
    live.close()
    fingerprint, shape = keep_trainee(model, tokenizer, config, context)
    return Result(
        tally_cost(config, shape, tally),
        _metrics(context.folder, tally, source, num_steps),
        fingerprint,
        teachers_cost(teachers, tally),
    )


def _metrics(folder: Path, tally: loop.Tally, source: Source, num_steps: int) -> dict[str, Any]:
    lines = [
        json.loads(line)
        for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    return {
        "steps": num_steps,
        "examples": source.num_examples,
        "loss": lines[-1]["loss"],
        "label_nll": lines[-1]["label_nll"],
        "bad_steps": tally.bad_steps,
        "tokens_per_second": tally.tokens / tally.seconds if tally.seconds else 0.0,
    }


# ------------------------------------------------------------------------------------------------ sources


def open_source(config: TrainStage, context: Context, tokenizer: Any) -> Source:
    """The stage's examples: trace shards (or a selection of them), or the rows of a JSONL file."""
    path = context.data_path(config.data)
    seed = draw_seed(context.seed, context.name, "order")
    source = (
        _file_source(config, context, tokenizer, path, seed)
        if path.suffix == ".jsonl"
        else _shard_source(config, context, tokenizer, path, seed)
    )
    if source.num_examples == 0:
        raise UserError(f"stages.{context.name}.data: {config.data!r} holds nothing to learn from.")
    return source


@dataclass(frozen=True, slots=True)
class ShardSource:
    """Traces streamed from shards in a shuffled order; only the columns that the loss needs are read."""

    reader: TraceReader
    seed: int
    with_top: bool

    @property
    def num_examples(self) -> int:
        return self.reader.num_rows

    @property
    def fingerprint(self) -> str:
        return self.reader.fingerprint

    def epoch(self, index: int, skip: int = 0) -> Iterator[Example]:
        columns = ["trace_id", "prompt_ids", "completion_ids"]
        if self.with_top:
            columns += ["logprob", "top_count", "top_ids", "top_logprobs", "tail_logprob"]
        for block in self.reader.shuffled(draw_seed(self.seed, index), skip=skip, columns=columns):
            yield from examples_of(block, with_top=self.with_top)


def _shard_source(
    config: TrainStage, context: Context, tokenizer: Any, path: Path, seed: int
) -> Source:
    where = f"stages.{context.name}"
    reader = open_traces(path)
    with_top = _wants_teacher(config)
    if with_top and reader.metadata.top_k == 0:
        raise UserError(
            f"{where}.loss: {config.loss.fn} learns from the teacher's distributions, and {config.data!r} was generated "
            "with top_k: 0. Generate with top_k > 0, or use loss: {fn: cross_entropy}."
        )
    same = models.tokenizer_fingerprint(tokenizer) == reader.metadata.tokenizer
    if with_top:
        models.check_same_tokenizer(
            reader.metadata.tokenizer, reader.metadata.vocab_size, tokenizer, where
        )
    lengths = reader.lengths()
    fits = lengths.prompt + lengths.completion <= config.max_tokens
    finished = np.concatenate(
        [
            np.array([r != "length" for r in b.finish_reason], bool)
            for b in reader.blocks(4096, ["finish_reason"])
        ]
        or [np.empty(0, bool)]
    )
    keep = fits & (finished if config.truncated == "drop" else True)
    _say_dropped(context, longer=int((~fits).sum()), truncated=int((~keep).sum() - (~fits).sum()))
    reader = reader.where(keep)
    return (
        ShardSource(reader, seed, with_top)
        if same
        else _text_source(config, context, tokenizer, reader, seed)
    )


def _wants_teacher(config: TrainStage) -> bool:
    """Whether the loss reads a stored distribution: every loss but cross entropy may, without a teacher in the trainer."""
    return config.teacher is None and plug.find(config.loss.fn, LOSSES) is not losses.cross_entropy


def _say_dropped(context: Context, **reasons: int) -> None:
    names = {
        "longer": "longer than max_tokens",
        "truncated": "cut at the token limit",
        "rejected": "not usable",
    }
    for reason, count in reasons.items():
        if count:
            context.say(f"{count} traces left out: {names[reason]}")


@dataclass(frozen=True, slots=True)
class ListSource:
    """Examples that are small enough to keep: a file's rows, rendered."""

    examples: list[Example]
    seed: int
    fingerprint: str

    @property
    def num_examples(self) -> int:
        return len(self.examples)

    def epoch(self, index: int, skip: int = 0) -> Iterator[Example]:
        order = np.random.default_rng(draw_seed(self.seed, index)).permutation(len(self.examples))
        return (self.examples[n] for n in order[skip:])


def _text_source(
    config: TrainStage, context: Context, tokenizer: Any, reader: TraceReader, seed: int
) -> Source:
    """Traces of a teacher with another tokenizer: their text in the student's own ids, for cross entropy only."""
    context.say(
        "the teacher's tokenizer is another one: learning from the traces' text, in the student's own tokens"
    )
    template = _template(config, context)
    examples = []
    for block in reader.blocks(256, ["trace_id", "messages", "completion"]):
        for trace_id, messages, completion in zip(
            block.trace_id, block.messages, block.completion, strict=True
        ):
            prompt = models.render_prompt(tokenizer, template, json.loads(messages))
            examples.append(
                Example(trace_id, prompt, models.render_completion(tokenizer, completion))
            )
    return ListSource(examples, seed, reader.fingerprint)


def _template(config: TrainStage, context: Context) -> Any:
    if config.task is None:
        raise UserError(
            f"stages.{context.name}.task: is required here: the prompts are rendered with the task's template."
        )
    return context.task(config.task).template


def _file_source(
    config: TrainStage, context: Context, tokenizer: Any, path: Path, seed: int
) -> Source:
    where = f"stages.{context.name}.data: {path}"
    task = context.task(config.task) if config.task else None
    rejected: list[tuple[int, str]] = []
    examples, longer = [], 0
    for number, row in jsonl.read_rows(path, lambda line, reason: rejected.append((line, reason))):
        try:
            messages, reply = jsonl.conversation(row)
            if reply is None:
                raise ValueError(
                    "there is no reply to learn: give it a completion, or end messages with the assistant"
                )
        except ValueError as error:
            rejected.append((number, str(error)))
            continue
        if "messages" not in row and task is None:
            raise UserError(
                f"stages.{context.name}.task: is required for rows of question and completion."
            )
        if task is not None and task.holds_out(messages[-1]["content"]):
            raise UserError(
                f"{where}: line {number} is one of the task's held-out problems; learning from it would spoil every "
                "evaluation. Remove the row."
            )
        prompt = models.render_prompt(tokenizer, task.template if task else AS_IT_IS, messages)
        example = Example(
            f"{path.name}:{number}", prompt, models.render_completion(tokenizer, reply)
        )
        if len(example) > config.max_tokens:
            longer += 1
        else:
            examples.append(example)
    for line, reason in rejected[:5]:
        context.say(f"{path}: line {line} left out: {reason}")
    _say_dropped(context, longer=longer, rejected=len(rejected))
    return ListSource(examples, seed, fingerprint_of(path))
