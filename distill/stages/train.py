"""train: train a model on stored traces, or on a file of conversations."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distill import models, world
from distill.compute.flops import ModelShape
from distill.compute.training_cost import attention_share, teachers_cost, training_cost
from distill.recipe import TrainStage
from distill.records import draw_seed
from distill.stages.budget import budget_of
from distill.stages.context import Context, Result
from distill.stages.inputs.forward_proof import prove_forward
from distill.stages.inputs.matched_layers import hidden_match
from distill.stages.inputs.resolve import load_teachers, resolve_loss
from distill.stages.inputs.student import live_steps, load_student, save_student
from distill.stages.inputs.train_examples import open_source, reader_for
from distill.stages.snapshots import keep_snapshots
from distill.training import loop
from distill.training.loss.hidden_states import MatchedObjective
from distill.training.loss.objective import Objective
from distill.training.packing import Source, packed_steps, steps_per_epoch
from distill.training.policy import Policy
from distill.training.step import Length, Step, WorkCounts


def run(config: TrainStage, context: Context) -> Result:
    where = f"stages.{context.name}"
    objective: Objective = resolve_loss(config, where, draw_seed(context.seed, context.name, "draws"))
    folder, trust = context.model_dir(config.model), context.trusts(config.model)
    tokenizer = models.load_tokenizer(folder, trust_remote_code=trust)
    vocab_size = models.vocabulary_size(tokenizer, models.config_of(folder))
    positions = models.learned_positions(models.config_of(folder))
    if positions is not None and positions < config.max_tokens:
        context.say(f"max_tokens {positions}: the model has learned no more positions")
        config = config.model_copy(update={"max_tokens": positions})
    teachers = load_teachers(config, context, tokenizer, config.max_tokens)
    context.phase("reading the traces")
    source = open_source(config, context, tokenizer, reader_for(config, context, tokenizer))
    an_epoch = steps_per_epoch(source.num_examples, config.batch_traces)
    length = budget_of(config, context) or Length(config.steps or (config.epochs or 1) * an_epoch)

    model = load_student(config, context)
    plan = prove_forward(model, config.model, vocab_size, context, config.max_tokens)
    if teachers and (match := hidden_match(config, context, model, teachers[0].model)) is not None:
        objective = MatchedObjective(objective, match)

    attention = attention_share(ModelShape.from_config(models.config_of(folder)))

    def source_steps(start: int, _: Policy) -> Iterator[Step]:
        every = packed_steps(
            source,
            batch_traces=config.batch_traces,
            micro_tokens=config.micro_tokens,
            normalise=config.normalise,
            start=start,
            rank=world.rank(),
            world=world.size(),
            attention=attention,
        )
        for batches in every:
            yield Step(batches)

    live = live_steps(context, length)

    def show(step: int, num_steps: int, metrics: dict[str, float]) -> None:
        shown = {key: metrics[key] for key in ("loss", "tokens_per_second")}
        live.total = num_steps
        live.update(step, **shown)

    counts = loop.train(
        model,
        source_steps,
        objective,
        config,
        length=length,
        vocab_size=vocab_size,
        folder=context.folder,
        plan=plan,
        teachers=teachers,
        show=show,
        keep=keep_snapshots(config, context),
        say=context.say,
    )
    live.close()
    fingerprint, shape = save_student(model, tokenizer, config, context)
    return Result(
        training_cost(config, shape, counts),
        _metrics(context.folder, counts, source),
        fingerprint,
        teachers_cost(teachers, counts),
    )


def _metrics(folder: Path, counts: WorkCounts, source: Source) -> dict[str, Any]:
    if not world.is_main():
        return {}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {
        "steps": counts.steps,
        "examples": source.num_examples,
        "loss": lines[-1]["loss"],
        "label_nll": lines[-1]["label_nll"],
        "bad_steps": counts.bad_steps,
        "tokens_per_second": counts.tokens / counts.seconds if counts.seconds else 0.0,
    }
