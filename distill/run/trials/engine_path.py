"""The trial of the whole path of a distribution: engine, shard, packed batch, output head.

A model's own completions are sampled and stored as a stage would, and read by the trainer with the same model. Then KL(model ||
model) must be 0 up to rounding, and every token's log-probability the same on both sides.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distill import engines, models
from distill.machine import Machine
from distill.progress import Screen
from distill.recipe import (
    CompareStage,
    EngineConfig,
    EvalStage,
    FilterStage,
    GenerateStage,
    GrpoStage,
    OnPolicyStage,
    Recipe,
    ScoreStage,
)
from distill.recipe.lineage import origin
from distill.records import Array
from distill.run.known_sizes import model_shape
from distill.run.trials.trial import Trial, TrialSetup

PROBLEMS, SAMPLES, NEW = 6, 4, 48
"""Problems, completions of each, and tokens of a completion at most."""
MICRO_TOKENS = 2048
"""Tokens of one forward pass in the trainer."""
NAME = "doctor"
MAX_MEAN = 0.05
"""Largest accepted mean difference of a token's log-probability between two computations of one model, nats. Engines differ by less
than 0.02 on average in bfloat16, other weights by tenths or whole nats."""
MAX_KL = 0.03
"""Largest accepted KL of a model to itself, nats a token."""
ENOUGH = 6
"""The least number of finished completions that say whether a model answers right at all."""
ROOM = 0.6
"""Share of the memory that the model may take in float32, once in the engine and once in the trainer."""


def engine_paths(setup: TrialSetup, machine: Machine, screen: Screen) -> Iterator[Trial]:
    """Try the path of every model of the recipe with every engine that runs it or a model made from it."""
    seen = set()
    for name, stage in setup.stages(GenerateStage, ScoreStage, EvalStage, CompareStage, GrpoStage, OnPolicyStage):
        for model in stage.reads("model"):
            source, task = origin(setup.recipe, model), next(iter(stage.reads("task")), None)
            key = (source, stage.engine.fn, stage.engine.dtype, stage.engine.tensor_parallel)
            if key in seen:
                continue
            seen.add(key)
            subject = f"stages.{name}: {source} with {stage.engine.fn}"
            why = _unfit(setup, source, stage.engine, task, machine)
            if why:
                yield Trial("engine and trainer", subject, "skip", why)
            else:
                yield from _path(setup, source, stage, str(task), subject, screen)


def _unfit(setup: TrialSetup, source: str, engine: EngineConfig, task: str | None, machine: Machine) -> str:
    """Return why a path is not tried; "" if it can be."""
    if engine.is_served:
        return "an endpoint is tried by the stage itself, with requests of one token"
    if not setup.has_weights(source):
        return f"the weights of {source} are not on this machine yet"
    if task is None:
        return "the stage has no task to take prompts from"
    size = 8.0 * model_shape(setup.recipe.models[source])[0].params_total
    if size > ROOM * machine.memory:
        return f"{source} takes {size / 1e9:.3g} GB in engine and trainer, too much for a trial"
    return ""


def _mini(setup: TrialSetup, source: str, stage: Any, task: str) -> Recipe:
    """Return a recipe of one generate stage, with the engine and what is captured as in `stage`."""
    split, problems = setup.some_problems(task, PROBLEMS)
    engine = stage.engine.model_copy(update={"batch_size": PROBLEMS * SAMPLES, "replicas": 1, "ray": None})
    generate = GenerateStage(
        kind="generate",
        model=source,
        task=task,
        split=split,
        problems=len(problems),
        samples=SAMPLES,
        sampling={
            "temperature": 1.0,
            "max_tokens": min(stage.sampling.max_tokens, NEW) if hasattr(stage, "sampling") else NEW,
        },
        top_logprobs=getattr(stage, "top_logprobs", 0) or 64,
        mass=getattr(stage, "mass", 0.98),
        exact=getattr(stage, "exact", False),
        engine=engine,
    )
    return Recipe(
        name=NAME,
        seed=setup.recipe.seed,
        models={source: setup.recipe.models[source]},
        tasks={task: setup.recipe.tasks[task]},
        stages={NAME: generate},
    )


def _path(setup: TrialSetup, source: str, stage: Any, task: str, subject: str, screen: Screen) -> Iterator[Trial]:
    from distill.stages.context import Context
    from distill.stages.trace_sampling import sample_traces

    recipe = _mini(setup, source, stage, task)
    generate: Any = recipe.stages[NAME]
    os.environ.update(engines.environment(generate.engine))
    with tempfile.TemporaryDirectory(prefix="distill-doctor-") as temporary:
        context = Context(recipe, Path(temporary), NAME, screen)
        folder = context.folder / "traces"
        try:
            sample_traces(generate, context, folder, generate.split)
        finally:
            context.engine.close()
        found = _measured(context, source, folder)
    yield from found.trials(subject, isinstance(stage, GrpoStage) and stage.model == source)
    if any(
        _keeps_correct(setup, one)
        for one, each in setup.stages(GenerateStage)
        if each.model == source and each.task == task
    ):
        yield from found.right_ones(subject)


def _keeps_correct(setup: TrialSetup, traces: str) -> bool:
    """Return whether a filter of the recipe keeps only the right ones of some traces."""
    filters = (stage for _, stage in setup.stages(FilterStage) if stage.data == traces)
    return any(keep.fn == "correct" for stage in filters for keep in stage.keep)


@dataclass(slots=True, eq=False)
class _Found:
    """What was measured on some traces of a model, read by the same model in the trainer.

    kl_T, gap_T, position_T: of every token: KL over kept entries and tail, difference of the token's log-probability, position in its
    completion. text: completions whose text is that of their ids, of all `traces`; again: those whose text gives the same ids.
    ended: completions that end in a token that stops generation, of those that ended by themselves. correct: [problems, samples].
    """

    kl_T: Array
    gap_T: Array
    position_T: Array
    traces: int
    text: int
    again: int
    stopped: int
    ended: int
    correct: dict[str, list[bool | None]]

    def trials(self, subject: str, learns: bool) -> Iterator[Trial]:
        kl = float(self.kl_T.mean())
        figure = f"KL(model || model) {kl:.2g} nats a token, of {len(self.kl_T)} tokens, from the engine through a shard to the loss"
        remedy = "What the student would learn is not what the teacher computes. Try another engine (engine: transformers) or dtype."
        failed = not np.isfinite(kl) or kl > MAX_KL
        yield Trial("distribution", subject, "fail" if failed else "pass", figure, remedy if failed else "")
        worst = int(np.nanargmax(self.gap_T)) if len(self.gap_T) else 0
        half = self.position_T >= np.median(self.position_T)
        figure = (
            f"a token's log-probability differs by {self.gap_T.mean():.2g} nats on average ({self.gap_T[~half].mean():.2g} in the first half "
            f"of a completion, {self.gap_T[half].mean():.2g} in the second), at most by {self.gap_T[worst]:.2g} (token {self.position_T[worst]})"
        )
        failed = not self.gap_T.mean() <= MAX_MEAN
        remedy = "Engine and trainer do not compute the same model. Set engine.dtype and the stages' dtype alike, or use engine: transformers."
        yield Trial("engine and trainer", subject, "fail" if failed else "pass", figure, remedy if failed else "")
        lost = self.text < self.traces or self.ended < self.stopped
        figure = (
            f"{self.text} of {self.traces} texts are those of their ids, {self.ended} of {self.stopped} that stopped end in a stop token; "
            f"{self.again} of {self.traces} texts would be tokenised to the ids that were sampled"
        )
        remedy = (
            "Ids and text of stored traces do not belong together; compare the engine's tokenizer with the model's."
        )
        yield Trial("sampled ids", subject, "fail" if lost else "pass", figure, remedy if lost else "")
        if learns:
            yield self._spread(subject)

    def right_ones(self, subject: str) -> Iterator[Trial]:
        """Count right completions among those that ended; none where too few did within the trial's length."""
        judged = [one for group in self.correct.values() for one in group if one is not None]
        right = sum(judged)
        if self.stopped < ENOUGH:
            return
        figure = f"{right} of {self.stopped} completions that came to an end are right"
        remedy = (
            "A filter keeps right ones only, and may keep none, where the run ends. Try a task template whose form the model knows (`distill "
            "ls templates`), easier questions or a better teacher; or remove {fn: correct} and learn all completions."
        )
        yield Trial("right answers", subject, "pass" if right else "warn", figure, "" if right else remedy)

    def _spread(self, subject: str) -> Trial:
        groups = [group for group in self.correct.values() if len(group) > 1]
        mixed = sum(len({*group}) > 1 for group in groups)
        figure = f"{mixed} of {len(groups)} groups of {SAMPLES} have right and wrong completions"
        if self.stopped < self.traces / 2:
            return Trial(
                "reward signal", subject, "skip", f"most completions go on beyond {NEW} tokens, where the trial ends"
            )
        if mixed:
            return Trial("reward signal", subject, "pass", figure)
        remedy = "Where all completions of a group are alike, its advantages are 0. Start from a better model, or take easier problems."
        return Trial("reward signal", subject, "warn", figure, remedy)


