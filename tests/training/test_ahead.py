"""Rollouts one ahead: which weights write them, what a checkpoint holds of them, and that a resumed run is the same run."""

from __future__ import annotations

import json
import threading

import numpy as np
import pytest
import test_rollout as rollouts
from test_rollout import Spy, engine, good, share  # noqa: F401

from distill.recipe import GrpoStage
from distill.records import Completion
from distill.training.rl import policy_objectives as objectives
from distill.training.rl.ahead import Ahead, Journal

APART = {"ray": "local", "replicas": 2}
"""What the recipe must say; the engine of these tests is given by hand."""


def stage(**changes) -> GrpoStage:
    return rollouts.stage(**{"steps": 4, "ahead": 1, "engine": APART, **changes})


def source(given, config, reward, **changes):
    journal = Journal()
    made = rollouts.source(given, config, objectives.grpo(beta=0.0, mask_truncated=False), reward, **changes)
    object.__setattr__(made.sampler, "journal", journal)
    object.__setattr__(made, "journal", journal)
    return made


def lines(folder) -> list[dict]:
    timed = {"seconds", "tokens_per_second", "generate_seconds", "reward_seconds", "prepare_seconds", "wait_seconds"}
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in timed} for line in found]


@pytest.mark.parametrize("mini_batches", [1, 2])
def test_a_rollout_is_written_by_the_weights_of_one_rollout_ago(tiny_dir, tmp_path, engine, share, mini_batches):  # noqa: F811
    spy = Spy(engine)
    rollouts.run(tiny_dir, tmp_path, source(spy, stage(mini_batches=mini_batches), share))
    found = [line["staleness"] for line in lines(tmp_path)]
    num = 4 // mini_batches
    assert found == [0.0] * mini_batches + [float(mini_batches)] * (4 - mini_batches)
    # Before the first rollout, and before each that follows; none is sampled behind the last.
    assert spy.versions == [0, *(n * mini_batches for n in range(num - 1))]
    assert len(spy.requests) == num


def test_the_importance_weight_sees_the_older_weights(tiny_dir, tmp_path, engine, share):  # noqa: F811
    """kl_engine, policy against the weights that wrote the rollout, is zero without staleness and not with it."""
    rollouts.run(tiny_dir, tmp_path, source(engine, stage(), share))
    found = [line["kl_engine"] for line in lines(tmp_path)]
    assert found[0] < 1e-8
    assert min(found[1:]) > 1e-6


@pytest.mark.parametrize("stop_before", [2, 3, 4])
def test_a_resumed_run_is_the_same_run(tiny_dir, tmp_path, engine, share, stop_before):  # noqa: F811
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = rollouts.run(tiny_dir, whole, source(engine, stage(), share))
    rollouts.run(tiny_dir, parts, source(engine, stage(), share), stop_before=stop_before)
    spy = Spy(engine)
    resumed = rollouts.run(tiny_dir, parts, source(spy, stage(), share))
    assert lines(parts) == lines(whole)
    for mine, theirs in zip(resumed.parameters(), expected.parameters(), strict=True):
        assert (mine == theirs).all()
    # The rollout that was under way is not sampled again.
    assert len([r for r in spy.requests if r]) == max(0, 4 - stop_before)


@pytest.mark.slow
def test_ahead_learns_as_well_within_the_spread_of_seeds(tiny_dir, tmp_path, engine, share):  # noqa: F811
    """Three seeds each: the mean reward of the last steps lies within the other's 95% interval, and both have learnt.

    Three seeds may lie close together by chance (on one CPU they span .008), and weights that are a step old cost about a step of
    twenty; so .05 is allowed in any case.
    """
    finals = {0: [], 1: []}
    for ahead in finals:
        for seed in (1, 2, 3):
            folder = tmp_path / f"{ahead}-{seed}"
            config = stage(steps=20, group_size=8, lr=1e-2, ahead=ahead)
            made = source(engine, config, share, seed=seed) if ahead else _alone(engine, config, share, seed)
            rollouts.run(tiny_dir, folder, made)
            finals[ahead].append(float(np.mean([line["reward"] for line in lines(folder)[-5:]])))
    means = {ahead: np.mean(values) for ahead, values in finals.items()}
    half = {ahead: 4.303 * np.std(values, ddof=1) / 3**0.5 for ahead, values in finals.items()}
    assert min(means.values()) > 0.65, finals
    assert abs(means[1] - means[0]) <= max(0.05, *half.values()), finals


def _alone(given, config, reward, seed):
    return rollouts.source(given, config, objectives.grpo(beta=0.0, mask_truncated=False), reward, seed=seed)


def test_sampling_goes_on_while_the_model_trains():
    began, may_end = threading.Event(), threading.Event()

    def sample(index: int, version: int) -> int:
        if index:
            began.set()
            assert may_end.wait(10)
        return 10 * index + version

    class Engine:
        def sync(self, weights, version):
            pass

    ahead = Ahead(sample, Engine(), Journal(), last=3)
    assert ahead.next(0, 0, list) == (0, 0)
    assert began.wait(10)  # here a trainer trains
    may_end.set()
    assert ahead.next(1, 5, list) == (10, 0)
    assert ahead.next(2, 7, list) == (25, 5)


def test_an_error_in_the_thread_is_the_steps_error():
    def sample(index: int, version: int) -> int:
        if index:
            raise ConnectionError("the judge is out")
        return 0

    class Engine:
        def sync(self, weights, version):
            pass

    ahead = Ahead(sample, Engine(), Journal())
    ahead.next(0, 0, list)
    with pytest.raises(ConnectionError, match="judge"):
        ahead.next(1, 1, list)


def test_a_journal_survives_a_checkpoint():
    journal, again = Journal(), Journal()
    rng = np.random.default_rng(0)
    for n, length in enumerate((3, 1, 70)):
        reason = "stop" if n else "length"
        ids_T, logp_T = rng.integers(0, 60000, length), rng.random(length).astype(np.float32)
        journal.add(f"0/{n}/é/1", Completion("x", ids_T, logp_T, None, reason, version=n))
    again.restore([journal.held(), Journal().held()])
    assert again.completions.keys() == journal.completions.keys()
    for key, one in journal.completions.items():
        other = again.known(key)
        assert (other.ids_T == one.ids_T).all()
        assert (other.logprob_T == one.logprob_T).all()
        assert (other.finish_reason, other.version) == (one.finish_reason, one.version)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"engine": {}}, "engines apart"),
        ({"objective": {"fn": "grpo", "importance_cap": None}}, "importance_cap"),
        ({"ahead": 2}, "ahead"),
    ],
)
def test_refused_settings(fields, words):
    with pytest.raises(ValueError, match=words):
        stage(**fields)
