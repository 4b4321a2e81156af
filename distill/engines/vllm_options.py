"""The options that vLLM is started with, from a recipe's `engine` section and the device; imports neither vLLM nor torch.

A GPU's memory, as vLLM 0.32 counts it (`v1/worker/gpu_worker.py: Worker.init_device`, `v1/worker/utils.py: request_memory`):
an engine's `gpu_memory_utilization` is its own share of the whole card, and at its start that share must be free, whatever else
the card holds. `kv_cache_memory_bytes` sets the cache's size in place of what the share leaves, but the check stays
(`Worker.determine_available_memory`). So a cache of a given size comes with a share that is free.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill import models
from distill.recipe import EngineConfig
from distill.records import UserError

PREFILL_TOKENS = 2048
"""Tokens of prompts in one step on a CPU while generating, or one whole prompt where that is longer."""
CPU_CACHE_GIB = 1.0
SHARE = 0.92
"""vLLM's own gpu_memory_utilization."""
LEFT = 0.002
"""Share of a card that is left out of "free": the context of a second engine may take it between the look and the check."""


@dataclass(frozen=True, slots=True)
class Device:
    """Where an engine runs. total, free: bytes of the GPU now; 0 on a CPU."""

    kind: str = "cpu"
    total: float = 0.0
    free: float = 0.0

    @property
    def free_share(self) -> float:
        """The share of the GPU that an engine can ask for, rounded down."""
        return max(0.0, math.floor((self.free / self.total - LEFT) * 1000) / 1000)


def refused(config: EngineConfig, device: str) -> str:
    """Return the reason why vLLM cannot do what the section asks for on a kind of device; "" if it can."""
    if device == "cpu" and config.sleep:
        return (
            "engine.sleep: vLLM's sleep mode frees GPU memory, and there is no GPU here; remove the key, or use engine "
            "{fn: transformers}, which can free its weights anywhere."
        )
    if device == "cpu" and config.memory_share is not None:
        return "engine.memory_share: it is a share of a GPU's memory, and there is no GPU here; set engine.kv_cache_gib instead."
    if device == "cpu" and config.weight_transfer == "nccl":
        return "engine.weight_transfer: nccl goes from GPU to GPU, and there is no GPU here; remove the key."
    return ""


def memory_share(config: EngineConfig, model_dir: Path, device: Device) -> float:
    """Return vLLM's gpu_memory_utilization. Raises UserError, with what would start, if that is not free."""
    gib, free = 2**30, device.free_share
    holds = f"{device.free / gib:.1f} of the GPU's {device.total / gib:.1f} GiB are free"
    if config.memory_share is not None:
        if config.memory_share > free:
            raise UserError(
                f"engine.memory_share: {config.memory_share:g} of the GPU is {config.memory_share * device.total / gib:.1f} GiB, but "
                f"{holds}. Set it to {free:g} or less, or end what else uses the GPU."
            )
        return config.memory_share
    if config.kv_cache_gib is not None:
        least = weight_bytes(model_dir) / config.tensor_parallel + config.kv_cache_gib * gib
        if least > free * device.total:
            raise UserError(
                f"engine.kv_cache_gib: the model and a cache of {config.kv_cache_gib:g} GiB take {least / gib:.1f} GiB of a GPU, but "
                f"{holds}. Set a smaller cache, or end what else uses the GPU."
            )
        return min(SHARE, free)
    if free < SHARE:
        raise UserError(
            f"engine: {holds}, and vLLM asks for {SHARE:.0%} of it. Set engine.memory_share to {free:g} or less, or end what else "
            "uses the GPU."
        )
    return SHARE


def weight_bytes(model_dir: Path) -> float:
    """Return the bytes of a model folder's weights in 16 bits, the least that an engine holds."""
    stored = sum(path.stat().st_size for path in model_dir.glob("*.safetensors"))
    config = models.text_part(models.config_of(model_dir))
    wide = "32" in str(config.get("dtype") or config.get("torch_dtype") or "")
    return stored / 2 if wide else float(stored)


def options(
    config: EngineConfig,
    model_dir: Path,
    *,
    max_model_len: int,
    max_top_k: int,
    seed: int,
    device: Device,
    processes: int = 1,
) -> dict[str, Any]:
    """Return the keyword arguments of `vllm.LLM`.

    max_top_k: entries per position, within the vocabulary. processes: of the stage, each with an engine of its own. Raises
    UserError for settings that the device cannot fulfil.
    """
    if reason := refused(config, device.kind):
        raise UserError(reason)
    on_cpu = device.kind == "cpu"
    # One more position than asked for: scoring a trace that fills the context samples a token behind it.
    positions = models.config_of(model_dir).get("max_position_embeddings", max_model_len + 1)
    length = min(max_model_len + 1, max(positions, max_model_len))
    found: dict[str, Any] = {
        "model": str(model_dir),
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "dtype": config.dtype,
        "seed": seed & 0x7FFFFFFF,
        "max_model_len": length,
        "max_num_seqs": config.batch_size,
        "max_logprobs": max(max_top_k, 1),
        "logprobs_mode": "raw_logprobs",
        "enforce_eager": on_cpu if config.eager is None else config.eager,
        "enable_prefix_caching": True,
        "use_tqdm_on_load": False,
    }
    if on_cpu:
        found["enable_chunked_prefill"] = False
        found["max_num_batched_tokens"] = max(length, PREFILL_TOKENS, config.batch_size)
    else:
        found["hf_overrides"] = {"head_dtype": "float32"}
        found["gpu_memory_utilization"] = memory_share(config, model_dir, device)
        found["enable_sleep_mode"] = config.sleep
        if config.weight_transfer == "nccl":
            found["weight_transfer_config"] = {"backend": "nccl"}
    cache_gib = config.kv_cache_gib or (CPU_CACHE_GIB if on_cpu else None)
    if cache_gib is not None:
        found["kv_cache_memory_bytes"] = int(cache_gib * 2**30)
    if config.tensor_parallel > 1:
        # Every rank samples the whole batch: sharded sampling goes past compute_logits, and so past the cap on ids.
        found |= {"tensor_parallel_size": config.tensor_parallel, "enable_batch_sharded_sampling": False}
        found["distributed_executor_backend"] = "mp"
    elif processes > 1:  # an engine beside each process of a stage, in the process group that is there
        found["distributed_executor_backend"] = "external_launcher"
    return found
