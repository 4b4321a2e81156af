"""Rollouts one ahead of the training against one after the other: learning curves over seeds, and the time that it would save.

The quickstart's teacher stage: SmolLM2-135M after a cold start learns short sums by GRPO, with `ahead` 0 and 1, engines in Ray
actors, in float32. final: reward over the last third of the steps, mean and 95% interval over the seeds (t distribution).
The two cores are shared by trainer and engines here, so the time with engines apart is computed from the measured parts of each
step: one after the other, generate + train; ahead, the larger of the two (simulated).

    python tests/bench/bench_ahead.py [--seeds 3] [--steps 18]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml
from harness import report
from scipy import stats

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


def recipe(seeds: int, steps: int) -> dict[str, object]:
    tree = yaml.safe_load((ROOT / "recipes" / "quickstart.yaml").read_text())
    cold, teacher = tree["stages"]["cold_start"], tree["stages"]["teacher"]
    engine = {"fn": "vllm", "dtype": "float32", "ray": "local", "replicas": 1, "batch_size": 48, "kv_cache_gib": 0.5}
    rl = {**teacher, "steps": steps, "dtype": "float32", "engine": engine, "seeds": list(range(1, seeds + 1))}
    stages = {
        "cold_start": {**cold, "steps": 24, "dtype": "float32"},
        "apart": rl,
        "ahead": {**rl, "ahead": 1},
    }
    return {**tree, "name": "bench_ahead", "stages": stages}


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half of its 95% interval."""
    half = (
        stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    )
    return statistics.mean(values), float(half)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=18)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "bench_ahead.yaml")
        path.write_text(yaml.safe_dump(recipe(options.seeds, options.steps), sort_keys=False))
        command = [sys.executable, "-m", "distill.cli", "run", str(path), "--runs", folder]
        subprocess.run(command, check=True, cwd=ROOT)
        rows: list[dict[str, object]] = []
        seconds = {}
        for name in ("apart", "ahead"):
            runs = [lines(Path(folder, "bench_ahead", f"{name}@{seed}")) for seed in range(1, options.seeds + 1)]
            third = max(1, options.steps // 3)
            first = interval([statistics.mean(line["reward"] for line in run[:third]) for run in runs])
            final = interval([statistics.mean(line["reward"] for line in run[-third:]) for run in runs])
            every = [line for run in runs for line in run[1:]]
            generate = statistics.median(line["generate_seconds"] + line.get("sync_seconds", 0.0) for line in every)
            whole = statistics.median(line["seconds"] for line in every)
            if name == "apart":
                seconds = {"generate": generate, "train": whole - generate}
            rows.append(
                {
                    "ahead": int(name == "ahead"), "first third": first[0], "+-": first[1], "final": final[0], "+- ": final[1],
                    "kl_engine": statistics.median(line["kl_engine"] for line in every), "seconds a step": whole,
                    "staleness": every[-1].get("staleness", 0.0),
                }
            )  # fmt: skip
        after = seconds["generate"] + seconds["train"]
        rows.append(
            {
                "simulated: generate s": seconds["generate"],
                "train s": seconds["train"],
                "ahead / apart": max(seconds.values()) / after,
            }
        )
        report("ahead", rows, HERE / "out")


if __name__ == "__main__":
    main()
