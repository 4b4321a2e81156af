"""What a run's report says of its arms: which evaluations belong together, what each arm is, and what it holds of an open run."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from project import SUMS

from distill import recipe, run_folder
from distill.reports.run_report import RunReport
from distill.run.collect import collect_run

TRAIN: dict[str, Any] = {"kind": "train", "steps": 3, "loss": {"fn": "cross_entropy"}}
SIGNAL = {
    "kind": "eval",
    "model": "cold",
    "task": "sums",
    "problems": 48,
    "samples": 8,
    "sampling": {"temperature": 1.0},
}
GREEDY = {"task": "sums", "problems": 256, "sampling": {"temperature": 0, "max_tokens": 48}}
STAGES: dict[str, dict[str, Any]] = {
    "cold": {**TRAIN, "model": "base", "data": "data/sums.jsonl"},
    "rl": {"kind": "grpo", "model": "cold", "task": "sums", "rewards": [{"fn": "accuracy"}, {"fn": "think_format", "weight": 0.2}],
           "objective": {"fn": "dapo"}, "steps": 2},
    "traces": {"kind": "generate", "model": "rl", "task": "sums", "problems": 4},
    "clean": {"kind": "filter", "data": "traces", "keep": [{"fn": "correct"}]},
    "small": {"kind": "prune", "model": "base", "layers": 2},
    "kl": {**TRAIN, "model": "small", "data": "clean", "loss": {"fn": "forward_kl"}, "seeds": [1, 2]},
    "own": {"kind": "on_policy", "model": "small", "task": "sums", "teacher": "rl", "steps": 2},
}  # fmt: skip
SHAPE = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
         "vocab_size": 32, "tie_word_embeddings": True}  # fmt: skip

PRUNED = {"layers_before": 4, "layers_kept": [0, 3]}


def run_of(folder: Path, stages: dict[str, dict[str, Any]], undone: tuple[str, ...] = ()) -> Path:
    """A run of these stages without a model's weights, as their processes would have left it, but for the undone ones."""
    tree = {"name": "arms", "models": {"base": "some/Model-1B"}, "tasks": {"sums": SUMS}, "stages": stages}
    made = recipe.validate(tree)
    interval = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 256}
    scores = {"accuracy": interval, "pass_at": {"1": interval}, "maj_at": {}, "clipped_ratio": 0.0, "mean_length": 9.0,
              "problems": 256, "samples": 1, "unjudged": 0}  # fmt: skip
    for name, stage in made.stages.items():
        for node, config in {
            name: stage,
            **{f"{name}.{below}": one for below, one in stage.children().items()},
        }.items():
            if node in undone:
                continue
            by_kind = {"eval": scores, "train": {"steps": 3, "examples": 598}, "prune": PRUNED}
            metrics = by_kind.get(config.kind, {"steps": 2})
            state = run_folder.State(
                kind=config.kind, config=config.model_dump(mode="json"), inputs={}, status="done", metrics=metrics
            )
            state.cost = {"flops": 1.0}
            if config.kind == "compare":
                by_seed = [{"seed": seed, "accuracy": interval} for seed in (1, 2)]
                state.metrics = {
                    "arms": {arm: scores | {"by_seed": by_seed} for arm in stage.evaluations()},
                    "comparisons": [],
                }
            if config.writes == "model":
                model = folder / node / "model"
                model.mkdir(parents=True)
                (model / "config.json").write_text(json.dumps(SHAPE))
                (model / "model.safetensors").write_bytes(b"x" * 1000)
            run_folder.write(folder / node, state)
    (folder / "resolved.yaml").write_text(yaml.safe_dump(made.model_dump(mode="json"), sort_keys=False))
    return folder


def collected(folder: Path, **evaluating: dict[str, Any]) -> RunReport:
    return collect_run(run_of(folder, {**STAGES, **evaluating}))


def test_an_evaluation_under_other_conditions_is_a_measurement(tmp_path: Path) -> None:
    """r1's `signal` has 48 problems at another temperature; `again` has the comparison's conditions and is an arm."""
    report = collected(
        tmp_path,
        signal=SIGNAL,
        again={"kind": "eval", "model": "own", **GREEDY},
        verdict={"kind": "compare", "arms": {"cold": "cold", "rl": "rl", "kl": "kl"}, **GREEDY},
    )
    assert list(report["measurements"]) == ["signal"]
    assert set(report["arms"]) == {"cold", "rl", "kl", "again"}
    assert {arm["evaluation"] for arm in report["arms"].values()} == {"again"}
    assert report["evaluations"]["signal"]["sampling"] == "temperature 1, at most 256 tokens"
    assert report["evaluations"]["again"]["sampling"] == "greedy, at most 48 tokens"
    assert report["evaluations"]["again"]["stages"] == ["again", "verdict"]


