"""Cost predictions for the stage kinds that train: train, grpo, on_policy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from distill.compute import estimate, flops
from distill.compute.adapters import lora_params, saved_params
from distill.compute.flops import ModelShape
from distill.compute.memory import ENGINE_BYTES, Memory, train_memory
from distill.machine import Dtype, Machine
from distill.recipe import GrpoStage, OnPolicyStage, OptimStage, PolicyStage, TrainStage, data_of, teachers_of
from distill.run.known_sizes import Known, reward_bytes, rows_of
from distill.run.predictions.inference import mean_reply
from distill.run.predictions.row import (
    Part,
    Row,
    decoded_at_once,
    dtype_part,
    engine_memory,
    engine_part,
    make_amounts,
    sequence_cache,
    start_seconds,
)
from distill.training import prefix_sharing


@dataclass(frozen=True, slots=True)
class _Training:
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
        return train_memory(
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
            adapters=adapter_params(shape, config),
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
    known.snapshots[name] = _snapshots(config, num_steps)
    teachers = [known.shape(teacher) for teacher in teachers_of(config.teacher)]
    taught = tuple(
        (each, flops.forward_flops(each, tokens, (prompt + reply + 1) / 2, head_tokens)) for each in teachers
    )
    known.shapes[name], known.replies[name] = shape, reply
    step_tokens = a_step * (prompt_trained + reply)
    training = _Training(
        config, shape, total, tokens, num_steps, step_tokens, taught=taught, length=prompt_trained + reply
    )
    part = training.part(machine)
    memory = training.memory(part.choice.dtype, machine)
    amounts = make_amounts(
        tokens=tokens,
        flops=total + sum(each for _, each in taught),
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
        processes=config.parallel.world_size,
    )
    return [row]


@dataclass(frozen=True, slots=True)
class _Policy:
    """FLOPs and seconds of a stage that trains on its policy's completions; methods take the number of completions.

    prompt_trained: prompt tokens that the trainer computes per completion. passes: times that each rollout is trained
    on. scorings: additional forward passes over a rollout, of the policy and its reference.
    """

    config: PolicyStage
    shape: ModelShape
    prompt: float
    reply: float
    prompt_trained: float
    passes: int
    scorings: int

    def trained_flops(self, sampled: float) -> float:
        return flops.train_flops(
            self.shape,
            self.passes * sampled * (self.prompt_trained + self.reply),
            (self.prompt + self.reply + 1) / 2,
            self.passes * sampled * self.reply,
            lora=self.config.lora is not None,
            adapters=adapter_params(self.shape, self.config),
            checkpointing=self.config.gradient_checkpointing,
        )

    def read_flops(self, by: ModelShape, sampled: float) -> float:
        """FLOPs of one forward pass of the model `by` over the completions."""
        tokens = sampled * (self.prompt_trained + self.reply)
        return flops.forward_flops(by, tokens, (self.prompt + self.reply + 1) / 2, sampled * self.reply)

    def own_flops(self, sampled: float) -> float:
        """The student's FLOPs: training, scoring and sampling."""
        written = flops.generate_flops(self.shape, sampled * self.prompt, sampled * self.reply, sampled)
        return self.trained_flops(sampled) + self.scorings * self.read_flops(self.shape, sampled) + written

    def training(self, a_step: float, num_steps: float, teachers: Sequence[ModelShape], reference: bool) -> _Training:
        """The optimiser steps of the stage. a_step: number of completions in one step."""
        sampled, tokens = num_steps * a_step, self.prompt_trained + self.reply
        return _Training(
            self.config,
            self.shape,
            self.trained_flops(sampled),
            self.passes * sampled * tokens,
            num_steps,
            self.passes * a_step * tokens,
            self.scorings * self.read_flops(self.shape, sampled),
            self.scorings * sampled * tokens,
            tuple((each, self.read_flops(each, sampled)) for each in teachers),
            reference,
            tokens,
        )

    def sampling(self, sampled: float, rollouts: float, machine: Machine) -> Part:
        """The prediction for the engines that write the completions, one for each process on a GPU of its own."""
        engines = self.config.parallel.world_size if machine.device == "cuda" else 1
        return engine_part(
            self.shape,
            self.config.engine,
            machine,
            lambda dtype, engine: estimate.predict_rollouts_seconds(
                self.shape,
                rollouts,
                sampled / rollouts / engines,
                self.prompt,
                self.reply,
                machine,
                batch_size=decoded_at_once(self.shape, self.config.engine, self.prompt + self.reply, machine),
                dtype=dtype,
                engine=engine,
            ),
        )


