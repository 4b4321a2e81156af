"""What stands beside a manifest and is no row: who wrote the text, and what an audit found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distill.traces import folder
from distill.traces.reader import TraceReader, open_traces

TEXT_FROM = "text_from.json"
CERTIFICATE = "audit.json"


def write_text_from(path: Path, text_from: str) -> None:
    """Note who wrote the text of traces whose distributions are another model's."""
    folder.write_json(path / TEXT_FROM, {"text_from": text_from})


def text_from(reader: TraceReader) -> str:
    """Who wrote the traces' text: what was noted, or else the model that their distributions are of."""
    path = reader.base / TEXT_FROM
    if path.is_file():
        return str(folder.read_json(path)["text_from"])
    return f"{reader.metadata.model} (weights {reader.metadata.weights})"


def write_certificate(path: Path, tree: dict[str, Any]) -> None:
    """Keep what an audit found; `tree` names the content's fingerprint."""
    folder.write_json(path / CERTIFICATE, tree)


def certificate(reader: TraceReader) -> dict[str, Any] | None:
    """What an audit found, where there was one of just this content, or of the folder that it is selected from."""
    for path, fingerprint in (
        (reader.path, reader.fingerprint),
        (reader.base, open_traces(reader.base).fingerprint),
    ):
        if (path / CERTIFICATE).is_file():
            tree = folder.read_json(path / CERTIFICATE)
            if tree["fingerprint"] == fingerprint:
                return tree
    return None
