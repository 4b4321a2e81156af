"""The head primitive and its losses against dense fp64 oracles in probability space that share no code with them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from head_problems import as_taught_by, problem, replace, softmax

from distill.records import TopK
from distill.training.loss.head import HeadForm, Student, Targets, head_loss
from distill.training.loss.kernels import chunks
from distill.training.loss.sparse import cross_entropy, forward_kl


def oracle(hidden, weight, targets, loss):
    """Loss [T] and its gradients by numpy in probability space: dense, bucket by bucket, derivative by hand."""
    h, w = hidden.detach().double().numpy(), weight.detach().double().numpy()
    q = softmax(h @ w.T)
    weight_T = targets.weight_T.double().numpy()
    T, V = q.shape
    losses, dz = np.zeros(T), np.zeros((T, V))
    for t in range(T):
        if loss is cross_entropy:
            label = int(targets.label_T[t])
            losses[t] = -np.log(q[t, label])
            dz[t] = q[t]
            dz[t, label] -= 1
            continue
        logp = targets.teacher_logp_TK[t].double().numpy()
        ids = targets.teacher_ids_TK[t].numpy()[logp > -np.inf]
        p = np.exp(logp[logp > -np.inf])
        rest = np.setdiff1d(np.arange(V), ids)
        tail, student_tail = np.exp(float(targets.teacher_tail_T[t])), q[t, rest].sum()
        losses[t] = (p * np.log(p / q[t, ids])).sum() + (tail * np.log(tail / student_tail) if tail > 1e-6 else 0)
        # d(-sum_b p_b log q_b)/dz: q_v * sum(p) - p_v inside S, q_v * (sum(p) - T / P) outside.
        total = p.sum() + (tail if tail > 1e-6 else 0)
        dz[t] = q[t] * total
        dz[t, ids] -= p
        if tail > 1e-6:
            dz[t, rest] -= tail * q[t, rest] / student_tail
    dz *= weight_T[:, None]
    return losses, dz @ w, dz.T @ h


@pytest.mark.parametrize("loss", [cross_entropy, forward_kl])
@pytest.mark.parametrize(
    ("T", "V", "K"),
    [(7, 31, 4), (1, 3, 1), (3, 47, 46), (31, 123, 16), (5, 11, 11), (47, 31, 3), (2, 123, 123)],
)
def test_loss_and_gradients_equal_the_dense_oracle(loss, T, V, K):
    hidden, weight, targets = problem(T=T, V=V, K=K)
    out = head_loss(hidden, weight, loss, targets, chunk=3)
    out.loss.backward()
    loss_T, dhidden, dweight = oracle(hidden, weight, targets, loss)
    np.testing.assert_allclose(out.loss_T.numpy(), loss_T, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(out.loss.item(), (loss_T * targets.weight_T.numpy()).sum(), rtol=1e-9)
    np.testing.assert_allclose(hidden.grad.numpy(), dhidden, rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(weight.grad.numpy(), dweight, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("loss", [cross_entropy, forward_kl])
@pytest.mark.parametrize("form", [{}, {"scale": 0.3}, {"softcap": 1.5}, {"scale": 0.5, "softcap": 2.0}])
@pytest.mark.parametrize("biased", [False, True])
def test_gradcheck(loss, form, biased):
    hidden, weight, targets = problem(T=4, V=13, K=3)
    bias = torch.linspace(-1, 1, 13, dtype=torch.float64, requires_grad=True) if biased else None
    inputs = (hidden, weight) if bias is None else (hidden, weight, bias)

    def f(h, w, b=None):
        return head_loss(h, w, loss, targets, form=HeadForm(13, **form), bias_V=b, chunk=3).loss

    assert torch.autograd.gradcheck(f, inputs, atol=1e-7)


def test_student_numbers_equal_a_plain_softmax_with_scale_cap_and_bias():
    hidden, weight, targets = problem(T=6, V=20, K=5)
    bias = torch.linspace(-1, 1, 20, dtype=torch.float64)
    seen = []

    def spy(student: Student, _: Targets):
        seen.append(student)
        return student.label_T

    head_loss(hidden, weight, spy, targets, form=HeadForm(20, scale=0.5, softcap=3.0), bias_V=bias)
    logits = 3.0 * torch.tanh((hidden @ weight.T + bias) * 0.5 / 3.0)
    logq = logits.log_softmax(1)
    torch.testing.assert_close(seen[0].top_TK, logq.gather(1, targets.teacher_ids_TK))
    torch.testing.assert_close(seen[0].label_T, logq.gather(1, targets.label_T[:, None])[:, 0])
    outside = logq.scatter(1, targets.teacher_ids_TK, -torch.inf).logsumexp(1)
    torch.testing.assert_close(seen[0].tail_T, outside)


@pytest.mark.parametrize("tail", [1e-3, 1e-8, 1e-10])
def test_a_tiny_student_tail_keeps_its_digits_in_fp32(tail):
    """Mass 1e-10 outside S: as 1 - sum it would read 0 or negative; by masking it keeps six digits."""
    V, K = 1000, 4
    logits = torch.full((1, V), float(np.log(tail / (V - K))))
    logits[0, :K] = float(np.log((1 - tail) / K))
    targets = Targets(
        label_T=torch.tensor([0]),
        weight_T=torch.ones(1),
        teacher_ids_TK=torch.arange(K)[None],
        teacher_logp_TK=torch.full((1, K), float(np.log(0.2))),
        teacher_tail_T=torch.tensor([float(np.log(0.2))]),
    )
    seen = []

    def spy(student, targets):
        seen.append(student.tail_T.exp().item())
        return forward_kl(student, targets)

    hidden = logits.clone().requires_grad_()
    out = head_loss(hidden, torch.eye(V), spy, targets)
    out.loss.backward()
    assert seen[0] == pytest.approx(tail, rel=1e-5)
    expected = 0.8 * np.log(0.2 / ((1 - tail) / K)) + 0.2 * np.log(0.2 / tail)
    assert out.loss.item() == pytest.approx(expected, rel=1e-5)
    # d/dz inside S is q - p; the rest shares q_tail - T among its members.
    np.testing.assert_allclose(hidden.grad[0, :K].numpy(), (1 - tail) / K - 0.2, rtol=1e-4)
    np.testing.assert_allclose(hidden.grad[0, K:].numpy(), (tail - 0.2) / (V - K), rtol=1e-4)


def test_known_values():
    """p = [.7 .2 .1], q = [.5 .3 .2]: KL .0851228; p = [.9 .1], q = [.1 .9]: 1.7577797."""
    for p, q, expected in [
        ([0.7, 0.2, 0.1], [0.5, 0.3, 0.2], 0.0851228),
        ([0.9, 0.1], [0.1, 0.9], 1.7577797),
    ]:
        V = len(p)
        targets = Targets(
            label_T=torch.tensor([0]),
            weight_T=torch.ones(1, dtype=torch.float64),
            teacher_ids_TK=torch.arange(V - 1)[None],
            teacher_logp_TK=torch.tensor([p[:-1]], dtype=torch.float64).log(),
            teacher_tail_T=torch.tensor([p[-1]], dtype=torch.float64).log(),
        )
        out = head_loss(
            torch.tensor([q], dtype=torch.float64).log(),
            torch.eye(V, dtype=torch.float64),
            forward_kl,
            targets,
        )
        assert out.loss.item() == pytest.approx(expected, abs=1e-7)


def test_teacher_equal_to_student_gives_zero_loss_and_gradient():
    hidden, weight, targets = problem(T=9, V=40, K=6)
    same = as_taught_by(hidden @ weight.T, targets, 6)
    out = head_loss(hidden, weight, forward_kl, same, chunk=4)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(0, abs=1e-12)
    assert hidden.grad.abs().max() < 1e-14
    assert weight.grad.abs().max() < 1e-14


@pytest.mark.parametrize("loss", [cross_entropy, forward_kl])
def test_chunk_size_does_not_matter(loss):
    grads = []
    for chunk in (1, 2, 5, 64):
        hidden, weight, targets = problem(T=13)
        out = head_loss(hidden, weight, loss, targets, chunk=chunk)
        out.loss.backward()
        grads.append((out.loss.detach(), hidden.grad, weight.grad))
    for other in grads[1:]:
        for a, b in zip(grads[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_repeated_ids_and_missing_entries_count_once():
    hidden, weight, targets = problem(T=5, V=20, K=3)
    clean = head_loss(hidden, weight, forward_kl, targets)
    clean.loss.backward()
    expected = (hidden.grad.clone(), weight.grad.clone())
    hidden.grad = weight.grad = None
    padded = Targets(
        targets.label_T,
        targets.weight_T,
        torch.cat([targets.teacher_ids_TK, targets.teacher_ids_TK[:, :1], torch.full((5, 2), -1)], 1),
        torch.cat(
            [
                targets.teacher_logp_TK,
                targets.teacher_logp_TK[:, :1],
                torch.full((5, 2), -torch.inf),
            ],
            1,
        ),
        targets.teacher_tail_T,
    )
    out = head_loss(hidden, weight, forward_kl, padded)
    out.loss.backward()
    torch.testing.assert_close(out.loss_T, clean.loss_T)
    torch.testing.assert_close(hidden.grad, expected[0])
    torch.testing.assert_close(weight.grad, expected[1])


@pytest.mark.fault(9)
def test_padded_vocabulary_rows_carry_no_mass_and_get_no_gradient():
    hidden, weight, targets = problem(T=5, V=20, K=3)
    padded = torch.cat([weight.detach(), torch.full((4, 5), 9.0, dtype=torch.float64)]).requires_grad_()
    plain = head_loss(hidden, weight, forward_kl, targets)
    out = head_loss(hidden, padded, forward_kl, targets, form=HeadForm(vocab_size=20))
    out.loss.backward()
    torch.testing.assert_close(out.loss, plain.loss)
    assert padded.grad[20:].abs().max() == 0


@pytest.mark.fault(21)
def test_no_tokens_and_zero_weights_give_zero_and_finite_gradients():
    hidden, weight, targets = problem(T=4)
    empty = head_loss(hidden[:0], weight, forward_kl, targets[slice(0, 0)])
    empty.loss.backward()
    assert empty.loss.item() == 0
    assert weight.grad.abs().max() == 0
    hidden, weight, targets = problem(T=4)
    masked = replace(targets, weight_T=torch.zeros(4, dtype=torch.float64))
    out = head_loss(hidden, weight, forward_kl, masked)
    out.loss.backward()
    assert out.loss.item() == 0
    assert hidden.grad.abs().max() == 0


def test_frozen_head_gets_no_gradient_and_hidden_the_same():
    hidden, weight, targets = problem()
    head_loss(hidden, weight, forward_kl, targets).loss.backward()
    both = hidden.grad.clone()
    hidden.grad = None
    frozen = weight.detach()
    head_loss(hidden, frozen, forward_kl, targets).loss.backward()
    torch.testing.assert_close(hidden.grad, both)
    assert frozen.grad is None


def test_tied_embedding_sums_both_gradients():
    """The head's gradient adds to the embedding's, as autograd would do with one dense graph."""
    _, table, targets = problem(T=6, V=20, D=5, K=3)
    ids = torch.tensor([1, 4, 1, 0, 19, 7])
    head_loss(torch.tanh(table[ids]), table, cross_entropy, targets).loss.backward()
    fused, table.grad = table.grad.clone(), None
    logq = (torch.tanh(table[ids]) @ table.T).log_softmax(1)
    (-logq.gather(1, targets.label_T[:, None])[:, 0] * targets.weight_T).sum().backward()
    torch.testing.assert_close(fused, table.grad)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 2e-5), (torch.bfloat16, 5e-2)])
def test_lower_precisions_stay_near_the_oracle(dtype, rtol):
    hidden, weight, targets = problem(T=31, D=16, V=500, K=16, dtype=dtype, spread=1.0)
    out = head_loss(hidden, weight, forward_kl, targets, chunk=8)
    out.loss.backward()
    loss_T, dhidden, dweight = oracle(hidden, weight, targets, forward_kl)
    assert out.loss_T.dtype == torch.float32
    np.testing.assert_allclose(out.loss_T.numpy(), loss_T, rtol=rtol, atol=rtol)
    for mine, theirs in ((hidden.grad, dhidden), (weight.grad, dweight)):
        assert mine.dtype == dtype
        error = np.linalg.norm(mine.double().numpy() - theirs) / np.linalg.norm(theirs)
        assert error < rtol


def test_kl_is_never_negative_and_a_shift_of_all_logits_changes_nothing():
    for seed in range(20):
        hidden, weight, targets = problem(T=16, D=4, V=50, K=8, seed=seed, dtype=torch.float32, spread=4.0)
        out = head_loss(hidden, weight, forward_kl, targets)
        assert out.loss_T.min() > -1e-6
        shifted = head_loss(hidden, weight, forward_kl, targets, bias_V=torch.full((50,), 7.0))
        torch.testing.assert_close(out.loss_T, shifted.loss_T, rtol=1e-4, atol=1e-5)


def test_support_and_tail_bound_the_full_divergence_from_below():
    hidden, weight, _ = problem(T=8, V=64)
    rng = np.random.default_rng(3)
    teacher = softmax(rng.normal(size=(8, 64)) * 2)
    logq = (hidden @ weight.T).log_softmax(1).detach().numpy()
    full = (teacher * (np.log(teacher) - logq)).sum(1)
    previous = np.zeros(8)
    for k in (1, 4, 16, 64):
        top = TopK.from_dense(np.tile(np.arange(64), (8, 1)), np.log(teacher)).truncate(top_k=k)
        ids, logp = top.dense()
        targets = Targets(
            torch.zeros(8, dtype=torch.long),
            torch.ones(8),
            torch.from_numpy(ids),
            torch.from_numpy(logp).double(),
            torch.from_numpy(top.tail_T).double(),
        )
        loss_T = head_loss(hidden, weight, forward_kl, targets).loss_T.numpy()
        assert (loss_T >= previous - 1e-6).all()
        assert (loss_T <= full + 1e-6).all()
        previous = loss_T
    np.testing.assert_allclose(previous, full, atol=1e-5)


def test_the_best_id_outside():
    for V, K in ((20, 5), (6, 6), (50, 1)):
        hidden, weight, targets = problem(T=9, V=V, K=K)
        out = head_loss(
            hidden, weight, forward_kl, targets, form=HeadForm(V, scale=0.5, softcap=3.0), chunk=4,
            measure=lambda s, t: {"agrees": s.best_outside_T < s.top_TK[:, 0]},
        )  # fmt: skip
        logq = (3 * torch.tanh((hidden @ weight.T) * 0.5 / 3)).log_softmax(1).detach()
        ids = targets.teacher_ids_TK
        outside = logq.scatter(1, ids, -torch.inf).amax(1)
        expected = outside < logq.gather(1, ids[:, :1])[:, 0]
        assert out.measures["agrees"].tolist() == expected.tolist()


def test_a_second_backward_gives_the_same_gradients_and_upstream_scales_them():
    hidden, weight, targets = problem()
    loss = head_loss(hidden, weight, forward_kl, targets, chunk=3).loss
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(3 * loss, (hidden, weight))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(3 * a, b, rtol=1e-12, atol=1e-14)


def test_without_gradients_the_loss_is_the_same_and_no_product_is_made(monkeypatch):
    hidden, weight, targets = problem()
    expected = head_loss(hidden, weight, forward_kl, targets).loss.item()
    monkeypatch.setattr(chunks, "_add_product", None)
    with torch.no_grad():
        out = head_loss(hidden, weight, forward_kl, targets, chunk=3)
    assert out.loss.item() == pytest.approx(expected, rel=1e-12)
    assert not out.loss.requires_grad


def test_qwens_padded_vocabulary():
    """151936 rows of weight, a tokenizer of 151665; another size of the same family pads to 152064."""
    vocab, ids = 151665, torch.tensor([[7, 151000, 3]])
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(152064, 4, generator=generator)
    hidden = torch.randn(2, 4, generator=generator)
    targets = Targets(
        torch.tensor([5, 151000]),
        torch.ones(2),
        ids.expand(2, 3),
        torch.tensor([[0.5, 0.2, 0.1]]).log().expand(2, 3),
        torch.full((2,), 0.2).log(),
    )
    seen = [
        head_loss(hidden, weight[:rows], forward_kl, targets, form=HeadForm(vocab)).loss_T
        for rows in (vocab, 151936, 152064)
    ]
    logq = (hidden.double() @ weight[:vocab].double().T).log_softmax(1)
    kept = (targets.teacher_logp_TK.exp() * (targets.teacher_logp_TK - logq[:, ids[0]])).sum(1)
    rest = logq.scatter(1, ids.expand(2, 3), -torch.inf).logsumexp(1)
    expected = kept + 0.2 * (np.log(0.2) - rest)
    for loss_T in seen:
        torch.testing.assert_close(loss_T.double(), expected, rtol=1e-5, atol=1e-5)


def test_chunks_are_equal_and_within_the_memory(monkeypatch):
    cpu = torch.device("cpu")
    assert chunks.chunk_rows(0, 100, cpu) == 1
    assert chunks.chunk_rows(10, 100, cpu) == 10
    monkeypatch.setitem(chunks.CHUNK_BYTES, "cpu", 1000)
    assert chunks.chunk_rows(25, 100, cpu) == 9  # three chunks of at most ten
    assert chunks.chunk_rows(25, 5000, cpu) == 1
    monkeypatch.setitem(chunks.CHUNK_BYTES, "cpu", 1 << 30)
    assert chunks.chunk_rows(4096, 100, cpu) == chunks.CPU_ROWS


def _shard_worker(rank: int, world: int, folder: str) -> None:
    import torch.distributed as dist
    from torch.distributed.tensor import Shard, distribute_tensor

    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", rank=rank, world_size=world, store=store)
    mesh = dist.device_mesh.init_device_mesh("cpu", (world,))
    hidden, weight, targets = problem(T=8, V=30, K=3)
    rows = slice(rank * 4, rank * 4 + 4)
    sharded = distribute_tensor(weight.detach(), mesh, [Shard(0)]).requires_grad_()
    mine = hidden.detach()[rows].clone().requires_grad_()
    out = head_loss(mine, sharded, forward_kl, targets[rows], chunk=3)
    (out.loss * world).backward()
    torch.save((mine.grad, sharded.grad.full_tensor()), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_a_sharded_weight_is_gathered_and_its_gradient_is_everybodys(tmp_path):
    """Two processes with half of the tokens and half of the rows each, as one process with all of them."""
    torch.multiprocessing.spawn(_shard_worker, (2, str(tmp_path)), nprocs=2)
    hidden, weight, targets = problem(T=8, V=30, K=3)
    head_loss(hidden, weight, forward_kl, targets).loss.backward()
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    torch.testing.assert_close(torch.cat([p[0] for p in parts]) / 2, hidden.grad)
    for _, dweight in parts:
        torch.testing.assert_close(dweight, weight.grad)
