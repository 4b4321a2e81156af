"""What happens to a stage of two processes when one of them, its launcher or `distill run` itself is ended."""

from __future__ import annotations

import os
import signal
import subprocess
import time

import psutil
import pytest
from needs import slowness
from processes import base_tree, checkpoints, environment, training, wait_for
from project import Project


@pytest.fixture(scope="module")
def project(tiny_dir, tmp_path_factory):
    stage = training(steps=5000, checkpoint_every=5, distributed=2)
    project = Project(tmp_path_factory.mktemp("faults"), base_tree(tiny_dir, tiny_dir, {"kl": stage}))
    done = project.run("--only", "traces")
    assert done.returncode == 0, done.stdout + done.stderr
    return project


@pytest.fixture
def running(project):
    """`distill run` with two processes that train, some steps after where the last test left it."""
    before = step(project)
    process = subprocess.Popen(
        project.command("run", project.recipe.name, "--only", "kl"),
        cwd=project.folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        wait_for(lambda: step(project) >= before + 10, process)
        yield process
    finally:
        process.kill()
        process.communicate()


def step(project: Project) -> int:
    found = checkpoints(project, "kl")
    return int(found[-1].name.removeprefix("step-")) if found else 0


def family(process: subprocess.Popen[str]) -> tuple[psutil.Process, list[psutil.Process]]:
    """Return the launcher and the ranks."""
    (launcher,) = [p for p in psutil.Process(process.pid).children() if "distill.run.launch" in p.cmdline()]
    ranks = [p for p in launcher.children() if "distill.run.stage_process" in p.cmdline()]
    assert len(ranks) == 2
    return launcher, sorted(ranks, key=lambda p: int(p.environ()["RANK"]))


def ended(processes: list[psutil.Process], seconds: float) -> bool:
    return not psutil.wait_procs(processes, timeout=seconds)[1]


def test_sigterm_leaves_a_checkpoint_of_the_step(project, running):
    launcher, ranks = family(running)
    lines = len((project.run_dir / "kl/metrics.jsonl").read_text().splitlines())
    running.send_signal(signal.SIGTERM)
    out, _ = running.communicate(timeout=60)
    assert running.returncode == 143
    assert ended([launcher, *ranks], 5)
    assert f"keeps the checkpoint of step {step(project)} of 5000" in out
    assert lines <= step(project) == len((project.run_dir / "kl/metrics.jsonl").read_text().splitlines())


def test_a_killed_rank_ends_all_and_its_log_is_named(project, running):
    launcher, ranks = family(running)
    os.kill(ranks[1].pid, signal.SIGKILL)
    began = time.monotonic()
    out, _ = running.communicate(timeout=60)
    assert time.monotonic() - began < 5 * slowness()
    assert running.returncode == 1
    assert ended([launcher, *ranks], 5)
    assert "process 1 of 2 was ended by SIGKILL" in out
    assert out.count("log-1.txt") == 2


@pytest.mark.parametrize("who", ["launcher", "parent"])
def test_nothing_is_left_when_a_starter_is_killed(project, running, who):
    launcher, ranks = family(running)
    os.kill(launcher.pid if who == "launcher" else running.pid, signal.SIGKILL)
    out, _ = running.communicate(timeout=60)
    assert ended([launcher, *ranks], 5)
    if who == "launcher":
        assert running.returncode == 1
        assert "stage 'kl' failed" in out


def test_under_torchrun_it_refuses_at_once(project):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "distill.cli"]
    began = time.monotonic()
    done = subprocess.run(
        [project.command()[0], *command, "run", project.recipe.name],
        cwd=project.folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode != 0
    assert time.monotonic() - began < 10 * slowness()
    assert done.stderr.count("start distill once, without torchrun") == 1
