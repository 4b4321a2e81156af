"""Estimates of the tail: enumerated in fp64 on a vocabulary of 50 with 8 kept entries, against the KL over all of it."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from distill.records import UserError
from distill.training.loss import divergences, sparse
from distill.training.loss.dense import Logits, dense_loss
from distill.training.loss.head import HeadForm, Targets, head_loss
from distill.training.loss.metrics import distribution_metrics

V, K, D = 50, 8, 6


def loss(tail, bucket_share=0.0):
    return functools.partial(sparse.forward_kl, tail=tail, bucket_share=bucket_share)


@pytest.fixture(scope="module")
def case():
    """A student's hidden state [1, D] and head [V, D], the teacher's p [V], its kept ids [K] and the ids of its tail."""
    rng = np.random.default_rng(3)
    hidden, weight = torch.from_numpy(rng.normal(size=(1, D))), torch.from_numpy(rng.normal(size=(V, D)))
    p_V = torch.from_numpy(rng.normal(size=V) * 1.2).softmax(0)
    kept = p_V.topk(K).indices
    rest = torch.tensor([v for v in range(V) if v not in kept.tolist()])
    return hidden, weight, p_V, kept, rest


def targets(case, weight_T, label_T, draws_TN=None, draw_mass=1.0):
    _, _, p_V, kept, rest = case
    num = len(label_T)
    sampled = {}
    if draws_TN is not None:
        logp_TN = torch.where(draws_TN >= 0, p_V.log()[draws_TN.clamp(min=0)], -torch.inf)
        sampled = {
            "draw_ids_TN": draws_TN,
            "draw_logp_TN": logp_TN,
            "draw_mass_T": torch.full((num,), draw_mass, dtype=torch.float64),
        }
    return Targets(
        label_T,
        weight_T,
        kept.expand(num, -1),
        p_V[kept].log().expand(num, -1),
        p_V[rest].sum().log().expand(num),
        teacher_label_T=p_V.log()[label_T],
        **sampled,
    )


def gradients(case, loss_fn, given, chunk=None):
    """The weighted sum of the loss over rows that share one hidden state, and its gradients."""
    hidden, weight, *_ = case
    hidden_TD = hidden.expand(len(given.label_T), -1).contiguous().requires_grad_()
    weight_VD = weight.clone().requires_grad_()
    out = head_loss(hidden_TD, weight_VD, loss_fn, given, chunk=chunk)
    by_hidden, by_weight = torch.autograd.grad(out.loss, [hidden_TD, weight_VD])
    return out, by_hidden, by_weight


def exact(case):
    """KL(p || q) over the whole vocabulary, and its gradients."""
    hidden, weight, p_V, *_ = case
    hidden_TD, weight_VD = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    value = (p_V * (p_V.log() - (hidden_TD @ weight_VD.T).log_softmax(1)[0])).sum()
    return value.detach(), *torch.autograd.grad(value, [hidden_TD, weight_VD])


def enumerated(case, name, share=0.0):
    """Value and gradients of an estimator, in expectation over everything that it may have drawn."""
    _, _, p_V, _, rest = case
    tail = p_V[rest].sum()
    if name == "own_token":
        given = targets(case, p_V, torch.arange(V))
    elif name == "draws":  # one, of all that there are
        given = targets(case, p_V[rest] / tail, torch.arange(len(rest)), rest[:, None], float(tail))
    else:
        given = targets(case, torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.long))
    out, by_hidden, by_weight = gradients(case, loss(name, share if name != "bucket" else 0.0), given)
    return out.loss.detach(), by_hidden.sum(0, keepdim=True), by_weight


@pytest.mark.parametrize("name", ["own_token", "draws"])
def test_the_mean_over_all_samples_is_the_kl_over_the_whole_vocabulary_and_its_gradient(case, name):
    for mine, true in zip(enumerated(case, name), exact(case), strict=True):
        torch.testing.assert_close(mine, true, atol=1e-12, rtol=0)


def test_two_draws_of_any_sort_are_unbiased(case):
    """All pairs: the same id twice, the label among the draws, and positions with one draw or none."""
    _, _, p_V, _, rest = case
    tail = p_V[rest].sum()
    pairs = torch.cartesian_prod(rest, rest)
    label_T = torch.arange(len(pairs)) % V
    assert (pairs == label_T[:, None]).any()
    given = targets(case, p_V[pairs].prod(1) / tail**2, label_T, pairs, float(tail) / 2)
    whole = gradients(case, loss("draws"), given)
    for mine, true in zip((whole[0].loss, whole[1].sum(0, keepdim=True), whole[2]), exact(case), strict=True):
        torch.testing.assert_close(mine, true, atol=1e-12, rtol=0)
    chunked = gradients(case, loss("draws"), given, chunk=100)
    torch.testing.assert_close(chunked[2], whole[2], atol=1e-12, rtol=0)
    # A tail of mass T < m gets its single draw with probability T / m, and that stands for m.
    single = torch.cat(
        [pairs[: len(rest)] * 0 + torch.stack([rest, -torch.ones_like(rest)], 1), torch.tensor([[-1, -1]])]
    )
    m = 3 * tail
    weight_T = torch.cat([p_V[rest] / m, (1 - tail / m)[None]])
    given = targets(case, weight_T, torch.zeros(len(single), dtype=torch.long), single, float(m))
    out, by_hidden, by_weight = gradients(case, loss("draws"), given)
    for mine, true in zip((out.loss, by_hidden.sum(0, keepdim=True), by_weight), exact(case), strict=True):
        torch.testing.assert_close(mine, true, atol=1e-12, rtol=0)


def test_bias_and_variance_are_in_the_stated_order(case):
    _, _, p_V, _, rest = case
    tail, (_, true, _) = p_V[rest].sum(), exact(case)

    def spread(loss_fn, weight_T, given):
        """Bias (norm) and variance of the gradient by the hidden state."""
        _, by_row, _ = gradients(case, loss_fn, given)
        each_TD = by_row / weight_T[:, None]
        mean = (weight_T[:, None] * each_TD).sum(0)
        return float((mean - true[0]).norm()), float((weight_T[:, None] * (each_TD - mean) ** 2).sum())

    one = torch.ones(1, dtype=torch.float64)
    bucket = spread(loss("bucket"), one, targets(case, one, torch.zeros(1, dtype=torch.long)))
    own = spread(loss("own_token"), p_V, targets(case, p_V, torch.arange(V)))
    half = spread(loss("own_token", 0.5), p_V, targets(case, p_V, torch.arange(V)))
    weight_T = p_V[rest] / tail
    draw = spread(loss("draws"), weight_T, targets(case, weight_T, rest, rest[:, None], float(tail)))
    pairs = torch.cartesian_prod(rest, rest)
    weight_T = p_V[pairs].prod(1) / tail**2
    two = spread(loss("draws"), weight_T, targets(case, weight_T, pairs[:, 0], pairs, float(tail) / 2))
    assert own[0] < 1e-12
    assert draw[0] < 1e-12
    assert two[0] < 1e-12
    assert bucket[0] > 1e-3
    np.testing.assert_allclose(half[0], bucket[0] / 2, rtol=1e-9)
    assert bucket[1] < 1e-20
    assert bucket[1] < two[1] < draw[1] < own[1]
    np.testing.assert_allclose([two[1], half[1]], [draw[1] / 2, own[1] / 4], rtol=1e-9)


@pytest.mark.parametrize("tail", ["bucket", "own_token", "draws"])
def test_every_estimate_is_zero_where_student_and_teacher_agree(case, tail):
    hidden, weight, _, _, _ = case
    p_V = (hidden @ weight.T).softmax(1)[0]
    kept = p_V.topk(K).indices
    rest = torch.tensor([v for v in range(V) if v not in kept.tolist()])
    own = (hidden, weight, p_V, kept, rest)
    given = targets(own, torch.ones(V, dtype=torch.float64), torch.arange(V), rest[torch.arange(V) % len(rest), None])
    out, _, _ = gradients(own, loss(tail), given)
    assert out.loss_T.abs().max() < 1e-12


def test_draws_change_no_other_number_of_the_student(case):
    """Tail, best id outside and every metric are those without draws, whatever was drawn."""
    *_, rest = case
    label_T = torch.arange(V)
    weight_T = torch.ones(V, dtype=torch.float64)
    draws_TN = rest[torch.arange(V)[:, None] * 7 % len(rest) + torch.tensor([0, 0, 1])].clamp(max=int(rest.max()))
    draws_TN[::5, 1:] = -1

    def measured(given):
        hidden_TD = case[0].expand(V, -1)
        return head_loss(hidden_TD, case[1], loss("bucket"), given, measure=distribution_metrics)

    plain, drawn = measured(targets(case, weight_T, label_T)), measured(targets(case, weight_T, label_T, draws_TN))
    torch.testing.assert_close(drawn.loss_T, plain.loss_T, atol=1e-12, rtol=0)
    assert {"kl", "student_tail", "agreement"} <= {*plain.measures}
    for name, value_T in plain.measures.items():
        torch.testing.assert_close(drawn.measures[name], value_T, atol=1e-12, rtol=0)


def test_bucket_is_what_forward_kl_is_without_samples_and_draws_what_it_is_with_them(case):
    given = targets(case, torch.ones(V, dtype=torch.float64), torch.arange(V))
    torch.testing.assert_close(
        gradients(case, sparse.forward_kl, given)[0].loss_T, gradients(case, loss("bucket"), given)[0].loss_T
    )
    _, _, _, _, rest = case
    drawn = targets(case, given.weight_T, given.label_T, rest[:1].expand(V, 1), 0.1)
    torch.testing.assert_close(
        gradients(case, sparse.forward_kl, drawn)[0].loss_T, gradients(case, loss("draws"), drawn)[0].loss_T
    )
    with pytest.raises(UserError, match="tail_draws"):
        gradients(case, loss("draws"), given)


def test_full_vocabulary_oracle_is_the_dense_loss(case):
    """The oracle of these tests is what `teacher:` in the trainer computes."""
    hidden, weight, p_V, *_ = case
    plain = Targets(torch.zeros(1, dtype=torch.long), torch.ones(1, dtype=torch.float64))
    form = HeadForm(V)
    teacher = Logits(torch.ones(1, 1, dtype=torch.float64), p_V.log()[:, None], form)
    out = dense_loss(Logits(hidden, weight, form), [teacher], divergences.forward_kl, plain)
    torch.testing.assert_close(out.loss, exact(case)[0], atol=1e-12, rtol=0)
