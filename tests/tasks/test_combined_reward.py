"""Combined rewards: sums computed by hand, and rewards that raise, hang or return invalid scores."""

import math
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from needs import slowness
from test_rewards import group

from distill.errors import UserError
from distill.records import Problem
from distill.tasks.combined_reward import CombinedReward


def given(*scores):
    return lambda group: list(scores)


def groups(num, size=2):
    return [
        group(
            *"abcdefgh"[:size],
            problem=Problem(f"p{n}", "sums", str(n), ({"role": "user", "content": str(n)},)),
        )
        for n in range(num)
    ]


def index(group):
    return int(group.problem.problem_id[1:])


# ------------------------------------------------------------------------------------------- arithmetic


def test_the_total_is_the_weighted_sum_and_the_parts_are_unweighted():
    rewards = CombinedReward(
        [
            ("accuracy", 1.0, given(1, 0)),
            ("format", 0.25, given(1.0, 1.0)),
            ("length", 2, given(-0.5, 0)),
        ]
    )
    [scores] = rewards(groups(1))
    assert scores.total == [0.25, 0.25]
    assert scores.parts == {"accuracy": [1.0, 0.0], "format": [1.0, 1.0], "length": [-0.5, 0.0]}
    assert list(scores.parts) == rewards.names == ["accuracy", "format", "length"]
    assert all(type(score) is float for column in scores.parts.values() for score in column)


def test_a_total_is_none_where_a_reward_that_counts_is():
    rewards = CombinedReward([("a", 1.0, given(1, None, 1, None)), ("b", -1.0, given(0.5, 1, None, None))])
    [scores] = rewards(groups(1, 4))
    assert scores.total == [0.5, None, None, None]


def test_a_reward_of_weight_nought_is_shown_and_does_not_count():
    rewards = CombinedReward([("a", 1.0, given(1, 0)), ("watched", 0.0, given(None, 7))])
    [scores] = rewards(groups(1))
    assert scores.total == [1.0, 0.0]
    assert scores.parts["watched"] == [None, 7.0]


def test_what_is_not_finite_could_not_be_judged():
    rewards = CombinedReward([("a", 1.0, given(math.nan, math.inf, -math.inf, None, 0.5))])
    [scores] = rewards(groups(1, 5))
    assert scores.total == scores.parts["a"] == [None, None, None, None, 0.5]
    assert rewards.unjudged == {"a": 4}
    assert rewards.failures == {"a": 0}


def test_numbers_of_any_kind_are_scores():
    rewards = CombinedReward(
        [
            ("a", 1.0, lambda group: np.array([0.5, 1.0], np.float32)),
            ("b", 1.0, given(True, np.int64(3))),
        ]
    )
    [scores] = rewards(groups(1))
    assert scores.total == [1.5, 4.0]


def test_two_of_a_name_are_told_apart():
    reward = given(1, 1)
    named = [("a", 1.0, reward), ("a#2", 1.0, reward), ("a", 1.0, reward), ("a", 1.0, reward)]
    rewards = CombinedReward(named)
    assert rewards.names == ["a", "a#2", "a#3", "a#4"]
    assert rewards(groups(1))[0].total == [4.0, 4.0]


def test_results_are_in_order_whoever_is_done_first():
    def slow_at_first(group):
        time.sleep(0.05 if index(group) < 4 else 0)
        return [float(index(group))] * len(group)

    rewards = CombinedReward([("slow", 1.0, slow_at_first), ("quick", 10.0, lambda group: [index(group), 0])])
    scored = rewards(groups(12))
    assert [scores.total for scores in scored] == [[11.0 * n, float(n)] for n in range(12)]
    assert [scores.total for scores in rewards(groups(12))] == [scores.total for scores in scored]


def test_calls_run_beside_one_another():
    meeting = threading.Barrier(3, timeout=20)

    def meet(group):
        meeting.wait()  # returns once three calls wait here
        return [1.0] * len(group)

    assert len(CombinedReward([("meet", 1.0, meet)], num_threads=3)(groups(6))) == 6


