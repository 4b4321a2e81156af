"""The Triton kernel in Triton's interpreter on the CPU: the same numbers and gradients as the plain one.

Run by test_fused.py with TRITON_INTERPRET=1 set, which Triton reads when it is imported.
"""

from __future__ import annotations

import functools

import pytest
import torch
from head_problems import problem, replace

from distill.training.loss import sparse
from distill.training.loss.head import HeadForm, head_loss
from distill.training.loss.kernels import OUTSIDE, fused


@pytest.fixture
def in_triton(monkeypatch):
    """head_loss through the fused kernel, in tiles that cut the small vocabularies several times."""

    def run(*args, tile=8, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(fused, "usable", lambda hidden, form: True)
            patch.setattr(fused, "TritonHeadKernel", functools.partial(fused.TritonHeadKernel, tile=tile))
            return head_loss(*args, **kwargs)

    return run


CASES = [
    (sparse.forward_kl, 4, 31, 4, 8),
    (sparse.forward_kl, 1, 3, 1, 8),
    (sparse.forward_kl, 3, 47, 46, 16),
    (sparse.forward_kl, 2, 123, 123, 50),
    (sparse.cross_entropy, 5, 123, 16, 50),
    (sparse.reverse_kl, 3, 11, 11, 4),
    (sparse.jsd, 3, 11, 3, 11),
]


@pytest.mark.parametrize(("loss", "T", "V", "K", "tile"), CASES)
def test_equals_the_plain_kernel(in_triton, loss, T, V, K, tile):
    results = []
    for run in (head_loss, functools.partial(in_triton, tile=tile)):
        hidden, weight, targets = problem(T=T, V=V, K=K, dtype=torch.float32)
        bias = torch.linspace(-1, 1, V).requires_grad_()
        out = run(
            hidden, weight, loss, targets, form=HeadForm(V, scale=0.7), bias_V=bias, chunk=3,
            measure=lambda student, _: {"best": student.best_outside_T, "tail": student.tail_T},
        )  # fmt: skip
        out.loss.backward()
        best = out.measures["best"].clamp(min=OUTSIDE / 2)
        tail = out.measures["tail"].clamp(min=OUTSIDE / 2)
        results.append(
            (
                out.loss_T,
                out.label_logp_T,
                best,
                tail,
                hidden.grad,
                weight.grad,
                bias.grad,
            )
        )
    for mine, plain in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(mine, plain, rtol=2e-5, atol=2e-6)


def test_bfloat16_gradients_stay_near_and_padding_gets_none(in_triton):
    hidden, weight, targets = problem(T=6, D=16, V=300, K=16, dtype=torch.bfloat16, spread=1.0)
    padded = torch.cat([weight.detach(), torch.full((12, 16), 9.0, dtype=torch.bfloat16)])
    padded.requires_grad_()
    in_triton(hidden, padded, sparse.forward_kl, targets, form=HeadForm(300), tile=128, chunk=4).loss.backward()
    wide_h, wide_w = (t.detach().double().requires_grad_() for t in (hidden, weight))
    names = ("weight_T", "teacher_logp_TK", "teacher_tail_T")
    exact = replace(targets, **{n: getattr(targets, n).double() for n in names})
    head_loss(wide_h, wide_w, sparse.forward_kl, exact).loss.backward()
    assert padded.grad[300:].abs().max() == 0
    for mine, theirs in ((hidden.grad, wide_h.grad), (padded.grad[:300], wide_w.grad)):
        assert (mine.double() - theirs).norm() / theirs.norm() < 2e-2


def test_a_tiny_tail_keeps_its_digits(in_triton):
    V, K, tail = 1000, 4, 1e-10
    logits = torch.full((1, V), float(torch.tensor(tail / (V - K)).log()))
    logits[0, :K] = float(torch.tensor((1 - tail) / K).log())
    _, _, targets = problem(T=1, V=V, K=K, dtype=torch.float32)
    targets = replace(targets, teacher_ids_TK=torch.arange(K)[None])
    out = in_triton(
        logits, torch.eye(V), sparse.cross_entropy, targets, tile=300,
        measure=lambda student, _: {"tail": student.tail_T.exp()},
    )  # fmt: skip
    assert out.measures["tail"].item() == pytest.approx(tail, rel=1e-4)
