"""New weights for a live vLLM engine: in one call in this process, in parts to worker processes.

vLLM 0.32 restores each layer to its loading format, loads it, and copies the processed weights into the tensors that are there
(`model_executor/model_loader/reload/layerwise.py`), so captured CUDA graphs go on with the new ones.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.platforms import current_platform

from distill.engines.weight_parts import parts

RELOAD_LOGGER = "vllm.model_executor.model_loader.reload.layerwise"
MISSED = "Failed to load weights"
"""How the library's warning of a layer without new weights begins; its argument is the layer's class name."""
SHARED_MEMORY = Path("/dev/shm")


def reload(llm: Any, pairs: Iterator[tuple[str, torch.Tensor]], ignore: tuple[str, ...] = ()) -> None:
    """Load new weights into the live model; raises ValueError for layers that none of them reached.

    The library only warns of those, and they would go on with the old weights. ignore: kinds of layers (class names) that may
    keep them. The engine must run in this process: an iterator cannot be sent to another (`reload_across`).
    """
    _complete(llm.collective_rpc(_reload, args=(pairs,)), ignore)


def reload_across(llm: Any, pairs: Iterator[tuple[str, torch.Tensor]], ignore: tuple[str, ...] = ()) -> None:
    """`reload` for an engine whose workers are other processes: weights travel as files in shared memory, part by part.

    Every worker reads a part and keeps its own shards of it; the calls are those of vLLM's own transfer between processes
    (`distributed/weight_transfer/ipc_engine.py`: start, parts, finish).
    """
    llm.collective_rpc(_begin)
    for part in parts(pairs, copy=True):
        with _as_file(part) as path:
            llm.collective_rpc(_load_part, args=(path,))
    _complete(llm.collective_rpc(_finish), ignore)


def _complete(missed: list[tuple[set[str], set[str]]], ignore: tuple[str, ...]) -> None:
    """missed: for each worker the kinds of layers without new weights, and the kinds that have no parameters."""
    # Tables that are computed (rotary ones, Gemma's normaliser) are buffers and are not loaded.
    kinds = sorted(set().union(*(found - without for found, without in missed)) - set(ignore))
    if kinds:
        raise ValueError(f"no new weights for layers of these kinds: {', '.join(kinds)}.")


@contextlib.contextmanager
def _as_file(part: dict[str, torch.Tensor]) -> Iterator[str]:
    """Write a part to a file that exists inside the context: in shared memory if it has room, else where temporary files go."""
    size = sum(tensor.nbytes for tensor in part.values())
    room = 0
    if SHARED_MEMORY.is_dir():
        found = os.statvfs(SHARED_MEMORY)
        room = found.f_bavail * found.f_frsize
    with tempfile.TemporaryDirectory(dir=SHARED_MEMORY if room > 2 * size else None, prefix="distill-") as folder:
        path = f"{folder}/weights.safetensors"
        # Names in the order of the part; safetensors orders them by dtype and name.
        order = {f"{n:06d}.{name}": tensor.contiguous() for n, (name, tensor) in enumerate(part.items())}
        save_file(order, path)
        yield path


# ------------------------------------------------------------------------------------------- in the workers


def _reload(worker: Any, pairs: Iterator[tuple[str, torch.Tensor]]) -> tuple[set[str], set[str]]:
    _forget_cpu_experts(worker)
    with _missed() as missed:
        worker.reload_weights(weights_iterator=pairs)
    return missed, _without_parameters(worker)


def _begin(worker: Any) -> None:
    _forget_cpu_experts(worker)
    with set_current_vllm_config(worker.vllm_config):
        initialize_layerwise_reload(worker.get_model())


def _load_part(worker: Any, path: str) -> None:
    tensors = load_file(path)  # mapped: what a layer keeps until it is complete outlasts the file
    with set_current_vllm_config(worker.vllm_config):
        worker.get_model().load_weights((name.partition(".")[2], tensors[name]) for name in sorted(tensors))


def _finish(worker: Any) -> tuple[set[str], set[str]]:
    with _missed() as missed, set_current_vllm_config(worker.vllm_config):
        finalize_layerwise_reload(worker.get_model(), worker.model_config)
    return missed, _without_parameters(worker)


@contextlib.contextmanager
def _missed() -> Iterator[set[str]]:
    """Collect the kinds of layers that the library warns of, in place of its log lines."""
    kinds: set[str] = set()

    def note(record: logging.LogRecord) -> bool:
        if MISSED not in record.msg:
            return True
        kinds.update(str(name) for name in record.args or ())
        return False

    logger = logging.getLogger(RELOAD_LOGGER)
    logger.addFilter(note)
    try:
        yield kinds
    finally:
        logger.removeFilter(note)


def _forget_cpu_experts(worker: Any) -> None:
    """Let a CPU's experts be packed again: the library packs them once, and copies new weights over the packed ones."""
    if not current_platform.is_cpu():
        return
    for module in worker.get_model().modules():
        if isinstance(module, UnquantizedFusedMoEMethod):
            module.moe_kernel = None


def has_head(llm: Any) -> bool:
    """Return whether vLLM's model has an output head of its own name beside a tied embedding."""
    return all(llm.collective_rpc(_names_head))


def _names_head(worker: Any) -> bool:
    return hasattr(worker.get_model(), "lm_head")  # named_modules leaves a shared module out


def _without_parameters(worker: Any) -> set[str]:
    """Return the class names of modules that have no parameters of their own."""
    modules = list(worker.get_model().modules())
    return {type(m).__name__ for m in modules} - {
        type(m).__name__ for m in modules if next(m.parameters(recurse=False), None) is not None
    }
