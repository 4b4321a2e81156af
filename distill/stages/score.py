"""score: compute a teacher's distributions over existing traces, teacher-forced.

Only missing traces are scored, also after the data has grown or shrunk; a trace that is empty or longer than the context
(or `max_tokens`) is left out and counted. The engine scores in chunks: a long trace never has all its logits at once.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections import deque
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distill import engines, models
from distill.compute.flops import ModelShape, causal_context, forward_flops
from distill.recipe import EngineConfig, ScoreStage
from distill.records import (
    Completion,
    Cost,
    Draws,
    Engine,
    Ragged,
    Request,
    Sampling,
    TopK,
    Traces,
    UserError,
    draw_seed,
)
from distill.stages.captured_positions import keep_positions, positions_of
from distill.stages.context import Context, Result
from distill.stages.inputs.conversation_data import DroppedRows
from distill.stages.inputs.score_inputs import ScoreInputs, open_score_inputs, take
from distill.stages.kept_answers import KeptAnswers, dollars
from distill.stages.sampling import context_length, context_limit
from distill.stages.trace_rows import cut_to
from distill.stages.trace_sampling import package_versions, prompt_record, served_versions, weights_of
from distill.traces import provenance
from distill.traces.reader import content_fingerprint, open_traces
from distill.traces.schema import Metadata
from distill.traces.summary import stats
from distill.traces.writer import TraceWriter


def run(config: ScoreStage, context: Context) -> Result:
    folder = context.folder / "traces"
    model_dir, trust = context.model_dir(config.model), context.trusts(config.model)
    tokenizer = models.load_tokenizer(model_dir, trust_remote_code=trust)
    context.phase("reading the traces")
    inputs = open_score_inputs(config, context, tokenizer)
    context.say(
        f"the text is from {inputs.text_from}; "
        + ("its token ids are used as stored" if inputs.same_ids else "it is tokenised with this model's tokenizer")
    )
    limit = min(context_limit(config.engine, model_dir), config.max_tokens or 1 << 60)
    left_out = DroppedRows()
    wanted = _survey(inputs, limit, left_out)
    _say_left_out(context, left_out)
    if not wanted:
        raise UserError(f"stages.{context.name}.data: {config.data!r} has no trace that can be scored.")
    metadata = _metadata(config, inputs, model_dir, tokenizer)
    carry_over(context, folder, metadata, {i: (row.sample, row.gold) for i, row in wanted.items()})
    _fill(config, context, inputs, metadata, wanted)
    held = stats(folder)
    context.say(str(held).replace("\n", "\n  "))
    if held.warning:
        context.say(held.warning)
    # Rates of values that the data does not have (no verdicts, for example) are nan.
    known = {key: value for key, value in held.as_dict().items() if value == value}
    metrics = {**known, "mean_nll": _mean_nll(folder), "left_out": dict(left_out.reasons)}
    return Result(_cost(config.engine, folder, model_dir, left_out), metrics, content_fingerprint(folder))


@dataclass(frozen=True, slots=True)
class WantedTrace:
    """A trace that is to be scored. tokens: of prompt and completion."""

    tokens: int
    sample: int
    gold: str | None


def _survey(inputs: ScoreInputs, limit: int, left_out: DroppedRows) -> dict[str, WantedTrace]:
    """Return the traces to score, by id; count the others."""
    wanted: dict[str, WantedTrace] = {}
    for block in inputs.blocks(left_out):
        tokens_N = block.prompt_ids.lengths + block.completion_ids.lengths
        empty_N = block.completion_ids.lengths == 0
        left_out.add("longer than the limit", int((tokens_N > limit).sum()))
        left_out.add("an empty completion", int((empty_N & (tokens_N <= limit)).sum()))
        for n in np.flatnonzero(~empty_N & (tokens_N <= limit)):
            wanted[block.trace_id[n]] = WantedTrace(int(tokens_N[n]), int(block.sample[n]), block.gold[n])
    return wanted


def carry_over(
    context: Context, folder: Path, metadata: Metadata, wanted: Mapping[str, tuple[int, str | None]]
) -> None:
    """Prepare the folder of an earlier attempt so that missing traces can be added and nothing is scored twice.

    Changed data may need fewer traces, some with another answer, or traces of another kind. A change of the data's origin
    alone (a file's fingerprint) keeps the traces, because a trace's id follows from its text. Traces that are still wanted
    move to a new folder; the former folder moves to RUN/.old. A kill at any instant loses nothing. wanted: trace id ->
    (sample, gold).
    """
    carrying = folder.with_name(".carrying")
    if folder.is_dir():
        shutil.rmtree(carrying, ignore_errors=True)
    elif carrying.is_dir():
        carrying.rename(folder)
    if not any(folder.glob("manifest-*.json")):
        return
    former = open_traces(folder)
    from_here = former.metadata.model_copy(update={"source": metadata.source})
    same = not from_here.differences(metadata)
    keep_N = np.array(
        [
            same and wanted.get(trace_id) == (int(sample), gold)
            for block in former.blocks(4096, ["trace_id", "sample", "gold"])
            for trace_id, sample, gold in zip(block.trace_id, block.sample, block.gold, strict=True)
        ],
        bool,
    )
    if keep_N.all() and former.metadata.source == metadata.source and same:
        return
    if not keep_N.all():
        context.say(f"{int((~keep_N).sum())} traces of an earlier attempt are no longer wanted")
    with TraceWriter(carrying, metadata) as writer:
        for block in former.where(keep_N).blocks():
            writer.add(block)
    old = context.run / ".old"
    old.mkdir(exist_ok=True)
    folder.rename(old / f"{context.name}-traces-{time.time_ns()}")
    carrying.rename(folder)


def _fill(
    config: ScoreStage,
    context: Context,
    inputs: ScoreInputs,
    metadata: Metadata,
    wanted: Mapping[str, WantedTrace],
) -> None:
    """Score the traces that the folder does not hold yet."""
    folder = context.folder / "traces"
    kept = None

    def seed(trace_id: str) -> int:
        return draw_seed(context.seed, context.name, trace_id, "tail")

    with TraceWriter(folder, metadata, shard_rows=config.shard_rows) as writer:
        ids = list(wanted)
        missing = {ids[n] for n in np.flatnonzero(writer.lacks(ids))}
        if not missing:
            return
        context.phase(f"starting the {config.engine.fn} engine for {len(missing)} traces")
        longest = max(wanted[trace_id].tokens for trace_id in missing)
        model_dir = context.model_dir(config.model)
        limit = context_limit(config.engine, model_dir)
        engine = engines.open_engine(
            config.engine,
            model_dir,
            max_model_len=context_length(longest, limit),
            max_top_k=config.top_logprobs,
        )
        context.say_note(engine)
        try:
            num = len(wanted) - len(missing)
            live = context.live(len(wanted), "traces", num)
            kept = KeptAnswers(engine, folder, writer)
            for block in _scored(config, engine, inputs, missing, metadata, seed, f"stages.{context.name}"):
                writer.add(block)
                kept.added(block.trace_id)
                num += len(block)
                live.update(num)
            live.close()
        finally:
            engine.close()
    kept.close()


def _scored(
    config: ScoreStage,
    engine: Engine,
    inputs: ScoreInputs,
    missing: Container[str],
    metadata: Metadata,
    seed: Callable[[str], int],
    where: str,
) -> Iterator[Traces]:
    """Yield blocks of the missing traces with the engine's log-probabilities. seed: of a trace's draws from the tail.

    The engine gets all traces in one stream, so that no block's last traces leave it half empty.
    """
    blocks: deque[Traces] = deque()

    def requests() -> Iterator[Request]:
        for block in inputs.blocks(DroppedRows()):
            index = np.flatnonzero([trace_id in missing for trace_id in block.trace_id])
            if not len(index):
                continue
            block = take(block, index)
            blocks.append(block)
            for n, trace_id in enumerate(block.trace_id):
                ids_T = np.array(block.completion_ids[n])
                yield Request(trace_id, block.prompt_ids[n], seed(trace_id), ids_T, tail_draws=metadata.tail_draws)

    scored: list[Completion] = []
    keep = keep_positions(config, where)
    for completion in engine.score(requests(), top_k=config.top_logprobs):
        scored.append(keep(cut_to(metadata, completion, seed(completion.request_id))))
        if len(scored) == len(blocks[0]):
            yield dataclasses.replace(
                blocks.popleft(),
                logprob=Ragged.from_rows([one.logprob_T for one in scored], np.float32),
                top=TopK.concat([one.top for one in scored if one.top is not None]),
                draws=Draws.concat([one.draws for one in scored if one.draws is not None])
                if metadata.tail_draws
                else None,
            )
            scored = []


def _say_left_out(context: Context, left_out: DroppedRows) -> None:
    for line in left_out.first:
        context.say(line)
    for reason, count in left_out.reasons.items():
        context.say(f"{count} traces left out: {reason}")


def _cost(engine: EngineConfig, folder: Path, model_dir: Path, left_out: DroppedRows) -> Cost:
    """Compute the cost of all traces in the folder, whichever attempt wrote them."""
    lengths = open_traces(folder).lengths()
    whole_N = lengths.prompt.astype(np.int64) + lengths.completion
    tokens = int(whole_N.sum())
    shape = ModelShape.from_config(models.config_of(model_dir))
    return Cost(
        tokens_scored=tokens,
        flops=0.0
        if engine.is_served
        else forward_flops(shape, tokens, causal_context(whole_N.tolist()), int(lengths.completion.sum())),
        bytes_written=sum(file.stat().st_size for file in folder.glob("*.parquet")),
        samples_failed=sum(left_out.reasons.values()),
        dollars=dollars(engine, folder),
    )


def _mean_nll(folder: Path) -> float:
    """Return the mean negative log-likelihood of the completion tokens, in nats per token."""
    total, num = 0.0, 0
    for block in open_traces(folder).blocks(256, ["completion_ids", "logprob"]):
        total -= float(block.logprob.values.sum(dtype=np.float64))
        num += len(block.logprob.values)
    return total / num if num else float("nan")


def _metadata(config: ScoreStage, inputs: ScoreInputs, model_dir: Path, tokenizer: Any) -> Metadata:
    """Return the metadata of the scored traces. Where ids are kept, the prompts' template and task are kept too.

    The sampling is that of the shards that hold the text; for a file it is unknown, and the defaults are stored.
    """
    origin = inputs.origin
    held_out = provenance.HELD_OUT if origin is not None and provenance.is_held_out(origin) else {}
    return Metadata(
        model=config.model,
        weights=weights_of(config.engine, model_dir),
        tokenizer=models.tokenizer_fingerprint(tokenizer),
        chat_template=origin.chat_template
        if origin is not None and inputs.same_ids
        else models.template_hash(tokenizer),
        vocab_size=len(tokenizer),
        task=origin.task if origin is not None else config.task or "",
        task_fingerprint=origin.task_fingerprint if origin is not None else "",
        template=inputs.template,
        sampling=origin.sampling if origin is not None else Sampling(),
        top_k=config.top_logprobs,
        mass=config.mass,
        tail_draws=config.tail_draws,
        exact=config.exact,
        **positions_of(config),
        engine=config.engine.fn,
        dtype=config.engine.dtype,
        source=inputs.text_from,
        versions=package_versions() | served_versions(config.engine) | held_out,
        prompt=origin.prompt
        if origin is not None and inputs.same_ids
        else prompt_record(tokenizer, inputs.rendered_with),
    )
