"""A whole run on a tiny model through the real command line: run, skip, refuse, grow, kill, resume."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from needs import slowness
from project import REFERENCE, SUMS, Project

from distill import models, recipe, run_folder
from distill.machine import memory_bytes
from distill.records import UserError
from distill.run import decide, nodes
from distill.training.optim import learning_rate


def recipe_tree(tiny_dir: Path, other_dir: Path) -> dict:
    return {
        "name": "road",
        "models": {"base": str(tiny_dir), "other": str(other_dir)},
        "tasks": {"sums": SUMS},
        "stages": {
            "traces": {
                "kind": "generate",
                "model": "base",
                "task": "sums",
                "problems": 6,
                "sampling": {"max_tokens": 6},
                "top_logprobs": 8,
                "engine": REFERENCE,
            },
            "all": {
                "kind": "filter",
                "data": "traces",
                "keep": [{"fn": "length", "max_tokens": 100}],
            },
            "kl": {
                "kind": "train",
                "model": "other",
                "data": "all",
                "loss": {"fn": "forward_kl"},
                "keep_truncated": True,
                "steps": 6,
                "batch_traces": 3,
                "lr": 1e-3,
                "checkpoint_every": 2,
                "dtype": "float32",
            },
            "verdict": {
                "kind": "compare",
                "arms": {"start": "other", "kl": "kl"},
                "task": "sums",
                "problems": 4,
                "sampling": {"max_tokens": 6, "temperature": 0},
                "engine": REFERENCE,
            },
        },
    }


@pytest.fixture(scope="module")
def finished(tiny_dir, tmp_path_factory) -> Project:
    other = tmp_path_factory.mktemp("other")
    student = models.load(tiny_dir, dtype="float32")
    torch.manual_seed(1)
    for parameter in student.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    models.save(student, models.load_tokenizer(tiny_dir), other)
    project = Project(tmp_path_factory.mktemp("finished"), recipe_tree(tiny_dir, other))
    done = project.run()
    assert done.returncode == 0, done.stdout + done.stderr
    return project


@pytest.fixture
def copy(finished, tmp_path) -> Project:
    """A finished run for tests that change it."""
    shutil.copytree(finished.folder, tmp_path / "copy")
    return Project(tmp_path / "copy", finished.tree)


def test_the_report_holds_every_arm_with_its_interval_and_cost(finished):
    report = json.loads((finished.run_dir / "report.json").read_text())
    assert set(report["arms"]) == {"start", "kl"}
    for arm in report["arms"].values():
        assert set(arm["accuracy"]) >= {"value", "low", "high", "n"}
        assert arm["accuracy"]["n"] == 4
        assert 0 <= arm["accuracy"]["low"] <= arm["accuracy"]["value"] <= arm["accuracy"]["high"] <= 1
    kl = report["arms"]["kl"]
    assert kl["tokens"] > 0
    assert kl["flops"] > 0
    assert kl["seconds"] > 0
    assert report["arms"]["start"]["tokens"] == 0
    assert "held-out" in (finished.run_dir / "report.md").read_text()
    measured = {row["name"]: row for row in report["stages"]}
    for name in ("traces", "kl", "verdict.kl"):
        assert measured[name]["predicted"]["tokens"] > 0
        assert measured[name]["cost"]["flops"] > 0
        # More than an empty process with torch, and less than the machine's memory.
        assert 1e8 < measured[name]["metrics"]["peak_memory"] < memory_bytes()


def test_traces_hold_what_the_engine_saw_and_the_student_trains_on_it(finished):
    rows = finished.rows("traces")
    assert len(rows) == 6
    for row in rows:
        assert len(row["completion_ids"]) == len(row["logprob"]) == len(row["top_count"]) == 6
        assert len(row["top_ids"]) == len(row["top_steps"]) == sum(row["top_count"])
    losses = finished.losses("kl")
    assert len(losses) == 6
    assert losses[-1] < losses[0]


def test_again_everything_is_skipped_in_seconds(finished):
    began = time.monotonic()
    again = finished.run_alone()
    assert again.returncode == 0
    assert again.stdout.count("done already") == 6, again.stdout
    assert time.monotonic() - began < 60 * slowness()


def test_an_identity_field_is_refused_by_name_and_nothing_changes(copy):
    before = {path: path.read_bytes() for path in copy.run_dir.rglob("*.json")}
    refused = copy.run("stages.kl.lr=5e-4")
    assert refused.returncode == 2
    assert "lr: 0.001 -> 0.0005" in refused.stderr
    assert "--redo kl" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert {path: path.read_bytes() for path in copy.run_dir.rglob("*.json")} == before


def test_redo_does_the_stage_and_what_rests_on_it_and_keeps_the_former(copy):
    traces_before = copy.state("traces")
    redone = copy.run("--redo", "kl", "stages.kl.lr=5e-4")
    assert redone.returncode == 0, redone.stdout + redone.stderr
    assert copy.state("kl")["config"]["lr"] == 5e-4
    assert copy.state("traces") == traces_before
    assert "traces: done already" in redone.stdout
    assert "verdict.start: done already" in redone.stdout
    assert (copy.run_dir / ".old" / "kl-1" / "model").is_dir()


def test_an_execution_field_is_free_to_change(copy):
    free = copy.run("stages.kl.micro_tokens=64", "stages.traces.engine.batch_size=2")
    assert free.returncode == 0, free.stderr
    assert free.stdout.count("done already") == 6


def test_growth_adds_only_the_difference(copy):
    before = {row["trace_id"]: row for row in copy.rows("traces")}
    grown = copy.run("stages.traces.problems=8", "stages.traces.samples=2")
    assert grown.returncode == 0, grown.stdout + grown.stderr
    after = {row["trace_id"]: row for row in copy.rows("traces")}
    assert len(after) == 16
    assert all(after[trace_id] == row for trace_id, row in before.items())
    shrunk = copy.run("stages.traces.problems=3", "stages.traces.samples=2")
    assert shrunk.returncode == 2
    assert "problems: 8 -> 3" in shrunk.stderr


def test_growing_steps_goes_on_from_the_last_one(copy):
    before = copy.losses("kl")
    grown = copy.run("stages.kl.steps=9")
    assert grown.returncode == 0, grown.stdout + grown.stderr
    assert len(copy.losses("kl")) == 9
    assert copy.losses("kl")[:6] == before
    assert "the 3 steps that were added get a learning-rate schedule of their own" in grown.stdout
    config = yaml.safe_load((copy.run_dir / "resolved.yaml").read_text())["stages"]["kl"]
    schedule = {key: config[key] for key in ("lr", "warmup_ratio", "min_lr_ratio")}
    lines = [json.loads(line) for line in (copy.run_dir / "kl" / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        within, num = (line["step"] - 1, 6) if line["step"] <= 6 else (line["step"] - 7, 3)
        assert line["lr"] == pytest.approx(learning_rate(within, num_steps=num, **schedule)), line["step"]


def test_added_steps_that_are_killed_keep_their_schedule(copy, tmp_path):
    """Killed after the growth began, it goes on as if nothing had happened; a fresh longer run has another schedule."""
    (tmp_path / "whole").mkdir()
    whole = Project(tmp_path / "whole", copy.tree)
    shutil.copytree(copy.run_dir, whole.run_dir, dirs_exist_ok=True)
    assert whole.run("stages.kl.steps=40", "--only", "kl").returncode == 0
    copy.kill_when(
        lambda: any((copy.run_dir / "kl" / "checkpoints").glob("step-0000001*")), "stages.kl.steps=40", "--only", "kl"
    )
    assert len(copy.losses("kl")) < 40
    assert copy.run("stages.kl.steps=40", "--only", "kl").returncode == 0
    assert copy.losses("kl") == whole.losses("kl")
    rates = [json.loads(line)["lr"] for line in (copy.run_dir / "kl" / "metrics.jsonl").read_text().splitlines()]
    assert rates == [
        json.loads(line)["lr"] for line in (whole.run_dir / "kl" / "metrics.jsonl").read_text().splitlines()
    ]


@pytest.mark.fault(3)
def test_killed_in_generation_it_continues_to_the_same_rows(finished, tmp_path):
    project = Project(tmp_path, finished.tree)
    folder = tmp_path / "runs" / "road" / "traces" / "traces"
    project.kill_when(
        lambda: any(folder.glob("*.parquet")),
        "stages.traces.problems=200",
        "stages.traces.shard_rows=16",
        "--only",
        "traces",
    )
    killed_at = len(project.rows("traces"))
    assert 0 < killed_at < 200
    resumed = project.run("stages.traces.problems=200", "stages.traces.shard_rows=16", "--only", "traces")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    rows = project.rows("traces")
    assert len(rows) == len({row["trace_id"] for row in rows}) == 200
    whole = {row["trace_id"]: row for row in finished.rows("traces")}
    assert all(row == whole[row["trace_id"]] for row in rows if row["trace_id"] in whole)
    assert sum(row["trace_id"] in whole for row in rows) == 6


def test_killed_in_training_it_continues_to_the_same_metrics(copy, finished):
    shutil.rmtree(copy.run_dir / "kl")
    copy.kill_when(lambda: (copy.run_dir / "kl" / "checkpoints" / "step-00000002").is_dir(), "--only", "kl")
    assert copy.state("kl")["status"] == "running"
    resumed = copy.run()
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert copy.losses("kl") == finished.losses("kl")
    assert copy.state("kl")["fingerprint"] == finished.state("kl")["fingerprint"]
    assert "verdict.kl: done already" in resumed.stdout


def test_ctrl_c_says_how_to_go_on_and_the_same_command_does(finished, tmp_path):
    project = Project(tmp_path, finished.tree)
    folder = tmp_path / "runs" / "road" / "traces" / "traces"
    process = subprocess.Popen(
        project.command("run", "road.yaml", "stages.traces.problems=300", "stages.traces.shard_rows=8"),
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        # If the tests run in the background, child processes inherit an ignored SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    while not any(folder.glob("*.parquet")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "run the same command again" in errors
    assert "Traceback" not in errors
    assert 0 < len(project.rows("traces")) < 300


@pytest.mark.fault(6)
def test_two_runs_of_one_name_at_once_are_refused(copy):
    import filelock

    with filelock.FileLock(copy.run_dir / ".lock"):
        refused = copy.run()
    assert refused.returncode == 3
    assert "in use" in refused.stderr


def test_a_stage_alone_needs_its_inputs(finished, tmp_path):
    project = Project(tmp_path, finished.tree)
    refused = project.run("--only", "kl")
    assert refused.returncode == 2
    assert "needs 'all'" in refused.stderr
    assert not (project.run_dir / "kl").exists()


def test_dry_run_and_check_load_no_engine_and_write_nothing(finished, tmp_path):
    project = Project(tmp_path, finished.tree)
    for arguments in (("check", "road.yaml"), ("run", "road.yaml", "--dry-run")):
        done = project.distill(*arguments)
        assert done.returncode == 0, done.stderr
        assert "verdict.kl" in done.stdout
        assert "total" in done.stdout
    assert not project.run_dir.exists()
    probe = "import sys; sys.argv=['distill','check','road.yaml']; from distill import cli\ntry: cli.main()\nexcept SystemExit: pass\nprint(sorted({'vllm','datasets','peft'} & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", probe], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert loaded.stdout.strip().splitlines()[-1] == "[]"


def test_a_stage_that_failed_before_it_made_anything_takes_any_change(tmp_path):
    """After a wrong path or option is corrected, no --redo is needed."""
    tree = {
        "name": "x",
        "models": {"base": "some/model"},
        "stages": {"kl": {"kind": "train", "model": "base", "data": "./rows.jsonl", "steps": 1, "lr": 1e-3}},
    }
    before = recipe.validate(tree)
    (node,) = nodes.nodes(before)
    config = node.config.model_dump(mode="json")
    run_folder.write(tmp_path / "kl", run_folder.State("train", config, {}, status="failed", attempts=1))
    tree["stages"]["kl"]["lr"] = 1e-4
    after = recipe.validate(tree)
    (changed,) = nodes.nodes(after)
    assert decide.decide(changed, after, tmp_path).action == "run"
    (tmp_path / "kl" / "checkpoints" / "step-00000001").mkdir(parents=True)
    with pytest.raises(UserError, match=r"lr: 0\.001 -> 0\.0001"):
        decide.decide(changed, after, tmp_path)
