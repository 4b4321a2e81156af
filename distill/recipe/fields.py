"""Sections of a recipe (models, engines, sampling, adapters) and the base class of all stage kinds.

Every field of a stage has a role. *identity* (the default): the field decides the result, so a finished stage refuses
another value. *growth*: a larger value adds only the difference. *execution*: the field may change at any time (batch
sizes, memory, logging).
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, model_validator

from distill import plug
from distill.recipe import served
from distill.records import Sampling, UserError

Role = Literal["identity", "growth", "execution"]
Name = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]*$")]
StageName = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]*(@\d+)?$")]
"""The name of a stage, or of its copy for one training seed (`kl@2`)."""
Dtype = Literal["auto", "bfloat16", "float32"]
SavedDtype = Literal["bfloat16", "float32"]
AUTO_DTYPE = "auto = bfloat16 on a GPU that supports it; on a CPU, the faster of bfloat16 and float32 as measured on this machine"


def base_name(name: str) -> str:
    """The name of a stage without the training seed: `kl` for `kl@2`."""
    return name.partition("@")[0]


def copy_name(name: str, seed: int) -> str:
    """The name of a stage's copy for a training seed: `kl@2`."""
    return f"{name}@{seed}"


def _distinct(seeds: list[int]) -> list[int]:
    if len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise ValueError(f"seeds must be distinct whole numbers, 0 or larger, not {seeds}")
    return seeds


Seeds = Annotated[list[int], Field(min_length=1), AfterValidator(_distinct)]


def growth(default: Any = ..., **constraints: Any) -> Any:
    """A pydantic field with the role *growth*."""
    return Field(default, json_schema_extra={"role": "growth"}, **constraints)


def execution(default: Any = ..., **constraints: Any) -> Any:
    """A pydantic field with the role *execution*."""
    return Field(default, json_schema_extra={"role": "execution"}, **constraints)


class Config(BaseModel):
    """Base of all config classes: frozen, and unknown keys are errors."""

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
    """A function by name (`fn`) and its options."""

    model_config = ConfigDict(frozen=True, extra="allow")
    fn: str = Field(description="name of a built-in function, or your own as package.module:function")

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class TaskConfig(PlugConfig):
    """A task by name, the options of its chat template, and its own options beside them."""

    template_options: dict[str, Any] = Field({}, description=TEMPLATE_OPTIONS)


class RewardConfig(PlugConfig):
    """A reward by name (`fn`), its weight, and its options."""

    weight: float = Field(1.0, description="weight of this reward in the weighted sum of all rewards")


class ModelConfig(Config):
    """Where a model comes from: a hub id, a folder, or package://<installed package>/<file>.gguf."""

    source: str = Field(
        description="hub id, folder in transformers format, or package://<installed package>/<file>.gguf"
    )
    revision: str | None = Field(None, description="branch, tag or commit on the hub; None = the default branch")
    params: float | None = Field(
        None, description="number of parameters, for cost estimates when the model cannot be looked up"
    )
    config: str | dict[str, Any] | None = Field(
        None,
        description="the model's sizes, for cost estimates when it is not on this machine: the path of its config.json, its keys "
        "and values, or the name of a known model such as Qwen2.5-7B; None = by the hub id, if that is known",
    )
    trust_remote_code: bool = Field(False, description="allow Python code that comes with the model to run")


class SamplingConfig(Config):
    temperature: float = Field(1.0, ge=0, description="sampling temperature; 0 = greedy decoding")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus sampling: the probability mass to sample from")
    max_tokens: PositiveInt = Field(256, description="maximum number of tokens in a completion")

    def record(self) -> Sampling:
        return Sampling(self.temperature, self.top_p, self.max_tokens)


class PriceConfig(Config):
    """What an endpoint charges, in US dollars per million tokens."""

    input: float = Field(ge=0, description="US dollars per million tokens of prompts")
    output: float = Field(ge=0, description="US dollars per million tokens of completions")


