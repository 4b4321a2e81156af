"""Evaluations of one comparison share a process and its engine; each gives the same results as alone."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
import torch
from project import SUMS, Project
from safetensors.torch import load_file, save_file

from distill import models
from distill.recipe import EngineConfig
from distill.stages.shared_engine import SharedEngine


@pytest.fixture(scope="module")
def deeper_dir(tiny_dir: Path, tokenizer, tmp_path_factory) -> Path:
    """The tiny model with three layers."""
    from transformers import AutoConfig, LlamaForCausalLM

    torch.manual_seed(9)
    config = AutoConfig.from_pretrained(tiny_dir)
    config.num_hidden_layers = 3
    folder = tmp_path_factory.mktemp("deeper")
    models.save(LlamaForCausalLM(config), tokenizer, folder)
    return folder


def compare_tree(tiny_dir: Path, other_dir: Path, deeper_dir: Path, engine: dict) -> dict:
    return {
        "name": "shared",
        "models": {"tiny": str(tiny_dir), "other": str(other_dir), "deeper": str(deeper_dir)},
        "tasks": {"sums": SUMS},
        "stages": {
            "verdict": {
                "kind": "compare", "task": "sums", "problems": 4, "engine": engine,
                "arms": {"tiny": "tiny", "other": "other", "deeper": "deeper", "again": "tiny"},
                "sampling": {"max_tokens": 6, "temperature": 0},
            }
        },
    }  # fmt: skip


ENGINES = [
    {"fn": "transformers", "dtype": "float32"},
    pytest.param({"fn": "vllm", "dtype": "float32"}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("engine", ENGINES, ids=["transformers", "vllm"])
def test_arms_in_one_process_write_what_they_write_alone(
    tiny_dir: Path, other_dir: Path, deeper_dir: Path, tmp_path: Path, engine: dict
) -> None:
    tree = compare_tree(tiny_dir, other_dir, deeper_dir, engine)
    done = Project(tmp_path, tree).run_alone()
    assert done.returncode == 0, done.stdout + done.stderr
    # tiny and other share one engine; deeper has another architecture, and `again` comes after it.
    assert done.stdout.count("engine for 4 completions") == 3
    together = Project(tmp_path, tree)
    written = {}
    for arm, model in tree["stages"]["verdict"]["arms"].items():
        rows = together.rows(f"verdict.{arm}")
        written[arm] = {row["problem_id"]: row["completion_ids"] for row in rows}
        assert together.state(f"verdict.{arm}")["status"] == "done"
        assert together.state(f"verdict.{arm}")["seconds"] > 0
        assert (together.run_dir / f"verdict.{arm}/log.txt").is_file()
        if engine["fn"] == "vllm" and arm != "other":
            continue  # its engines are slow to start; the engine of `other` had another model's weights before
        one = {**tree, "name": f"alone_{arm}"}
        one["stages"] = {
            "score": {
                **{k: v for k, v in tree["stages"]["verdict"].items() if k != "arms"},
                "kind": "eval", "model": model,
            }
        }  # fmt: skip
        alone = Project(tmp_path, one)
        ended = alone.run()
        assert ended.returncode == 0, ended.stdout + ended.stderr
        assert written[arm] == {row["problem_id"]: row["completion_ids"] for row in alone.rows("score")}
    assert written["tiny"] == written["again"]
    assert len({json.dumps(rows, sort_keys=True) for rows in written.values()}) == 3


def test_an_arm_that_fails_is_the_one_that_is_named_and_the_others_keep_what_they_have(
    tiny_dir: Path, other_dir: Path, deeper_dir: Path, tmp_path: Path
) -> None:
    engine = {"fn": "transformers", "dtype": "float32"}
    tree = compare_tree(tiny_dir, other_dir, deeper_dir, engine)
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in other_dir.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    tree["models"]["other"] = str(broken)
    project = Project(tmp_path, tree)

    def spoil() -> None:
        """Break the model once the first arm is under way: what is broken before is refused before the run."""
        while not (project.run_dir / "verdict.tiny/stage.json").exists():
            time.sleep(0.01)
        weights = load_file(broken / "model.safetensors")
        weights.pop("model.norm.weight")
        save_file(weights, tmp_path / "spoilt.safetensors", metadata={"format": "pt"})
        (tmp_path / "spoilt.safetensors").replace(broken / "model.safetensors")

    spoiling = threading.Thread(target=spoil, daemon=True)
    spoiling.start()
    failed = project.run()
    spoiling.join(1)
    assert failed.returncode == 4
    assert "the checkpoint lacks 1 weights, which would be random (model.norm.weight)" in failed.stderr
    assert project.state("verdict.tiny")["status"] == "done"
    assert project.state("verdict.deeper")["status"] == "failed"
    tree["models"]["other"] = str(other_dir)
    again = Project(tmp_path, tree).run()
    assert again.returncode == 0, again.stdout + again.stderr
    assert "verdict.tiny: done already" in again.stdout


def test_an_engine_serves_only_what_it_was_started_for(tiny_dir: Path, deeper_dir: Path) -> None:
    config = EngineConfig(fn="reference")
    one = SharedEngine()
    engine = one.open(config, tiny_dir, max_model_len=64, max_top_k=0)
    assert one.serves(config, tiny_dir, 0, 64)
    assert one.open(config, tiny_dir, max_model_len=32, max_top_k=0) is engine
    assert not one.serves(config, tiny_dir, 0, 65)
    assert not one.serves(config, tiny_dir, 4, 64)
    assert not one.serves(config, deeper_dir, 0, 64)
    assert not one.serves(config.model_copy(update={"batch_size": 3}), tiny_dir, 0, 64)
    one.close()
    assert not one.serves(config, tiny_dir, 0, 64)
