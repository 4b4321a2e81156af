"""The examples of a train stage: from trace shards (or a selection of them), or from conversations of a data set.

Shards of the student's tokenizer are streamed; what has to be rendered in the student's own tokens, or read by a teacher
that has others, is kept in memory.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from distill import models, plug, world
from distill.conversations import Reader
from distill.recipe import OnPolicyStage, TrainStage, teachers_of
from distill.records import Array, Template, Traces, UserError, draw_seed
from distill.stages.context import Context, find_data
from distill.stages.inputs import own_traces
from distill.stages.inputs.conversation_data import DroppedRows, conversations, nothing_found, open_rows
from distill.stages.inputs.learned_tokens import (
    may_read_distributions,
    needs_distributions,
    no_distributions,
    with_learned_tokens,
)
from distill.stages.inputs.multi_teacher import join
from distill.stages.inputs.resolve import LOSSES, is_cross_tokenizer, shared_template
from distill.stages.inputs.score_inputs import check_unused_options, is_traces, question_of, template_of
from distill.stages.inputs.tails import TraceOrigin, refuse_dropped, tail_of, used_tail
from distill.traces import provenance
from distill.traces.reader import TraceReader, open_traces
from distill.traces.schema import DRAW_COLUMNS
from distill.training.loss import sparse
from distill.training.loss.cross_tokenizer.alignment import Retokenizer
from distill.training.loss.stored_targets import Tail
from distill.training.packing import Example, Source, examples_of

IDS = ["trace_id", "prompt_ids", "completion_ids"]
TOP = ["top_count", "top_ids", "top_logprobs", "tail_logprob"]
TAIL_COLUMNS: dict[Tail, tuple[str, ...]] = {"bucket": (), "own_token": ("logprob",), "draws": DRAW_COLUMNS}
"""The columns that each estimate of the tail reads besides."""


def open_source(config: TrainStage, context: Context, tokenizer: Any, read: Retokenizer | None = None) -> Source:
    """The stage's examples; read: re-tokenises for a teacher with another tokenizer.

    Raises UserError where there is nothing to learn from, or the loss and the data do not go together.
    """
    seed = draw_seed(context.seed, context.name, "order")
    source: Source
    if config.max_traces is not None and not isinstance(config.data, dict) and not _are_traces(config.data, context):
        raise UserError(f"stages.{context.name}.max_traces: {config.data!r} holds conversations; use max_rows.")
    if isinstance(config.data, dict):
        source = _joined_source(config, config.data, context, tokenizer, seed)
    elif not _are_traces(config.data, context):
        source = _conversation_source(config, config.data, context, tokenizer, seed, read)
    else:
        source = _shard_source(config, config.data, context, tokenizer, seed, read)
    if source.num_examples == 0:
        raise UserError(f"stages.{context.name}.data: {config.data!r} holds nothing to learn from.")
    return source


def _are_traces(data: str, context: Context) -> bool:
    return data in context.recipe.stages or is_traces(find_data(data))


def reader_for(config: TrainStage | OnPolicyStage, context: Context, tokenizer: Any) -> Retokenizer | None:
    """How a teacher with another tokenizer reads the stage's traces; None where the loss compares ids."""
    if not is_cross_tokenizer(config):
        return None
    (name,) = teachers_of(config.teacher)
    theirs = models.load_tokenizer(context.model_dir(name), trust_remote_code=context.trusts(name))
    template = shared_template(config, context)
    models.check_template(theirs, template, f"stages.{context.name}.teacher")
    return Retokenizer(tokenizer, theirs, template)