class EngineConfig(Config):
    """The inference engine that runs a model, and its resources. A single name is short for `{fn: name}`."""

    # A key that was written where its variable's name belongs is in no message.
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), hide_input_in_errors=True)

    fn: str = Field(
        "auto", description="inference engine; auto = vllm if it is installed and can be used, else transformers"
    )
    dtype: Dtype = Field("auto", description=f"dtype of the computation; {AUTO_DTYPE}")
    max_model_len: PositiveInt | None = Field(None, description="context length in tokens; None = what the stage needs")
    batch_size: PositiveInt = execution(64, description="maximum number of completions decoded at the same time")
    kv_cache_gib: float | None = execution(
        None, gt=0, description="size of the key-value cache in GiB; None = 1 on a CPU, vLLM's default on a GPU"
    )
    memory_share: float | None = execution(
        None,
        gt=0,
        le=1,
        description="share of a GPU's memory that a vLLM engine may take, weights and cache together (vLLM's "
        "gpu_memory_utilization); None = what the stage leaves free",
    )
    sleep: bool = execution(
        False,
        description="free the engine's GPU memory while the model trains (vLLM's sleep mode, level 2): for an engine beside a "
        "trainer on the same GPU",
    )
    eager: bool | None = execution(
        None,
        description="run without compilation and CUDA graphs (vLLM's enforce_eager): faster to start, slower to run; None = "
        "with CUDA graphs on a GPU, without compilation on a CPU",
    )
    tensor_parallel: PositiveInt = execution(
        1, description="number of GPUs that one engine is split over (vLLM's tensor_parallel_size)"
    )
    replicas: PositiveInt = execution(
        1, description="number of engines, each in a Ray actor of its own, that share the stage's requests; needs ray"
    )
    ray: str | None = execution(
        None,
        description="where the engines run as Ray actors: local = on this machine, auto = on the cluster that is running, or "
        "the address of a cluster; None = one engine in the stage's process",
    )
    base_url: Annotated[str | None, BeforeValidator(served.checked_url)] = execution(
        None, description="with fn: openai, the address of the endpoint, such as http://localhost:8000/v1"
    )
    model: str | None = Field(None, description="with fn: openai, the model's name at the endpoint")
    key: Annotated[str | None, BeforeValidator(served.checked_key)] = execution(
        None, description="with fn: openai, the environment variable that holds the API key, as $NAME; None = no key"
    )
    timeout: float = execution(
        served.TIMEOUT,
        gt=0,
        description="with fn: openai, seconds after which a request without a whole answer is repeated",
    )
    max_retries: int = execution(
        served.MAX_RETRIES,
        ge=0,
        description="with fn: openai, how often a request is repeated after a failure that may pass, with growing pauses",
    )
    requests_per_minute: PositiveInt | None = execution(
        None, description="with fn: openai, the endpoint's limit on requests in any minute; None = no limit"
    )
    tokens_per_minute: PositiveInt | None = execution(
        None,
        description="with fn: openai, the endpoint's limit on tokens of prompts and completions in any minute; None = no limit",
    )
    price: PriceConfig | None = execution(
        None,
        description="with fn: openai, the endpoint's price in US dollars per million tokens: {input: 0.5, output: 1.5}",
    )

    weight_transfer: Literal["object_store", "nccl"] = execution(
        "object_store",
        description="with ray, how new weights reach the engines: through Ray's object store, or from GPU to GPU by vLLM's own "
        "transfer (nccl)",
    )

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"fn": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _apart(self) -> EngineConfig:
        if self.replicas > 1 and self.ray is None:
            raise ValueError("replicas: several engines run as Ray actors; set ray: local (this machine) or ray: auto")
        if self.sleep and self.ray is not None:
            raise ValueError("sleep: for an engine beside a trainer; with ray the engines have GPUs of their own")
        if self.weight_transfer == "nccl" and (self.ray is None or self.fn not in ("auto", "vllm")):
            raise ValueError("weight_transfer: nccl needs vLLM engines in Ray actors (ray: auto or local)")
        return self

    @model_validator(mode="after")
    def _goes_together(self) -> EngineConfig:
        changed = {name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default}
        if problem := served.problem(self.fn, changed):
            raise ValueError(problem)
        return self

    @property
    def is_served(self) -> bool:
        """Whether an endpoint runs the model, and not this machine."""
        return self.fn == served.FN


