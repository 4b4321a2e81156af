"""What lies in a folder of traces: shards, one manifest a writer, a lock while a writer is open.

    shard-<writer>-00000.parquet   whole shards, never changed once they have their name
    manifest-<writer>.json         metadata, and for each of that writer's shards its rows, bytes and SHA-256
    lock-<writer>                  pid and host of the open writer

The manifests together say what the folder holds; a shard that none of them lists is not there. Each writer
changes only its own files, so that several (processes, machines) can fill one folder. Every file appears
whole or not at all: temporary file in the same folder, fsync, rename, fsync of the folder.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distill.records import UserError, stable_hash
from distill.traces.schema import Metadata

FORMAT = "distill-traces"
TEMPORARY = ".tmp"
_SHARD = re.compile(r"shard-(?P<writer>[A-Za-z0-9_]+)-(?P<index>\d{5,})\.parquet")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_locks_held: set[Path] = set()


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


# ------------------------------------------------------------------------------------------- whole files


def write_whole(path: Path, data: Any) -> None:
    """A file that appears under its name only when all of it is on the disk.

    Raises UserError when the disk is full, or a folder has that name; nothing of the new file is left then, and an old
    one stays.
    """
    if path.is_dir():
        raise UserError(f"{path}: is a folder, where a file should be written. Move it away.")
    temporary = path.with_name(f".{path.name}{TEMPORARY}")
    try:
        with _room_for(path), open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except (OSError, UserError):
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def _room_for(path: Path) -> Iterator[None]:
    """Says in words that the disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise UserError(
            f"{path}: no room to write it ({error.strerror}, {free_space(path.parent):,} bytes free). "
            "What was written before is whole; make room and run again to add what is missing."
        ) from error


def make_folder(folder: Path) -> None:
    """The folder and those above it. Raises UserError where something else is in the way, or nothing may be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made a folder: {error.strerror}.") from None


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def free_space(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def require_space(folder: Path, num_bytes: int) -> None:
    """Say that a disk will be full before it is. Raises UserError."""
    free = free_space(folder)
    if free < num_bytes:
        raise UserError(f"{folder}: {num_bytes:,} bytes are needed and {free:,} are free. Make room first.")


def write_json(path: Path, tree: Mapping[str, Any]) -> None:
    """JSON with a checksum of itself, whole or not at all."""
    checksum = stable_hash(json.dumps(tree, sort_keys=True), length=64)
    write_whole(path, (json.dumps({**tree, "checksum": checksum}, indent=1) + "\n").encode())


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


# ------------------------------------------------------------------------------------------------- the lock


@contextlib.contextmanager
def writer_lock(folder: Path, writer: str) -> Iterator[None]:
    """Hold a writer's lock. Raises UserError that names the holder.

    The kernel holds it (a POSIX record lock: gone with its process, not inherited by children), the file
    says who: a dead writer's lock is taken over, one from another host is believed even where the file
    system does not pass locks on.
    """
    path = (folder / f"lock-{writer}").resolve()
    if path in _locks_held:
        raise _held(path, {"pid": os.getpid(), "host": socket.gethostname()})
    _locks_held.add(path)
    try:
        with _room_for(path):
            file = open(path, "a+b", buffering=0)  # noqa: SIM115
        with file:
            with _room_for(path):
                _acquire(path, file)
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
    finally:
        _locks_held.discard(path)


def _acquire(path: Path, file: Any) -> None:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise UserError(
                f"{path}: this file system has no file locks ({error.strerror}); write the traces to another one."
            ) from error
        raise _held(path, _holder(file)) from None
    here, holder = socket.gethostname(), _holder(file)
    if holder.get("host", here) != here or not _is_same_file(path, file):
        raise _held(path, holder)
    file.truncate(0)
    file.write(json.dumps({"pid": os.getpid(), "host": here}).encode())


def _holder(file: Any) -> dict[str, Any]:
    file.seek(0)
    try:
        return dict(json.loads(file.read()))
    except (ValueError, TypeError):
        return {}


def _is_same_file(path: Path, file: Any) -> bool:
    """False where the holder removed the file between our opening and our locking it."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _held(path: Path, holder: Mapping[str, Any]) -> UserError:
    return UserError(
        f"{path.parent}: another writer is open here (process {holder.get('pid', 'unknown')} on "
        f"{holder.get('host', 'this host')}). Wait for it, or write to another folder; "
        f"if that machine is gone, remove {path}."
    )
