"""The `engine` section of a stage: which engine runs a model, with what resources, and how many of them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, PositiveInt, model_validator

from distill.recipe import served
from distill.recipe.fields import AUTO_DTYPE, Config, Dtype, execution


class PriceConfig(Config):
    """What an endpoint charges, in US dollars per million tokens."""

    input: float = Field(ge=0, description="US dollars per million tokens of prompts")
    output: float = Field(ge=0, description="US dollars per million tokens of completions")


class EngineConfig(Config):
    """The inference engine that runs a model, and its resources. A single name is short for `{fn: name}`."""

    # A key that was written where its variable's name belongs is in no message.
    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), hide_input_in_errors=True, allow_inf_nan=False
    )

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
    weight_transfer: Literal["object_store", "nccl"] = execution(
        "object_store",
        description="with ray, how new weights reach the engines: through Ray's object store, or from GPU to GPU by vLLM's own "
        "transfer (nccl)",
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
