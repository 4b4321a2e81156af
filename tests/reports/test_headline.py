"""The headline answers the question that a recipe asks, in full sentences."""

from __future__ import annotations

from typing import Any

import pytest

from distill.reports.arm_groups import groups
from distill.reports.block_kinds import Table
from distill.reports.headline import verdict
from distill.reports.report_blocks import blocks
from distill.reports.run_report import ArmRow, RunReport


def interval(value: float, half: float = 0.06) -> dict[str, Any]:
    return {"value": value, "low": value - half, "high": value + half, "n": 256}


def arm(role: str, accuracy: float, **about: Any) -> ArmRow:
    """about: fields of AboutRow; lists for builds_on, teachers and begins_with."""
    empty = {"training": "", "data": "", "steps": "", "start": "", "size": "", "base": "", "method": ""}
    lists: dict[str, list[str]] = {"builds_on": [], "teachers": [], "begins_with": []}
    cost = {"tokens": 1.0, "flops": 1.0, "seconds": 1.0}
    return {
        "stage": "x", "role": role, "accuracy": interval(accuracy), "pass_at": {}, "maj_at": {}, "clipped_ratio": 0.0,
        "mean_length": 9.0, "problems": 256, "samples": 1, "unjudged": 0, "seeds": 1, **cost,
        "cost": {"student": cost, "with_inference": cost, "with_teacher": cost}, "about": {**empty, **lists, **about},
    }  # type: ignore[typeddict-item, return-value]  # fmt: skip


def pair(a: str, b: str, value: float, half: float = 0.06, **more: Any) -> dict[str, Any]:
    said = "differ" if abs(value) > half else "not shown"
    return {"a": a, "b": b, "unit": "checkpoints", "difference": interval(value, half), "p_value": 0.01, "p_holm": 0.01,
            "method": "m", "verdict": said, **more}  # fmt: skip


def report(
    arms: dict[str, ArmRow], *pairs: dict[str, Any], stages: list[dict[str, Any]] | None = None, **more: Any
) -> Any:
    done = [{"name": "verdict", "kind": "compare", "status": "done", "seconds": 1.0, "cost": {}}]
    return {
        "name": "t", "description": "", "created": "", "seed": 17, "task": "sums", "environment": {}, "recipe": "",
        "stages": stages or done, "arms": arms, "comparisons": list(pairs), "examples": [], "reproduce": [], "notes": [],
        **more,
    }  # fmt: skip


SFT = arm("student", 0.586, method="text", builds_on=["start", "teacher"], teachers=["teacher"], begins_with=["start"])
KL = arm("student", 0.398, method="distributions", builds_on=["start", "teacher"], begins_with=["start"])
RL = arm("student", 0.336, method="rewards", builds_on=["start"], begins_with=["start"])
OTHERS = {"teacher": arm("teacher", 0.996), "start": arm("start", 0.125)}


def test_two_ways_of_training_are_compared_by_their_difference() -> None:
    said = verdict(report({**OTHERS, "kl": KL, "sft": SFT}, pair("kl", "sft", -0.188)))
    assert said == (
        "sft (text) solved 58.6% of 256 held-out problems and kl (distributions) 39.8% (difference 18.8 points, 95% CI "
        "12.8–24.8). One training seed each: no claim about the methods. The teacher solved 99.6%, the start 12.5%."
    )


def test_distillation_against_rl_names_the_methods_and_all_differences_to_the_best() -> None:
    pairs = [pair("kl", "sft", -0.188), pair("kl", "rl", 0.062, 0.07), pair("sft", "rl", 0.25)]
    said = verdict(report({**OTHERS, "kl": KL, "sft": SFT, "rl": RL}, *pairs))
    assert "rl (rewards) 33.6% (difference 25.0 points, 19.0–31.0)." in said
    level = verdict(report({**OTHERS, "kl": KL, "rl": RL}, pairs[1]))
    assert "rl (rewards) 33.6% (no difference shown: 6.2 points, 95% CI −0.8 to 13.2)." in level


@pytest.mark.parametrize(
    ("said", "claim"),
    [
        ("supported", "Over 3 training seeds each, the difference is supported."),
        ("inconclusive", "Over 3 training seeds each, this is inconclusive."),
    ],
)
def test_several_seeds_allow_a_claim_or_none(said: str, claim: str) -> None:
    row = pair("kl", "sft", -0.188) | {"unit": "training seeds", "verdict": said, "seeds": [3, 3]}
    found = verdict(report({"kl": KL, "sft": SFT}, row))
    assert claim in found
    assert ("difference 18.8" in found) == (said == "supported")
    assert "no claim" not in found


