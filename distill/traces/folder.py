"""The files in a folder of traces: shards, one manifest a writer, a lock while a writer is open.

    shard-<writer>-00000.parquet   complete shards, never changed after they got this name
    manifest-<writer>.json         metadata, and for each of that writer's shards its rows, bytes and SHA-256
    lock-<writer>                  held by the open writer; lock-<writer>.holder names its process and host

The manifests together list the folder's shards; a shard that none of them lists is ignored. Each writer
changes only its own files, so that several (processes, machines) can fill one folder. Every file appears
complete or not at all: temporary file in the same folder, fsync, rename, fsync of the folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distill.errors import DataError, MachineError
from distill.files import locked, write_atomic
from distill.records import UserError, stable_hash
from distill.traces.schema import Metadata

FORMAT = "distill-traces"
_SHARD = re.compile(r"shard-(?P<writer>[A-Za-z0-9_]+)-(?P<index>\d{5,})\.parquet")


@dataclass(frozen=True, slots=True)
class Shard:
    """One shard as its manifest lists it. entries: kept candidates over all its positions."""

    file: str
    rows: int
    bytes: int
    sha256: str
    positions: int
    entries: int


@dataclass(frozen=True, slots=True)
class Manifest:
    writer: str
    metadata: Metadata
    shards: tuple[Shard, ...]

    def write(self, folder: Path) -> None:
        write_json(
            folder / manifest_name(self.writer),
            {
                "format": FORMAT,
                "writer": self.writer,
                "metadata": self.metadata.tree(),
                "shards": [asdict(shard) for shard in self.shards],
            },
        )


def manifest_name(writer: str) -> str:
    return f"manifest-{writer}.json"


def shard_name(writer: str, index: int) -> str:
    return f"shard-{writer}-{index:05d}.parquet"


def shard_files(folder: Path, writer: str | None = None) -> dict[str, int]:
    """Return the shard files in a folder (of one writer) with their indices, listed in a manifest or not."""
    found = {}
    for path in sorted(folder.iterdir()):
        match = _SHARD.fullmatch(path.name)
        if match and writer in (None, match["writer"]):
            found[path.name] = int(match["index"])
    return found


def read_manifest(path: Path) -> Manifest:
    """Read one manifest and check its checksum and schema version."""
    tree = read_json(path)
    if tree.get("format") != FORMAT:
        raise DataError(f"{path}: not a manifest of traces.")
    metadata = Metadata.parse(tree["metadata"], str(path))
    return Manifest(tree["writer"], metadata, tuple(Shard(**shard) for shard in tree["shards"]))


def read_manifests(folder: Path) -> list[Manifest]:
    """Read every writer's manifest, by the writer's name; empty for a folder without traces.

    Raises UserError if the metadata of two manifests differ.
    """
    manifests = [read_manifest(path) for path in sorted(folder.glob("manifest-*.json"))]
    for other in manifests[1:]:
        refuse_differences(folder, manifests[0].metadata, other.metadata, f"writer {other.writer!r}")
    return manifests


def refuse_differences(folder: Path, there: Metadata, new: Metadata, what: str) -> None:
    """Raise UserError, naming every identity key that differs, if traces of another kind would be added to a folder."""
    differences = there.differences(new)
    if differences:
        raise UserError(
            f"{folder}: its traces and {what} differ (folder != new):\n  "
            + "\n  ".join(differences)
            + "\nUse another folder, or remove this one to generate its traces again."
        )


def make_folder(folder: Path) -> None:
    """Make a folder and its parents. Raises UserError if a file blocks the path or nothing may be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MachineError(f"{folder}: cannot create this folder: {error.strerror}.") from None


def write_json(path: Path, tree: Mapping[str, Any]) -> None:
    """Write JSON with its own checksum, atomically."""
    checksum = stable_hash(json.dumps(tree, sort_keys=True), length=64)
    write_atomic(path, (json.dumps({**tree, "checksum": checksum}, indent=1) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Read a file of `write_json`. Raises UserError if it was changed or cut, or is missing."""
    try:
        tree = json.loads(path.read_bytes())
        checksum = tree.pop("checksum")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}.") from None
    except (ValueError, AttributeError, KeyError, TypeError):
        raise DataError(f"{path}: damaged (not the JSON that was written).") from None
    if stable_hash(json.dumps(tree, sort_keys=True), length=64) != checksum:
        raise DataError(f"{path}: damaged or edited by hand (its checksum does not match).")
    return dict(tree)


def sha256(data: Any) -> str:
    return hashlib.sha256(data).hexdigest()


@contextlib.contextmanager
def writer_lock(folder: Path, writer: str) -> Iterator[None]:
    """Hold a writer's lock. Raises UserError, naming process and host, if another writer holds it."""
    refusal = f"{folder}: another writer is open here ({{holder}}). Wait for it, or write to another folder."
    with locked(folder.resolve() / f"lock-{writer}", refusal):
        yield
