"""Stages of one run on one process and on several: gloo, torchrun, the stages' own process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from project import REFERENCE, SUMS, Project
from safetensors.torch import load_file

from distill import run_folder

REWARDS = '''
def even(group):
    """1 for an even number of letters, which a random model reaches half of the time."""
    return [float(len(text) % 2 == 0) for text in group.texts]
'''
STEPS = 8


def base_tree(tiny_dir: Path, teacher_dir: Path, stages: dict) -> dict:
    """Return a recipe that makes traces with `teacher` and trains `base` on them."""
    traces = {
        "kind": "generate",
        "model": "teacher",
        "task": "sums",
        "problems": 12,
        "samples": 2,
        "sampling": {"max_tokens": 12},
        "top_logprobs": 8,
        "engine": REFERENCE,
    }
    return {
        "name": "par",
        "models": {"base": str(tiny_dir), "teacher": str(teacher_dir)},
        "tasks": {"sums": SUMS},
        "stages": {"traces": traces, **stages},
    }


def training(**changes) -> dict:
    """Return a train stage of STEPS steps on the traces."""
    stage = {
        "kind": "train",
        "model": "base",
        "data": "traces",
        "loss": {"fn": "forward_kl"},
        "keep_truncated": True,
        "steps": STEPS,
        "batch_traces": 6,
        "micro_tokens": 128,
        "lr": 1e-3,
        "dtype": "float32",
        "checkpoint_every": 4,
    }
    return {**stage, **changes}


def policy(**changes) -> dict:
    """Return a grpo stage with a reference.

    Where a gradient is zero but for rounding, as that of the KL is at the start, Adam makes of the rounding an update of about
    lr; so lr is small.
    """
    stage = {
        "kind": "grpo",
        "model": "base",
        "task": "sums",
        "rewards": [{"fn": "myrewards:even"}],
        "objective": {"fn": "grpo", "beta": 0.05, "mask_truncated": False},
        "steps": STEPS,
        "prompts": 3,
        "group_size": 4,
        "sampling": {"max_tokens": 6},
        "engine": {"fn": "transformers", "dtype": "float32"},
        "dtype": "float32",
        "lr": 1e-4,
        "checkpoint_every": 4,
    }
    return {**stage, **changes}


def begin(project: Project, *names: str) -> None:
    """Write the stage.json that `distill run` writes before it starts a stage's process."""
    resolved = run_folder.recipe(project.run_dir)
    for name in names:
        config = resolved.stages[name]
        state = run_folder.read(project.run_dir / name) or run_folder.State(kind=config.kind, config={}, inputs={})
        state.config, state.status = config.model_dump(mode="json"), "running"
        (project.run_dir / name).mkdir(exist_ok=True)
        run_folder.write(project.run_dir / name, state)


def environment(**changes: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **changes}


def command(project: Project, *names: str, processes: int | None = None) -> list[str]:
    """Return the command that runs stages in one process, or under torchrun on several."""
    module = ["-m", "distill.run.stage_process", str(project.run_dir), *names]
    if processes is None:
        return [sys.executable, *module]
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [sys.executable, "-m", *launcher, *module]


def stage_process(project: Project, *names: str, processes: int | None = None) -> subprocess.CompletedProcess[str]:
    """Run stages to their ends in one process, or under torchrun on several."""
    begin(project, *names)
    done = subprocess.run(
        command(project, *names, processes=processes),
        cwd=project.folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr + failures(project)
    return done


def failures(project: Project) -> str:
    """Return what failed stages have written."""
    files = [*project.run_dir.glob("*/error*.txt"), *project.run_dir.glob("*/log*.txt")]
    return "\n".join(f"== {path}\n{path.read_text()[-3000:]}" for path in files)


def metrics(project: Project, stage: str) -> list[dict[str, float]]:
    lines = (project.run_dir / stage / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def losses(project: Project, stage: str) -> torch.Tensor:
    return torch.tensor([row["loss"] for row in metrics(project, stage)], dtype=torch.float64)


def weights(project: Project, stage: str) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted((project.run_dir / stage / "model").glob("*.safetensors")):
        found |= load_file(file)
    return found


def gaps(one: Project, other: Project, stage: str) -> tuple[float, float]:
    """Return the largest difference of a stage's losses in two runs, and of its weights."""
    mine, theirs = weights(one, stage), weights(other, stage)
    assert mine.keys() == theirs.keys()
    loss = float((losses(one, stage) - losses(other, stage)).abs().max())
    return loss, max(float((mine[n].double() - theirs[n].double()).abs().max()) for n in mine)


def checkpoints(project: Project, stage: str) -> list[Path]:
    return sorted((project.run_dir / stage / "checkpoints").glob("step-*"))


def copy_run(source: Project, folder: Path) -> Project:
    """Copy the traces and everything unfinished of a run to another folder."""
    folder.mkdir()
    target = Project(folder, source.tree)
    shutil.copytree(source.run_dir, target.run_dir, ignore=shutil.ignore_patterns(".lock", ".building*"))
    for model in target.run_dir.glob("*/model"):
        shutil.rmtree(model.parent)
    return target


def wait_for(ready: Callable[[], Any], process: subprocess.Popen[Any], seconds: float = 300) -> None:
    """Wait until ready() is true while a process runs."""
    until = time.monotonic() + seconds
    while not ready():
        assert process.poll() is None, f"ended with {process.returncode}"
        assert time.monotonic() < until
        time.sleep(0.02)


def kill_all(process: subprocess.Popen[Any]) -> None:
    """SIGKILL a process and all that it has started."""
    everyone = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for each in everyone:
        each.kill()
    process.wait()
    psutil.wait_procs(everyone, timeout=10)
