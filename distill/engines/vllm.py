"""An engine on vLLM in this process: token ids in, completions out as they finish, top-k rows kept as arrays.

In: requests, taken lazily, at most `batch_size` in progress at a time. Out: Completions in any order (`generate`) or in
the order of the requests (`score`). Log-probabilities are raw: of the distribution before temperature and top-p. Nothing is
detokenised. The engine runs in this process, or with `tensor_parallel` in one worker process for each GPU.

The process must have been started with `distill.engines.environment`.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from distill import models, world
from distill.engines import completions, vllm_options
from distill.recipe import EngineConfig
from distill.records import Array, Completion, Request, Sampling, UserError
from distill.tail_draws import MAX_DRAWS

# Thousands of modules are imported and kept: no use looking through them for garbage on the way.
gc.disable()
try:
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.inputs.engine import tokens_input
    from vllm.platforms import current_platform
    from vllm.sampling_params import RequestOutputKind

    from distill.engines import vllm_patches, vllm_weights
finally:
    # vLLM collects garbage eight times while it starts and ends, at a third of a second each for these modules alone.
    gc.freeze()
    gc.enable()

if TYPE_CHECKING:
    from distill.engines.vllm_patches import Capture

SCORE_TOKENS = 1024  # a step, while scoring: bounds the logits to [SCORE_TOKENS, vocabulary]
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")


class VllmEngine:
    """One vLLM engine (see distill.records.Engine). Raises UserError when it cannot start."""

    def __init__(
        self,
        model_dir: Path,
        config: EngineConfig,
        *,
        max_model_len: int,
        max_top_k: int,
        seed: int = 0,
    ) -> None:
        if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") != "0":
            raise UserError("VLLM_ENABLE_V1_MULTIPROCESSING must be 0: start through distill.")
        completions.check_context(model_dir, max_model_len)
        self.vocab_size, self._stop_ids = completions.vocabulary(model_dir)
        self.max_model_len = max_model_len
        self.version = 0
        self._batch_size = config.batch_size
        self._max_top_k = min(max_top_k, self.vocab_size)
        self._tied = bool(models.config_of(model_dir).get("tie_word_embeddings", False))
        self._on_cpu = current_platform.is_cpu()
        self._count = 0
        self._live: set[str] = set()
        self._sleeps = config.sleep
        self._asleep = False
        self._across = config.tensor_parallel > 1
        device = _device(self._on_cpu)
        options = vllm_options.options(
            config,
            model_dir,
            max_model_len=max_model_len,
            max_top_k=self._max_top_k + MAX_DRAWS,
            seed=seed,
            device=device,
            processes=world.size(),
        )
        # The stage's group, or an embedding program's. vLLM uses a group that is there, and destroys it at its end.
        self._foreign_group = torch.distributed.is_initialized()
        with vllm_patches.quiet_start(), vllm_patches.own_process_state():
            self._llm = _start(options, model_dir)
        vllm_patches.restore_classes(self._llm)
        self._engine = self._llm.llm_engine
        if completions.head_size(model_dir) > self.vocab_size:
            vllm_patches.cap_vocabulary(self._llm, self.vocab_size)
        self._float32_head = self._on_cpu and config.dtype != "float32"
        if self._float32_head:
            vllm_patches.float32_head(self._llm)
        self._is_v1 = self._on_cpu or not self._engine.vllm_config.use_v2_model_runner
        if self._is_v1:
            vllm_patches.take_tails(self._llm)
        # Runner V2 computes a prompt's logits 1,024 rows at a time itself.
        self._chunks_scores = self._is_v1

    def generate(self, requests: Iterable[Request], sampling: Sampling, *, top_k: int = 0) -> Iterator[Completion]:
        """Yield completions as they finish; a request's random draws depend on its seed only."""
        top_k, version = self._entries(top_k), self.version
        stop_ids = sorted(self._stop_ids)

        def start(request: Request) -> tuple[list[int], SamplingParams]:
            limit = completions.room(request, self.max_model_len, sampling.max_tokens)
            return _tokens(request.prompt_ids), SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=limit,
                seed=request.seed & 0x7FFFFFFFFFFFFFFF,
                stop_token_ids=stop_ids,
                ignore_eos=True,
                logprobs=top_k + self._draws(request, top_k),
                flat_logprobs=True,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
                skip_clone=True,
                extra_args=_extra(request),
            )

        for _, request, ids, capture in self._finished(requests, start):
            rows_ids, rows_logp, tail_T = capture.sampled()
            yield completions.completion(
                request,
                ids,
                rows_ids[: len(ids)],
                rows_logp[: len(ids)],
                top_k=top_k,
                stop_ids=self._stop_ids,
                version=version,
                tail_T=tail_T[: len(ids)] if self._is_v1 else None,
            )

    def score(self, requests: Iterable[Request], *, top_k: int = 0) -> Iterator[Completion]:
        """Yield the given completions' log-probabilities, teacher-forced, in the order of the requests."""
        top_k, version = self._entries(top_k), self.version

        def start(request: Request) -> tuple[list[int], SamplingParams]:
            ids_T = completions.given(request, self.max_model_len)
            return _tokens(request.prompt_ids) + _tokens(ids_T), SamplingParams(
                temperature=0.0,
                max_tokens=1,
                prompt_logprobs=top_k + self._draws(request, top_k),
                flat_logprobs=True,
                detokenize=False,
                ignore_eos=True,
                output_kind=RequestOutputKind.FINAL_ONLY,
                extra_args=_extra(request),
            )

        waiting: dict[int, Completion] = {}
        due = self._count
        for number, request, _, capture in self._finished(requests, start, scoring=True):
            rows_ids, rows_logp, tail_T = capture.prompt()
            # Row i of a prompt is about its token i + 1: the completion's first row is the prompt's last.
            first = len(request.prompt_ids) - 1
            waiting[number] = completions.completion(
                request,
                completions.given(request, self.max_model_len),
                rows_ids[first:],
                rows_logp[first:],
                top_k=top_k,
                stop_ids=self._stop_ids,
                version=version,
                tail_T=tail_T[first:] if self._is_v1 else None,
            )
            while due in waiting:
                yield waiting.pop(due)
                due += 1

    def _finished(
        self,
        requests: Iterable[Request],
        start: Callable[[Request], tuple[list[int], SamplingParams]],
        scoring: bool = False,
    ) -> Iterator[tuple[int, Request, Array, Capture]]:
        """Yield (number, request, sampled ids, rows) as requests finish, and add new ones as slots become free."""
        source = iter(requests)
        live: dict[str, tuple[int, Request, Capture]] = {}
        try:
            while True:
                while len(live) < self._batch_size and (request := next(source, None)) is not None:
                    key, number = str(self._count), self._count
                    prompt, params = start(request)
                    internal = self._engine.add_request(key, tokens_input(prompt), params)
                    live[key] = number, request, vllm_patches.attach(self._engine, internal)
                    self._live.add(key)
                    self._count += 1
                if not live:
                    return
                for output in self._step(scoring):
                    if output.finished and output.request_id in live:
                        number, request, capture = live.pop(output.request_id)
                        self._live.discard(output.request_id)
                        yield number, request, output.outputs[0].token_ids, capture
        finally:
            self._engine.abort_request(list(live))
            self._live -= set(live)

    def _step(self, scoring: bool) -> list[Any]:
        """Make one step of the engine and keep the process's random state, which a trainer may use."""
        chunked = vllm_patches.chunked(self._llm, SCORE_TOKENS) if scoring and self._chunks_scores else nullcontext()
        if not self._on_cpu:
            with chunked:
                return list(self._engine.step())
        state = torch.get_rng_state()
        try:
            with chunked:
                return list(self._engine.step())
        finally:
            torch.set_rng_state(state)

    def sync(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Load new weights by their names in the checkpoint; no request may be in progress. Wakes a sleeping engine."""
        self._be_idle()
        pairs = (
            _with_head(weights)
            if self._tied and vllm_weights.has_head(self._llm)
            else ((n, t.detach()) for n, t in weights)
        )
        if self._asleep:
            self._llm.wake_up(tags=["weights"])
        (vllm_weights.reload_across if self._across else vllm_weights.reload)(self._llm, pairs)
        if self._float32_head:
            vllm_patches.forget_float32_head(self._llm)
        if self._asleep:
            self._llm.wake_up(tags=["kv_cache"])
            self._asleep = False
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("the engine keeps a prefix cache of the old weights.")
        self.version = version

    def transfer(self, call: str, given: Any) -> None:
        """Make a call of vLLM's weight transfer in every worker (see nccl_transfer)."""
        self._be_idle()
        self._llm.collective_rpc(call, args=() if given is None else (given,))

    def transferred(self, version: int) -> None:
        """Count the weights that were transferred as this version, and forget what the old ones have computed."""
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("the engine keeps a prefix cache of the old weights.")
        self.version = version

    def sleep(self) -> None:
        """Free the memory of weights and cache until the next `sync`; does nothing unless started with `sleep`.

        Level 2 discards the weights, which all arrive anew, and the worker keeps the model's buffers (rotary tables) itself.
        """
        if not self._sleeps or self._asleep:
            return
        self._be_idle()
        self._llm.sleep(level=2)
        self._asleep = True

    def _be_idle(self) -> None:
        if self._live:
            raise RuntimeError(f"{len(self._live)} requests are in flight: finish or drop them first.")
        vllm_patches.drain(self._llm)

    def close(self) -> None:
        """Stop the engine and free its memory."""
        with vllm_patches.keeping_group() if self._foreign_group else nullcontext():
            self._engine.engine_core.shutdown()
            del self._engine, self._llm
            cleanup_dist_env_and_memory()

    def _draws(self, request: Request, top_k: int) -> int:
        """Return how many draws a request's rows hold. Raises UserError where they cannot be had."""
        num = request.tail_draws if top_k else 0
        if num and not self._is_v1:
            raise UserError(
                "tail_draws: this engine's model runner is vLLM's V2, which gives no draws from the tail. Start it in a process with "
                "the environment variable VLLM_USE_V2_MODEL_RUNNER=0, as distill run does, or use engine: {fn: transformers}."
            )
        return num

    def _entries(self, top_k: int) -> int:
        if top_k > self._max_top_k and self._max_top_k < self.vocab_size:
            raise ValueError(f"the engine was started for top_k up to {self._max_top_k}, not {top_k}.")
        return min(top_k, self._max_top_k)


def _device(on_cpu: bool) -> vllm_options.Device:
    if on_cpu:
        return vllm_options.Device()
    torch.cuda.empty_cache()  # a trainer's freed blocks count as taken otherwise
    free, total = torch.cuda.mem_get_info(world.local_rank())
    return vllm_options.Device("cuda", total, free)


def _start(options: dict[str, Any], model_dir: Path) -> Any:
    try:
        return LLM(**options)
    except ValueError as error:
        raise UserError(
            f"engine: vLLM does not start with {model_dir}: {error} (engine.memory_share or engine.kv_cache_gib, "
            "engine.max_model_len and engine.batch_size decide how much memory it takes.)"
        ) from error


def _with_head(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the weights, and a tied output head also under its own name.

    Without that name the CPU build keeps the old head: it repacks the matrix once, and only this name reaches the copy.
    """
    embedding: torch.Tensor | None = None
    for name, tensor in weights:
        if name == "lm_head.weight":
            continue
        if name.endswith(EMBEDDINGS):
            embedding = tensor.detach()
        yield name, tensor.detach()
    if embedding is None:
        raise ValueError(f"the weights lack the tied embedding: no name ends in {EMBEDDINGS}.")
    yield "lm_head.weight", embedding


def _extra(request: Request) -> dict[str, int] | None:
    """Return what `vllm_patches.take_tails` reads of a request."""
    return {"tail_draws": request.tail_draws, "tail_seed": request.seed} if request.tail_draws else None


def _tokens(ids: Array) -> list[int]:
    return [int(i) for i in ids]