def test_no_groups_and_empty_groups():
    rewards = CombinedReward([("a", 1.0, lambda group: [1.0] * len(group))])
    assert rewards([]) == []
    [scores] = rewards(groups(1, 0))
    assert (scores.total, scores.parts) == ([], {"a": []})


# ---------------------------------------------------------------------------------------------- faults


def test_a_reward_that_raises_once_is_tried_again():
    tried = []

    def moody(group):
        tried.append(index(group))
        if tried.count(index(group)) == 1:
            raise OSError("sandbox away")
        return [1.0, 0.0]

    rewards = CombinedReward([("moody", 1.0, moody)])
    assert [scores.total for scores in rewards(groups(3))] == [[1.0, 0.0]] * 3
    assert sorted(tried) == [0, 0, 1, 1, 2, 2]
    assert rewards.failures == {"moody": 0}


@pytest.mark.parametrize("error", [OSError("down"), SystemExit(0), OverflowError("x")])
@pytest.mark.fault(18)
def test_a_reward_that_raises_twice_scores_none_for_that_group_and_never_nought(error):
    def fails_on_one(group):
        if index(group) == 1:
            raise error
        return [1.0, 0.0]

    rewards = CombinedReward([("good", 1.0, given(1, 1)), ("bad", 1.0, fails_on_one)])
    first, second, third = rewards(groups(3))
    assert first.total == third.total == [2.0, 1.0]
    assert second.total == second.parts["bad"] == [None, None]
    assert second.parts["good"] == [1.0, 1.0]
    assert rewards.failures == {"good": 0, "bad": 1}
    assert rewards.unjudged == {"good": 0, "bad": 2}


def test_a_reward_that_hangs_is_left_behind():
    release = threading.Event()

    def hangs_on_some(group):
        if index(group) in (2, 5):
            release.wait(60)
        return [float(index(group))] * 2

    rewards = CombinedReward([("hangs", 1.0, hangs_on_some)], limit_s=0.3, num_threads=2)
    rewards(groups(1))
    began = time.monotonic()
    scored = rewards(groups(8))
    took = time.monotonic() - began
    release.set()
    assert 0.3 <= took < 5 * slowness()
    expected = [[None, None] if n in (2, 5) else [float(n)] * 2 for n in range(8)]
    assert [scores.total for scores in scored] == expected
    assert rewards.failures == {"hangs": 2}


def test_one_that_comes_back_too_late_changes_nothing():
    def late(group):
        if index(group) == 1:
            time.sleep(1.0)
        return [1.0, 1.0]

    rewards = CombinedReward([("late", 1.0, late)], limit_s=0.2, num_threads=1)
    rewards(groups(1))
    scored = rewards(groups(3))
    time.sleep(1.2)
    assert [scores.total for scores in scored] == [[1.0, 1.0], [None, None], [1.0, 1.0]]
    assert rewards.failures == {"late": 1}
    assert rewards.unjudged == {"late": 2}


def test_the_first_call_may_take_its_time():
    loaded = threading.Lock()
    calls = []

    def loads(group):
        with loaded:  # other calls wait for the lock; the shorter limit does not apply to them yet
            calls.append(group)
            if len(calls) == 1:
                time.sleep(0.8)
        return [1.0, 1.0]

    rewards = CombinedReward([("loads", 1.0, loads)], limit_s=0.2, first_limit_s=20)
    assert [scores.total for scores in rewards(groups(4))] == [[1.0, 1.0]] * 4
    hung = CombinedReward([("hangs", 1.0, lambda group: time.sleep(30))], limit_s=0.1, first_limit_s=0.3)
    assert hung(groups(1))[0].total == [None, None]


