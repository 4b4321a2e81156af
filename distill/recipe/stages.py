"""The stage kinds: what each may be told, one frozen class a kind."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

import pydantic
from pydantic import Field, PositiveInt

from distill.recipe.fields import (
    Dtype,
    EngineConfig,
    LoraConfig,
    Name,
    PlugConfig,
    RewardConfig,
    SamplingConfig,
    StageConfig,
    execution,
    growth,
)


class PruneStage(StageConfig):
    """Keep `layers` decoder layers, evenly spaced, the first and the last among them."""

    kind: Literal["prune"]
    model: str
    layers: int = Field(ge=2)

    def inputs(self) -> Iterator[tuple[str, str]]:
        yield "model", self.model


class GenerateStage(StageConfig):
    """Completions of a task's train problems with the distribution at every position, as Parquet shards."""

    kind: Literal["generate"]
    model: str
    task: str
    problems: PositiveInt = growth()
    samples: PositiveInt = growth(1)
    sampling: SamplingConfig = SamplingConfig()
    top_k: int = Field(
        64, ge=0, description="entries kept at a position at most; 0 = text and ids only"
    )
    mass: float = Field(
        0.98, gt=0, le=1, description="stop keeping entries once this much probability is covered"
    )
    exact: bool = Field(False, description="keep float32 log-probabilities, not steps of 1/32 nat")
    engine: EngineConfig = EngineConfig()
    shard_rows: PositiveInt = execution(256)

    def inputs(self) -> Iterator[tuple[str, str]]:
        yield "model", self.model
        yield "task", self.task


class ScoreStage(StageConfig):
    """This model's distributions over traces that exist, teacher-forced: a stage's, a folder's, a file's, a hub dataset's.

    A JSONL file, a folder that `datasets` saved and a hub dataset (owner/name) are in chat form: rows with
    `messages`, whose last is the assistant's. Trace ids do not depend on the model, so several models may score the
    same traces.
    """

    kind: Literal["score"]
    model: str
    data: str
    split: str = Field("train", description="of a `datasets` folder or hub dataset")
    subset: str | None = Field(None, description="of a hub dataset: its configuration")
    task: str | None = Field(
        None, description="its template renders text, its judge compares with a row's `answer`"
    )
    max_tokens: PositiveInt | None = Field(
        None, description="prompt and completion; longer traces are left out and counted"
    )
    top_k: PositiveInt = Field(64, description="entries kept at a position at most")
    mass: float = Field(
        0.98, gt=0, le=1, description="stop keeping entries once this much probability is covered"
    )
    exact: bool = Field(False, description="keep float32 log-probabilities, not steps of 1/32 nat")
    engine: EngineConfig = EngineConfig()
    shard_rows: PositiveInt = execution(256)

    def inputs(self) -> Iterator[tuple[str, str]]:
        yield "model", self.model
        yield "data", self.data
        if self.task is not None:
            yield "task", self.task


class FilterStage(StageConfig):
    """A selection of traces: those that every filter keeps. The shards themselves are not copied."""

    kind: Literal["filter"]
    data: str
    keep: list[PlugConfig] = Field(min_length=1)

    def inputs(self) -> Iterator[tuple[str, str]]:
        yield "data", self.data
        for number, keep in enumerate(self.keep):
            if isinstance(against := keep.options.get("against"), str):
                yield f"keep.{number}.against", against


class OptimStage(StageConfig):
    """What every stage with an optimiser has. The learning rate warms up and then falls by half a cosine."""

    lr: float = Field(1e-4, gt=0)
    warmup_ratio: float = Field(0.03, ge=0, lt=1)
    min_lr_ratio: float = Field(
        0.1, ge=0, le=1, description="where the cosine ends, as a share of lr"
    )
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: float = Field(1.0, gt=0)
    dtype: Dtype = "bfloat16"
    lora: LoraConfig | None = None
    micro_tokens: PositiveInt = execution(2048, description="tokens packed into one forward pass")
    gradient_checkpointing: bool = execution(False)
    checkpoint_every: PositiveInt = execution(50, description="optimiser steps")
    keep_checkpoints: PositiveInt = execution(2)
    log_every: PositiveInt = execution(1)
    trackers: list[str] = execution(
        [], description="accelerate trackers by name: tensorboard, wandb, trackio, ..."
    )
    max_bad_steps: PositiveInt = execution(
        5, description="steps in a row with a loss or gradient that is not finite"
    )


class TrainStage(OptimStage):
    """Train a model on traces (a generate or filter stage, a folder of shards) or on a JSONL file.

    JSONL rows are {"messages": [...]} whose last turn is learned, or {"question", "completion"}, which the
    `task`'s template renders.
    """

    kind: Literal["train"]
    model: str
    data: str
    task: str | None = None
    loss: PlugConfig = PlugConfig(fn="forward_kl")
    epochs: PositiveInt | None = growth(None)
    steps: PositiveInt | None = growth(None)
    batch_traces: PositiveInt = Field(
        64, description="traces an optimiser step, over all processes"
    )
    max_tokens: PositiveInt = Field(4096, description="longer traces are left out and counted")
    normalise: Literal["token", "sequence"] = Field(
        "token", description="what counts equally: every token, or every trace"
    )
    truncated: Literal["drop", "keep"] = Field(
        "drop", description="traces that ended at the token limit"
    )

    @pydantic.model_validator(mode="after")
    def _one_length(self) -> TrainStage:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("say either epochs or steps")
        return self

    def inputs(self) -> Iterator[tuple[str, str]]:
        yield "model", self.model
        yield "data", self.data
        if self.task is not None:
            yield "task", self.task


