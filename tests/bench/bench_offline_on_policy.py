"""On-policy distillation from stored traces against the live stage: accuracy, held-out KL, and time.

    python tests/bench/bench_offline_on_policy.py [--seeds 1 2 3] [--problems 256]

The start of `recipes/offline_on_policy.yaml` is trained in three ways, each with every training seed: live (24 steps of
`recipes/on_policy.yaml`, each on 16 new completions), offline (one round: 192 completions generated and scored ahead, 12 steps), and
offline2 (a second round, on new completions of the same problems by the first round's student). All are evaluated on the same problems, and on the teacher's
held-out traces. Time is that of an arm's own stages (generate, score, train), processes and engines included.

The run is kept in tests/bench/out and resumed; delete it to measure anew.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import harness
import yaml

from distill import recipe, run_folder
from distill.run import nodes, pipeline

OUT = Path(__file__).parent / "out"
RECIPES = Path(__file__).parents[2] / "recipes"
ARMS = {"live": ["live"], "offline": ["own1", "scored1", "round1"], "offline2": ["own1", "scored1", "round1", "own2", "scored2", "round2"]}  # fmt: skip


def tree(seeds: list[int], problems: int) -> dict[str, Any]:
    """The recipe with the live stage beside its rounds, and training seeds."""
    given: dict[str, Any] = yaml.safe_load((RECIPES / "offline_on_policy.yaml").read_text(encoding="utf-8"))
    live = yaml.safe_load((RECIPES / "on_policy.yaml").read_text(encoding="utf-8"))["stages"]["on_policy"]
    given["name"] = "offline-on-policy"
    stages = given["stages"]
    stages["live"] = {**live, "seeds": seeds}
    stages["own1"]["seeds"] = seeds
    del stages["own2"]["seed"]  # a copy has its training seed: the second round answers the same problems anew
    stages["verdict"] |= {
        "arms": {"start": "start", "teacher": "teacher", "live": "live", "offline": "round1", "offline2": "round2"},
        "problems": problems,
    }
    stages["verdict"] = stages.pop("verdict")
    return given


def seconds(run: Path, stage: str) -> float:
    standing = run_folder.read(run / stage)
    assert standing is not None
    return standing.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--problems", type=int, default=256)
    asked = parser.parse_args()
    run = OUT / "offline-on-policy"
    source = OUT / "offline-on-policy.yaml"
    OUT.mkdir(exist_ok=True)
    source.write_text(yaml.safe_dump(tree(asked.seeds, asked.problems), sort_keys=False), encoding="utf-8")
    resolved = recipe.load(source)
    pipeline.Runner(resolved, source, run).do(nodes.nodes(resolved))
    verdict = run_folder.read(run / "verdict")
    assert verdict is not None
    rows = []
    for arm in ("start", "teacher", *ARMS):
        scores = verdict.metrics["arms"].get(arm)
        if scores is None:
            one = run_folder.read(run / f"verdict.{arm}")
            assert one is not None
            scores = one.metrics
        accuracy, kl = scores["accuracy"], verdict.metrics["divergence"][arm]["kl"]
        took = sum(seconds(run, f"{stage}@{seed}") for seed in asked.seeds for stage in ARMS.get(arm, []))
        live = sum(seconds(run, f"live@{seed}") for seed in asked.seeds)
        rows.append(
            {
                "arm": arm,
                "accuracy %": 100 * accuracy["value"], "from": 100 * accuracy["low"], "to": 100 * accuracy["high"],
                "KL": kl["value"], "KL from": kl["low"], "KL to": kl["high"],
                "seconds a seed": took / len(asked.seeds), "time / live": took / live,
            }
        )  # fmt: skip
    harness.report("offline_on_policy", rows, OUT)
    pairs = [row for row in verdict.metrics["comparisons"] if {row["a"], row["b"]} <= {*ARMS}]
    print(json.dumps(pairs, indent=1))


if __name__ == "__main__":
    main()
