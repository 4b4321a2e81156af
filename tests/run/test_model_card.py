"""Model cards of a run, read by the hub's library, and the upload to the hub without the network call."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from needs import slowness
from project import SUMS

from distill import recipe, run_folder
from distill.errors import MachineError
from distill.records import UserError
from distill.reports.run_report import RunReport
from distill.run.model_card import model_folder, push, write, write_all

HOSTILE = "<script>alert(1)</script> | **bold** \x1b[31m `tick`"


def resolved(base: str) -> recipe.Recipe:
    train = {
        "kind": "train",
        "steps": 2,
        "data": "data/rows.jsonl",
        "task": "sums",
        "loss": {"fn": "cross_entropy"},
    }
    tree: dict[str, Any] = {
        "name": "carded", "models": {"base": base}, "tasks": {"sums": SUMS},
        "stages": {
            "teacher": {**train, "model": "base"},
            "traces": {"kind": "generate", "model": "teacher", "task": "sums", "problems": 4},
            "student": {"kind": "prune", "model": "base", "layers": 2},
            "kl": {"kind": "train", "model": "student", "data": "traces", "steps": 2},
            "sft": {**train, "model": "student"},
        },
    }  # fmt: skip
    return recipe.validate(tree)


@pytest.fixture
def run(tmp_path: Path, tiny_dir: Path) -> Path:
    """The folder of a run with the models of three stages."""
    folder = tmp_path / "carded"
    for name, kind in (("teacher", "train"), ("student", "prune"), ("kl", "train")):
        standing = run_folder.State(kind=kind, config={}, inputs={}, status="done", seconds=61.0)
        standing.cost = {"tokens_trained": 12_000, "flops": 3e12}
        run_folder.write(folder / name, standing)
        shutil.copytree(tiny_dir, folder / name / "model")
    return folder


def report(stage: str) -> RunReport:
    interval = {"value": 0.41, "low": 0.35, "high": 0.47, "n": 256}
    view = {"tokens": 12_000.0, "flops": 3e12, "seconds": 61.0}
    more = {**view, "flops": 9e12}
    arm = {"stage": stage, "role": "student", "accuracy": interval, "maj_at": {}, "clipped_ratio": 0.01, "mean_length": 9.0,
           "pass_at": {"1": interval, "8": {**interval, "value": 0.8}}, "problems": 256, "samples": 8, "unjudged": 0,
           "seeds": 1, **view, "cost": {"student": view, "with_inference": more, "with_teacher": more}}  # fmt: skip
    row = {"a": "kl", "b": "sft", "unit": "checkpoints", "difference": {"value": 0.02, "low": -0.03, "high": 0.07, "n": 256},
           "p_value": 0.4, "p_holm": 0.4, "method": "", "verdict": "not shown"}  # fmt: skip
    return {"name": "carded", "task": HOSTILE, "arms": {"kl": arm}, "comparisons": [row],
            "reproduce": ["distill run recipes/carded.yaml"]}  # type: ignore[typeddict-item,return-value]  # fmt: skip


def test_the_card_says_where_a_model_comes_from(run: Path) -> None:
    path = write(resolved("HuggingFaceTB/SmolLM2-135M"), run, "kl")
    assert path == run / "kl" / "model" / "README.md"
    read = ModelCard.load(path)
    assert read.data.base_model == "HuggingFaceTB/SmolLM2-135M"
    assert read.data.library_name == "transformers"
    assert {"distill", "train", "generate", "prune"} <= set(read.data.tags)
    rows = [line for line in read.text.splitlines() if line.startswith("| ")]
    lineage = {row.split("|")[1].strip(): row for row in rows}
    assert [name for name in lineage if name in ("teacher", "traces", "student", "kl", "sft")] == [
        "teacher", "traces", "student", "kl",
    ]  # fmt: skip
    assert "12 k" in lineage["kl"]
    assert "model student, data traces" in lineage["kl"]
    assert "This model has not been evaluated yet." in read.text
    assert write(resolved("x/y"), run, "sft") is None


def test_scores_come_with_the_report_as_a_model_index(run: Path) -> None:
    written = write_all(resolved("x/y"), run, report("kl"))
    assert {path.parent.parent.name for path in written} == {"teacher", "student", "kl"}
    read = ModelCard.load(run / "kl" / "model" / "README.md")
    (result,) = read.data.eval_results
    assert result.metric_value == 0.41
    assert result.metric_name == "pass@1 41.0% [35.0, 47.0]"
    assert "pass@8 80.0% [35.0, 47.0]" in read.text
    assert "+2.0 [−3.0, +7.0] points (no difference shown)" in read.text
    assert "9 TFLOP" in read.text
    assert "distill run recipes/carded.yaml" in read.text
    assert not ModelCard.load(run / "teacher" / "model" / "README.md").data.eval_results


def test_a_card_holds_no_markup_and_no_path_of_the_machine(run: Path, tiny_dir: Path) -> None:
    path = write(resolved(str(tiny_dir)), run, "kl", report("kl"))
    assert path is not None
    text = path.read_text()
    assert str(tiny_dir.parent) not in text
    assert tiny_dir.name in text
    body = ModelCard(text).text
    assert "\\<script>" in body
    assert "\x1b" not in text
    assert ModelCard(text).data.base_model is None


def test_push_finds_checkpoints_and_names_them(run: Path, tmp_path: Path) -> None:
    assert model_folder(run / "kl") == run / "kl" / "model"
    assert model_folder(run / "kl" / "model") == run / "kl" / "model"
    with pytest.raises(UserError, match="is not a model"):
        model_folder(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"has no README\.md"):
        push(run / "kl", "me/model")
    write(resolved("x/y"), run, "kl")
    with pytest.raises(UserError, match="is not the name of a repository"):
        push(run / "kl", "model")


def test_a_hub_that_is_not_there_is_named_in_seconds(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    write(resolved("x/y"), run, "kl")
    began = time.monotonic()
    with pytest.raises(MachineError, match=r"the hub \(http://127\.0\.0\.1:9\) cannot be reached"):
        push(run / "kl", "me/model")
    assert time.monotonic() - began < 20 * slowness()
