"""grpo on two processes with a real vLLM engine beside each, trained with sharded weights."""

from __future__ import annotations

import pytest
from processes import REWARDS, base_tree, metrics, policy
from project import Project

from distill import engines
from distill.recipe import EngineConfig


@pytest.mark.slow
def test_every_engine_samples_with_the_weights_in_training(tiny_dir, tmp_path):
    if engines.expected(EngineConfig()) != "vllm":
        pytest.skip("vLLM is not installed")
    (tmp_path / "myrewards.py").write_text(REWARDS)
    engine = {"fn": "vllm", "dtype": "float32", "batch_size": 16}
    stage = policy(engine=engine, steps=4, lr=1e-3, distributed={"processes": 2, "strategy": "fsdp2"})
    project = Project(tmp_path, base_tree(tiny_dir, tiny_dir, {"rl": stage}))
    done = project.run_alone("--only", "rl")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = metrics(project, "rl")
    assert len(rows) == 4
    assert all(0 <= row["kl_engine"] < 1e-6 for row in rows)
    assert rows[-1]["kl_ref"] > 0
    assert project.state("rl")["metrics"]["completions"] == 4 * 12
    assert project.state("rl")["metrics"]["processes"] == 2


@pytest.mark.slow
def test_one_engine_split_over_two_workers_follows_the_trainer(tiny_dir, tmp_path):
    """Through the command line: weights leave the trainer's process for its engine's two at every step."""
    if engines.expected(EngineConfig()) != "vllm":
        pytest.skip("vLLM is not installed")
    (tmp_path / "myrewards.py").write_text(REWARDS)
    engine = {"fn": "vllm", "dtype": "float32", "batch_size": 16, "kv_cache_gib": 0.2, "tensor_parallel": 2}
    project = Project(tmp_path, base_tree(tiny_dir, tiny_dir, {"rl": policy(engine=engine, steps=3, lr=1e-3)}))
    done = project.run_alone("--only", "rl")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = metrics(project, "rl")
    assert len(rows) == 3
    assert all(0 <= row["kl_engine"] < 1e-6 for row in rows)
    assert rows[-1]["kl_ref"] > 0
