"""The held-out KL of a student while it trains, against its steps and FLOPs: what `bench_token_weights` and `bench_hidden` share.

The capture of `bench_targets.py`: SmolLM2-135M-Instruct's answers to open-ended prompts, and a student without some of its
layers. An arm is a train stage of the product, run in this process; every few steps its KL is measured over the whole
vocabulary on traces of other prompts. The learning rate is constant after its warm-up, so that a point of the curve is what a
run of that length would have given.

Shapes: T positions, C of them in a chunk, D hidden size, V vocabulary, N held-out traces.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bench_targets as targets
import chat_traces
import numpy as np
import torch
from bench_targets import CHUNK, Sizes
from torch import Tensor

from distill import models, recipe
from distill.compute.flops import ModelShape
from distill.compute.training_cost import training_cost
from distill.progress import Screen
from distill.records import Array
from distill.reports.statistics import bca
from distill.stages import train as train_stage
from distill.stages.context import Context
from distill.training.batch import Batch
from distill.training.loss.objective import StoredObjective
from distill.training.loss.sparse import cross_entropy
from distill.training.packing import examples_of, pack
from distill.training.policy import StudentModule


@dataclass(slots=True)
class Curve:
    """An arm's run. At each measured point: steps done, FLOPs so far, KL of each held-out trace. seconds: of each step."""

    steps: list[int] = field(default_factory=list)
    flops: list[float] = field(default_factory=list)
    kl_N: list[Array] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def kl(self) -> Array:
        return np.array([each.mean() for each in self.kl_N])

    def reaches(self, kl: float, of: Sequence[float]) -> float:
        """`of` (steps or FLOPs) where the KL first is as low, by straight lines between the points; inf if it never is."""
        below = np.flatnonzero(self.kl <= kl)
        if not len(below):
            return float("inf")
        n = int(below[0])
        if n == 0:
            return float(of[0])
        high, low = np.log(self.kl[n - 1]), np.log(self.kl[n])
        return float(of[n - 1] + (of[n] - of[n - 1]) * (high - np.log(kl)) / (high - low))

    def reaches_each(self, other: Curve, share: float, of: str) -> tuple[float, float, float]:
        """Ratio of `of` between this curve and the other's end, to (1 + share) times its KL, with its 95% interval over traces.

        Traces are drawn with repetition, both curves on the same ones, 2000 times.
        """
        rng, found = np.random.default_rng(0), []
        num = len(other.kl_N[-1])
        for draw in [np.arange(num), *rng.integers(0, num, (2000, num))]:
            mine = Curve(self.steps, self.flops, [kl[draw] for kl in self.kl_N])
            wanted = (1 + share) * float(other.kl_N[-1][draw].mean())
            found.append(mine.reaches(wanted, getattr(mine, of)) / getattr(other, of)[-1])
        low, high = np.quantile(found[1:], [0.025, 0.975], method="nearest")
        return found[0], float(low), float(high)


@dataclass(frozen=True, slots=True, eq=False)
class HeldOut:
    """The held-out traces as packed batches, and the teacher's last hidden states and head there, fp32."""

    batches: Sequence[Batch]
    names: Sequence[str]
    teacher_TD: Sequence[Tensor]
    head_VD: Tensor

    @staticmethod
    def of(sizes: Sizes) -> HeldOut:
        traces = next(targets.captured(sizes, held_out=True).blocks(sizes.held_out))
        batches = [b.to_torch() for b in pack(list(examples_of(traces, with_top=False)), micro_tokens=1024)]
        folder = models.resolve(recipe.ModelConfig(source=chat_traces.SOURCE))
        model = models.load(folder, dtype="float32").eval()
        module = StudentModule(model, StoredObjective(cross_entropy), model.config.vocab_size)
        with torch.no_grad():
            hidden = [module.hidden(batch, rows_of(batch)) for batch in batches]
        return HeldOut(batches, traces.trace_id, hidden, model.get_output_embeddings().weight.detach())

    @torch.no_grad()
    def kl(self, module: StudentModule) -> Array:
        """[N] KL(teacher || student), nats a token: of each trace the sum over its tokens by the mean number of tokens."""
        head_VD, total, num = module.output_head()[0], dict.fromkeys(self.names, 0.0), 0
        for batch, teacher_TD in zip(self.batches, self.teacher_TD, strict=True):
            rows = rows_of(batch)
            student_TD = module.hidden(batch, rows)
            doc_T = torch.searchsorted(batch.doc_offsets, rows, right=True) - 1
            for part in torch.arange(len(rows)).split(CHUNK):
                logp_CV = (teacher_TD[part] @ self.head_VD.T).log_softmax(1)
                logq_CV = (student_TD[part] @ head_VD.T).log_softmax(1)
                kl_C = (logp_CV.exp() * (logp_CV - logq_CV)).sum(1).double()
                for doc, kl in zip(doc_T[part].tolist(), kl_C.tolist(), strict=True):
                    total[batch.trace_ids[doc]] += kl
            num += len(rows)
        return np.array([total[name] for name in self.names]) * len(self.names) / num


