"""The scheduler over workers that are threads: every job is answered once, jobs are shared evenly, and little is held."""

from __future__ import annotations

import random
import time

import pytest
from thread_workers import ThreadCalls, ThreadWorker

from distill.engines.fleet import Fleet
from distill.records import UserError


class Squares:
    """Answers with squares, a few at a time, and keeps the order in which it was asked."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.waiting, self.asked, self.seconds = [], 0, seconds

    def start(self) -> str:
        return "started"

    def work(self, given):
        self.waiting += given
        self.asked += len(given)
        time.sleep(self.seconds)
        done, self.waiting = self.waiting[:3], self.waiting[3:]
        return [(number, job * job) for number, job in done]


def fleet(num: int, seconds: float = 0.0, **options) -> Fleet[int]:
    return Fleet(
        num,
        ThreadCalls(),
        lambda: ThreadWorker(lambda: Squares(seconds)),
        lambda worker, number: [worker.start.remote()],
        say=lambda message: None,
        **options,
    )


def ask(worker, given):
    return worker.work.remote(given)


@pytest.mark.parametrize("num", [1, 3, 8])
@pytest.mark.parametrize("jobs", [0, 1, 5, 200])
def test_every_job_is_answered_once(num, jobs):
    many = fleet(num)
    found = list(many.run(range(10, 10 + jobs), ask, window=6))
    assert sorted(found) == [(n, 10 + n, (10 + n) ** 2) for n in range(jobs)]
    many.close()


@pytest.mark.parametrize("sticky", [False, True])
def test_deaths_at_random_moments_lose_and_repeat_nothing(sticky):
    draw = random.Random(4)
    many = fleet(4, 0.001, sticky=sticky)
    found = []
    for answer in many.run(range(600), ask, window=8):
        found.append(answer)
        alive = [slot for slot in many.slots if not slot.deaths]
        if alive and draw.random() < 0.1:
            draw.choice(alive).worker.die()
    assert many.replaced >= 20
    assert sorted(found) == [(n, n, n * n) for n in range(600)]
    many.close()


def test_jobs_are_shared_evenly_though_they_are_fewer_than_the_windows():
    many = fleet(4, 0.005)
    list(many.run(range(40), ask, window=100))
    assert [slot.worker.made.asked for slot in many.slots] == [10] * 4
    many.close()


def test_a_slow_worker_does_not_hold_up_the_others():
    many = fleet(3)
    many.slots[0].worker.made.seconds = 0.3
    began = time.monotonic()
    list(many.run(range(400), ask, window=6))
    assert many.slots[0].worker.made.asked < 40
    assert time.monotonic() - began < 3
    many.close()


def test_jobs_are_taken_lazily_and_not_at_all_while_they_may_not():
    many, taken = fleet(2), []

    def jobs():
        for n in range(100):
            taken.append(n)
            yield n

    run = many.run(jobs(), ask, window=5)
    next(run)
    assert len(taken) <= 10
    run.close()
    several = many.run(jobs(), ask, window=5, may_take=lambda: len(taken) < 20)
    assert len(list(several)) < 40
    many.close()


def test_after_an_abandoned_run_the_next_is_whole():
    many = fleet(2)
    run = many.run(
        range(50), lambda worker, given: worker.start.remote() if not given else ask(worker, given), window=5
    )
    next(run)
    run.close()
    assert many.call(lambda worker: worker.start.remote()) == ["started"] * 2
    many.close()


@pytest.mark.parametrize("sticky", [False, True])
def test_a_worker_that_dies_again_and_again_is_an_error(sticky):
    many = fleet(2, 0.001, sticky=sticky)

    def dying(worker, given):
        worker.die()
        return ask(worker, given)

    with pytest.raises(UserError, match=r"replica \d ended 3 times in a row without an answer \(killed\).*log\.txt"):
        list(many.run(range(10), dying, window=5))
    many.close()


def test_a_call_reaches_the_successor_of_a_dead_worker():
    many = fleet(3)
    many.slots[1].worker.die()
    assert many.call(lambda worker: worker.start.remote()) == ["started"] * 3
    assert many.replaced == 1
    many.close()


def test_an_error_of_the_work_ends_the_run():
    many = fleet(2)

    with pytest.raises(TypeError):
        list(many.run([1, "word", 3], ask, window=5))
    many.close()


def test_where_successors_must_wait_the_others_do_the_work():
    may = [True]
    many = fleet(3, 0.001, may_replace=lambda: may[0])
    may[0] = False
    found = []
    for answer in many.run(range(200), ask, window=6):
        found.append(answer)
        if len(found) == 50:
            many.slots[1].worker.die()
    assert sorted(found) == [(n, n, n * n) for n in range(200)]
    assert [slot.number for slot in many.present()] == [0, 2]
    assert many.call(lambda worker: worker.start.remote()) == ["started"] * 2
    many.revive()
    assert len(many.present()) == 3
    assert len(list(many.run(range(30), ask, window=6))) == 30
    many.close()


def test_where_successors_must_wait_and_nobody_is_left_it_is_an_error():
    many = fleet(2, 0.001, may_replace=lambda: False)
    run = many.run(range(200), ask, window=6)
    next(run)
    for slot in many.slots:
        slot.worker.die()
    with pytest.raises(UserError, match="every replica has ended"):
        list(run)
    other = fleet(2, may_replace=lambda: False)
    other.slots[0].worker.die()
    with pytest.raises(UserError, match="ended while it was given new weights"):
        other.call(lambda worker: worker.start.remote())