class GrpoStage(OptimStage):
    """Train a model by reinforcement learning: groups of completions a problem, rewarded by rules.

    A rollout is `prompts` x `mini_batches` problems with `group_size` completions each; it is learned from in
    `mini_batches` optimiser steps, `passes` times over. `steps` counts optimiser steps.
    """

    kind: Literal["grpo"]
    model: str
    task: str
    rewards: list[RewardConfig] = Field(min_length=1)
    objective: PlugConfig = PlugConfig(fn="grpo")
    steps: PositiveInt = growth()
    prompts: PositiveInt = Field(8, description="problems an optimiser step")
    group_size: int = Field(
        8, ge=2, description="completions a problem; an advantage needs at least two"
    )
    mini_batches: PositiveInt = Field(1, description="optimiser steps a rollout is split into")
    passes: PositiveInt = Field(1, description="times a rollout is learned from (mu)")
    problems: PositiveInt | None = Field(
        None, description="distinct train problems; None = a fresh one each time"
    )
    sampling: SamplingConfig = SamplingConfig()
    lr: float = Field(1e-6, gt=0)
    warmup_ratio: float = Field(0.0, ge=0, lt=1)
    min_lr_ratio: float = Field(1.0, ge=0, le=1, description="1 keeps the learning rate constant")
    reference_every: PositiveInt | None = Field(
        None, description="optimiser steps after which the reference becomes the policy of then"
    )
    engine: EngineConfig = EngineConfig()
    max_failed_rewards: float = execution(
        0.1, ge=0, le=1, description="share of groups a reward may fail on before the stage stops"
    )
    reward_seconds: float = execution(60.0, gt=0, description="limit for one reward of one group")
    samples_every: PositiveInt = execution(
        10, description="rollouts between completions shown in the log and kept in samples.jsonl"
    )

    @pydantic.model_validator(mode="after")
    def _fits(self) -> GrpoStage:
        a_rollout = self.mini_batches * self.passes
        if self.steps % a_rollout:
            raise ValueError(
                f"steps {self.steps} is not a multiple of mini_batches x passes = {a_rollout}: a rollout is that many "
                "optimiser steps"
            )
        if self.reference_every is not None and self.reference_every % a_rollout:
            raise ValueError(
                f"reference_every {self.reference_every} is not a multiple of mini_batches x passes = {a_rollout}"
            )
        if self.reference_every is not None and self.lora is not None:
            raise ValueError(
                "reference_every needs a reference of its own; with lora it is the model without its adapter"
            )
        if self.sampling.temperature != 1.0 or self.sampling.top_p != 1.0:
            raise ValueError(
                "sampling: temperature and top_p must be 1: the engine's log-probabilities are of that distribution, and "
                "another one would make every importance ratio wrong"
            )
        if self.problems is not None and self.problems < self.prompts * self.mini_batches:
            raise ValueError(
                f"problems {self.problems} is less than one rollout takes ({self.prompts * self.mini_batches})"
            )
        return self

    def inputs(self) -> Iterator[tuple[str, str]]:
        yield "model", self.model
        yield "task", self.task


class EvalStage(StageConfig):
    """Held-out accuracy of one model on one task."""

    kind: Literal["eval"]
    model: str
    task: str
    problems: PositiveInt = growth(256)
    samples: PositiveInt = growth(1)
    sampling: SamplingConfig = SamplingConfig()
    pass_at: list[PositiveInt] = [1]
    engine: EngineConfig = EngineConfig()

    @pydantic.model_validator(mode="after")
    def _enough_samples(self) -> EvalStage:
        if max(self.pass_at, default=1) > self.samples:
            raise ValueError(
                f"pass_at {max(self.pass_at)} needs at least as many samples a problem, not {self.samples}"
            )
        return self

    def inputs(self) -> Iterator[tuple[str, str]]:
        yield "model", self.model
        yield "task", self.task


class CompareStage(StageConfig):
    """Held-out accuracy of several models on the same problems, and their paired differences.

    Expands into one eval stage an arm, `<stage>.<arm>`, each in a process of its own.
    """

    kind: Literal["compare"]
    arms: dict[Name, str] = Field(min_length=2)
    task: str
    problems: PositiveInt = growth(256)
    samples: PositiveInt = growth(1)
    sampling: SamplingConfig = SamplingConfig()
    pass_at: list[PositiveInt] = [1]
    engine: EngineConfig = EngineConfig()

    def children(self) -> dict[str, EvalStage]:
        """The eval stage of each arm."""
        shared = {
            key: getattr(self, key)
            for key in ("task", "problems", "samples", "sampling", "pass_at", "engine")
        }
        return {
            arm: EvalStage(kind="eval", model=model, **shared) for arm, model in self.arms.items()
        }

    def inputs(self) -> Iterator[tuple[str, str]]:
        for arm, model in self.arms.items():
            yield f"arms.{arm}", model
        yield "task", self.task


Stage = Annotated[
    PruneStage
    | GenerateStage
    | ScoreStage
    | FilterStage
    | TrainStage
    | GrpoStage
    | EvalStage
    | CompareStage,
    Field(discriminator="kind"),
]
KINDS: dict[str, type[StageConfig]] = {
    "prune": PruneStage,
    "generate": GenerateStage,
    "score": ScoreStage,
    "filter": FilterStage,
    "train": TrainStage,
    "grpo": GrpoStage,
    "eval": EvalStage,
    "compare": CompareStage,
}
