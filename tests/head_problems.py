"""Random heads with a teacher's top-k, for tests of the primitive and of the losses; and NumPy's view of them."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from distill.training.loss.head import Targets


def softmax(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def problem(T=7, D=5, V=31, K=4, seed=0, dtype=torch.float64, spread=2.0):
    """Random hidden states, head and a teacher's top-K with its tail (-inf where K = V)."""
    rng = np.random.default_rng(seed)
    hidden, weight = rng.normal(size=(T, D)), rng.normal(size=(V, D)) * spread / np.sqrt(D)
    teacher = softmax(rng.normal(size=(T, V)) * spread)
    ids = np.argsort(-teacher, axis=1)[:, :K]
    kept = np.take_along_axis(teacher, ids, 1)
    with np.errstate(divide="ignore"):
        tail = np.log(np.maximum(1 - kept.sum(1), 0)) if K < V else np.full(T, -np.inf)
    targets = Targets(
        label_T=torch.from_numpy(rng.integers(0, V, T)),
        weight_T=torch.from_numpy(rng.uniform(0.1, 1, T)).to(dtype),
        teacher_ids_TK=torch.from_numpy(ids),
        teacher_logp_TK=torch.from_numpy(np.log(kept)).to(dtype),
        teacher_tail_T=torch.from_numpy(tail).to(dtype),
    )
    return (
        torch.from_numpy(hidden).to(dtype).requires_grad_(),
        torch.from_numpy(weight).to(dtype).requires_grad_(),
        targets,
    )


def replace(targets: Targets, **changes) -> Targets:
    return dataclasses.replace(targets, **changes)


def as_taught_by(logits_TV: torch.Tensor, targets: Targets, K: int) -> Targets:
    """The same targets with the top-K and tail of these logits as the teacher."""
    logp_TV = logits_TV.detach().log_softmax(1)
    top = logp_TV.topk(K, dim=1)
    tail_T = logp_TV.scatter(1, top.indices, -torch.inf).logsumexp(1)
    return replace(targets, teacher_ids_TK=top.indices, teacher_logp_TK=top.values, teacher_tail_T=tail_T)
