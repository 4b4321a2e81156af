"""The same numbers on one process and on two, for every kind of training and both strategies (two gloo processes)."""

from __future__ import annotations

import json
import subprocess

import pytest
from processes import (
    REWARDS,
    base_tree,
    begin,
    checkpoints,
    command,
    copy_run,
    environment,
    gaps,
    kill_all,
    policy,
    stage_process,
    training,
    wait_for,
)
from project import Project

from distill import models

LORA = {"lora": {"rank": 4}}
KINDS = {
    "ce": training(loss={"fn": "cross_entropy"}),
    "kl": training(),
    "online": training(loss={"fn": "reverse_kl"}, teacher="teacher"),
    "rl": policy(),
}
STAGES = {
    f"{kind}_{what}": {**stage, **extra}
    for kind, stage in KINDS.items()
    for what, extra in (("full", {}), ("lora", LORA))
}


@pytest.fixture(scope="module")
def other_dir(tiny_dir, tmp_path_factory):
    """The tiny model with weights of its own."""
    import torch

    model = models.load(tiny_dir, dtype="float32")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3)
    folder = tmp_path_factory.mktemp("other")
    models.save(model, models.load_tokenizer(tiny_dir), folder)
    return folder


@pytest.fixture(scope="module")
def runs(tiny_dir, other_dir, tmp_path_factory):
    """The same recipe on one process, and on two with each strategy."""
    found = {}
    for strategy in ("", "ddp", "fsdp2"):
        folder = tmp_path_factory.mktemp(strategy or "one")
        (folder / "myrewards.py").write_text(REWARDS)
        tree = base_tree(tiny_dir, other_dir, STAGES)
        if strategy:
            tree["distributed"] = {"processes": 2, "strategy": strategy}
        found[strategy] = project = Project(folder, tree)
        done = project.run("--only", "traces")
        assert done.returncode == 0, done.stdout + done.stderr
        stage_process(project, *STAGES, processes=2 if strategy else None)
    return found


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", STAGES)
def test_two_processes_give_the_numbers_of_one(runs, name, strategy):
    loss, weight = gaps(runs[""], runs[strategy], name)
    assert loss <= 1e-5
    assert weight <= 1e-5


def test_it_resumes_on_another_number_of_processes(runs, tmp_path):
    """A stage of two sharded processes, killed after a checkpoint, goes on with one, two and four."""
    whole = runs["fsdp2"]
    killed = Project(tmp_path / "killed", whole.tree)
    copy_run(whole, killed)
    begin(killed, "kl_full")
    process = subprocess.Popen(command(killed, "kl_full", processes=2), cwd=killed.folder, env=environment())
    wait_for(lambda: checkpoints(killed, "kl_full"), process)
    kill_all(process)
    for processes in (None, 2, 4):
        resumed = Project(tmp_path / f"on_{processes}", whole.tree)
        copy_run(killed, resumed)
        stage_process(resumed, "kl_full", processes=processes)
        first = json.loads((resumed.run_dir / "kl_full/metrics.jsonl").read_text().splitlines()[0])
        assert first == json.loads((killed.run_dir / "kl_full/metrics.jsonl").read_text().splitlines()[0])
        loss, weight = gaps(whole, resumed, "kl_full")
        assert (loss, weight) <= (1e-5, 1e-5)
        if processes == 2:
            assert (loss, weight) == (0, 0)