@dataclass(frozen=True)
class ShardSource:
    """Traces streamed from shards in a shuffled order; only the columns that the loss needs are read.

    Where several processes train, `epoch` reads ids alone, from which the work is divided; `complete` then reads the
    distributions of a process's own traces. sampled: for the student's own traces, the sampler's log-probabilities by trace id.
    """

    reader: TraceReader
    seed: int
    with_top: bool
    tail: Tail = "bucket"
    sampled: Mapping[str, Array] | None = None

    @property
    def num_examples(self) -> int:
        return self.reader.num_rows

    @property
    def fingerprint(self) -> str:
        return self.reader.fingerprint

    def epoch(self, index: int, skip: int = 0) -> Iterator[Example]:
        with_top = self.with_top and world.size() == 1
        for block in self.reader.shuffled(draw_seed(self.seed, index), skip=skip, columns=self._columns(with_top)):
            yield from self._examples(block, with_top)

    def complete(self, examples: list[Example]) -> list[Example]:
        if not self.with_top or all(example.top is not None for example in examples):
            return examples
        keep = np.zeros(self.num_examples, bool)
        keep[[self._rows[example.trace_id] for example in examples]] = True
        found = {
            example.trace_id: example
            for block in self.reader.where(keep).blocks(256, self._columns(with_top=True))
            for example in self._examples(block, with_top=True)
        }
        return [found[example.trace_id] for example in examples]

    def _columns(self, with_top: bool) -> list[str]:
        """The columns that the loss needs."""
        distribution = (*TOP, *TAIL_COLUMNS[self.tail]) if with_top else ()
        sampled = ("logprob",) if self.sampled is not None else ()
        return list(dict.fromkeys((*IDS, *distribution, *sampled)))

    def _examples(self, block: Traces, with_top: bool) -> Iterator[Example]:
        examples = examples_of(block, with_top=with_top, tail_draws=self.reader.metadata.tail_draws)
        return examples if self.sampled is None else own_traces.with_sampler(examples, block, self.sampled)

    @functools.cached_property
    def _rows(self) -> dict[str, int]:
        """The place of each trace in the order of the shards."""
        ids = (trace_id for block in self.reader.blocks(4096, ["trace_id"]) for trace_id in block.trace_id)
        return {trace_id: n for n, trace_id in enumerate(ids)}


def _shard_source(
    config: TrainStage,
    data: str,
    context: Context,
    tokenizer: Any,
    seed: int,
    read: Retokenizer | None,
) -> Source:
    where = f"stages.{context.name}"
    needed = _wants_teacher(config) or needs_distributions(config, where)
    tail: Tail = "bucket"
    if needed:
        reader = _open_scored(config, data, context, tokenizer)
        tail = _tail(config, context, reader) if _wants_teacher(config) else tail
    else:
        reader = _open_traces(data, context)
    same = models.tokenizer_fingerprint(tokenizer) == reader.metadata.tokenizer
    if own_traces.required(config) and not same:
        raise UserError(
            f"stages.{context.name}.data: {data!r} holds tokens of another tokenizer than the model's, so they are not the ones that it "
            "sampled; score with a teacher of the same tokenizer."
        )
    reader = _usable(reader, config, context, tail)
    if same and read is None:
        check_unused_options(config, data)
        with_top = needed or (reader.metadata.top_k > 0 and may_read_distributions(config, where))
        sampled = own_traces.sampled_logprobs(config, context) if own_traces.required(config) else None
        source = ShardSource(reader, seed, with_top, tail, sampled)
        return with_learned_tokens(source, config, reader.metadata, context, needed=with_top, with_top=with_top)
    texts = _text_source(config, context, tokenizer, reader, seed, read, rendered=not same)
    return with_learned_tokens(texts, config, None, context, needed=False, with_top=False)


def _joined_source(
    config: TrainStage, sets: Mapping[str, float], context: Context, tokenizer: Any, seed: int
) -> Source:
    where = f"stages.{context.name}.data"
    if not _wants_teacher(config):
        raise UserError(
            f"{where}: several sets are there for their teachers' distributions, which {config.loss.fn} does not read. "
            "Name one of them."
        )
    readers = [_open_scored(config, name, context, tokenizer) for name in sets]
    if partial := [name for name, reader in zip(sets, readers, strict=True) if reader.metadata.position_share < 1]:
        raise UserError(
            f"{where}: {', '.join(partial)} hold distributions at a share of the positions only (`weights` at capture), and "
            "several sets are mixed at every position. Score the traces without weights, or name one set."
        )
    source, missing = join([_usable(readers[0], config, context), *readers[1:]], sets, seed, where)
    _say_dropped(context, missing=missing)
    return with_learned_tokens(source, config, None, context, needed=True, with_top=True)


def _open_traces(data: str, context: Context) -> TraceReader:
    """Open traces to train on. Raises UserError for traces of held-out problems."""
    reader = open_traces(context.data_path(data))
    if provenance.is_held_out(reader.metadata):
        raise UserError(
            f"stages.{context.name}.data: {data!r} holds traces of held-out problems, which would spoil every evaluation; "
            "train on traces that were generated with split: train."
        )
    return reader


