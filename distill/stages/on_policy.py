"""on_policy: train a student on the teacher's distributions over the student's own completions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from distill import engines, models
from distill.compute.flops import ModelShape, forward_flops
from distill.compute.training_cost import attention_share, teachers_cost, training_cost
from distill.recipe import EngineConfig, OnPolicyStage, TrainStage, teachers_of
from distill.records import Cost, Engine, GradedGroup, draw_seed
from distill.stages import beside
from distill.stages.budget import budget_of
from distill.stages.context import Context, Result
from distill.stages.inputs.forward_proof import prove_forward
from distill.stages.inputs.own_traces import other_teacher
from distill.stages.inputs.resolve import load_teachers, resolve_loss, teacher_dir
from distill.stages.inputs.student import load_student, save_student
from distill.stages.inputs.tails import bucket_tail
from distill.stages.inputs.train_examples import open_source, reader_for
from distill.stages.policy_metrics import LOGGED_GROUPS, CompletionLog, PolicyProgress, policy_metrics
from distill.stages.policy_sampling import open_policy_sampler, read_prompts
from distill.stages.snapshots import keep_snapshots
from distill.stages.sync_proof import prove_sync
from distill.training import loop
from distill.training.loss.cross_tokenizer.alignment import Retokenizer
from distill.training.packing import Example
from distill.training.rl.teacher_rollout import TeacherRollouts
from distill.training.step import Length

MAX_PROMPT = 4096
"""Tokens of a prompt that a teacher is expected to read, where the recipe sets no max_model_len."""
WATCHED = ("loss", "kl_teacher", "correct", "length", "clipped_ratio", "entropy")


def run(config: OnPolicyStage, context: Context) -> Result:
    where = f"stages.{context.name}"
    objective = resolve_loss(config, where, draw_seed(context.seed, context.name, "draws"))
    folder, trust = context.model_dir(config.model), context.trusts(config.model)
    tokenizer = models.load_tokenizer(folder, trust_remote_code=trust)
    vocab_size = models.vocabulary_size(tokenizer, models.config_of(folder))
    longest = config.engine.max_model_len or config.sampling.max_tokens + MAX_PROMPT
    in_trainer = config.scoring == "trainer"
    teachers = load_teachers(config, context, tokenizer, longest) if in_trainer else []
    retokenizer = reader_for(config, context, tokenizer)
    read = pool, _, max_model_len = read_prompts(config, context, tokenizer)
    names = list(teachers_of(config.teacher))
    if warning := other_teacher(context.recipe, config.model, names):
        context.say(warning)
    settings, teacher_settings = beside.shared_engines(
        config,
        context,
        max_model_len,
        teachers=names if in_trainer else (),
        scoring=None if in_trainer else names[0],
    )
    model = beside.on_device(load_student(config, context), config)
    plan = prove_forward(model, config.model, vocab_size, context, max_model_len)
    with (
        open_policy_sampler(config, context, tokenizer, settings, read) as sampler,
        _teacher_engine(config, context, tokenizer, teacher_settings, max_model_len) as engine,
    ):
        prove_sync(sampler.engine, model, vocab_size, context, sleeps=config.engine.sleep)
        log = CompletionLog(context, config)
        rollouts = TeacherRollouts(
            sampler=sampler,
            config=config,
            teacher=engine,
            offline=OfflineExamples(config, context, tokenizer, retokenizer) if config.data else None,
            retokenizer=retokenizer,
            on_rollout=lambda step, groups: log(step, lambda: _logged(groups)),
            attention=attention_share(ModelShape.from_config(models.config_of(folder))),
            journal=sampler.journal,
        )
        length = budget_of(config, context) or Length(config.steps or 0)
        progress = PolicyProgress(context, length, ("loss", "kl_teacher", "correct", "length"))
        counts = loop.train(
            model,
            rollouts.steps,
            objective,
            config,
            length=length,
            vocab_size=vocab_size,
            folder=context.folder,
            plan=plan,
            teachers=teachers,
            show=progress,
            keep=keep_snapshots(config, context),
            carried=sampler.journal,
            say=context.say,
        )
        progress.close()
    fingerprint, shape = save_student(model, tokenizer, config, context)
    metrics = policy_metrics(context, counts, pool.too_long, WATCHED)
    teaching = teachers_cost(teachers, counts)
    if engine is not None:
        (name,) = teachers_of(config.teacher)
        taught = ModelShape.from_config(models.config_of(context.model_dir(name)))
        tokens, head = counts.teacher_tokens, counts.teacher_head_tokens
        mean = tokens / max(counts.completions, 1)
        flops = forward_flops(taught, tokens, (mean + 1) / 2, head)
        teaching = Cost(tokens_scored=tokens, flops=flops)
    return Result(training_cost(config, shape, counts), metrics, fingerprint, teaching)


@contextmanager
def _teacher_engine(
    config: OnPolicyStage, context: Context, tokenizer: Any, settings: EngineConfig, max_model_len: int
) -> Iterator[Engine | None]:
    """Start the teacher's engine. It never sleeps: its weights do not change, and vLLM lets one engine of a process sleep."""
    if config.scoring != "engine":
        yield None
        return
    (name,) = teachers_of(config.teacher)
    folder = teacher_dir(name, config, context, tokenizer)
    context.phase(f"starting the {settings.fn} engine of the teacher")
    engine = engines.open_engine(settings, folder, max_model_len=max_model_len, max_top_k=config.top_logprobs)
    with beside.opened(engine, settings, context):
        yield engine


class OfflineExamples:
    """Stored traces of `data`, epoch by epoch in the source's order; deterministic for a place in that order."""

    def __init__(self, config: OnPolicyStage, context: Context, tokenizer: Any, read: Retokenizer | None) -> None:
        teacher = config.teacher if config.scoring == "trainer" else None
        stored = TrainStage(
            kind="train",
            model=config.model,
            data=str(config.data),
            task=config.task,
            loss=bucket_tail(config.loss),
            teacher=teacher,
            keep_truncated=True,
            steps=1,
        )
        self.source = open_source(stored, context, tokenizer, read)
        self.place = -1
        self.rows: Iterator[Example] = iter(())

    def __call__(self, first: int, num: int) -> list[Example]:
        if first != self.place:
            self.place = first
            epoch, within = divmod(first, self.source.num_examples)
            self.rows = self.source.epoch(epoch, skip=within)
        taken: list[Example] = []
        while len(taken) < num:
            example = next(self.rows, None)
            if example is None:
                self.rows = self.source.epoch(self.place // self.source.num_examples)
                continue
            taken.append(example)
            self.place += 1
        return self.source.complete(taken)


def _logged(groups: Sequence[GradedGroup]) -> list[Mapping[str, Any]]:
    """Return the first completion of each of the first groups."""
    return [
        {
            "problem_id": group.prompt.problem.problem_id,
            "question": group.prompt.problem.question,
            "completion": group.group.texts[0],
            "finished": group.group.finished[0],
            "correct": group.group.verdicts[0].correct,
        }
        for group in groups[:LOGGED_GROUPS]
    ]
