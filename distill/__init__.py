"""distill: teacher-to-student distillation of language models from stored next-token distributions.

From Python, each imported when it is first used, so that `import distill` costs nothing:

    run(recipe, ...)        run a recipe; returns a RunResult: report, metrics, folders of models and traces
    open_run(folder)        the RunResult of a run that is there already
    check(recipe, ...)      a Plan: what each stage will cost, and what stands in its way; nothing is run
    load_recipe(recipe)     a Recipe with every default filled in
    load_traces(folder)     a TraceDataset: texts, tokens and distributions, as a torch Dataset
    losses                  the losses on stored distributions, for your own trainer
    UserError, MachineError, DataError    what these raise: a mistake, something missing on this machine, a damaged file
    StageError              what run raises if a stage fails: a bug, or memory that ran out
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from distill import companions

if TYPE_CHECKING:
    from distill import losses as losses
    from distill.errors import DataError as DataError
    from distill.errors import MachineError as MachineError
    from distill.errors import UserError as UserError
    from distill.recipe import Recipe as Recipe
    from distill.run.api import Plan as Plan
    from distill.run.api import RunResult as RunResult
    from distill.run.api import check as check
    from distill.run.api import load_recipe as load_recipe
    from distill.run.api import open_run as open_run
    from distill.run.api import run as run
    from distill.run.pipeline import StageError as StageError
    from distill.traces.batches import TraceBatch as TraceBatch
    from distill.traces.dataset import Trace as Trace
    from distill.traces.dataset import TraceDataset as TraceDataset
    from distill.traces.dataset import load_traces as load_traces

__version__ = "0.1.0"

# Before anything imports peft, transformers or vLLM.
companions.hide()

_HOMES = {
    "DataError": "distill.errors",
    "MachineError": "distill.errors",
    "UserError": "distill.errors",
    "Recipe": "distill.recipe",
    "Plan": "distill.run.api",
    "RunResult": "distill.run.api",
    "check": "distill.run.api",
    "load_recipe": "distill.run.api",
    "open_run": "distill.run.api",
    "StageError": "distill.run.pipeline",
    "Trace": "distill.traces.dataset",
    "TraceBatch": "distill.traces.batches",
    "TraceDataset": "distill.traces.dataset",
    "load_traces": "distill.traces.dataset",
}
"""Where each public name is defined."""
_MODULES = ("losses", "run")
"""Modules that are imported by their name too. `run` is a package that can be called."""


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"distill.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'distill' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_MODULES})
