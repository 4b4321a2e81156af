"""Trains a few steps and prints the device of the optimizer's state; run by test_gpu_resume.py in processes of its own.

resumed_training.py MODEL FOLDER DTYPE STOP_AFTER
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

from distill import models
from distill.recipe import TrainStage
from distill.records import TopK
from distill.training import loop
from distill.training.loop import train
from distill.training.loss.objective import StoredObjective
from distill.training.loss.sparse import forward_kl
from distill.training.optim import MasterAdamW
from distill.training.packing import Example, pack
from distill.training.step import Length, Step


def example(n: int) -> Example:
    rng = np.random.default_rng(n)
    reply = rng.integers(3, 1000, 12).astype(np.int32)
    ids = np.stack([rng.choice(49152, 8, replace=False) for _ in reply])
    logp = np.log(rng.dirichlet(np.ones(8), len(reply)) * 0.95)
    return Example(str(n), rng.integers(3, 1000, 8).astype(np.int32), reply, TopK.from_dense(ids, logp))


def main(model_dir: str, folder: Path, dtype: str, stop_after: int) -> None:
    config = TrainStage(
        kind="train", model="m", data="./d", steps=8, batch_traces=6, lr=1e-2, checkpoint_every=4, dtype=dtype
    )
    model = models.load(Path(model_dir), dtype=dtype)
    optimizers = []

    class Watched(MasterAdamW):
        def loaded(self, names) -> None:
            super().loaded(names)
            if names:
                optimizers.append(self)

    loop.MasterAdamW = Watched

    def source(start, policy):
        for step in range(start, config.steps):
            if step == stop_after:
                raise KeyboardInterrupt
            if optimizers:
                states = [t for state in optimizers[0].adamw.state.values() for t in state.values()]
                print("resumed on", {t.device.type for t in (*optimizers[0].masters, *states)})
            yield Step(pack([example(6 * step + n) for n in range(6)], micro_tokens=80))

    folder.mkdir(exist_ok=True)
    try:
        train(model, source, StoredObjective(forward_kl), config, length=Length(8), vocab_size=49152, folder=folder)
    except KeyboardInterrupt:
        return
    assert next(model.parameters()).is_cuda == torch.cuda.is_available()
    torch.save({name: p.detach().cpu() for name, p in model.named_parameters()}, folder / "weights.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