def grpo(name: str, config: GrpoStage, known: Known, machine: Machine) -> list[Row]:
    """Sampling and training. Assumes that no group is skipped because all its rewards are equal."""
    from distill.stages.inputs.resolve import resolve_objective

    reference = resolve_objective(config, f"stages.{name}").reference
    scorings = (config.steps_a_rollout > 1) + reference
    policy = _policy(config, known, config.num_iterations, scorings)
    rewards = reward_bytes(config.rewards)
    return [_policy_row(name, policy, known, machine, reference=reference, rewards=rewards)]


def on_policy(name: str, config: OnPolicyStage, known: Known, machine: Machine) -> list[Row]:
    """Sampling, the teachers' forward passes and training."""
    teachers = [known.shape(teacher) for teacher in teachers_of(config.teacher)]
    in_engines = config.scoring == "engine"
    policy = _policy(config, known, passes=1, scorings=0)
    return [_policy_row(name, policy, known, machine, teachers=teachers, in_engines=in_engines)]


def _policy(config: PolicyStage, known: Known, passes: int, scorings: int) -> _Policy:
    shape, (_, prompt) = known.shape(config.model), known.task(config.task)
    reply = mean_reply(config, known)
    frame = known.frame("", config.task)
    prompt_trained = _prompt_trained(prompt, reply, frame, config.group_size)
    return _Policy(config, shape, prompt, reply, prompt_trained, passes, scorings)


def _policy_row(
    name: str,
    policy: _Policy,
    known: Known,
    machine: Machine,
    *,
    reference: bool = False,
    teachers: Sequence[ModelShape] = (),
    in_engines: bool = False,
    rewards: float = 0.0,
) -> Row:
    """The prediction for a stage that trains on its own completions.

    in_engines: whether the teachers run in engines. rewards: bytes of reward models.
    """
    config, shape, processes = policy.config, policy.shape, policy.config.parallel.world_size
    a_step = config.prompts_a_rollout * config.group_size / config.steps_a_rollout
    num_steps = config.steps or known.budget(config) / policy.own_flops(a_step)
    sampled = num_steps * a_step
    known.spent[name] = known.spent.get(config.model, 0.0) + policy.own_flops(sampled)
    known.snapshots[name] = _snapshots(config, num_steps)
    training = policy.training(a_step, num_steps, teachers, reference)
    writing = policy.sampling(sampled, num_steps / config.steps_a_rollout, machine)
    learning = training.part(machine)
    longest, dtype = policy.prompt + config.sampling.max_tokens, writing.choice.dtype
    # Every process has an engine for its share of a rollout.
    at_once = sampled / num_steps * config.steps_a_rollout / processes
    held = [engine_memory(shape, config.engine, dtype, longest, machine, at_once)]
    if in_engines:
        held += [engine_memory(each, config.engine, dtype, longest, machine, at_once, scored=True) for each in teachers]
        training = replace(training, teachers_in_engines=True)
    memory = training.memory(learning.choice.dtype, machine)
    # The engines run in the trainer's process, which is counted once.
    for each in held:
        memory += replace(each, process=0.0)
    memory += Memory(process=ENGINE_BYTES.get(writing.engine, 0.0), rewards=rewards)
    known.shapes[name], known.replies[name] = shape, policy.reply
    amounts = make_amounts(
        tokens=sampled * (policy.prompt + policy.reply) + training.tokens,
        flops=policy.own_flops(sampled) + sum(each for _, each in training.taught),
        memory=memory.total,
        seconds=learning.seconds + writing.seconds,
    )
    parts = (learning, writing)
    return Row(
        name,
        config.kind,
        amounts,
        least=memory.least,
        parts=parts,
        start=start_seconds(*parts),
        memory=memory,
        processes=processes,
        sequence_cache=sequence_cache(shape, config.engine, dtype, longest, machine),
    )


def _snapshots(config: TrainStage | PolicyStage, num_steps: float) -> int:
    """The number of snapshots that the stage saves, without the final model."""
    return int((num_steps - 1) // config.snapshot_every) if config.snapshot_every else 0


def _prompt_trained(prompt: float, reply: float, frame: float, group: int = 1) -> float:
    """Prompt tokens that the trainer computes per trace. Each prompt is computed once per group; its first `frame`
    tokens, which all prompts share, are so rare that they are neglected (`training.packing`)."""
    if prompt + reply > prefix_sharing.MAX_TOKENS:
        return prompt
    return max(prompt - frame, 1.0) / group + (group > 1)
