"""A run with a generate stage and a score stage, on the tiny models."""

from __future__ import annotations

import io
from pathlib import Path

from distill import recipe
from distill.progress import Screen
from distill.stages.context import Context

SUMS = {
    "fn": "reasoning_gym",
    "dataset": "chain_sum",
    "options": {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2},
}
ENGINE = {"fn": "reference", "dtype": "float32"}


def context(run: Path, teachers: dict[str, Path], name: str = "scored", **changes) -> Context:
    stages = {
        "traces": {
            "kind": "generate", "model": "a", "task": "sums", "problems": 4, "samples": 2, "top_logprobs": 8,
            "sampling": {"max_tokens": 6}, "engine": ENGINE,
        },
        "scored": {"kind": "score", "model": "b", "data": "traces", "top_logprobs": 8, "engine": ENGINE, **changes},
    }  # fmt: skip
    tree = {
        "name": "t",
        "models": {name: str(folder) for name, folder in teachers.items()},
        "tasks": {"sums": SUMS},
        "stages": stages,
    }
    ctx = Context(recipe=recipe.validate(tree), run=run, name=name, screen=Screen(io.StringIO()))
    ctx.folder.mkdir(parents=True, exist_ok=True)
    return ctx
