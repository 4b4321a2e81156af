"""dtype: auto through the real command line: chosen by the machine's rates, printed, recorded, and kept on resume."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from project import SUMS, Project
from safetensors import safe_open

from distill import machine
from distill.machine import Machine, Rates
from distill.traces.schema import metadata_of


def pretend(run: Path, faster: str) -> None:
    """Write into the run's environment.json that one dtype is ten times faster than the other."""
    rates = {dtype: Rates(*[1e11 if dtype == faster else 1e10] * 4) for dtype in ("float32", "bfloat16")}
    here = Machine(machine.key(), "cpu", "made up", 2, 2**35, 1e10, {"32x64": rates})
    run.mkdir(parents=True, exist_ok=True)
    (run / "environment.json").write_text(json.dumps({"machine": asdict(here)}))


def saved_dtypes(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118


@pytest.fixture
def project(tiny_dir: Path, tmp_path: Path) -> Project:
    tree = {
        "name": "auto",
        "models": {"base": str(tiny_dir)},
        "tasks": {"sums": SUMS},
        "stages": {
            "sft": {
                "kind": "train", "model": "base", "task": "sums", "lr": 1e-3,
                "data": "data/cold_start/sums.jsonl",
                "loss": {"fn": "cross_entropy"}, "steps": 2, "batch_traces": 4, "checkpoint_every": 1,
            },
            "score": {
                "kind": "eval", "model": "sft", "task": "sums", "problems": 4,
                "sampling": {"max_tokens": 4}, "engine": {"fn": "transformers"},
            },
        },
    }  # fmt: skip
    return Project(tmp_path, tree)


@pytest.mark.parametrize("faster", ["float32", "bfloat16"])
def test_the_faster_dtype_is_used_said_and_recorded_and_the_model_saved_in_bfloat16(
    project: Project, faster: str
) -> None:
    pretend(project.run_dir, faster)
    done = project.run()
    assert done.returncode == 0, done.stdout + done.stderr
    why = {
        "float32": "measured at width 32x64: bfloat16 10, float32 100 GFLOP/s",
        "bfloat16": "measured at width 32x64: bfloat16 100, float32 10 GFLOP/s",
    }[faster]
    assert f"dtype {faster}: {why}" in done.stdout
    assert project.state("sft")["decided"]["dtype"] == {"value": faster, "why": why}
    assert project.state("score")["decided"]["engine.dtype"]["value"] == faster
    shard = next((project.run_dir / "score/traces").glob("*.parquet"))
    assert metadata_of(pq.read_schema(shard), str(shard)).dtype == faster
    assert saved_dtypes(project.run_dir / "sft/model") == {"BF16"}
    assert f"{faster}: {why}" in (project.run_dir / "sft/model/README.md").read_text()
    report = json.loads((project.run_dir / "report.json").read_text())
    assert [stage["dtype"] for stage in report["stages"]] == [faster, faster]
    assert f"dtype {faster} ({why}): sft" in " ".join(report["notes"])
    environment = json.loads((project.run_dir / "environment.json").read_text())
    assert environment["machine"]["name"] == "made up"


def test_a_stage_goes_on_in_its_dtype_on_a_machine_that_would_take_the_other(
    project: Project,
) -> None:
    pretend(project.run_dir, "float32")
    assert project.run().returncode == 0
    begun = project.losses("sft")
    pretend(project.run_dir, "bfloat16")
    assert "done already" in project.run().stdout
    grown = project.run("stages.sft.steps=3", "--only", "sft")
    assert grown.returncode == 0, grown.stdout + grown.stderr
    assert "dtype float32: as this stage began" in grown.stdout
    assert project.state("sft")["decided"]["dtype"]["value"] == "float32"
    assert project.losses("sft")[:2] == begun
    said = project.run("stages.sft.steps=3", "stages.sft.dtype=float32", "--only", "sft")
    assert "done already" in said.stdout
    other = project.run("stages.sft.steps=3", "stages.sft.dtype=bfloat16", "--only", "sft")
    assert other.returncode == 2
    assert 'dtype: "float32" -> "bfloat16"' in other.stderr
    again = project.run("stages.sft.steps=3", "--only", "sft", "--redo", "sft")
    assert again.returncode == 0, again.stdout + again.stderr
    assert project.state("sft")["decided"]["dtype"]["value"] == "bfloat16"


def test_a_dtype_said_by_hand_is_obeyed_with_its_price_and_an_unknown_one_refused(
    project: Project,
) -> None:
    pretend(project.run_dir, "float32")
    done = project.run("stages.sft.dtype=bfloat16", "--only", "sft")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "10 times slower here than float32" in done.stdout
    wide = project.run("stages.sft.dtype=float32", "stages.sft.seed=5", "--only", "sft", "--redo", "sft")
    assert wide.returncode == 0, wide.stdout + wide.stderr
    assert saved_dtypes(project.run_dir / "sft/model") == {"F32"}
    wrong = project.run("stages.sft.dtype=bfloat")
    assert wrong.returncode == 2
    assert "stages.sft.dtype: there is no dtype 'bfloat'. Did you mean 'bfloat16'?" in wrong.stderr
