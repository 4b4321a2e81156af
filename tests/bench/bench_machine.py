"""The share of this machine's multiplier that training, scoring and generation reach, on SmolLM2-135M.

The multiplier: the better of float32 and bfloat16 over the three products of a layer at the model's width, measured between the
rounds. A share is the FLOPs that the work needs (those of tokens really computed: 6N a trained token, 2N a scored or generated
one, attention on top; norms, softmax, optimiser and sampling are not counted) over the seconds it took, by that rate. Everything in the dtype that
`dtype: auto` takes here.

    python tests/bench/bench_machine.py [--rounds 5] [--tokens 2048] [--batch 64] [--busy] [--out DIR]

On a machine with quick bfloat16, ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 makes one with AVX2 alone of it. Run it with nothing
else at work: it times the wall. --busy counts CPU time over the threads instead, which other work disturbs little, but where
a thread that waits costs nothing. --tokens: of a training step; --batch: completions that the engine generates together.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import harness
import numpy as np
from bench_train import SMOLLM2, TOKENS, Ours, examples

from distill import engines, machine, models
from distill.compute.flops import ModelShape, forward_flops, generate_flops, train_flops
from distill.recipe import EngineConfig, ModelConfig
from distill.records import Request, Sampling
from distill.training.loss.sparse import cross_entropy, forward_kl
from distill.training.packing import pack

PROMPT, NEW = 40, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--busy", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out")
    options = parser.parse_args()
    rounds = options.rounds
    os.environ.update(engines.environment(EngineConfig()))
    folder = models.resolve(ModelConfig(source=SMOLLM2))
    shape = ModelShape.from_config(models.config_of(folder))
    width = machine.width_of(models.config_of(folder))
    best = machine.measure([width]).best(width)
    work = {**training(folder, shape, options.tokens), **generation(folder, shape, options.batch)}
    rates: list[float] = [best]
    spent: dict[str, list[float]] = {name: [] for name in work}
    for number in range(rounds + 1):
        for name, (_, run) in work.items():
            seconds = machine.busy_seconds(run, "cpu") if options.busy else wall_seconds(run)
            if number:
                spent[name].append(seconds)
        rates.append(machine.measure([width]).best(width))
    rate = statistics.median(rates)
    rows: list[dict[str, Any]] = [
        {"what": "multiplier, GFLOP/s", "figure": rate / 1e9},
        *(
            {
                "what": name,
                "figure": flops / statistics.median(spent[name]) / 1e9,
                "share": flops / statistics.median(spent[name]) / rate,
                "best share": flops / min(spent[name]) / max(rates),
            }
            for name, (flops, _) in work.items()
        ),
    ]
    ratios = [a / b for a, b in zip(spent["train, KL"], spent["train, CE"], strict=True)]
    rows.append({"what": "KL step over CE step", "share": statistics.median(ratios)})
    rows += [
        {"what": f"dtype, {purpose}", "figure": models.auto_dtype(folder, purpose)}
        for purpose in ("training", "engine")
    ]
    harness.report("machine", rows, options.out)


def wall_seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


Work = dict[str, tuple[float, Callable[[], object]]]
"""By name: the FLOPs of one run, and the run."""


def training(folder: Path, shape: ModelShape, most: int) -> Work:
    """A step of one micro-batch of at most `most` tokens with either loss, and the same tokens scored by the trainer."""
    (batch,) = pack(examples(49152, 0, most), micro_tokens=most)
    rows = int((batch.weight_T > 0).sum())
    tokens = len(batch.ids_T)
    # The mean over tokens of how many each attends to.
    context = batch.squared_lengths / (2 * tokens)
    ours = {loss.__name__: Ours(folder, loss) for loss in (cross_entropy, forward_kl)}
    flops = train_flops(shape, tokens, context, rows)

    def score() -> object:
        import torch

        index = torch.from_numpy(batch.weight_T.nonzero()[0])
        return ours["cross_entropy"].student_module.label_logp(batch.to_torch(), index)

    return {
        "train, CE": (flops, lambda: ours["cross_entropy"].step(batch)),
        "train, KL": (flops, lambda: ours["forward_kl"].step(batch)),
        "score in the trainer": (forward_flops(shape, tokens, context, rows), score),
    }


def generation(folder: Path, shape: ModelShape, batch: int) -> Work:
    """The engine: a batch of completions, and the same number of given ones scored, both with the top 64."""
    engine: Any = engines.open_engine(EngineConfig(batch_size=batch), folder, max_model_len=128, max_top_k=64)
    engine._stop_ids = frozenset()
    rng = np.random.default_rng(0)
    count = iter(range(10**9))

    def requests(new: int | None) -> list[Request]:
        """Prompts that are no two the same, so that no prefix is there already."""
        return [
            Request(
                str(next(count)),
                rng.integers(100, 40000, PROMPT),
                seed=n,
                completion_ids=None if new is None else rng.integers(100, 40000, new),
            )
            for n in range(batch)
        ]

    def generate() -> object:
        return list(engine.generate(requests(None), Sampling(max_tokens=NEW), top_k=64))

    def score() -> object:
        return list(engine.score(requests(NEW), top_k=64))

    total = batch * (PROMPT + NEW)
    return {
        "generate, top 64": (generate_flops(shape, batch * PROMPT, batch * NEW, batch), generate),
        # An engine applies the head to every position of what it scores.
        "score in the engine, top 64": (
            forward_flops(shape, total, (PROMPT + NEW + 1) / 2, total),
            score,
        ),
    }


if __name__ == "__main__":
    main()
