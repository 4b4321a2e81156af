"""Sweeps, max_traces, and what a trace with its distribution is worth in traces of text."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from project import REFERENCE, SUMS, Project

from distill import models, recipe
from distill.progress import Screen
from distill.records import UserError
from distill.reports.trace_curves import best_shift, ratio
from distill.reports.wording import ratio_text
from distill.stages.context import Context
from distill.stages.inputs.train_examples import open_source


def tree(teacher: Path, student: Path) -> dict:
    train = {
        "kind": "train", "model": "student", "data": "traces", "keep_truncated": True, "epochs": 1, "batch_traces": 2, "lr": 3e-3,
        "dtype": "float32", "seeds": [1, 2], "sweep": {"max_traces": [2, 6]},
    }  # fmt: skip
    return {
        "name": "curves",
        "models": {"teacher": str(teacher), "student": str(student)},
        "tasks": {"sums": SUMS},
        "stages": {
            "traces": {"kind": "generate", "model": "teacher", "task": "sums", "problems": 8, "sampling": {"max_tokens": 6},
                       "top_logprobs": 8, "engine": REFERENCE},
            "held": {"kind": "generate", "model": "teacher", "task": "sums", "split": "held_out", "problems": 4,
                     "sampling": {"max_tokens": 6}, "top_logprobs": 8, "engine": REFERENCE},
            "sft": {**train, "loss": {"fn": "cross_entropy"}},
            "kl": {**train, "loss": {"fn": "forward_kl"}},
            "verdict": {"kind": "compare", "arms": {"start": "student", "sft": "sft", "kl": "kl"}, "task": "sums", "problems": 3,
                        "targets": "held", "sampling": {"max_tokens": 2, "temperature": 0}, "engine": REFERENCE},
        },
    }  # fmt: skip


@pytest.fixture(scope="module")
def student_dir(tiny_dir, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("student")
    model = models.load(tiny_dir, dtype="float32")
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    models.save(model, models.load_tokenizer(tiny_dir), folder)
    return folder


def test_a_sweep_is_a_stage_for_each_value_and_an_arm_for_each_copy(tiny_dir, student_dir):
    given = tree(tiny_dir, student_dir)
    given["stages"]["own"] = {
        "kind": "generate", "model": "kl", "task": "sums", "problems": 2, "top_logprobs": 0, "engine": REFERENCE,
    }  # fmt: skip
    found = recipe.validate(given).stages
    assert {"kl-2@1", "kl-2@2", "kl-6@1", "kl-6@2", "sft-2@1", "own-2@1", "own-6@2"} <= found.keys()
    assert not {"kl", "kl-2", "own", "own-2"} & found.keys()
    assert found["kl-6@2"].max_traces == 6
    assert found["own-6@2"].model == "kl-6@2"
    arms = found["verdict"].arms
    assert arms["kl-6"] == {1: "kl-6@1", 2: "kl-6@2"}
    assert list(arms) == ["start", "sft-2", "sft-6", "kl-2", "kl-6"]
    assert recipe.validate(recipe.validate(given).model_dump(mode="json")).stages == found


@pytest.mark.parametrize(
    ("stage", "changes", "why"),
    [
        ("kl", {"sweep": {"max_trace": [2]}}, "names one field of the stage"),
        ("kl", {"sweep": {"max_traces": [2, 2]}}, "distinct values"),
        ("kl", {"sweep": {"max_traces": [2, 0]}}, r"stages\.kl\.sweep: max_traces"),
        ("kl", {"sweep": {"max_traces": [2], "lr": [1e-3]}}, "names one field of the stage"),
        ("kl", {"model": "sft"}, "is swept too"),
        ("verdict", {"sweep": {"problems": [2, 3]}}, "takes no sweep"),
    ],
)
def test_a_wrong_sweep_is_refused(tiny_dir, student_dir, stage, changes, why):
    given = tree(tiny_dir, student_dir)
    given["stages"][stage] |= changes
    with pytest.raises(UserError, match=why):
        recipe.validate(given)


def test_the_shift_is_the_ratio_of_the_numbers_of_traces():
    n = [64, 128, 256, 512, 1024]
    text = np.array([0.1, 0.2, 0.4, 0.6, 0.7])
    double = np.interp(np.log(n) + np.log(2), np.log(n), text)
    assert np.exp(best_shift(n, double, n, text).log_ratio) == pytest.approx(2, rel=0.01)
    assert best_shift(n, text, n, text).log_ratio == pytest.approx(0, abs=1e-9)
    above = best_shift(n, text + 1, n, text)
    assert above.at_end
    assert np.exp(above.log_ratio) == pytest.approx(16, rel=0.01)
    rng = np.random.default_rng(0)
    chance_P = rng.random(200)

    def curve(values) -> dict[int, np.ndarray]:
        return {
            k: (chance_P[None] < v + 0.02 * rng.normal(size=(5, 1))).astype(float)
            for k, v in zip(n, values, strict=True)
        }

    row = ratio("kl", curve(double), curve(text), "accuracy")
    assert row["low"] < 2 < row["high"]
    assert row["high"] / row["low"] < 4
    assert (
        ratio_text(
            {**row, "ratio": 2.1, "low": 1.4, "high": 16, "high_at_end": True, "low_at_end": False, "at_end": False}
        )
        == "2.1 [1.4, >16]"
    )


def test_a_way_that_text_never_reaches_is_beyond_the_range_whatever_texts_order():
    """Text that is level, but for noise, says nothing by its shape; that the other is better everywhere does."""
    rng = np.random.default_rng(4)

    def curve(means):
        return {n: mean + 0.01 * rng.standard_normal((1, 200)) for n, mean in zip((64, 256, 1024), means, strict=True)}

    text, way = curve([-0.045, -0.050, -0.043]), curve([-0.030, -0.027, -0.020])
    row = ratio("kl", way, text, "kl")
    assert ratio_text(row) == ">16 [>16, >16]" or ratio_text(row) == ">16 [16, >16]"
    worse = ratio("kl", text, way, "kl")
    assert worse["at_end"]
    assert worse["ratio"] == pytest.approx(1 / 16)
    assert ratio_text(worse).startswith("<0.062 [<0.062, ")


def test_a_small_run_of_the_whole_experiment(tiny_dir, student_dir, tmp_path):
    """Both ways with two numbers of traces, to the report with its curves and ratios."""
    given = tree(tiny_dir, student_dir)
    for way in ("sft", "kl"):
        del given["stages"][way]["seeds"]
    project = Project(tmp_path, given)
    done = project.run()
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((project.run_dir / "report.json").read_text())
    assert report["arms"]["kl-6"]["traces"] == {"comparison": "verdict", "way": "kl", "number": 6}
    assert "traces" not in report["arms"]["start"]
    compared = {(row["a"], row["b"]) for row in report["comparisons"]}
    assert ("sft-2", "kl-2") in compared
    assert ("sft-2", "kl-6") not in compared
    assert {(row["way"], row["measure"]) for row in report["trace_ratios"]} == {("kl", "accuracy"), ("kl", "kl")}
    for row in report["trace_ratios"]:
        assert 1 / 3.01 <= row["low"] <= row["ratio"] <= row["high"] <= 3.01
    text = (project.run_dir / "report.md").read_text()
    assert "traces of text for one trace of it" in text
    for measure in ("accuracy", "kl"):
        assert "sft" in (project.run_dir / "plots" / f"verdict_traces_{measure}.svg").read_text()
    steps = {name: len(project.losses(name)) for name in ("kl-2", "kl-6", "sft-6")}
    assert steps == {"kl-2": 1, "kl-6": 3, "sft-6": 3}
    chosen = {}
    for name in ("kl-2", "kl-6", "sft-6"):
        ctx = Context(recipe=recipe.validate(given), run=project.run_dir, name=name, screen=Screen(io.StringIO()))
        source = open_source(ctx.recipe.stages[name], ctx, models.load_tokenizer(tiny_dir))
        chosen[name] = {example.trace_id for example in source.epoch(0)}
    assert len(chosen["kl-2"]) == 2
    assert chosen["kl-2"] < chosen["kl-6"] == chosen["sft-6"]
    with pytest.raises(UserError, match="9 traces are wanted, and 'traces' has 8"):
        open_source(ctx.recipe.stages[name].model_copy(update={"max_traces": 9}), ctx, models.load_tokenizer(tiny_dir))
