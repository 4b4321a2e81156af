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
    metrics,
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
ON_POLICY = {
    "kind": "on_policy",
    "model": "base",
    "teacher": "teacher",
    "task": "sums",
    "loss": {"fn": "reverse_kl"},
    "steps": 4,
    "prompts": 3,
    "group_size": 2,
    "sampling": {"max_tokens": 6},
    "engine": {"fn": "transformers", "dtype": "float32"},
    "dtype": "float32",
    "lr": 1e-4,
}
VARIANTS = {
    "bfloat16": ("fsdp2", training(dtype="bfloat16")),
    "recomputed": ("fsdp2", training(gradient_checkpointing=True)),
    "offloaded": ("fsdp2", training()),
    "asynchronous": ("fsdp2", training(async_checkpoints=True, checkpoint_every=3)),
    "best": ("fsdp2", training(metric_for_best_model="loss", load_best_model_at_end=True, checkpoint_every=4)),
    "learned": ("ddp", training(weights={"fn": "entropy", "share": 0.5}, normalise="sequence")),
    "chosen": ("fsdp2", training(weights={"fn": "divergence", "share": 0.3})),
    "matched": ("fsdp2", training(loss={"fn": "reverse_kl"}, teacher="teacher", hidden={"weight": 0.5})),
    "on_policy": ("ddp", ON_POLICY),
    "on_policy_engine": ("fsdp2", {**ON_POLICY, "scoring": "engine", "top_logprobs": 8, "steps": 1}),
    "mini_batches": ("fsdp2", policy(mini_batches=2, num_iterations=2, steps=8, prompts=2, snapshot_every=8)),
}
"""Stages with a strategy to try beside the four kinds. A completion is sampled by comparing a random number with rounded sums
of probabilities, so now and then another token is sampled after an update; the comparison then ends."""


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
        tree = base_tree(tiny_dir, other_dir, {**STAGES, **{name: stage for name, (_, stage) in VARIANTS.items()}})
        if strategy:
            tree["distributed"] = {"processes": 2, "strategy": strategy}
            tree["stages"]["offloaded"]["distributed"] = {"processes": 2, "strategy": "fsdp2", "offload": True}
        found[strategy] = project = Project(folder, tree)
        done = project.run("--only", "traces")
        assert done.returncode == 0, done.stdout + done.stderr
        variants = [name for name, (wanted, _) in VARIANTS.items() if not strategy or wanted == strategy]
        stage_process(project, *STAGES, *variants, processes=2 if strategy else None)
    return found


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", STAGES)
def test_two_processes_give_the_numbers_of_one(runs, name, strategy):
    loss, weight = gaps(runs[""], runs[strategy], name)
    assert loss <= 1e-5
    assert weight <= 1e-5


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_give_the_numbers_of_one_process(runs, name):
    loss, weight = gaps(runs[""], runs[VARIANTS[name][0]], name)
    limit = 2e-2 if name == "bfloat16" else 1e-5
    assert loss <= limit
    assert weight <= limit


def test_what_is_reported_is_over_all_processes(runs):
    one, two = runs[""].state("kl_full"), runs["fsdp2"].state("kl_full")
    assert two["cost"]["tokens_trained"] == pytest.approx(one["cost"]["tokens_trained"], rel=0.3)
    assert two["metrics"]["processes"] == 2
    memory = two["metrics"]["peak_memory_of_processes"]
    assert two["metrics"]["peak_memory"] == max(memory)
    assert min(memory) > 0
    assert (runs["fsdp2"].run_dir / "kl_full/log-1.txt").is_file()
    assert len(metrics(runs["fsdp2"], "rl_full")) == len(metrics(runs[""], "rl_full"))
    for key in ("reward", "length", "entropy", "correct"):
        mine, theirs = ([row[key] for row in metrics(runs[which], "rl_full")] for which in ("", "fsdp2"))
        assert mine == pytest.approx(theirs, abs=1e-6)


def test_it_resumes_on_another_number_of_processes(runs, tmp_path):
    """A stage of two sharded processes, killed after a checkpoint, goes on with one, two and four."""
    whole = runs["fsdp2"]
    killed = copy_run(whole, tmp_path / "killed")
    begin(killed, "kl_full")
    process = subprocess.Popen(command(killed, "kl_full", processes=2), cwd=killed.folder, env=environment())
    wait_for(lambda: checkpoints(killed, "kl_full"), process)
    kill_all(process)
    for processes in (None, 2, 4):
        resumed = copy_run(killed, tmp_path / f"on_{processes}")
        stage_process(resumed, "kl_full", processes=processes)
        first = json.loads((resumed.run_dir / "kl_full/metrics.jsonl").read_text().splitlines()[0])
        assert first == json.loads((killed.run_dir / "kl_full/metrics.jsonl").read_text().splitlines()[0])
        loss, weight = gaps(whole, resumed, "kl_full")
        assert (loss, weight) <= (1e-5, 1e-5)
        if processes == 2:
            assert (loss, weight) == (0, 0)
