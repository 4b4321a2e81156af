"""The sections of a recipe (models, engines, sampling, adapters), what every stage kind has, and the role of every
field.

A field of a stage is *identity* (the default: it decides the result, so a finished stage refuses another value),
*growth* (a larger value adds only the difference) or *execution* (free to change at any time: batch sizes, memory,
logging).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveInt, model_validator

from distill import plug
from distill.records import Sampling

Role = Literal["identity", "growth", "execution"]
Name = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]*$")]
StageName = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]*(@\d+)?$")]
"""A stage, or its copy for one training seed (`kl@2`)."""
Dtype = Literal["auto", "bfloat16", "float32"]
SavedDtype = Literal["bfloat16", "float32"]
AUTO_DTYPE = "auto: bfloat16 on a GPU that has it; on a CPU, whichever of bfloat16 and float32 multiplies faster here, as measured"


def base_name(name: str) -> str:
    """The name of the stage without its training seed: `kl` of `kl@2`."""
    return name.partition("@")[0]


def copy_name(name: str, seed: int) -> str:
    """The name of a stage's copy for a training seed: `kl@2`."""
    return f"{name}@{seed}"


def _distinct(seeds: list[int]) -> list[int]:
    if len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise ValueError(f"seeds are distinct numbers from 0, not {seeds}")
    return seeds


Seeds = Annotated[list[int], Field(min_length=1), AfterValidator(_distinct)]


def growth(default: Any = ..., **constraints: Any) -> Any:
    return Field(default, json_schema_extra={"role": "growth"}, **constraints)


def execution(default: Any = ..., **constraints: Any) -> Any:
    return Field(default, json_schema_extra={"role": "execution"}, **constraints)


class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    @classmethod
    def role(cls, field: str) -> Role:
        """The role of a field; identity is the default."""
        info = cls.model_fields.get(field)
        extra = info.json_schema_extra if info is not None else None
        role: Any = extra.get("role", "identity") if isinstance(extra, dict) else "identity"
        return cast(Role, role)


TEMPLATE_OPTIONS = "options that the model's chat template reads, such as enable_thinking: false; chat_template: NAME chooses one of several"


class PlugConfig(BaseModel):
    """A plug by name (`fn`) with its options beside it."""

    model_config = ConfigDict(frozen=True, extra="allow")
    fn: str = Field(description="name, or package.module:function")

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class TaskConfig(PlugConfig):
    """A task by name, the options of its chat template, and its own options beside them."""

    template_options: dict[str, Any] = Field({}, description=TEMPLATE_OPTIONS)


class RewardConfig(PlugConfig):
    """A reward by name, its weight in the sum, and its options beside them."""

    weight: float = Field(1.0, description="weight in the sum")


class ModelConfig(Config):
    """Where a model comes from: a hub id, a folder, or package://<installed package>/<file>.gguf."""

    source: str = Field(description="hub id, folder, or package://<installed package>/<file>.gguf")
    revision: str | None = Field(None, description="branch, tag or commit on the hub")
    params: float | None = Field(None, description="parameter count, for cost estimates without a network")
    trust_remote_code: bool = Field(False, description="run the model's own Python code")


class SamplingConfig(Config):
    temperature: float = Field(1.0, ge=0, description="0 = greedy")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus sampling: the probability mass to sample from")
    max_tokens: PositiveInt = Field(256, description="the most tokens of a completion")

    def record(self) -> Sampling:
        return Sampling(self.temperature, self.top_p, self.max_tokens)


class EngineConfig(Config):
    """The engine that runs a model, and the resources it may use. A name alone stands for `{fn: name}`."""

    fn: str = Field("auto", description="auto: vllm if it is installed and can be used, else transformers")
    dtype: Dtype = Field("auto", description=AUTO_DTYPE)
    max_model_len: PositiveInt | None = Field(None, description="context length in tokens; None = what the stage needs")
    batch_size: PositiveInt = execution(64, description="number of completions decoded at once")
    kv_cache_gib: float | None = execution(
        None, gt=0, description="size of the key-value cache in GiB; None = 1 on a CPU, vLLM's default on a GPU"
    )
    eager: bool = execution(
        True, description="run without compilation (vLLM's enforce_eager): faster to start, a little slower to run"
    )

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"fn": value} if isinstance(value, str) else value


class RowsConfig(Config):
    """How the rows of a data set are read, where `data` is a file, a folder or a hub data set and no traces."""

    split: str = Field("train", description="split of a folder or hub data set")
    subset: str | None = Field(None, description="configuration of a hub data set")
    fields: dict[str, str] = Field(
        {},
        description="columns of a layout that is not known, by part: question, reply, reasoning, answer, system, messages, "
        "tools, input, verdicts; nested ones as a.b or a.0",
    )
    keep_wrong: bool = Field(False, description="whether generations that a row's own verdicts call wrong are kept")
    template_options: dict[str, Any] = Field({}, description=f"without a task: {TEMPLATE_OPTIONS}")


