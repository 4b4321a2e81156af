"""Patches of vLLM internals, for which vLLM has no option; each with its reason.

All patches are set on one engine's own objects; the library itself is not changed. Written
for vLLM 0.32, which the package pins.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import random
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.platforms import current_platform
from vllm.v1.engine.logprobs import LogprobsProcessor
from vllm.v1.outputs import LogprobsTensors

from distill.engines.float32_head import Float32Head
from distill.records import Array


class Capture(LogprobsProcessor):  # type: ignore[misc]
    """Store a request's log-probabilities as the arrays that arrive.

    vLLM's own processor makes a Python number of every entry: 17 µs a position at 64 entries, 127 µs
    as dictionaries. Rows are copied because they are views of a whole step's array.
    """

    def __init__(self) -> None:
        super().__init__(
            tokenizer=None,
            logprobs=None,
            prompt_logprobs=None,
            cumulative_logprob=None,
            num_logprobs=None,
            num_prompt_logprobs=None,
        )
        self._sampled: list[tuple[Array, Array]] = []
        self._prompt: list[tuple[Array, Array]] = []

    def update_from_output(self, output: Any) -> None:
        if output.new_logprobs is not None:
            ids, logp, *_ = output.new_logprobs
            self._sampled.append((ids.copy(), logp.copy()))
        if output.new_prompt_logprobs_tensors is not None:
            ids, logp, *_ = output.new_prompt_logprobs_tensors
            self._prompt.append((ids.numpy(), logp.numpy()))

    def sampled(self) -> tuple[Array, Array]:
        """Return ids and log-probabilities [T, 1 + K] of the sampled tokens."""
        return _stack(self._sampled)

    def prompt(self) -> tuple[Array, Array]:
        """Return ids and log-probabilities [P - 1, 1 + K] of the prompt; row i is about prompt token i + 1."""
        return _stack(self._prompt)


def _stack(parts: list[tuple[Array, Array]]) -> tuple[Array, Array]:
    return np.concatenate([ids for ids, _ in parts]), np.concatenate([logp for _, logp in parts])


def attach(engine: Any, internal_id: str) -> Capture:
    """Attach a Capture to a request that was just added."""
    capture = Capture()
    engine.output_processor.request_states[internal_id].logprobs_processor = capture
    return capture


def cap_vocabulary(llm: Any, vocab_size: int) -> None:
    """Give ids from vocab_size on no probability: they are not sampled, not returned and not part of the normalisation."""

    def cap(model: Any) -> None:
        compute = model.compute_logits

        def compute_logits(*args: Any, **kwargs: Any) -> Any:
            logits = compute(*args, **kwargs)
            if logits is not None:
                logits[..., vocab_size:] = -torch.inf
            return logits

        model.compute_logits = compute_logits

    llm.apply_model(cap)


def float32_head(llm: Any) -> Float32Head:
    """Make the CPU build compute float32 logits; vLLM's own option converts the whole weight at every step."""
    head = Float32Head()

    def replace(model: Any) -> None:
        def apply(lm_head: Any, hidden: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            return head(hidden, lm_head.weight, bias)

        model.logits_processor._apply_head = apply

    llm.apply_model(replace)
    return head


def drop_ranks(llm: Any) -> None:
    """Skip the computation of the sampled token's rank on a CPU.

    The rank is not used here; it costs a pass over the vocabulary at every step and a compilation at the first.
    """

    def gather(logprobs: torch.Tensor, num_logprobs: int, token_ids: torch.Tensor) -> Any:
        top_logp, top_ids = torch.topk(logprobs, num_logprobs, dim=-1)
        token_ids = token_ids.unsqueeze(-1)
        return LogprobsTensors(
            torch.cat((token_ids, top_ids), dim=1).to(torch.int32),
            torch.cat((logprobs.gather(-1, token_ids), top_logp), dim=1),
            torch.zeros(len(logprobs), dtype=torch.int64),
        )

    def replace(worker: Any) -> None:
        worker.model_runner.sampler.gather_logprobs = gather

    llm.collective_rpc(replace)


def reload(llm: Any, pairs: Iterator[tuple[str, torch.Tensor]], ignore: tuple[str, ...] = ()) -> None:
    """New weights into the live model; raises ValueError for layers that none of them reached.

    The library only warns of those, and they would go on with the old weights. ignore: kinds of layers (class
    names) that may keep them.
    """
    missed: list[str] = []

    def note(record: logging.LogRecord) -> bool:
        if "Failed to load weights" not in record.msg:
            return True
        missed.extend(str(name) for name in record.args or ())
        return False

    llm.collective_rpc(_forget_cpu_experts)
    logger = logging.getLogger("vllm.model_executor.model_loader.reload.layerwise")
    logger.addFilter(note)
    try:
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": pairs})
    finally:
        logger.removeFilter(note)
    # Tables that are computed (rotary ones, Gemma's normaliser) are buffers and are not loaded.
    kinds = sorted(set(missed) - set(ignore) - set().union(*llm.collective_rpc(_without_parameters)))
    if kinds:
        raise ValueError(f"no new weights for layers of these kinds: {', '.join(kinds)}.")


def _forget_cpu_experts(worker: Any) -> None:
    """Let a CPU's experts be packed again: the library packs them once, and copies new weights over the packed ones."""
    if not current_platform.is_cpu():
        return
    for module in worker.model_runner.model.modules():
        if isinstance(module, UnquantizedFusedMoEMethod):
            module.moe_kernel = None


def has_head(llm: Any) -> bool:
    """Return whether vLLM's model has an output head of its own name beside a tied embedding."""
    return all(llm.collective_rpc(_names_head))


def _names_head(worker: Any) -> bool:
    return hasattr(worker.model_runner.model, "lm_head")  # named_modules leaves a shared module out


def _without_parameters(worker: Any) -> set[str]:
    """Return the class names of modules that have no parameters of their own."""
    model = worker.model_runner.model
    return {type(m).__name__ for m in model.modules()} - {
        type(m).__name__ for m in model.modules() if next(m.parameters(recurse=False), None) is not None
    }


def restore_classes(llm: Any) -> None:
    """Give transformers' classes back as they were, for a trainer in this process that uses the same ones.

    For architectures without a class of its own, the library decorates transformers' class for compilation, in place: other
    instances could then neither be made nor called. The engine's instance keeps the decoration in a class of its own.
    """
    llm.collective_rpc(_undecorate)


def _undecorate(worker: Any) -> None:
    for module in worker.model_runner.model.modules():
        cls = type(module)
        if cls.__module__.startswith("transformers.") and TorchCompileWithNoGuardsWrapper in cls.__bases__:
            decorated = {name: cls.__dict__[name] for name in ("__init__", "__call__")}
            cls.__init__ = inspect.getclosurevars(cls.__init__).nonlocals["old_init"]
            del cls.__call__
            cls.__bases__ = tuple(base for base in cls.__bases__ if base is not TorchCompileWithNoGuardsWrapper)
            module.__class__ = type(cls.__name__, (cls, TorchCompileWithNoGuardsWrapper), decorated)


@contextlib.contextmanager
def chunked(llm: Any, tokens: int) -> Iterator[None]:
    """Process at most `tokens` a step inside the context, so that a long prompt's logits never exist all at once.

    Chunking is off otherwise: the CPU runner cannot rewind the random generator of a seeded request whose prompt was cut.
    """
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    before = scheduler.max_num_scheduled_tokens, scheduler.scheduler_config.enable_chunked_prefill
    scheduler.max_num_scheduled_tokens = min(tokens, before[0])
    scheduler.scheduler_config.enable_chunked_prefill = True
    try:
        yield
    finally:
        scheduler.max_num_scheduled_tokens = before[0]
        scheduler.scheduler_config.enable_chunked_prefill = before[1]


@contextlib.contextmanager
def quiet_start() -> Iterator[None]:
    """Suppress vLLM's start-up messages about settings that are chosen here deliberately; errors still show."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def own_process_state() -> Iterator[None]:
    """Keep the process's random states and torch's thread setter, which the engine changes while it starts."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    set_threads = torch.set_num_threads
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        torch.set_num_threads = set_threads


@contextlib.contextmanager
def keeping_group() -> Iterator[None]:
    """Leave the default process group as it is in this context; engines destroy it when they end, whoever made it."""
    import torch.distributed as dist

    original = dist.destroy_process_group

    def destroy(group: Any = None) -> None:
        if group not in (None, dist.group.WORLD):
            original(group)

    dist.destroy_process_group = destroy
    try:
        yield
    finally:
        dist.destroy_process_group = original
