"""Roles in a comparison (teacher, start, student); arms with different starts are refused; curves as logged."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from project import SUMS
from rich.console import Console

from distill import recipe, run_folder
from distill.recipe.lineage import role_of, roles_of, training_line
from distill.records import UserError
from distill.reports import pages, terminal
from distill.run.collect import MAX_POINTS, collect_run, read_curves
from distill.run.weak_teachers import weak_teachers
from distill.stages.compare import check_start


def resolved(arms: dict[str, str], **more: Any) -> recipe.Recipe:
    def train(model: str, data: str) -> dict[str, Any]:
        return {
            "kind": "train",
            "model": model,
            "data": data,
            "steps": 2,
            "loss": {"fn": "cross_entropy"},
        }

    def generate(model: str) -> dict[str, Any]:
        return {"kind": "generate", "model": model, "task": "sums", "problems": 4}

    def grpo(model: str) -> dict[str, Any]:
        return {
            "kind": "grpo",
            "model": model,
            "task": "sums",
            "rewards": [{"fn": "accuracy"}],
            "steps": 2,
        }

    stages = {
        "cold": train("base", "data/gold.jsonl"),
        "teacher": grpo("cold"),
        "traces": generate("teacher"),
        "clean": {"kind": "filter", "data": "traces", "keep": [{"fn": "correct"}]},
        "student": {"kind": "prune", "model": "base", "layers": 2},
        "own": generate("student"),
        "sft_own": train("student", "own"),
        "kl": train("student", "clean"),
        "rl": grpo("student"),
        "kl_rl": grpo("kl"),
        **more,
        "verdict": {"kind": "compare", "arms": arms, "task": "sums"},
    }
    tree = {
        "name": "roles",
        "models": {"base": "some/model"},
        "tasks": {"sums": SUMS},
        "stages": stages,
    }
    return recipe.validate(tree)


ARMS = {name: name for name in ("student", "teacher", "sft_own", "kl", "rl", "kl_rl")}


def test_a_trained_model_that_the_other_students_go_on_from_is_their_start() -> None:
    warm = {"kind": "train", "model": "student", "data": "clean", "steps": 2}
    made = resolved(ARMS, warm=warm, a={**warm, "model": "warm"}, b={**warm, "model": "warm"})
    assert roles_of(made, ["warm", "a", "b", "teacher"]) == {
        "warm": "start", "a": "student", "b": "student", "teacher": "teacher",
    }  # fmt: skip
    assert roles_of(made, ["warm", "a", "kl"])["warm"] == "student"  # kl is not trained from it
    assert roles_of(made, ["warm"])["warm"] == "student"


def test_roles_of_the_ten_arms() -> None:
    made = resolved(ARMS)
    assert {name: role_of(made, name) for name in (*ARMS, "base")} == {
        "student": "start",  # it wrote traces, but only for its own training line
        "teacher": "teacher",
        "sft_own": "student",
        "kl": "student",
        "rl": "student",
        "kl_rl": "student",
        "base": "start",
    }


def test_a_line_ends_at_the_start() -> None:
    made = resolved(ARMS)
    assert training_line(made, "kl_rl") == ["kl_rl", "kl", "student"]
    assert training_line(made, "teacher") == ["teacher", "cold", "base"]


def test_a_student_whose_completions_a_teacher_scores_is_no_teacher() -> None:
    """Two rounds of on-policy distillation from files: each student writes, the teacher scores, the next student learns."""
    scored = {"kind": "score", "model": "teacher", "data": "own"}
    round1 = {"kind": "train", "model": "student", "data": "scored", "steps": 2, "loss": {"fn": "reverse_kl"}}
    own2 = {"kind": "generate", "model": "round1", "task": "sums", "problems": 4}
    made = resolved(ARMS, scored=scored, round1=round1, own2=own2, scored2={**scored, "data": "own2"},
                    round2={**round1, "model": "round1", "data": "scored2"})  # fmt: skip
    assert {name: role_of(made, name) for name in ("student", "round1", "round2", "teacher")} == {
        "student": "start", "round1": "student", "round2": "student", "teacher": "teacher",
    }  # fmt: skip


def test_a_model_that_scores_its_own_traces_is_not_its_own_teacher() -> None:
    scored = {"kind": "score", "model": "student", "data": "own"}
    polish = {"kind": "train", "model": "student", "data": "scored", "steps": 2}
    made = resolved(ARMS, scored=scored, polish=polish)
    assert role_of(made, "student") == "start"
    # Another model that scores them is a teacher only if a model learns from its scores.
    assert role_of(resolved(ARMS, scored={**scored, "model": "teacher"}, polish=polish), "teacher") == "teacher"


def test_students_of_one_start_are_compared_whatever_the_teacher_started_from() -> None:
    made = resolved(ARMS)
    check_start(made.stages["verdict"], made)  # type: ignore[arg-type]


def test_students_of_different_starts_are_refused() -> None:
    other = {
        "kind": "train",
        "model": "base",
        "data": "clean",
        "steps": 2,
        "loss": {"fn": "cross_entropy"},
    }
    made = resolved({**ARMS, "whole": "whole"}, whole=other)
    with pytest.raises(
        UserError,
        match=r"'sft_own' and 'whole' start from different checkpoints \('student' and 'base'\)",
    ):
        check_start(made.stages["verdict"], made)  # type: ignore[arg-type]


def test_curves_hold_whatever_was_logged(tmp_path: Path) -> None:
    lines = tmp_path / "metrics.jsonl"
    rows = [{"step": n, "loss": float(n), "note": "text", "ok": True} for n in range(1, 6)]
    rows[1]["reward/accuracy"] = 0.25
    rows[2]["loss"] = float("nan")
    lines.write_text("\n".join(json.dumps(row) for row in rows) + '\n{"step": 6, "lo')
    steps, curves = read_curves(lines)
    assert steps == [1, 2, 3, 4, 5]
    assert curves == {
        "loss": [1, 2, None, 4, 5],
        "reward/accuracy": [None, 0.25, None, None, None],
    }


def test_long_curves_are_thinned_to_means(tmp_path: Path) -> None:
    lines = tmp_path / "metrics.jsonl"
    num = 5 * MAX_POINTS
    lines.write_text("\n".join(json.dumps({"step": n + 1, "loss": n}) for n in range(num)))
    steps, curves = read_curves(lines)
    assert len(steps) == MAX_POINTS
    assert steps[:2] == [5, 10]
    assert curves["loss"][:2] == [2, 7]


def test_a_run_half_way_and_a_teacher_shared_by_its_students(tmp_path: Path) -> None:
    """kl and kl_rl learned from the teacher: its training is in the cost of both, and once in the ledger."""
    made = resolved({name: name for name in ("student", "teacher", "kl", "rl", "kl_rl")})
    run = tmp_path / "roles"
    flops = {"cold": 1e12, "teacher": 9e12, "traces": 3e12, "kl": 2e12, "rl": 7e12, "kl_rl": 4e12}
    interval = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 256}
    scores = {"accuracy": interval, "pass_at": {"1": interval}, "maj_at": {}, "clipped_ratio": 0.0, "mean_length": 9.0,
              "problems": 256, "samples": 1, "unjudged": 0}  # fmt: skip
    for name, config in made.stages.items():
        if name in flops or config.kind in ("prune", "filter"):
            standing = run_folder.State(kind=config.kind, config={}, inputs={}, status="done")
            standing.cost = {"flops": flops.get(name, 0.0)}
            run_folder.write(run / name, standing)
    for arm in ("student", "teacher", "kl", "rl"):
        standing = run_folder.State(kind="eval", config={}, inputs={}, status="done", metrics=scores)
        run_folder.write(run / f"verdict.{arm}", standing)
    (run / "resolved.yaml").write_text(yaml.safe_dump(made.model_dump(mode="json"), sort_keys=False))
    (run / "kl" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')

    report = collect_run(run)
    assert list(report["arms"]) == [
        "student",
        "teacher",
        "kl",
        "rl",
    ]  # kl_rl has not been evaluated
    cost = {name: {view: one["flops"] for view, one in arm["cost"].items()} for name, arm in report["arms"].items()}
    assert cost["kl"] == {"student": 2e12, "with_inference": 5e12, "with_teacher": 15e12}
    assert cost["rl"] == {"student": 7e12, "with_inference": 7e12, "with_teacher": 7e12}
    assert cost["teacher"]["student"] == 10e12
    assert sum(row["flops"] for row in report["ledger"]) == sum(flops.values())
    by_stages = {tuple(row["stages"]): (row["arms"], row["flops"]) for row in report["ledger"]}
    assert by_stages["cold", "teacher"] == (["teacher", "kl", "kl_rl"], 10e12)
    assert by_stages["traces", "clean", "kl"] == (["kl", "kl_rl"], 5e12)
    status = {stage["name"]: stage["status"] for stage in report["stages"]}
    assert (status["kl"], status["verdict.kl"], status["verdict.kl_rl"], status["verdict"]) == (
        "done", "done", "pending", "pending",
    )  # fmt: skip
    out = io.StringIO()
    terminal.show(report, Console(file=out, width=140, color_system=None))
    assert "█▁" in out.getvalue()
    assert "plots/compute_with_teacher.svg" in pages.write_report(report, tmp_path / "out")


def test_students_of_a_weak_teacher_s_distributions_are_warned_of() -> None:
    losses = {"sft": "cross_entropy", "both": "ce_kl", "jsd": "jsd", "other": "forward_kl"}
    learn = {"kind": "train", "model": "student", "data": "long", "steps": 2}
    made = resolved(
        ARMS,
        long={"kind": "filter", "data": "clean", "keep": [{"fn": "finished"}]},
        finished={"kind": "filter", "data": "traces", "keep": [{"fn": "finished"}]},
        wrong_too={**learn, "data": "finished"},
        by_another={**learn, "teacher": "base"},
        **{name: {**learn, "loss": {"fn": fn}} for name, fn in losses.items()},
    )

    def warnings(right: float) -> list[str]:
        metrics = {"correct_rate": right}
        return weak_teachers(made, {"traces": run_folder.State("generate", {}, {}, status="done", metrics=metrics)})

    [warning] = warnings(0.62)
    # kl learns cross entropy in this recipe; wrong_too learns the errors on purpose; by_another has another teacher.
    assert warning.startswith("warning: jsd, other: the teacher teacher was right in only 62% of its traces.")
    assert "ce_kl" in warning
    assert warnings(0.9) == warnings(float("nan")) == []
    assert weak_teachers(made, {}) == []
