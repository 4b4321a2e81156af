"""Traces that exist already, as blocks that a model can score: shards, chat JSONL, `datasets` folders, hub datasets.

Out: blocks of `Traces` with text, verdicts and the ids to be scored, without log-probabilities. Shards of the same
tokenizer keep their ids, as the engine sampled them; any other text is rendered in the scoring model's own tokens.
Trace ids come from the shards, or from the text alone, so every model that scores the same data gives the same ones.

Left out on purpose: which traces are worth it (filters see them afterwards), and repairing a row.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from distill import jsonl, models
from distill.models import hub
from distill.plug import nearest
from distill.recipe import ScoreStage
from distill.records import (
    Array,
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
from distill.traces import provenance
from distill.traces.reader import SELECTION_FILE, open_traces
from distill.traces.schema import LIGHT_COLUMNS, Metadata

BLOCK_ROWS = 64
THINK = "<think>"
NO_VERDICT = Verdict(None, None, None)
AS_IT_IS = Template(name="as it is", system=None, plain="{question}", extract=str)
"""A conversation under the tokenizer's own chat template, nothing added."""


@dataclass(frozen=True, slots=True)
class ConversationSource:
    """A file or dataset of conversations.

    rows: numbered from 1; what is no row at all goes to the callback, by number with the reason.
    """

    name: str
    rows: Callable[[jsonl.Reject], Iterator[tuple[int, dict[str, Any]]]]
    count: Callable[[], int]


@dataclass(slots=True)
class DroppedRows:
    """Why traces are not scored, counted; the first few rows that are not usable by number."""

    reasons: Counter[str] = field(default_factory=Counter)
    first: list[str] = field(default_factory=list)

    def add(self, reason: str, count: int = 1) -> None:
        if count:
            self.reasons[reason] += count

    def reject(self, number: int, reason: str) -> None:
        self.add("not usable")
        if len(self.first) < 5:
            self.first.append(f"row {number} left out: {reason}")


@dataclass(frozen=True, slots=True)
class ScoreInputs:
    """Traces to be scored.

    blocks: of at most BLOCK_ROWS rows, the same every time; what cannot be used is counted. text_from: who wrote the
    text. origin: the metadata of the shards it comes from, None for files and datasets. same_ids: whether the ids
    are those that were sampled. template: what prompts were, or are, rendered with.
    """

    blocks: Callable[[DroppedRows], Iterator[Traces]]
    text_from: str
    origin: Metadata | None
    same_ids: bool
    template: str


def open_score_inputs(config: ScoreStage, context: Context, tokenizer: Any) -> ScoreInputs:
    """What a score stage's `data` names. Raises UserError where there is nothing of the kind."""
    task = context.task(config.task) if config.task is not None else None
    template = task.template if task is not None else AS_IT_IS
    where = f"stages.{context.name}"
    if config.data in context.recipe.stages or is_traces(find_data(config.data)):
        reader = open_traces(context.data_path(config.data))
        if models.tokenizer_fingerprint(tokenizer) == reader.metadata.tokenizer:
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

        def rendered(_: DroppedRows) -> Iterator[Traces]:
            for block in reader.blocks(BLOCK_ROWS, LIGHT_COLUMNS):
                yield render(block, tokenizer, template)

        return ScoreInputs(rendered, provenance.text_from(reader), reader.metadata, False, template.name)

    models.check_template(tokenizer, template, where)
    source = open_rows(config.data, config.split, f"{where}.data", config.subset)

    def conversations(left_out: DroppedRows) -> Iterator[Traces]:
        for block in _blocks(source, task, left_out):
            yield render(block, tokenizer, template)

    return ScoreInputs(conversations, source.name, None, False, template.name)


def is_traces(path: Path | None) -> bool:
    """Whether there are shards, a selection of them or a single one at a path."""
    if path is None or not path.is_dir():
        return path is not None and path.suffix == ".parquet"
    return any(path.glob("manifest-*.json")) or (path / SELECTION_FILE).is_file()


# --------------------------------------------------------------------------------------- files and datasets


def open_rows(data: str, split: str, where: str, subset: str | None = None) -> ConversationSource:
    """A JSONL file, a folder that `datasets` saved, or a hub dataset. Raises UserError where it is none of them."""
    path = find_data(data)
    if path is not None and path.suffix == ".jsonl":
        return ConversationSource(
            f"{path.name} ({models.file_hash(path)[:16]})",
            lambda reject: jsonl.read_rows(path, reject),
            lambda: sum(1 for _ in jsonl.read_rows(path, lambda number, reason: None)),
        )
    if path is not None:
        table = _saved(path, split, where)
        name = f"{path.name}, split {split}"
    else:
        table = _from_hub(data, split, subset, where)
        name = f"{data.partition('@')[0]} ({hub.loaded_commit(table)[:16]}), split {split}"
    return ConversationSource(
        name,
        lambda _: ((number, dict(row)) for number, row in enumerate(table, 1)),
        lambda: len(table),
    )