@pytest.mark.parametrize(("other", "main"), [({}, {"last"}), ({"task": "more"}, {"signal", "last"})])
def test_without_a_comparison_each_task_has_one_evaluation_that_counts(
    tmp_path: Path, other: dict[str, Any], main: set[str]
) -> None:
    tree = {**STAGES, "signal": SIGNAL, "last": {"kind": "eval", "model": "own", **GREEDY, **other}}
    made = recipe.validate(
        {"name": "t", "models": {"base": "m"}, "tasks": {"sums": SUMS, "more": SUMS}, "stages": tree}
    )
    from distill.run.collect_arms import evaluations_of

    assert {key for key, row in evaluations_of(made).items() if row["main"]} == main


def test_each_arm_says_what_it_is(tmp_path: Path) -> None:
    arms = {"base": "base", "cold": "cold", "rl": "rl", "small": "small", "kl": "kl", "own": "own"}
    report = collected(tmp_path, verdict={"kind": "compare", "arms": arms, **GREEDY})
    about = {name: arm["about"] for name, arm in report["arms"].items()}
    assert about["base"]["training"] == "as it comes"
    assert (about["cold"]["training"], about["cold"]["data"]) == ("cross_entropy", "598 rows of sums.jsonl")
    assert about["rl"]["training"] == "RL (dapo); rewards accuracy, think_format × 0.2"
    assert about["small"]["training"] == "pruned, not trained"
    kl = about["kl"]
    assert (kl["training"], kl["data"], kl["steps"], kl["method"]) == (
        "forward_kl",
        "598 traces of rl",
        "3",
        "distributions",
    )
    # By hand: 2 layers of 4 · 8 · 8 and 3 · 8 · 16 weights and two norms of 8, a last norm of 8, 32 · 8 of the tied embedding.
    assert (kl["start"], kl["size"], kl["base"]) == (
        "small",
        f"{(2 * (256 + 384 + 16) + 8 + 256) / 1000:.3g} k, 2 of 4 layers",
        "Model-1B",
    )
    assert (kl["teachers"], kl["begins_with"]) == (["rl"], ["small", "base"])
    assert set(kl["builds_on"]) == {"base", "cold", "rl", "small"}
    assert about["own"]["data"] == "its own completions, 8 problems × 4 a step, scored by rl"
    assert report["arms"]["kl"]["seeds"] == 2


def test_arms_of_two_comparisons_are_not_mixed(tmp_path: Path) -> None:
    """The differences of a second comparison carry the names that its arms have in the report."""
    pair = {"kind": "compare", "arms": {"a": "cold", "b": "rl"}}
    run = run_of(tmp_path, {**STAGES, "one": {**pair, **GREEDY}, "two": {**pair, **GREEDY, "problems": 99}})
    for name in ("one", "two"):
        state = run_folder.read(run / name)
        assert state is not None
        state.metrics = {"arms": {}, "comparisons": [{"a": "a", "b": "b"}],
                         "examples": [{"won_by": "a", "lost_by": "b", "answers": [{"arm": "b"}]}]}  # fmt: skip
        run_folder.write(run / name, state)
    report = collect_run(run)
    assert list(report["arms"]) == ["a", "b", "two.a", "two.b"]
    assert [(row["a"], row["b"]) for row in report["comparisons"]] == [("a", "b"), ("two.a", "two.b")]
    assert report["examples"][1] == {"won_by": "two.a", "lost_by": "two.b", "answers": [{"arm": "two.b"}]}


def test_a_stage_that_writes_a_model_has_written_its_bytes(tmp_path: Path) -> None:
    report = collected(tmp_path)
    written = {stage["name"]: stage["cost"].get("model_bytes", 0) for stage in report["stages"]}
    assert written["cold"] == 1000 + len(json.dumps(SHAPE))
    assert written["clean"] == 0


def test_an_open_run_says_how_far_its_stage_is(tmp_path: Path) -> None:
    """A running stage has taken the time up to its newest file; a failed one says why."""
    verdict = {"kind": "compare", "arms": {"cold": "cold", "rl": "rl"}, **GREEDY}
    run = run_of(tmp_path, {**STAGES, "verdict": verdict}, undone=("rl", "verdict", "verdict.cold", "verdict.rl"))
    state = run_folder.State(kind="grpo", config={"steps": 2}, inputs={}, status="running", began=time.time() - 100)
    run_folder.write(run / "rl", state)
    lines = run / "rl" / "metrics.jsonl"
    lines.write_text('{"step": 1, "reward": 0.5}\n')
    os.utime(run / "rl" / "stage.json", (state.began, state.began))
    os.utime(lines, (state.began + 60, state.began + 60))
    report = collect_run(run)
    (row,) = (stage for stage in report["stages"] if stage["name"] == "rl")
    assert row["progress"] == {"step": 1.0, "steps": 2.0}
    assert row["seconds"] == pytest.approx(60, abs=1)
    assert report["arms"] == {}
    needed = {name: one["arms"] for one in report["ledger"] for name in one["stages"]}
    assert needed["cold"] == ["cold", "rl"]  # although neither is evaluated yet
    state.status = "failed"
    run_folder.write(run / "rl", state)
    (run / "rl" / "error.txt").write_text("no reward differs\n")
    (row,) = (stage for stage in collect_run(run)["stages"] if stage["name"] == "rl")
    assert (row["status"], row["error"]) == ("failed", "no reward differs")
