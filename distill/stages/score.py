"""score: a teacher's distributions over traces that exist, teacher-forced.

Only what is missing is scored; a trace longer than the context (or `max_tokens`), or empty, is left out and counted.
The engine scores in chunks, so a long trace never has its whole [tokens, vocabulary] of logits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from distill import engines, models
from distill.recipe import ScoreStage
from distill.records import Array, Cost, Engine, Ragged, Request, Sampling, TopK, Traces, UserError
from distill.reports.flops import ModelShape, causal_context, forward_flops
from distill.stages.context import Context, Result
from distill.stages.sampling import ROOM, context_limit, package_versions
from distill.stages.sources import Given, LeftOut, open_given
from distill.traces import notes
from distill.traces.reader import content_fingerprint, open_traces
from distill.traces.schema import Metadata
from distill.traces.stats import stats
from distill.traces.writer import TraceWriter


def run(config: ScoreStage, context: Context) -> Result:
    folder = context.folder / "traces"
    model_dir, trust = context.model_dir(config.model), context.trusts(config.model)
    tokenizer = models.load_tokenizer(model_dir, trust_remote_code=trust)
    given = open_given(config, context, tokenizer)
    context.say(
        f"the text is by {given.text_from}; "
        + (
            "its ids as they were sampled"
            if given.same_ids
            else "rendered in the model's own tokens"
        )
    )
    limit = min(context_limit(config.engine, model_dir), config.max_tokens or 1 << 60)
    with TraceWriter(
        folder, _metadata(config, given, model_dir, tokenizer), shard_rows=config.shard_rows
    ) as writer:
        notes.write_text_from(folder, given.text_from)
        done = writer.done_ids()
        left_out = LeftOut()
        wanted, missing, longest = _survey(given, limit, done, left_out)
        _say_left_out(context, left_out)
        if not wanted:
            raise UserError(f"stages.{context.name}.data: {config.data!r} holds nothing to score.")
        if missing:
            context.say(f"starting the {config.engine.fn} engine for {missing} traces")
            engine = engines.open_engine(
                config.engine,
                model_dir,
                max_model_len=min(limit, -(-longest // ROOM) * ROOM),
                max_top_k=config.top_k,
            )
            try:
                live = context.live(wanted, "traces", wanted - missing)
                num = wanted - missing
                for block in _scored(config, engine, given, limit, done):
                    writer.add(block)
                    num += len(block)
                    live.update(num)
                live.close()
            finally:
                engine.close()
    held = stats(folder)
    context.say(str(held).replace("\n", "\n  "))
    metrics = {**held.as_dict(), "mean_nll": _mean_nll(folder), "left_out": dict(left_out.reasons)}
    return Result(_cost(folder, model_dir, left_out), metrics, content_fingerprint(folder))


def _usable(block: Traces, limit: int) -> tuple[Array, Array]:
    """Flags [N] of the traces that fit, and of those that have nothing to score."""
    tokens_N = block.prompt_ids.lengths + block.completion_ids.lengths
    return tokens_N <= limit, block.completion_ids.lengths == 0


def _missing(block: Traces, limit: int, done: set[str]) -> Array:
    """[N] of the traces to be scored that are not there yet."""
    fits_N, empty_N = _usable(block, limit)
    new_N = np.array([trace_id not in done for trace_id in block.trace_id], bool)
    return np.asarray(fits_N & ~empty_N & new_N)


def _survey(given: Given, limit: int, done: set[str], left_out: LeftOut) -> tuple[int, int, int]:
    """(traces wanted, of these not there yet, tokens of the longest missing one)."""
    wanted = missing = longest = 0
    for block in given.blocks(left_out):
        fits_N, empty_N = _usable(block, limit)
        left_out.add("longer than the limit", int((~fits_N).sum()))
        left_out.add("an empty completion", int((fits_N & empty_N).sum()))
        wanted += int((fits_N & ~empty_N).sum())
        missing_N = _missing(block, limit, done)
        missing += int(missing_N.sum())
        tokens_N = block.prompt_ids.lengths + block.completion_ids.lengths
        longest = max(longest, int(tokens_N[missing_N].max(initial=0)))
    return wanted, missing, longest


def _scored(
    config: ScoreStage, engine: Engine, given: Given, limit: int, done: set[str]
) -> Iterator[Traces]:
    """Blocks of the missing traces with the engine's log-probabilities in them."""
    for block in given.blocks(LeftOut()):
        index = np.flatnonzero(_missing(block, limit, done))
        if not len(index):
            continue
        block = take(block, index)
        requests = [
            Request(trace_id, block.prompt_ids[n], completion_ids=np.array(block.completion_ids[n]))
            for n, trace_id in enumerate(block.trace_id)
        ]
        tops, logprobs = [], []
        for completion in engine.score(requests, top_k=config.top_k):
            assert completion.top is not None
            tops.append(completion.top.truncate(top_k=config.top_k, mass=config.mass))
            logprobs.append(completion.logprob_T)
        yield dataclasses.replace(
            block, logprob=Ragged.from_rows(logprobs, np.float32), top=TopK.concat(tops)
        )