def _open_scored(config: TrainStage, data: str, context: Context, tokenizer: Any) -> TraceReader:
    """Traces with a teacher's distributions over the student's own tokens. Raises UserError where they are not."""
    where = f"stages.{context.name}"
    reader = _open_traces(data, context)
    if reader.metadata.top_k == 0 and not _wants_teacher(config):
        raise UserError(no_distributions(config, where, f"{data!r} was generated with top_logprobs: 0"))
    if reader.metadata.top_k == 0:
        raise UserError(
            f"{where}.loss: {config.loss.fn} learns from the teacher's distributions, and {data!r} was generated "
            "with top_logprobs: 0. Generate with top_logprobs > 0, or use loss: {fn: cross_entropy}."
        )
    models.check_same_tokenizer(reader.metadata.tokenizer, reader.metadata.vocab_size, tokenizer, where)
    if reader.metadata.logprob_temperature != 1:
        raise UserError(
            f"{where}.data: {data!r} holds distributions at temperature {reader.metadata.logprob_temperature:g}; a "
            "student learns those at 1. They cannot be had from these, for the mass of the tail at another temperature "
            "is not known: score the traces again."
        )
    return reader


def _tail(config: TrainStage, context: Context, reader: TraceReader) -> Tail:
    """Return the estimate of the tail that the stage makes, and say it where the recipe does not."""
    where = f"stages.{context.name}"
    tail = used_tail(config, where, TraceOrigin.of_reader(reader))
    if tail != "bucket" and tail_of(config.loss, f"{where}.loss") is None:
        context.say(f"loss.tail: {tail}, {reader.metadata.tail_draws} a position, which the traces have")
    return tail


def _usable(reader: TraceReader, config: TrainStage, context: Context, tail: Tail = "bucket") -> TraceReader:
    """The traces that are short enough and, unless the stage keeps them all, that ended by themselves."""
    lengths = reader.lengths()
    fits = lengths.prompt + lengths.completion <= config.max_tokens
    finished = np.concatenate(
        [np.array([r != "length" for r in b.finish_reason], bool) for b in reader.blocks(4096, ["finish_reason"])]
        or [np.empty(0, bool)]
    )
    refuse_dropped(config, f"stages.{context.name}", tail, int((~fits).sum()))
    keep = fits & (True if config.keep_truncated else finished)
    _say_dropped(context, longer=int((~fits).sum()), truncated=int((~keep).sum() - (~fits).sum()))
    return _some(reader.where(keep), config, context)


def _some(reader: TraceReader, config: TrainStage, context: Context) -> TraceReader:
    """Choose max_traces of the traces. The choice depends on the stage's seed and the trace ids only, not on the stage's name,
    so that stages with other losses learn from the same traces, and a larger number includes the traces of a smaller one."""
    if config.max_traces is None:
        return reader
    ids = [trace_id for block in reader.blocks(4096, ["trace_id"]) for trace_id in block.trace_id]
    if len(ids) < config.max_traces:
        raise UserError(
            f"stages.{context.name}.max_traces: {config.max_traces} traces are wanted, and {config.data!r} has {len(ids)} that can be used: "
            "generate more, or lower it."
        )
    order = np.argsort([draw_seed(context.seed, "max_traces", trace_id) for trace_id in ids])
    keep = np.zeros(len(ids), bool)
    keep[order[: config.max_traces]] = True
    return reader.where(keep)


def _wants_teacher(config: TrainStage) -> bool:
    """Whether the loss reads a stored distribution: every loss but two may, without a teacher in the trainer."""
    without = (sparse.cross_entropy, sparse.policy_gradient)
    return config.teacher is None and plug.find(config.loss.fn, LOSSES) not in without


