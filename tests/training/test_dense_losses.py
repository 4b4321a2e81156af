"""Whole-vocabulary divergences with a teacher in the trainer, against dense log-softmax and autograd, against TRL, and against stored targets."""

from __future__ import annotations

import functools

import pytest
import torch
from head_problems import as_taught_by, problem, replace
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

from distill import plug
from distill.training.loss import sparse
from distill.training.loss.dense import Logits, dense_loss
from distill.training.loss.head import HeadForm, head_loss

NAMES = ["forward_kl", "reverse_kl", "jsd", "tvd", "skewed_forward_kl", "skewed_reverse_kl"]


def divergence_named(name, **options):
    return plug.bind(name, options, "distill.training.loss.divergences")


def probability_space(name, p, q):
    """The same divergences from probabilities, none of them zero."""
    m = 0.5 * (p + q)
    forward, backward = 0.1 * p + 0.9 * q, 0.9 * p + 0.1 * q
    return {
        "forward_kl": lambda: p * (p / q).log(),
        "reverse_kl": lambda: q * (q / p).log(),
        "jsd": lambda: 0.5 * p * (p / m).log() + 0.5 * q * (q / m).log(),
        "tvd": lambda: 0.5 * (p - q).abs(),
        "skewed_forward_kl": lambda: p * (p / forward).log(),
        "skewed_reverse_kl": lambda: q * (q / backward).log(),
    }[name]().sum(1)


