"""The training loop, the same for every algorithm: batches and a loss come in, optimiser steps are made.

In: a model, a source of steps, a loss. Out: the trained weights (in place), one line of metrics a step,
checkpoints that resume bitwise, and counts of the work done. The loss is a sum over tokens divided once by
the step's denominator, so results do not depend on how a step is split into micro-batches.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from torch import Tensor

from distill.recipe import OptimStage
from distill.records import UserError
from distill.training import checkpoint, malloc
from distill.training.batch import Batch
from distill.training.forward import ForwardPlan
from distill.training.loss.metrics import weighted_sums
from distill.training.loss.objective import Objective
from distill.training.optim import MasterAdamW, learning_rate
from distill.training.policy import Policy, StudentModule, Teacher

ASSUMED_STEPS = 50
"""The number of steps assumed for a FLOP budget until the first step shows the cost of one."""


@dataclass(slots=True)
class WorkCounts:
    """Counts of a stage's work, from which its FLOPs follow.

    tokens through the body and head_tokens through the head, forward and backward, with the sum over traces of
    length squared; scored_*: the same, forward only; teacher_*: through a teacher's engine or a teacher with another
    tokenizer; prompt_tokens and generated_tokens of completions sampled.
    """

    tokens: int = 0
    head_tokens: int = 0
    squared_lengths: int = 0
    scored_tokens: int = 0
    scored_head_tokens: int = 0
    scored_squared_lengths: int = 0
    teacher_tokens: int = 0
    teacher_head_tokens: int = 0
    teacher_squared_lengths: int = 0
    completions: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    samples_failed: int = 0
    judge_seconds: float = 0.0
    steps: int = 0
    bad_steps: int = 0
    seconds: float = 0.0

    def add(self, other: WorkCounts) -> None:
        for f in fields(WorkCounts):
            setattr(self, f.name, getattr(self, f.name) + getattr(other, f.name))


@dataclass(frozen=True, slots=True)
class Step:
    """One optimiser step's work.

    batches: micro-batches, numpy; without any, the step's gradient is zero. metrics: logged beside the loss. counts: the
    work of making the step. resumable: whether training can resume after this step.
    """

    batches: list[Batch]
    metrics: Mapping[str, float] = field(default_factory=dict)
    counts: WorkCounts = field(default_factory=WorkCounts)
    resumable: bool = True


Source = Callable[[int, Policy], Iterator[Step]]
"""(first step, the model in training) -> the steps from there on; a lazy iterator: each step sees the updated weights."""


@dataclass(frozen=True, slots=True)
class Length:
    """Train for a number of optimiser steps."""

    num_steps: int

    def steps(self, counts: WorkCounts) -> int:
        """Return the number of steps."""
        return self.num_steps

    def reached(self, counts: WorkCounts) -> bool:
        return counts.steps >= self.num_steps


@dataclass(frozen=True, slots=True)
class Budget:
    """Train until a number of FLOPs is spent, as `count` computes them; the step nearest to it is the last."""

    flops: float
    count: Callable[[WorkCounts], float]

    def steps(self, counts: WorkCounts) -> int:
        """Estimate the total number of steps from the work done so far."""
        if not counts.steps:
            return ASSUMED_STEPS
        return max(counts.steps, round(self.flops / self.count(counts) * counts.steps))

    def reached(self, counts: WorkCounts) -> bool:
        if not counts.steps:
            return False
        spent = self.count(counts)
        return spent + spent / counts.steps / 2 >= self.flops


def train(
    model: Any,
    source: Source,
    objective: Objective,
    config: OptimStage,
    *,
    length: Length | Budget,
    vocab_size: int,
    folder: Path,
    teachers: Sequence[Teacher] = (),
    plan: ForwardPlan | None = None,
    name: str = "train",
    show: Callable[[int, int, dict[str, float]], None] | None = None,
    keep: Callable[[int, WorkCounts, Policy], None] | None = None,
) -> WorkCounts:
    """Train in place to the end of `length`, from the newest checkpoint in `folder` if there is one.

    plan: how the model is computed; None = as a Llama-like model. Metrics go to folder/metrics.jsonl, checkpoints to
    folder/checkpoints. show(step, expected number of steps, metrics) and keep(step, counts, policy), which may save a
    snapshot, are called after every step. Raises UserError after config.max_bad_steps consecutive steps whose loss or
    gradient is not finite.
    """
    accelerator = _accelerator(config, folder, name)
    if accelerator.device.type == "cpu":
        malloc.keep_freed()
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    model.train()
    for teacher in teachers:
        teacher.model.eval().requires_grad_(False).to(accelerator.device)
    student_module = accelerator.prepare_model(
        StudentModule(model, objective, vocab_size, teachers, plan).to(accelerator.device)
    )
    policy = Policy(model, student_module, accelerator.device, objective, vocab_size)
    optimizer = MasterAdamW(
        model.named_parameters(), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay
    )
    counts, start = _resume(folder, optimizer, policy)
    drop_lines_after(folder / "metrics.jsonl", start)
    bad_in_a_row, due = 0, False
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as lines:
        began = time.perf_counter()
        steps = iter(()) if length.reached(counts) else source(start, policy)
        for done, step in enumerate(steps, start + 1):
            num_steps = length.steps(counts)
            counts.add(step.counts)
            progress = min(1.0, (done - 1) / max(num_steps - 1, 1))
            batches = [replace(batch, progress=progress) for batch in step.batches]
            metrics = _accumulate(accelerator, student_module, optimizer, batches, counts)
            norm = float(optimizer.clip(config.max_grad_norm))
            lr = learning_rate(
                done - 1,
                lr=config.lr,
                num_steps=num_steps,
                warmup_ratio=config.warmup_ratio,
                min_lr_ratio=config.min_lr_ratio,
            )
            if math.isfinite(norm) and math.isfinite(metrics["loss"]):
                optimizer.step(lr)
                bad_in_a_row = 0
            else:
                optimizer.zero_grad()
                bad_in_a_row += 1
                counts.bad_steps += 1
                _dump_bad_step(folder, done, step.batches, bad_in_a_row, config.max_bad_steps)
            seconds, began = time.perf_counter() - began, time.perf_counter()
            counts.seconds += seconds
            tokens = sum(len(batch.ids_T) for batch in step.batches)
            metrics |= {
                "grad_norm": norm,
                "lr": lr,
                "tokens": tokens,
                "seconds": seconds,
                "tokens_per_second": tokens * accelerator.num_processes / seconds,
                **step.metrics,
            }
            counts.steps = done
            last = step.resumable and length.reached(counts)
            if accelerator.is_main_process and (done % config.log_every == 0 or last):
                lines.write(json.dumps({"step": done, **metrics}) + "\n")
                lines.flush()
                accelerator.log(metrics, step=done)
            if accelerator.is_main_process and show is not None:
                show(done, num_steps, metrics)
            due = due or done % config.checkpoint_every == 0 or last
            if accelerator.is_main_process and due and step.resumable:
                tensors = {**optimizer.state(), **policy.state()}
                checkpoint.save(
                    folder / "checkpoints",
                    done,
                    tensors,
                    asdict(counts),
                    # Once the model is saved, only the last checkpoint is of use: to continue training.
                    keep=1 if last else config.keep_checkpoints,
                )
                due = False
            if accelerator.is_main_process and keep is not None:
                keep(done, counts, policy)
            if last:
                break
    for tracker in accelerator.trackers:
        tracker.finish()
    return counts


def _accelerator(config: OptimStage, folder: Path, name: str) -> Accelerator:
    """Return an accelerator with the configured trackers running; a tracker that is not installed is an error."""
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
    """Return a config as a flat mapping of plain values, which is all that trackers take."""
    return {k: v if isinstance(v, str | float | int | bool) else json.dumps(v) for k, v in config.items()}


def _accumulate(
    accelerator: Accelerator,
    student_module: Any,
    optimizer: MasterAdamW,
    micro_batches: list[Batch],
    counts: WorkCounts,
) -> dict[str, float]:
    """Accumulate the gradients of one step's micro-batches; return its loss and mean metrics over all processes."""
    loss = torch.zeros((), device=accelerator.device)
    sums: dict[str, Tensor] = {}
    for batch in micro_batches:
        rows = torch.from_numpy(batch.weight_T.nonzero()[0])
        counts.tokens += len(batch.ids_T)
        counts.head_tokens += len(rows)
        counts.squared_lengths += batch.squared_lengths
        if batch.cross_tokenizer is not None:
            counts.teacher_tokens += len(batch.cross_tokenizer.batch.ids_T)
            counts.teacher_head_tokens += len(batch.cross_tokenizer.rows)
            counts.teacher_squared_lengths += batch.cross_tokenizer.batch.squared_lengths
        out = student_module(batch.to_torch(accelerator.device), rows.to(accelerator.device))
        # Data parallelism averages gradients over processes; the denominator already counts all of them.
        accelerator.backward(out.loss * accelerator.num_processes)
        optimizer.accumulate()
        loss += out.loss.detach().float()
        for key, sum_2 in weighted_sums(out.measures, out.weight_T).items():
            sums[key] = sums.get(key, 0.0) + sum_2
    if not micro_batches:
        optimizer.set_zero_gradient()
    totals = accelerator.reduce(torch.cat([loss[None], *sums.values()]), reduction="sum")
    loss_sum, *rest = totals.tolist()
    pairs = zip(sums, rest[::2], rest[1::2], strict=True)
    return {"loss": loss_sum, **{key: total / weight for key, total, weight in pairs if weight}}


def _resume(folder: Path, optimizer: MasterAdamW, policy: Policy) -> tuple[WorkCounts, int]:
    found = checkpoint.newest(folder / "checkpoints")
    if found is None:
        return WorkCounts(), 0
    tensors, progress = checkpoint.load(found)
    optimizer.load(tensors)
    policy.load(tensors)
    start = int(progress.pop("step"))
    return WorkCounts(**{**progress, "steps": start}), start


def drop_lines_after(path: Path, step: int) -> None:
    """Remove the lines of steps that will be repeated, and a line cut short by a kill."""
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


def _dump_bad_step(folder: Path, step: int, micro_batches: list[Batch], in_a_row: int, limit: int) -> None:
    with (folder / "bad_steps.jsonl").open("a", encoding="utf-8") as file:
        ids = [trace_id for batch in micro_batches for trace_id in batch.trace_ids]
        file.write(json.dumps({"step": step, "trace_ids": ids}) + "\n")
    if in_a_row >= limit:
        raise UserError(
            f"training stopped: {in_a_row} steps in a row had a loss or gradient that is not finite. Lower lr, or look "
            f"at the traces named in {folder / 'bad_steps.jsonl'}. Running again continues from the last checkpoint."
        )
