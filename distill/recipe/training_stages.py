"""The stage kinds that train a model: on stored traces, by rewards, or on a teacher's distributions (on-policy)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import pydantic
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from distill.recipe.fields import (
    AUTO_DTYPE,
    ONE_PROCESS,
    BudgetConfig,
    DistributedConfig,
    Dtype,
    HiddenConfig,
    LoraConfig,
    PlugConfig,
    RowsConfig,
    SavedDtype,
    WeightsConfig,
    execution,
    growth,
)
from distill.recipe.stage import Input, StageConfig

MAX_FAILED_REWARDS = "the stage stops when a reward fails on a larger share of the groups than this"
REWARD_TIMEOUT = "time limit in seconds for one reward of one group of completions"


class OptimStage(StageConfig):
    """The fields of every stage with an optimiser. The learning rate warms up and then falls by half a cosine."""

    writes: ClassVar = "model"
    trains: ClassVar = True

    lr: float = Field(1e-4, gt=0, description="peak learning rate")
    warmup_ratio: float = Field(
        0.03, ge=0, lt=1, description="share of the steps in which the learning rate rises linearly from 0 to its peak"
    )
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="learning rate at the last step, as a share of lr")
    weight_decay: float = Field(0.0, ge=0, description="weight decay of AdamW")
    betas: tuple[float, float] = Field((0.9, 0.95), description="betas of AdamW")
    max_grad_norm: float = Field(
        1.0, gt=0, description="gradients with a larger global norm are scaled down to this norm"
    )
    dtype: Dtype = Field("auto", description=f"dtype of the computation; {AUTO_DTYPE}")
    save_dtype: SavedDtype | None = Field(
        None,
        description="dtype of the saved weights; None = the same as dtype, or bfloat16 if dtype is auto",
    )
    lora: LoraConfig | None = Field(
        None, description="train a LoRA adapter, which is merged at the end; None = train all weights"
    )
    micro_tokens: PositiveInt = execution(
        2048, description="number of tokens packed into one forward pass (a micro-batch); lower it to use less memory"
    )
    gradient_checkpointing: bool = execution(
        False, description="recompute activations in the backward pass: less memory, about a third slower"
    )
    liger: bool = execution(False, description="use liger-kernel's kernels in the decoder layers, on a GPU")
    budget: BudgetConfig | None = Field(
        None,
        description="train until as many FLOPs are spent as another stage's student used; replaces a number of steps",
    )
    snapshot_every: PositiveInt | None = execution(
        None,
        description="save a snapshot of the model every N optimiser steps, to plot accuracy against cost; None = no snapshots",
    )
    checkpoint_every: PositiveInt = execution(
        50, description="write a checkpoint, from which an interrupted stage resumes, every N optimiser steps"
    )
    keep_checkpoints: NonNegativeInt = execution(
        2,
        description="number of newest checkpoints to keep; older ones are deleted; once the model is saved, the last one is kept to train "
        "on from; 0 = none then, which saves three times the model's size in float32 a stage",
    )
    checkpoint_minutes: float | None = execution(
        None,
        gt=0,
        description="also write a checkpoint when the newest one is this many minutes old; None = by steps only",
    )
    async_checkpoints: bool | None = execution(
        None,
        description="copy a checkpoint to main memory and write it while training goes on; None = on a GPU",
    )
    metric_for_best_model: str | None = execution(
        None,
        description="metric of metrics.jsonl by which the best checkpoint is kept besides the newest, compared as its mean since "
        "the checkpoint before; None = the newest only",
    )
    greater_is_better: bool | None = execution(
        None,
        description="whether a larger metric_for_best_model is better; None = unless its name ends in loss, nll or kl",
    )
    load_best_model_at_end: bool = Field(
        False,
        description="save the model of the best checkpoint instead of the last step's; needs metric_for_best_model",
    )
    distributed: DistributedConfig | None = execution(
        None,
        description="processes, nodes and sharding of this stage; None = the recipe's `distributed`, or one process",
    )
    log_every: PositiveInt = execution(1, description="write a line to metrics.jsonl every N optimiser steps")
    trackers: list[str] = execution(
        [], description="experiment trackers, by accelerate's names: tensorboard, wandb, trackio, ..."
    )
    max_bad_steps: PositiveInt = execution(
        5, description="number of consecutive steps with a non-finite loss or gradient after which the stage stops"
    )

    def half_the_work(self, stage: str) -> str:
        if self.budget is not None:
            return f"half the budget of {stage} (now {self.budget.times:g} times)"
        return ""

    @property
    def saved_in(self) -> SavedDtype:
        """The dtype of the weights that the stage writes."""
        return self.save_dtype or ("bfloat16" if self.dtype == "auto" else self.dtype)

    @property
    def parallel(self) -> DistributedConfig:
        """The processes of the stage."""
        return self.distributed or ONE_PROCESS

    @pydantic.model_validator(mode="after")
    def _best(self) -> OptimStage:
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            raise ValueError("load_best_model_at_end needs metric_for_best_model")
        return self

    @pydantic.model_validator(mode="after")
    def _quantised_in_one_piece(self) -> OptimStage:
        if self.lora is not None and self.lora.quantised and self.parallel.strategy == "fsdp2":
            raise ValueError(
                "lora.quantised: a quantised base cannot be sharded; use strategy: ddp, where every process holds all of it, or "
                "remove quantised"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _whole_points(self) -> OptimStage:
        if self.snapshot_every is not None and self.lora is not None and self.lora.quantised:
            raise ValueError(
                "snapshot_every: no snapshot can be saved while lora.quantised is set; remove one of the two keys"
            )
        return self


class TrainStage(OptimStage, RowsConfig):
    """Train a model on traces (a generate or filter stage, a folder of shards) or on conversations.

    Conversations come from a file, a folder or a hub data set, in any layout that `distill ls layouts` lists; the assistant's
    turns are learned, other turns are not.
    """

    kind: Literal["train"]
    model: str = Field(description="model to train")
    data: str | dict[str, PositiveFloat] = Field(
        description="traces (a stage or a folder), or conversations (a file, a folder, a hub data set owner/name[@revision]); "
        "several scored copies of the same traces as {name: share}"
    )
    task: str | None = Field(
        None, description="task whose template renders rows of text; None = the tokenizer's chat template only"
    )
    turns: Literal["last", "all"] = Field(
        "last", description="which of the assistant's turns in a conversation are learned: the last one, or all"
    )
    loss: PlugConfig = Field(PlugConfig(fn="forward_kl"), description="loss function (fn) and its options")
    teacher: str | dict[str, float] | None = Field(
        None,
        description="teacher model that runs during training, or several as {name: share}; None = use the stored distributions",
    )
    temperature: float = Field(
        1.0,
        gt=0,
        description="softmax temperature of teacher and student in the loss; other than 1 only with a teacher",
    )
    weights: WeightsConfig | None = Field(
        None,
        description="learn only a share of each completion's tokens, those that a function scores highest (`distill ls weights`); "
        "None = all tokens",
    )
    hidden: HiddenConfig | None = Field(
        None,
        description="also match the hidden states of the teacher in the trainer, for a student made by prune stages; None = do not",
    )
    epochs: PositiveInt | None = growth(None, description="number of passes over the data")
    steps: PositiveInt | None = growth(None, description="number of optimiser steps")
    batch_traces: PositiveInt = Field(64, description="number of traces in one optimiser step, over all processes")
    max_traces: PositiveInt | None = Field(
        None,
        description="learn from this many of the traces, chosen at random by the stage's seed; a larger number includes the traces of a "
        "smaller one. None = all",
    )
    max_tokens: PositiveInt = Field(
        4096,
        description="maximum number of tokens in prompt and completion together; longer traces are left out and counted",
    )
    normalise: Literal["token", "sequence"] = Field(
        "token", description="what has equal weight in the loss: every token (token), or every trace (sequence)"
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
        if self.hidden is not None and len(teachers_of(self.teacher)) != 1:
            raise ValueError(
                "hidden: hidden states are those of one teacher in the trainer; set teacher to the model that the student was "
                "pruned from, or remove hidden"
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


def teachers_of(teacher: str | dict[str, float] | None) -> dict[str, float]:
    """Return the teachers in the trainer and their shares."""
    if teacher is None:
        return {}
    return {teacher: 1.0} if isinstance(teacher, str) else teacher


def data_of(data: str | dict[str, float]) -> dict[str, float]:
    """Return the trace sets (or a file) and their shares."""
    return {data: 1.0} if isinstance(data, str) else data
