"""Patches of vLLM internals, for which vLLM has no option; each with its reason.

All patches are set on one engine's own objects; the library itself is not changed. What runs in a worker is a function of this
module with plain arguments, so that it can be sent to another process (tensor parallelism). Written for vLLM 0.32, which the
package pins; tests/engines/test_vllm_internals.py says what is relied on.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import random
import warnings
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper
from vllm.v1.engine.logprobs import LogprobsProcessor
from vllm.v1.outputs import LogprobsTensors

from distill.engines.float32_head import Float32Head
from distill.engines.tail_rows import head_rows
from distill.records import Array
from distill.tail_draws import uniforms


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
        self._sampled: list[tuple[Array, Array, Array]] = []
        self._prompt: list[tuple[Array, Array, Array]] = []

    def update_from_output(self, output: Any) -> None:
        if output.new_logprobs is not None:
            ids, logp, ranks, *_ = output.new_logprobs
            self._sampled.append((ids.copy(), logp.copy(), ranks.copy()))
        if output.new_prompt_logprobs_tensors is not None:
            ids, logp, ranks, *_ = output.new_prompt_logprobs_tensors
            self._prompt.append((ids.numpy(), logp.numpy(), ranks.numpy()))

    def sampled(self) -> tuple[Array, Array, Array]:
        """Return ids, log-probabilities [T, 1 + K + N] and the log of the tail [T] of the sampled tokens."""
        return _stack(self._sampled)

    def prompt(self) -> tuple[Array, Array, Array]:
        """Return the same [P - 1] of the prompt; row i is about prompt token i + 1."""
        return _stack(self._prompt)


def _stack(parts: list[tuple[Array, Array, Array]]) -> tuple[Array, Array, Array]:
    ids, logp, ranks = (np.concatenate(column) for column in zip(*parts, strict=True))
    return ids, logp, ranks.astype(np.int32).view(np.float32)


def attach(engine: Any, internal_id: str) -> Capture:
    """Attach a Capture to a request that was just added."""
    capture = Capture()
    engine.output_processor.request_states[internal_id].logprobs_processor = capture
    return capture


def cap_vocabulary(llm: Any, vocab_size: int) -> None:
    """Give ids from vocab_size on no probability: they are not sampled, not returned and not part of the normalisation.

    `compute_logits` is called by the runners after the compiled and captured forward pass, so CUDA graphs do not bypass it.
    """
    llm.collective_rpc(_cap, args=(vocab_size,))


def _cap(worker: Any, vocab_size: int) -> None:
    model = worker.get_model()
    compute = model.compute_logits

    def compute_logits(*args: Any, **kwargs: Any) -> Any:
        logits = compute(*args, **kwargs)
        if logits is not None:
            logits[..., vocab_size:] = -torch.inf
        return logits

    model.compute_logits = compute_logits


def float32_head(llm: Any) -> None:
    """Make the CPU build compute float32 logits; vLLM's own option converts the whole weight at every step."""
    llm.collective_rpc(_float32_head)


