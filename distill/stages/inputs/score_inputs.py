"""Traces that exist already, as blocks that a model can score: shards, or conversations of a data set.

Out: blocks of `Traces` with text, verdicts and the ids to be scored, without log-probabilities. Shards of the same
tokenizer keep their ids, as the engine sampled them; any other text is rendered in the scoring model's own tokens.
Trace ids come from the shards, or from the text alone, so every model that scores the same data gives the same ones.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distill import models
from distill.conversations import Conversation, Reader
from distill.recipe import RowsConfig, ScoreStage
from distill.records import (
    Array,
    Message,
    Messages,
    Problem,
    Ragged,
    Task,
    Template,
    Traces,
    UserError,
    Verdict,
    stable_hash,
)
from distill.stages.context import Context, find_data
from distill.stages.inputs.conversation_data import DroppedRows, conversations, is_shard, open_rows
from distill.traces import provenance
from distill.traces.reader import SELECTION_FILE, open_traces
from distill.traces.schema import LIGHT_COLUMNS, Metadata

BLOCK_ROWS = 64
NO_VERDICT = Verdict(None, None, None)
AS_IT_IS = Template(name="as it is", system=None, plain="{question}", extract=str)
"""A conversation under the tokenizer's own chat template, nothing added."""


@dataclass(frozen=True, slots=True)
class ScoreInputs:
    """Traces to be scored.

    blocks: of at most BLOCK_ROWS rows, the same every time; what cannot be used is counted. text_from: who wrote the
    text. origin: the metadata of the shards it comes from, None for files and datasets. same_ids: whether the ids
    are those that were sampled. template: the name of what prompts were, or are, rendered with. rendered_with: what renders
    them here; unused where ids are kept.
    """

    blocks: Callable[[DroppedRows], Iterator[Traces]]
    text_from: str
    origin: Metadata | None
    same_ids: bool
    template: str
    rendered_with: Template = AS_IT_IS


def open_score_inputs(config: ScoreStage, context: Context, tokenizer: Any) -> ScoreInputs:
    """What a score stage's `data` names. Raises UserError where there is nothing of the kind."""
    task = context.task(config.task) if config.task is not None else None
    template = template_of(config, task)
    where = f"stages.{context.name}"
    if config.data in context.recipe.stages or is_traces(find_data(config.data)):
        reader = open_traces(context.data_path(config.data))
        if models.tokenizer_fingerprint(tokenizer) == reader.metadata.tokenizer:
            check_unused_options(config, config.data)
            return ScoreInputs(
                lambda _: reader.blocks(BLOCK_ROWS, LIGHT_COLUMNS),
                provenance.text_from(reader),
                reader.metadata,
                True,
                reader.metadata.template,
            )
        if task is None:
            raise UserError(
                f"{where}.task: is required here: {config.data!r} was written with another tokenizer, so its text is "
                "rendered anew, with the task's template."
            )
        models.check_template(tokenizer, template, f"tasks.{config.task}")

        def rendered(left_out: DroppedRows) -> Iterator[Traces]:
            for block in reader.blocks(BLOCK_ROWS, LIGHT_COLUMNS):
                yield render(block, tokenizer, template, left_out)

        return ScoreInputs(rendered, provenance.text_from(reader), reader.metadata, False, template.name, template)

    models.check_template(tokenizer, template, where)
    table = open_rows(config.data, config, f"{where}.data")

    def texts(left_out: DroppedRows) -> Iterator[Traces]:
        reader = Reader(config.fields, config.keep_wrong)
        for block in _blocks(conversations(table, reader, left_out), task, left_out):
            yield render(block, tokenizer, template, left_out)

    return ScoreInputs(texts, table.name, None, False, template.name, template)


def template_of(config: RowsConfig | None, task: Task | None) -> Template:
    """Return the task's template, or the chat template alone with the stage's options. config: None has no options."""
    options = {} if config is None else config.template_options
    if task is None:
        return dataclasses.replace(AS_IT_IS, options=options) if options else AS_IT_IS
    if options:
        raise UserError("template_options: belongs to the task here: tasks.NAME.template_options.")
    return task.template


def check_unused_options(config: RowsConfig, data: str) -> None:
    """Raise UserError for template options where the ids of traces are used as they are."""
    if config.template_options:
        raise UserError(
            f"template_options: {data!r} holds traces, whose prompts are used as they were generated. Set them for the task "
            "of the stage that generates: tasks.NAME.template_options."
        )
    if config.max_rows is not None:
        raise UserError(
            f"max_rows: {data!r} holds traces; a train stage takes some of them with max_traces, a filter stage selects them."
        )


def is_traces(path: Path | None) -> bool:
    """Whether there are shards, a selection of them or a single one at a path."""
    if path is None or not path.is_dir():
        return path is not None and path.suffix == ".parquet" and is_shard(path)
    return any(path.glob("manifest-*.json")) or (path / SELECTION_FILE).is_file()


