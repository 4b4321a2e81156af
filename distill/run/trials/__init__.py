"""Trials: what a run would get wrong in silence, found by small real experiments before it.

`cheap` are those that a run makes by itself at its start: prompts, replies, tokenizers, judges, rewards, sandbox and disk. `all_trials`
are those of `distill doctor`; they also start engines.
"""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from distill.errors import MachineError, debugging
from distill.machine import Machine
from distill.progress import Screen
from distill.recipe import Recipe
from distill.records import UserError
from distill.run.predictions.row import Row
from distill.run.trials import amounts, engine_path, isolation, judging, rendering, resources
from distill.run.trials.trial import Step, Trial, TrialSetup

__all__ = ["Trial", "all_trials", "cheap", "refuse_failed"]

UNTRIED = "could not be tried"
_QUICK: tuple[tuple[str, Step], ...] = (
    ("prompt and reply", rendering.templates),
    ("context", rendering.contexts),
    ("entries", amounts.entries),
    ("tokenizers", rendering.pairs),
    ("judge", judging.judges),
    ("rewards", partial(judging.rewards, with_models=False)),
    ("sandbox", isolation.sandboxes),
    ("problems", amounts.problems),
)


def cheap(recipe: Recipe, run: Path, due: Sequence[str], rows: Sequence[Row]) -> Iterator[Trial]:
    """Yield the trials of the due stages that need no engine and no network. rows: the plan's."""
    setup = TrialSetup(recipe, run, tuple(due))
    for what, trial in _QUICK:
        for one in _guarded(what, trial, setup):
            # What cannot even be tried is refused by the stage that needs it, which says more.
            yield one if one.figure != UNTRIED else dataclasses.replace(one, status="skip")
    yield resources.disk(setup, rows)


def all_trials(
    recipe: Recipe, run: Path, due: Sequence[str], rows: Sequence[Row], machine: Machine, screen: Screen
) -> Iterator[Trial]:
    """Yield every trial of the due stages. Tokenizers may be fetched from the hub; weights are not."""
    setup = TrialSetup(recipe, run, tuple(due), fetches=True)
    quick = (("rewards", judging.rewards) if what == "rewards" else (what, trial) for what, trial in _QUICK)
    for what, trial in (*quick, ("data", rendering.data)):
        screen.phase(f"trying: {what}")
        yield from _guarded(what, trial, setup)
    yield from resources.resources(setup, rows, machine)
    screen.phase("trying: engines")
    yield from _guarded("engine and trainer", lambda one: engine_path.engine_paths(one, machine, screen), setup)


def _guarded(what: str, trial: Step, setup: TrialSetup) -> Iterator[Trial]:
    """Yield a sort's trials; an error that one ends with is a failure, with the words of a mistake of the recipe."""
    try:
        yield from trial(setup)
    except MachineError as error:
        yield Trial(what, "recipe", "skip", str(error))
    except UserError as error:
        yield Trial(what, "recipe", "fail", UNTRIED, str(error))
    except Exception as error:
        if debugging():
            traceback.print_exc()
        said = " ".join(str(error).split())[:300]
        yield Trial(
            what,
            "recipe",
            "fail",
            UNTRIED,
            f"{type(error).__name__}: {said}. A stage would end so too; --debug shows where.",
        )


def refuse_failed(trials: Sequence[Trial]) -> None:
    """Raise UserError if a trial failed, with the first one's words."""
    failed = [trial for trial in trials if trial.status == "fail"]
    if failed:
        first = failed[0]
        more = f" {len(failed) - 1} more failed." if len(failed) > 1 else ""
        raise UserError(
            f"{first.subject}: {first.name}: {first.figure}. {first.remedy}{more}\n`distill doctor` shows every trial; `distill run "
            "--no-trials` runs in spite of it."
        )
