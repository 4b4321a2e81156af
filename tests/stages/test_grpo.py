"""grpo through the real command line on the tiny model: its output, kills and resumes, and refused settings."""

from __future__ import annotations

import json
import re

import pytest
from project import REFERENCE, SUMS, Project

from distill import recipe
from distill.records import UserError
from distill.run.plan import check_plugs

REWARDS = '''
def even(group):
    """1 for an even number of letters, which a random model reaches half of the time."""
    return [float(len(text) % 2 == 0) for text in group.texts]

def broken(group):
    raise ConnectionError("the judge is out")

def hangs(group):
    import time
    time.sleep(600)

def fails_at_times(group):
    if int(group.problem.problem_id, 16) % 2:
        raise ConnectionError("the judge is out")
    return [float(len(text)) for text in group.texts]
'''


def tree(tiny_dir, **changes):
    stage = {
        "kind": "grpo",
        "model": "base",
        "task": "sums",
        "rewards": [{"fn": "myrewards:even"}, {"fn": "think_format", "weight": 0.5}],
        "objective": {"fn": "grpo", "beta": 0.01, "mask_truncated": False},
        "steps": 6,
        "prompts": 2,
        "group_size": 4,
        "mini_batches": 2,
        "sampling": {"max_tokens": 6},
        "engine": REFERENCE,
        "dtype": "float32",
        "lr": 1e-3,
        "checkpoint_every": 1,
        "log_completions_every": 1,
    }
    return {
        "name": "rl",
        "models": {"base": str(tiny_dir)},
        "tasks": {"sums": SUMS},
        "stages": {
            "rl": {**stage, **changes},
            "verdict": {
                "kind": "compare",
                "arms": {"start": "base", "rl": "rl"},
                "task": "sums",
                "problems": 4,
                "sampling": {"max_tokens": 6, "temperature": 0},
                "engine": REFERENCE,
            },
        },
    }


def project(folder, tiny_dir, **changes):
    folder.mkdir(exist_ok=True)
    (folder / "myrewards.py").write_text(REWARDS)
    return Project(folder, tree(tiny_dir, **changes))


@pytest.fixture(scope="module")
def finished(tiny_dir, tmp_path_factory):
    made = project(tmp_path_factory.mktemp("rl"), tiny_dir)
    done = made.run()
    assert done.returncode == 0, done.stdout + done.stderr
    return made


def lines(project, name="metrics.jsonl"):
    return [json.loads(line) for line in (project.run_dir / "rl" / name).read_text().splitlines()]


def timeless(project):
    timed = ("seconds", "tokens_per_second")
    return [{k: v for k, v in m.items() if not k.endswith(timed)} for m in lines(project)]


def test_metrics_samples_cost_and_report(finished):
    metrics = lines(finished)
    assert [m["step"] for m in metrics] == [1, 2, 3, 4, 5, 6]
    wanted = {"reward", "reward/even", "reward/think_format", "length", "entropy", "clip_fraction"}
    wanted |= {"kl_ref", "kl_engine", "frac_reward_zero_std", "clipped_ratio", "unjudged"}
    for m in metrics:
        assert wanted <= m.keys()
        assert m["reward"] == pytest.approx(m["reward/even"] + 0.5 * m["reward/think_format"])
        assert m["entropy"] > 5  # in nats, for a random model; the maximum is log(49152) = 10.8
    samples = lines(finished, "completions.jsonl")
    assert {s["step"] for s in samples} == {1, 3, 5}
    for s in samples:
        assert s["rewards"]["even"] == float(len(s["completion"]) % 2 == 0)
    cost = finished.state("rl")["cost"]
    completions = 3 * 2 * 2 * 4
    assert finished.state("rl")["metrics"]["completions"] == completions
    assert completions <= cost["tokens_generated"] <= 6 * completions
    assert cost["tokens_scored"] == 2 * cost["tokens_trained"]  # old and reference log-probabilities
    report = json.loads((finished.run_dir / "report.json").read_text())
    assert set(report["arms"]) == {"start", "rl"}
    assert report["arms"]["rl"]["cost"]["student"]["flops"] == pytest.approx(cost["flops"])


def test_check_says_what_it_will_cost_without_loading_a_model(finished):
    done = finished.distill("check", "rl.yaml")
    assert done.returncode == 0, done.stderr
    assert re.search(r"rl +grpo", done.stdout)


def test_killed_and_resumed_equals_uninterrupted(finished, tiny_dir, tmp_path):
    """Killed (SIGKILL) while completions are sampled, and again between the two updates of a rollout."""
    cut = project(tmp_path / "cut", tiny_dir)
    folder = cut.run_dir / "rl"
    cut.kill_when(lambda: (folder / "checkpoints" / "step-00000002").is_dir(), "--only", "rl")
    cut.kill_when(lambda: len(lines(cut)) in (3, 5), "--only", "rl")
    assert len(lines(cut)) < 6
    done = cut.run("--only", "rl")
    assert done.returncode == 0, done.stderr
    assert "resume" in done.stdout
    assert timeless(cut) == timeless(finished)
    assert lines(cut, "completions.jsonl") == lines(finished, "completions.jsonl")
    assert cut.state("rl")["fingerprint"] == finished.state("rl")["fingerprint"]
    before, after = (p.state("rl")["cost"] for p in (finished, cut))
    for key in ("tokens_trained", "tokens_generated", "tokens_scored", "flops"):
        assert before[key] == after[key]


