"""Several teachers' kept ids over their union, against NumPy in probability space over the whole vocabulary."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from head_problems import softmax

from distill import plug
from distill.records import TopK
from distill.training.loss.head import Targets, head_loss
from distill.training.loss.metrics import distribution_metrics
from distill.training.loss.multi_teacher import TeacherMixture, over_teachers
from distill.training.packing import Example, pack

V, C = 17, 6
SHARES = (0.5, 0.3, 0.2)


def kept(seed, top_k, mass):
    """Return a random teacher [C, V] and its stored entries."""
    p = softmax(np.random.default_rng(seed).normal(size=(C, V)) * 3)
    order = np.argsort(-p, axis=1)
    logp = np.log(np.take_along_axis(p, order, 1))
    return p, TopK.from_dense(order, logp).truncate(top_k=top_k, mass=mass)


def teachers():
    return [kept(1, 4, 0.9), kept(2, 3, 0.5), kept(3, V, 1.0)]


def ids_at(top, t):
    return top.ids_E[top.offsets[t] : top.offsets[t + 1]]


def forward_kl(P, Q):
    return (P * np.log(P / Q)).sum(), -P / Q


def reverse_kl(P, Q):
    return (Q * np.log(Q / P)).sum(), np.log(Q / P) + 1


def jsd(P, Q):
    m = (P + Q) / 2
    return (P * np.log(P / m) + Q * np.log(Q / m)).sum() / 2, np.log(Q / m) / 2


def oracle(q, divergence):
    """Loss and its derivative by the logits, teacher by teacher, each over its own ids and one bucket for the rest."""
    loss_T, dz = np.zeros(C), np.zeros((C, V))
    for (p, top), share in zip(teachers(), SHARES, strict=True):
        for t in range(C):
            ids = ids_at(top, t)
            rest = np.setdiff1d(np.arange(V), ids)
            groups = [[i] for i in ids] + ([rest] if len(rest) else [])
            P = np.array([p[t, g].sum() for g in groups])
            Q = np.array([q[t, g].sum() for g in groups])
            value, by_bucket = divergence(P, Q)
            loss_T[t] += share * value
            for g, slope in zip(groups, by_bucket, strict=True):
                dz[t, g] += share * q[t, g] * (slope - (Q * by_bucket).sum())
    return loss_T, dz


def batch_of():
    """Packed with a second trace, so that rows are padded to the wider union."""
    tops = [top for _, top in teachers()]
    wide = [top.slice(0, 2) for _, top in (kept(7, 8, 1.0), kept(8, 9, 1.0), kept(9, 3, 1.0))]
    prompt, completion = np.array([1, 2]), np.arange(C)
    examples = [
        Example("a", prompt, completion, TeacherMixture.of(tops, SHARES)),
        Example("b", prompt[:1], completion[:2], TeacherMixture.of(wide, SHARES)),
    ]
    (batch,) = pack(examples, micro_tokens=99)
    return batch.to_torch()


def targets_of(batch):
    rows = torch.arange(1, 1 + C)  # the first trace lies first, its prompt is two tokens long
    assert batch.label_T[rows].tolist() == list(range(C))
    found = Targets.of(batch, rows)
    return Targets(**{
        name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in ((f, getattr(found, f)) for f in Targets.__slots__)
    })  # fmt: skip


@pytest.mark.parametrize("divergence", [forward_kl, reverse_kl, jsd])
def test_equals_the_sum_of_every_teachers_own_divergence(divergence):
    logits = np.random.default_rng(5).normal(size=(C, V)) * 2
    targets = targets_of(batch_of())
    z = torch.from_numpy(logits).requires_grad_()
    loss = plug.bind(divergence.__name__, {}, "distill.training.loss.sparse")
    out = head_loss(z, torch.eye(V, dtype=torch.float64), over_teachers(loss, SHARES), targets, chunk=4)
    out.loss.backward()
    loss_T, dz = oracle(softmax(logits), divergence)
    np.testing.assert_allclose(out.loss_T.numpy(), loss_T, rtol=1e-5, atol=1e-6)
    expected = dz * targets.weight_T.numpy()[:, None]
    np.testing.assert_allclose(z.grad.numpy(), expected, rtol=1e-4, atol=1e-7)


def test_one_teacher_is_the_plain_loss_and_the_student_itself_is_left_alone():
    p, top = kept(1, 4, 0.9)
    blend = TeacherMixture.of([top, top], (0.25, 0.75))
    _, logp = top.dense()
    for t in range(C):
        used = blend.ids_CK[t] >= 0
        assert blend.ids_CK[t, used].tolist() == ids_at(top, t).tolist()
        np.testing.assert_allclose(blend.logp_CK[t, used], logp[t, : used.sum()], atol=1e-6)
    np.testing.assert_allclose(blend.tail_T, top.tail_T, atol=1e-6)
    (batch,) = pack([Example("a", np.array([1]), np.arange(C), blend)], micro_tokens=99)
    targets = Targets.of(batch.to_torch(), torch.arange(C))
    z = torch.from_numpy(np.log(p)).float().requires_grad_()
    loss = plug.bind("forward_kl", {}, "distill.training.loss.sparse")
    out = head_loss(z, torch.eye(V), over_teachers(loss, (0.25, 0.75)), targets, measure=distribution_metrics)
    out.loss.backward()
    assert out.loss_T.abs().max() < 1e-5
    assert z.grad.abs().max() < 1e-6
    assert out.measures["agreement"].tolist() == [1.0] * C


def test_the_mixture_at_ids_that_only_one_teacher_kept():
    """Two teachers over {0} and {1}: the mixture has half of each at its id, and half of both tails outside."""
    one = TopK(np.array([1]), np.array([0]), np.log([0.6]).astype(np.float32), np.log([0.4]))
    two = TopK(np.array([1]), np.array([1]), np.log([0.9]).astype(np.float32), np.log([0.1]))
    blend = TeacherMixture.of([one, two], (0.5, 0.5))
    assert blend.ids_CK.tolist() == [[1, 0]]
    np.testing.assert_allclose(np.exp(blend.logp_CK), [[0.45, 0.3]], rtol=1e-6)
    np.testing.assert_allclose(np.exp(blend.tail_T), [0.25], rtol=1e-6)
    np.testing.assert_allclose(np.exp(blend.each_logp_CMK), [[[0, 0.6], [0.9, 0]]], rtol=1e-6)
