"""Config classes of the stage kinds that do not train."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal

import pydantic
from pydantic import Field, PositiveInt

from distill import plug
from distill.recipe.engine import EngineConfig
from distill.recipe.fields import (
    Name,
    PlugConfig,
    RewardConfig,
    RowsConfig,
    SamplingConfig,
    copy_name,
    execution,
    growth,
)
from distill.recipe.policy_stages import GrpoStage, OnPolicyStage
from distill.recipe.stage import Input, StageConfig
from distill.recipe.training_stages import (
    MAX_FAILED_REWARDS,
    REWARD_TIMEOUT,
    TrainStage,
)
from distill.records import UserError

SNAPSHOTS = "number of held-out problems on which each snapshot of the training (snapshot_every) is evaluated; 0 = none"


class PruneStage(StageConfig):
    """Remove decoder layers: keep `layers` of them, evenly spaced, with the first and the last."""

    writes: ClassVar = "model"
    kind: Literal["prune"]
    model: str = Field(description="model to prune")
    layers: int = Field(ge=2, description="number of decoder layers to keep")

    def inputs(self) -> Iterator[Input]:
        yield Input("model", self.model)


class GenerateStage(StageConfig):
    """Sample completions of a task's train problems and store them, with the distribution at every position, as Parquet."""

    writes: ClassVar = "traces"
    kind: Literal["generate"]
    model: str = Field(description="teacher model that generates the traces")
    task: str = Field(description="task whose train problems are used")
    problems: PositiveInt = growth(description="number of problems")
    samples: PositiveInt = growth(1, description="number of completions for each problem")
    sampling: SamplingConfig = Field(SamplingConfig(), description="how completions are sampled")
    top_logprobs: int = Field(
        64,
        ge=0,
        description="maximum number of tokens per position whose log-probability is stored; 0 = only text and token ids",
    )
    mass: float = Field(
        0.98,
        gt=0,
        le=1,
        description="stop storing tokens at a position once the stored ones have this probability in total",
    )
    exact: bool = Field(False, description="store log-probabilities as float32; false = rounded to steps of 1/32 nat")
    engine: EngineConfig = Field(EngineConfig(), description="engine that generates the completions")
    shard_rows: PositiveInt = execution(256, description="number of traces in one Parquet file (shard)")
    rewards: list[RewardConfig] = Field(
        [],
        description="rewards that are stored with each trace, and their weighted sum; empty = accuracy and the verdict's score",
    )
    max_failed_rewards: float = execution(0.1, ge=0, le=1, description=MAX_FAILED_REWARDS)
    reward_timeout: float = execution(60.0, gt=0, description=REWARD_TIMEOUT)

    def half_the_work(self, stage: str) -> str:
        return f"half the problems of {stage} (now {self.problems})"

    def inputs(self) -> Iterator[Input]:
        yield Input("model", self.model)
        yield Input("task", self.task)


class ScoreStage(StageConfig, RowsConfig):
    """Compute a model's distributions over existing traces by teacher forcing; no text is generated.

    Files, folders and hub data sets (owner/name, or owner/name@revision) hold conversations in any layout that
    `distill ls layouts` lists. Trace ids do not depend on the model, so several models may score the same traces.
    """

    writes: ClassVar = "traces"
    adds_to: ClassVar = frozenset({"data"})
    kind: Literal["score"]
    model: str = Field(description="teacher model that scores the traces")
    data: str = Field(
        description="traces: a stage or a folder of shards; or conversations: a file, a folder, a hub data set (owner/name[@revision])"
    )
    task: str | None = Field(
        None,
        description="task whose template renders the text, and whose judge compares completions with a row's `answer`",
    )
    max_tokens: PositiveInt | None = Field(
        None,
        description="maximum number of tokens in prompt and completion together; longer traces are left out and counted",
    )
    top_logprobs: PositiveInt = Field(
        64, description="maximum number of tokens per position whose log-probability is stored"
    )
    mass: float = Field(
        0.98,
        gt=0,
        le=1,
        description="stop storing tokens at a position once the stored ones have this probability in total",
    )
    exact: bool = Field(False, description="store log-probabilities as float32; false = rounded to steps of 1/32 nat")
    engine: EngineConfig = Field(EngineConfig(), description="engine that scores the traces")
    shard_rows: PositiveInt = execution(256, description="number of traces in one Parquet file (shard)")

    def inputs(self) -> Iterator[Input]:
        yield Input("model", self.model)
        yield Input("data", self.data)
        if self.task is not None:
            yield Input("task", self.task)


class FilterStage(StageConfig):
    """Select the traces that every filter keeps. The shards are not copied."""

    writes: ClassVar = "traces"
    kind: Literal["filter"]
    data: str = Field(description="traces to filter: a stage or a folder")
    keep: list[PlugConfig] = Field(min_length=1, description="filters; a trace is kept if every filter keeps it")

    def inputs(self) -> Iterator[Input]:
        yield Input("data", self.data)
        for number, keep in enumerate(self.keep):
            if isinstance(against := keep.options.get("against"), str):
                yield Input("questions", against, f"keep.{number}.against")


