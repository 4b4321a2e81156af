"""Checks of smoke_checks.py that compare numbers: kernels, attention, training steps."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from smoke_context import Context

from distill.records import TopK


def kernels(at: Context) -> str:
    """The head's loss and gradients by both kernels, against whole logits in float64."""
    from distill.training.loss import sparse
    from distill.training.loss.head import HeadForm, Student, Targets, head_loss
    from distill.training.loss.kernels import fused

    tokens, vocab, usable = 130, 49152 if at.gpu else 3000, fused.usable
    halves = [torch.bfloat16 if at.dtype == "bfloat16" else torch.float16] if at.gpu else []
    worst: dict[str, float] = {}
    for dtype in (*halves, torch.float32):
        torch.manual_seed(0)
        hidden = torch.randn(tokens, 64, device=at.device).to(dtype).requires_grad_()
        weight = (torch.randn(vocab, 64, device=at.device) * 0.4).to(dtype).requires_grad_()
        logits = (hidden.detach().double() @ weight.detach().double().t()).float() + torch.randn(tokens, vocab).to(
            hidden.device
        )
        top = logits.log_softmax(1).topk(32)
        tail = torch.log1p(-top.values.exp().sum(1))
        targets = Targets(top.indices[:, 0].clone(), torch.full_like(tail, 1 / tokens), top.indices, top.values, tail)
        for name in ("cross_entropy", "forward_kl", "reverse_kl"):
            loss = getattr(sparse, name)
            wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
            logq = (wide[0] @ wide[1].t()).log_softmax(1)
            outside = logq.scatter(1, top.indices, -torch.inf)
            student = Student(
                logq.gather(1, targets.label_T[:, None])[:, 0],
                logq.gather(1, top.indices),
                outside.logsumexp(1),
                outside.amax(1),
            )
            exact = torch.autograd.grad((loss(student, targets) / tokens).sum(), wide)
            for kernel in ("plain", "Triton"):
                if kernel == "Triton" and not usable(hidden, HeadForm(vocab)):
                    continue
                fused.usable = usable if kernel == "Triton" else lambda hidden, form: False
                mine = torch.autograd.grad(head_loss(hidden, weight, loss, targets, chunk=64).loss, [hidden, weight])
                off = max(_distance(a, b) for a, b in zip(mine, exact, strict=True))
                key = f"{kernel} {str(dtype).removeprefix('torch.')}"
                worst[key] = max(worst.get(key, 0.0), off)
                assert off < (1e-3 if dtype == torch.float32 else 2e-2), f"{key}, {name}: gradients differ by {off:.1e}"
    return "gradients off by " + ", ".join(f"{off:.0e} ({key})" for key, off in worst.items())


def attention(at: Context) -> str:
    """Each way of attention over packed docs with shared prefixes, against padded blocks in float64 on the CPU."""
    from distill.training import attention as ours

    offsets, parents = torch.tensor([0, 5, 45, 46, 196, 203, 267, 300]), torch.tensor([-1, 0, 0, -1, 3, 3, -1])
    used: list[str] = []
    for name in ("by_flash", "by_flex", "_by_blocks"):
        way = getattr(ours, name)
        setattr(ours, name, lambda *x, way=way, name=name: used.append(name.split("_")[-1]) or way(*x))
    cases = {
        "plain": (64, 64, {}), "window": (64, 64, {"sliding_window": 33}), "soft cap": (64, 64, {"softcap": 5.0}),
        "sinks": (64, 64, {"s_aux": True}), "size 100": (100, 100, {}), "sizes 192, 128": (192, 128, {}), "size 256": (256, 256, {}),
    }  # fmt: skip
    dtype, found, failed = getattr(torch, at.dtype), [], []
    for case, (size, value_size, options) in cases.items():
        torch.manual_seed(0)
        tensors = [torch.randn(1, n, 300, d) for n, d in ((6, size), (2, size), (2, value_size))]
        tensors += [torch.randn(6)] if "s_aux" in options else []
        grad, results = torch.randn(1, 300, 6, value_size), []
        for device, kind in ((at.device, dtype), (torch.device("cpu"), torch.float64)):
            leaves = [x.to(dtype).to(device, kind).detach().requires_grad_() for x in tensors]
            given = {**options, "s_aux": leaves[3]} if "s_aux" in options else options
            layout = ours.Layout.of(offsets, parents, device)
            try:
                out, _ = ours.packed_attention(torch.nn.Module(), *leaves[:3], None, layout=layout, **given)
                results.append([out, *torch.autograd.grad(out, leaves, grad.to(device, kind))])
            # The other cases are of use whatever this one raises.
            except Exception as error:
                failed.append(f"{case}: {type(error).__name__}: {error}"[:300])
                break
            if len(results) == 1:
                found.append(f"{case} by {used[-1]}")
        if len(results) == 2:
            off = max(_distance(a.cpu(), b) for a, b in zip(*results, strict=True))
            if not off < (2e-2 if dtype.itemsize < 4 else 1e-3):
                failed.append(f"{found[-1]} differs by {off:.1e}")
    at.facts["ways"] = found
    assert not failed, "; ".join(failed)
    return ", ".join(found)