def test_a_hanging_reward_does_not_keep_the_process():
    script = (
        "import sys, threading; sys.path[:0] = ['tests', 'tests/tasks']\n"
        "from test_combined_reward import *\n"
        "rewards = CombinedReward([('hangs', 1.0, lambda group: threading.Event().wait())], limit_s=0.1, first_limit_s=0.1)\n"
        "print(rewards(groups(1))[0].total)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[None, None]"


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0], "rewards.wrong: returned 1 scores for 2 completions"),
        ([1.0, 1.0, 1.0], "rewards.wrong: returned 3 scores for 2 completions"),
        (["1", 0], r"rewards.wrong: returned '1' \(str\) as a score"),
        ([[1.0], 0], r"rewards.wrong: returned \[1.0\] \(list\) as a score"),
        ([1j, 0], r"\(complex\) as a score"),
        (1.0, "rewards.wrong: returned a float, not a list"),
        (None, "rewards.wrong: returned a NoneType, not a list"),
        ("ab", "rewards.wrong: returned a str, not a list"),
        ({0: 1.0, 1: 2.0}, "rewards.wrong: returned a dict, not a list"),
    ],
)
def test_what_are_no_scores_is_an_error_that_names_the_reward(returned, message):
    calls = []

    def wrong(group):
        calls.append(group)
        return returned

    with pytest.raises(UserError, match=message):
        CombinedReward([("right", 1.0, given(1, 1)), ("wrong", 1.0, wrong)])(groups(1))
    assert len(calls) == 1


def test_a_users_mistake_is_told_at_once():
    def mistaken(group):
        raise UserError("length: cache is too large.")

    with pytest.raises(UserError, match=r"length: cache is too large\."):
        CombinedReward([("length", 1.0, mistaken)])(groups(40))


def failing(*failures):
    def fails(group):
        if index(group) in failures:
            raise ValueError(f"sandbox is down at {index(group)}")
        return [1.0, 1.0]

    return fails


@pytest.mark.fault(18)
def test_too_many_failures_end_it_with_the_name_and_the_last_exception():
    rewards = CombinedReward([("good", 1.0, given(1, 1)), ("code", 1.0, failing(*range(1000)))], num_threads=1)
    with pytest.raises(
        UserError,
        match=r"rewards\.code: failed on 20 of the last 20 groups.*p19.*ValueError: sandbox is down at 19",
    ):
        rewards(groups(100))
    assert rewards.failures == {"good": 0, "code": 20}


def test_a_tenth_of_failures_is_borne_and_one_more_is_not():
    rewards = CombinedReward([("code", 1.0, failing(0, 10))], num_threads=1)
    rewards(groups(20))
    assert rewards.failures == {"code": 2}
    assert len(CombinedReward([("code", 1.0, failing(0, 10))], num_threads=1)(groups(19))) == 19
    with pytest.raises(UserError, match="failed on 3 of the last 20 groups"):
        CombinedReward([("code", 1.0, failing(0, 10, 19))], num_threads=1)(groups(20))
    assert len(CombinedReward([("code", 1.0, failing(0, 10, 19))], num_threads=1, max_failed=0.5)(groups(20))) == 20


def test_the_failure_rate_is_of_the_last_calls_over_all_batches():
    rewards = CombinedReward([("code", 1.0, failing(19))], num_threads=1)
    for _ in range(6):
        rewards(groups(20))  # one in twenty
    assert rewards.failures == {"code": 6}
    down = CombinedReward([("code", 1.0, failing(200, 201))], num_threads=1)
    down(groups(200))
    down._parts[0].reward = failing(*range(100))
    with pytest.raises(UserError, match="failed on 11 of the last 100 groups"):
        down(groups(100))


def test_failures_of_another_reward_are_its_own():
    rewards = CombinedReward([("a", 1.0, failing(1)), ("b", 1.0, failing(2)), ("c", 1.0, failing(3))])
    assert len(rewards(groups(20))) == 20
    assert rewards.failures == {"a": 1, "b": 1, "c": 1}


# ---------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ([], "no reward has a weight other than 0"),
        ([("a", 0.0, given(1))], "no reward has a weight other than 0"),
        ([("a", math.nan, given(1))], r"rewards\.a: weight nan"),
        ([("a", math.inf, given(1))], r"rewards\.a: weight inf"),
    ],
)
def test_rewards_that_cannot_work(named, message):
    with pytest.raises(UserError, match=message):
        CombinedReward(named)