def rows_of(batch: Batch) -> Tensor:
    """The rows that predict a completion's tokens."""
    return batch.weight_T.nonzero()[:, 0]


def curve(name: str, stage: Mapping[str, Any], sizes: Sizes, seed: int, held_out: HeldOut, every: int) -> Curve:
    """Train one arm from the start and measure it after every `every` steps."""
    home = sizes.home / "capture"
    made = recipe.load(home.with_suffix(".yaml")).stages["start"].model_dump(exclude_none=True)
    tree = {
        "name": "curve",
        "seed": seed,
        "models": {"teacher": {"source": chat_traces.SOURCE}},
        "stages": {
            "start": made,
            name: {
                "kind": "train", "model": "start", "lr": sizes.lr, "min_lr_ratio": 1.0, "steps": sizes.steps,
                "batch_traces": sizes.batch, "keep_truncated": True, "dtype": "float32", "checkpoint_every": 10_000, **stage,
            },
        },
    }  # fmt: skip
    context = Context(recipe=recipe.validate(tree), run=home, name=name, screen=Screen(io.StringIO()))
    shutil.rmtree(context.folder, ignore_errors=True)
    context.folder.mkdir()
    found, shape = Curve(), ModelShape.from_config(models.config_of(targets.start(sizes)))

    def keep_snapshots(config: Any, context: Context) -> Any:
        def keep(step: int, counts: Any, policy: Any) -> None:
            if step % every == 0 or step == sizes.steps:
                module = policy._module
                found.steps.append(step)
                found.flops.append(training_cost(config, shape, counts).flops)
                found.kl_N.append(held_out.kl(module.eval()))
                module.train()
                print(f"{name} seed {seed} step {step}: KL {found.kl_N[-1].mean():.4f}", flush=True)

        return keep

    before, train_stage.keep_snapshots = train_stage.keep_snapshots, keep_snapshots
    try:
        train_stage.run(context.recipe.stages[name], context)
    finally:
        train_stage.keep_snapshots = before
    lines = (context.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found.seconds = [json.loads(line)["seconds"] for line in lines]
    shutil.rmtree(context.folder)
    return found


def beside(found: Curve, base: Curve) -> dict[str, float]:
    """KL at the end, and how far above the base's, in percent, paired by trace."""
    return {**targets.kl_columns(found.kl_N[-1]), **_above(found.kl_N[-1], base.kl_N[-1])}


def _above(kl_N: Array, base_N: Array) -> dict[str, float]:
    interval = bca(100 * (kl_N - base_N) / base_N.mean())
    return {"above all %": interval.value, "% from": interval.low, "% to": interval.high}


def bytes_a_position(folder: Path) -> float:
    """Bytes of the columns that hold the distribution, by the positions of the completions."""
    from distill.traces.reader import open_traces

    positions = int(open_traces(folder).lengths().completion.sum())
    return sum(chat_traces.column_bytes(file.read_bytes()) for file in folder.glob("*.parquet")) / positions