def _distance(mine: torch.Tensor, exact: torch.Tensor) -> float:
    return float((mine.double() - exact.double()).norm() / exact.double().norm().clamp(min=1e-12))


# ------------------------------------------------------------------------------------------------------- training


def _batches() -> list[Any]:
    from distill.training.packing import Example, pack

    made, vocab = [], 49152
    for n in range(6):
        rng = np.random.default_rng(n)
        ids = np.stack([rng.choice(vocab, 8, replace=False) for _ in range(12)])
        top = TopK.from_dense(ids, np.log(rng.dirichlet(np.ones(8), 12) * 0.95))
        prompt = np.append(np.arange(100, 120), n).astype(np.int32)
        made.append(Example(str(n), prompt, rng.integers(100, 1000, 12).astype(np.int32), top))
    return pack(made, micro_tokens=80)


def _outputs(module: Any, at: Context) -> Any:
    for batch in _batches():
        rows = torch.from_numpy(batch.weight_T.nonzero()[0]).to(at.device)
        yield module(batch.to_torch(at.device), rows)


def kl_of_itself(at: Context) -> str:
    """KL(teacher, teacher) over the whole vocabulary is 0."""
    from distill.training.loss import divergences
    from distill.training.loss.objective import DenseObjective
    from distill.training.policy import StudentModule, Teacher

    model = at.model().eval()
    module = StudentModule(model, DenseObjective(divergences.forward_kl), 49152, [Teacher(copy.deepcopy(model))])
    with torch.no_grad():
        kl = sum(float(out.loss) for out in _outputs(module, at))
    assert abs(kl) < 1e-5, f"KL(teacher, teacher) = {kl:.1e}"
    return f"{kl:.0e} nats"


def train_step(at: Context) -> str:
    """Ten steps on the same batch: the loss falls, and updates too small for bfloat16 are kept in the masters."""
    from distill.training.loss.objective import StoredObjective
    from distill.training.loss.sparse import forward_kl
    from distill.training.optim import MasterAdamW
    from distill.training.policy import StudentModule

    model = at.model().train()
    module = StudentModule(model, StoredObjective(forward_kl), 49152)
    optimizer = MasterAdamW(model.named_parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    losses = []
    for _ in range(10):
        losses.append(0.0)
        for out in _outputs(module, at):
            out.loss.backward()
            optimizer.accumulate()
            losses[-1] += float(out.loss)
        assert np.isfinite(optimizer.clip(1.0))
        optimizer.step(1e-3)
    assert losses[-1] < 0.9 * losses[0], f"the loss does not fall: {losses}"
    before = [master.clone() for master in optimizer.masters]
    for out in _outputs(module, at):
        out.loss.backward()
        optimizer.accumulate()
    optimizer.step(1e-7)
    assert any(not torch.equal(a, b) for a, b in zip(before, optimizer.masters, strict=True)), "the masters do not move"
    for parameter, master in zip(optimizer.parameters, optimizer.masters, strict=True):
        assert torch.equal(parameter, master.to(parameter.dtype)), "a weight is not its rounded master"
    return f"{at.dtype}: loss {losses[0]:.2f} to {losses[-1]:.2f} in ten steps"


def resume(at: Context) -> str:
    """Training that goes on from a checkpoint gives the weights of training in one go, within a run's own noise."""
    import resumed_training

    def trained(folder: str, stop_after: int = -1) -> Any:
        resumed_training.main(str(at.tiny_dir()), at.folder / folder, at.dtype, stop_after)
        file = at.folder / folder / "weights.pt"
        return torch.load(file) if file.is_file() else None

    whole, again = trained("whole"), trained("again")
    assert trained("cut", stop_after=5) is None
    resumed = trained("cut")

    def farthest(other: Any) -> float:
        return max((whole[name].float() - other[name].float()).abs().max().item() for name in whole)

    noise, off = farthest(again), farthest(resumed)
    assert off <= 10 * noise, f"resumed weights are {off:.1e} away, two whole runs {noise:.1e}"
    return f"resumed weights are {off:.0e} away, two whole runs {noise:.0e}"
