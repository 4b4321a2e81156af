"""Cost prediction of a train stage, and the parts that it shares with stages that train on their own completions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

from distill.compute import estimate, flops
from distill.compute.adapters import lora_params, saved_params
from distill.compute.flops import ModelShape
from distill.compute.memory import Memory, train_memory
from distill.machine import Dtype, Machine
from distill.recipe import OptimStage, PolicyStage, TrainStage, data_of, teachers_of
from distill.recipe.lineage import origin
from distill.records import UserError
from distill.run.known_sizes import Known, rows_of
from distill.run.predictions.row import (
    Part,
    Row,
    dtype_part,
    make_amounts,
    on_machine,
    start_seconds,
)
from distill.stages.inputs import own_traces
from distill.stages.inputs.layer_pairs import different_depths, different_widths, prune_stages
from distill.token_choice import PREFIX
from distill.training import prefix_sharing


@dataclass(frozen=True, slots=True)
class Training:
    """The optimiser steps of a stage: its model, FLOPs and tokens.

    step_tokens: tokens of one step, over all processes; everything else is for the whole stage. scored_flops, scored_tokens:
    additional forward passes of the model and its reference. taught: (shape, FLOPs) of each teacher in the trainer.
    reference: whether there is a reference model. length: mean tokens of a trace.
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
    length: float = 0.0
    teachers_in_engines: bool = False

    @property
    def micro_batches(self) -> int:
        """Forward and backward passes of one process in a step."""
        return math.ceil(self.step_tokens / self.config.parallel.world_size / self.config.micro_tokens)

    @property
    def micro_tokens(self) -> int:
        """Tokens of the largest of these passes."""
        return math.ceil(min(self.config.micro_tokens, self.step_tokens / self.config.parallel.world_size))

    def part(self, machine: Machine) -> Part:
        return dtype_part("training", self.shape, self.config.dtype, machine, partial(self._seconds, machine))

    def _seconds(self, machine: Machine, dtype: Dtype) -> float:
        config = self.config
        # Processes on a CPU share its cores.
        share = 1 / config.parallel.world_size if machine.device == "cuda" else 1.0
        lora = None if config.lora is None else adapter_params(self.shape, config)
        wish = config.async_checkpoints
        in_background = machine.device == "cuda" if wish is None else wish
        own = estimate.predict_train_seconds(
            self.shape,
            self.flops * share,
            self.tokens * share,
            round(self.steps),
            machine,
            dtype,
            micro_batches=self.micro_batches,
            trained=lora,
            checkpoints=1 if in_background else math.ceil(self.steps / config.checkpoint_every),
            share=1 / config.parallel.world_size if config.parallel.strategy == "fsdp2" else 1.0,
        )
        own += estimate.exchange_seconds(
            self.shape, lora, round(self.steps), self.micro_batches, machine, dtype, config.parallel
        )
        read = [(self.shape, self.scored_flops, self.scored_tokens)]
        read += [(shape, taught, self.tokens) for shape, taught in self.taught]
        return own + share * sum(
            estimate.forward_seconds(shape, taught, tokens, machine, dtype) for shape, taught, tokens in read
        )

    def memory(self, dtype: Dtype, machine: Machine) -> Memory:
        matched = Memory(activations=self.micro_tokens * matched_bytes(self.config, self.shape, dtype))
        return matched + train_memory(
            self.shape,
            self.micro_tokens,
            dtype=dtype,
            lora=self.config.lora,
            reference=self.reference,
            teachers=[] if self.teachers_in_engines else [shape for shape, _ in self.taught],
            checkpointing=self.config.gradient_checkpointing,
            micro_batches=self.micro_batches,
            length=self.length,
            parallel=self.config.parallel,
            on_cpu=machine.device == "cpu",
        )


def adapter_params(shape: ModelShape, config: OptimStage) -> float:
    """Trained parameters of a stage's adapter; 0 without one."""
    return lora_params(shape, config.lora) + saved_params(shape, config.lora) if config.lora is not None else 0.0


