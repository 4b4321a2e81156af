"""The loop: takes optimiser steps' worth of batches and a loss, and knows no algorithm.

In: a model, an iterator of micro-batches a step, a loss. Out: the trained weights (in place), one line of
metrics a step, checkpoints that resume bitwise, and a tally of what was computed. The loss is a sum over tokens
divided once by the step's denominator, so micro-batching and the number of processes change nothing.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from torch import Tensor, nn

from distill.head import HeadForm, HeadOutput, LossFn, Targets, head_loss
from distill.recipe import TrainStage
from distill.records import Batch, UserError
from distill.training import checkpoint
from distill.training.attention import PACKED, Layout
from distill.training.optim import MasterAdamW, learning_rate


@dataclass(slots=True)
class Tally:
    """What training computed: tokens through the body and through the head, and sum over traces of length squared."""

    tokens: int = 0
    head_tokens: int = 0
    squared_lengths: int = 0
    bad_steps: int = 0
    seconds: float = 0.0


class Trainee(nn.Module):
    """A causal language model with the loss on its head, as one module that accelerate can wrap."""

    def __init__(self, model: Any, loss_fn: LossFn, vocab_size: int) -> None:
        super().__init__()
        self.model = model
        self.loss_fn = loss_fn
        self.form = HeadForm.of(model.config, vocab_size)
        (
            model.get_base_model() if hasattr(model, "get_base_model") else model
        ).set_attn_implementation(PACKED)

    def forward(self, batch: Batch, rows: Tensor) -> HeadOutput:
        """rows: indices of the tokens that have a weight; only they reach the head."""
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        hidden_TD = base.get_decoder()(
            input_ids=batch.ids_T[None],
            position_ids=batch.position_T[None],
            use_cache=False,
            layout=Layout.of(batch.doc_offsets),
        ).last_hidden_state[0]
        head = base.get_output_embeddings()
        return head_loss(
            hidden_TD.index_select(0, rows),
            head.weight,
            self.loss_fn,
            Targets.of(batch, rows),
            form=self.form,
            bias_V=getattr(head, "bias", None),
        )


def train(
    model: Any,
    batches: Callable[[int], Iterator[list[Batch]]],
    loss_fn: LossFn,
    config: TrainStage,
    *,
    num_steps: int,
    vocab_size: int,
    folder: Path,
    name: str = "train",
    show: Callable[[int, dict[str, float]], None] | None = None,
) -> Tally:
    """Train in place for num_steps optimiser steps, from the newest checkpoint in `folder` when there is one.

    batches(start) yields each step's micro-batches (numpy) from step `start` on. Metrics go to
    folder/metrics.jsonl, checkpoints to folder/checkpoints. Raises UserError after config.max_bad_steps steps in a
    row whose loss or gradient is not finite.
    """
    accelerator = _accelerator(config, folder, name)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    model.train()
    trainee = accelerator.prepare_model(Trainee(model, loss_fn, vocab_size).to(accelerator.device))
    optimizer = MasterAdamW(
        model.named_parameters(), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay
    )
    tally, start = _resume(folder, optimizer)
    _drop_lines_after(folder / "metrics.jsonl", start)
    bad_in_a_row = 0
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as lines:
        for step, micro_batches in enumerate(batches(start), start):
            began = time.perf_counter()
            loss, label_nll = _accumulate(accelerator, trainee, optimizer, micro_batches, tally)
            norm = float(optimizer.clip(config.clip_norm))
            lr = learning_rate(
                step,
                lr=config.lr,
                num_steps=num_steps,
                warmup_ratio=config.warmup_ratio,
                min_lr_ratio=config.min_lr_ratio,
            )
            if math.isfinite(norm) and math.isfinite(loss):
                optimizer.step(lr)
                bad_in_a_row = 0
            else:
                optimizer.zero_grad()
                bad_in_a_row += 1
                tally.bad_steps += 1
                _dump_bad_step(folder, step, micro_batches, bad_in_a_row, config.max_bad_steps)
            tally.seconds += time.perf_counter() - began
            tokens = sum(len(batch.ids_T) for batch in micro_batches)
            metrics = {
                "loss": loss,
                "label_nll": label_nll,
                "grad_norm": norm,
                "lr": lr,
                "tokens": tokens,
                "tokens_per_second": tokens
                * accelerator.num_processes
                / (time.perf_counter() - began),
            }
            done = step + 1
            if accelerator.is_main_process and (done % config.log_every == 0 or done == num_steps):
                lines.write(json.dumps({"step": done, **metrics}) + "\n")
                lines.flush()
                accelerator.log(metrics, step=done)
                if show is not None:
                    show(done, metrics)
            if accelerator.is_main_process and (
                done % config.checkpoint_every == 0 or done == num_steps
            ):
                checkpoint.save(
                    folder / "checkpoints",
                    done,
                    optimizer.state(),
                    asdict(tally),
                    keep=config.keep_checkpoints,
                )
    accelerator.end_training()
    return tally


def _accelerator(config: TrainStage, folder: Path, name: str) -> Accelerator:
    """With the trackers asked for running; one that is not installed is an error, not a silence."""
    installed = {str(tracker) for tracker in get_available_trackers()}
    if missing := [tracker for tracker in config.trackers if tracker not in installed]:
        raise UserError(
            f"trackers: {', '.join(missing)} cannot be used here: unknown, or its package is not installed."
        )
    accelerator = Accelerator(log_with=list(config.trackers) or None, project_dir=str(folder))
    if config.trackers:
        accelerator.init_trackers(name, config=_flat(config.model_dump(exclude={"trackers"})))
    return accelerator


def _flat(config: dict[str, Any]) -> dict[str, str | float | int | bool]:
    """Trackers take plain values only."""
    return {
        k: v if isinstance(v, str | float | int | bool) else json.dumps(v)
        for k, v in config.items()
    }


def _accumulate(
    accelerator: Accelerator,
    trainee: nn.Module,
    optimizer: MasterAdamW,
    micro_batches: list[Batch],
    tally: Tally,
) -> tuple[float, float]:
    """Gradients of one step's micro-batches; returns the step's loss and mean -log q(label), over all processes."""
    totals = torch.zeros(2, device=accelerator.device)
    for batch in micro_batches:
        rows = torch.from_numpy(batch.weight_T.nonzero()[0]).to(accelerator.device)
        lengths = batch.doc_offsets[1:] - batch.doc_offsets[:-1]
        tally.tokens += len(batch.ids_T)
        tally.head_tokens += len(rows)
        tally.squared_lengths += int((lengths**2).sum())
        moved = batch.to_torch(accelerator.device)
        out = trainee(moved, rows)
        # Data parallelism averages gradients over processes; the denominator is already everybody's.
        accelerator.backward(out.loss * accelerator.num_processes)
        optimizer.accumulate()
        weight_T = moved.weight_T[rows] / batch.denominator
        totals += torch.stack(
            [out.loss.detach().float(), -(out.label_logp_T * weight_T).sum().float()]
        )
    loss, label_nll = accelerator.reduce(totals, reduction="sum").tolist()
    return loss, label_nll


def _resume(folder: Path, optimizer: MasterAdamW) -> tuple[Tally, int]:
    found = checkpoint.newest(folder / "checkpoints")
    if found is None:
        return Tally(), 0
    tensors, progress = checkpoint.load(found)
    optimizer.load(tensors)
    start = int(progress.pop("step"))
    return Tally(**progress), start


def _drop_lines_after(path: Path, step: int) -> None:
    """Forget metrics of steps that will be done again, and a line cut short by a kill."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (json.JSONDecodeError, KeyError):
            break
    path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


def _dump_bad_step(
    folder: Path, step: int, micro_batches: list[Batch], in_a_row: int, limit: int
) -> None:
    with (folder / "bad_steps.jsonl").open("a", encoding="utf-8") as file:
        ids = [trace_id for batch in micro_batches for trace_id in batch.trace_ids]
        file.write(json.dumps({"step": step, "trace_ids": ids}) + "\n")
    if in_a_row >= limit:
        raise UserError(
            f"training stopped: {in_a_row} steps in a row had a loss or gradient that is not finite. Lower lr, or look "
            f"at the traces named in {folder / 'bad_steps.jsonl'}. Running again continues from the last checkpoint."
        )