class EvalStage(StageConfig):
    """Measure the accuracy of one model on a task's held-out problems."""

    shares_process: ClassVar = True
    kind: Literal["eval"]
    model: str = Field(description="model to evaluate")
    task: str = Field(description="task whose held-out problems the model is evaluated on")
    problems: PositiveInt = growth(256, description="number of held-out problems")
    samples: PositiveInt = growth(1, description="number of completions for each problem")
    sampling: SamplingConfig = Field(SamplingConfig(), description="how completions are sampled")
    pass_at: list[PositiveInt] = Field(
        [1], description="values of k for pass@k and maj@k; the largest needs as many samples"
    )
    snapshot_problems: int = growth(0, ge=0, description=SNAPSHOTS)
    engine: EngineConfig = Field(EngineConfig(), description="engine that generates the completions")

    @pydantic.model_validator(mode="after")
    def _enough_samples(self) -> EvalStage:
        if max(self.pass_at, default=1) > self.samples:
            raise ValueError(
                f"pass_at {max(self.pass_at)} needs samples: {max(self.pass_at)} or more; samples is {self.samples}"
            )
        return self

    def half_the_work(self, stage: str) -> str:
        return f"half the problems of {stage} (now {self.problems})"

    def evaluations(self) -> dict[str, dict[int, tuple[str, str]]]:
        return {"": {0: ("", self.model)}}

    def held_out_problems(self, task: str) -> int | None:
        return self.problems if task == self.task else None

    def inputs(self) -> Iterator[Input]:
        yield Input("model", self.model)
        yield Input("task", self.task)


class CompareStage(StageConfig):
    """Measure the accuracy of several models on the same held-out problems, and their paired differences.

    The stage expands into one eval stage for each arm, `<stage>.<arm>`.
    """

    kind: Literal["compare"]
    arms: dict[Name, str | dict[int, str]] = growth(
        min_length=2,
        description="models to compare, by arm name: one model each, or one for each training seed, as {1: a, 2: b, 3: c}",
    )
    task: str = Field(description="task whose held-out problems all arms are evaluated on")
    problems: PositiveInt = growth(256, description="number of held-out problems")
    samples: PositiveInt = growth(1, description="number of completions for each problem")
    sampling: SamplingConfig = Field(SamplingConfig(), description="how completions are sampled")
    pass_at: list[PositiveInt] = Field(
        [1], description="values of k for pass@k and maj@k; the largest needs as many samples"
    )
    snapshot_problems: int = growth(0, ge=0, description=SNAPSHOTS)
    engine: EngineConfig = Field(EngineConfig(), description="engine that generates the completions")

    def evaluations(self) -> dict[str, dict[int, tuple[str, str]]]:
        """The evaluations by arm and training seed; an arm with a single model has the seed 0."""
        return {
            arm: {0: (arm, models)}
            if isinstance(models, str)
            else {seed: (f"{arm}@{seed}", model) for seed, model in models.items()}
            for arm, models in self.arms.items()
        }

    def children(self) -> dict[str, StageConfig]:
        """The eval stages of the arms, by name."""
        shared = {
            key: getattr(self, key)
            for key in ("task", "problems", "samples", "sampling", "pass_at", "snapshot_problems", "engine")
        }
        return {
            name: EvalStage(kind="eval", model=model, **shared)
            for runs in self.evaluations().values()
            for name, model in runs.values()
        }

    def half_the_work(self, stage: str) -> str:
        return f"half the problems of {stage} (now {self.problems})"

    def inputs(self) -> Iterator[Input]:
        for runs in self.evaluations().values():
            for child, model in runs.values():
                yield Input("model", model, f"arms.{child}")
        yield Input("task", self.task)

    def held_out_problems(self, task: str) -> int | None:
        return self.problems if task == self.task else None

    def with_copies(self, seeds: Mapping[str, list[int]], where: str) -> CompareStage:
        arms = {arm: _copies(models, seeds, f"{where}.arms.{arm}") for arm, models in self.arms.items()}
        return self.model_copy(update={"arms": arms})

    @pydantic.model_validator(mode="after")
    def _on_this_machine(self) -> CompareStage:
        if self.engine.is_served:
            raise ValueError(
                "engine.fn: the arms are different models, and an endpoint runs one of them; use an engine of this machine, and a "
                "stage of kind eval for the served model"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _not_copied(self) -> CompareStage:
        if self.seeds is not None:
            raise ValueError("a compare stage takes no seeds; put them on the stages that train the compared models")
        return self


def _copies(models: str | dict[int, str], seeds: Mapping[str, list[int]], here: str) -> str | dict[int, str]:
    """The models of an arm, by seed: all copies of its one model, or for each seed the copy of the model it names."""
    if isinstance(models, str):
        if models not in seeds:
            return models
        return {seed: copy_name(models, seed) for seed in seeds[models]}
    for seed, model in models.items():
        if model in seeds and seed not in seeds[model]:
            raise UserError(f"{here}: {model!r} is not trained with seed {seed}; its seeds are {seeds[model]}.")
    return {seed: copy_name(model, seed) if model in seeds else model for seed, model in models.items()}


KINDS: dict[str, type[StageConfig]] = {
    "prune": PruneStage,
    "generate": GenerateStage,
    "score": ScoreStage,
    "filter": FilterStage,
    "train": TrainStage,
    "grpo": GrpoStage,
    "on_policy": OnPolicyStage,
    "eval": EvalStage,
    "compare": CompareStage,
}


def kind_class(kind: object) -> type[StageConfig]:
    """The class of a stage kind, by name or as `package.module:Class`. Raises UserError if it is unknown."""
    if isinstance(kind, str) and ":" in kind:
        found = plug.find(kind, __name__)
        if not (isinstance(found, type) and issubclass(found, StageConfig)):
            raise UserError(f"{kind!r} is not a subclass of distill.recipe.StageConfig.")
        if not hasattr(found, "run"):
            raise UserError(f"{kind!r} has no method run(self, context).")
        return found
    if kind not in KINDS:
        raise UserError(f"there is no stage kind {kind!r}.{plug.nearest(str(kind), KINDS)}")
    return KINDS[str(kind)]
