"""Rewards on generated traces: a user's rewards through the real command line; whole groups, resuming, failures."""

from __future__ import annotations

import io
import re
from collections import defaultdict
from pathlib import Path

import pytest
from project import REFERENCE, SUMS, Project

from distill import recipe
from distill.progress import Screen
from distill.records import UserError
from distill.run.plan import check_plugs
from distill.stages import generate
from distill.stages.context import Context
from distill.traces.reader import open_traces
from distill.traces.writer import TraceWriter

REWARDS = '''
def letters(group):
    return [float(len(text)) for text in group.texts]

def rank(group):
    """Rank among the problem's completions by length: 0 for the shortest."""
    order = sorted(range(len(group)), key=lambda n: (len(group.texts[n]), n))
    return [float(order.index(n)) for n in range(len(group))]

def fails_at_times(group):
    if int(group.problem.problem_id, 16) % 2:
        raise ConnectionError("the judge is out")
    return [1.0] * len(group)

def broken(group):
    raise ConnectionError("the judge is out")

def hangs(group):
    import time
    time.sleep(600)
'''


def tree(tiny_dir: Path, **changes) -> dict:
    stage = {
        "kind": "generate", "model": "base", "task": "sums", "problems": 5, "samples": 4, "top_logprobs": 4,
        "sampling": {"max_tokens": 6}, "engine": REFERENCE, "shard_rows": 4,
        "rewards": [
            {"fn": "ownrewards:letters", "weight": 0.5},
            {"fn": "ownrewards:rank", "weight": -2},
            {"fn": "random", "weight": 0, "probability": 0.5},
        ],
    }  # fmt: skip
    return {
        "name": "rewarded",
        "models": {"base": str(tiny_dir)},
        "tasks": {"sums": SUMS},
        "stages": {
            "traces": {**stage, **changes},
            "best": {"kind": "filter", "data": "traces", "keep": [{"fn": "best_of_n"}]},
            "longest": {"kind": "filter", "data": "traces", "keep": [{"fn": "best_of_n", "reward": "letters"}]},
        },
    }


def project(folder: Path, tiny_dir: Path, **changes) -> Project:
    folder.mkdir(exist_ok=True)
    (folder / "ownrewards.py").write_text(REWARDS)
    return Project(folder, tree(tiny_dir, **changes))


@pytest.fixture(scope="module")
def finished(tiny_dir, tmp_path_factory) -> Project:
    made = project(tmp_path_factory.mktemp("rewarded"), tiny_dir)
    done = made.run()
    assert done.returncode == 0, done.stdout + done.stderr
    return made


def named(row: dict) -> dict[str, float | None]:
    return {each["name"]: each["value"] for each in row["rewards"]}


def by_problem(rows: list[dict]) -> dict[str, list[dict]]:
    groups = defaultdict(list)
    for row in sorted(rows, key=lambda row: row["sample"]):
        groups[row["problem_id"]].append(row)
    return groups


def kept(project: Project, stage: str) -> set[str]:
    return {i for block in open_traces(project.run_dir / stage / "traces").blocks() for i in block.trace_id}


def test_a_trace_carries_the_named_rewards_and_their_weighted_sum(finished):
    rows = finished.rows("traces")
    assert len(rows) == 20
    for group in by_problem(rows).values():
        lengths = [len(row["completion"]) for row in group]
        order = sorted(range(4), key=lambda n: (lengths[n], n))
        for n, row in enumerate(group):
            found = named(row)
            assert list(found) == ["letters", "random", "rank"]
            assert found["letters"] == lengths[n]
            assert found["rank"] == order.index(
                n
            )  # rank in the whole group, even if other completions are in another shard
            assert row["reward"] == pytest.approx(0.5 * found["letters"] - 2 * found["rank"])
            assert row["correct"] is False
    assert {named(row)["random"] for row in rows} == {0.0, 1.0}
    assert finished.state("traces")["metrics"]["rewards_failed"] == {"letters": 0, "rank": 0, "random": 0}
    assert finished.state("traces")["cost"]["samples_failed"] == 0


def test_best_of_n_selects_by_the_sum_and_by_a_name(finished):
    groups = by_problem(finished.rows("traces"))
    for stage, value in (("best", lambda row: row["reward"]), ("longest", lambda row: named(row)["letters"])):
        want = {max(group, key=lambda row: (value(row), -row["sample"]))["trace_id"] for group in groups.values()}
        assert kept(finished, stage) == want
    assert kept(finished, "best") != kept(finished, "longest")