class BudgetConfig(Config):
    """Training length as compute: until this student has used `times` the FLOPs of another stage's student, in all."""

    flops_of: str = Field(description="stage whose student's FLOPs are the budget")
    times: float = Field(1.0, gt=0, description="factor on that stage's FLOPs")


class LoraConfig(Config):
    rank: PositiveInt = Field(16, description="rank of the adapter")
    alpha: float = Field(32.0, description="scale of the adapter: alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")
    target_modules: str | list[str] = Field("all-linear", description="modules that get an adapter, as in PEFT")
    modules_to_save: list[str] | None = Field(
        None, description="modules that are trained fully, beside the adapter (PEFT's modules_to_save)"
    )
    quantised: Literal["nf4", "int8"] | None = Field(
        None,
        description="quantisation of the frozen weights under the adapter (QLoRA), by bitsandbytes",
    )


Sort = Literal["model", "teacher", "data", "task", "questions", "budget"]


@dataclass(frozen=True, slots=True)
class Input:
    """Something that a stage reads: its sort, its name in the recipe (or a path), and the field that names it.

    model: a model that the stage trains, prunes, runs or evaluates. teacher: a model that the stage learns from. data:
    traces, by a stage or a path. task: a task. questions: a task, or a file of problems. budget: a stage that trains,
    for its compute alone.
    """

    sort: Sort
    name: str
    field: str = ""

    def __post_init__(self) -> None:
        if not self.field:
            object.__setattr__(self, "field", self.sort)


class StageConfig(Config):
    """A stage kind: the fields that every stage has, and the kind's attributes and methods.

    Your own kind is a subclass in a module beside the recipe (`kind: mymodule:MyStage`): its fields, `inputs`,
    the attributes below and `run(self, context) -> Result`. With `predict`, `distill check` also predicts its cost.

    writes: what later stages may read. "model": a checkpoint in <folder>/model; "traces": shards or a selection in
    <folder>/traces. trains: the stage spends compute on its `model`, so a budget can name it; a model that a stage
    writes without training it begins a line of its own in the ledger. adds_to: fields of inputs whose changed content
    is added to the stage's output instead of doing the stage again. shares_process: evaluations of one comparison run
    in one process.
    """

    writes: ClassVar[Literal["model", "traces", "nothing"]] = "nothing"
    trains: ClassVar[bool] = False
    adds_to: ClassVar[frozenset[str]] = frozenset()
    shares_process: ClassVar[bool] = False

    kind: str
    seed: int | None = Field(None, ge=0, description="seed of the stage's random draws; None = the recipe's")
    seeds: Seeds | None = Field(
        None, description="training seeds; the stage and every stage that reads it is copied for each of them"
    )

    def inputs(self) -> Iterator[Input]:
        """Everything that this stage reads."""
        yield from ()

    def reads(self, sort: Sort) -> list[str]:
        """The names of the inputs of one sort."""
        return [each.name for each in self.inputs() if each.sort == sort]

    def children(self) -> dict[str, StageConfig]:
        """Stages that this one expands into, by their names below this one's."""
        return {}

    def evaluations(self) -> dict[str, dict[int, tuple[str, str]]]:
        """The arms that this stage evaluates: by arm and training seed, the child ("": this stage itself) and the
        model."""
        return {}

    def held_out_problems(self, task: str) -> int | None:
        """The number of the task's held-out problems that this stage evaluates on; None where it does not."""
        return None

    def with_copies(self, seeds: Mapping[str, list[int]], where: str) -> StageConfig | None:
        """This stage with every copy of the stages that it reads, by their seeds; None where it is itself copied for
        each seed."""
        return None

    def half_the_work(self, stage: str) -> str:
        """Return how to halve the work of `stage`, in words and with its own keys; "" if it has no such key."""
        return ""

    @property
    def is_built_in(self) -> bool:
        return ":" not in self.kind

    def implementation(self) -> Callable[[Any, Any], Any]:
        """The function that does the stage, `(config, context) -> Result`. Getting it imports what it needs."""
        own = getattr(type(self), "run", None)
        return own or importlib.import_module(f"distill.stages.{self.kind}").run  # type: ignore[no-any-return]

    def check(self, name: str, recipe: Any) -> None:
        """Raise UserError for what is wrong with the stage beyond its fields: functions that it names, and their
        options."""
        check = plug.names("distill.run.checks").get(self.kind)
        if check is not None:
            check(name, self, recipe)

    def predict(self, name: str, known: Any, machine: Any) -> list[Any]:
        """What the stage will cost: a `run.predictions.row.Row` for each of its processes, or none where that is not
        known."""
        if not self.is_built_in:
            return []
        rows: list[Any] = plug.find(self.kind, "distill.run.predictions")(name, self, known, machine)
        return rows
