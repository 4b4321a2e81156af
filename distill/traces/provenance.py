"""The origin of a folder's text, and the certificate of its last audit, stored beside the manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distill.traces import folder
from distill.traces.reader import TraceReader, open_traces

CERTIFICATE = "audit.json"


def text_from(reader: TraceReader) -> str:
    """Return the origin of the traces' text: the metadata's `source` or, without one, the model of the distributions."""
    metadata = reader.metadata
    return metadata.source or f"{metadata.model} (weights {metadata.weights})"


def write_certificate(path: Path, tree: dict[str, Any]) -> None:
    """Store an audit's result; `tree` names the content's fingerprint."""
    folder.write_json(path / CERTIFICATE, tree)


def certificate(reader: TraceReader) -> dict[str, Any] | None:
    """Return the result of an audit of exactly this content, or of the folder it was selected from; else None."""
    for path, fingerprint in (
        (reader.path, reader.fingerprint),
        (reader.base, open_traces(reader.base).fingerprint),
    ):
        if (path / CERTIFICATE).is_file():
            tree = folder.read_json(path / CERTIFICATE)
            if tree["fingerprint"] == fingerprint:
                return tree
    return None
