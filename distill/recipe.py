"""The config tree of a recipe: what a YAML file may say, and nothing else.

Frozen pydantic models; an unknown key is an error that names the nearest one. Every field of a stage has
a role: *identity* (the default: another value is another result, so a finished stage refuses it),
*growth* (more of it adds only the difference) or *execution* (free to change at any time: batch sizes,
memory, logging). Plugs (losses, filters, tasks) keep their options with their function; here they are
`fn` and the rest.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from distill.plug import nearest
from distill.records import Sampling, UserError

Role = Literal["identity", "growth", "execution"]
Name = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]*$")]
Dtype = Literal["bfloat16", "float32"]


def growth(default: Any = ..., **constraints: Any) -> Any:
    return Field(default, json_schema_extra={"role": "growth"}, **constraints)


def execution(default: Any = ..., **constraints: Any) -> Any:
    return Field(default, json_schema_extra={"role": "execution"}, **constraints)


class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    @classmethod
    def role(cls, field: str) -> Role:
        """What changing a field means: identity unless it says otherwise."""
        info = cls.model_fields.get(field)
        extra = info.json_schema_extra if info is not None else None
        role: Any = extra.get("role", "identity") if isinstance(extra, dict) else "identity"
        return cast(Role, role)


class PlugConfig(BaseModel):
    """A plug by name (`fn`) with its options beside it."""

    model_config = ConfigDict(frozen=True, extra="allow")
    fn: str

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class ModelConfig(Config):
    """Where a model comes from: a hub id, a folder, or package://<installed package>/<file>.gguf."""

    source: str
    revision: str | None = None
    params: float | None = Field(
        None, description="parameter count, for cost estimates without a network"
    )
    trust_remote_code: bool = False


class SamplingConfig(Config):
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    max_tokens: PositiveInt = 256

    def record(self) -> Sampling:
        return Sampling(self.temperature, self.top_p, self.max_tokens)


class EngineConfig(Config):
    """Which engine runs a model, and how much of the machine it may take."""

    fn: str = "vllm"
    dtype: Dtype = "bfloat16"
    max_model_len: PositiveInt | None = Field(
        None, description="tokens; None = what the stage needs"
    )
    batch_size: PositiveInt = execution(64, description="completions decoded at once")
    memory_gib: float | None = execution(
        None, gt=0, description="key-value cache; None = 1 GiB on CPU, vLLM's own on a GPU"
    )
    eager: bool = execution(
        True, description="no compilation: quick to start, a little slower to run"
    )


class LoraConfig(Config):
    rank: PositiveInt = 16
    alpha: float = 32.0
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: str | list[str] = "all-linear"
    modules_to_save: list[str] | None = None


class StageConfig(Config):
    """What every stage has. Fields that name other stages, models or tasks are listed in `inputs`."""

    def inputs(self) -> Iterator[tuple[str, str]]:
        """(field, name or path) of everything this stage reads."""
        yield from ()


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
    engine: EngineConfig = EngineConfig()
    shard_rows: PositiveInt = execution(256)

    def inputs(self) -> Iterator[tuple[str, str]]:
        yield "model", self.model
        yield "task", self.task


class FilterStage(StageConfig):
    """A selection of traces: those that every filter keeps. The shards themselves are not copied."""

    kind: Literal["filter"]
    data: str
    keep: list[PlugConfig] = Field(min_length=1)

    def inputs(self) -> Iterator[tuple[str, str]]:
        yield "data", self.data


