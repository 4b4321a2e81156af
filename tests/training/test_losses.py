"""Every loss against NumPy in probability space: the divergence of buckets, and its derivative by each bucket, by hand."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from head_problems import as_taught_by, problem, replace, softmax
from trl.experimental.sdpo.loss_utils import add_tail_bucket, compute_divergence

from distill import plug
from distill.records import NO_TAIL, UserError
from distill.training.loss import divergences, sparse
from distill.training.loss.dense import Logits, sample_ids
from distill.training.loss.head import HeadForm, Targets, head_loss

HOME = "distill.training.loss.sparse"


# ------------------------------------------------------------------------------------------------ the oracle
# Each returns (value, derivative by each bucket's student mass Q) for teacher masses P over the same buckets.


def xlogy(x, y):
    return np.where(x > 0, x * np.log(np.where(x > 0, y, 1.0)), 0.0)


def forward_kl(P, Q):
    return xlogy(P, P / Q).sum(), -P / Q


def reverse_kl(P, Q):
    P = P.copy()
    P[-1] = max(P[-1], NO_TAIL)
    return (Q * np.log(Q / P)).sum(), np.log(Q / P) + 1


def jsd(beta, P, Q):
    m = beta * P + (1 - beta) * Q
    value = beta * xlogy(P, P / m).sum() + (1 - beta) * (Q * np.log(Q / m)).sum()
    return value, (1 - beta) * np.log(Q / m)


def tvd(P, Q):
    return np.abs(P - Q).sum() / 2, np.sign(Q - P) / 2


def skewed_forward_kl(alpha, P, Q):
    m = alpha * P + (1 - alpha) * Q
    return xlogy(P, P / m).sum(), -(1 - alpha) * P / m


def skewed_reverse_kl(alpha, P, Q):
    m = (1 - alpha) * P + alpha * Q
    return (Q * np.log(Q / m)).sum(), np.log(Q / m) + 1 - alpha * Q / m


DIVERGENCES = {
    "forward_kl": ({}, forward_kl),
    "reverse_kl": ({}, reverse_kl),
    "jsd_half": ({"beta": 0.5}, functools.partial(jsd, 0.5)),
    "jsd_small": ({"beta": 0.05}, functools.partial(jsd, 0.05)),
    "jsd_large": ({"beta": 0.9}, functools.partial(jsd, 0.9)),
    "tvd": ({}, tvd),
    "skewed_forward_kl": ({"alpha": 0.2}, functools.partial(skewed_forward_kl, 0.2)),
    "skewed_reverse_kl": ({"alpha": 0.3}, functools.partial(skewed_reverse_kl, 0.3)),
}


def loss_named(name):
    options = DIVERGENCES[name][0] if name in DIVERGENCES else {}
    return plug.bind(name.replace("_half", "").replace("_small", "").replace("_large", ""), options, HOME)


def oracle(hidden, weight, targets, divergence):
    """Loss [T], d hidden and d weight, token by token: buckets are the kept ids, then everything else as one."""
    h, w = hidden.detach().double().numpy(), weight.detach().double().numpy()
    q = softmax(h @ w.T)
    T, V = q.shape
    losses_T, dz = np.zeros(T), np.zeros((T, V))
    for t in range(T):
        logp = targets.teacher_logp_TK[t].double().numpy()
        ids = targets.teacher_ids_TK[t].numpy()[logp > -np.inf]
        rest = np.setdiff1d(np.arange(V), ids)
        P, Q = np.exp(logp[logp > -np.inf]), q[t, ids]
        bucket = np.zeros(V, int)
        bucket[ids] = np.arange(len(ids))
        if len(rest):
            tail = np.exp(float(targets.teacher_tail_T[t]))
            P, Q = np.append(P, tail if tail > NO_TAIL else 0.0), np.append(Q, q[t, rest].sum())
            bucket[rest] = len(ids)
        else:  # reverse_kl lifts the last bucket, which must be a tail
            P, Q = np.append(P, 0.0), np.append(Q, 1e-300)
        losses_T[t], by_bucket = divergence(P, Q)
        dz[t] = q[t] * (by_bucket[bucket] - (Q * by_bucket).sum())
    dz *= targets.weight_T.double().numpy()[:, None]
    return losses_T, dz @ w, dz.T @ h


SHAPES = [
    (7, 31, 4),
    (1, 3, 1),
    (3, 47, 46),
    (31, 123, 16),
    (5, 11, 11),
    (47, 31, 3),
    (2, 123, 123),
]


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize(("T", "V", "K"), SHAPES)
def test_value_and_gradients_equal_the_oracle(name, T, V, K):
    hidden, weight, targets = problem(T=T, V=V, K=K, seed=T + V)
    out = head_loss(hidden, weight, loss_named(name), targets, chunk=3)
    out.loss.backward()
    loss_T, dhidden, dweight = oracle(hidden, weight, targets, DIVERGENCES[name][1])
    np.testing.assert_allclose(out.loss_T.numpy(), loss_T, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(hidden.grad.numpy(), dhidden, rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(weight.grad.numpy(), dweight, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 5e-2)])
def test_lower_precisions_stay_near_the_oracle(name, dtype, tolerance):
    hidden, weight, targets = problem(T=31, D=16, V=500, K=16, dtype=dtype, spread=1.0)
    out = head_loss(hidden, weight, loss_named(name), targets, chunk=8)
    out.loss.backward()
    loss_T, dhidden, dweight = oracle(hidden, weight, targets, DIVERGENCES[name][1])
    assert out.loss_T.dtype == torch.float32
    np.testing.assert_allclose(out.loss_T.numpy(), loss_T, rtol=tolerance, atol=tolerance)
    for mine, theirs in ((hidden.grad, dhidden), (weight.grad, dweight)):
        error = np.linalg.norm(mine.double().numpy() - theirs) / np.linalg.norm(theirs)
        assert error < tolerance


ALL = [*DIVERGENCES, "cross_entropy", "ce_kl", "sampled_kd"]


@pytest.mark.parametrize("name", ALL)
def test_gradcheck(name):
    hidden, weight, targets = problem(T=4, V=13, K=3)

    def f(h, w):
        return head_loss(h, w, loss_named(name), targets, chunk=3).loss

    assert torch.autograd.gradcheck(f, (hidden, weight), atol=1e-7)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_never_negative_and_zero_only_where_the_buckets_agree(name):
    loss = loss_named(name)
    for seed in range(10):
        hidden, weight, targets = problem(T=16, D=4, V=50, K=8, seed=seed, dtype=torch.float32, spread=4.0)
        assert head_loss(hidden, weight, loss, targets).loss_T.min() > 1e-4
        same = as_taught_by((hidden @ weight.T).double(), targets, 8)
        same = replace(
            same,
            teacher_logp_TK=same.teacher_logp_TK.float(),
            teacher_tail_T=same.teacher_tail_T.float(),
        )
        loss_T = head_loss(hidden, weight, loss, same).loss_T
        assert loss_T.min() > -2e-6
        assert loss_T.max() < 2e-6


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_student_that_equals_the_teacher_is_left_alone(name):
    hidden, weight, targets = problem(T=9, V=40, K=6)
    out = head_loss(hidden, weight, loss_named(name), as_taught_by(hidden @ weight.T, targets, 6))
    out.loss.backward()
    # TVD has a kink there: rounding decides on which side of it a bucket lies, and each side pulls by up to q.
    limit = 1.0 if name == "tvd" else 1e-14
    assert hidden.grad.abs().max() < limit
    assert weight.grad.abs().max() < limit
    assert out.loss.abs() < 1e-12


@pytest.mark.parametrize("name", DIVERGENCES)
def test_all_ids_stored_equals_the_divergence_of_the_whole_vocabulary(name):
    hidden, weight, targets = problem(T=6, V=23, K=23)
    logp = torch.full((6, 23), -torch.inf, dtype=torch.float64).scatter(
        1, targets.teacher_ids_TK, targets.teacher_logp_TK
    )
    logq = (hidden @ weight.T).log_softmax(1).detach()
    full = plug.bind(loss_named(name).func.__name__, DIVERGENCES[name][0], "distill.training.loss.divergences")
    stored = head_loss(hidden, weight, loss_named(name), targets).loss_T
    torch.testing.assert_close(stored, full(logp, logq), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_buckets_bound_the_whole_divergence_from_below_and_grow_with_k(name):
    hidden, weight, targets = problem(T=8, V=64)
    logits = torch.from_numpy(np.random.default_rng(3).normal(size=(8, 64)) * 2)
    previous = torch.zeros(8, dtype=torch.float64)
    for k in (1, 4, 16, 63, 64):
        loss_T = head_loss(hidden, weight, loss_named(name), as_taught_by(logits, targets, k)).loss_T
        assert (loss_T >= previous - 1e-12).all()
        previous = loss_T


@pytest.mark.parametrize("name", ALL)
@pytest.mark.fault(13)
def test_weights_of_zero_and_padded_entries(name):
    """All masked: zero loss, zero finite gradients. -inf entries, and a row without any, count for nothing."""
    hidden, weight, targets = problem(T=5, V=20, K=3)
    clean = head_loss(hidden, weight, loss_named(name), targets).loss_T
    padded = replace(
        targets,
        teacher_ids_TK=torch.cat([targets.teacher_ids_TK, torch.full((5, 2), -1)], 1),
        teacher_logp_TK=torch.cat([targets.teacher_logp_TK, torch.full((5, 2), -torch.inf)], 1),
    )
    out = head_loss(hidden, weight, loss_named(name), padded)
    torch.testing.assert_close(out.loss_T, clean)
    hidden.grad = weight.grad = None
    nothing = replace(
        padded,
        weight_T=torch.zeros(5, dtype=torch.float64),
        teacher_logp_TK=torch.full((5, 5), -torch.inf, dtype=torch.float64),
        teacher_tail_T=torch.full((5,), -torch.inf, dtype=torch.float64),
    )
    out = head_loss(hidden, weight, loss_named(name), nothing)
    out.loss.backward()
    assert out.loss.item() == 0
    assert hidden.grad.abs().max() == 0
    assert weight.grad.abs().max() == 0


@pytest.mark.parametrize("name", ALL)
def test_a_shift_of_all_logits_changes_nothing(name):
    hidden, weight, targets = problem(T=16, V=50, K=8)
    plain = head_loss(hidden, weight, loss_named(name), targets).loss_T
    bias = torch.full((50,), 30.0, dtype=torch.float64)
    shifted = head_loss(hidden, weight, loss_named(name), targets, bias_V=bias).loss_T
    torch.testing.assert_close(plain, shifted, rtol=1e-10, atol=1e-12)


def test_values_by_hand():
    """p = [.7 .2 .1], q = [.5 .3 .2]: forward .0851228, reverse .0920329; p = [.9 .1], q = [.1 .9]: 1.7577797, JSD .3680642."""
    for p, q, loss, expected in [
        ([0.7, 0.2, 0.1], [0.5, 0.3, 0.2], sparse.forward_kl, 0.0851228),
        ([0.7, 0.2, 0.1], [0.5, 0.3, 0.2], sparse.reverse_kl, 0.0920329),
        ([0.7, 0.2, 0.1], [0.5, 0.3, 0.2], sparse.tvd, 0.2),
        ([0.9, 0.1], [0.1, 0.9], sparse.forward_kl, 1.7577797),
        ([0.9, 0.1], [0.1, 0.9], sparse.jsd, 0.3680642),
        # m = .1 p + .9 q = [.18 .82]: .9 log(.9/.18) + .1 log(.1/.82)
        ([0.9, 0.1], [0.1, 0.9], sparse.skewed_forward_kl, 0.9 * np.log(5) - 0.1 * np.log(8.2)),
        # m = .9 p + .1 q = [.82 .18]: .1 log(.1/.82) + .9 log(.9/.18)
        ([0.9, 0.1], [0.1, 0.9], sparse.skewed_reverse_kl, 0.9 * np.log(5) - 0.1 * np.log(8.2)),
    ]:
        V = len(p)
        targets = Targets(
            label_T=torch.tensor([0]),
            weight_T=torch.ones(1, dtype=torch.float64),
            teacher_ids_TK=torch.arange(V - 1)[None],
            teacher_logp_TK=torch.tensor([p[:-1]], dtype=torch.float64).log(),
            teacher_tail_T=torch.tensor([p[-1]], dtype=torch.float64).log(),
        )
        logits = torch.tensor([q], dtype=torch.float64).log()
        out = head_loss(logits, torch.eye(V, dtype=torch.float64), loss, targets)
        assert out.loss.item() == pytest.approx(expected, abs=1e-7)


def test_small_beta_tends_to_forward_kl_and_large_to_reverse():
    hidden, weight, targets = problem(T=6, V=30, K=5)
    student = functools.partial(head_loss, hidden, weight, targets=targets)
    near_0 = student(loss_fn=functools.partial(sparse.jsd, beta=1e-6)).loss_T / 1e-6
    near_1 = student(loss_fn=functools.partial(sparse.jsd, beta=1 - 1e-6)).loss_T / 1e-6
    torch.testing.assert_close(near_0, student(loss_fn=sparse.forward_kl).loss_T, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(near_1, student(loss_fn=sparse.reverse_kl).loss_T, rtol=1e-3, atol=1e-4)


@pytest.mark.fault(13)
def test_reverse_kl_never_pays_for_mass_where_the_teacher_has_none():
    """Teacher: all mass on one id, tail 1e-12. The more the student puts elsewhere, the higher the loss."""
    targets = Targets(
        torch.tensor([0]),
        torch.ones(1),
        torch.tensor([[0]]),
        torch.zeros(1, 1),
        torch.tensor([np.log(1e-12)]),
    )
    seen = []
    for outside in (1e-7, 1e-4, 1e-2, 0.5, 0.99):
        logits = torch.log(torch.tensor([[1 - outside, outside / 2, outside / 2]])).float()
        seen.append(head_loss(logits, torch.eye(3), sparse.reverse_kl, targets).loss.item())
    assert seen == sorted(seen)
    assert seen[0] > -1e-6
    assert seen[-1] == pytest.approx(0.99 * np.log(0.99 / 1e-6) + 0.01 * np.log(0.01), rel=1e-4)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_trl_agrees(beta):
    """TRL's sparse divergence with its tail bucket, on the log-probabilities of both models."""
    hidden, weight, targets = problem(T=12, V=60, K=7)
    logq = (hidden @ weight.T).log_softmax(1).gather(1, targets.teacher_ids_TK)
    theirs = compute_divergence(add_tail_bucket(logq), add_tail_bucket(targets.teacher_logp_TK), beta)
    (theirs * targets.weight_T).sum().backward()
    expected, hidden.grad = hidden.grad.clone(), None
    loss = {0.0: sparse.forward_kl, 1.0: sparse.reverse_kl}.get(beta, functools.partial(sparse.jsd, beta=beta))
    out = head_loss(hidden, weight, loss, targets)
    out.loss.backward()
    torch.testing.assert_close(out.loss_T, theirs.detach(), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(hidden.grad, expected, rtol=1e-7, atol=1e-9)


def test_ce_kl_is_the_weighted_sum():
    hidden, weight, targets = problem(T=6)
    mixed = functools.partial(sparse.ce_kl, ce_weight=0.25, kl_weight=2.0)
    ce, kl, both = (
        head_loss(hidden, weight, loss, targets).loss_T for loss in (sparse.cross_entropy, sparse.forward_kl, mixed)
    )
    torch.testing.assert_close(both, 0.25 * ce + 2 * kl)


def test_cross_entropy_by_hand_and_what_the_losses_do_without_options():
    hidden, weight, targets = problem(T=6)

    def of(loss, **options):
        return head_loss(hidden, weight, functools.partial(loss, **options), targets).loss_T

    logq_TV = torch.log_softmax(hidden.detach() @ weight.detach().T, 1)
    ce_T = -logq_TV.gather(1, targets.label_T[:, None])[:, 0]
    torch.testing.assert_close(of(sparse.cross_entropy), ce_T)
    torch.testing.assert_close(of(sparse.ce_kl), 0.5 * ce_T + 0.5 * of(sparse.forward_kl))
    torch.testing.assert_close(of(sparse.jsd), of(sparse.jsd, beta=0.5))
    for loss in (sparse.skewed_forward_kl, sparse.skewed_reverse_kl):
        torch.testing.assert_close(of(loss), of(loss, alpha=0.1))
        assert not torch.allclose(of(loss), of(loss, alpha=0.3))
    torch.testing.assert_close(of(sparse.sampled_kd), of(sparse.sampled_kd, draws=64))


@pytest.mark.parametrize(("progress", "ce", "kl"), [(0.0, 1.0, 0.5), (0.25, 0.75, 0.5), (1.0, 0.0, 0.5)])
def test_weights_go_to_their_final_values_in_a_straight_line(progress, ce, kl):
    hidden, weight, targets = problem(T=6)
    ramped = functools.partial(sparse.ce_kl, ce_weight=1.0, final_ce_weight=0.0)
    plain = functools.partial(sparse.ce_kl, ce_weight=ce, kl_weight=kl)
    moved = replace(targets, progress=progress)
    torch.testing.assert_close(
        head_loss(hidden, weight, ramped, moved, chunk=2).loss_T,
        head_loss(hidden, weight, plain, targets).loss_T,
    )


def test_sampled_ids_give_the_gradient_of_the_whole_kl_in_expectation():
    """20000 positions of the same teacher and student, five draws each: the mean gradient is q - p, to five sigma."""
    rng = np.random.default_rng(0)
    V, n, trials = 12, 5, 20_000
    p, logits = softmax(rng.normal(size=(1, V)) * 2)[0], rng.normal(size=(1, V))
    eye = torch.eye(V, dtype=torch.float64)
    teacher = Logits(torch.from_numpy(np.log(p)).expand(trials, V), eye, HeadForm(V))
    ids, log_count = sample_ids([teacher], n, torch.Generator().manual_seed(0))
    assert (log_count.exp().sum(1).round(decimals=6) == n).all()
    assert ((ids < 0) == (log_count == -torch.inf)).all()
    assert all(len(set(row)) == len(row) for row in (r[r >= 0].tolist() for r in ids[:100]))
    hidden = torch.from_numpy(np.repeat(logits, trials, 0)).requires_grad_()
    targets = Targets(
        torch.zeros(trials, dtype=torch.long),
        torch.full((trials,), 1 / trials, dtype=torch.float64),
        ids,
        log_count,
        torch.full((trials,), -torch.inf, dtype=torch.float64),
    )
    loss = functools.partial(sparse.sampled_kd, draws=n)
    head_loss(hidden, eye, loss, targets).loss.backward()
    exact = softmax(logits)[0] - p
    spread = np.sqrt(p * (1 - p) / n / trials)
    assert (np.abs(hidden.grad.sum(0).numpy() - exact) < 5 * spread + 1e-12).all()


def test_draws_are_from_the_mixture_and_the_same_for_the_same_seed():
    """Two teachers that are each sure of one id: three draws of four are the first's."""
    eye = torch.eye(5, dtype=torch.float64)
    sure = [Logits(40 * eye[[i]].expand(4000, 5), eye, HeadForm(5), share=share) for i, share in ((1, 3.0), (4, 1.0))]
    ids, log_count = sample_ids(sure, 8, torch.Generator().manual_seed(1))
    again, _ = sample_ids(sure, 8, torch.Generator().manual_seed(1))
    other, _ = sample_ids(sure, 8, torch.Generator().manual_seed(2))
    assert torch.equal(ids, again)
    assert not torch.equal(ids, other)
    share = torch.where(ids == 1, log_count.exp(), 0.0).sum() / 32000
    assert abs(share.item() - 0.75) < 5 * np.sqrt(0.75 * 0.25 / 32000)


@pytest.mark.parametrize("name", [n for n in ALL if n != "cross_entropy"])
def test_data_without_a_teacher_are_refused(name):
    hidden, weight, targets = problem(T=3)
    bare = Targets(targets.label_T, targets.weight_T)
    with pytest.raises(UserError, match="top_logprobs > 0"):
        head_loss(hidden, weight, loss_named(name), bare)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("jsd", {"beta": 0}, "forward_kl"),
        ("jsd", {"beta": 1.0}, "reverse_kl"),
        ("jsd", {"beta": -0.1}, "between 0 and 1"),
        ("skewed_forward_kl", {"alpha": 1.5}, "between 0 and 1"),
        ("skewed_reverse_kl", {"alpha": 0}, "name it"),
        ("ce_kl", {"ce_weight": -1}, "ce_weight"),
        ("forward_kl", {"beta": 0.5}, "unknown key"),
        ("jsd", {"betta": 0.5}, "'beta'"),
        ("forward_kl", {"temperature": 2.0}, "name the teacher in `teacher:`"),
        ("jsd", {"temperature": 2.0, "beta": 0.5}, "tail"),
    ],
)
def test_options_are_strict(name, options, said):
    with pytest.raises(UserError, match=said) as caught:
        plug.bind(name, options, HOME, "stages.kl.loss")
    assert str(caught.value).startswith(f"stages.kl.loss.{next(iter(options))}: ")
    assert "\n" not in str(caught.value)


def test_a_divergence_has_one_name_and_one_set_of_options_stored_and_online():
    stored, whole = plug.names(HOME), plug.names("distill.training.loss.divergences")
    assert set(whole) < set(stored)
    for name in whole:
        assert plug.check_options(whole[name], {}, "") == plug.check_options(stored[name], {}, "")
    assert divergences.jsd.__kwdefaults__ == sparse.jsd.__kwdefaults__
