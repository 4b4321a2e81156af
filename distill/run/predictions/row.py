"""The predicted cost of one node of a run, and helpers to predict its trainer and engines."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

from distill import machine as machines
from distill.compute import estimate, memory
from distill.compute.flops import ModelShape
from distill.compute.memory import Memory
from distill.compute.shared_gpu import Split, split
from distill.machine import Choice, Dtype, Machine
from distill.recipe import DistributedConfig, EngineConfig

ENGINE_SHARE = 0.92
"""Share of a GPU's memory that vLLM takes if its cache has no size (its gpu_memory_utilization)."""


@dataclass(frozen=True, slots=True)
class Part:
    """The trainer or an engine of a node: its dtype with the reason, and its seconds.

    slower: seconds that the recipe's dtype takes in addition to dtype: auto. engine: the engine's name; "" for a
    trainer. by_vllm: if the engine is transformers, the seconds that vLLM would take.
    """

    purpose: Literal["training", "engine"]
    choice: Choice
    seconds: float
    slower: float = 0.0
    engine: str = ""
    by_vllm: float | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """The prediction for one node. amounts: tokens, bytes, flops, memory (peak bytes), seconds, dollars."""

    name: str
    kind: str
    amounts: dict[str, float]
    notes: tuple[str, ...] = ()
    least: float = 0.0
    """Bytes of weights, fp32 masters and moments alone; the stage cannot run with less memory."""
    parts: tuple[Part, ...] = ()
    start: float = 0.0
    """Seconds to start the process and the engine, independent of the amount of work."""
    memory: Memory = field(default_factory=Memory)
    """Bytes by use, of one process."""
    processes: int = 1
    sequence_cache: float = 0.0
    """Bytes of the key-value cache of one sequence at its full length, for an engine whose cache has no size in the recipe and
    takes what the GPU has; else 0."""
    engine: EngineConfig | None = None
    """The engine section of the stage."""
    beside: tuple[Memory, Memory] | None = None
    """Of a stage that trains beside its engine on a GPU: the trainer's memory with all other engines, and the engine's."""

    def shared(self, total: float) -> Split | None:
        """Return how trainer and engine share a GPU of `total` bytes; None for a stage that does not have both."""
        if self.beside is None or self.engine is None:
            return None
        training, own = self.beside
        return split(
            training,
            own,
            total=total,
            least_cache=self.sequence_cache,
            sleep=self.engine.sleep,
            share=self.engine.memory_share,
        )


def make_amounts(
    tokens: float = 0.0,
    bytes: float = 0.0,
    flops: float = 0.0,
    memory: float = 0.0,
    seconds: float = 0.0,
    dollars: float = 0.0,
) -> dict[str, float]:
    return {
        "tokens": tokens,
        "bytes": bytes,
        "flops": flops,
        "memory": memory,
        "seconds": seconds,
        "dollars": dollars,
    }


def dtype_part(
    purpose: Literal["training", "engine"],
    shape: ModelShape,
    wish: str,
    machine: Machine,
    seconds: Callable[[Dtype], float],
) -> Part:
    """The prediction for a trainer or an engine: the dtype that `machine.choose` chooses, and its seconds.

    seconds: a function of the dtype.
    """
    width = shape.hidden, shape.intermediate
    choice = machines.choose(machine, width, wish, purpose)
    best = machines.choose(machine, width, "auto", purpose)
    took = seconds(choice.dtype)
    slower = took - seconds(best.dtype) if best.dtype != choice.dtype else 0.0
    return Part(purpose, choice, took, slower)


def engine_part(
    shape: ModelShape,
    config: EngineConfig,
    machine: Machine,
    seconds: Callable[[Dtype, str], float],
) -> Part:
    """The prediction for an engine. seconds: a function of dtype and engine name."""
    name = engine_name(config, machine)
    part = dtype_part("engine", shape, config.dtype, machine, lambda dtype: seconds(dtype, name))
    by_vllm = seconds(part.choice.dtype, "vllm") if name == "transformers" else None
    return replace(part, engine=name, by_vllm=by_vllm)


def start_seconds(*parts: Part) -> float:
    """Seconds to start the process and the engines of `parts`."""
    return estimate.PROCESS_START + sum(estimate.engine_start(part.engine) for part in parts if part.engine)


def engine_name(config: EngineConfig, machine: Machine) -> str:
    """The name of the engine; `auto` is resolved for this machine, and is vLLM on a named one."""
    if config.fn != "auto":
        return config.fn
    return "vllm" if machine.card or importlib.util.find_spec("vllm") is not None else "transformers"


def engine_memory(
    shape: ModelShape,
    config: EngineConfig,
    dtype: Dtype,
    length: float,
    machine: Machine,
    sequences: float | None = None,
    **more: bool,
) -> Memory:
    """Memory of an engine for sequences of `length` tokens; sequences: how many there are (None: as many as it takes)."""
    cache = config.kv_cache_gib or (1.0 if machine.device == "cpu" else None)
    at_once = config.batch_size if sequences is None else min(config.batch_size, math.ceil(sequences))
    return memory.engine_memory(
        shape,
        at_once,
        int(length),
        dtype=dtype,
        engine=engine_name(config, machine),
        cache_gib=cache,
        tensor_parallel=config.tensor_parallel,
        on_cpu=machine.device == "cpu",
        **more,
    )


def engines_at_once(config: EngineConfig, machine: Machine) -> int:
    """The number of engines that share a stage's requests and speed it up: on a CPU they share the cores instead."""
    return config.replicas if machine.device == "cuda" else 1


def all_engines(one: Memory, config: EngineConfig, machine: Machine) -> Memory:
    """Memory of one machine's CPU with all replicas of an engine, or of one GPU."""
    total = one
    for _ in range(config.replicas - 1 if machine.device == "cpu" else 0):
        total += one
    return total


def sequence_cache(shape: ModelShape, config: EngineConfig, dtype: Dtype, length: float, machine: Machine) -> float:
    """Bytes of one sequence's cache if vLLM chooses the size of its cache; else 0 (`Row.sequence_cache`)."""
    free = machine.device == "cuda" and config.kv_cache_gib is None and engine_name(config, machine) == "vllm"
    return memory.cache_bytes(shape, dtype, length) / config.tensor_parallel if free else 0.0


def decoded_at_once(shape: ModelShape, config: EngineConfig, tokens: float, machine: Machine) -> int:
    """Completions of `tokens` tokens that an engine decodes at the same time: at most batch_size, and as many as its cache
    holds."""
    if engine_name(config, machine) != "vllm":
        return config.batch_size
    cache_gib = config.kv_cache_gib or (1.0 if machine.device == "cpu" else None)
    # Of each of the GPUs that the engine is split over.
    share, parts = config.memory_share or ENGINE_SHARE, config.tensor_parallel
    room = share * machine.memory - 2.0 * shape.params_total / parts if cache_gib is None else cache_gib * 2**30
    return max(1, min(config.batch_size, int(room * parts / memory.cache_bytes(shape, "bfloat16", tokens))))


def on_machine(bytes_each: float, parallel: DistributedConfig, machine: Machine) -> float:
    """Bytes that a stage's processes take of the machine's memory: all together on a CPU, each of a GPU of its own."""
    return bytes_each * (parallel.processes if machine.device == "cpu" else 1)
