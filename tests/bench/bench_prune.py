"""Untrained students of one teacher, pruned in several ways: their KL to it on traces that the pruning has not read.

    python tests/bench/bench_prune.py [MODEL TRACES] [--ways NAME ...] [--positions N]

MODEL: the folder of a teacher. TRACES: a folder of shards that it wrote, with distributions; at least twice as many as the
pruning reads. Without them: SmolLM2-135M-Instruct and the open-ended answers that `bench_targets.py` captures. Each way is a prune stage of its own, with the stage's own choice of traces; the seconds are the stage's without
loading and saving, on the wall and of the processor. The KL is to the stored distributions (entries and a tail bucket), a mean over positions, with an
interval of 95% over traces (bootstrap).
"""

from __future__ import annotations

import argparse
import copy
import io
import time
from pathlib import Path
from typing import Any

import bench_targets as targets
import chat_traces
import harness
import numpy as np

from distill import models, recipe
from distill.models.prune_probe import ProbeTrace, make_probe, mean_kl
from distill.progress import Screen
from distill.records import Array, Cost
from distill.stages import prune
from distill.stages.context import Context
from distill.stages.inputs.prune_traces import read_traces
from distill.traces.reader import open_traces

DEPTH = {"layers": 24}
MEASURED = 40
"""Traces on which every student is measured."""
WAYS: dict[str, dict[str, Any]] = {
    "even": DEPTH,
    "even, repair": {**DEPTH, "repair": True},
    "block_influence": {**DEPTH, "by": "block_influence"},
    "block_influence, repair": {**DEPTH, "by": "block_influence", "repair": True},
    "importance": {**DEPTH, "by": "importance"},
    "importance, repair": {**DEPTH, "by": "importance", "repair": True},
    "ffn 1128": {"ffn": 1128},
    "ffn 1128, repair": {"ffn": 1128, "repair": True},
    "ffn 1296, heads 6": {"ffn": 1296, "heads": 6},
    "ffn 1296, heads 6, repair": {"ffn": 1296, "heads": 6, "repair": True},
    "hidden 504, ffn 1440": {"hidden": 504, "ffn": 1440},
    "hidden 504, ffn 1440, repair": {"hidden": 504, "ffn": 1440, "repair": True},
    "27 layers, ffn 1320, repair": {"layers": 27, "by": "importance", "ffn": 1320, "repair": True},
    "28 layers": {"layers": 28, "by": "importance"},
    "26 layers": {"layers": 26, "by": "importance"},
    "20 layers": {"layers": 20, "by": "importance"},
    "20 layers, repair": {"layers": 20, "by": "importance", "repair": True},
    "20 layers, block_influence": {"layers": 20, "by": "block_influence"},
    "20 layers, block_influence, repair": {"layers": 20, "by": "block_influence", "repair": True},
    "20 layers, even, repair": {"layers": 20, "repair": True},
    "15 layers": {"layers": 15, "by": "importance"},
    "15 layers, repair": {"layers": 15, "by": "importance", "repair": True},
    "15 layers, block_influence": {"layers": 15, "by": "block_influence"},
    "15 layers, block_influence, repair": {"layers": 15, "by": "block_influence", "repair": True},
    "15 layers, even": {"layers": 15},
    "15 layers, even, repair": {"layers": 15, "repair": True},
}
"""Ways to prune SmolLM2-135M; those of the first group have about the parameters of 24 of its 30 layers."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("traces", type=Path, nargs="?")
    parser.add_argument("--ways", nargs="*", default=list(WAYS))
    parser.add_argument("--positions", type=int, default=400)
    options = parser.parse_args()
    if (options.model is None) != (options.traces is None):
        parser.error("MODEL and TRACES go together")
    options.out = targets.OUT
    if options.model is None:
        sizes = targets.Sizes()
        targets.capture(sizes)
        options.model = models.resolve(recipe.ModelConfig(source=chat_traces.SOURCE))
        options.traces = targets.cut(sizes, 64, 0.98)
    teacher, tokenizer = models.load(options.model, dtype="float32").eval(), models.load_tokenizer(options.model)
    rest = unread(options, tokenizer)
    rows = [measure(name, teacher, tokenizer, rest, options) for name in options.ways]
    harness.report("prune", rows, options.out)


def context_of(options: argparse.Namespace, stage: dict[str, Any]) -> Context:
    """The context of a prune stage on the teacher."""
    measures = set(stage) - {"layers"}
    data = {"data": str(options.traces), "positions": options.positions} if measures else {}
    config = {"kind": "prune", "model": "teacher", **stage, **data}
    tree = {"name": "b", "models": {"teacher": str(options.model)}, "stages": {"s": config}}
    return Context(recipe=recipe.validate(tree), run=options.out, name="s", screen=Screen(io.StringIO()))


def measure(
    name: str, teacher: Any, tokenizer: Any, rest: list[ProbeTrace], options: argparse.Namespace
) -> dict[str, Any]:
    """Prune a copy of the teacher as the stage does, round it to bfloat16, and compare it with the traces it has not read."""
    context, model = context_of(options, WAYS[name]), copy.deepcopy(teacher)
    stage: Any = context.recipe.stages["s"]
    began, processor = time.perf_counter(), time.process_time()
    if stage.measures:
        model, record, cost = prune.measured(model, stage, context, tokenizer)
    else:
        record, cost = {"layers_kept": models.prune_layers(model, stage.layers)}, Cost()
    seconds, processor = time.perf_counter() - began, time.process_time() - processor
    model = models.cast(model, "bfloat16").float()
    kl_N = np.array([mean_kl(model, make_probe([trace])) for trace in rest])
    positions_N = np.array([len(trace.completion_ids) for trace in rest])
    low, high = interval(kl_N, positions_N)
    row = {
        "way": name,
        "parameters": round(sum(p.numel() for p in model.parameters()) / 1e6, 1),
        "kl": float((kl_N * positions_N).sum() / positions_N.sum()),
        "low": low,
        "high": high,
        "seconds": seconds,
        "cpu seconds": processor,
        "tokens": cost.tokens_scored,
        "strength": str(record.get("repair", {}).get("strength", "")),
        "layers": " ".join(map(str, record["layers_kept"])) if stage.layers else "all",
    }
    print(row, flush=True)
    return row


def unread(options: argparse.Namespace, tokenizer: Any) -> list[ProbeTrace]:
    """MEASURED traces of those that no way of pruning reads."""
    context = context_of(options, {"layers": 24, "by": "importance"})
    stage: Any = context.recipe.stages["s"]
    read = {
        (trace.prompt_ids.tobytes(), trace.completion_ids.tobytes()) for trace in read_traces(stage, context, tokenizer)
    }
    found = []
    for block in open_traces(options.traces).blocks():
        for n in range(len(block)):
            prompt, completion = block.prompt_ids[n], block.completion_ids[n]
            starts = ((prompt.tobytes(), completion[:stop].tobytes()) for stop in range(1, len(completion) + 1))
            if read.isdisjoint(starts):
                found.append(ProbeTrace(prompt, completion, block.top_of(n)))
    return found[:MEASURED]


def interval(kl_N: Array, positions_N: Array) -> tuple[float, float]:
    rng = np.random.default_rng(0)
    picks = rng.integers(0, len(kl_N), (2000, len(kl_N)))
    means = (kl_N * positions_N)[picks].sum(1) / positions_N[picks].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


if __name__ == "__main__":
    main()
