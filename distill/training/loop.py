"""The training loop, the same for every algorithm: batches and a loss come in, optimiser steps are made.

In: a model, a source of steps, a loss. Out: the trained weights (in place), one line of metrics a step,
checkpoints that resume bitwise, and counts of the work done. The loss is a sum over tokens divided once by
the step's denominator, so results do not depend on how a step is split into micro-batches or over processes.

With several processes (`world`) each computes its own micro-batches of a step. Once a step the gradients are summed
(`parallel`), and the processes exchange their sums of the loss, metrics and counts, so all take the same decisions.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill import interrupt, world
from distill.recipe import OptimStage
from distill.records import UserError
from distill.training import checkpoint, malloc, parallel
from distill.training.best_checkpoint import BestCheckpoint
from distill.training.forward import ForwardPlan
from distill.training.loss.metrics import weighted_sums
from distill.training.loss.objective import Objective
from distill.training.optim import MasterAdamW, learning_rate
from distill.training.policy import Policy, StudentModule, Teacher
from distill.training.rl.ahead import Carried
from distill.training.step import Budget, Length, Source, Step, WorkCounts
from distill.training.tracking import Trackers


@dataclass(slots=True)
class StepSums:
    """What one process adds to a step's loss, metrics (sum and weight by name) and counts.

    tokens: computed. stop: whether this process was asked to stop. old: whether a checkpoint is due by the clock.
    written: whether an asynchronous checkpoint has been written. trace_ids: of the step.
    """

    loss: float = 0.0
    metrics: dict[str, tuple[float, float]] = field(default_factory=dict)
    counts: WorkCounts = field(default_factory=WorkCounts)
    tokens: int = 0
    stop: bool = False
    old: bool = False
    written: bool = True
    trace_ids: tuple[str, ...] = ()

    @staticmethod
    def total(parts: Sequence[StepSums]) -> StepSums:
        """Add up all processes; the main one's clock counts."""
        whole = StepSums(old=parts[0].old)
        for part in parts:
            whole.loss += part.loss
            whole.counts.add(part.counts)
            whole.tokens += part.tokens
            whole.stop = whole.stop or part.stop
            whole.written = whole.written and part.written
            whole.trace_ids += part.trace_ids
            for name, (value, weight) in part.metrics.items():
                before = whole.metrics.get(name, (0.0, 0.0))
                whole.metrics[name] = before[0] + value, before[1] + weight
        return whole


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
    show: Callable[[int, int, dict[str, float]], None] | None = None,
    keep: Callable[[int, WorkCounts, Policy], None] | None = None,
    carried: Carried | None = None,
    say: Callable[[str], None] = print,
) -> WorkCounts:
    """Train in place to the end of `length`, from the newest whole checkpoint in `folder` when there is one.

    plan: how the model is computed; None = as a Llama-like model. Metrics go to folder/metrics.jsonl, checkpoints to
    folder/checkpoints. show(step, expected number of steps, metrics), on the main process, and keep, on all, are called
    after every step. carried: what checkpoints hold of the source. Raises UserError after config.max_bad_steps consecutive steps whose loss or gradient is not finite,
    and Interrupted after a SIGTERM, once the step is done and a checkpoint written.
    """
    device = world.device()
    if device.type == "cpu":
        malloc.keep_freed()
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    model.train()
    dtype = next(model.parameters()).dtype
    module = StudentModule(model, objective, vocab_size, teachers, plan)
    reference = Policy.reference_of(module)
    for teacher in module.teachers:
        parallel.shard(teacher, teacher.model, config.parallel, device, next(teacher.model.parameters()).dtype)
    if reference is not None:
        parallel.shard(reference, reference.model, config.parallel, device, dtype)
    parallel.shard(module, model, config.parallel, device, dtype)
    optimizer = MasterAdamW(
        model.named_parameters(), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay
    )
    policy = Policy(module, reference, device)
    with Trackers(config, folder) as trackers, interrupt.noted() as asked_to_stop:
        loop = _Loop(
            config, length, folder, device, module, optimizer, policy, trackers, asked_to_stop, show, keep, carried, say
        )
        loop.resume()
        try:
            loop.run(source)
        except BaseException:
            if loop.pending is not None:
                loop.pending.abandon()
            raise
    return loop.counts


