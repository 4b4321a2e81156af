"""The origin of a folder's text, and the certificate of its last audit, stored beside the manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distill.traces import folder
from distill.traces.reader import TraceReader, open_traces
from distill.traces.schema import Metadata

CERTIFICATE = "audit.json"
HELD_OUT = {"problems": "held_out"}
"""The entry of `Metadata.versions` that marks traces of held-out problems."""


def text_from(reader: TraceReader) -> str:
    """Return the origin of the traces' text: the metadata's `source` or, without one, the model of the distributions."""
    metadata = reader.metadata
    return metadata.source or f"{metadata.model} (weights {metadata.weights})"


def is_held_out(metadata: Metadata) -> bool:
    """Whether the traces are of held-out problems, on which nothing may train."""
    return metadata.versions.items() >= HELD_OUT.items()


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
