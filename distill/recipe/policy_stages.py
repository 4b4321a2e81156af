"""The stage kinds that learn from the model's own completions: by rewards, or on a teacher's distributions (on-policy)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Literal

import pydantic
from pydantic import Field, PositiveInt

from distill.recipe.engine import EngineConfig
from distill.recipe.fields import PlugConfig, RewardConfig, SamplingConfig, execution, growth
from distill.recipe.stage import Input
from distill.recipe.training_stages import MAX_FAILED_REWARDS, REWARD_TIMEOUT, OptimStage, teachers_of


class PolicyStage(OptimStage):
    """The fields of every stage that learns from the policy's own completions. `steps` counts optimiser steps."""

    model: str = Field(description="model to train")
    task: str = Field(description="task whose train problems are used")
    steps: PositiveInt | None = growth(None, description="number of optimiser steps")
    prompts: PositiveInt = Field(8, description="number of problems in one optimiser step")
    group_size: int = Field(8, ge=1, description="number of completions for each problem")
    problems: PositiveInt | None = Field(
        None, description="number of distinct train problems, which are repeated; None = new problems at every step"
    )
    sampling: SamplingConfig = Field(SamplingConfig(), description="how completions are sampled")
    engine: EngineConfig = Field(EngineConfig(), description="engine that samples the completions")
    ahead: Literal[0, 1] = Field(
        0,
        description="1: the next rollout is generated while the model trains on this one, with weights that are one rollout "
        "older; needs engines apart (engine.ray). 0: one after the other",
    )
    log_completions_every: PositiveInt = execution(
        10, description="write some completions to the log and to completions.jsonl every N rollouts"
    )

    def half_the_work(self, stage: str) -> str:
        steps = f"half the steps ({self.steps}), prompts or group_size ({self.group_size}) of {stage}"
        return super().half_the_work(stage) or steps

    @property
    def steps_a_rollout(self) -> int:
        """The number of optimiser steps for each rollout."""
        return 1

    @property
    def prompts_a_rollout(self) -> int:
        """Number of problems in a rollout."""
        return self.prompts

    @pydantic.model_validator(mode="after")
    def _on_this_machine(self) -> PolicyStage:
        if self.engine.is_served:
            raise ValueError(
                "engine.fn: after every step the engine receives the student's new weights, which an endpoint does not take; use "
                "an engine of this machine, for teachers that score too"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _one_length(self) -> PolicyStage:
        if (self.steps is None) == (self.budget is None):
            raise ValueError("set exactly one of steps and budget")
        return self

    @pydantic.model_validator(mode="after")
    def _whole_weights(self) -> PolicyStage:
        if self.lora is not None and self.lora.quantised:
            raise ValueError(
                "lora.quantised: not possible here: after every step the engine receives the policy's full-precision weights, "
                "which a quantised base does not have. Remove this key; only stages of kind train support it"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _apart(self) -> PolicyStage:
        if self.ahead and self.engine.ray is None:
            raise ValueError(
                "ahead: needs engines apart from the trainer (engine: {ray: auto, replicas: N}); an engine in the trainer's "
                "process cannot generate while it trains"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _engine_beside(self) -> PolicyStage:
        engine = self.engine
        if engine.ray is None and engine.tensor_parallel > 1 and self.parallel.world_size > 1:
            raise ValueError(
                f"engine.tensor_parallel: {self.parallel.world_size} processes have an engine each on their own GPU, so none can be "
                "split; set tensor_parallel: 1, or engine.ray for engines apart"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _enough_problems(self) -> PolicyStage:
        if self.problems is not None and self.problems < self.prompts_a_rollout:
            raise ValueError(
                f"problems is {self.problems}, but one rollout needs {self.prompts_a_rollout} distinct problems"
            )
        return self


class GrpoStage(PolicyStage):
    """Train a model by reinforcement learning with rewards computed on groups of its completions (GRPO).

    A rollout has `prompts` x `mini_batches` problems with `group_size` completions each. The rollout is split into
    `mini_batches` optimiser steps and used `num_iterations` times.
    """

    kind: Literal["grpo"]
    rewards: list[RewardConfig] = Field(
        min_length=1,
        description="rewards, each with fn, weight and options; a completion's reward is their weighted sum",
    )
    objective: PlugConfig = Field(PlugConfig(fn="grpo"), description="policy-gradient objective (fn) and its options")
    group_size: int = Field(
        8,
        ge=2,
        description="number of completions for each problem, at least 2; rewards are compared within this group",
    )
    mini_batches: PositiveInt = Field(
        1, description="number of mini-batches, one optimiser step each, that a rollout is split into"
    )
    num_iterations: PositiveInt = Field(1, description="number of times that each rollout is trained on (mu in GRPO)")
    lr: float = Field(1e-6, gt=0, description="peak learning rate")
    warmup_ratio: float = Field(
        0.0, ge=0, lt=1, description="share of the steps in which the learning rate rises linearly from 0 to its peak"
    )
    min_lr_ratio: float = Field(
        1.0, ge=0, le=1, description="learning rate at the last step, as a share of lr; 1 = constant"
    )
    reference_every: PositiveInt | None = Field(
        None,
        description="copy the policy into the reference model every N optimiser steps; None = it stays the initial model",
    )
    max_failed_rewards: float = execution(0.1, ge=0, le=1, description=MAX_FAILED_REWARDS)
    reward_timeout: float = execution(60.0, gt=0, description=REWARD_TIMEOUT)

    @property
    def steps_a_rollout(self) -> int:
        return self.mini_batches * self.num_iterations

    @property
    def prompts_a_rollout(self) -> int:
        return self.prompts * self.mini_batches

    @pydantic.model_validator(mode="after")
    def _fits(self) -> GrpoStage:
        a_rollout = self.steps_a_rollout
        if self.ahead and self.objective.options.get("importance_cap", 0.0) is None:
            raise ValueError(
                "ahead: needs objective.importance_cap, the truncated importance weight that corrects for completions of older "
                "weights; remove importance_cap: null"
            )
        if self.steps is not None and self.steps % a_rollout:
            raise ValueError(
                f"steps {self.steps} is not a multiple of mini_batches x num_iterations = {a_rollout}, the number of "
                "optimiser steps for each rollout"
            )
        if self.reference_every is not None and self.reference_every % a_rollout:
            raise ValueError(
                f"reference_every {self.reference_every} is not a multiple of mini_batches x num_iterations = {a_rollout}"
            )
        if self.reference_every is not None and self.steps is not None and self.reference_every >= self.steps:
            raise ValueError(
                f"reference_every is {self.reference_every}, which never comes in {self.steps} steps; lower it, or remove it to keep the "
                "initial model as the reference"
            )
        if self.reference_every is not None and self.lora is not None:
            raise ValueError(
                "reference_every: not possible with lora, where the reference is the model without its adapter; remove one "
                "of the two keys"
            )
        if self.sampling.temperature != 1.0 or self.sampling.top_p != 1.0:
            raise ValueError(
                "sampling: temperature and top_p must be 1: the engine returns log-probabilities of the unchanged "
                "distribution, so sampling from another one would make every importance ratio wrong"
            )
        return self

    def inputs(self) -> Iterator[Input]:
        yield Input("model", self.model)
        yield Input("task", self.task)
        if self.budget is not None:
            yield Input("budget", self.budget.flops_of)


class OnPolicyStage(PolicyStage):
    """On-policy distillation: the student samples completions and learns the teacher's distribution at every token.

    The teacher runs in the trainer, with its whole vocabulary, or in an engine of its own (scoring: engine), with its
    most likely tokens and the mass of the rest. `offline_share` is the share of stored traces from `data` in every step.
    """

    kind: Literal["on_policy"]
    teacher: str | dict[str, float] = Field(description="teacher model, or several as {name: share} of a mixture")
    loss: PlugConfig = Field(PlugConfig(fn="reverse_kl"), description="loss function (fn) and its options")
    temperature: float = Field(
        1.0,
        gt=0,
        description="softmax temperature of teacher and student in the loss; other than 1 only with scoring: trainer",
    )
    scoring: Literal["trainer", "engine"] = Field(
        "trainer",
        description="where the teacher runs: in the trainer (whole vocabulary), or in an engine of its own (top_logprobs tokens and the mass of the rest)",
    )
    top_logprobs: PositiveInt = Field(
        64,
        description="with scoring: engine, the maximum number of tokens per position that the teacher's engine returns",
    )
    mass: float = Field(
        0.98,
        gt=0,
        le=1,
        description="with scoring: engine, use no more of these tokens once they have this probability in total",
    )
    data: str | None = Field(
        None, description="stored traces to mix with the student's own completions; needs offline_share"
    )
    offline_share: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of traces that come from `data`, over the steps; the student writes the others, in every step some",
    )
    group_size: int = Field(4, ge=1, description="number of completions for each problem")
    lr: float = Field(1e-5, gt=0, description="peak learning rate")

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> OnPolicyStage:
        if (self.data is None) != (self.offline_share == 0):
            raise ValueError("data and offline_share need each other: set both, or neither")
        if self.prompts * (1 - Fraction(str(self.offline_share))) < 1:
            raise ValueError(
                f"offline_share: {self.offline_share} of {self.prompts} prompts leaves less than one in a step to the student itself; "
                f"set prompts to {math.ceil(1 / (1 - Fraction(str(self.offline_share))))} or more, or a smaller share"
            )
        if self.scoring == "engine":
            if not isinstance(self.teacher, str):
                raise ValueError("scoring: engine supports one teacher; use scoring: trainer to mix several")
            if self.temperature != 1.0:
                raise ValueError(
                    "temperature: must be 1 with scoring: engine: the mass of the tokens that the engine does not return is "
                    "known only at temperature 1. Use scoring: trainer for another temperature"
                )
        if self.loss.fn == "policy_gradient" and (self.sampling.temperature != 1.0 or self.sampling.top_p != 1.0):
            raise ValueError("sampling: temperature and top_p must be 1 for loss policy_gradient")
        if self.loss.fn == "policy_gradient" and (self.scoring != "engine" or self.offline_share):
            raise ValueError("loss policy_gradient needs scoring: engine and no offline_share")
        return self

    def inputs(self) -> Iterator[Input]:
        yield Input("model", self.model)
        for teacher in teachers_of(self.teacher):
            yield Input("teacher", teacher)
        yield Input("task", self.task)
        if self.data is not None:
            yield Input("data", self.data)
        if self.budget is not None:
            yield Input("budget", self.budget.flops_of)
