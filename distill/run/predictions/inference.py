"""Cost predictions for the stage kinds that do not train: generate, eval, compare, divergence, score, filter, prune."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from distill.compute import estimate, flops
from distill.compute.flops import ModelShape
from distill.compute.memory import PROCESS_BYTES, Memory
from distill.machine import Machine
from distill.models import check_layers
from distill.models.prune_choice import CANDIDATES
from distill.models.prune_repair import HELD, STRENGTHS
from distill.models.prune_width import Widths
from distill.recipe import (
    CompareStage,
    DivergenceStage,
    EvalStage,
    FilterStage,
    GenerateStage,
    PolicyStage,
    PruneStage,
    ScoreStage,
)
from distill.records import UserError
from distill.run.known_sizes import Known, reward_bytes, rows_of, stored
from distill.run.predictions import served
from distill.run.predictions.row import (
    Row,
    all_engines,
    decoded_at_once,
    dtype_part,
    engine_memory,
    engine_part,
    engines_at_once,
    make_amounts,
    sequence_cache,
    start_seconds,
)

KEPT_BY_CORRECT = 0.7
"""Assumed share of traces that a `correct` filter keeps."""
ENTRIES = 2.5
"""Assumed number of tokens stored per position at mass 0.98: 1.1 for a teacher that is nearly certain, 5 for one with several wordings."""
DRAWN = 0.3
"""Assumed share of `tail_draws` that a position of such a teacher gets."""


def prune(name: str, config: PruneStage, known: Known, machine: Machine) -> list[Row]:
    shape = known.shape(config.model)
    layers = config.layers or shape.layers
    try:
        check_layers(layers, shape.layers)
        new = Widths(shape.hidden, shape.intermediate, shape.heads, shape.kv_heads).cut(
            config.hidden, config.ffn, config.heads
        )
    except UserError as error:
        raise error.within(f"stages.{name}.{error}") from None
    narrow = replace(shape, hidden=new.hidden, intermediate=new.ffn, heads=new.heads, kv_heads=new.groups)
    known.shapes[name] = narrow.with_layers(layers)
    known.replies[name] = known.replies.get(config.model, 0.0)
    seconds = estimate.predict_prune_seconds(known.shapes[name])
    if not config.measures or config.data is None:
        held = Memory(weights=2.0 * shape.params_total, process=PROCESS_BYTES)
        amounts = make_amounts(seconds=seconds, memory=held.total)
    else:
        work = prune_work(config, shape, layers, *(known.traces.get(config.data) or stored(config.data)))
        seconds += estimate.forward_seconds(shape, work.flops, work.tokens, machine, "float32")
        # In float32, with the hidden states before every layer; repair keeps the former ones, and two copies are compared.
        states = 4.0 * work.row_tokens * shape.hidden * shape.layers * (2 if config.repair else 1)
        held = Memory(weights=6.0 * shape.params_total, activations=states, process=PROCESS_BYTES)
        amounts = make_amounts(tokens=work.tokens, flops=work.flops, seconds=seconds, memory=held.total)
    # Pruning uses main memory; `machine.memory` is GPU memory on a machine with a GPU.
    if machine.device != "cpu":
        return [Row(name, "prune", amounts)]
    return [Row(name, "prune", amounts, least=held.least, memory=held)]


@dataclass(frozen=True, slots=True)
class PruneWork:
    """The forward passes of a prune stage. row_tokens: tokens of the traces that are read; tokens: as passes through all layers."""

    row_tokens: float
    tokens: float
    flops: float


def prune_work(
    config: PruneStage, shape: ModelShape, layers: int, traces: float, prompt: float, reply: float
) -> PruneWork:
    """Predict the passes of a prune stage on so many traces of these mean lengths."""
    taken = max(1.0, min(reply, config.positions // 8))
    rows = min(math.ceil(config.positions / taken), traces)
    row_tokens = rows * (prompt + taken)
    # Passes through all layers, and passes through the output head. What repair holds out is not read by the others.
    fit = 1 - 1 / HELD if config.repair else 1.0
    left = layers / shape.layers
    passes = heads = 1.0
    removed = shape.layers - layers
    if config.by == "block_influence":
        passes += fit
    if config.by == "importance" and removed:
        tried = [shape.layers, *(min(CANDIDATES, shape.layers - n) for n in range(1, removed))]
        # A round runs all layers that are left once, and for each layer that is tried those above it: half of them.
        passes += fit * sum((1 + num / 2) * (shape.layers - n) / shape.layers for n, num in enumerate(tried))
        heads += fit * sum(tried)
    if config.narrows:
        passes += fit
    if config.repair:
        # Once the whole model and once the pruned one, then for every strength the fit and its KL. A fit runs the layers from the
        # lowest gap to the highest: where they will be is not known, so what places drawn at random span on average.
        span = 1.0 if config.narrows else (removed - 1) / (removed + 1)
        passes += fit * (1 + left) + len(STRENGTHS) * left * (fit * span + 1 - fit)
        heads += (1 - fit) * (1 + len(STRENGTHS))
    tokens = row_tokens * passes
    context = (prompt + taken + 1) / 2
    head_tokens = rows * taken * heads
    return PruneWork(row_tokens, tokens, flops.forward_flops(shape, tokens, context, head_tokens))


def mean_reply(config: GenerateStage | EvalStage | PolicyStage, known: Known) -> float:
    """Expected tokens of a completion: the mean of the completions that the model learned, else 0.6 of max_tokens."""
    learned = known.replies.get(config.model) or 0.6 * config.sampling.max_tokens
    return min(learned, config.sampling.max_tokens)


def _sampling(name: str, config: GenerateStage | EvalStage, known: Known, machine: Machine) -> Row:
    _, prompt = known.task(config.task)
    reply = mean_reply(config, known)
    folders = [config.problems * config.samples]
    if isinstance(config, EvalStage) and config.snapshot_problems:
        tried = min(config.snapshot_problems, config.problems) * config.samples
        folders += [tried] * known.snapshots.get(config.model, 0)
    sequences = sum(folders)
    captured = isinstance(config, GenerateStage) and config.top_logprobs > 0
    shard_rows = config.shard_rows if isinstance(config, GenerateStage) else 256
    draws = DRAWN * config.tail_draws if isinstance(config, GenerateStage) else 0.0
    known.traces[name] = (sequences, prompt, reply)
    known.tasks_of[name] = config.task
    share = kept_share(name, config, known)
    written = sum(
        estimate.predict_trace_bytes(
            rows,
            rows * reply,
            ENTRIES if captured else 0.0,
            shard_rows=shard_rows,
            share=share,
            draws_a_position=draws,
        )
        for rows in folders
    )
    if config.engine.is_served:
        top = config.top_logprobs if isinstance(config, GenerateStage) else 0
        return served.row(
            name,
            config.kind,
            config.engine,
            requests=sequences,
            prompt=prompt,
            reply=reply,
            written=written,
            top_logprobs=top,
        )
    shape = known.shape(config.model)
    engines = engines_at_once(config.engine, machine)
    part = engine_part(
        shape,
        config.engine,
        machine,
        lambda dtype, engine: estimate.predict_generate_seconds(
            shape,
            math.ceil(sequences / engines),
            sequences / engines * prompt,
            sequences / engines * reply,
            machine,
            batch_size=decoded_at_once(shape, config.engine, prompt + reply, machine),
            dtype=dtype,
            engine=engine,
        ),
    )
    longest = prompt + config.sampling.max_tokens
    memory = engine_memory(shape, config.engine, part.choice.dtype, longest, machine, sequences / engines)
    memory = all_engines(memory, config.engine, machine)
    if isinstance(config, GenerateStage):
        memory += Memory(rewards=reward_bytes(config.rewards))
    amounts = make_amounts(
        tokens=sequences * (prompt + reply),
        bytes=written,
        flops=flops.generate_flops(shape, sequences * prompt, sequences * reply, sequences),
        memory=memory.total,
        seconds=part.seconds,
    )
    return Row(
        name,
        config.kind,
        amounts,
        least=memory.least,
        parts=(part,),
        start=start_seconds(part),
        memory=memory,
        processes=config.engine.tensor_parallel * engines if machine.device == "cuda" else 1,
        sequence_cache=sequence_cache(shape, config.engine, part.choice.dtype, longest, machine),
        engine=config.engine,
    )


def kept_share(name: str, config: GenerateStage | EvalStage | ScoreStage, known: Known) -> float:
    """Return the share of the positions whose distribution is stored, and note it for the stages that read the traces."""
    if isinstance(config, EvalStage) or config.weights is None:
        return 1.0
    known.held[name] = config.weights
    return config.weights.share


def generate(name: str, config: GenerateStage, known: Known, machine: Machine) -> list[Row]:
    return [_sampling(name, config, known, machine)]


def eval(name: str, config: EvalStage, known: Known, machine: Machine) -> list[Row]:
    return [_sampling(name, config, known, machine)]


def compare(name: str, config: CompareStage, known: Known, machine: Machine) -> list[Row]:
    """One row for each model and one for the comparison. All share a process; models of the same shape share its
    engine."""
    rows: list[Row] = []
    before: ModelShape | None = None
    measured: list[Row] = []
    for arm, child in config.children().items():
        if isinstance(child, DivergenceStage):
            made = divergence(f"{name}.{arm}", child, known, machine)
            measured += [_in_running_process(row) for row in made] if measured else made
            continue
        assert isinstance(child, EvalStage)
        row, shape = _sampling(f"{name}.{arm}", child, known, machine), known.shape(child.model)
        if before is not None:
            (part,) = row.parts
            start = 0.0 if shape == before else estimate.REOPENED * estimate.engine_start(part.engine)
            spared = row.start - start
            row = replace(
                row,
                amounts={**row.amounts, "seconds": row.amounts["seconds"] - spared},
                parts=(replace(part, seconds=part.seconds - spared),),
                start=start,
            )
        rows.append(row)
        before = shape
    return [*rows, *measured, Row(name, config.kind, make_amounts(seconds=estimate.LIGHT_START))]


def divergence(name: str, config: DivergenceStage, known: Known, machine: Machine) -> list[Row]:
    rows, prompt, reply = known.traces.get(config.data) or stored(config.data)
    shape, tokens = known.shape(config.model), rows * (prompt + reply)
    total = flops.forward_flops(shape, tokens, (prompt + reply + 1) / 2, rows * reply)
    part = dtype_part(
        "training",
        shape,
        config.dtype,
        machine,
        lambda dtype: estimate.predict_divergence_seconds(shape, total, tokens, rows * reply, machine, dtype),
    )
    itemsize = 2.0 if part.choice.dtype == "bfloat16" else 4.0
    held = Memory(weights=itemsize * shape.params_total, process=PROCESS_BYTES)
    amounts = make_amounts(tokens=tokens, flops=total, seconds=part.seconds, memory=held.total)
    return [Row(name, config.kind, amounts, least=held.least, parts=(part,), start=estimate.PROCESS_START, memory=held)]


def _in_running_process(row: Row) -> Row:
    """The prediction of a stage whose process runs already."""
    (part,) = row.parts
    return replace(
        row,
        amounts={**row.amounts, "seconds": row.amounts["seconds"] - row.start},
        parts=(replace(part, seconds=part.seconds - row.start),),
        start=0.0,
    )


def score(name: str, config: ScoreStage, known: Known, machine: Machine) -> list[Row]:
    rows, prompt, reply = known.traces.get(config.data) or rows_of(config.data, config, known)
    known.traces[name] = rows, prompt, reply
    tokens = rows * (prompt + reply)
    share = kept_share(name, config, known)
    written = estimate.predict_trace_bytes(
        int(rows),
        rows * reply,
        ENTRIES,
        shard_rows=config.shard_rows,
        share=share,
        draws_a_position=DRAWN * config.tail_draws,
    )
    if config.engine.is_served:
        whole, top = prompt + reply, config.top_logprobs
        made = served.row(
            name, config.kind, config.engine, requests=rows, prompt=whole, reply=1, written=written, top_logprobs=top
        )
        return [made]
    shape = known.shape(config.model)
    total = flops.forward_flops(shape, tokens, (prompt + reply + 1) / 2, rows * reply)
    engines = engines_at_once(config.engine, machine)
    part = engine_part(
        shape,
        config.engine,
        machine,
        lambda dtype, engine: estimate.predict_score_seconds(
            shape, total / engines, tokens / engines, rows * reply / engines, machine, dtype, engine
        ),
    )
    memory = engine_memory(shape, config.engine, part.choice.dtype, prompt + reply, machine, rows, scored=True)
    memory = all_engines(memory, config.engine, machine)
    amounts = make_amounts(
        tokens=tokens,
        bytes=written,
        flops=total,
        memory=memory.total,
        seconds=part.seconds,
    )
    row = Row(
        name,
        config.kind,
        amounts,
        least=memory.least,
        parts=(part,),
        start=start_seconds(part),
        memory=memory,
        processes=config.engine.tensor_parallel * engines if machine.device == "cuda" else 1,
        sequence_cache=sequence_cache(shape, config.engine, part.choice.dtype, prompt + reply, machine),
        engine=config.engine,
    )
    return [row]


def filter(name: str, config: FilterStage, known: Known, machine: Machine) -> list[Row]:
    rows, prompt, reply = known.traces.get(config.data) or stored(config.data)
    kept = rows * KEPT_BY_CORRECT if any(f.fn == "correct" for f in config.keep) else rows
    known.traces[name] = (kept, prompt, reply)
    if config.data in known.held:
        known.held[name] = known.held[config.data]
    if config.data in known.tasks_of:
        known.tasks_of[name] = known.tasks_of[config.data]
    return [Row(name, "filter", make_amounts(seconds=estimate.predict_filter_seconds(int(rows))))]