def _measured(context: Any, source: str, folder: Path) -> _Found:
    """Read the traces with the trainer's own forward pass and head."""
    from distill.stages.divergence import BLOCK_ROWS, measuring_module, token_measures
    from distill.traces.reader import open_traces

    reader = open_traces(folder)
    module = measuring_module(source, "float32", reader, context)
    model_dir = context.model_dir(source)
    tokenizer = models.load_tokenizer(model_dir, trust_remote_code=context.trusts(source))
    stops = {*models.stop_ids(model_dir, tokenizer, context.task(next(iter(context.recipe.tasks))).template)}
    kl, gap, position = [], [], []
    text = again = stopped = ended = 0
    correct: dict[str, list[bool | None]] = {}
    for block in reader.blocks(BLOCK_ROWS):
        for rows, each in token_measures(module, block, MICRO_TOKENS):
            stored = [block.logprob[n] for n in rows]
            kl.append(each["bound"])
            gap.append(np.abs(np.concatenate(stored) + each["label_nll"]))
            position += [np.arange(len(logprob)) for logprob in stored]
        for n in range(len(block)):
            ids = block.completion_ids[n]
            text += block.completion[n] == models.decode(tokenizer, ids)
            stop = block.finish_reason[n] == "stop"
            stopped, ended = stopped + stop, ended + (stop and int(ids[-1]) in stops)
            written = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            again += tokenizer(written, add_special_tokens=False)["input_ids"] == ids.tolist()
            correct.setdefault(block.problem_id[n], []).append(block.correct[n])
    return _Found(
        kl_T=np.concatenate(kl),
        gap_T=np.concatenate(gap),
        position_T=np.concatenate(position),
        traces=reader.num_rows,
        text=text,
        again=again,
        stopped=stopped,
        ended=ended,
        correct=correct,
    )
