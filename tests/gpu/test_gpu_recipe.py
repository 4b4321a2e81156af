"""Whole recipes on a GPU with the transformers engine, through the real command line, on the tiny model."""

from __future__ import annotations

import json
import math

from project import SUMS, Project

ENGINE = {"fn": "transformers"}
REWARDS = '''
def even(group):
    """An even number of letters."""
    return [float(len(text) % 2 == 0) for text in group.texts]
'''


def tree(tiny_dir):
    train = {"kind": "train", "model": "base", "data": "kept", "steps": 4, "batch_traces": 6, "lr": 1e-3}
    rollout = {
        "model": "base", "task": "sums", "steps": 2, "prompts": 2, "group_size": 4,
        "sampling": {"max_tokens": 6}, "engine": ENGINE, "lr": 1e-3,
    }  # fmt: skip
    taught = {**rollout, "kind": "on_policy", "teacher": "sft"}
    return {
        "name": "gpu",
        "models": {"base": str(tiny_dir)},
        "tasks": {"sums": SUMS},
        "stages": {
            "traces": {
                "kind": "generate", "model": "base", "task": "sums", "problems": 12,
                "sampling": {"max_tokens": 6}, "top_logprobs": 8, "engine": ENGINE,
            },
            "kept": {"kind": "filter", "data": "traces", "keep": [{"fn": "length", "max_tokens": 100}]},
            "sft": {**train, "loss": {"fn": "cross_entropy"}, "keep_truncated": True},
            "kl": {**train, "loss": {"fn": "forward_kl"}, "keep_truncated": True},
            "online": {**train, "loss": {"fn": "jsd"}, "teacher": "sft", "keep_truncated": True},
            "lora": {**train, "loss": {"fn": "forward_kl"}, "keep_truncated": True, "lora": {"rank": 4}},
            "scored": {"kind": "score", "model": "sft", "data": "kept", "top_logprobs": 8, "engine": ENGINE},
            "beside": {**taught, "loss": {"fn": "reverse_kl"}},
            "asked": {**taught, "scoring": "engine", "top_logprobs": 8},
            "rl": {
                **rollout, "kind": "grpo", "rewards": [{"fn": "myrewards:even"}], "mini_batches": 2,
                "objective": {"fn": "grpo", "beta": 0.01, "mask_truncated": False},
            },
            "verdict": {
                "kind": "compare", "arms": {"start": "base", "kl": "kl", "rl": "rl"}, "task": "sums", "problems": 4,
                "sampling": {"max_tokens": 6, "temperature": 0}, "engine": ENGINE,
            },
        },
    }  # fmt: skip


def test_every_kind_of_stage_in_bfloat16(tiny_dir, tmp_path):
    (tmp_path / "myrewards.py").write_text(REWARDS)
    project = Project(tmp_path, tree(tiny_dir))
    done = project.run_alone()
    assert done.returncode == 0, done.stdout + done.stderr
    for stage in ("sft", "kl", "online", "lora", "beside", "asked", "rl"):
        losses = project.losses(stage)
        assert all(math.isfinite(loss) for loss in losses), stage
        config = json.loads((project.run_dir / stage / "model" / "config.json").read_text())
        assert config["dtype"] == "bfloat16", stage
    assert len(project.rows("traces")) == 12
    assert (project.run_dir / "report.json").is_file()
    again = project.run_alone()
    assert again.returncode == 0, again.stdout + again.stderr