def teacher(T, V, E=7, seed=9, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return Logits(
        torch.randn(T, E, generator=generator, dtype=dtype),
        torch.randn(V, E, generator=generator, dtype=dtype),
        HeadForm(V),
    )


def same_gradients(loss, expected, *tensors, rtol=1e-8, atol=1e-10):
    theirs = torch.autograd.grad(expected, tensors)
    for mine, other in zip(torch.autograd.grad(loss, tensors), theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(("T", "V"), [(1, 3), (7, 31), (3, 47), (31, 123)])
def test_equals_the_dense_loss(name, temperature, T, V):
    hidden, weight, targets = problem(T=T, V=V, K=1)
    taught = teacher(T, V)
    out = dense_loss(
        Logits(hidden, weight, HeadForm(V)), [taught], divergence_named(name), targets,
        temperature=temperature, chunk=4,
    )  # fmt: skip
    q = ((hidden @ weight.T) / temperature).softmax(1)
    p = ((taught.hidden_TD @ taught.weight_VD.T) / temperature).softmax(1)
    dense_T = temperature**2 * probability_space(name, p, q)
    torch.testing.assert_close(out.loss_T, dense_T.detach(), rtol=1e-9, atol=1e-12)
    same_gradients(out.loss, (dense_T * targets.weight_T).sum(), hidden, weight)
    label_T = (hidden @ weight.T).log_softmax(1).gather(1, targets.label_T[:, None])[:, 0]
    torch.testing.assert_close(out.label_logp_T, label_T.detach())


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck_with_every_form_of_head(name):
    hidden, weight, targets = problem(T=3, V=11, K=1)
    bias = torch.linspace(-1, 1, 11, dtype=torch.float64, requires_grad=True)
    taught = replace(teacher(3, 11), form=HeadForm(11, scale=0.7, softcap=5.0))
    form = HeadForm(11, scale=0.5, softcap=2.0)

    def f(h, w, b):
        return dense_loss(
            Logits(h, w, form, b), [taught], divergence_named(name), targets,
            temperature=1.5, ce_weight=0.3, chunk=2,
        ).loss  # fmt: skip

    assert torch.autograd.gradcheck(f, (hidden, weight, bias), atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_chunks_blocks_and_padding_change_nothing(name, monkeypatch):
    hidden, weight, targets = problem(T=13, V=40, K=1)
    taught = teacher(13, 40)
    base = dense_loss(Logits(hidden, weight, HeadForm(40)), [taught], divergence_named(name), targets)
    monkeypatch.setattr("distill.training.loss.dense.BLOCK_BYTES", {"cpu": 3 * 40 * 8})
    padded = torch.cat([weight, torch.full((6, 5), 9.0, dtype=torch.float64)])
    padded_teacher = replace(taught, weight_VD=torch.cat([taught.weight_VD, torch.full((2, 7), 9.0).double()]))
    out = dense_loss(
        Logits(hidden, padded, HeadForm(40)), [padded_teacher], divergence_named(name), targets, chunk=5
    )  # fmt: skip
    torch.testing.assert_close(out.loss_T, base.loss_T, rtol=1e-12, atol=1e-14)
    same_gradients(out.loss, base.loss, hidden, weight, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_stored_targets_with_every_id_are_the_same_loss(name):
    hidden, weight, targets = problem(T=6, V=23, K=1)
    taught = teacher(6, 23)
    stored = as_taught_by(taught.hidden_TD @ taught.weight_VD.T, targets, 23)
    loss = head_loss(hidden, weight, plug.bind(name, {}, "distill.training.loss.sparse"), stored)
    live = dense_loss(Logits(hidden, weight, HeadForm(23)), [taught], divergence_named(name), targets)
    torch.testing.assert_close(live.loss_T, loss.loss_T, rtol=1e-10, atol=1e-12)
    same_gradients(live.loss, loss.loss, hidden, weight)


@pytest.mark.parametrize("name", NAMES)
def test_the_teacher_itself_as_student_is_left_alone(name):
    hidden, weight, targets = problem(T=6, V=23, K=1)
    own = Logits(hidden, weight, HeadForm(23))
    out = dense_loss(own, [own], divergence_named(name), targets, temperature=2.0)
    assert out.loss.abs() < 1e-12
    for grad in torch.autograd.grad(out.loss, (hidden, weight)):
        assert grad.abs().max() < 1e-13


@pytest.mark.parametrize("name", NAMES)
def test_several_teachers_are_one_mixture(name):
    hidden, weight, targets = problem(T=5, V=17, K=1)
    two = [replace(teacher(5, 17, seed=s), share=share) for s, share in ((1, 3.0), (2, 1.0))]
    out = dense_loss(Logits(hidden, weight, HeadForm(17)), two, divergence_named(name), targets, temperature=2.0)
    p = sum(share * ((t.hidden_TD @ t.weight_VD.T) / 2).softmax(1) for t, share in zip(two, (0.75, 0.25), strict=True))
    dense_T = 4 * probability_space(name, p, ((hidden @ weight.T) / 2).softmax(1))
    torch.testing.assert_close(out.loss_T, dense_T.detach(), rtol=1e-9, atol=1e-12)
    same_gradients(out.loss, (dense_T * targets.weight_T).sum(), hidden, weight)


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_trl_agrees(beta):
    hidden, weight, targets = problem(T=9, V=50, K=1, dtype=torch.float32)
    taught = teacher(9, 50, dtype=torch.float32)
    theirs_T, _ = ChunkedDivergenceFunction.apply(
        hidden, weight, None, taught.hidden_TD, taught.weight_VD, None, beta, 2.0
    )
    name = {0.0: "forward_kl", 1.0: "reverse_kl"}.get(beta)
    divergence = divergence_named(name) if name else divergence_named("jsd", beta=beta)
    out = dense_loss(Logits(hidden, weight, HeadForm(50)), [taught], divergence, targets, temperature=2.0)
    torch.testing.assert_close(out.loss_T, 4 * theirs_T.detach(), rtol=1e-4, atol=1e-5)
    expected = (4 * theirs_T * targets.weight_T).sum()
    same_gradients(out.loss, expected, hidden, weight, rtol=1e-3, atol=1e-5)


def test_bfloat16_stays_near_and_losses_are_float32():
    hidden, weight, targets = problem(T=31, D=16, V=200, K=1, dtype=torch.bfloat16, spread=1.0)
    taught = teacher(31, 200, dtype=torch.bfloat16)
    out = dense_loss(Logits(hidden, weight, HeadForm(200)), [taught], divergence_named("jsd"), targets)
    q = (hidden.double() @ weight.double().T).softmax(1)
    p = (taught.hidden_TD.double() @ taught.weight_VD.double().T).softmax(1)
    dense_T = probability_space("jsd", p, q)
    assert out.loss_T.dtype == torch.float32
    assert out.loss_T.min() >= 0
    torch.testing.assert_close(out.loss_T.double(), dense_T.detach(), rtol=5e-2, atol=1e-2)
    theirs = torch.autograd.grad((dense_T * targets.weight_T.double()).sum(), (hidden, weight))
    for mine, other in zip(torch.autograd.grad(out.loss, (hidden, weight)), theirs, strict=True):
        assert mine.dtype == torch.bfloat16
        assert (mine.double() - other.double()).norm() / other.double().norm() < 5e-2


def test_ce_weight_adds_the_labels():
    hidden, weight, targets = problem(T=5, V=17, K=1)
    student, taught = Logits(hidden, weight, HeadForm(17)), teacher(5, 17)
    loss = functools.partial(
        dense_loss,
        student,
        [taught],
        divergence_named("forward_kl"),
        targets,
        temperature=2.0,
    )
    ce = head_loss(hidden, weight, sparse.cross_entropy, targets).loss
    torch.testing.assert_close(loss(ce_weight=0.7).loss, loss().loss + 0.7 * ce)


def test_models_with_other_vocabularies_are_refused():
    hidden, weight, targets = problem(T=5, V=17, K=1)
    with pytest.raises(ValueError, match="one vocabulary"):
        dense_loss(Logits(hidden, weight, HeadForm(17)), [teacher(5, 18)], divergence_named("tvd"), targets)