def take(block: Traces, index: Array) -> Traces:
    """Some rows of a block without distributions."""

    def rows(column: Any) -> Any:
        if isinstance(column, Ragged):
            # Columns that were not read are as long as the block, with nothing in them.
            return column.take(index)
        if isinstance(column, dict):
            return {name: rows(each) for name, each in column.items()}
        if isinstance(column, np.ndarray):
            return column[index]
        return None if column is None else [column[n] for n in index]

    return Traces(**{f.name: rows(getattr(block, f.name)) for f in dataclasses.fields(Traces)})


def _say_left_out(context: Context, left_out: LeftOut) -> None:
    for line in left_out.first:
        context.say(line)
    for reason, count in left_out.reasons.items():
        context.say(f"{count} traces left out: {reason}")


def _cost(folder: Path, model_dir: Path, left_out: LeftOut) -> Cost:
    """Of all that the folder holds, whichever attempt wrote it."""
    lengths = open_traces(folder).lengths()
    whole_N = lengths.prompt.astype(np.int64) + lengths.completion
    tokens = int(whole_N.sum())
    shape = ModelShape.from_config(models.config_of(model_dir))
    return Cost(
        tokens_scored=tokens,
        flops=forward_flops(
            shape, tokens, causal_context(whole_N.tolist()), int(lengths.completion.sum())
        ),
        bytes_written=sum(file.stat().st_size for file in folder.glob("*.parquet")),
        samples_failed=sum(left_out.reasons.values()),
    )


def _mean_nll(folder: Path) -> float:
    """Nats a token that the text surprises the model by."""
    total, num = 0.0, 0
    for block in open_traces(folder).blocks(256, ["completion_ids", "logprob"]):
        total -= float(block.logprob.values.sum(dtype=np.float64))
        num += len(block.logprob.values)
    return total / num if num else float("nan")


def _metadata(config: ScoreStage, given: Given, model_dir: Path, tokenizer: Any) -> Metadata:
    """Of the scoring model; what says how the prompts came about stays where the ids stay.

    The sampling is that of the shards that hold the text; of a file nothing is known, and the defaults stand.
    """
    origin = given.origin
    return Metadata(
        model=config.model,
        weights=models.weights_fingerprint(model_dir),
        tokenizer=models.tokenizer_fingerprint(tokenizer),
        chat_template=origin.chat_template
        if origin is not None and given.same_ids
        else models.template_hash(tokenizer),
        vocab_size=len(tokenizer),
        task=origin.task if origin is not None else config.task or "",
        task_fingerprint=origin.task_fingerprint if origin is not None else "",
        template=given.template,
        sampling=origin.sampling if origin is not None else Sampling(),
        top_k=config.top_k,
        mass=config.mass,
        engine=config.engine.fn,
        versions=package_versions(),
    )