def test_of_three_arms_the_supported_ones_are_named() -> None:
    seeds = {"unit": "training seeds", "seeds": [3, 3]}
    rows = [
        pair("sft", "kl", 0.1) | seeds | {"verdict": "inconclusive"},
        pair("rl", "sft", -0.25) | seeds | {"verdict": "supported"},
    ]
    found = verdict(report({"kl": KL, "sft": SFT, "rl": RL}, *rows))
    assert "Over 3 training seeds each, 1 of 2 differences are supported (to rl)." in found


def test_a_student_is_held_against_its_start_and_its_teacher() -> None:
    """The question of half_depth: how much of the teacher is left."""
    arms = {
        "teacher": arm("teacher", 0.998),
        "start": arm("start", 0.947, builds_on=["teacher"], begins_with=["teacher"]),
        "kl": arm("student", 0.988, size="81.4 M, 15 of 30 layers", builds_on=["teacher", "start"], teachers=["teacher"],
                  begins_with=["start", "teacher"]),
    }  # fmt: skip
    said = verdict(report(arms, pair("teacher", "kl", 0.01, 0.02), pair("start", "kl", -0.041, 0.02)))
    assert said == (
        "kl (15 of 30 layers) solved 98.8% of 256 held-out problems, 4.1 points more than its start (94.7%; 95% CI of the "
        "difference 2.1–6.1) and with no difference shown to its teacher (99.8%; −1.0 points, 95% CI −3.0 to 1.0)."
    )


def test_an_interval_without_zero_that_shows_no_difference_says_why() -> None:
    row = pair("kl", "sft", -0.07) | {"verdict": "not shown", "p_holm": 0.071}
    said = verdict(report({"kl": KL, "sft": SFT}, row))
    assert "(no difference shown: 7.0 points, 95% CI 1.0–13.0, p = 0.071 after Holm's correction)." in said


def test_a_pipeline_is_its_last_model_against_the_first_with_the_stations_in_order() -> None:
    """R1: rl taught sft, but both began with the base, so rl is a station and not the teacher."""
    arms = {
        "sft": arm("student", 0.45, builds_on=["base", "cold", "rl"], teachers=["rl"], begins_with=["base"]),
        "base": arm("start", 0.01),
        "rl": arm("teacher", 0.5, builds_on=["base", "cold"], begins_with=["cold", "base"]),
        "cold": arm("student", 0.12, builds_on=["base"], begins_with=["base"]),
        "final": arm(
            "student", 0.62, builds_on=["base", "cold", "rl", "sft"], teachers=["rl"], begins_with=["sft", "base"]
        ),
    }
    said = verdict(report(arms, pair("base", "final", -0.61), pair("final", "rl", 0.12)))
    assert said == (
        "final solved 62.0% of 256 held-out problems, 61.0 points more than base (1.0%; 95% CI of the difference 55.0–67.0). "
        "On the way, cold solved 12.0%, rl 50.0% and sft 45.0%."
    )


def test_one_arm_alone_has_its_interval() -> None:
    assert verdict(report({"kl": KL})) == "kl solved 39.8% of 256 held-out problems (95% CI 33.8–45.8)."


def test_arms_without_a_comparison_are_said_not_to_be_compared() -> None:
    said = verdict(report({"kl": KL, "sft": SFT}))
    assert said.endswith("kl (distributions) 39.8% (not compared). The two were not compared.")


def test_many_arms_are_not_all_named() -> None:
    arms = {f"a{n}": arm("student", 0.5 - 0.03 * n) for n in range(9)}
    pairs = [pair("a0", f"a{n}", 0.03 * n) for n in range(1, 9)]
    said = verdict(report(arms, *pairs))
    assert "a3 41.0%" in said
    assert "a4" not in said
    assert "5 others 26.0–38.0%" in said


def test_held_out_kl_is_a_line_of_its_own_with_differences_to_the_nearest() -> None:
    def near(row: ArmRow, value: float) -> ArmRow:
        return {**row, "divergence": {"kl": interval(value, 0.01)}}  # type: ignore[typeddict-item]

    arms = {"sft": near(SFT, 0.1), "kl": near(KL, 0.02), "rl": near(RL, 0.03)}
    far = [
        {"a": "kl", "b": "sft", "difference": interval(-0.08, 0.02)},
        {"a": "rl", "b": "kl", "difference": interval(0.01, 0.02)},
    ]
    said = verdict(report(arms, pair("kl", "sft", -0.188), divergence_pairs=far))
    assert said.split("\n")[1] == (
        "kl's held-out KL to the teacher is 0.020 nats a token, rl's 0.030 (no difference shown: 0.010, 95% CI −0.010 to 0.030) and "
        "sft's 0.100 (difference 0.080, 95% CI 0.060–0.100)."
    )