class TrainStage(StageConfig):
    """Train a model on traces (a generate or filter stage, a folder of shards) or on a JSONL file.

    JSONL rows are {"messages": [...]} whose last turn is learned, or {"question", "completion"}, which the
    `task`'s template renders.
    """

    kind: Literal["train"]
    model: str
    data: str
    task: str | None = None
    loss: PlugConfig = PlugConfig(fn="forward_kl")
    lr: float = Field(1e-4, gt=0)
    epochs: PositiveInt | None = growth(None)
    steps: PositiveInt | None = growth(None)
    batch_traces: PositiveInt = Field(
        64, description="traces an optimiser step, over all processes"
    )
    warmup_ratio: float = Field(0.03, ge=0, lt=1)
    min_lr_ratio: float = Field(
        0.1, ge=0, le=1, description="where the cosine ends, as a share of lr"
    )
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: float = Field(1.0, gt=0)
    max_tokens: PositiveInt = Field(4096, description="longer traces are left out and counted")
    normalise: Literal["token", "sequence"] = Field(
        "token", description="what counts equally: every token, or every trace"
    )
    truncated: Literal["drop", "keep"] = Field(
        "drop", description="traces that ended at the token limit"
    )
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
    PruneStage | GenerateStage | FilterStage | TrainStage | EvalStage | CompareStage,
    Field(discriminator="kind"),
]
KINDS: dict[str, type[StageConfig]] = {
    "prune": PruneStage,
    "generate": GenerateStage,
    "filter": FilterStage,
    "train": TrainStage,
    "eval": EvalStage,
    "compare": CompareStage,
}


class Recipe(Config):
    name: Name
    description: str = ""
    seed: int = 17
    models: dict[Name, ModelConfig] = {}
    tasks: dict[Name, PlugConfig] = {}
    stages: dict[Name, Stage] = Field(min_length=1)

    @pydantic.field_validator("models", mode="before")
    @classmethod
    def _short_models(cls, models: Any) -> Any:
        if not isinstance(models, Mapping):
            return models
        return {
            key: {"source": value} if isinstance(value, str) else value
            for key, value in models.items()
        }


def load(path: str | Path, overrides: Mapping[str, Any] | list[str] = ()) -> Recipe:  # type: ignore[assignment]
    """Read a recipe and apply `key=value` overrides (dotted keys, YAML values).

    Raises UserError with one line a mistake: the key, what was wrong and the nearest right name.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"recipe {str(path)!r}: no such file. `distill ls recipes` lists those that come with the project."
        )
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a recipe is a mapping with name, models, tasks and stages.")
    for key, value in parse_overrides(overrides).items():
        _set(tree, key, value)
    return validate(tree, str(path))


def validate(tree: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """The tree as a Recipe, its references checked; raises UserError."""
    try:
        recipe = Recipe.model_validate(tree)
    except pydantic.ValidationError as error:
        raise UserError(
            "\n".join(_explain_one(mistake, tree, where) for mistake in error.errors())
        ) from None
    _check_references(recipe, where)
    return recipe


def parse_overrides(overrides: Mapping[str, Any] | list[str] | tuple[()]) -> dict[str, Any]:
    if isinstance(overrides, Mapping):
        return dict(overrides)
    parsed = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UserError(
                f"override {text!r}: write it as key=value, for example stages.kl.lr=1e-4."
            )
        try:
            parsed[key] = _yaml_value(value)
        except yaml.YAMLError:
            raise UserError(f"override {text!r}: the value is not valid YAML.") from None
    return parsed


def _yaml_value(text: str) -> Any:
    value = yaml.safe_load(text)
    # YAML 1.1 reads 1e-4 as text; a recipe's reader means the number.
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
        return float(value)
    return value


def _set(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    node: Any = tree
    for depth, key in enumerate(parents):
        if not isinstance(node, dict):
            raise UserError(f"override {dotted!r}: {'.'.join(parents[:depth])} is not a mapping.")
        if node.get(key) is None:
            node[key] = {}
        node = node[key]
    if not isinstance(node, dict):
        raise UserError(f"override {dotted!r}: {'.'.join(parents)} is not a mapping.")
    node[last] = value


def _explain_one(mistake: Any, tree: Mapping[str, Any], where: str) -> str:
    """One pydantic mistake as one line, with the union's tag taken out of its path."""
    loc = [str(part) for part in mistake["loc"]]
    if len(loc) > 2 and loc[0] == "stages" and loc[2] in KINDS:
        known = list(KINDS[loc[2]].model_fields)
        loc.pop(2)
    else:
        known = list(Recipe.model_fields)
    key = ".".join(loc)
    if mistake["type"] == "extra_forbidden":
        known = _known_at(tree, loc) or known
        return f"{where}: {key}: unknown key.{nearest(loc[-1], known)}"
    if mistake["type"] == "union_tag_invalid":
        kind = str(mistake["ctx"]["tag"])
        return f"{where}: {key}.kind: there is no stage kind {kind!r}.{nearest(kind, KINDS)}"
    if mistake["type"] == "union_tag_not_found":
        return f"{where}: {key}.kind: is required. There are: {', '.join(sorted(KINDS))}."
    if mistake["type"] == "missing":
        return f"{where}: {key}: is required."
    if mistake["type"] == "value_error":
        return f"{where}: {key}: {mistake['ctx']['error']}."
    return f"{where}: {key}: {mistake['msg'][0].lower()}{mistake['msg'][1:]}, got {str(mistake['input'])[:80]!r}."


