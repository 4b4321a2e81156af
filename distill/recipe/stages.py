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
    WeightsConfig,
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
from distill.records import Split, UserError
from distill.tail_draws import MAX_DRAWS

SNAPSHOTS = "number of held-out problems on which each snapshot of the training (snapshot_every) is evaluated; 0 = none"

POSITIONS = 400

CAPTURED_WEIGHTS = (
    "store the distribution only at a share of each completion's tokens, those that a function scores highest (`distill ls "
    "weights`); of the others the id and its log-probability. None = at all tokens"
)


class PruneStage(StageConfig):
    """Make a smaller model: keep `layers` of the decoder layers, or cut the width (`hidden`, `ffn`, `heads`), or both.

    `by` says which layers are kept. Widths are ranked by activations. `repair` then fits the matrices before each gap, or of
    every layer whose width was cut, to the hidden states of the whole model. All but even spacing read `positions` positions
    of the traces in `data`.
    """

    writes: ClassVar = "model"
    kind: Literal["prune"]
    model: str = Field(description="model to prune")
    layers: int | None = Field(None, ge=2, description="number of decoder layers to keep; None = all")
    by: Literal["even", "block_influence", "importance"] = Field(
        "even",
        description="which layers are kept: even = evenly spaced, with the first and the last; block_influence = those that change "
        "the hidden state's direction most; importance = remove one at a time, each the one whose removal raises the KL to the "
        "stored distributions of `data` least",
    )
    hidden: PositiveInt | None = Field(
        None, description="hidden size (channels of the residual stream); None = as it is"
    )
    ffn: PositiveInt | None = Field(None, description="width of each layer's MLP; None = as it is")
    heads: PositiveInt | None = Field(
        None,
        description="number of attention heads in each layer; whole groups that share a key-value head are kept; None = as it is",
    )
    data: str | None = Field(
        None,
        description="traces that layers and widths are judged on: a stage or a folder of shards; by: importance needs their "
        "distributions, all else their tokens alone",
    )
    positions: int = Field(
        POSITIONS,
        ge=64,
        description="number of completion tokens of `data` that are read, at most an eighth of them from one trace",
    )
    repair: bool = Field(
        False,
        description="fit the output matrices before each gap, or of every layer if widths are cut, to the whole model's hidden states "
        "(ridge regression; a quarter of the traces chooses its strength)",
    )

    @property
    def narrows(self) -> bool:
        """Whether a width is cut."""
        return (self.hidden, self.ffn, self.heads) != (None, None, None)

    @property
    def measures(self) -> bool:
        """Whether the model is run on `data`."""
        return self.by != "even" or self.narrows or self.repair

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> PruneStage:
        if self.layers is None and not self.narrows:
            raise ValueError("nothing to prune: set layers, or a width (hidden, ffn, heads)")
        if self.layers is None and self.by != "even":
            raise ValueError(f"by: {self.by} chooses layers, but all are kept; set layers, or remove by")
        if self.measures and self.data is None:
            key = f"by: {self.by}" if self.by != "even" else "repair" if self.repair else "cutting a width"
            raise ValueError(f"{key} needs data: a stage of traces, or a folder of shards")
        if not self.measures and self.data is not None:
            raise ValueError(
                "data: evenly spaced layers are chosen without it; set by: importance or repair: true, or remove data"
            )
        # A recipe that was written with all its defaults is read too.
        if not self.measures and self.positions != POSITIONS:
            raise ValueError("positions: evenly spaced layers are chosen without traces; remove positions")
        return self

    def inputs(self) -> Iterator[Input]:
        yield Input("model", self.model)
        if self.data is not None:
            yield Input("data", self.data)


