"""Importance weights of traces that an earlier student wrote, against enumerations in fp64."""

from __future__ import annotations

import itertools
from dataclasses import fields, replace

import pytest
import torch

from distill.records import UserError
from distill.training.loss import sparse
from distill.training.loss.head import Student, Targets
from distill.training.loss.own_traces import own_trace_metrics, prefix_log_ratio

NOTHING = {f.name: None for f in fields(Student)}


def test_a_prefix_ratio_is_that_of_the_tokens_before_within_the_trace():
    logp = torch.tensor([-1.0, -2.0, -0.5, -3.0, -0.25], dtype=torch.float64)
    sampled = torch.tensor([-1.5, -1.0, -0.5, -2.0, -1.25], dtype=torch.float64)
    targets = Targets(torch.zeros(5, dtype=torch.long), torch.ones(5), engine_logp_T=sampled)
    found = prefix_log_ratio(logp, targets, torch.tensor([4, 4, 4, 7, 7]))
    torch.testing.assert_close(found, torch.tensor([0.0, 0.5, -0.5, 0.0, -1.0], dtype=torch.float64))


def test_a_stale_policy_gradient_is_the_present_students_in_expectation():
    """Over every token that the earlier student could have sampled: exactly d KL(q || p) of the present student."""
    torch.manual_seed(0)
    z = torch.randn(6, dtype=torch.float64, requires_grad=True)
    logp, old = (torch.randn(6, dtype=torch.float64).log_softmax(0) for _ in range(2))
    logq = z.log_softmax(0)
    (want,) = torch.autograd.grad((logq.exp() * (logq - logp)).sum(), z, retain_graph=True)
    targets = Targets(torch.arange(6), torch.ones(6), advantage_T=logp - old, engine_logp_T=old)
    loss_T = sparse.policy_gradient(Student(**{**NOTHING, "label_T": logq}), targets, importance_cap=1e9)
    (got,) = torch.autograd.grad((old.exp() * loss_T).sum(), z)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


def test_weighted_reverse_kl_is_that_on_the_present_students_prefixes():
    """All traces of two tokens over a vocabulary of three, weighted by the earlier student: the mean under the present one."""
    torch.manual_seed(1)
    V = 3
    p, q, old = ((2 * torch.randn(V + 1, V, dtype=torch.float64)).log_softmax(1) for _ in range(3))
    # Row 0 of each: the first token; row 1 + a: the second after a.
    want = sum(float(q[0, a].exp() * (q[1 + a].exp() * (q[1 + a] - p[1 + a])).sum()) for a in range(V)) + float(
        (q[0].exp() * (q[0] - p[0])).sum()
    )
    got = unweighted = 0.0
    for a, b in itertools.product(range(V), repeat=2):
        chance = float((old[0, a] + old[1 + a, b]).exp())
        rows = torch.stack([p[0], p[1 + a]])
        mine = torch.stack([q[0], q[1 + a]])
        label = torch.tensor([a, b])
        sampled = torch.stack([old[0, a], old[1 + a, b]])
        targets = Targets(
            label,
            torch.ones(2),
            torch.arange(V).expand(2, V),
            rows,
            torch.full((2,), -torch.inf),
            engine_logp_T=sampled,
        )
        logp_T = mine.gather(1, label[:, None])[:, 0]
        coupled = prefix_log_ratio(logp_T, targets, torch.tensor([0, 0]))
        student = Student(logp_T, mine, torch.full((2,), -1e30, dtype=torch.float64), torch.full((2,), -torch.inf))

        weighted = replace(targets, coupled_T=coupled)
        got += chance * float(sparse.reverse_kl(student, weighted, importance_cap=1e9).sum())
        unweighted += chance * float(sparse.reverse_kl(student, targets).sum())
        shown = own_trace_metrics(student, weighted, importance_cap=0.9)
        assert shown["importance_weight"].max() <= 0.9
        torch.testing.assert_close(shown["clipped_weights"], (coupled.exp() > 0.9).double())
        torch.testing.assert_close(shown["staleness"], sampled - logp_T)
    assert got == pytest.approx(want, rel=1e-9)
    assert abs(unweighted - want) > 0.01


def test_the_cap_bounds_a_weight_and_needs_own_traces():
    targets = Targets(
        torch.tensor([0]), torch.ones(1), torch.tensor([[0]]), torch.tensor([[-0.5]]), torch.tensor([-1.0])
    )
    student = Student(torch.tensor([-0.1]), torch.tensor([[-0.1]]), torch.tensor([-2.4]), torch.tensor([-3.0]))

    plain = sparse.reverse_kl(student, targets)
    heavy = sparse.reverse_kl(student, replace(targets, coupled_T=torch.tensor([5.0])), importance_cap=2.0)
    torch.testing.assert_close(heavy, 2 * plain)
    with pytest.raises(UserError, match="wrote itself"):
        sparse.reverse_kl(student, targets, importance_cap=2.0)
