"""Sections of a recipe (models, sampling, adapters, processes) and the base class of all config classes.

Every field of a stage has a role. *identity* (the default): the field decides the result, so a finished stage refuses
another value. *growth*: a larger value adds only the difference. *execution*: the field may change at any time (batch
sizes, memory, logging).
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, cast

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator

from distill.records import Sampling

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

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    @classmethod
    def role(cls, field: str) -> Role:
        """The role of a field; identity is the default."""
        info = cls.model_fields.get(field)
        extra = info.json_schema_extra if info is not None else None
        role: Any = extra.get("role", "identity") if isinstance(extra, dict) else "identity"
        return cast(Role, role)


TEMPLATE_OPTIONS = "options that the model's chat template reads, such as enable_thinking: false; chat_template: NAME chooses one of several"


class PlugConfig(BaseModel):
    """A function by name (`fn`) and its options; a name alone is the function without options."""

    model_config = ConfigDict(frozen=True, extra="allow")
    fn: str = Field(description="name of a built-in function, or your own as package.module:function")

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"fn": value} if isinstance(value, str) else value

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class TaskConfig(PlugConfig):
    """A task by name, the options of its chat template, and its own options beside them."""

    template_options: dict[str, Any] = Field({}, description=TEMPLATE_OPTIONS)


class TemplateText(Config):
    """A task's prompt as text (`template: {...}` in place of a template's name).

    `{question}` stands for the problem's own text.
    """

    system: str | None = Field(
        None, description="system message; for models without a chat template, the text before the question"
    )
    question: str = Field("{question}", description="what the user's turn says, with {question} in it")
    plain: str | None = Field(
        None,
        description="the whole prompt of models without a chat template, with {question} in it; None = system, an empty line, question",
    )
    chat: bool = Field(True, description="false = use `plain` for models with a chat template too")
    prefill: str = Field("", description="text that every reply begins with, such as <think>")
    answer: str = Field(
        description="where the answer is in a reply, after its reasoning: boxed, tags, tags_or_number, last_number, last_line, json, "
        "any_mark, all; or a regular expression with one group, whose last match counts"
    )

    @model_validator(mode="after")
    def _consistent(self) -> TemplateText:
        for name in ("question", "plain"):
            text = getattr(self, name)
            if text is not None and text.count("{question}") != 1:
                raise ValueError(f"{name}: write {{question}} once, where the problem's text belongs")
        unused = [key for key in ("system", "question") if key in self.model_fields_set]
        if not self.chat and self.plain is not None and unused:
            raise ValueError(
                f"{' and '.join(unused)}: with chat: false and `plain`, that is the whole prompt; remove one of them"
            )
        return self


class RewardConfig(PlugConfig):
    """A reward by name (`fn`), its weight, and its options."""

    weight: float = Field(1.0, description="weight of this reward in the weighted sum of all rewards")


class WeightsConfig(PlugConfig):
    """Which tokens of a completion count: a function that scores them (`fn`), the share that it keeps, and its options."""

    share: float = Field(
        0.5, gt=0, lt=1, description="share of a completion's tokens that are kept: those with the highest scores"
    )


class HiddenConfig(Config):
    """Match the student's hidden states with those of the teacher in the trainer, layer by layer, beside the loss.

    For a student that was made from the teacher's architecture by prune stages: each of its layers is compared with the one of
    the teacher's that it was made from, by what the two give to the next layer.
    """

    weight: float = Field(1.0, gt=0, description="factor on this term, which is added to the loss")
    fn: Literal["mse", "cosine"] = Field(
        "mse",
        description="mse: the mean squared difference of a token's values, divided by the variance of the teacher's values at that "
        "token; cosine: 1 - the cosine of the two",
    )
    layers: Literal["all", "last"] | list[NonNegativeInt] = Field(
        "all", description="layers of the student that are compared, counted from 0; the mean over them is taken"
    )

    @model_validator(mode="after")
    def _distinct_layers(self) -> HiddenConfig:
        if isinstance(self.layers, list) and (not self.layers or len(set(self.layers)) != len(self.layers)):
            raise ValueError("layers: name at least one layer of the student, each once")
        return self


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
