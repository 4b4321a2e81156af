"""On-policy distillation from stored traces: the student generates, a teacher scores, the student trains."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from project import REFERENCE, SUMS, Project

from distill import models, recipe
from distill.records import UserError
from distill.run import plan
from distill.run.plan import check_plugs
from distill.stages.inputs.own_traces import other_teacher
from distill.traces.reader import open_traces

OWN = {
    "kind": "generate", "model": "student", "task": "sums", "problems": 12, "sampling": {"max_tokens": 6}, "top_logprobs": 0,
    "engine": REFERENCE,
}  # fmt: skip
SCORED = {"kind": "score", "model": "teacher", "data": "own", "top_logprobs": 16, "engine": REFERENCE}
TRAIN = {
    "kind": "train", "model": "student", "data": "scored", "keep_truncated": True, "steps": 6, "batch_traces": 4, "lr": 3e-3,
    "dtype": "float32",
}  # fmt: skip
GRADIENT = {"fn": "policy_gradient"}
REVERSE = {"fn": "reverse_kl", "importance_cap": 2.0}


def tree(teacher: Path, student: Path, **stages) -> dict:
    return {
        "name": "offline",
        "models": {"teacher": str(teacher), "student": str(student)},
        "tasks": {"sums": SUMS},
        "stages": {"own": OWN, "scored": SCORED, **stages},
    }


@pytest.fixture(scope="module")
def student_dir(tiny_dir, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("student")
    model = models.load(tiny_dir, dtype="float32")
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    models.save(model, models.load_tokenizer(tiny_dir), folder)
    return folder


@pytest.fixture(scope="module")
def finished(tiny_dir, student_dir, tmp_path_factory) -> Project:
    """Both losses; and a stage that goes on from one of them with the same traces, which are stale at its first step."""
    stages = {
        "gradient": {**TRAIN, "loss": GRADIENT, "checkpoint_every": 3},
        "reverse": {**TRAIN, "loss": REVERSE},
        "older": {**TRAIN, "model": "reverse", "loss": GRADIENT, "steps": 1},
    }
    project = Project(tmp_path_factory.mktemp("offline"), tree(tiny_dir, student_dir, **stages))
    done = project.run()
    assert done.returncode == 0, done.stdout + done.stderr
    return project


def lines(project: Project, stage: str) -> list[dict]:
    return [json.loads(line) for line in (project.run_dir / stage / "metrics.jsonl").read_text().splitlines()]


def test_the_first_step_is_on_policy_and_later_ones_are_weighed(finished):
    for stage in ("gradient", "reverse"):
        course = lines(finished, stage)
        assert course[0]["staleness"] == pytest.approx(0, abs=2e-3)  # what is stored is rounded to 1/1024 nat
        assert course[0]["importance_weight"] == pytest.approx(1, abs=2e-3 * 6)
        assert course[0]["clipped_weights"] == 0
        assert abs(course[-1]["staleness"]) > 0.01
        assert course[-1]["importance_weight"] != pytest.approx(1, abs=2e-3)
    assert lines(finished, "older")[0]["staleness"] != pytest.approx(0, abs=5e-3)


def test_both_losses_bring_the_student_nearer_to_the_teacher(finished, tiny_dir):
    course = [line["kl"] for line in lines(finished, "reverse")]
    assert course[-1] < 0.9 * course[0]
    rows = {
        trace_id: n
        for n, trace_id in enumerate(next(open_traces(finished.run_dir / "own" / "traces").blocks()).trace_id)
    }
    scored = next(open_traces(finished.run_dir / "scored" / "traces").blocks())
    own = next(open_traces(finished.run_dir / "own" / "traces").blocks())
    # The loss of the first step is minus the mean over tokens of log p - log q of its traces: the sampler's estimate of the KL.
    everything = [float((scored.logprob[n] - own.logprob[rows[t]]).sum()) for n, t in enumerate(scored.trace_id)]
    first = [line["loss"] for line in lines(finished, "gradient")[:3]]  # an epoch
    assert sum(first) / 3 == pytest.approx(-sum(everything) / sum(own.completion_ids.lengths), rel=0.4)


@pytest.mark.parametrize("loss", [GRADIENT, REVERSE])
@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"train": {"data": "own"}}, "scored stage|holds those of the model that generated it"),
        ({"train": {"model": "teacher"}}, "was not trained from"),
        ({"own": {"sampling": {"max_tokens": 6, "temperature": 0}}}, "temperature and top_p"),
        ({"own": {"sampling": {"max_tokens": 6, "top_p": 0.9}}}, "temperature and top_p"),
        ({"train": {"data": "some"}}, "keeps traces by what they say"),
        ({"scored": {"data": "some_own"}}, "keeps traces by what they say"),
        ({"train": {"keep_truncated": False}}, "keep_truncated"),
        ({"train": {"data": "./elsewhere"}}, "stages of the recipe"),
        ({"train": {"data": {"scored": 1.0, "again": 1.0}}}, "stages of the recipe"),
    ],
)
def test_what_the_student_did_not_write_or_what_was_chosen_is_refused(tiny_dir, student_dir, loss, changes, why):
    keep = [{"fn": "correct"}]
    stages = {
        "own": {**OWN, **changes.get("own", {})},
        "scored": {**SCORED, **changes.get("scored", {})},
        "again": SCORED,
        "some": {"kind": "filter", "data": "scored", "keep": keep},
        "some_own": {"kind": "filter", "data": "own", "keep": keep},
        "train": {**TRAIN, "loss": loss, **changes.get("train", {})},
    }
    with pytest.raises(UserError, match=rf"stages\.train.*({why})"):
        check_plugs(recipe.validate(tree(tiny_dir, student_dir, **stages)))


def test_a_cap_where_every_rollout_is_new_is_refused(tiny_dir, student_dir):
    live = {"kind": "on_policy", "model": "student", "teacher": "teacher", "task": "sums", "loss": REVERSE, "steps": 1, "scoring": "engine"}  # fmt: skip
    with pytest.raises(UserError, match="every rollout is of the present weights"):
        check_plugs(recipe.validate(tree(tiny_dir, student_dir, live=live)))


def test_another_teacher_than_the_first_datas_is_a_warning(tiny_dir, student_dir):
    first = {**OWN, "model": "teacher"}
    start = {"kind": "train", "model": "student", "data": "first", "loss": {"fn": "cross_entropy"}, "steps": 1}
    own, train = {**OWN, "model": "start"}, {**TRAIN, "model": "start", "loss": GRADIENT}
    given = tree(tiny_dir, student_dir, first=first, start=start, own=own, train=train)
    given["models"]["stranger"] = str(student_dir)
    known = recipe.validate(given)
    assert other_teacher(known, "start", ["teacher"]) == ""
    assert "first learned from teacher" in other_teacher(known, "start", ["stranger"])
    assert other_teacher(known, "student", ["stranger"]) == ""
    given["stages"]["scored"] = {**SCORED, "model": "stranger"}
    notes = [note for row in plan.predict(recipe.validate(given)) for note in row.notes]
    assert any("train: warning: stranger scores text" in note for note in notes)
