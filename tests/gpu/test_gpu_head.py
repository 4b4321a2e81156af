"""The head on a GPU: Triton and torch against whole logits in float64, and the memory it takes."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch

from distill.training.loss import divergences, sparse
from distill.training.loss.dense import Logits, dense_loss
from distill.training.loss.head import HeadForm, Student, Targets, head_loss
from distill.training.loss.kernels import OUTSIDE, fused

LOSSES = {
    "cross_entropy": sparse.cross_entropy,
    "forward_kl": sparse.forward_kl,
    "reverse_kl": sparse.reverse_kl,
    "jsd": sparse.jsd,
    "tvd": sparse.tvd,
    "skewed_forward_kl": sparse.skewed_forward_kl,
    "skewed_reverse_kl": sparse.skewed_reverse_kl,
    "ce_kl": sparse.ce_kl,
}
NEAR = {torch.float32: 5e-5, torch.bfloat16: 1e-2}
"""Most that a gradient may be away, relative to its norm."""


def problem(T, V, K, dtype, D=64, rows=None, seed=0):
    """Hidden states, a weight of `rows` rows (V unless given), and targets: the top K of a teacher near it, some entries unused."""
    torch.manual_seed(seed)
    hidden = torch.randn(T, D, device="cuda").to(dtype).requires_grad_()
    weight = (torch.randn(rows or V, D, device="cuda") * 0.4).to(dtype).requires_grad_()
    # Near the student, so that no gradient is a small difference of large numbers.
    logits = hidden.detach().float() @ weight.detach().float()[:V].t() + torch.randn(T, V, device="cuda") * 2
    top = logits.log_softmax(1).topk(K, dim=1)
    logp, ids = top.values, top.indices
    if K > 2:
        ids[::3, -1] = -1
        logp[::3, -1] = -torch.inf
    tail = torch.log1p(-logp.exp().sum(1))
    labels = torch.randint(0, V, (T,), device="cuda")
    labels[::2] = ids[::2, 0]
    targets = Targets(labels, torch.rand(T, device="cuda") / T, ids, logp, tail)
    return hidden, weight, targets


def shaped(x, form):
    z = x[:, : form.vocab_size] * form.scale
    return z if form.softcap is None else form.softcap * torch.tanh(z / form.softcap)


def exact(hidden, weight, loss, targets, form):
    """(loss by row, d hidden, d weight) from whole logits in float64."""
    hidden, weight = (t.detach().double().requires_grad_() for t in (hidden, weight))
    logq = shaped(hidden @ weight.t(), form).log_softmax(1)
    used = targets.teacher_ids_TK >= 0
    ids = torch.where(used, targets.teacher_ids_TK, targets.teacher_ids_TK[:, :1])
    tail = logq.scatter(1, ids, -torch.inf).logsumexp(1)
    best = logq.detach().scatter(1, ids, -torch.inf).amax(1)
    student = Student(logq.gather(1, targets.label_T[:, None])[:, 0], logq.gather(1, ids), tail, best)
    wide = {k: getattr(targets, k).double() for k in ("weight_T", "teacher_logp_TK", "teacher_tail_T")}
    loss_T = loss(student, replace(targets, **wide))
    (loss_T * wide["weight_T"]).sum().backward()
    return loss_T.detach(), hidden.grad, weight.grad


def distance(mine, theirs):
    return ((mine.double() - theirs).norm() / theirs.norm()).item()


@pytest.fixture(params=["triton", "torch"])
def kernel(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(fused, "usable", lambda hidden, form: False)
    return request.param


def compare(kernel, loss, shape, form, dtype, chunk=None, upstream=1.0):
    rows = form.vocab_size + (293 if form.vocab_size == 151643 else 0)
    hidden, weight, targets = problem(*shape, dtype, rows=rows)
    out = head_loss(hidden, weight, loss, targets, form=form, chunk=chunk)
    (out.loss * upstream).backward()
    loss_T, dhidden, dweight = exact(hidden, weight, loss, targets, form)
    torch.testing.assert_close(out.loss_T.double(), loss_T, rtol=1e-4, atol=2e-5)
    assert distance(hidden.grad, upstream * dhidden) < NEAR[dtype]
    assert distance(weight.grad, upstream * dweight) < NEAR[dtype]
    assert weight.grad[form.vocab_size :].abs().sum() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss(kernel, loss, dtype):
    compare(kernel, LOSSES[loss], (130, 49152, 64), HeadForm(49152), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shape", "chunk"),
    [
        ((1, 49152, 1), None),
        ((131, 49152, 33), 64),
        ((77, 128256, 128), None),
        ((65, 151643, 20), None),
        ((200, 151643, 7), 96),
        ((93, 50257, 16), None),
        ((5, 700, 3), 2),
    ],
)
def test_ragged_sizes(kernel, shape, chunk, dtype):
    compare(kernel, sparse.forward_kl, shape, HeadForm(shape[1]), dtype, chunk)
    compare(kernel, sparse.reverse_kl, shape, HeadForm(shape[1]), dtype, chunk, upstream=3.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", [HeadForm(49152, scale=0.25), HeadForm(49152, 1.0, 30.0), HeadForm(49152, 0.5, 10.0)])
def test_multipliers_and_caps(kernel, form, dtype):
    compare(kernel, sparse.jsd, (70, 49152, 16), form, dtype)
    compare(kernel, sparse.cross_entropy, (70, 49152, 16), form, dtype, chunk=33)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_bias_and_measures(kernel, dtype):
    V = 50257
    hidden, weight, targets = problem(90, V, 16, dtype)
    bias = torch.linspace(-2, 2, V, device="cuda").to(dtype).requires_grad_()
    out = head_loss(
        hidden, weight, sparse.forward_kl, targets, form=HeadForm(V, 0.7), bias_V=bias, chunk=40,
        measure=lambda student, _: {"best": student.best_outside_T, "tail": student.tail_T},
    )  # fmt: skip
    out.loss.backward()
    wide = bias.detach().double().requires_grad_()
    logq = ((hidden.detach().double() @ weight.detach().double().t() + wide) * 0.7).log_softmax(1)
    used = targets.teacher_ids_TK >= 0
    outside = logq.scatter(1, torch.where(used, targets.teacher_ids_TK, targets.teacher_ids_TK[:, :1]), -torch.inf)
    tail = outside.logsumexp(1)
    near = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
    near(out.measures["best"].double(), outside.amax(1).detach())
    near(out.measures["tail"].double(), tail.detach())
    p, p_tail = targets.teacher_logp_TK.double(), targets.teacher_tail_T.double()
    kept = torch.where(used, p.exp() * (p.clamp(min=OUTSIDE) - logq.gather(1, targets.teacher_ids_TK.clamp(min=0))), 0)
    ((kept.sum(1) + p_tail.exp() * (p_tail - tail)) * targets.weight_T.double()).sum().backward()
    assert distance(bias.grad, wide.grad) < NEAR[dtype]


def test_a_tiny_tail_keeps_its_digits(kernel):
    V, K, tail = 50257, 4, 1e-10
    logits = torch.full((1, V), float(torch.tensor(tail / (V - K)).log()), device="cuda")
    logits[0, :K] = float(torch.tensor((1 - tail) / K).log())
    _, _, targets = problem(1, V, K, torch.float32)
    targets = replace(targets, teacher_ids_TK=torch.arange(K, device="cuda")[None])
    targets = replace(targets, teacher_logp_TK=torch.full((1, K), -2.0, device="cuda"))
    hidden, weight = torch.ones(1, 1, device="cuda"), logits.t().contiguous()
    out = head_loss(
        hidden, weight, sparse.cross_entropy, targets, measure=lambda student, _: {"tail": student.tail_T.exp()}
    )
    assert out.measures["tail"].item() == pytest.approx(tail, rel=1e-4)


def test_no_tokens_give_a_zero_with_a_gradient(kernel):
    hidden, weight, targets = problem(3, 700, 4, torch.bfloat16)
    nothing = Targets.__getitem__(targets, slice(0, 0))
    loss = head_loss(hidden[:0], weight, sparse.forward_kl, nothing).loss
    loss.backward()
    assert loss.item() == 0
    assert weight.grad.abs().sum() == 0


DIVERGENCES = {
    name: getattr(divergences, name)
    for name in ("forward_kl", "reverse_kl", "jsd", "tvd", "skewed_forward_kl", "skewed_reverse_kl")
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_teacher_in_the_trainer(name, temperature, dtype):
    V, form = 49152, HeadForm(49152, 0.5, 20.0)
    hidden, weight, targets = problem(150, V, 4, dtype)
    torch.manual_seed(1)
    teachers = [
        Logits(torch.randn(150, D, device="cuda").to(dtype), (torch.randn(V, D, device="cuda") * 0.3).to(dtype), f, share=s)
        for D, f, s in ((96, HeadForm(V), 0.75), (48, form, 0.25))
    ]  # fmt: skip
    compare, student = DIVERGENCES[name], Logits(hidden, weight, form)
    out = dense_loss(
        student, teachers, compare, targets, temperature=temperature, kl_weight=0.7, ce_weight=0.3, chunk=64
    )
    out.loss.backward()
    wide_h, wide_w = (t.detach().double().requires_grad_() for t in (hidden, weight))
    z = shaped(wide_h @ wide_w.t(), form)
    p = sum(
        t.share * (shaped(t.hidden_TD.double() @ t.weight_VD.double().t(), t.form) / temperature).softmax(1)
        for t in teachers
    )
    label = z.log_softmax(1).gather(1, targets.label_T[:, None])[:, 0]
    loss_T = 0.7 * temperature**2 * compare(p.log(), (z / temperature).log_softmax(1)) - 0.3 * label
    (loss_T * targets.weight_T.double()).sum().backward()
    torch.testing.assert_close(out.loss_T.double(), loss_T.detach(), rtol=1e-4, atol=5e-5)
    assert distance(hidden.grad, wide_h.grad) < NEAR[dtype]
    assert distance(weight.grad, wide_w.grad) < NEAR[dtype]


def peak(work):
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("online", [False, True])
def test_the_whole_logits_are_never_in_memory(kernel, online):
    T, V, D = 32768, 128256, 256
    hidden = torch.randn(T, D, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(V, D, device="cuda", dtype=torch.bfloat16) * 0.05).requires_grad_()
    ids = torch.randint(0, V, (T, 8), device="cuda")
    logp = torch.randn(T, 8, device="cuda").log_softmax(1) - 0.1
    share = torch.full((T,), 1 / T, device="cuda")
    targets = Targets(ids[:, 0].clone(), share, ids, logp, torch.full_like(share, 0.095).log())

    def work():
        if online:
            student, form = Logits(hidden, weight, HeadForm(V)), HeadForm(V)
            loss = dense_loss(student, [Logits(hidden.detach(), weight.detach(), form)], divergences.jsd, targets).loss
        else:
            loss = head_loss(hidden, weight, sparse.forward_kl, targets).loss
        loss.backward()

    assert peak(work) < 0.45 * T * V * 2
