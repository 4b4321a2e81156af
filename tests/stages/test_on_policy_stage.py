"""on_policy and train with a teacher in the trainer, through the real command line on the tiny model."""

from __future__ import annotations

import json

import pytest
from project import REFERENCE, SUMS, Project

from distill import recipe
from distill.records import UserError
from distill.run.plan import check_plugs


@pytest.fixture(scope="module")
def finished(tiny_dir, tmp_path_factory):
    train = {"kind": "train", "model": "base", "steps": 2, "batch_traces": 3, "dtype": "float32"}
    policy = {
        "kind": "on_policy",
        "model": "base",
        "task": "sums",
        "steps": 2,
        "prompts": 2,
        "group_size": 2,
        "sampling": {"max_tokens": 5},
        "engine": REFERENCE,
        "dtype": "float32",
        "log_completions_every": 1,
    }
    tree = {
        "name": "taught",
        "models": {"base": str(tiny_dir)},
        "tasks": {"sums": SUMS},
        "stages": {
            "traces": {
                "kind": "generate",
                "model": "base",
                "task": "sums",
                "problems": 6,
                "sampling": {"max_tokens": 6},
                "top_logprobs": 8,
                "engine": REFERENCE,
            },
            "teacher": {
                **train,
                "data": "traces",
                "loss": {"fn": "cross_entropy"},
                "keep_truncated": True,
                "lr": 3e-3,
            },
            "warm": {
                **train,
                "data": "traces",
                "loss": {"fn": "ce_kl", "ce_weight": 0.2, "kl_weight": 0.8, "final_kl_weight": 0.0},
                "teacher": {"teacher": 0.75, "base": 0.25},
                "temperature": 2.0,
                "keep_truncated": True,
            },
            "beside": {
                **policy,
                "teacher": "teacher",
                "loss": {"fn": "jsd", "beta": 0.3},
                "data": "traces",
                "offline_share": 0.5,
            },
            "asked": {**policy, "teacher": "teacher", "scoring": "engine", "top_logprobs": 8},
            "gradient": {
                **policy,
                "teacher": "teacher",
                "scoring": "engine",
                "loss": {"fn": "policy_gradient"},
            },
            "verdict": {
                "kind": "compare",
                "arms": {"start": "base", "beside": "beside"},
                "task": "sums",
                "problems": 4,
                "sampling": {"max_tokens": 6, "temperature": 0},
                "engine": REFERENCE,
            },
        },
    }
    made = Project(tmp_path_factory.mktemp("taught"), tree)
    done = made.run()
    assert done.returncode == 0, done.stdout + done.stderr
    return made


def lines(project, stage):
    text = (project.run_dir / stage / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_every_way_of_being_taught_trains_and_is_accounted_for(finished):
    for stage in ("warm", "beside", "asked", "gradient"):
        standing = finished.state(stage)
        assert standing["cost"]["tokens_trained"] > 0
        assert standing["teacher_cost"]["tokens_scored"] > 0, stage
        assert standing["teacher_cost"]["flops"] > 0
        assert len(lines(finished, stage)) == 2
    warm = finished.state("warm")
    assert warm["teacher_cost"]["tokens_scored"] == 2 * warm["cost"]["tokens_trained"]
    first, last = lines(finished, "warm")
    assert first["divergence"] > 0
    assert first["kl"] > 0
    assert first["kl/0-15"] == pytest.approx(first["kl"])
    assert last["loss"] == pytest.approx(0.2 * last["label_nll"], rel=1e-4)
    assert "kl_teacher" in lines(finished, "asked")[0]
    assert (finished.run_dir / "beside" / "completions.jsonl").stat().st_size > 0


def test_the_ledger_puts_the_teachers_opinion_under_inference(finished):
    report = json.loads((finished.run_dir / "report.json").read_text())
    cost = report["arms"]["beside"]["cost"]
    scored = finished.state("beside")["teacher_cost"]["flops"]
    assert cost["with_inference"]["flops"] - cost["student"]["flops"] >= scored
    assert cost["with_teacher"]["flops"] > cost["with_inference"]["flops"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "stages.warm.loss={fn: cross_entropy}",
            "cross_entropy cannot be used with a teacher in the trainer",
        ),
        ("stages.beside.loss={fn: jsd, beta: 0}", "stages.beside.loss.beta"),
        ("stages.beside.teacher=nobody", "there is no model or stage 'nobody'"),
        ("stages.teacher.temperature=2", "temperature: must be 1 with stored distributions"),
        ("stages.asked.loss={fn: sampled_kd}", "sampled_kd samples tokens from the whole distribution"),
        ("stages.asked.temperature=2", "must be 1 with scoring: engine"),
    ],
)
def test_mistakes_are_one_message(finished, override, message):
    with pytest.raises(UserError) as caught:
        check_plugs(recipe.load(finished.recipe, [override]))
    assert message in str(caught.value)
