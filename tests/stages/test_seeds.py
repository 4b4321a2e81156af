"""Several training seeds, a budget in another stage's FLOPs, and snapshots, in one run on a tiny model."""

from __future__ import annotations

import io
import json

import pytest
import torch
from project import REFERENCE, SUMS, Project

from distill import models, recipe
from distill.progress import Screen
from distill.recipe import TrainStage
from distill.records import Cost, UserError
from distill.stages.budget import budget_of
from distill.stages.context import Context
from distill.stages.snapshots import Snapshot, snapshots_of


def tree(start: str) -> dict:
    training = {
        "model": "start",
        "data": "traces",
        "keep_truncated": True,
        "batch_traces": 2,
        "lr": 1e-3,
        "dtype": "float32",
    }
    rewards = [{"fn": "random"}]
    few = {"max_tokens": 5}
    return {
        "name": "seeds",
        "models": {"start": start},
        "tasks": {"sums": SUMS},
        "stages": {
            "traces": {
                "kind": "generate",
                "model": "start",
                "task": "sums",
                "problems": 6,
                "sampling": few,
                "top_logprobs": 8,
                "engine": REFERENCE,
            },
            "kl": {"kind": "train", **training, "steps": 6, "seeds": [1, 2], "snapshot_every": 2},
            "rl": {
                "kind": "grpo",
                "model": "start",
                "task": "sums",
                "rewards": rewards,
                "prompts": 2,
                "group_size": 2,
                "sampling": few,
                "engine": REFERENCE,
                "dtype": "float32",
                "budget": {"flops_of": "kl"},
                "snapshot_every": 1,
            },
            "verdict": {
                "kind": "compare",
                "arms": {"start": "start", "kl": "kl", "rl": "rl"},
                "task": "sums",
                "problems": 5,
                "snapshot_problems": 3,
                "sampling": {**few, "temperature": 0},
                "engine": REFERENCE,
            },
        },
    }


@pytest.fixture(scope="module")
def finished(tiny_dir, tmp_path_factory) -> Project:
    project = Project(tmp_path_factory.mktemp("seeds"), tree(str(tiny_dir)))
    done = project.run()
    assert done.returncode == 0, done.stdout + done.stderr
    return project


def test_copies_go_together_seed_by_seed(tiny_dir):
    made = recipe.validate(tree(str(tiny_dir)))
    assert [*made.stages] == [
        "traces", "kl@1", "kl@2", "rl@1", "rl@2", "verdict",
    ]  # fmt: skip
    assert made.stages["rl@2"].budget.flops_of == "kl@2"
    assert made.stages["verdict"].arms["kl"] == {1: "kl@1", 2: "kl@2"}
    assert [made.stages[name].seed for name in ("traces", "kl@1", "rl@2")] == [None, 1, 2]
    assert recipe.validate(made.model_dump(mode="json")) == made


def test_seeds_that_do_not_go_together_are_refused(tiny_dir):
    wrong = tree(str(tiny_dir))
    wrong["stages"]["rl"]["seeds"] = [1, 2, 3]
    with pytest.raises(UserError, match=r"stages\.rl: has seeds \[1, 2, 3\], but its input 'kl'"):
        recipe.validate(wrong)
    wrong = tree(str(tiny_dir)) | {"seeds": [4, 4]}
    with pytest.raises(UserError, match="distinct"):
        recipe.validate(wrong)
    wrong = tree(str(tiny_dir))
    wrong["stages"]["verdict"]["seeds"] = [1, 2]
    with pytest.raises(UserError, match="a compare stage takes no seeds"):
        recipe.validate(wrong)


def test_of_the_recipe_copies_everything_but_the_comparison(tiny_dir):
    whole = tree(str(tiny_dir)) | {"seeds": [5, 6]}
    del whole["stages"]["kl"]["seeds"]
    made = recipe.validate(whole)
    assert made.stages["kl@6"].data == "traces@6"
    assert sum("@" in name for name in made.stages) == 6


def test_an_arm_may_name_its_seeds_one_by_one(tiny_dir):
    named = tree(str(tiny_dir))
    named["stages"]["verdict"]["arms"] = {"kl": {1: "kl"}, "mixed": {2: "rl", 7: "start"}}
    arms = recipe.validate(named).stages["verdict"].arms
    assert arms == {"kl": {1: "kl@1"}, "mixed": {2: "rl@2", 7: "start"}}
    named["stages"]["verdict"]["arms"]["kl"] = {3: "kl"}
    with pytest.raises(UserError, match=r"arms\.kl: .* is not trained with seed 3; its seeds are \[1, 2\]"):
        recipe.validate(named)


def test_a_budget_needs_a_stage_that_trains(tiny_dir):
    wrong = tree(str(tiny_dir))
    wrong["stages"]["rl"]["budget"] = {"flops_of": "traces"}
    with pytest.raises(UserError, match=r"budget\.flops_of: 'traces' is a stage of kind generate"):
        recipe.validate(wrong)
    wrong["stages"]["rl"]["budget"] = {"flops_of": "kk"}
    with pytest.raises(UserError, match=r"no stage 'kk'.*kl"):
        recipe.validate(wrong)
    wrong["stages"]["rl"] |= {"steps": 3, "budget": {"flops_of": "kl"}}
    with pytest.raises(UserError, match="set exactly one of steps and budget"):
        recipe.validate(wrong)