@dataclass(slots=True)
class _Loop:
    config: OptimStage
    length: Length | Budget
    folder: Path
    device: torch.device
    module: Any
    optimizer: MasterAdamW
    policy: Policy
    trackers: Trackers
    asked_to_stop: Callable[[], bool]
    show: Callable[[int, int, dict[str, float]], None] | None
    keep: Callable[[int, WorkCounts, Policy], None] | None
    carried: Carried | None
    say: Callable[[str], None]
    counts: WorkCounts = field(default_factory=WorkCounts)
    best: BestCheckpoint = field(default_factory=BestCheckpoint)
    bad_in_a_row: int = 0
    schedule_from: int = 0
    due: bool = False
    stopping: bool = False
    saved_at: float = field(default_factory=time.monotonic)
    pending: checkpoint.Pending | None = None

    # ------------------------------------------------------------------------------------------- start and end

    def resume(self) -> None:
        """Continue from the newest whole checkpoint, and drop the log lines of steps that will be repeated."""
        self.best = BestCheckpoint.of(self.config)
        tensors = {**self.optimizer.state(create=True), **self.policy.state(every=True)}
        facts = checkpoint.resume(self.folder / "checkpoints", tensors, self.say)
        self.optimizer.loaded(facts["tensors"] if facts else [])
        if facts is not None:
            self.policy.loaded(facts["tensors"])
            self.counts = WorkCounts(**facts["counts"])
            self.best.load(facts.get("best"))
            self.bad_in_a_row = facts.get("bad_in_a_row", 0)
            self.schedule_from = facts.get("schedule_from", 0)
            if facts.get("ended") and not self.length.reached(self.counts):
                self._begin_schedule()
            if self.carried is not None:
                self.carried.restore(facts["carried"])
        if world.is_main():
            drop_lines_after(self.folder / "metrics.jsonl", self.counts.steps)
        world.wait()

    def _begin_schedule(self) -> None:
        """Give the steps that were added to a finished stage a learning-rate schedule of their own."""
        self.schedule_from = self.counts.steps
        more = self.length.steps(self.counts) - self.schedule_from
        self.say(
            f"training had ended at step {self.schedule_from}; the {more} steps that were added get a learning-rate schedule of their own, "
            "with its warm-up. This is not the longer run: for that one, do the stage again with --redo"
        )

    def run(self, source: Source) -> None:
        """Make all steps from the current one to the end."""
        if not self.length.reached(self.counts):
            with self._log() as lines:
                began = time.perf_counter()
                for step in source(self.counts.steps, self.policy):
                    last = self._step(step, began, lines)
                    began = time.perf_counter()
                    if self.stopping and step.resumable:
                        self._finish_checkpoint()
                        raise interrupt.Interrupted(interrupt.TERMINATE)
                    if last:
                        break
        self._finish_checkpoint()
        if self.bad_in_a_row > 1:
            raise UserError(
                f"training ended with {self.bad_in_a_row} steps in a row whose loss or gradient is not finite, so the weights are of no "
                "use. Lower lr or raise warmup_ratio, and begin the stage again with --redo."
            )
        if self.config.load_best_model_at_end and self.best.step not in (None, self.counts.steps):
            self.say(f"the model of step {self.best.step} is saved: the best {self.config.metric_for_best_model}")
            path = self.folder / "checkpoints" / f"step-{self.best.step:08d}"
            self.optimizer.loaded(checkpoint.read(path, self.optimizer.state(create=True)))

    def _log(self) -> Any:
        """Open metrics.jsonl on the main process, and nothing on the others."""
        path = self.folder / "metrics.jsonl" if world.is_main() else Path("/dev/null")
        return path.open("a", encoding="utf-8")

    # ------------------------------------------------------------------------------------------------- a step

    def _step(self, step: Step, began: float, lines: Any) -> bool:
        """Make one optimiser step; log it, and write a checkpoint if one is due. Return whether it was the last."""
        config, done = self.config, self.counts.steps + 1
        num_steps = self.length.steps(self.counts)
        progress = min(1.0, (done - 1) / max(num_steps - 1, 1))
        sums = self._accumulate([replace(batch, progress=progress) for batch in step.batches])
        parallel.sum_gradients(self.module, self.optimizer)
        sums.counts.add(step.counts)
        sums.stop, sums.old = self.asked_to_stop(), self._old()
        sums.written = self.pending is None or self.pending.ready()
        whole = StepSums.total(world.gather(sums))
        self.counts.add(whole.counts)
        norm = self.optimizer.clip(config.max_grad_norm)
        lr = learning_rate(
            done - 1 - self.schedule_from,
            lr=config.lr,
            num_steps=num_steps - self.schedule_from,
            warmup_ratio=config.warmup_ratio,
            min_lr_ratio=config.min_lr_ratio,
        )
        self._update(norm, whole, lr, done)
        seconds = time.perf_counter() - began
        self.counts.seconds += seconds
        metrics: dict[str, float] = {
            "loss": whole.loss,
            **{name: value / weight for name, (value, weight) in whole.metrics.items() if weight},
            "grad_norm": norm,
            "lr": lr,
            "tokens": whole.tokens,
            "seconds": seconds,
            "tokens_per_second": whole.tokens / seconds,
            **step.metrics,
        }
        self.counts.steps = done
        last = step.resumable and self.length.reached(self.counts)
        if world.is_main():
            if done % config.log_every == 0 or last:
                lines.write(json.dumps({"step": done, **metrics}) + "\n")
                lines.flush()
                self.trackers.log(metrics, done)
            if self.show is not None:
                self.show(done, num_steps, metrics)
        self.best.add(metrics)
        if self.pending is not None and whole.written:
            self._finish_checkpoint()
        self.stopping = self.stopping or whole.stop
        self.due = self.due or done % config.checkpoint_every == 0 or whole.old or last or self.stopping
        if self.due and step.resumable:
            self._save(done, last)
        if self.keep is not None:
            self.keep(done, self.counts, self.policy)
        return last

    def _update(self, norm: float, whole: StepSums, lr: float, done: int) -> None:
        """Update the weights, unless the loss or the gradient is not finite. Raises UserError after too many such steps."""
        if math.isfinite(norm) and math.isfinite(whole.loss):
            self.optimizer.step(lr)
            self.bad_in_a_row = 0
            return
        self.optimizer.zero_grad()
        self.bad_in_a_row += 1
        self.counts.bad_steps += 1
        path = self.folder / "bad_steps.jsonl"
        if world.is_main():
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": done, "trace_ids": whole.trace_ids}) + "\n")
        if self.bad_in_a_row >= self.config.max_bad_steps:
            raise UserError(
                f"training stopped: {self.bad_in_a_row} steps in a row had a loss or gradient that is not finite. Lower lr, "
                f"or look at the traces named in {path}. Running again continues from the last checkpoint."
            )

    def _accumulate(self, micro_batches: list[Any]) -> StepSums:
        """Accumulate the gradients of this process's micro-batches of a step; return what it adds to the step's sums."""
        loss = torch.zeros((), device=self.device)
        sums: dict[str, Tensor] = {}
        report = StepSums(trace_ids=tuple(t for batch in micro_batches for t in batch.trace_ids))
        factor = parallel.loss_factor(self.module)
        for number, batch in enumerate(micro_batches, 1):
            self._check_ids(batch)
            rows = torch.from_numpy(batch.weight_T.nonzero()[0])
            report.tokens += len(batch.ids_T) if len(rows) else 0
            parallel.before_backward(self.module, last=number == len(micro_batches))
            out = self.module(batch.to_torch(self.device), rows.to(self.device))
            report.counts.add_batch(batch, len(rows), None if out.chosen is None else len(out.chosen))
            (out.loss * factor if factor > 1 else out.loss).backward()
            self.optimizer.accumulate()
            loss += out.loss.detach().float()
            for name, sum_2 in weighted_sums(out.measures, out.weight_T).items():
                sums[name] = sums.get(name, 0.0) + sum_2
        if not micro_batches:
            self.optimizer.set_zero_gradient()
        report.loss, *values = torch.cat([loss[None], *sums.values()]).tolist()
        report.metrics = dict(zip(sums, zip(values[::2], values[1::2], strict=True), strict=True))
        return report

    def _check_ids(self, batch: Any) -> None:
        """Raise UserError for a token that the model has no embedding for."""
        largest, size = int(batch.ids_T.max()), self.module.vocab_size
        if largest >= size:
            raise UserError(
                f"a trace among {', '.join(batch.trace_ids[:5])} has the token id {largest}, and the model knows {size} tokens: call "
                "model.resize_token_embeddings and save the model, or leave such traces out."
            )

    # -------------------------------------------------------------------------------------------- checkpoints

    def _old(self) -> bool:
        minutes = self.config.checkpoint_minutes
        return minutes is not None and time.monotonic() - self.saved_at >= 60 * minutes

    def _save(self, done: int, last: bool) -> None:
        """Write a checkpoint, or begin to write one in a thread."""
        self._finish_checkpoint()
        wish = self.config.async_checkpoints
        facts = {
            "counts": asdict(self.counts),
            "best": self.best.decide(done),
            "bad_in_a_row": self.bad_in_a_row,
            "schedule_from": self.schedule_from,
            "ended": last,
        }
        self.pending = checkpoint.save(
            self.folder / "checkpoints",
            done,
            {**self.optimizer.state(), **self.policy.state()},
            facts,
            # Once the model is saved, only the last checkpoint is of use: to continue training.
            keep=1 if last else max(1, self.config.keep_checkpoints),
            asynchronous=self.device.type == "cuda" if wish is None else wish,
            carried=None if self.carried is None else self.carried.held(),
        )
        if self.pending.written is None:
            self._finish_checkpoint()
        self.saved_at, self.due = time.monotonic(), False

    def _finish_checkpoint(self) -> None:
        if self.pending is not None:
            pending, self.pending = self.pending, None
            pending.finish()


def drop_lines_after(path: Path, step: int) -> None:
    """Remove the lines of steps that will be repeated, and lines that are damaged or were cut short by a kill."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, TypeError, KeyError, RecursionError):
            continue
    path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