def _blocks(given: Iterator[Conversation], task: Task | None, left_out: DroppedRows) -> Iterator[Traces]:
    """Yield conversations as blocks without ids; a conversation that was there before is left out."""
    seen: set[str] = set()
    samples: Counter[str] = Counter()
    block: list[ScoredConversation] = []
    for one in given:
        try:
            conversation = conversation_to_score(one, samples)
        except ValueError as error:
            left_out.reject(one.number, str(error))
            continue
        if conversation.trace_id in seen:
            left_out.add("the same conversation as an earlier one")
            continue
        if task is not None and task.holds_out(conversation.question):
            left_out.add("one of the task's held-out problems")
            continue
        seen.add(conversation.trace_id)
        samples[conversation.problem_id] += 1
        block.append(conversation)
        if len(block) == BLOCK_ROWS:
            yield _traces(block, task)
            block = []
    if block:
        yield _traces(block, task)


@dataclass(frozen=True, slots=True)
class ScoredConversation:
    """A conversation whose last reply is scored. sample: its number among the replies to the same messages."""

    trace_id: str
    problem_id: str
    sample: int
    messages: Messages
    question: str
    reply: str
    gold: str | None


def conversation_to_score(given: Conversation, samples: Mapping[str, int]) -> ScoredConversation:
    """Return a conversation as a trace holds it. Raises ValueError for one that it cannot hold."""
    if given.reply is None:
        raise ValueError("there is no reply to score: end messages with the assistant")
    if given.tools or any(message.get("tool_calls") or message["role"] == "tool" for message in given.messages):
        raise ValueError("it uses tools, which traces cannot hold")
    messages = tuple({"role": m["role"], "content": _whole(m)} for m in given.prompt)
    reply, answer = _whole(given.reply), given.answer
    problem_id = stable_hash("conversation", json.dumps([dict(m) for m in messages]))
    return ScoredConversation(
        trace_id=stable_hash(problem_id, reply),
        problem_id=problem_id,
        sample=samples[problem_id],
        messages=messages,
        question=question_of(messages),
        reply=reply,
        gold=None if answer is None or isinstance(answer, bool) else _gold(answer),
    )


def question_of(messages: Messages) -> str:
    """Return the last question of a conversation."""
    return str(next(message["content"] for message in reversed(messages) if message["role"] == "user"))


def _whole(message: Message) -> str:
    """Return a message's text with the reasoning beside it in `<think>`."""
    reasoning = message.get("reasoning_content")
    return str(message["content"]) if reasoning is None else f"<think>{reasoning}</think>{message['content']}"


def _gold(answer: Any) -> str:
    from distill.tasks.jsonl_task import gold_text

    return gold_text(answer)


def _traces(block: Sequence[ScoredConversation], task: Task | None) -> Traces:
    verdicts = [_verdict(task, each) for each in block]
    empty = Ragged(np.empty(0, np.int32), np.zeros(len(block) + 1, np.int64))
    return Traces(
        trace_id=[each.trace_id for each in block],
        problem_id=[each.problem_id for each in block],
        sample=np.array([each.sample for each in block], np.int32),
        messages=[each.messages for each in block],
        completion=[each.reply for each in block],
        answer=[verdict.answer for verdict in verdicts],
        gold=[each.gold for each in block],
        prompt_ids=empty,
        completion_ids=empty,
        logprob=empty,
        top=None,
        reward=[verdict.score for verdict in verdicts],
        rewards={"accuracy": [None if v.correct is None else float(v.correct) for v in verdicts]},
        correct=[verdict.correct for verdict in verdicts],
        finish_reason=["stop"] * len(block),
    )


def _verdict(task: Task | None, conversation: ScoredConversation) -> Verdict:
    """By the task's judge, where the row says the answer; a generator's scorer needs more than that."""
    if task is None or conversation.gold is None or task.is_endless:
        return NO_VERDICT
    problem = Problem(
        conversation.problem_id,
        task.name,
        conversation.question,
        conversation.messages,
        conversation.gold,
    )
    return task.judge(problem, conversation.reply)


# ------------------------------------------------------------------------------------------------ rendering


def render(block: Traces, tokenizer: Any, template: Template, left_out: DroppedRows) -> Traces:
    """Return the block with its text in a tokenizer's own ids; a trace that was cut at its limit gets no final EOS.

    Traces that the chat template cannot hold are left out and counted.
    """
    prompts: list[Array] = []
    replies: list[Array] = []
    kept: list[int] = []
    for n, (messages, text, finish) in enumerate(
        zip(block.messages, block.completion, block.finish_reason, strict=True)
    ):
        reply = {"role": "assistant", "content": text}
        try:
            prompt = models.render_prompt(tokenizer, template, messages)
            replies.append(models.render_reply(tokenizer, template, messages, reply, finished=finish != "length"))
        except UserError as error:
            left_out.reject(n, str(error))
            continue
        prompts.append(prompt)
        kept.append(n)
    return dataclasses.replace(
        take(block, np.array(kept, np.int64)),
        completion=[models.decode(tokenizer, ids) for ids in replies],
        prompt_ids=Ragged.from_rows(prompts, np.int32),
        completion_ids=Ragged.from_rows(replies, np.int32),
    )


def take(block: Traces, index: Array) -> Traces:
    """Take rows of a block without distributions."""

    def rows(column: Any) -> Any:
        if isinstance(column, Ragged):
            # Columns that were not read have the block's length and empty values.
            return column.take(index)
        if isinstance(column, dict):
            return {name: rows(each) for name, each in column.items()}
        if isinstance(column, np.ndarray):
            return column[index]
        return None if column is None else [column[n] for n in index]

    return Traces(**{f.name: rows(getattr(block, f.name)) for f in dataclasses.fields(Traces)})