def test_more_steps_go_on_from_the_last(finished, tiny_dir, tmp_path):
    import shutil

    shutil.copytree(finished.folder, tmp_path / "more")
    more = Project(tmp_path / "more", finished.tree)
    done = more.run("stages.rl.steps=8", "--only", "rl")
    assert done.returncode == 0, done.stderr
    assert timeless(more)[:6] == timeless(finished)
    assert len(lines(more)) == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_size": 1}, "stages.rl.group_size: input should be greater than or equal to 2"),
        ({"steps": 5}, "steps 5 is not a multiple of mini_batches x num_iterations = 2"),
        ({"sampling": {"temperature": 0.7}}, "temperature and top_p must be 1"),
        ({"sampling": {"top_p": 0.9}}, "temperature and top_p must be 1"),
        ({"problems": 3}, "problems is 3, but one rollout needs"),
        ({"objective": {"fn": "gpro"}}, "stages.rl.objective: there is no 'gpro'.*'gspo'"),
        ({"objective": {"fn": "grpo", "epsilon": 0.1}}, "stages.rl.objective.epsilon: unknown key"),
        ({"objective": {"fn": "grpo", "beta": -1}}, "stages.rl.objective.beta"),
        (
            {"rewards": [{"fn": "acuracy"}]},
            "stages.rl.rewards.0: there is no 'acuracy'.*'accuracy'",
        ),
        ({"rewards": [{"fn": "accuracy", "partal": True}]}, "rewards.0.partal: unknown key"),
        ({"rewards": []}, "stages.rl.rewards"),
        ({"rewards": [{"fn": "nomodule:nothing"}]}, "cannot import 'nomodule:nothing'"),
    ],
)
@pytest.mark.fault(24)
def test_mistakes_are_one_message_before_anything_loads(tiny_dir, changes, message):
    with pytest.raises(UserError) as caught:
        check_plugs(recipe.validate(tree(tiny_dir, **changes)))
    assert re.search(message, str(caught.value))
    assert len(str(caught.value).splitlines()) == 1


def test_a_mistake_ends_the_command_with_its_message_alone(tiny_dir, tmp_path):
    made = project(tmp_path / "bad", tiny_dir, rewards=[{"fn": "acuracy"}])
    done = made.run()
    assert done.returncode == 2
    assert "there is no 'acuracy'" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (made.run_dir / "rl").exists()


@pytest.mark.parametrize(("reward", "seconds"), [("broken", 60), ("hangs", 0.2)])
def test_a_reward_that_never_works_stops_the_stage_by_name(tiny_dir, tmp_path, reward, seconds):
    made = project(
        tmp_path / "bad",
        tiny_dir,
        rewards=[{"fn": f"myrewards:{reward}"}, {"fn": "think_format"}],
        prompts=16,
        group_size=2,
        reward_timeout=seconds,
    )
    done = made.run("--only", "rl", "--no-trials")
    assert done.returncode == 2
    assert f"rewards.{reward}" in done.stderr
    assert "Traceback" not in done.stderr


def test_completions_that_a_reward_failed_on_are_counted(tiny_dir, tmp_path):
    """Failures are in the stage's cost (column `failed` of the report), over all attempts."""
    made = project(
        tmp_path / "at_times",
        tiny_dir,
        rewards=[{"fn": "myrewards:fails_at_times"}, {"fn": "think_format"}],
        max_failed_rewards=1.0,
        prompts=3,
        group_size=2,
        mini_batches=1,
        steps=2,
    )
    for steps in (2, 4):
        done = made.run("--only", "rl", f"stages.rl.steps={steps}")
        assert done.returncode == 0, done.stdout + done.stderr
        failed = sum(2 * m["unjudged"] * 3 for m in lines(made))
        assert 0 < failed < 3 * 2 * steps
        assert made.state("rl")["cost"]["samples_failed"] == failed


@pytest.mark.slow
def test_on_the_real_engine_it_samples_with_the_weights_it_trains(tiny_dir, tmp_path):
    """With a large learning rate, kl_engine would jump if the engine kept any old weights, such as the tied head."""
    made = project(
        tmp_path / "vllm",
        tiny_dir,
        engine={"fn": "vllm", "dtype": "float32", "batch_size": 16},
        mini_batches=1,
        steps=3,
        prompts=4,
        lr=2e-2,
    )
    done = made.run_alone("--only", "rl")
    assert done.returncode == 0, done.stderr
    metrics = lines(made)
    assert len(metrics) == 3
    assert max(m["kl_engine"] for m in metrics) < 1e-4
    assert metrics[-1]["kl_ref"] > 1e-2  # the weights changed
    assert (made.run_dir / "rl" / "model" / "model.safetensors").is_file()
