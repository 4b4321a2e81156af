"""Trials of the numbers in a recipe: as many problems as the data has, and as many entries as the vocabulary."""

from __future__ import annotations

from collections.abc import Iterator

from distill import models
from distill.errors import MachineError
from distill.recipe import CompareStage, EvalStage, GenerateStage, GrpoStage, OnPolicyStage, ScoreStage, StageConfig
from distill.records import Split, UserError
from distill.run.trials.trial import Trial, TrialSetup
from distill.tasks.splits import HELD_OUT_EVERY

MOST_DRAWN = 1000
"""Problems that are drawn from an endless task: a generator with fewer different ones is found by them."""
SPLIT_WORDS: dict[Split, str] = {"train": "training", "held_out": "held-out"}


def problems(setup: TrialSetup) -> Iterator[Trial]:
    """Every due stage finds as many problems as it asks for."""
    counts: dict[tuple[str, Split, int | None], int | UserError] = {}
    for name, stage in setup.stages(GenerateStage, EvalStage, CompareStage, GrpoStage, OnPolicyStage):
        split, wanted = _wanted(stage)
        endless = setup.task(stage.task).is_endless
        most = min(wanted, MOST_DRAWN) if endless else None
        key = (stage.task, split, most)
        if key not in counts:
            try:
                counts[key] = len(setup.every_problem(stage.task, split, most))
            except MachineError as error:
                yield Trial("problems", f"stages.{name}", "skip", str(error))
                continue
            except UserError as error:
                counts[key] = error
        found = counts[key]
        subject = f"stages.{name}"
        if isinstance(found, UserError):
            yield Trial(
                "problems", subject, "fail", f"{wanted:,} {SPLIT_WORDS[split]} problems are asked for", str(found)
            )
        elif found < (wanted if most is None else most):
            remedy = _remedy(setup, name, stage, split, found)
            figure = f"{wanted:,} {SPLIT_WORDS[split]} problems are asked for, and tasks.{stage.task} has {found:,}"
            yield Trial("problems", subject, "fail", figure, remedy)
        else:
            yield Trial("problems", subject, "pass", f"{wanted:,} {SPLIT_WORDS[split]} problems")


def _wanted(stage: StageConfig) -> tuple[Split, int]:
    """Return a stage's split and the number of its problems."""
    if isinstance(stage, GrpoStage | OnPolicyStage):
        rollouts = stage.steps // stage.steps_a_rollout if stage.steps else 1
        return "train", stage.problems or rollouts * stage.prompts_a_rollout
    assert isinstance(stage, GenerateStage | EvalStage | CompareStage)
    return (stage.split if isinstance(stage, GenerateStage) else "held_out"), stage.problems


def _remedy(setup: TrialSetup, name: str, stage: StageConfig, split: Split, found: int) -> str:
    task = setup.recipe.tasks[stage.reads("task")[0]]
    least = f"Set stages.{name}.problems={found} or fewer"
    if isinstance(stage, GrpoStage | OnPolicyStage):
        return f"{least}: they are then repeated."
    by_hash = task.fn == "jsonl" and task.options.get("held_out", "hash") == "hash"
    if not by_hash:
        return f"{least}, or give the task more."
    share = f"About one problem in {HELD_OUT_EVERY} is held out, chosen by a hash of its text, and the others are for training"
    if split == "held_out":
        return f"{share}. {least}, or put problems to evaluate on into a file of their own: a second task with held_out: all."
    return f"{share}. {least}, or give the task more."


def entries(setup: TrialSetup) -> Iterator[Trial]:
    """No stage stores more entries a position than its model has tokens."""
    for name, stage in setup.stages(GenerateStage, ScoreStage, OnPolicyStage):
        for model in stage.reads("model") if not isinstance(stage, OnPolicyStage) else ():
            local = setup.local(model)
            if isinstance(local, str):
                continue
            size = models.vocabulary_size(local.tokenizer, models.config_of(local.folder))
            if stage.top_logprobs > size:
                remedy = f"Set stages.{name}.top_logprobs to 64 or so: traces grow with it, and most of the mass is in few entries."
                figure = f"{stage.top_logprobs:,} entries a position, of {size:,} tokens of the vocabulary"
                yield Trial("entries", f"stages.{name}", "fail", figure, remedy)
