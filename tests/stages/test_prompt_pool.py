"""Which problems a rollout takes: each once while there are enough, and never the same completion twice."""

from __future__ import annotations

import numpy as np
import pytest

from distill.records import Problem, Prompt, Sampling
from distill.stages.policy_sampling import PolicySampler, PromptPool, epoch_order


def prompt(number: int) -> Prompt:
    problem = Problem(f"p{number}", "sums", "q", ({"role": "user", "content": "q"},))
    return Prompt(problem, np.array([1, number], np.int32))


def pool(size: int, a_rollout: int) -> PromptPool:
    return PromptPool([prompt(n) for n in range(size)], a_rollout, seed=3)


@pytest.mark.parametrize(("size", "a_rollout"), [(10, 4), (7, 7), (9, 8), (5, 3), (100, 32), (11, 10), (8, 4)])
def test_a_rollout_holds_no_problem_twice_and_an_epoch_every_problem_once(size, a_rollout):
    prompts = pool(size, a_rollout)
    rollouts = [[one.problem.problem_id for one in prompts(n, 0, a_rollout)] for n in range(60)]
    for taken in rollouts:
        assert len(set(taken)) == a_rollout
    flat = [name for taken in rollouts for name in taken]
    for epoch in range(len(flat) // size):
        assert len(set(flat[epoch * size : (epoch + 1) * size])) == size
    assert flat[:size] == [f"p{n}" for n in range(size)]
    assert flat[size : 2 * size] != flat[:size] or size < 3
    epoch_order.cache_clear()
    assert [one.problem.problem_id for one in pool(size, a_rollout)(59, 0, a_rollout)] == rollouts[59]


def test_an_order_far_on_needs_no_deep_recursion():
    order = epoch_order(3, 1001, 1000, 2500)
    assert sorted(order) == list(range(1001))


class Recording:
    """Stands for sampling and judging; keeps the requests."""

    def __init__(self) -> None:
        self.requests = []

    def group(self, graded, max_tokens, seed):
        return [one.request for one in graded]


@pytest.mark.parametrize("attempt", [0, 1])
def test_a_problem_that_must_be_used_twice_is_sampled_with_other_draws(monkeypatch, attempt):
    from types import SimpleNamespace

    from distill.stages import policy_sampling

    seen = []

    def sample(engine, requests, sampling, grader, receive):
        for request in requests:
            seen.append(request)
            yield SimpleNamespace(request=request, completion=None, seconds=0.0)

    monkeypatch.setattr(policy_sampling, "sample_completions", sample)
    sampler = PolicySampler(None, Recording(), pool(3, 7), Sampling(max_tokens=4), group_size=2, seed=1)
    groups = sampler.groups(0, 7, version=0, attempt=attempt)
    assert len(groups) == 7
    assert len({request.seed for request in seen}) == len(seen) == 14
    keys = [(request.prompt.problem.problem_id, request.sample) for request in seen]
    assert len(set(keys)) == 14