class RowsConfig(Config):
    """How the rows of a data set are read, if `data` is a file, a folder or a hub data set and not traces."""

    split: str = Field("train", description="split of a folder or hub data set")
    subset: str | None = Field(None, description="configuration of a hub data set")
    max_rows: PositiveInt | None = Field(None, description="only the first rows of the data set; None = all")
    fields: dict[str, str] = Field(
        {},
        description="columns of a layout that is not known, by part: question, reply, reasoning, answer, system, messages, "
        "tools, input, verdicts; nested ones as a.b or a.0",
    )
    keep_wrong: bool = Field(False, description="whether generations that a row's own verdicts call wrong are kept")
    template_options: dict[str, Any] = Field({}, description=f"without a task: {TEMPLATE_OPTIONS}")


class BudgetConfig(Config):
    """Train until this student has used `times` as many FLOPs in total as the student of stage `flops_of`."""

    flops_of: str = Field(description="stage whose student's FLOPs are the budget")
    times: float = Field(1.0, gt=0, description="factor on these FLOPs: 0.5 = half of them, 2 = twice as many")


class LoraConfig(Config):
    rank: PositiveInt = Field(16, description="rank of the adapter matrices")
    alpha: float = Field(32.0, description="scale: the adapter's output is multiplied by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")
    target_modules: str | list[str] = Field("all-linear", description="modules that get an adapter, as in PEFT")
    modules_to_save: list[str] | None = Field(
        None, description="modules that are trained fully, without an adapter (PEFT's modules_to_save)"
    )
    quantised: Literal["nf4", "int8"] | None = Field(
        None,
        description="QLoRA: quantise the frozen base weights during training, with bitsandbytes; None = not quantised",
    )


class DistributedConfig(Config):
    """The processes of a training stage. A single number is short for `{processes: number}`."""

    processes: PositiveInt = Field(1, description="number of processes on each node; on GPUs, one for each GPU")
    nodes: PositiveInt = Field(1, description="number of nodes (machines); they share the run's folder")
    rendezvous: str | None = Field(
        None, description="host:port of the first node, where the nodes meet; required for several nodes"
    )
    strategy: Literal["ddp", "fsdp2"] = Field(
        "ddp",
        description="ddp: every process holds the whole model; fsdp2: weights, gradients and optimiser state are sharded "
        "over the processes (torch's fully_shard)",
    )
    offload: bool = Field(
        False, description="with fsdp2: keep weights, gradients and optimiser state in main memory, and step there"
    )
    launcher: str | None = Field(
        None,
        description="command that starts a program once on every node, such as srun --nodes 2 --ntasks-per-node 1; None = "
        "the first node is started, and the command for the others is printed",
    )

    @model_validator(mode="before")
    @classmethod
    def _number_alone(cls, value: Any) -> Any:
        return {"processes": value} if isinstance(value, int) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _consistent(self) -> DistributedConfig:
        if self.nodes > 1 and not re.fullmatch(r"[^:\s]+:\d+|\[[0-9a-fA-F:]+\]:\d+", self.rendezvous or ""):
            raise ValueError("rendezvous: several nodes need the first node's host:port, such as node0:29500")
        if self.offload and self.strategy != "fsdp2":
            raise ValueError("offload needs strategy: fsdp2")
        if self.launcher is not None and self.nodes == 1:
            raise ValueError("launcher: it starts the other nodes, but nodes is 1; remove one of the two keys")
        return self

    @property
    def world_size(self) -> int:
        """The number of processes over all nodes."""
        return self.processes * self.nodes

    @property
    def launched(self) -> bool:
        """Whether torch's launcher starts the stage."""
        return self.world_size > 1 or self.strategy != "ddp"


ONE_PROCESS = DistributedConfig()

Sort = Literal["model", "teacher", "data", "task", "questions", "budget"]