def test_without_rewards_a_trace_has_the_verdict(tiny_dir, tmp_path):
    made = project(tmp_path / "plain", tiny_dir, rewards=[])
    assert made.run("--only", "traces").returncode == 0
    for row in made.rows("traces"):
        assert named(row) == {"accuracy": 0.0}
        assert row["reward"] == 0.0
    assert "rewards_failed" not in made.state("traces")["metrics"]


def test_other_rewards_are_another_stage(finished):
    done = finished.run("stages.traces.rewards=[{fn: accuracy}]")
    assert done.returncode == 2
    assert "rewards" in done.stderr
    assert "--redo traces" in done.stderr
    assert finished.run("stages.traces.reward_timeout=5").returncode == 0


@pytest.mark.parametrize("num", [1, 6, 13])
def test_resumed_equals_uninterrupted_also_inside_a_group(finished, tmp_path, num, monkeypatch):
    """Only the first rows exist and one group is incomplete; rewards still see the whole group."""
    monkeypatch.syspath_prepend(str(finished.folder))
    ctx = Context(recipe=recipe.validate(finished.tree), run=tmp_path, name="traces", screen=Screen(io.StringIO()))
    whole = open_traces(finished.run_dir / "traces" / "traces")
    with TraceWriter(ctx.folder / "traces", whole.metadata) as writer:
        for block in whole.where([row < num for row in range(20)]).blocks():
            writer.add(block)
    generate.run(ctx.recipe.stages["traces"], ctx)
    rows, want = finished.rows_in(ctx.folder / "traces"), finished.rows("traces")
    assert len(rows) == 20
    for row, original in zip(rows, want, strict=True):
        for key in ("trace_id", "completion_ids", "reward", "rewards", "correct"):
            assert row[key] == original[key], key


def test_a_reward_that_fails_at_times_is_counted_and_leaves_no_scores(tiny_dir, tmp_path):
    made = project(
        tmp_path / "at_times",
        tiny_dir,
        rewards=[{"fn": "ownrewards:letters"}, {"fn": "ownrewards:fails_at_times"}],
        problems=8,
        samples=2,
    )
    done = made.run("--only", "traces")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = made.rows("traces")
    failed = {problem for problem in by_problem(rows) if int(problem, 16) % 2}
    assert 0 < len(failed) < 8
    for row in rows:
        found = named(row)
        assert found["letters"] == len(row["completion"])
        assert found["fails_at_times"] == (None if row["problem_id"] in failed else 1.0)
        assert row["reward"] == (None if row["problem_id"] in failed else found["letters"] + 1)
    state = made.state("traces")
    assert state["metrics"]["rewards_failed"] == {"letters": 0, "fails_at_times": len(failed)}
    assert state["cost"]["samples_failed"] == 2 * len(failed)


@pytest.mark.parametrize(("reward", "seconds"), [("broken", 60), ("hangs", 0.2)])
def test_a_reward_that_never_works_stops_the_stage_by_name(tiny_dir, tmp_path, reward, seconds):
    made = project(
        tmp_path / "bad",
        tiny_dir,
        rewards=[{"fn": f"ownrewards:{reward}"}, {"fn": "think_format"}],
        problems=40,
        samples=1,
        reward_timeout=seconds,
    )
    done = made.run("--only", "traces", "--no-trials")
    assert done.returncode == 2
    assert f"rewards.{reward}" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"fn": "acuracy"}, "stages.traces.rewards.0: there is no 'acuracy'.*'accuracy'"),
        ({"fn": "accuracy", "partal": True}, "rewards.0.partal: unknown key"),
        ({"fn": "nomodule:nothing"}, "cannot import 'nomodule:nothing'"),
        ({"fn": "accuracy", "weight": 0}, "rewards: no reward has a weight other than 0"),
    ],
)
def test_mistakes_are_one_message_before_anything_loads(tiny_dir, named, message):
    with pytest.raises(UserError) as caught:
        check_plugs(recipe.validate(tree(tiny_dir, rewards=[named])))
    assert re.search(message, str(caught.value))
    assert len(str(caught.value).splitlines()) == 1