def train(name: str, config: TrainStage, known: Known, machine: Machine) -> list[Row]:
    shape = known.shape(config.model)
    # Several sets are joined by trace; the result has at most as many traces as the smallest set.
    rows, prompt, reply = min(known.traces.get(data) or rows_of(data, config, known) for data in data_of(config.data))
    if config.max_traces is not None:
        if config.max_traces > rows:
            known.notes.append(
                f"{name}: max_traces is {config.max_traces}, and about {rows:.0f} traces are expected; the stage refuses to learn from fewer"
            )
        rows = min(rows, config.max_traces)
    steps_an_epoch = max(1, -(-int(rows) // config.batch_traces))
    frame = known.frame(next(iter(data_of(config.data))), config.task)
    _check_hidden(name, config, known)
    whole = reply
    reply, learned = learned_tokens(config, reply, known)
    if learned.trained < whole:
        known.notes.append(
            f"stages.{name}: about {learned.trained / whole:.0%} of the completions' tokens are learned; the others have weight 0"
        )
    prompt_trained = prompt_trained_tokens(prompt, reply, frame)

    def own_flops(traces: float) -> float:
        return flops.train_flops(
            shape,
            traces * (prompt_trained + reply),
            (prompt + reply + 1) / 2,
            traces * learned.trained,
            lora=config.lora is not None,
            adapters=adapter_params(shape, config),
            checkpointing=config.gradient_checkpointing,
        ) + flops.forward_flops(shape, 0, 0, traces * learned.ranked)

    a_step = min(config.batch_traces, rows)
    if config.epochs is not None:
        seen, num_steps = rows * config.epochs, float(config.epochs * steps_an_epoch)
    else:
        num_steps = config.steps or known.budget(config) / own_flops(a_step)
        seen = num_steps * a_step
    tokens, head_tokens = seen * (prompt_trained + reply), seen * (learned.trained + learned.ranked)
    total = own_flops(seen)
    known.spent[name] = known.spent.get(config.model, 0.0) + total
    known.snapshots[name] = num_snapshots(config, num_steps)
    teachers = [known.shape(teacher) for teacher in teachers_of(config.teacher)]
    taught = tuple(
        (each, flops.forward_flops(each, tokens, (prompt + reply + 1) / 2, head_tokens)) for each in teachers
    )
    if own_traces.required(config):
        known.notes += own_traces.warnings(name, config, known.recipe)
    known.shapes[name], known.replies[name] = shape, whole
    step_tokens = a_step * (prompt_trained + reply)
    training = Training(
        config, shape, total, tokens, num_steps, step_tokens, taught=taught, length=prompt_trained + reply
    )
    part = training.part(machine)
    memory = training.memory(part.choice.dtype, machine)
    amounts = make_amounts(
        tokens=tokens,
        flops=total + sum(each for _, each in taught),
        memory=on_machine(memory.total, config.parallel, machine),
        seconds=part.seconds,
    )
    row = Row(
        name,
        config.kind,
        amounts,
        least=on_machine(memory.least, config.parallel, machine),
        parts=(part,),
        start=start_seconds(part),
        memory=memory,
        processes=config.parallel.world_size,
    )
    return [row]


@dataclass(frozen=True, slots=True)
class LearnedTokens:
    """Mean tokens of a trace through the output head: trained, and ranked (forward only, to choose those that are trained)."""

    trained: float
    ranked: float = 0.0


def learned_tokens(config: TrainStage, reply: float, known: Known) -> tuple[float, LearnedTokens]:
    """Return the mean tokens of a completion that are computed, and those through the head."""
    held = known.held.get(next(iter(data_of(config.data)))) if stored_read(config) else None
    if held is not None and held.fn == PREFIX:
        reply *= held.share
    learned = reply if held is None or held.fn == PREFIX else reply * held.share
    if config.weights is None:
        return reply, LearnedTokens(learned)
    share = config.weights.share
    if config.weights.fn == PREFIX:
        return reply * share if learned == reply else reply, LearnedTokens(learned * share)
    in_step = config.weights.fn == "divergence" or (config.weights.fn == "entropy" and config.teacher is not None)
    return reply, LearnedTokens(learned * share, learned if in_step else 0.0)


def stored_read(config: TrainStage) -> bool:
    """Return whether a stage reads stored distributions."""
    weights = config.weights is not None and config.weights.fn != PREFIX
    return config.teacher is None and (weights or config.loss.fn != "cross_entropy")


def _check_hidden(name: str, config: TrainStage, known: Known) -> None:
    """Refuse to match hidden states of models whose sizes are known and do not go together."""
    if config.hidden is None:
        return
    (teacher,) = teachers_of(config.teacher)
    mine, theirs = known.shape(config.model), known.shape(teacher)
    unknown = {origin(known.recipe, model) for model in (config.model, teacher)}
    if any(note.startswith(f"models.{each} unverified") for each in unknown for note in known.notes):
        return
    where = f"stages.{name}"
    if mine.hidden != theirs.hidden:
        raise UserError(different_widths(where, config.model, teacher, mine.hidden, theirs.hidden))
    pruned = prune_stages(known.recipe, config.model)
    made_of = known.shape(known.recipe.stages[pruned[0]].reads("model")[0]) if pruned else mine
    if made_of.layers != theirs.layers:
        raise UserError(
            different_depths(
                where, config.model, teacher, mine.layers, theirs.layers, made_of.layers if pruned else None
            )
        )


def matched_bytes(config: OptimStage, shape: ModelShape, dtype: Dtype) -> float:
    """Bytes a token that matching hidden states holds: of each layer both models' states, and two copies in fp32."""
    if not isinstance(config, TrainStage) or config.hidden is None:
        return 0.0
    layers = {"all": shape.layers, "last": 1}.get(str(config.hidden.layers)) or len(config.hidden.layers)
    return float(layers * shape.hidden * (2 * flops.BYTES[dtype] + 8))


def num_snapshots(config: TrainStage | PolicyStage, num_steps: float) -> int:
    """The number of snapshots that the stage saves, without the final model."""
    return int((num_steps - 1) // config.snapshot_every) if config.snapshot_every else 0


def prompt_trained_tokens(prompt: float, reply: float, frame: float, group: int = 1) -> float:
    """Prompt tokens that the trainer computes per trace. Each prompt is computed once per group; its first `frame`
    tokens, which all prompts share, are so rare that they are neglected (`training.packing`)."""
    if prompt + reply > prefix_sharing.MAX_TOKENS:
        return prompt
    return max(prompt - frame, 1.0) / group + (group > 1)
