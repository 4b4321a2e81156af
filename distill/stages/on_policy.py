"""on_policy: a student learns from a teacher's distribution on the student's own completions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from distill import engines, models
from distill.recipe import OnPolicyStage, TrainStage, teachers_of
from distill.records import Cost, Engine
from distill.reports.flops import ModelShape, forward_flops
from distill.stages.context import Context, Result, save_model
from distill.stages.costs import tally_cost, teachers_cost
from distill.stages.resolve import load_teachers, resolve_loss
from distill.stages.rollouts import Progress, Samples, first_and_last, open_sampler
from distill.stages.train import open_source
from distill.training import loop
from distill.training.on_policy import OnPolicy
from distill.training.packing import Example
from distill.training.sampler import Written

SHOWN = 3
WATCHED = ("loss", "kl_teacher", "correct", "length", "truncated", "entropy")


def run(config: OnPolicyStage, context: Context) -> Result:
    where = f"stages.{context.name}"
    objective = resolve_loss(config, where)
    folder, trust = context.model_dir(config.model), context.trusts(config.model)
    tokenizer = models.load_tokenizer(folder, trust_remote_code=trust)
    teachers = load_teachers(config, context, tokenizer) if config.scoring == "trainer" else []
    with (
        open_sampler(config, context, tokenizer) as (sampler, pool),
        _teacher_engine(config, context, tokenizer, sampler.engine.max_model_len) as engine,
    ):
        model = models.load(folder, dtype=config.dtype, trust_remote_code=trust)
        if config.lora is not None:
            model = models.add_lora(model, config.lora)
        samples = Samples(context, config)
        source = OnPolicy(
            sampler=sampler,
            config=config,
            teacher=engine,
            offline=_Offline(config, context, tokenizer) if config.data else None,
            watch=lambda step, groups: samples(step, lambda: _shown(groups)),
        )
        progress = Progress(context, config, ("loss", "kl_teacher", "correct", "length"))
        tally = loop.train(
            model,
            source.steps,
            objective,
            config,
            num_steps=config.steps,
            vocab_size=len(tokenizer),
            folder=context.folder,
            teachers=teachers,
            name=context.name,
            show=progress,
        )
        progress.close()
    if config.lora is not None:
        model = model.merge_and_unload()
    fingerprint = save_model(model, tokenizer, context.folder)
    shape = ModelShape.from_config(models.config_of(context.folder / "model"))
    metrics = {
        "steps": config.steps,
        "completions": tally.completions,
        "bad_steps": tally.bad_steps,
        "seconds_a_step": tally.seconds / config.steps,
        "prompts_too_long": pool.too_long,
        **first_and_last(context.folder, WATCHED),
    }
    teaching = teachers_cost(teachers, tally)
    if engine is not None:
        (name,) = teachers_of(config.teacher)
        taught = ModelShape.from_config(models.config_of(context.model_dir(name)))
        tokens, head = tally.taught_tokens, tally.taught_head_tokens
        mean = tokens / max(tally.completions, 1)
        flops = forward_flops(taught, tokens, (mean + 1) / 2, head)
        teaching = Cost(tokens_scored=tokens, flops=flops)
    return Result(tally_cost(config, shape, tally), metrics, fingerprint, teaching)


@contextmanager
def _teacher_engine(
    config: OnPolicyStage, context: Context, tokenizer: Any, max_model_len: int
) -> Iterator[Engine | None]:
    if config.scoring != "engine":
        yield None
        return
    (name,) = teachers_of(config.teacher)
    folder = context.model_dir(name)
    theirs = models.load_tokenizer(folder, trust_remote_code=context.trusts(name))
    where = f"stages.{context.name}.teacher"
    written_by = models.tokenizer_fingerprint(theirs)
    models.check_same_tokenizer(written_by, len(theirs), tokenizer, where)
    context.say(f"starting the {config.engine.fn} engine of the teacher")
    engine = engines.open_engine(
        config.engine, folder, max_model_len=max_model_len, max_top_k=config.top_k
    )
    try:
        yield engine
    finally:
        engine.close()


class _Offline:
    """Traces of `data` for each step, in their own order, epoch after epoch; the same for the same step."""

    def __init__(self, config: OnPolicyStage, context: Context, tokenizer: Any) -> None:
        beside = config.teacher if config.scoring == "trainer" else None
        stored = TrainStage(
            kind="train",
            model=config.model,
            data=str(config.data),
            task=config.task,
            loss=config.loss,
            teacher=beside,
            truncated="keep",
            steps=1,
        )
        self.source = open_source(stored, context, tokenizer)
        self.step = -1
        self.place = 0
        self.rows: Iterator[Example] = iter(())

    def __call__(self, step: int, num: int) -> list[Example]:
        if step != self.step + 1 or self.step < 0:
            self.place = step * num
            epoch, within = divmod(self.place, self.source.num_examples)
            self.rows = self.source.epoch(epoch, skip=within)
        self.step = step
        taken: list[Example] = []
        while len(taken) < num:
            example = next(self.rows, None)
            if example is None:
                self.rows = self.source.epoch(self.place // self.source.num_examples)
                continue
            taken.append(example)
            self.place += 1
        return taken


def _shown(groups: Sequence[Written]) -> list[Mapping[str, Any]]:
    return [
        {
            "problem_id": group.prompt.problem.problem_id,
            "question": group.prompt.problem.question,
            "completion": group.group.texts[0],
            "finished": group.group.finished[0],
            "correct": group.group.verdicts[0].correct,
        }
        for group in groups[:SHOWN]
    ]