def _known_at(tree: Mapping[str, Any], loc: list[str]) -> list[str]:
    """The field names that the mapping at loc[:-1] may have."""
    if len(loc) < 2:
        return list(Recipe.model_fields)
    if loc[0] == "stages" and len(loc) >= 3:
        stage = tree["stages"].get(loc[1], {})
        model: Any = KINDS.get(stage.get("kind"))
        for key in loc[2:-1]:
            annotation = (
                model.model_fields[key].annotation if model and key in model.model_fields else None
            )
            options = [annotation, *getattr(annotation, "__args__", ())]
            model = next(
                (a for a in options if isinstance(a, type) and issubclass(a, BaseModel)), None
            )
        return list(model.model_fields) if model else []
    return list(ModelConfig.model_fields) if loc[0] == "models" else []


def _check_references(recipe: Recipe, where: str) -> None:
    """Every stage input exists, is of the right sort, and nothing is its own ancestor."""
    for name in recipe.stages:
        if name in recipe.models:
            raise UserError(f"{where}: {name!r} is both a model and a stage; rename one.")
    for name, stage in recipe.stages.items():
        for key, value in stage.inputs():
            here = f"{where}: stages.{name}.{key}"
            if key == "task":
                if value not in recipe.tasks:
                    raise UserError(
                        f"{here}: there is no task {value!r}.{nearest(value, recipe.tasks)}"
                    )
            elif key == "data":
                if value not in recipe.stages and not _looks_like_path(value):
                    raise UserError(
                        f"{here}: there is no stage {value!r}.{nearest(value, recipe.stages)} "
                        "A file or folder is written as a path."
                    )
                _check_kind(recipe, here, value, ("generate", "filter"))
            else:
                known = [*recipe.models, *recipe.stages]
                if value not in known:
                    raise UserError(
                        f"{here}: there is no model or stage {value!r}.{nearest(value, known)}"
                    )
                _check_kind(recipe, here, value, ("train", "prune"))
    order(recipe, where)


def _check_kind(recipe: Recipe, here: str, value: str, kinds: tuple[str, ...]) -> None:
    stage = recipe.stages.get(value)
    if stage is not None and stage.kind not in kinds:
        raise UserError(
            f"{here}: {value!r} is a stage of kind {stage.kind}; a {' or '.join(kinds)} stage is needed here."
        )


def _looks_like_path(value: str) -> bool:
    return "/" in value or value.startswith(".") or Path(value).exists()


def order(recipe: Recipe, where: str = "recipe") -> list[str]:
    """Stage names, inputs first, otherwise as written. Raises UserError that spells out a cycle."""
    done: list[str] = []

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            cycle = " -> ".join((*path[path.index(name) :], name))
            raise UserError(f"{where}: stages: {cycle} goes round in a circle.")
        if name not in done:
            for _, value in recipe.stages[name].inputs():
                if value in recipe.stages:
                    visit(value, (*path, name))
            done.append(name)

    for name in recipe.stages:
        visit(name, ())
    return done
