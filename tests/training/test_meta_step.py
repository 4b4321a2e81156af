"""A training step on the meta device, which has no numbers: a tensor that stays on the CPU raises, and so does every hidden
wait for the device (`.item()`, `.cpu()`, the truth of a tensor)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.optim import AdamW

from distill import models
from distill.records import TopK
from distill.training.loss import divergences, sparse
from distill.training.loss.metrics import weighted_sums
from distill.training.loss.objective import DenseObjective, StoredObjective
from distill.training.optim import MasterAdamW
from distill.training.packing import Example, pack
from distill.training.policy import StudentModule, Teacher

META = torch.device("meta")


def example(n: int) -> Example:
    rng = np.random.default_rng(n)
    reply = rng.integers(3, 1000, 6).astype(np.int32)
    ids = np.stack([rng.choice(49152, 8, replace=False) for _ in reply])
    logp = np.log(rng.dirichlet(np.ones(8), len(reply)) * 0.95)
    prompt = np.append(np.arange(3, 23), n).astype(np.int32)  # the first twenty tokens are shared
    return Example(str(n), prompt, reply, TopK.from_dense(ids, logp))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["cross_entropy", "forward_kl", "teacher", "lora", "recomputed"])
def test_a_step_stays_on_the_device(tiny_dir, kind, dtype):
    from distill.recipe import LoraConfig

    def load():
        return models.load(tiny_dir, dtype=dtype).to(META)

    model, teachers = load(), ()
    objective = StoredObjective(sparse.cross_entropy if kind == "cross_entropy" else sparse.forward_kl)
    if kind == "teacher":
        objective, teachers = DenseObjective(divergences.reverse_kl), (Teacher(load().eval()),)
    if kind == "lora":
        model = models.add_lora(model, LoraConfig(rank=2)).to(META)
    if kind == "recomputed":
        model.gradient_checkpointing_enable()
    module = StudentModule(model.train(), objective, 49152, teachers)
    with pytest.MonkeyPatch.context() as patch:  # the fused one knows no meta tensors
        patch.setattr(torch.optim, "AdamW", lambda groups, fused, **options: AdamW(groups, foreach=True, **options))
        optimizer = MasterAdamW(module.named_parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    sums = {}
    for batch in pack([example(n) for n in range(6)], micro_tokens=64):
        assert batch.parent.max() >= 0
        rows = torch.from_numpy(batch.weight_T.nonzero()[0]).to(META)
        out = module(batch.to_torch(META), rows)
        out.loss.backward()
        optimizer.accumulate()
        sums |= weighted_sums(out.measures, out.weight_T)
    assert {tensor.device for tensor in (out.loss, *sums.values())} == {META}
    assert {master.grad.device for master in optimizer.masters} == {META}
    torch.nn.utils.clip_grad_norm_(optimizer.masters, 1.0)
    optimizer.step(1e-3)
    assert {tensor.device for tensor in optimizer.state().values() if tensor.ndim} == {META}


def test_a_hidden_wait_is_found(tiny_dir):
    """The check can fail: a loss that looks at a value raises."""
    model = models.load(tiny_dir, dtype="float32").to(META)
    (batch,) = pack([example(0)], micro_tokens=64)

    def looks(student, targets):
        return -student.label_T * float(student.label_T.sum())

    module = StudentModule(model, StoredObjective(looks), 49152)
    rows = torch.from_numpy(batch.weight_T.nonzero()[0]).to(META)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        module(batch.to_torch(META), rows)