def test_of_a_sweep_those_with_most_traces_are_compared_and_a_trace_is_priced_in_text() -> None:
    arms = {
        f"{way}-{number}": {**arm("student", accuracy), "traces": {"comparison": "v", "way": way, "number": number}}
        for way, number, accuracy in (("sft", 64, 0.2), ("sft", 1024, 0.4), ("kl", 64, 0.3), ("kl", 1024, 0.6))
    }
    rows = [{"comparison": where, "way": "kl", "measure": "accuracy", "ratio": 2.1, "low": 1.4, "high": 16.0, "low_at_end": False,
             "high_at_end": True, "at_end": False, "seeds": 3} for where in ("v", "other")]  # fmt: skip
    said = verdict(report(arms, pair("kl-1024", "sft-1024", 0.2), trace_ratios=rows))  # type: ignore[arg-type]
    assert said == (
        "With 1,024 traces, kl solved 60.0% of 256 held-out problems and sft 40.0% (difference 20.0 points, 95% CI 14.0–26.0). "
        "One training seed each: no claim about the methods.\n"
        "One trace is worth this many traces of text: by accuracy kl 2.1 [1.4, >16]."
    )


def test_without_evaluations_the_measured_distances_are_the_answer() -> None:
    far = {
        "bound": interval(0.1),
        "label_nll": interval(1.0),
        "overconfidence": interval(0.1),
        "traces": 9,
        "tokens": 99,
    }
    stages = [
        {
            "name": name,
            "kind": "divergence",
            "status": "done",
            "seconds": 1.0,
            "cost": {},
            "divergence": {**far, "kl": interval(kl, 0.01)},
        }
        for name, kl in (("near_start", 0.2), ("near_kl", 0.05))
    ]
    made = report({}, stages=stages)
    assert verdict(made) == (
        "near_kl measured 0.050 nats a token of held-out KL to the teacher (95% CI 0.040–0.060) and near_start measured 0.200 "
        "(95% CI 0.190–0.210)."
    )
    tables = [block for block in blocks(made) if isinstance(block, Table) and block.header[0] == "arm, nats a token"]
    assert [row[0] for row in tables[0].rows] == ["near_start", "near_kl"]


def test_each_task_is_a_line_with_its_own_names() -> None:
    """The arms of the second comparison are stored under longer names, and its differences are not mixed with the first's."""
    evaluations = {
        key: {
            "stages": [key],
            "task": task,
            "split": "held_out",
            "problems": 256,
            "samples": 1,
            "sampling": "greedy",
            "main": True,
        }
        for key, task in (("easy", "sums"), ("hard", "products"))
    }
    arms = {name: {**row, "evaluation": "easy"} for name, row in (("kl", KL), ("sft", SFT))}
    arms |= {f"hard.{name}": {**row, "evaluation": "hard"} for name, row in (("kl", SFT), ("sft", KL))}
    pairs = [pair("kl", "sft", -0.188), pair("hard.kl", "hard.sft", 0.188)]
    made: RunReport = report(arms, *pairs, evaluations=evaluations)  # type: ignore[arg-type]
    first, second = verdict(made).split("\n")
    assert first.startswith("On sums: sft (text) solved 58.6%")
    assert second.startswith("On products: kl (text) solved 58.6%")
    assert "(difference 18.8 points" in second
    assert [group.heading("Accuracy") for group in groups(made)] == ["Accuracy: sums", "Accuracy: products"]


def test_a_run_that_has_not_ended_says_where_it_is() -> None:
    def stage(name: str, status: str, **more: Any) -> dict[str, Any]:
        return {"name": name, "kind": "train", "status": status, "seconds": 0.0, "cost": {}, **more}

    guess = {"tokens": 1, "bytes": 0, "flops": 1, "seconds": 480.0}
    running = stage("kl", "running", seconds=130.0, predicted=guess, progress={"step": 40.0, "steps": 75.0})
    stages = [stage("teacher", "done"), running, {**stage("verdict", "pending"), "kind": "compare"}]
    assert verdict(report({}, stages=stages)) == (
        "Under way: stage 2 of 3, kl (train, step 40 of 75, 2 min 10 s of about 8 min 00 s). No model of this run has been "
        "evaluated yet."
    )
    failed = [stages[0], stage("kl", "failed", error="stages.kl: no trace is left.\nmore"), stages[2]]
    assert verdict(report({"sft": SFT}, stages=failed)).startswith(
        "Failed: stage 2 of 3, kl (train). stages.kl: no trace is left.\nSo far: sft solved"
    )
    waiting = [stages[0], stage("kl", "pending")]
    assert verdict(report({}, stages=waiting)).startswith("1 of 2 stages are done; kl is next.")
    assert verdict(report({}, stages=[stages[0]])) == "The run is done. This recipe evaluates no model."
