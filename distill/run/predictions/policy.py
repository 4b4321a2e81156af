"""Cost predictions for the stage kinds that train on the policy's own completions: grpo, on_policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from distill.compute import estimate, flops
from distill.compute.flops import ModelShape
from distill.compute.memory import ENGINE_BYTES, Memory
from distill.machine import Machine
from distill.recipe import GrpoStage, OnPolicyStage, PolicyStage, teachers_of
from distill.run.known_sizes import Known, reward_bytes
from distill.run.predictions.inference import mean_reply
from distill.run.predictions.row import (
    Part,
    Row,
    all_engines,
    decoded_at_once,
    engine_memory,
    engine_part,
    engines_at_once,
    make_amounts,
    on_machine,
    sequence_cache,
    start_seconds,
)
from distill.run.predictions.training import Training, adapter_params, num_snapshots, prompt_trained_tokens
from distill.stages.inputs import own_traces


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

    def training(self, a_step: float, num_steps: float, teachers: Sequence[ModelShape], reference: bool) -> Training:
        """The optimiser steps of the stage. a_step: number of completions in one step."""
        sampled, tokens = num_steps * a_step, self.prompt_trained + self.reply
        return Training(
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
        """The prediction for the engines that write the completions: one for each process on a GPU, or the replicas."""
        engine = self.config.engine
        beside = self.config.parallel.world_size if machine.device == "cuda" else 1
        engines = beside if engine.ray is None else engines_at_once(engine, machine)
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
    if warning := own_traces.other_teacher(known.recipe, config.model, list(teachers_of(config.teacher))):
        known.notes.append(f"{name}: {warning}")
    policy = _policy(config, known, passes=1, scorings=0)
    return [_policy_row(name, policy, known, machine, teachers=teachers, in_engines=in_engines)]


def _policy(config: PolicyStage, known: Known, passes: int, scorings: int) -> _Policy:
    shape, (_, prompt) = known.shape(config.model), known.task(config.task)
    reply = mean_reply(config, known)
    frame = known.frame("", config.task)
    prompt_trained = prompt_trained_tokens(prompt, reply, frame, config.group_size)
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
    known.snapshots[name] = num_snapshots(config, num_steps)
    training = policy.training(a_step, num_steps, teachers, reference)
    writing = policy.sampling(sampled, num_steps / config.steps_a_rollout, machine)
    learning = training.part(machine)
    longest, dtype = policy.prompt + config.sampling.max_tokens, writing.choice.dtype
    # Every process, or every replica, has an engine for its share of a rollout.
    apart, replicas = config.engine.ray is not None, engines_at_once(config.engine, machine)
    at_once = sampled / num_steps * config.steps_a_rollout / (config.engine.replicas if apart else processes)
    held = [engine_memory(shape, config.engine, dtype, longest, machine, at_once)]
    if in_engines:
        held += [engine_memory(each, config.engine, dtype, longest, machine, at_once, scored=True) for each in teachers]
        training = replace(training, teachers_in_engines=True)
    memory = training.memory(learning.choice.dtype, machine)
    # The engines run in the trainer's process, which is counted once.
    own, *others = (replace(each, process=0.0) for each in held)
    memory += Memory(process=ENGINE_BYTES.get(writing.engine, 0.0), rewards=rewards)
    for each in others:
        memory += each
    beside = (memory, own) if writing.engine == "vllm" and machine.device == "cuda" and not apart else None
    if apart and machine.device == "cuda":  # on other GPUs than the trainer's; the fuller of both counts
        memory = max(memory, own, key=lambda each: each.total)
    else:
        memory += all_engines(own, config.engine, machine)
    known.shapes[name], known.replies[name] = shape, policy.reply
    seconds = (learning.seconds, writing.seconds)  # one after the other, or with `ahead` at the same time
    amounts = make_amounts(
        tokens=sampled * (policy.prompt + policy.reply) + training.tokens,
        flops=policy.own_flops(sampled) + sum(each for _, each in training.taught),
        memory=on_machine(memory.total, config.parallel, machine),
        seconds=max(seconds) if config.ahead and machine.device == "cuda" else sum(seconds),
    )
    parts = (learning, writing)
    return Row(
        name,
        config.kind,
        amounts,
        least=on_machine(memory.least, config.parallel, machine),
        parts=parts,
        start=start_seconds(*parts),
        memory=memory,
        processes=processes + (replicas * config.engine.tensor_parallel if apart and machine.device == "cuda" else 0),
        sequence_cache=sequence_cache(shape, config.engine, dtype, longest, machine),
        engine=config.engine,
        beside=beside,
    )
