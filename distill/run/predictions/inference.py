"""Cost predictions for the stage kinds that do not train: generate, eval, compare, score, filter, prune."""

from __future__ import annotations

import math
from dataclasses import replace

from distill.compute import estimate, flops
from distill.compute.flops import ModelShape
from distill.compute.memory import PROCESS_BYTES, Memory
from distill.machine import Machine
from distill.recipe import CompareStage, EvalStage, FilterStage, GenerateStage, PolicyStage, PruneStage, ScoreStage
from distill.records import UserError
from distill.run.known_sizes import Known, reward_bytes, rows_of, stored
from distill.run.predictions import served
from distill.run.predictions.row import (
    Row,
    all_engines,
    decoded_at_once,
    engine_memory,
    engine_part,
    engines_at_once,
    make_amounts,
    sequence_cache,
    start_seconds,
)

KEPT_BY_CORRECT = 0.7
"""Assumed share of traces that a `correct` filter keeps."""
ENTRIES = 1.2
"""Assumed number of tokens stored per position at mass 0.98, for a teacher that is mostly certain."""


def prune(name: str, config: PruneStage, known: Known, machine: Machine) -> list[Row]:
    shape = known.shape(config.model)
    if config.layers > shape.layers:
        raise UserError(f"stages.{name}.layers: cannot keep {config.layers} layers of a model that has {shape.layers}.")
    known.shapes[name] = shape.with_layers(config.layers)
    known.replies[name] = known.replies.get(config.model, 0.0)
    held = Memory(weights=2.0 * shape.params_total, process=PROCESS_BYTES)
    amounts = make_amounts(seconds=estimate.predict_prune_seconds(known.shapes[name]), memory=held.total)
    # Pruning uses main memory; `machine.memory` is GPU memory on a machine with a GPU.
    if machine.device != "cpu":
        return [Row(name, "prune", amounts)]
    return [Row(name, "prune", amounts, least=held.least, memory=held)]


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
    known.traces[name] = (sequences, prompt, reply)
    known.tasks_of[name] = config.task
    written = sum(
        estimate.predict_trace_bytes(rows, rows * reply, ENTRIES if captured else 0.0, shard_rows=shard_rows)
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


def generate(name: str, config: GenerateStage, known: Known, machine: Machine) -> list[Row]:
    return [_sampling(name, config, known, machine)]


def eval(name: str, config: EvalStage, known: Known, machine: Machine) -> list[Row]:
    return [_sampling(name, config, known, machine)]


def compare(name: str, config: CompareStage, known: Known, machine: Machine) -> list[Row]:
    """One row for each model and one for the comparison. All share a process; models of the same shape share its
    engine."""
    rows: list[Row] = []
    before: ModelShape | None = None
    for arm, child in config.children().items():
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
    return [*rows, Row(name, config.kind, make_amounts(seconds=estimate.LIGHT_START))]


def score(name: str, config: ScoreStage, known: Known, machine: Machine) -> list[Row]:
    rows, prompt, reply = known.traces.get(config.data) or rows_of(config.data, config, known)
    known.traces[name] = rows, prompt, reply
    tokens = rows * (prompt + reply)
    written = estimate.predict_trace_bytes(int(rows), rows * reply, ENTRIES, shard_rows=config.shard_rows)
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
    if config.data in known.tasks_of:
        known.tasks_of[name] = known.tasks_of[config.data]
    return [Row(name, "filter", make_amounts(seconds=estimate.predict_filter_seconds(int(rows))))]