class GenerateStage(StageConfig):
    """Sample completions of a task's train problems and store them, with the distribution at every position, as Parquet.

    Traces of held-out problems (`split: held_out`) are for measurements; a stage that trains refuses them.
    """

    writes: ClassVar = "traces"
    kind: Literal["generate"]
    model: str = Field(description="teacher model that generates the traces")
    task: str = Field(description="task whose problems are used")
    split: Split = Field(
        "train",
        description="problems to use: those to train on (train), or those that evaluations use (held_out), to measure students on",
    )
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
    tail_draws: int = Field(
        0,
        ge=0,
        le=MAX_DRAWS,
        description="tokens per position that are drawn from the tail, the tokens that are not stored, by their probabilities, for "
        "forward_kl's unbiased tail: draws; fewer where the tail has less than 0.01; 0 = none",
    )
    exact: bool = Field(False, description="store log-probabilities as float32; false = rounded to steps of 1/32 nat")
    weights: WeightsConfig | None = Field(None, description=CAPTURED_WEIGHTS)
    engine: EngineConfig = Field(EngineConfig(), description="engine that generates the completions")
    shard_rows: PositiveInt = execution(256, description="number of traces in one Parquet file (shard)")
    rewards: list[RewardConfig] = Field(
        [],
        description="rewards that are stored with each trace, and their weighted sum; empty = accuracy and the verdict's score",
    )
    max_failed_rewards: float = execution(0.1, ge=0, le=1, description=MAX_FAILED_REWARDS)
    reward_timeout: float = execution(60.0, gt=0, description=REWARD_TIMEOUT)

    @pydantic.model_validator(mode="after")
    def _captures(self) -> GenerateStage:
        _check_draws(self.tail_draws, self.top_logprobs, self.engine)
        _check_weights(self.weights, self.top_logprobs, self.tail_draws)
        return self

    def half_the_work(self, stage: str) -> str:
        return f"half the problems of {stage} (now {self.problems})"

    def held_out_problems(self, task: str) -> int | None:
        return self.problems if task == self.task and self.split == "held_out" else None

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
    tail_draws: int = Field(
        0,
        ge=0,
        le=MAX_DRAWS,
        description="tokens per position that are drawn from the tail, the tokens that are not stored, by their probabilities, for "
        "forward_kl's unbiased tail: draws; fewer where the tail has less than 0.01; 0 = none",
    )
    exact: bool = Field(False, description="store log-probabilities as float32; false = rounded to steps of 1/32 nat")
    weights: WeightsConfig | None = Field(None, description=CAPTURED_WEIGHTS)
    engine: EngineConfig = Field(EngineConfig(), description="engine that scores the traces")
    shard_rows: PositiveInt = execution(256, description="number of traces in one Parquet file (shard)")

    @pydantic.model_validator(mode="after")
    def _captures(self) -> ScoreStage:
        _check_draws(self.tail_draws, self.top_logprobs, self.engine)
        _check_weights(self.weights, self.top_logprobs, self.tail_draws)
        return self

    def inputs(self) -> Iterator[Input]:
        yield Input("model", self.model)
        yield Input("data", self.data)
        if self.task is not None:
            yield Input("task", self.task)


def _check_draws(tail_draws: int, top_logprobs: int, engine: EngineConfig) -> None:
    """Raise ValueError for draws that an engine cannot give."""
    if not tail_draws:
        return
    if engine.is_served:
        raise ValueError(
            "tail_draws: an endpoint gives its most likely tokens only, not draws from the others; set it to 0, or score the traces "
            "with an engine of this machine (kind: score)"
        )
    if not top_logprobs:
        raise ValueError("tail_draws: needs top_logprobs > 0: the tail is what the stored distribution leaves out")


def _check_weights(weights: WeightsConfig | None, top_logprobs: int, tail_draws: int) -> None:
    """Raise ValueError for weights at capture that have nothing to choose from, or that cannot go with draws."""
    if weights is None:
        return
    if not top_logprobs:
        raise ValueError("weights: no distribution is stored with top_logprobs: 0; remove one of the two keys")
    if tail_draws:
        raise ValueError(
            "weights: cannot be used with tail_draws: draws are stored at every position; remove one of the two keys"
        )


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


