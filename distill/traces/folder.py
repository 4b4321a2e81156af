"""What lies in a folder of traces: shards, one manifest a writer, a lock while a writer is open.

    shard-<writer>-00000.parquet   whole shards, never changed once they have their name
    manifest-<writer>.json         metadata, and for each of that writer's shards its rows, bytes and SHA-256
    lock-<writer>                  held by the open writer; lock-<writer>.holder names its process and host

The manifests together say what the folder holds; a shard that none of them lists is not there. Each writer
changes only its own files, so that several (processes, machines) can fill one folder. Every file appears
whole or not at all: temporary file in the same folder, fsync, rename, fsync of the folder.
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
                "metadata": self.metadata.model_dump(),
                "shards": [asdict(shard) for shard in self.shards],
            },
        )


def manifest_name(writer: str) -> str:
    return f"manifest-{writer}.json"


def shard_name(writer: str, index: int) -> str:
    return f"shard-{writer}-{index:05d}.parquet"


def shard_files(folder: Path, writer: str | None = None) -> dict[str, int]:
    """The shard files in a folder (of one writer), listed in a manifest or not, with their indices."""
    found = {}
    for path in sorted(folder.iterdir()):
        match = _SHARD.fullmatch(path.name)
        if match and writer in (None, match["writer"]):
            found[path.name] = int(match["index"])
    return found


def read_manifest(path: Path) -> Manifest:
    """One manifest, checked against its own checksum and the schema's version."""
    tree = read_json(path)
    if tree.get("format") != FORMAT:
        raise UserError(f"{path}: not a manifest of traces.")
    metadata = Metadata.parse(tree["metadata"], str(path))
    return Manifest(tree["writer"], metadata, tuple(Shard(**shard) for shard in tree["shards"]))


def read_manifests(folder: Path) -> list[Manifest]:
    """Every writer's manifest, by the writer's name; none in a folder without traces.

    Raises UserError where two of them disagree about what the traces are.
    """
    manifests = [read_manifest(path) for path in sorted(folder.glob("manifest-*.json"))]
    for other in manifests[1:]:
        refuse_differences(folder, manifests[0].metadata, other.metadata, f"writer {other.writer!r}")
    return manifests


def refuse_differences(folder: Path, there: Metadata, new: Metadata, what: str) -> None:
    """UserError that names every key in which traces of another kind would be mixed into a folder."""
    differences = there.differences(new)
    if differences:
        raise UserError(
            f"{folder}: holds traces of another kind than {what} has (there != here):\n  "
            + "\n  ".join(differences)
            + "\nUse another folder, or remove this one to generate it anew."
        )


def make_folder(folder: Path) -> None:
    """The folder and those above it. Raises UserError where something else is in the way, or nothing may be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made a folder: {error.strerror}.") from None


def write_json(path: Path, tree: Mapping[str, Any]) -> None:
    """JSON with a checksum of itself, whole or not at all."""
    checksum = stable_hash(json.dumps(tree, sort_keys=True), length=64)
    write_atomic(path, (json.dumps({**tree, "checksum": checksum}, indent=1) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """What `write_json` wrote. Raises UserError when it was changed, cut or is missing."""
    try:
        tree = json.loads(path.read_bytes())
        checksum = tree.pop("checksum")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}.") from None
    except (ValueError, AttributeError, KeyError, TypeError):
        raise UserError(f"{path}: damaged (not the JSON that was written).") from None
    if stable_hash(json.dumps(tree, sort_keys=True), length=64) != checksum:
        raise UserError(f"{path}: damaged or edited by hand (its checksum does not match).")
    return dict(tree)


def sha256(data: Any) -> str:
    return hashlib.sha256(data).hexdigest()


@contextlib.contextmanager
def writer_lock(folder: Path, writer: str) -> Iterator[None]:
    """Hold a writer's lock. Raises UserError that names the process and host that hold it."""
    refusal = f"{folder}: another writer is open here ({{holder}}). Wait for it, or write to another folder."
    with locked(folder.resolve() / f"lock-{writer}", refusal):
        yield
