"""Keys that several stages of a new recipe share, each with its reason: sampling, what is stored, engines, rows of a data set."""

from __future__ import annotations

from pathlib import Path

from distill.tools.new.settings import Settings
from distill.tools.new.yaml_lines import Lines


def located(path: Path | str, folder: Path) -> str:
    """Return a path as the recipe writes it: from the recipe's own folder if it lies below that, else absolute."""
    whole, base = Path(path).expanduser().absolute(), folder.absolute()
    return f"./{whole.relative_to(base)}" if whole.is_relative_to(base) else str(whole)


def sampling(lines: Lines, settings: Settings, temperature: float, why: str) -> None:
    """Add how completions are sampled."""
    lines.key(2, "sampling", {"temperature": temperature, "max_tokens": settings.max_tokens}, why)


def capture(lines: Lines, settings: Settings) -> None:
    """Add what is stored of the teacher's distributions."""
    most = "what endpoints usually give" if settings.endpoint else f"of {settings.teacher.shape.vocab:,}"
    lines.key(
        2,
        "top_logprobs",
        settings.top_logprobs,
        f"tokens stored at a position, at most ({most}); 0 = text only, which kl cannot use",
    )
    lines.key(
        2, "mass", 0.98, "fewer are stored where they have this probability together; the rest is kept as one number"
    )


def engine(lines: Lines, settings: Settings) -> None:
    """Add the engine that runs the teacher."""
    if settings.endpoint is None:
        lines.key(
            2, "engine", {"batch_size": settings.engine_batch}, "completions at a time; lower it if memory is short"
        )
    else:
        lines.key(
            2,
            "engine",
            settings.endpoint.section(settings.engine_batch),
            "requests in flight; add price: {input: 0.5, output: 1.5} to see the cost",
        )


def rows(lines: Lines, settings: Settings, folder: Path) -> None:
    """Add the keys of a stage that reads conversations from the data."""
    data = settings.data
    lines.key(2, "data", located(data.path, folder) if data.path is not None else data.given)
    if data.fields:
        lines.key(2, "fields", dict(data.fields))
    if data.path is None and data.splits and data.splits[0] != "train":
        lines.key(2, "split", data.splits[0])
    lines.key(2, "task", "questions", "renders the prompts, and keeps the held-out questions out")
    lines.key(2, "max_tokens", settings.longest, "of prompt and completion; longer rows are left out and counted")