def test_seeds_train_differently_and_are_evaluated_on_the_same_problems(finished):
    assert finished.losses("kl@1") != finished.losses("kl@2")
    problems = [{row["problem_id"] for row in finished.rows(f"verdict.kl@{n}")} for n in (1, 2)]
    assert problems[0] == problems[1] == {row["problem_id"] for row in finished.rows("verdict.start")}


def test_a_budget_is_spent_to_the_nearest_step(finished):
    for seed in (1, 2):
        standing = finished.state(f"rl@{seed}")
        # The start wrote kl's traces itself, so they are the student's own cost.
        allowed = sum(finished.state(name)["cost"]["flops"] for name in (f"kl@{seed}", "traces"))
        spent, num_steps = standing["cost"]["flops"], standing["metrics"]["steps"]
        assert abs(spent - allowed) <= 0.6 * spent / num_steps
        assert num_steps == len(finished.losses(f"rl@{seed}")) > 1


def test_a_budget_counts_from_what_both_rest_on(finished, tiny_dir):
    made = recipe.validate(tree(str(tiny_dir)))

    def left(model: str, times: float = 1.0) -> float:
        other = {"steps": None, "budget": {"flops_of": "kl@2", "times": times}, "model": model}
        stage = TrainStage.model_validate(made.stages["kl@1"].model_dump() | other)
        changed = made.model_copy(update={"stages": {**made.stages, "sft": stage}})
        found = budget_of(stage, Context(changed, finished.run_dir, "sft", Screen(io.StringIO())))
        assert found is not None
        return found.flops

    assert left("start") == finished.state("kl@2")["cost"]["flops"]  # both share the cost of the traces
    with pytest.raises(UserError, match="nothing is left to spend"):
        left("kl@1", times=0.5)  # kl@1 has spent about as much as kl@2


def test_points_are_the_models_of_the_way(finished):
    points = snapshots_of(finished.run_dir / "kl@1")
    assert [point.step for point in points] == [2, 4]
    flops = finished.state("kl@1")["cost"]["flops"]
    assert [point.cost.flops / flops for point in points] == pytest.approx([1 / 3, 2 / 3], rel=0.2)
    final = finished.run_dir / "kl@1" / "snapshots" / "step-00000006"
    last, end = (
        dict(Snapshot(final, 6, Cost()).weights()),
        models.load(finished.run_dir / "kl@1" / "model", dtype="float32"),
    )
    for name, weight in end.named_parameters():
        assert (last[name] == weight).all()


def test_a_point_is_evaluated_with_its_own_weights(finished, tokenizer):
    """The greedy completion of the weights of step 2, by transformers."""
    folder = finished.run_dir / "verdict.kl@1" / "snapshots"
    shards = {one.name: finished.rows_in(one) for one in folder.iterdir()}
    assert {name: len(rows) for name, rows in shards.items()} == {f"step-{n:08d}": 3 for n in (2, 4)}
    model = models.load(finished.run_dir / "kl@1" / "model", dtype="float32").eval()
    (point, _) = snapshots_of(finished.run_dir / "kl@1")
    model.load_state_dict(dict(point.weights()), strict=False)
    row = shards["step-00000002"][0]
    ids = torch.tensor([row["prompt_ids"]]).long()
    written = model.generate(ids, do_sample=False, max_new_tokens=5)[0, ids.shape[1] :]
    assert row["completion_ids"] == written.tolist()


def test_the_report_has_arms_over_seeds_with_their_way(finished):
    report = json.loads((finished.run_dir / "report.json").read_text())
    assert {arm: row["seeds"] for arm, row in report["arms"].items()} == {
        "start": 1, "kl": 2, "rl": 2,
    }  # fmt: skip
    kl = report["arms"]["kl"]
    assert [one["seed"] for one in kl["by_seed"]] == [1, 2]
    spent = [finished.state(f"kl@{n}")["cost"]["flops"] for n in (1, 2)]
    before = finished.state("traces")["cost"]["flops"]
    assert kl["flops"] == pytest.approx(before + sum(spent) / 2)
    along = [(point["flops"] - before) / (kl["flops"] - before) for point in kl["snapshots"]]
    assert along == pytest.approx([1 / 3, 2 / 3], rel=0.2)
    pair = next(row for row in report["comparisons"] if (row["a"], row["b"]) == ("kl", "rl"))
    assert (pair["unit"], pair["seeds"]) == ("training seeds", [2, 2])


def test_another_seed_adds_its_copies_only(finished):
    finished.tree["stages"]["kl"]["seeds"] = [1, 2, 3]
    done = finished.rewrite().run()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kl@1: done already" in done.stdout
    assert "verdict.rl@2: done already" in done.stdout
    report = json.loads((finished.run_dir / "report.json").read_text())
    assert report["arms"]["rl"]["seeds"] == 3


def test_a_stage_s_name_means_all_its_copies(finished):
    shown = finished.run("--redo", "rl", "--dry-run", "seed=17")
    assert shown.returncode == 0, shown.stderr
    redone = [line.split()[0] for line in shown.stdout.splitlines() if " redo " in line]
    assert {"rl@1", "rl@2"} <= {*redone}
    assert not any(name.startswith("kl") for name in redone)
    wrong = finished.run("--redo", "rll", "--dry-run")
    assert wrong.returncode == 2
    assert "no stage 'rll'" in wrong.stderr


def test_the_report_says_the_command_that_was_typed(finished):
    report = json.loads((finished.run_dir / "report.json").read_text())
    assert report["reproduce"] == ["distill run seeds.yaml"]