class DivergenceStage(StageConfig):
    """Measure how far a model is from a teacher: the KL over the whole vocabulary on traces that the teacher sampled.

    The traces need the teacher's distributions and sampling at temperature 1. Their label NLL and the model's confidence are
    measured too. A comparison expands into these stages with `targets`.
    """

    shares_process: ClassVar = True
    kind: Literal["divergence"]
    model: str = Field(description="model to measure")
    data: str = Field(
        description="traces that the teacher sampled at temperature 1, with its distributions: a generate stage or a folder of shards"
    )
    dtype: Literal["bfloat16", "float32"] = Field(
        "float32", description="dtype of the model's forward pass; bfloat16 adds noise of about .001 nats a token"
    )
    micro_tokens: PositiveInt = execution(
        2048, description="number of tokens packed into one forward pass; lower it to use less memory"
    )

    def inputs(self) -> Iterator[Input]:
        yield Input("model", self.model)
        yield Input("data", self.data)


class CompareStage(StageConfig):
    """Measure the accuracy of several models on the same held-out problems, and their paired differences.

    The stage expands into one eval stage for each arm, `<stage>.<arm>`, and with `targets` into one divergence stage for each
    arm, `<stage>.<arm>.divergence`.
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
    targets: str | None = Field(
        None,
        description="traces of held-out problems that the teacher sampled (a generate stage with split: held_out, or a folder): also "
        "measure each arm's KL to the teacher, label NLL and confidence on them; None = accuracy only",
    )
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
        """The eval stages of the arms and, with targets, their divergence stages, by name."""
        shared = {
            key: getattr(self, key)
            for key in ("task", "problems", "samples", "sampling", "pass_at", "snapshot_problems", "engine")
        }
        runs = [run for runs in self.evaluations().values() for run in runs.values()]
        found: dict[str, StageConfig] = {name: EvalStage(kind="eval", model=model, **shared) for name, model in runs}
        if self.targets is not None:
            found |= {
                divergence_name(name): DivergenceStage(kind="divergence", model=model, data=self.targets)
                for name, model in runs
            }
        return found

    def half_the_work(self, stage: str) -> str:
        return f"half the problems of {stage} (now {self.problems})"

    def inputs(self) -> Iterator[Input]:
        for runs in self.evaluations().values():
            for child, model in runs.values():
                yield Input("model", model, f"arms.{child}")
        yield Input("task", self.task)
        if self.targets is not None:
            yield Input("data", self.targets, "targets")

    def held_out_problems(self, task: str) -> int | None:
        return self.problems if task == self.task else None

    def with_copies(self, seeds: Mapping[str, list[int]], where: str) -> CompareStage:
        if self.targets in seeds:
            raise UserError(
                f"{where}.targets: {self.targets!r} is made once for each training seed, and all arms are measured on the same traces: "
                "name a generate stage without seeds, of a teacher without seeds."
            )
        arms = {arm: _copies(models, seeds, f"{where}.arms.{arm}") for arm, models in self.arms.items()}
        return self.model_copy(update={"arms": arms})

    def with_sweeps(self, copies: Mapping[str, Mapping[str, str]], where: str) -> CompareStage:
        if self.targets in copies:
            raise UserError(
                f"{where}.targets: {self.targets!r} is swept, and all arms are measured on the same traces; name one set."
            )
        arms: dict[str, str | dict[int, str]] = {}
        for arm, models in self.arms.items():
            if isinstance(models, str) and models in copies:
                arms |= {f"{arm}-{value}": copy for value, copy in copies[models].items()}
            else:
                arms[arm] = models
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
        if self.seeds is not None or self.sweep is not None:
            key = "seeds" if self.seeds is not None else "sweep"
            raise ValueError(f"a compare stage takes no {key}; put them on the stages that train the compared models")
        return self


def divergence_name(child: str) -> str:
    """The name of a comparison's divergence stage, beside the eval stage `child`."""
    return f"{child}.divergence"


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
    "divergence": DivergenceStage,
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
    if not isinstance(kind, str) or kind not in KINDS:
        raise UserError(f"there is no stage kind {str(kind)[:80]!r}.{plug.nearest(str(kind), KINDS)}")
    return KINDS[str(kind)]
