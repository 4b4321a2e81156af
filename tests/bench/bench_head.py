"""The head's loss and gradients on a CPU: time in matrix products, memory, ours against dense torch, TRL and Liger.

Each contestant runs in a process of its own, and in it every step is preceded by one product [N, H] x [H, V], the unit of time. Memory is
the peak of the resident set, above what was there before the first step and above the gradients themselves. KL steps of the stored kind
read k = 64 ids of a teacher that does not run; TRL's and Liger's have no such kind: their teacher runs beside, as in ours called
online. Liger's chunked losses are plain torch; they take part where liger-kernel is installed (pip install liger-kernel), uncompiled.
"Watched" is with the numbers that training logs at every step.

    python tests/bench/bench_head.py [--rounds 5] [--tokens 512] [--hidden 576] [--vocab 49152 151936]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import harness
import torch
from torch import Tensor

from distill.training.loss import divergences, metrics, sparse
from distill.training.loss.dense import Logits, dense_loss
from distill.training.loss.head import HeadForm, Targets, head_loss

K = 64
NAMES = {
    "ours, cross entropy": "stored",
    "ours, forward KL": "stored",
    "ours, forward KL, watched": "stored",
    "ours, jsd": "stored",
    "ours, forward KL, frozen head": "stored",
    "dense, cross entropy": "stored",
    "dense, forward KL": "stored",
    "ours online, forward KL": "live",
    "ours online, forward KL, watched": "live",
    "TRL chunked, forward KL": "live",
    "Liger chunked, forward KL": "live",
    "ours online, jsd": "live",
    "TRL chunked, jsd": "live",
    "Liger chunked, jsd": "live",
}
RATIOS = (
    ("ours, forward KL", "ours, cross entropy"),
    ("TRL chunked, forward KL", "ours online, forward KL"),
    ("Liger chunked, forward KL", "ours online, forward KL"),
    ("TRL chunked, jsd", "ours online, jsd"),
    ("Liger chunked, jsd", "ours online, jsd"),
)
"""Steps that are to be read against one another: time, in matrix products, and peak memory."""


def dense_kl(hidden: Tensor, weight: Tensor, targets: Targets) -> Tensor:
    """What one writes by hand: log-softmax over [N, V], the kept ids and one minus their sum."""
    logq = (hidden @ weight.T).log_softmax(1).gather(1, targets.teacher_ids_TK)
    tail = torch.log1p(-logq.exp().sum(1).clamp(max=1 - 1e-6))
    p, t = targets.teacher_logp_TK, targets.teacher_tail_T
    loss = (p.exp() * (p - logq)).sum(1) + t.exp() * (t - tail)
    return (loss * targets.weight_T).sum()


def contestant(name: str, tokens: int, size: int, vocab: int) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """The loss as a function of nothing, and the tensors that get gradients."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, size, generator=generator).requires_grad_()
    weight = (torch.randn(vocab, size, generator=generator) * 0.05).requires_grad_()
    ids = torch.randint(0, vocab, (tokens, K), generator=generator)
    logp = (torch.randn(tokens, K, generator=generator) * 2).log_softmax(1) + torch.log(torch.tensor(0.98))
    targets = Targets(
        ids[:, 0].clone(),
        torch.full((tokens,), 1 / tokens),
        ids,
        logp,
        torch.full((tokens,), 0.02).log(),
        place_T=torch.arange(tokens),
    )
    form = HeadForm(vocab)
    if NAMES[name] == "live":
        teacher_h = torch.randn(tokens, size, generator=generator)
        teacher_w = torch.randn(vocab, size, generator=generator) * 0.05
        beta = 0.5 if name.endswith("jsd") else 0.0
        divergence = divergences.jsd if name.endswith("jsd") else divergences.forward_kl
        measure = metrics.full_vocabulary_metrics if name.endswith("watched") else None
        if name.startswith("Liger"):
            from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDFunction

            def loss() -> Tensor:
                # No bias, no hard loss, all of the soft one, nothing ignored, temperature 1, not compiled.
                options = (None, None, 0.0, 1.0, beta, -100, 1.0, False)
                mean: Tensor = LigerFusedLinearJSDFunction.apply(
                    hidden, weight, teacher_h, teacher_w, targets.label_T, *options
                )
                return mean

        elif name.startswith("TRL"):
            from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

            def loss() -> Tensor:
                arguments = (hidden, weight, None, teacher_h, teacher_w, None, beta)
                loss_T, _ = ChunkedDivergenceFunction.apply(*arguments)
                return (loss_T * targets.weight_T).sum()

        else:
            teacher = Logits(teacher_h, teacher_w, form)

            def loss() -> Tensor:
                return dense_loss(Logits(hidden, weight, form), [teacher], divergence, targets, measure=measure).loss

        return loss, [hidden, weight]
    if name == "ours, forward KL, frozen head":
        frozen = weight.detach()
        return lambda: head_loss(hidden, frozen, sparse.forward_kl, targets).loss, [hidden]
    return {
        "ours, cross entropy": lambda: head_loss(hidden, weight, sparse.cross_entropy, targets).loss,
        "ours, forward KL": lambda: head_loss(hidden, weight, sparse.forward_kl, targets).loss,
        "ours, forward KL, watched": lambda: head_loss(hidden, weight, sparse.forward_kl, targets, measure=metrics.distribution_metrics).loss,
        "ours, jsd": lambda: head_loss(hidden, weight, sparse.jsd, targets).loss,
        "dense, cross entropy": lambda: torch.nn.functional.cross_entropy(hidden @ weight.T, targets.label_T),
        "dense, forward KL": lambda: dense_kl(hidden, weight, targets),
    }[name], [hidden, weight]  # fmt: skip


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def measure(name: str, rounds: int, tokens: int, size: int, vocab: int) -> dict[str, float]:
    contestant(name, 8, size, 1024)[0]().backward()  # what is loaded once is no part of a step's memory
    loss, leaves = contestant(name, tokens, size, vocab)
    left, right, out = (
        torch.randn(tokens, size),
        torch.randn(vocab, size),
        torch.empty(tokens, vocab),
    )
    products, steps = [], []
    out.zero_()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(rounds + 1):
        began = time.perf_counter()
        torch.mm(left, right.T, out=out)
        products.append(time.perf_counter() - began)
        for leaf in leaves:
            leaf.grad = None
        began = time.perf_counter()
        loss().backward()
        steps.append(time.perf_counter() - began)
    gradients = sum(leaf.numel() * leaf.element_size() for leaf in leaves)
    ratios = [step / product for step, product in zip(steps[1:], products[1:], strict=True)]
    return {
        "seconds": statistics.median(steps[1:]),
        "matmul_times": statistics.median(ratios),
        "matmul_times_least": min(steps[1:]) / min(products[1:]),
        "peak_mb": (resident("VmHWM") - before - gradients) / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--vocab", type=int, nargs="+", default=[49152, 151936])
    parser.add_argument("--one", choices=list(NAMES), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(measure(asked.one, asked.rounds, asked.tokens, asked.hidden, asked.vocab[0])))
        return
    rows = []
    for vocab in asked.vocab:
        for name in NAMES:
            if name.startswith("Liger") and importlib.util.find_spec("liger_kernel") is None:
                print(f"{name}: liger-kernel is not installed, left out", flush=True)
                continue
            sizes = {
                "rounds": asked.rounds,
                "tokens": asked.tokens,
                "hidden": asked.hidden,
                "vocab": vocab,
            }
            options = [f"--{key}={value}" for key, value in sizes.items()]
            command = [sys.executable, "-W", "ignore", __file__, f"--one={name}", *options]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            rows.append({"what": name, **sizes, **json.loads(done.stdout.splitlines()[-1])})
            print(rows[-1], flush=True)
    for vocab in asked.vocab:
        found = {row["what"]: row for row in rows if row["vocab"] == vocab}
        for one, other in RATIOS:
            if one in found and other in found:
                time_ratio, memory_ratio = (found[one][key] / found[other][key] for key in ("matmul_times", "peak_mb"))
                print(f"V={vocab}: {one} / {other}: {time_ratio:.2f} in time, {memory_ratio:.2f} in memory")
    chunk_mb = {v: min(asked.tokens, 512) * v * 4 / 1e6 for v in asked.vocab}
    print(f"one chunk of fp32 logits, MB at most: {chunk_mb}; torch threads: {torch.get_num_threads()}")
    harness.report("head", rows, Path(__file__).parent / "out")


if __name__ == "__main__":
    main()
