"""The engines that a recipe can name; each imports its library only when it is called.

A user's own engine is any callable with this signature, named as `package.module:Class`.
"""

from __future__ import annotations

from pathlib import Path

from distill.engines.auto import choose, why_not_vllm
from distill.recipe import EngineConfig
from distill.records import Engine, UserError


def auto(model_dir: Path, config: EngineConfig, *, max_model_len: int, max_top_k: int, seed: int = 0) -> Engine:
    """vLLM if it is installed, works here and supports the model; else transformers."""
    start = vllm if choose(config, model_dir).fn == "vllm" else transformers
    return start(model_dir, config, max_model_len=max_model_len, max_top_k=max_top_k, seed=seed)


def vllm(model_dir: Path, config: EngineConfig, *, max_model_len: int, max_top_k: int, seed: int = 0) -> Engine:
    """vLLM in this process, with continuous batching and prefix caching. The default where it runs."""
    if (reason := why_not_vllm()) is not None:
        raise UserError(
            f"engine: the recipe asks for vllm, but {reason}. Install it with: pip install 'distill[cpu]' (on a GPU 'distill[gpu]'), "
            "or set engine to auto or transformers."
        )
    from distill.engines.vllm import VllmEngine

    return VllmEngine(model_dir, config, max_model_len=max_model_len, max_top_k=max_top_k, seed=seed)


def transformers(model_dir: Path, config: EngineConfig, *, max_model_len: int, max_top_k: int, seed: int = 0) -> Engine:
    """Plain transformers, in batches; runs where vLLM does not, but is slower."""
    _refuse_vllm_options(config)
    from distill.engines.transformers import TransformersEngine

    return TransformersEngine(
        model_dir,
        max_model_len=max_model_len,
        dtype=config.dtype,
        batch_size=config.batch_size,
    )


def reference(model_dir: Path, config: EngineConfig, *, max_model_len: int, max_top_k: int, seed: int = 0) -> Engine:
    """Plain transformers, one sequence at a time in float32 on the CPU: bit-identical results for identical requests."""
    _refuse_vllm_options(config)
    from distill.engines.transformers import TransformersEngine

    return TransformersEngine(model_dir, max_model_len=max_model_len, dtype="float32", batch_size=1, device="cpu")


def openai(model_dir: Path, config: EngineConfig, *, max_model_len: int, max_top_k: int, seed: int = 0) -> Engine:
    """An endpoint with OpenAI's API: vLLM's server, SGLang, a provider. Needs base_url and model, and key: $NAME for a key."""
    from distill.engines.served.engine import ServedEngine

    return ServedEngine(model_dir, config, max_model_len=max_model_len, max_top_k=max_top_k)


def _refuse_vllm_options(config: EngineConfig) -> None:
    if config.memory_share is not None:
        raise UserError(
            f"engine.memory_share: the engine {config.fn} takes what it needs; remove the key, or use vllm."
        )
    if config.tensor_parallel > 1:
        raise UserError(
            f"engine.tensor_parallel: the engine {config.fn} runs on one device; remove the key, or use vllm."
        )
