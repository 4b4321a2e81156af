"""Token metrics against NumPy over dense probabilities, and their means over the tokens where they apply."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from head_problems import problem, replace, softmax

from distill import plug
from distill.training.loss.dense import Logits, dense_loss
from distill.training.loss.head import HeadForm, head_loss
from distill.training.loss.metrics import distribution_metrics, full_vocabulary_metrics, weighted_sums

POSITION_RANGES = ["kl/0-15", "kl/16-63", "kl/64-255", "kl/256-"]


def entropy(p):
    return -(p * np.log(p)).sum()


def test_stored_distributions_against_numpy():
    hidden, weight, targets = problem(T=7, V=31, K=4)
    targets = replace(targets, place_T=torch.tensor([0, 15, 16, 63, 64, 255, 5000]))
    loss = plug.bind("jsd", {}, "distill.training.loss.sparse")
    seen = head_loss(hidden, weight, loss, targets, chunk=3, measure=distribution_metrics).measures
    q_TV = softmax((hidden @ weight.T).detach().numpy())
    for t in range(7):
        ids = targets.teacher_ids_TK[t].numpy()
        P = np.exp(np.append(targets.teacher_logp_TK[t].numpy(), targets.teacher_tail_T[t]))
        Q = np.append(q_TV[t, ids], np.delete(q_TV[t], ids).sum())
        kl = (P * np.log(P / Q)).sum()
        assert seen["kl"][t].item() == pytest.approx(kl, rel=1e-9)
        assert seen["entropy_gap"][t].item() == pytest.approx(entropy(P) - entropy(Q), rel=1e-9)
        assert seen["tail"][t].item() == pytest.approx(P[-1])
        assert seen["student_tail"][t].item() == pytest.approx(Q[-1])
        assert seen["agreement"][t].item() == (q_TV[t].argmax() == ids[0])
        found = [seen[name][t].item() for name in POSITION_RANGES]
        expected = [-np.inf] * 4
        expected[[0, 0, 1, 1, 2, 2, 3][t]] = kl
        assert found == pytest.approx(expected)


def test_a_teacher_in_the_trainer_against_numpy():
    hidden, weight, targets = problem(T=9, V=4, K=1)
    generator = torch.Generator().manual_seed(9)

    def noisy(tensor):
        """With columns of its own beside the student's, so that they agree at times."""
        shape = (len(tensor), 3)
        return torch.cat([tensor.detach(), torch.randn(shape, generator=generator).double()], 1)

    taught = Logits(noisy(hidden), noisy(weight), HeadForm(4))
    divergence = plug.bind("reverse_kl", {}, "distill.training.loss.divergences")
    seen = dense_loss(
        Logits(hidden, weight, HeadForm(4)), [taught], divergence, targets, chunk=4, measure=full_vocabulary_metrics
    ).measures  # fmt: skip
    q = softmax((hidden @ weight.T).detach().numpy())
    p = softmax((taught.hidden_TD @ taught.weight_VD.T).numpy())
    np.testing.assert_allclose(seen["kl"], (p * np.log(p / q)).sum(1), rtol=1e-9)
    gaps = [entropy(a) - entropy(b) for a, b in zip(p, q, strict=True)]
    np.testing.assert_allclose(seen["entropy_gap"], gaps, rtol=1e-9)
    assert seen["agreement"].tolist() == (p.argmax(1) == q.argmax(1)).tolist()
    assert 0 < seen["agreement"].sum() < 9


def test_means_exclude_tokens_where_a_metric_does_not_apply():
    weight_T = torch.tensor([1.0, 2.0, 1.0, 0.0])
    found = weighted_sums(
        {
            "some": torch.tensor([-torch.inf, 3.0, 6.0, -torch.inf]),
            "none": torch.full((4,), -torch.inf),
            "broken": torch.tensor([torch.nan, 1.0, 1.0, 1.0]),
        },
        weight_T,
    )
    assert found["some"].tolist() == [12.0, 3.0]
    assert found["none"].tolist() == [0.0, 0.0]
    assert found["broken"][0].isnan()
