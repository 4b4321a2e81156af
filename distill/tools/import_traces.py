"""`distill traces import`: find the teacher's tokenizer, then write another program's data set as traces."""

from __future__ import annotations

from pathlib import Path

from distill import models
from distill.errors import UserError
from distill.progress import Screen
from distill.recipe import ModelConfig
from distill.traces.exchange.importing import STYLES, Settings, import_traces


def run(
    source: Path,
    out: Path,
    style: str,
    *,
    teacher: str,
    tokenizer: str | None = None,
    config: Path | None = None,
    without_tail: bool = False,
    exact: bool = False,
    screen: Screen,
) -> int:
    """Return the number of traces. tokenizer: a model with the teacher's; None = the teacher. Raises UserError for another style."""
    if style in ("trl", "chat", "text"):
        raise UserError(
            f"--style: {style} holds text without distributions. Name the file in a train stage's `data`, or in a score stage's, which adds "
            "a teacher's distributions."
        )
    if style not in STYLES:
        raise UserError(f"--style: {style!r} is none of {', '.join(STYLES)}.")
    folder = models.resolve(ModelConfig(source=tokenizer or teacher), screen.phase, weights=False)
    loaded = models.load_tokenizer(folder)
    screen.phase(f"reading {source}")
    return import_traces(source, out, style, Settings(teacher, loaded, config, without_tail, exact))