@dataclass(frozen=True, slots=True)
class Input:
    """One input of a stage: its sort, its name in the recipe (or a path), and the stage's field that names it.

    Sorts: "model" is a model that the stage trains, prunes, runs or evaluates; "teacher" a model that the stage learns
    from; "data" traces, by stage or path; "task" a task; "questions" a task or a file of problems; "budget" a training
    stage of which only the FLOPs are read.
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

    writes: the output that later stages may read. "model": a model in <folder>/model; "traces": shards or a selection
    in <folder>/traces.
    trains: whether the stage trains its `model`. A budget can name such a stage. A model that a stage writes without
    training it counts as a new model: the costs of its own training start at zero.
    adds_to: input fields. When only the content of these inputs changed, the stage processes the additions; when any
    other input changed, the stage is done again.
    shares_process: whether the stages of this kind in one comparison run in one process.
    """

    writes: ClassVar[Literal["model", "traces", "nothing"]] = "nothing"
    trains: ClassVar[bool] = False
    adds_to: ClassVar[frozenset[str]] = frozenset()
    shares_process: ClassVar[bool] = False

    kind: str
    seed: int | None = Field(None, ge=0, description="random seed of the stage; None = the recipe's seed")
    seeds: Seeds | None = Field(
        None, description="training seeds: the stage, and every stage that reads it, is run once for each seed"
    )

    def inputs(self) -> Iterator[Input]:
        """Every input of this stage."""
        yield from ()

    def reads(self, sort: Sort) -> list[str]:
        """The names of this stage's inputs of one sort."""
        return [each.name for each in self.inputs() if each.sort == sort]

    def children(self) -> dict[str, StageConfig]:
        """Stages that this one expands into, by name; the full name is `<this stage>.<name>`."""
        return {}

    def evaluations(self) -> dict[str, dict[int, tuple[str, str]]]:
        """The evaluations that this stage makes: arm -> training seed -> (child stage, model).

        The child "" is this stage itself.
        """
        return {}

    def held_out_problems(self, task: str) -> int | None:
        """The number of the task's held-out problems that this stage evaluates on; None if it evaluates none."""
        return None

    def with_copies(self, seeds: Mapping[str, list[int]], where: str) -> StageConfig | None:
        """This stage with all seed copies of its inputs; None if the stage itself is copied for each seed.

        seeds: the training seeds of each copied stage. where: the stage's place in the recipe, for error messages.
        """
        return None

    def half_the_work(self, stage: str) -> str:
        """Return how to halve the work of `stage`, in words and with its own keys; "" if it has no such key."""
        return ""

    @model_validator(mode="after")
    def _sleeps_beside_a_trainer(self) -> StageConfig:
        engine = getattr(self, "engine", None)
        if isinstance(engine, EngineConfig) and engine.sleep and not self.trains:
            raise ValueError("engine.sleep: nothing trains in this stage, so its engine never sleeps; remove the key")
        return self

    @property
    def is_built_in(self) -> bool:
        return ":" not in self.kind

    def implementation(self) -> Callable[[Any, Any], Any]:
        """The function that runs the stage, `(config, context) -> Result`. Imports the stage's module."""
        own = getattr(type(self), "run", None)
        return own or importlib.import_module(f"distill.stages.{self.kind}").run  # type: ignore[no-any-return]

    def check(self, name: str, recipe: Any) -> None:
        """Check the functions that the stage names and their options. Raises UserError."""
        check = plug.names("distill.run.checks").get(self.kind)
        if check is not None:
            check(name, self, recipe)

    def check_environment(self, where: str) -> None:
        """Check what the stage needs beside the recipe: the variable with an endpoint's key. Raises UserError."""
        if isinstance(engine := getattr(self, "engine", None), EngineConfig):
            try:
                served.secret(engine.key)
            except UserError as error:
                raise UserError(f"{where}.{error}") from None

    def predict(self, name: str, known: Any, machine: Any) -> list[Any]:
        """Predicted cost: one `run.predictions.row.Row` for each process of the stage; empty if it is unknown."""
        if not self.is_built_in:
            return []
        rows: list[Any] = plug.find(self.kind, "distill.run.predictions")(name, self, known, machine)
        return rows
