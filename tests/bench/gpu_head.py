"""The head on a GPU at bf16: ours in Triton and in plain torch, against Liger, cut cross entropy and TRL where installed.

Time by CUDA events, median; memory is the peak allocated during a step above what stood before, less the gradients (ours: d weight fp32
while it is added up and bf16 when handed over, d hidden bf16). Also each time over that of one product. Needs a GPU.

    python tests/bench/gpu_head.py [--tokens 8192] [--hidden 4096] [--vocab 128256] [--rounds 10]
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import harness
import torch
from torch import Tensor

from distill.training.loss import divergences, sparse
from distill.training.loss.dense import Logits, dense_loss
from distill.training.loss.head import HeadForm, Targets, head_loss
from distill.training.loss.kernels import fused

K = 64
USABLE = fused.usable


NEEDS = {
    "one product": "torch",
    "ours, forward KL": "torch",
    "ours, cross entropy": "torch",
    "ours without Triton, forward KL": "torch",
    "ours, forward KL, frozen head": "torch",
    "ours online, forward KL": "torch",
    "ours online, jsd": "torch",
    "TRL chunked, forward KL": "trl",
    "TRL chunked, jsd": "trl",
    "Liger fused, jsd": "liger_kernel",
    "Liger fused, cross entropy": "liger_kernel",
    "cut cross entropy": "cut_cross_entropy",
}


def contestant(name: str, tokens: int, size: int, vocab: int) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """The loss as a function of nothing, and the tensors that get gradients."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        made = torch.randn(*shape, generator=generator, device="cuda", dtype=torch.bfloat16)
        return made * scale

    hidden, weight = (
        normal(tokens, size).requires_grad_(),
        normal(vocab, size, scale=0.02).requires_grad_(),
    )
    ids = torch.randint(0, vocab, (tokens, K), generator=generator, device="cuda")
    logp = (normal(tokens, K).float() * 2).log_softmax(1) - 0.02
    share = torch.full((tokens,), 1 / tokens, device="cuda")
    targets = Targets(ids[:, 0].clone(), share, ids, logp, torch.full_like(share, 0.0198).log())
    form = HeadForm(vocab)
    fused.usable = (lambda hidden, form: False) if "without Triton" in name else USABLE
    if name == "one product":
        out = torch.empty(tokens, vocab, dtype=torch.bfloat16, device="cuda")
        with torch.no_grad():
            return lambda: torch.mm(hidden.detach(), weight.detach().T, out=out), []
    if "frozen" in name:
        frozen = weight.detach()
        return lambda: head_loss(hidden, frozen, sparse.forward_kl, targets, form=form).loss, [hidden]
    if name.startswith("ours") and "online" not in name:
        loss = sparse.cross_entropy if "cross" in name else sparse.forward_kl
        return lambda: head_loss(hidden, weight, loss, targets, form=form).loss, [hidden, weight]
    if "cross" in name:
        if name.startswith("Liger"):
            from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

            criterion = LigerFusedLinearCrossEntropyLoss()
            return lambda: criterion(weight, hidden, targets.label_T), [hidden, weight]
        from cut_cross_entropy import linear_cross_entropy

        return lambda: linear_cross_entropy(hidden, weight, targets.label_T), [hidden, weight]
    teacher_h, teacher_w = normal(tokens, size), normal(vocab, size, scale=0.02)
    beta = 0.5 if name.endswith("jsd") else 0.0
    if name.startswith("Liger"):
        from liger_kernel.transformers import LigerFusedLinearJSD

        jsd = LigerFusedLinearJSD(jsd_beta=beta)
        return lambda: jsd(hidden, weight, teacher_h, teacher_w, targets.label_T), [hidden, weight]
    if name.startswith("TRL"):
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

        arguments = (hidden, weight, None, teacher_h, teacher_w, None, beta)
        return lambda: ChunkedDivergenceFunction.apply(*arguments)[0].mean(), [hidden, weight]
    divergence = divergences.jsd if beta else divergences.forward_kl
    student, teacher = Logits(hidden, weight, form), Logits(teacher_h, teacher_w, form)
    return lambda: dense_loss(student, [teacher], divergence, targets).loss, [hidden, weight]


def measure(name: str, rounds: int, tokens: int, size: int, vocab: int) -> dict[str, float]:
    loss, leaves = contestant(name, tokens, size, vocab)
    times, peak = [], 0
    for _ in range(rounds + 2):
        for leaf in leaves:
            leaf.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        made = loss()
        if leaves:
            made.backward()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
        peak = torch.cuda.max_memory_allocated() - before
    gradients = sum(leaf.numel() * leaf.element_size() for leaf in leaves)
    ours = name.startswith("ours") and len(leaves) == 2
    wide = leaves[1].numel() * 4 if ours else 0
    return {
        "ms": statistics.median(times[2:]),
        "ms_least": min(times[2:]),
        "gb_beyond_gradients": (peak - gradients) / 1e9,
        "gb_beyond_gradients_and_fp32_dw": (peak - gradients - wide) / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=128256)
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a GPU")
    rows, product = [], 1.0
    for name, package in NEEDS.items():
        if importlib.util.find_spec(package) is None:
            print(f"{name}: {package} is not installed")
            continue
        try:
            found = measure(name, asked.rounds, asked.tokens, asked.hidden, asked.vocab)
        except Exception as error:  # a peer's, of whatever kind: the others go on
            print(f"{name}: failed: {error}")
            continue
        finally:
            gc.collect()
            torch.cuda.empty_cache()
        product = found["ms"] if name == "one product" else product
        rows.append({"what": name, **found, "products": found["ms"] / product})
    print(f"{torch.cuda.get_device_name()}: {asked.tokens} tokens, hidden {asked.hidden}, vocabulary {asked.vocab}")
    harness.report("gpu_head", rows, Path(__file__).parent / "out")


if __name__ == "__main__":
    main()