def _say_dropped(context: Context, **reasons: int) -> None:
    names = {
        "longer": "longer than max_tokens",
        "truncated": "cut at the token limit",
        "rejected": "not usable",
        "missing": "not in every set, or with other tokens there",
        "unread": "the teacher's tokens do not spell the same text as the student's",
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

    def complete(self, examples: list[Example]) -> list[Example]:
        return examples


def _text_source(
    config: TrainStage,
    context: Context,
    tokenizer: Any,
    reader: TraceReader,
    seed: int,
    read: Retokenizer | None,
    rendered: bool,
) -> Source:
    """Traces by their text. rendered: in the student's own ids, where another tokenizer wrote them."""
    if rendered:
        context.say("the traces' tokenizer is another one: learning from their text, in the student's own tokens")
    template = _template(config, context)
    left_out, kept, unread = DroppedRows(), [], 0
    columns = ["trace_id", "messages", "completion", "prompt_ids", "completion_ids", "finish_reason"]
    for block in reader.blocks(256, columns):
        for n, trace_id in enumerate(block.trace_id):
            messages = block.messages[n]
            prompt: Array = block.prompt_ids[n]
            reply: Array = block.completion_ids[n]
            if rendered:
                said = {"role": "assistant", "content": block.completion[n]}
                finished = block.finish_reason[n] != "length"
                try:
                    prompt = models.render_prompt(tokenizer, template, messages)
                    reply = models.render_reply(tokenizer, template, messages, said, finished=finished)
                except UserError as error:
                    left_out.reject(n, f"{trace_id}: {error}")
                    continue
            example = _retokenized(Example(trace_id, prompt, reply), messages, read)
            if example is None:
                unread += 1
            else:
                kept.append(example)
    for line in left_out.lines():
        context.say(line)
    _say_dropped(context, unread=unread)
    return ListSource(kept, seed, reader.fingerprint)


def _retokenized(example: Example, messages: Any, read: Retokenizer | None) -> Example | None:
    """Return the example re-tokenised for the teacher if `read` is given; None if that fails."""
    if read is None:
        return example
    retokenized = read(messages, example.completion_ids)
    return None if retokenized is None else replace(example, retokenized=retokenized)


def _template(config: TrainStage, context: Context) -> Template:
    if config.task is None:
        raise UserError(
            f"stages.{context.name}.task: is required here: the prompts are rendered with the task's template."
        )
    return context.task(config.task).template


def _conversation_source(
    config: TrainStage, data: str, context: Context, tokenizer: Any, seed: int, read: Retokenizer | None
) -> Source:
    """Render the conversations of a data set, an example for each of the assistant's turns that is learned."""
    where = f"stages.{context.name}.data"
    if needs_distributions(config, f"stages.{context.name}"):
        raise UserError(no_distributions(config, f"stages.{context.name}", f"{data!r} holds conversations"))
    task = context.task(config.task) if config.task else None
    table = open_rows(data, config, where)
    template = template_of(config, task)
    models.check_template(tokenizer, template, f"stages.{context.name}")
    left_out, examples, longer, unread = DroppedRows(), [], 0, 0
    for given in conversations(table, Reader(config.fields, config.keep_wrong), left_out):
        replies = list(given.replies(config.turns))
        if not replies:
            left_out.reject(
                given.number, "there is no reply to learn: give it a completion, or end messages with the assistant"
            )
        for turn, (messages, reply) in enumerate(replies):
            if task is not None and task.holds_out(question_of(messages)):
                left_out.add("one of the task's held-out problems, which would spoil every evaluation")
                continue
            try:
                prompt = models.render_prompt(tokenizer, template, messages, given.tools)
                ids = models.render_reply(tokenizer, template, messages, reply, given.tools)
            except UserError as error:
                left_out.reject(given.number, str(error))
                continue
            if read is not None and given.tools:
                left_out.reject(given.number, "it has tools, which a teacher with another tokenizer is not told of")
                continue
            place = "".join(f".{n}" for n in (given.part, turn) if n)
            example = Example(f"{table.name.partition(' ')[0]}:{given.number}{place}", prompt, ids)
            if len(example) > config.max_tokens:
                longer += 1
            elif (known := _retokenized(example, messages, read)) is None:
                unread += 1
            else:
                examples.append(known)
    for line in left_out.lines():
        context.say(line)
    _say_dropped(context, longer=longer, unread=unread)
    if not examples:
        raise UserError(f"{where}: {data!r} holds nothing to learn from. {nothing_found(table, left_out)}".rstrip())
    source = ListSource(examples, seed, table.name)
    return with_learned_tokens(source, config, None, context, needed=False, with_top=False)
