"""Who wrote the text of a folder of traces, and what an audit found, which stands beside the manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distill.traces import folder
from distill.traces.reader import TraceReader, open_traces

CERTIFICATE = "audit.json"


def text_from(reader: TraceReader) -> str:
    """Who wrote the traces' text: the metadata's `source`, or else the model that their distributions are of."""
    metadata = reader.metadata
    return metadata.source or f"{metadata.model} (weights {metadata.weights})"


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
