"""A training step on a GPU in bfloat16, on random models of real shapes: cross entropy, forward KL, and a bare loop.

One packed micro-batch a step, AdamW every step. The bare loop is that of bench_train.py: transformers' SDPA attention kept
inside each trace by position ids, whole logits, torch's cross entropy, AdamW on bf16 parameters. MFU: FLOPs of the tokens
computed (6 a parameter of the body, 6 a parameter of the head at tokens with a loss, 12 a token pair attended to, causal)
over the time and PEAK. Needs a GPU.

    python tests/bench/gpu_train.py [--rounds 8] [--shape smollm2-135m] [--tokens 16384] [--no-bare]
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from distill.records import TopK
from distill.training.batch import Batch
from distill.training.loss.objective import StoredObjective
from distill.training.loss.sparse import cross_entropy, forward_kl
from distill.training.optim import MasterAdamW
from distill.training.packing import Example, pack
from distill.training.policy import StudentModule

K = 64
PEAK = 989e12
"""bf16 FLOP/s of an H100 SXM without sparsity, by its data sheet."""

SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3,
    },
    "1.5b": {
        "vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
        "num_attention_heads": 12, "num_key_value_heads": 2,
    },
}  # fmt: skip


def examples(vocab: int, tokens: int, prompt: int = 128, replies: tuple[int, int] = (128, 640)) -> list[Example]:
    """Traces that fill one micro-batch, with a teacher's top 64; no two prompts alike."""
    rng = np.random.default_rng(0)
    made: list[Example] = []
    total = 0
    while total < tokens:
        reply = min(int(rng.integers(*replies)), max(tokens - total - prompt, 2))
        total += prompt + reply
        ids = np.sort(rng.integers(0, vocab // K, (reply, K)) + np.arange(K) * (vocab // K), axis=1)
        logits = rng.normal(size=(reply, K)) * 3
        logp = logits - np.log(np.exp(logits).sum(1, keepdims=True)) - 0.02
        words, answer = (rng.integers(10, vocab, size).astype(np.int32) for size in (prompt, reply))
        made.append(Example(str(len(made)), words, answer, TopK.from_dense(ids, logp)))
    return made


def model(shape: str, attention: str) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[shape], tie_word_embeddings=True, max_position_embeddings=4096)
    config._attn_implementation = attention
    with torch.device("cuda"):
        return LlamaForCausalLM(config).to(torch.bfloat16).train()


class Ours:
    def __init__(self, shape: str, loss: Any) -> None:
        made = model(shape, "sdpa")
        self.student_module = StudentModule(made, StoredObjective(loss), made.config.vocab_size).train()
        self.optimizer = MasterAdamW(made.named_parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.0)

    def step(self, batch: Batch) -> float:
        rows = torch.from_numpy(batch.weight_T.nonzero()[0])
        loss = self.student_module(batch.to_torch("cuda"), rows.cuda()).loss
        loss.backward()
        self.optimizer.accumulate()
        norm = float(self.optimizer.clip(1.0))
        self.optimizer.step(1e-5)
        return norm


class Bare:
    def __init__(self, shape: str) -> None:
        self.model = model(shape, "sdpa")
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)

    def step(self, batch: Batch) -> float:
        moved = batch.to_torch("cuda")
        logits = self.model(input_ids=moved.ids_T[None], position_ids=moved.position_T[None], use_cache=False).logits[0]
        labels = torch.where(moved.weight_T > 0, moved.label_T, -100)
        loss = torch.nn.functional.cross_entropy(logits.float(), labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


def flops(shape: str, batch: Batch) -> float:
    """Of a step, forward and backward."""
    s = SHAPES[shape]
    size = s["hidden_size"] // s["num_attention_heads"]
    D, heads, groups = s["hidden_size"], s["num_attention_heads"], s["num_key_value_heads"]
    layer = D * size * (2 * heads + 2 * groups) + 3 * D * s["intermediate_size"]
    pairs = batch.squared_lengths / 2
    body = 6.0 * layer * len(batch.ids_T) + 12.0 * heads * size * pairs
    return s["num_hidden_layers"] * body + 6.0 * D * s["vocab_size"] * int((batch.weight_T > 0).sum())


def measure(shape: str, tokens: int, rounds: int, *, bare: bool) -> list[dict[str, Any]]:
    vocab = SHAPES[shape]["vocab_size"]
    made = examples(vocab, tokens)
    (batch,) = pack(made, micro_tokens=2 * tokens)
    makers: dict[str, Any] = {
        "bare loop": lambda: Bare(shape),
        "ours, cross entropy": lambda: Ours(shape, cross_entropy),
        "ours, forward KL": lambda: Ours(shape, forward_kl),
    }
    rows = []
    for name, make in makers.items():
        if name == "bare loop" and not bare:
            continue
        one, times = make(), []
        torch.cuda.reset_peak_memory_stats()
        try:
            for _ in range(rounds + 2):
                torch.cuda.synchronize()
                began = time.perf_counter()
                one.step(batch)
                torch.cuda.synchronize()
                times.append(time.perf_counter() - began)
        except torch.cuda.OutOfMemoryError:
            print(f"{shape}, {name}: does not fit", flush=True)
            continue
        finally:
            del one
            gc.collect()
            torch.cuda.empty_cache()
        seconds = statistics.median(times[2:])
        rows.append(
            {
                "shape": shape, "what": name, "tokens": len(batch.ids_T), "ms": seconds * 1e3,
                "tokens_per_second": len(batch.ids_T) / seconds, "mfu": flops(shape, batch) / seconds / PEAK,
                "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
            }
        )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--shape", choices=list(SHAPES), action="append")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--no-bare", action="store_true")
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a GPU")
    rows = []
    for shape in asked.shape or SHAPES:
        rows += measure(shape, asked.tokens, asked.rounds, bare=not asked.no_bare)
    print(torch.cuda.get_device_name())
    harness.report("gpu_train", rows, Path(__file__).parent / "out")


if __name__ == "__main__":
    main()
