"""The verb `distill traces export`: traces as text, with the tokenizer that the style needs found beside their run, or in the
format of another program.
"""

from __future__ import annotations

from pathlib import Path

from distill import models
from distill.errors import UserError
from distill.tools.inspect import find, tokenizer_of
from distill.traces import export
from distill.traces.exchange import exporting
from distill.traces.reader import open_traces


def write(folder: Path, out: Path, style: str, tokenizer: str | None = None) -> int:
    """Write the traces of a folder to NAME.jsonl, or to a `datasets` folder of any other name; return their number.

    Styles of other programs write files of their own (`exchange.exporting`).

    tokenizer: a folder that has it; None: the writer's own, looked for only where the style needs it. Raises UserError for an
    unknown style, a missing tokenizer, or one that gives other prompts than the stored ones.
    """
    if style in exporting.STYLES:
        return exporting.export(folder, out, style)
    if style not in ("chat", "text"):
        raise UserError(f"--style: {style!r} is none of chat, text, {', '.join(exporting.STYLES)}.")
    loaded = None
    if tokenizer is not None or export.needs_tokenizer(folder, style):  # type: ignore[arg-type]
        metadata = open_traces(folder).metadata
        loaded = tokenizer_of(find(folder), metadata, tokenizer)
        if date := metadata.versions.get("template_date"):
            models.pin_date(date)
    make = export.export_sft if out.suffix == ".jsonl" else export.export_dataset
    return make(folder, out, style, loaded)  # type: ignore[arg-type]