def is_hub_id(data: str) -> bool:
    """Whether a name could be a dataset's on the hub: owner/name, or owner/name@revision."""
    return hub.dataset_id(data) is not None


def _saved(path: Path, split: str, where: str) -> Any:
    import datasets

    try:
        found = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{where}: {path} is neither a folder of traces, a JSONL file, nor what `datasets` saved: "
            f"{' '.join(str(error).split())}"
        ) from None
    return _split_of(found, split, where)


def _from_hub(data: str, split: str, subset: str | None, where: str) -> Any:
    """A split of a hub dataset at the commit that the stage's inputs are recorded with."""
    import datasets

    found = hub.dataset_id(data)
    if found is None:
        raise UserError(
            f"{where}: {data!r} is no stage, file, folder or hub dataset (owner/name, or owner/name@revision)."
        )
    name, revision = found
    commit = hub.dataset_commit(name, revision)
    with hub.offline_unless_reachable():
        try:
            loaded = datasets.load_dataset(name, subset, revision=revision if commit == hub.UNVERIFIED else commit)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{where}: {data!r} cannot be loaded: {' '.join(str(error).split())} Without a network, give a JSONL file "
                "or a folder that `datasets` saved."
            ) from None
    table = _split_of(loaded, split, where)
    if revision is not None and hub.loaded_commit(table) not in (commit, hub.UNVERIFIED):
        raise UserError(
            f"{where}: {data!r} is asked for, and without a network there is only {name}@{hub.loaded_commit(table)} in the "
            "cache. Take that one, or run where the hub can be reached."
        )
    return table


def _split_of(found: Any, split: str, where: str) -> Any:
    if not isinstance(found, Mapping):
        return found
    if split not in found:
        raise UserError(f"{where}: there is no split {split!r}.{nearest(split, found)}")
    return found[split]


def _blocks(source: ConversationSource, task: Task | None, left_out: DroppedRows) -> Iterator[Traces]:
    """Rows as blocks without ids; a conversation that was there before is left out."""
    seen: set[str] = set()
    samples: Counter[str] = Counter()
    block: list[_Conversation] = []
    for number, row in source.rows(left_out.reject):
        try:
            conversation = _conversation(row, samples)
        except ValueError as error:
            left_out.reject(number, str(error))
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
class _Conversation:
    trace_id: str
    problem_id: str
    sample: int
    messages: Messages
    question: str
    reply: str
    gold: str | None


def _conversation(row: Mapping[str, Any], samples: Mapping[str, int]) -> _Conversation:
    messages, reply = jsonl.conversation(row)
    if reply is None:
        raise ValueError("there is no reply to score: end messages with the assistant")
    answer = row.get("answer")
    problem_id = stable_hash("conversation", json.dumps([dict(m) for m in messages]))
    return _Conversation(
        trace_id=stable_hash(problem_id, reply),
        problem_id=problem_id,
        sample=samples[problem_id],
        messages=messages,
        question=next(m["content"] for m in reversed(messages) if m["role"] == "user"),
        reply=reply,
        gold=None if answer is None or isinstance(answer, bool) else str(answer),
    )


def _traces(block: Sequence[_Conversation], task: Task | None) -> Traces:
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


def _verdict(task: Task | None, conversation: _Conversation) -> Verdict:
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


def render(block: Traces, tokenizer: Any, template: Template) -> Traces:
    """The block with its text in a tokenizer's own ids; a trace that was cut at its limit gets no final EOS.

    Where the prompt opens the thinking itself, a reply that opens it too loses its `<think>`.
    """
    prompts: list[Array] = []
    replies: list[Array] = []
    texts: list[str] = []
    ends = tokenizer.eos_token_id is not None
    for messages, text, finish in zip(block.messages, block.completion, block.finish_reason, strict=True):
        prompt = models.render_prompt(tokenizer, template, messages)
        opened = tokenizer.decode(prompt[-8:]).rstrip().endswith(THINK)
        if opened and text.lstrip().startswith(THINK):
            text = text.lstrip().removeprefix(THINK).lstrip("\n")
        reply = models.render_completion(tokenizer, text)
        prompts.append(prompt)
        replies.append(reply[:-1] if ends and finish == "length" else reply)
        texts.append(text)
    return dataclasses.replace(
        block,
        completion=texts,
        prompt_ids=Ragged.from_rows(prompts, np.int32),
        completion_ids=Ragged.from_rows(replies, np.int32),
    )
