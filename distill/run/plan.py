"""What a recipe will cost, before anything heavy loads: tokens, bytes, FLOPs, memory and seconds, stage by stage.

Lengths are guessed from a few of the task's own problems and from the texts the models learn from; the rest are counts and
`reports.estimate`. What cannot be looked up (a hub model without a network) is reported as unverified.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from distill import machine as machines
from distill import plug
from distill.compute import estimate, flops
from distill.compute.flops import Memory, ModelShape
from distill.machine import Choice, Dtype, Machine, Width
from distill.models import cache_home
from distill.recipe import (
    CompareStage,
    EngineConfig,
    EvalStage,
    FilterStage,
    GenerateStage,
    GrpoStage,
    OnPolicyStage,
    OptimStage,
    PolicyStage,
    PruneStage,
    Recipe,
    ScoreStage,
    TrainStage,
    data_of,
    order,
    teachers_of,
)
from distill.records import SHARED, UserError
from distill.run.known_sizes import Known, model_shape, rows_of, stored

KEPT_BY_CORRECT = 0.7
"""Guess at the share of traces that a `correct` filter keeps."""
ENTRIES = 1.2
"""Guess at the candidates kept a position at mass .98, for a teacher that is mostly sure."""


@dataclass(frozen=True, slots=True)
class Part:
    """A trainer or an engine of a node: the dtype that it runs in, why, and its seconds.

    slower: seconds that the dtype of the recipe's choice costs over dtype: auto. engine: its name, and by_vllm: the seconds that
    vLLM would take where the engine is transformers and vLLM is missing or not asked for.
    """

    purpose: Literal["training", "engine"]
    choice: Choice
    seconds: float
    slower: float = 0.0
    engine: str = ""
    by_vllm: float | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """The prediction for one node. amounts: tokens, bytes, flops, memory (peak bytes), seconds."""

    name: str
    kind: str
    amounts: dict[str, float]
    notes: tuple[str, ...] = ()
    least: float = 0.0
    """Bytes of weights, masters and moments alone: with less memory the stage cannot run."""
    parts: tuple[Part, ...] = ()
    start: float = 0.0
    """Seconds of the process's and the engine's start, which are the same however much there is to do."""


def widths(recipe: Recipe) -> list[Width]:
    """Of every model of the recipe; of one that cannot be looked up, as its number of parameters suggests."""
    shapes = [model_shape(model)[0] for model in recipe.models.values()]
    return [(shape.hidden, shape.intermediate) for shape in shapes]


def measured(recipe: Recipe) -> Machine:
    """This machine, measured at the width of every model of the recipe."""
    return machines.measured(widths(recipe), cache_home() / "machine")


def predict(recipe: Recipe, machine: Machine | None = None) -> list[Row]:
    """One row a node, inputs first. machine: None measures this one.

    Raises UserError for what is wrong in a way that can be told now.
    """
    machine = machine or measured(recipe)
    known = Known(recipe)
    rows: list[Row] = []
    for name in order(recipe):
        config = recipe.stages[name]
        before = len(known.notes)
        if isinstance(config, PruneStage):
            row = _prune(name, config, known, machine)
        elif isinstance(config, GenerateStage | EvalStage):
            row = _sampling(name, config, known, machine)
        elif isinstance(config, ScoreStage):
            row = _score(name, config, known, machine)
        elif isinstance(config, FilterStage):
            row = _filter(name, config, known)
        elif isinstance(config, TrainStage):
            row = _train(name, config, known, machine)
        elif isinstance(config, PolicyStage):
            row = _policy(name, config, known, machine)
        else:
            rows += _evaluations(name, config, known, machine)
            row = Row(name, config.kind, _amounts(seconds=estimate.LIGHT_START))
        rows.append(replace(row, notes=tuple(known.notes[before:])))
    return rows


def _amounts(
    tokens: float = 0.0,
    bytes: float = 0.0,
    flops: float = 0.0,
    memory: float = 0.0,
    seconds: float = 0.0,
) -> dict[str, float]:
    return {"tokens": tokens, "bytes": bytes, "flops": flops, "memory": memory, "seconds": seconds}


def _part(
    purpose: Literal["training", "engine"],
    shape: ModelShape,
    wish: str,
    machine: Machine,
    seconds: Callable[[Dtype], float],
) -> Part:
    """A trainer's or engine's dtype as `machine.choose` has it, and its seconds beside those of dtype: auto."""
    width = shape.hidden, shape.intermediate
    choice = machines.choose(machine, width, wish, purpose)
    best = machines.choose(machine, width, "auto", purpose)
    took = seconds(choice.dtype)
    slower = took - seconds(best.dtype) if best.dtype != choice.dtype else 0.0
    return Part(purpose, choice, took, slower)


def _engine_part(
    shape: ModelShape,
    config: EngineConfig,
    machine: Machine,
    seconds: Callable[[Dtype, str], float],
) -> Part:
    """seconds: by dtype and engine."""
    name = engine_name(config)
    part = _part("engine", shape, config.dtype, machine, lambda dtype: seconds(dtype, name))
    by_vllm = seconds(part.choice.dtype, "vllm") if name == "transformers" else None
    return replace(part, engine=name, by_vllm=by_vllm)


def _start(*parts: Part) -> float:
    return estimate.PROCESS_START + sum(estimate.engine_start(part.engine) for part in parts if part.engine)


def engine_name(config: EngineConfig) -> str:
    """The engine that `auto` stands for here."""
    if config.fn != "auto":
        return config.fn
    return "vllm" if importlib.util.find_spec("vllm") is not None else "transformers"


def _engine_memory(
    shape: ModelShape,
    config: EngineConfig,
    dtype: Dtype,
    length: float,
    machine: Machine,
    **more: bool,
) -> Memory:
    cache = config.kv_cache_gib or (1.0 if machine.device == "cpu" else None)
    return flops.generate_memory(
        shape,
        config.batch_size,
        int(length),
        dtype=dtype,
        engine=engine_name(config),
        cache_gib=cache,
        on_cpu=machine.device == "cpu",
        **more,
    )


def _prune(name: str, config: PruneStage, known: Known, machine: Machine) -> Row:
    shape = known.shape(config.model)
    if config.layers > shape.layers:
        raise UserError(f"stages.{name}.layers: {config.layers} of a model that has {shape.layers}.")
    known.shapes[name] = shape.with_layers(config.layers)
    known.replies[name] = known.replies.get(config.model, 0.0)
    held = Memory(weights=2.0 * shape.params_total, process=flops.PROCESS_BYTES)
    amounts = _amounts(seconds=estimate.predict_prune_seconds(known.shapes[name]), memory=held.total)
    # It works in the machine's memory, which is not what `machine.memory` says where there is a GPU.
    return Row(name, "prune", amounts, least=held.least if machine.device == "cpu" else 0.0)


def _reply(config: GenerateStage | EvalStage | PolicyStage, known: Known) -> float:
    """Tokens of a completion: as many as what the model learned from has, or a part of what it may write."""
    learned = known.replies.get(config.model) or 0.6 * config.sampling.max_tokens
    return min(learned, config.sampling.max_tokens)


def _sampling(name: str, config: GenerateStage | EvalStage, known: Known, machine: Machine) -> Row:
    shape, (_, prompt) = known.shape(config.model), known.task(config.task)
    reply = _reply(config, known)
    folders = [config.problems * config.samples]
    if isinstance(config, EvalStage) and config.snapshot_problems:
        tried = min(config.snapshot_problems, config.problems) * config.samples
        folders += [tried] * known.snapshots.get(config.model, 0)
    sequences = sum(folders)
    captured = isinstance(config, GenerateStage) and config.top_logprobs > 0
    shard_rows = config.shard_rows if isinstance(config, GenerateStage) else 256
    known.traces[name] = (sequences, prompt, reply)
    known.tasks_of[name] = config.task
    part = _engine_part(
        shape,
        config.engine,
        machine,
        lambda dtype, engine: estimate.predict_generate_seconds(
            shape,
            sequences,
            sequences * prompt,
            sequences * reply,
            machine,
            batch_size=config.engine.batch_size,
            dtype=dtype,
            engine=engine,
        ),
    )
    memory = _engine_memory(shape, config.engine, part.choice.dtype, prompt + config.sampling.max_tokens, machine)
    amounts = _amounts(
        tokens=sequences * (prompt + reply),
        bytes=sum(
            estimate.predict_trace_bytes(rows, rows * reply, ENTRIES if captured else 0.0, shard_rows=shard_rows)
            for rows in folders
        ),
        flops=flops.generate_flops(shape, sequences * prompt, sequences * reply, sequences),
        memory=memory.total,
        seconds=part.seconds,
    )
    return Row(name, config.kind, amounts, least=memory.least, parts=(part,), start=_start(part))


def _evaluations(name: str, config: CompareStage, known: Known, machine: Machine) -> list[Row]:
    """Of a comparison, one a model. They share a process, and its engine as long as the models are built alike."""
    rows: list[Row] = []
    before: ModelShape | None = None
    for arm, child in config.children().items():
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
    return rows


def _score(name: str, config: ScoreStage, known: Known, machine: Machine) -> Row:
    shape = known.shape(config.model)
    rows, prompt, reply = known.traces.get(config.data) or rows_of(config, config.data, known)
    known.traces[name] = rows, prompt, reply
    tokens = rows * (prompt + reply)
    total = flops.forward_flops(shape, tokens, (prompt + reply + 1) / 2, rows * reply)
    part = _engine_part(
        shape,
        config.engine,
        machine,
        lambda dtype, engine: estimate.predict_score_seconds(
            shape, total, tokens, rows * reply, machine, dtype, engine
        ),
    )
    memory = _engine_memory(shape, config.engine, part.choice.dtype, prompt + reply, machine, scored=True)
    amounts = _amounts(
        tokens=tokens,
        bytes=estimate.predict_trace_bytes(int(rows), rows * reply, ENTRIES, shard_rows=config.shard_rows),
        flops=total,
        memory=memory.total,
        seconds=part.seconds,
    )
    return Row(name, config.kind, amounts, least=memory.least, parts=(part,), start=_start(part))


def _points(config: TrainStage | PolicyStage, num_steps: float) -> int:
    """Models kept along the way, the end not counted."""
    return int((num_steps - 1) // config.snapshot_every) if config.snapshot_every else 0


def _filter(name: str, config: FilterStage, known: Known) -> Row:
    rows, prompt, reply = known.traces.get(config.data) or stored(config.data)
    kept = rows * KEPT_BY_CORRECT if any(f.fn == "correct" for f in config.keep) else rows
    known.traces[name] = (kept, prompt, reply)
    if config.data in known.tasks_of:
        known.tasks_of[name] = known.tasks_of[config.data]
    return Row(name, "filter", _amounts(seconds=estimate.predict_filter_seconds(int(rows))))


@dataclass(frozen=True, slots=True)
class _Training:
    """The optimiser steps of a stage: its model, and how many tokens go through it.

    step_tokens: of one step. taught: the teachers' (shape, FLOPs), over tokens of the whole stage.
    """

    config: OptimStage
    shape: ModelShape
    flops: float
    tokens: float
    steps: float
    step_tokens: float
    scored_flops: float = 0.0
    scored_tokens: float = 0.0
    taught: tuple[tuple[ModelShape, float], ...] = ()
    reference: bool = False

    def part(self, machine: Machine) -> Part:
        return _part("training", self.shape, self.config.dtype, machine, partial(self._seconds, machine))

    def _seconds(self, machine: Machine, dtype: Dtype) -> float:
        config = self.config
        lora = None if config.lora is None else flops.lora_params(self.shape, config.lora.rank)
        own = estimate.predict_train_seconds(
            self.shape,
            self.flops,
            self.tokens,
            round(self.steps),
            machine,
            dtype,
            micro_batches=math.ceil(self.step_tokens / config.micro_tokens),
            trained=lora,
            checkpoints=math.ceil(self.steps / config.checkpoint_every),
        )
        read = [(self.shape, self.scored_flops, self.scored_tokens)]
        read += [(shape, taught, self.tokens) for shape, taught in self.taught]
        return own + sum(
            estimate.forward_seconds(shape, taught, tokens, machine, dtype) for shape, taught, tokens in read
        )

    def memory(self, dtype: Dtype, machine: Machine) -> Memory:
        lora = self.config.lora
        frozen = sum(shape.params_total for shape, _ in self.taught)
        if self.reference and lora is None:
            frozen += self.shape.params_total
        return flops.train_memory(
            self.shape,
            int(min(self.config.micro_tokens, self.step_tokens)),
            dtype=dtype,
            lora_rank=None if lora is None else lora.rank,
            quantised=None if lora is None else lora.quantised,
            frozen_params=frozen,
            checkpointing=self.config.gradient_checkpointing,
            on_cpu=machine.device == "cpu",
        )


def _train(name: str, config: TrainStage, known: Known, machine: Machine) -> Row:
    shape = known.shape(config.model)
    # Of several sets that hold the same traces, the one with fewest is the most there can be in common.
    rows, prompt, reply = min(known.traces.get(data) or rows_of(config, data, known) for data in data_of(config.data))
    steps_an_epoch = max(1, -(-int(rows) // config.batch_traces))
    frame = known.frame(next(iter(data_of(config.data))), config.task)
    prompt_trained = _prompt_trained(prompt, reply, frame)

    def own_flops(traces: float) -> float:
        return flops.train_flops(
            shape,
            traces * (prompt_trained + reply),
            (prompt + reply + 1) / 2,
            traces * reply,
            lora=config.lora is not None,
            checkpointing=config.gradient_checkpointing,
        )

    a_step = min(config.batch_traces, rows)
    if config.epochs is not None:
        seen, num_steps = rows * config.epochs, float(config.epochs * steps_an_epoch)
    else:
        num_steps = config.steps or known.budget(config) / own_flops(a_step)
        seen = num_steps * a_step
    tokens, head_tokens = seen * (prompt_trained + reply), seen * reply
    total = own_flops(seen)
    known.spent[name] = known.spent.get(config.model, 0.0) + total
    known.snapshots[name] = _points(config, num_steps)
    teachers = [known.shape(teacher) for teacher in teachers_of(config.teacher)]
    taught = tuple(
        (each, flops.forward_flops(each, tokens, (prompt + reply + 1) / 2, head_tokens)) for each in teachers
    )
    known.shapes[name], known.replies[name] = shape, reply
    training = _Training(config, shape, total, tokens, num_steps, a_step * (prompt_trained + reply), taught=taught)
    part = training.part(machine)
    memory = training.memory(part.choice.dtype, machine)
    amounts = _amounts(
        tokens=tokens,
        flops=total + sum(each for _, each in taught),
        memory=memory.total,
        seconds=part.seconds,
    )
    return Row(name, config.kind, amounts, least=memory.least, parts=(part,), start=_start(part))


def _policy(name: str, config: PolicyStage, known: Known, machine: Machine) -> Row:
    """Its own sampling and its training; every group is taken to have something to learn from."""
    from distill.stages.inputs.resolve import resolve_objective

    shape, (_, prompt) = known.shape(config.model), known.task(config.task)
    reply = _reply(config, known)
    passes, scorings, reference = 1, 0, False
    teachers: list[ModelShape] = []
    if isinstance(config, GrpoStage):
        passes = config.num_iterations
        reference = resolve_objective(config, f"stages.{name}").reference
        scorings = (config.mini_batches * config.num_iterations > 1) + reference
    elif isinstance(config, OnPolicyStage):
        teachers = [known.shape(teacher) for teacher in teachers_of(config.teacher)]
    frame = known.frame("", config.task)
    prompt_trained = _prompt_trained(prompt, reply, frame, config.group_size)
    context = (prompt + reply + 1) / 2

    def trained(sampled: float) -> float:
        return flops.train_flops(
            shape,
            passes * sampled * (prompt_trained + reply),
            context,
            passes * sampled * reply,
            lora=config.lora is not None,
            checkpointing=config.gradient_checkpointing,
        )

    def read(by: ModelShape, sampled: float) -> float:
        return flops.forward_flops(by, sampled * (prompt_trained + reply), context, sampled * reply)

    def own_flops(sampled: float) -> float:
        written = flops.generate_flops(shape, sampled * prompt, sampled * reply, sampled)
        return trained(sampled) + scorings * read(shape, sampled) + written

    a_step = config.prompts_a_rollout * config.group_size / config.steps_a_rollout
    num_steps = config.steps or known.budget(config) / own_flops(a_step)
    sampled = num_steps * a_step
    known.spent[name] = known.spent.get(config.model, 0.0) + own_flops(sampled)
    known.snapshots[name] = _points(config, num_steps)
    training = _Training(
        config,
        shape,
        trained(sampled),
        passes * sampled * (prompt_trained + reply),
        num_steps,
        passes * a_step * (prompt_trained + reply),
        scorings * read(shape, sampled),
        scorings * sampled * (prompt_trained + reply),
        tuple((each, read(each, sampled)) for each in teachers),
        reference,
    )
    rollouts = num_steps / config.steps_a_rollout
    writing = _engine_part(
        shape,
        config.engine,
        machine,
        lambda dtype, engine: estimate.predict_rollouts_seconds(
            shape,
            rollouts,
            sampled / rollouts,
            prompt,
            reply,
            machine,
            batch_size=config.engine.batch_size,
            dtype=dtype,
            engine=engine,
        ),
    )
    learning = training.part(machine)
    held = _engine_memory(shape, config.engine, writing.choice.dtype, prompt + config.sampling.max_tokens, machine)
    # The engine's process is the trainer's.
    memory = training.memory(learning.choice.dtype, machine) + replace(
        held, process=max(0.0, held.process - flops.PROCESS_BYTES)
    )
    if isinstance(config, OnPolicyStage) and config.scoring == "engine":
        # Teachers that read in engines of their own have their caches there; their weights are counted.
        memory += Memory(cache=len(teachers) * held.cache)
    known.shapes[name], known.replies[name] = shape, reply
    amounts = _amounts(
        tokens=sampled * (prompt + reply) + training.tokens,
        flops=own_flops(sampled) + sum(each for _, each in training.taught),
        memory=memory.total,
        seconds=learning.seconds + writing.seconds,
    )
    kind = "grpo" if isinstance(config, GrpoStage) else "on_policy"
    parts = (learning, writing)
    return Row(name, kind, amounts, least=memory.least, parts=parts, start=_start(*parts))


def _prompt_trained(prompt: float, reply: float, frame: float, group: int = 1) -> float:
    """Prompt tokens computed a trace: once a group, and the `frame` that all prompts begin with next to never
    (`training.packing`)."""
    if prompt + reply > SHARED:
        return prompt
    return max(prompt - frame, 1.0) / group + (group > 1)


def check_plugs(recipe: Recipe) -> None:
    """Every loss, filter, reward and engine named in a recipe exists and takes the options given. Raises UserError."""
    from distill.stages.compare import check_start
    from distill.stages.inputs.resolve import resolve_loss, resolve_objective, resolve_rewards

    for name, config in recipe.stages.items():
        if isinstance(config, TrainStage | OnPolicyStage):
            resolve_loss(config, f"stages.{name}")
        elif isinstance(config, GrpoStage):
            resolve_objective(config, f"stages.{name}")
            resolve_rewards(config, f"stages.{name}")
        elif isinstance(config, FilterStage):
            for number, keep in enumerate(config.keep):
                plug.bind(keep.fn, keep.options, "distill.traces.filters", f"stages.{name}.keep.{number}")
        elif isinstance(config, CompareStage):
            check_start(config, recipe)
        if isinstance(config, PolicyStage | GenerateStage | ScoreStage | EvalStage | CompareStage):
            plug.find(config.engine.fn, "distill.engines.factories", f"stages.{name}.engine.fn")