def _float32_head(worker: Any) -> None:
    head, processor = Float32Head(), worker.get_model().logits_processor

    def apply(lm_head: Any, hidden: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return head(hidden, lm_head.weight, bias)

    apply.forget = head.forget  # type: ignore[attr-defined]
    processor._apply_head = apply


def forget_float32_head(llm: Any) -> None:
    """Drop the float32 copies of the head: its weight has changed."""
    llm.collective_rpc(_forget_float32_head)


def _forget_float32_head(worker: Any) -> None:
    forget = getattr(worker.get_model().logits_processor._apply_head, "forget", None)
    if forget is not None:  # a test puts the library's own head back
        forget()


def take_tails(llm: Any) -> None:
    """Return the log of the mass beyond the top entries in place of the sampled token's rank, and draws from that mass.

    Only with runner V1 (every CPU). The rank is not used here; on a CPU it costs a pass over the vocabulary at every step and a
    compilation at the first. A request asks for draws with `extra_args={"tail_draws": N, "tail_seed": seed}`; they are the last N
    of its `logprobs` or `prompt_logprobs`.
    """
    llm.collective_rpc(_take_tails)


def _take_tails(worker: Any) -> None:
    runner = worker.model_runner
    prompts: deque[tuple[Any, int, int]] = deque()
    compute = runner._get_prompt_logprobs_dict

    def gather_logprobs(logprobs: torch.Tensor, num_logprobs: int, token_ids: torch.Tensor) -> Any:
        if prompts:
            params, start, num = prompts.popleft()
            rows = [(params, start + row) for row in range(num)]
        else:
            requests = [runner.requests[name] for name in runner.input_batch.req_ids]
            rows = [(one.sampling_params, len(one.output_token_ids)) for one in requests]
        return _gather_with_tails(logprobs, num_logprobs, token_ids, rows)

    def prompt_logprobs(hidden_states: torch.Tensor, num_scheduled: dict[str, int]) -> Any:
        # The runner gathers request by request, in this order.
        for name in runner.num_prompt_logprobs:
            request, num = runner.requests[name], num_scheduled.get(name)
            if num is None or request.prompt_token_ids is None:
                continue
            start = request.num_computed_tokens
            num = min(num, len(request.prompt_token_ids) - start - 1)
            if num > 0:
                prompts.append((request.sampling_params, start, num))
        return compute(hidden_states, num_scheduled)

    runner.sampler.gather_logprobs = gather_logprobs
    runner._get_prompt_logprobs_dict = prompt_logprobs


def _gather_with_tails(
    logprobs: torch.Tensor, num_logprobs: int, token_ids: torch.Tensor, rows: list[tuple[Any, int]]
) -> Any:
    """rows: each row's sampling parameters and position. The requests of a batch ask for the same number of draws."""
    asked = [(params.extra_args or {}) if params is not None else {} for params, _ in rows]
    num = max((int(each.get("tail_draws", 0)) for each in asked), default=0)
    uniform_BN = None
    if num:
        seed_B = np.array([each.get("tail_seed", 0) for each in asked], np.uint64)
        uniform_BN = torch.from_numpy(uniforms(seed_B, np.array([position for _, position in rows]), num))
        uniform_BN = uniform_BN.to(logprobs.device)
    found = head_rows(logprobs, token_ids, num_logprobs - num, uniform_BN)
    # A rank is a whole number: the tail's float32 travels as its bits.
    return LogprobsTensors(found.ids, found.logp, found.tail_B.view(torch.int32).to(torch.int64))


def restore_classes(llm: Any) -> None:
    """Give transformers' classes back as they were, for a trainer in this process that uses the same ones.

    For architectures without a class of its own, the library decorates transformers' class for compilation, in place: other
    instances could then neither be made nor called. The engine's instance keeps the decoration in a class of its own.
    """
    llm.collective_rpc(_undecorate)


def _undecorate(worker: Any) -> None:
    for module in worker.get_model().modules():
        cls = type(module)
        if cls.__module__.startswith("transformers.") and TorchCompileWithNoGuardsWrapper in cls.__bases__:
            decorated = {name: cls.__dict__[name] for name in ("__init__", "__call__")}
            cls.__init__ = inspect.getclosurevars(cls.__init__).nonlocals["old_init"]
            del cls.__call__
            cls.__bases__ = tuple(base for base in cls.__bases__ if base is not TorchCompileWithNoGuardsWrapper)
            module.__class__ = type(cls.__name__, (cls, TorchCompileWithNoGuardsWrapper), decorated)


def drain(llm: Any) -> None:
    """Finish the step that asynchronous scheduling (the default on a GPU) has begun behind the last request's end."""
    queue = llm.llm_engine.engine_core.engine_core.batch_queue
    while queue:
        llm.llm_engine.step()


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
