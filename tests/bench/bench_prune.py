"""Untrained students of one teacher, pruned in several ways: their KL to it on traces that the pruning has not read.

    python tests/bench/bench_prune.py MODEL TRACES [--ways NAME ...] [--positions N] [--out DIR]

MODEL: the folder of a teacher. TRACES: a folder of shards that it wrote, with distributions; at least twice as many as the
pruning reads. Each way is a prune stage of its own, with the stage's own choice of traces; the seconds are the whole stage's
without its process start. The KL is to the stored distributions (entries and a tail bucket), a mean over positions, with an
interval of 95% over traces (bootstrap).
"""

from __future__ import annotations

import argparse
import io
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import harness
import numpy as np

from distill import models, recipe
from distill.models.prune_probe import ProbeTrace, make_probe, mean_kl
from distill.progress import Screen
from distill.records import Array
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
    "15 layers": {"layers": 15, "by": "importance"},
    "15 layers, repair": {"layers": 15, "by": "importance", "repair": True},
    "15 layers, even": {"layers": 15},
}
"""Ways to prune SmolLM2-135M; those of the first group have about the parameters of 24 of its 30 layers."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("traces", type=Path)
    parser.add_argument("--ways", nargs="*", default=list(WAYS))
    parser.add_argument("--positions", type=int, default=400)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(name, options, Path(folder)) for name in options.ways]
    harness.report("prune", rows, options.out)


def measure(name: str, options: argparse.Namespace, run: Path) -> dict[str, Any]:
    """Run one prune stage, and compare what it saved with the traces that it has not read."""
    config = {"kind": "prune", "model": "teacher", "positions": options.positions, **WAYS[name]}
    if set(config) & {"by", "repair", "ffn", "heads", "hidden"}:
        config["data"] = str(options.traces)
    else:
        del config["positions"]
    tree = {"name": "b", "models": {"teacher": str(options.model)}, "stages": {"s": config}}
    context = Context(recipe=recipe.validate(tree), run=run, name="s", screen=Screen(io.StringIO()))
    shutil.rmtree(context.folder, ignore_errors=True)
    context.folder.mkdir()
    began = time.perf_counter()
    stage: Any = context.recipe.stages["s"]
    result = prune.run(stage, context)
    seconds = time.perf_counter() - began
    model = models.load(context.folder / "model", dtype="float32").eval()
    kl_N, positions_N = held_out_kl(model, options, context)
    low, high = interval(kl_N, positions_N)
    row = {
        "way": name,
        "parameters": round(result.metrics["params"] / 1e6, 1),
        "kl": float((kl_N * positions_N).sum() / positions_N.sum()),
        "low": low,
        "high": high,
        "seconds": seconds,
        "forward passes, tokens": result.cost.tokens_scored,
        "repair strength": str(result.metrics.get("repair", {}).get("strength", "")),
        "layers": " ".join(map(str, result.metrics["layers_kept"])) if "layers" in config else "all",
    }
    print(row, flush=True)
    return row


def held_out_kl(model: Any, options: argparse.Namespace, context: Context) -> tuple[Array, Array]:
    """The mean KL and the number of positions of each trace that no way of pruning reads."""
    tokenizer = models.load_tokenizer(options.model)
    reading = {"kind": "prune", "model": "teacher", "layers": 24, "by": "importance", "data": str(options.traces)}
    tree = {
        "name": "b",
        "models": {"teacher": str(options.model)},
        "stages": {"s": {**reading, "positions": options.positions}},
    }
    resolved = recipe.validate(tree)
    whole: Any = resolved.stages["s"]
    read = read_traces(whole, Context(resolved, context.run, "s", context.screen), tokenizer)
    known = {(trace.prompt_ids.tobytes(), trace.completion_ids.tobytes()) for trace in read}
    found = []
    for block in open_traces(options.traces).blocks():
        for n in range(len(block)):
            prompt, completion = block.prompt_ids[n], block.completion_ids[n]
            if len(found) < MEASURED and not any(
                (prompt.tobytes(), completion[:stop].tobytes()) in known for stop in range(1, len(completion) + 1)
            ):
                probe = make_probe([ProbeTrace(prompt, completion, block.top_of(n))])
                found.append((mean_kl(model, probe), len(completion)))
    kl_N, positions_N = np.array(found).T
    return kl_N, positions_N


def interval(kl_N: Array, positions_N: Array) -> tuple[float, float]:
    rng = np.random.default_rng(0)
    picks = rng.integers(0, len(kl_N), (2000, len(kl_N)))
    means = (kl_N * positions_N)[picks].sum(1) / positions_N[picks].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


if __name__ == "__main__":
    main()
