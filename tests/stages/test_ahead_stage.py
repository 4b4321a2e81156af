"""grpo with engines apart, through the command line: ahead of the training, killed and resumed, and over two processes."""

from __future__ import annotations

import json

import pytest
from project import SUMS, Project

pytest.importorskip("ray", reason="Ray is not installed")
pytestmark = pytest.mark.slow

REWARD = '''
def even(group):
    """1 for an even number of letters, which a random model reaches half of the time."""
    return [float(len(text) % 2 == 0) for text in group.texts]
'''
TIMED = ("seconds", "tokens_per_second")


def project(folder, tiny_dir, **fields) -> Project:
    stage = {
        "kind": "grpo", "model": "base", "task": "sums", "rewards": [{"fn": "myrewards:even"}],
        "objective": {"fn": "grpo", "beta": 0, "mask_truncated": False}, "steps": 4, "prompts": 4, "group_size": 4,
        "sampling": {"max_tokens": 6}, "dtype": "float32", "lr": 1e-3, "checkpoint_every": 1, "ahead": 1,
        "engine": {"fn": "transformers", "dtype": "float32", "replicas": 2, "ray": "local", "batch_size": 8},
        **fields,
    }  # fmt: skip
    tree = {"name": "rl", "models": {"base": str(tiny_dir)}, "tasks": {"sums": SUMS}, "stages": {"rl": stage}}
    made = Project(folder, tree)
    (folder / "myrewards.py").write_text(REWARD)
    return made


def lines(made: Project) -> list[dict]:
    path = made.run_dir / "rl" / "metrics.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [{key: value for key, value in line.items() if not key.endswith(TIMED)} for line in found]


@pytest.fixture(scope="module")
def whole(tiny_dir, tmp_path_factory) -> list[dict]:
    made = project(tmp_path_factory.mktemp("whole"), tiny_dir)
    ran = made.run_alone()
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return lines(made)


def test_a_killed_run_goes_on_with_the_rollout_that_was_under_way(whole, tiny_dir, tmp_path):
    assert [line["staleness"] for line in whole] == [0.0, 1.0, 1.0, 1.0]
    made = project(tmp_path, tiny_dir)
    checkpoints = made.run_dir / "rl" / "checkpoints"
    made.kill_when(lambda: (checkpoints / "step-00000002").exists())
    before = len(lines(made))
    ran = made.run_alone()
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert 2 <= before < 4
    assert lines(made) == whole


def test_two_processes_with_an_engine_each(whole, tiny_dir, tmp_path):
    """The same rollouts, split over two processes whose threads exchange them beside the training's messages."""
    made = project(tmp_path, tiny_dir, distributed=2)
    ran = made.run_alone()
    assert ran.returncode == 0, ran.stdout + ran.stderr
    for mine, theirs in zip(lines(made), whole, strict=True):
        assert mine["reward"] == theirs["reward"]
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert mine["staleness"] == theirs["staleness"]
