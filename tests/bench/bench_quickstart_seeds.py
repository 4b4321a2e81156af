"""Do the quickstart's students tell the same story with every training seed? Accuracy and held-out KL by arm and seed.

The recipe's own teacher, traces and start, made once; its student arms are trained with `--seeds` training seeds each, and
everything is evaluated on the same held-out problems and traces. SD: over the seeds. Differences are over seeds and problems (or
traces), paired. Run it again with the same --runs to add seeds; a run with another dtype needs another folder.

    python tests/bench/bench_quickstart_seeds.py [--seeds 5] [--dtype float32] [--runs DIR] [KEY=VALUE ...]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from harness import report

ROOT = Path(__file__).parent.parent.parent
RECIPE = "recipes/quickstart.yaml"


def students() -> list[str]:
    """The arms of the verdict that training stages of their own made."""
    tree = yaml.safe_load((ROOT / RECIPE).read_text(encoding="utf-8"))
    arms = tree["stages"]["verdict"]["arms"]
    start = tree["stages"][arms["start"]]
    own = {name: tree["stages"][model] for name, model in arms.items() if model != start["model"]}
    return [arms[name] for name, stage in own.items() if stage["kind"] == "train"]


def by_seed(arms: dict[str, Any]) -> list[dict[str, object]]:
    """A row per arm: its accuracy in points with each seed, their mean and SD, the share of the teacher's, and its KL."""
    teacher = arms["teacher"]["accuracy"]["value"]
    rows: list[dict[str, object]] = []
    for name, arm in arms.items():
        values = [one["accuracy"]["value"] for one in arm.get("by_seed", [])] or [arm["accuracy"]["value"]]
        row: dict[str, object] = {"arm": name, "accuracy": 100 * statistics.mean(values)}
        row["SD"] = 100 * statistics.stdev(values) if len(values) > 1 else ""
        row["of the teacher"] = statistics.mean(values) / teacher
        if "divergence" in arm:
            kl = arm["divergence"]["kl"]
            row |= {"KL": kl["value"], "KL low": kl["low"], "KL high": kl["high"]}
        rows.append(row | {f"seed {n}": 100 * value for n, value in enumerate(values, 1) if len(values) > 1})
    return rows


def differences(found: dict[str, Any]) -> list[dict[str, object]]:
    """A row per pair of students: the difference in accuracy, in points, and in held-out KL, in nats a token."""
    names = set(students())
    kl = {(row["a"], row["b"]): row["difference"] for row in found.get("divergence_pairs", [])}
    rows: list[dict[str, object]] = []
    for pair in found["comparisons"]:
        if {pair["a"], pair["b"]} <= names:
            points = {key: 100 * pair["difference"][key] for key in ("value", "low", "high")}
            row = {
                "pair": f"{pair['a']} - {pair['b']}",
                "points": points["value"],
                "low": points["low"],
                "high": points["high"],
            }
            if (pair["a"], pair["b"]) in kl:
                one = kl[pair["a"], pair["b"]]
                row |= {"KL": one["value"], "KL low": one["low"], "KL high": one["high"]}
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--dtype", choices=["auto", "bfloat16", "float32"], default="auto", help="of the students' training"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/bench_quickstart_seeds"))
    parser.add_argument("overrides", nargs="*", help="more fields of the recipe, as for distill run")
    options = parser.parse_args()
    seeds = f"[{', '.join(str(seed) for seed in range(1, options.seeds + 1))}]"
    fields = [
        f"stages.{arm}.{field}"
        for arm in students()
        for field in (f"seeds={seeds}", f"dtype={options.dtype}", "keep_checkpoints=0")
    ]
    command = [sys.executable, "-m", "distill.cli", "run", RECIPE, "--runs", str(options.runs.resolve())]
    subprocess.run([*command, *fields, *options.overrides], check=True, cwd=ROOT)
    found = json.loads((options.runs / "quickstart" / "report.json").read_text(encoding="utf-8"))
    report("quickstart_seeds", by_seed(found["arms"]), options.runs)
    report("quickstart_differences", differences(found), options.runs)


if __name__ == "__main__":
    main()
