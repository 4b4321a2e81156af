"""The stage kinds that train a model: on stored traces, by rewards, or on a teacher's distributions (on-policy)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import pydantic
from pydantic import Field, PositiveFloat, PositiveInt

from distill.recipe.fields import (
    AUTO_DTYPE,
    BudgetConfig,
    Dtype,
    EngineConfig,
    Input,
    LoraConfig,
    PlugConfig,
    RewardConfig,
    SamplingConfig,
    SavedDtype,
    StageConfig,
    execution,
    growth,
)

MAX_FAILED_REWARDS = "the stage stops when a reward fails on a larger share of the groups than this"
REWARD_TIMEOUT = "time limit in seconds for computing one reward of one group of completions"
PEAK_LR = "peak learning rate"
GROUP_SIZE = "number of completions for each problem"


class OptimStage(StageConfig):
    """Fields of every stage that trains a model. The learning rate warms up linearly, then falls along half a cosine."""

    writes: ClassVar = "model"
    trains: ClassVar = True

    lr: float = Field(1e-4, gt=0, description=PEAK_LR)
    warmup_ratio: float = Field(
        0.03, ge=0, lt=1, description="share of the steps in which the learning rate rises from 0 to its peak"
    )
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="learning rate at the last step, as a share of lr")
    weight_decay: float = Field(0.0, ge=0, description="weight decay of AdamW")
    betas: tuple[float, float] = Field((0.9, 0.95), description="betas of AdamW")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients with a larger norm are scaled down to this norm")
    dtype: Dtype = Field("auto", description=f"dtype of the computation; {AUTO_DTYPE}")
    save_dtype: SavedDtype | None = Field(
        None,
        description="dtype of the saved weights; None = the same as dtype, or bfloat16 if dtype is auto",
    )
    lora: LoraConfig | None = Field(
        None, description="train a LoRA adapter and merge it into the model at the end; None = train all weights"
    )
    micro_tokens: PositiveInt = execution(
        2048, description="maximum number of tokens packed into one forward pass; lower it to use less memory"
    )
    gradient_checkpointing: bool = execution(
        False, description="recompute activations in the backward pass: less memory, about a third slower"
    )
    liger: bool = execution(
        False, description="use liger-kernel's kernels in the decoder layers, on a GPU; the output head is not affected"
    )
    budget: BudgetConfig | None = Field(
        None,
        description="train until as many FLOPs are spent as the student of another stage used, generated completions included; replaces steps and epochs",
    )
    snapshot_every: PositiveInt | None = execution(
        None,
        description="save a snapshot of the model every N optimiser steps, to plot accuracy against cost; None = no snapshots",
    )
    checkpoint_every: PositiveInt = execution(
        50, description="write a checkpoint, from which an interrupted stage resumes, every N optimiser steps"
    )
    keep_checkpoints: PositiveInt = execution(
        2, description="number of newest checkpoints to keep; older ones are deleted"
    )
    log_every: PositiveInt = execution(1, description="write a line to metrics.jsonl every N optimiser steps")
    trackers: list[str] = execution(
        [], description="experiment trackers, by accelerate's names: tensorboard, wandb, trackio, ..."
    )
    max_bad_steps: PositiveInt = execution(
        5, description="the stage stops after this many steps in a row whose loss or gradient is not finite"
    )

    def half_the_work(self, stage: str) -> str:
        if self.budget is not None:
            return f"half the budget of {stage} (now {self.budget.times:g} times)"
        return ""

    @property
    def saved_in(self) -> SavedDtype:
        """The dtype of the weights that the stage writes."""
        return self.save_dtype or ("bfloat16" if self.dtype == "auto" else self.dtype)

    @pydantic.model_validator(mode="after")
    def _whole_points(self) -> OptimStage:
        if self.snapshot_every is not None and self.lora is not None and self.lora.quantised:
            raise ValueError(
                "snapshot_every: no snapshot can be saved while lora.quantised is set; remove one of the two keys"
            )
        return self


class TrainStage(OptimStage):
    """Train a model on stored traces (of a generate, score or filter stage, or a folder of shards) or on a JSONL file.

    Rows of a JSONL file are {"messages": [...]}, whose last message is learned, or {"question", "completion"}, which the
    template of `task` renders.
    """

    kind: Literal["train"]
    model: str = Field(description="model to train")
    data: str | dict[str, PositiveFloat] = Field(
        description="stage, folder or JSONL file with the traces; or a mapping of stages or folders, in which several teachers scored the same traces, to their shares"
    )
    task: str | None = Field(
        None, description="task whose template renders the rows of a JSONL file; None = the rows are used as they are"
    )
    loss: PlugConfig = Field(PlugConfig(fn="forward_kl"), description="loss function (fn) and its options")
    teacher: str | dict[str, float] | None = Field(
        None,
        description="teacher model run during training, or a mapping of several to their shares; None = use the stored distributions",
    )
    temperature: float = Field(
        1.0,
        gt=0,
        description="softmax temperature of teacher and student in the loss; other than 1 only with a teacher",
    )
    epochs: PositiveInt | None = growth(None, description="number of passes over the data")
    steps: PositiveInt | None = growth(None, description="number of optimiser steps")
    batch_traces: PositiveInt = Field(64, description="number of traces in one optimiser step, over all processes")
    max_tokens: PositiveInt = Field(
        4096, description="maximum number of tokens in prompt and completion; longer traces are skipped and counted"
    )
    normalise: Literal["token", "sequence"] = Field(
        "token", description="average the loss over all tokens (token), or within each trace first (sequence)"
    )
    keep_truncated: bool = Field(
        False, description="also train on traces whose completion was cut off at the token limit"
    )

    @pydantic.model_validator(mode="after")
    def _one_length(self) -> TrainStage:
        if sum(length is not None for length in (self.epochs, self.steps, self.budget)) != 1:
            raise ValueError("set exactly one of epochs, steps and budget")
        if isinstance(self.data, dict) and not self.data:
            raise ValueError("data: names no set of traces")
        if isinstance(self.data, dict) and self.teacher is not None:
            raise ValueError(
                "data: several sets of traces are mixed by their stored distributions, which are not used with `teacher`. "
                "Name one set, or remove teacher"
            )
        if self.temperature != 1.0 and self.teacher is None:
            raise ValueError(
                "temperature: must be 1 with stored distributions: the mass of the tokens that were not stored is known only "
                "at temperature 1. To use another temperature, set teacher: a model that runs during training"
            )
        return self

    def half_the_work(self, stage: str) -> str:
        key = "steps" if self.epochs is None else "epochs"
        return super().half_the_work(stage) or f"half the {key} of {stage} (now {getattr(self, key)})"

    def inputs(self) -> Iterator[Input]:
        yield Input("model", self.model)
        for teacher in teachers_of(self.teacher):
            yield Input("teacher", teacher)
        for data in data_of(self.data):
            yield Input("data", data)
        if self.task is not None:
            yield Input("task", self.task)
        if self.budget is not None:
            yield Input("budget", self.budget.flops_of)


class PolicyStage(OptimStage):
    """Fields of every stage that trains a model on its own completions. `steps` counts optimiser steps."""

    model: str = Field(description="model to train")
    task: str = Field(description="task whose train problems are the prompts")
    steps: PositiveInt | None = growth(None, description="number of optimiser steps")
    prompts: PositiveInt = Field(8, description="number of problems in one optimiser step")
    group_size: int = Field(8, ge=1, description=GROUP_SIZE)
    problems: PositiveInt | None = Field(
        None, description="number of distinct train problems, repeated in turn; None = new problems in every rollout"
    )
    sampling: SamplingConfig = Field(SamplingConfig(), description="how completions are sampled")
    engine: EngineConfig = Field(EngineConfig(), description="engine that writes the completions")
    log_completions_every: PositiveInt = execution(
        10, description="write some completions to the log and to completions.jsonl every N rollouts"
    )

    def half_the_work(self, stage: str) -> str:
        steps = f"half the steps ({self.steps}), prompts or group_size ({self.group_size}) of {stage}"
        return super().half_the_work(stage) or steps

    @property
    def steps_a_rollout(self) -> int:
        """Number of optimiser steps for each rollout."""
        return 1

    @property
    def prompts_a_rollout(self) -> int:
        """Number of problems in a rollout."""
        return self.prompts

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
        description="rewards, each fn, its weight and its options; a completion's reward is their weighted sum",
    )
    objective: PlugConfig = Field(PlugConfig(fn="grpo"), description="policy-gradient objective (fn) and its options")
    group_size: int = Field(8, ge=2, description=f"{GROUP_SIZE}, at least 2; rewards are compared within this group")
    mini_batches: PositiveInt = Field(1, description="number of optimiser steps that a rollout is split into")
    num_iterations: PositiveInt = Field(1, description="number of times that each rollout is trained on (mu in GRPO)")
    lr: float = Field(1e-6, gt=0, description=PEAK_LR)
    warmup_ratio: float = Field(
        0.0, ge=0, lt=1, description="share of the steps in which the learning rate rises from 0 to its peak"
    )
    min_lr_ratio: float = Field(
        1.0, ge=0, le=1, description="learning rate at the last step, as a share of lr; 1 = constant learning rate"
    )
    reference_every: PositiveInt | None = Field(
        None,
        description="copy the policy into the reference model every N optimiser steps; None = the reference stays the initial model",
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
        if self.steps is not None and self.steps % a_rollout:
            raise ValueError(
                f"steps {self.steps} is not a multiple of mini_batches x num_iterations = {a_rollout}, the number of "
                "optimiser steps for each rollout"
            )
        if self.reference_every is not None and self.reference_every % a_rollout:
            raise ValueError(
                f"reference_every {self.reference_every} is not a multiple of mini_batches x num_iterations = {a_rollout}"
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
    """On-policy distillation: the student writes completions and learns the teacher's distribution at each token of them.

    The teacher runs in the trainer, with its whole vocabulary, or in an engine of its own (scoring: engine), with its
    most likely tokens and the mass of the rest. `offline_share` is the share of stored traces in every step.
    """

    kind: Literal["on_policy"]
    teacher: str | dict[str, float] = Field(
        description="teacher model, or a mapping of several to their shares of the mixture"
    )
    loss: PlugConfig = Field(PlugConfig(fn="reverse_kl"), description="loss function (fn) and its options")
    temperature: float = Field(
        1.0, gt=0, description="softmax temperature of teacher and student in the loss; must be 1 with scoring: engine"
    )
    scoring: Literal["trainer", "engine"] = Field(
        "trainer",
        description="where the teacher runs: in the trainer (whole vocabulary), or in an engine of its own (top_logprobs tokens and the mass of the rest)",
    )
    top_logprobs: PositiveInt = Field(
        64,
        description="maximum number of tokens per position that the teacher's engine returns; only with scoring: engine",
    )
    mass: float = Field(
        0.98,
        gt=0,
        le=1,
        description="use no more of these tokens once they have this probability in total; only with scoring: engine",
    )
    data: str | None = Field(None, description="stage or folder with stored traces to mix in; needs offline_share")
    offline_share: float = Field(
        0.0, ge=0, lt=1, description="share of traces from data in every step; the others are written by the student"
    )
    group_size: int = Field(4, ge=1, description=GROUP_SIZE)
    lr: float = Field(1e-5, gt=0, description=PEAK_LR)

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> OnPolicyStage:
        if (self.data is None) != (self.offline_share == 0):
            raise ValueError("data and offline_share need each other: set both, or neither")
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


def teachers_of(teacher: str | dict[str, float] | None) -> dict[str, float]:
    """The shares of the teachers that run in the trainer, by model."""
    if teacher is None:
        return {}
    return {teacher: 1.0} if isinstance(teacher, str) else teacher


def data_of(data: str | dict[str, float]) -> dict[str, float]:
    """The shares of the sets of traces (or of the one file), by name."""
    return {data: 1.0} if isinstance(data, str) else data
