"""Atomic writes of files and folders, lock files that name their holder, the cache folder, and hashes."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from distill.errors import DataError, MachineError

_PACKAGE = Path(__file__).resolve().parent
SHIPPED = _PACKAGE / "shipped" if (_PACKAGE / "shipped").is_dir() else _PACKAGE.parent
"""The folder that holds `recipes` and `data`: inside the package in an installed wheel, beside it in a checkout."""
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_atomic(path: Path, data: str | bytes | memoryview) -> Path:
    """Write a file by temporary file, fsync and rename; readers see the old file or the new one, never a part.

    Text is written as UTF-8. Raises UserError if the disk is full or a folder has that name; the old file then stays.
    """
    if path.is_dir():
        raise MachineError(f"{path}: a folder has this name, but a file must be written here. Move the folder away.")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        # A new file, never one that a link of this name leads to.
        temporary.unlink(missing_ok=True)
        with room_for(path), open(temporary, "xb") as file:
            file.write(data.encode("utf-8") if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path


@contextlib.contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """Yield a temporary folder to fill; at the end it is renamed to `final` and replaces an older one.

    It is removed if the block raises. What a killed process left behind is removed by the next call. Raises UserError if
    the disk is full.
    """
    temporary = final.with_name(f".building-{final.name}")
    clear(temporary)
    temporary.mkdir(parents=True)
    try:
        with room_for(final):
            yield temporary
            for path in (*temporary.rglob("*"), temporary):
                sync(path)
        clear(final)
        temporary.rename(final)
        sync(final.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def clear(path: Path) -> None:
    """Remove what has a name: a folder with all that is in it, a file, or a link but not what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def room_for(path: Path) -> Iterator[None]:
    """Turn the error of a full disk into a UserError that names the path and the free space.

    Libraries in other languages (safetensors) raise their own errors, which hold the system's message.
    """
    try:
        yield
    except Exception as error:
        why = _disk_full(error)
        if why is None:
            raise
        raise MachineError(
            f"{path}: no room to write it ({why}, {free_space(path.parent):,} bytes free). "
            "All files written before are complete. Free some disk space and run the same command again to continue."
        ) from error


def _disk_full(error: Exception) -> str | None:
    """The system's message of a full disk or quota in an error; None if it is another one."""
    if isinstance(error, OSError):
        return error.strerror if error.errno in _DISK_FULL else None
    return next((why for number in _DISK_FULL if (why := os.strerror(number)) in str(error)), None)


def free_space(folder: Path) -> int:
    """Free bytes on the disk of a folder."""
    return shutil.disk_usage(folder).free


def sync(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(path: Path, refusal: str) -> Iterator[None]:
    """Hold the lock file `path`; the file <name>.holder beside it names the process and host that hold it.

    The operating system releases the lock when the process ends. A holder file from another host counts as a lock,
    because some network file systems do not share locks between hosts. Raises UserError with the text `refusal`, in which
    {holder} is replaced by process and host.
    """
    import filelock

    lock, beside = filelock.FileLock(path, timeout=0), path.with_name(f"{path.name}.holder")
    here = {"pid": os.getpid(), "host": socket.gethostname()}
    try:
        with room_for(path):
            lock.acquire()
    except filelock.Timeout:
        raise MachineError(refusal.format(holder=_in_words(_holder(beside)))) from None
    except NotImplementedError as error:
        raise MachineError(
            f"{path}: this file system has no file locks ({error}); choose a folder on another one."
        ) from error
    try:
        holder = _holder(beside)
        if holder.get("host", here["host"]) != here["host"]:
            raise MachineError(refusal.format(holder=_in_words(holder)) + f" If that machine is gone, remove {beside}.")
        for killed in path.parent.glob(f".{beside.name}.*.tmp"):
            killed.unlink()
        write_atomic(beside, json.dumps(here))
        try:
            yield
        finally:
            beside.unlink(missing_ok=True)
            path.unlink(missing_ok=True)
    finally:
        lock.release()


def _holder(beside: Path) -> Mapping[str, Any]:
    try:
        return dict(json.loads(beside.read_bytes()))
    except (OSError, ValueError, TypeError):
        return {}


def _in_words(holder: Mapping[str, Any]) -> str:
    return f"process {holder.get('pid', 'unknown')} on {holder.get('host', 'this host')}"


def cache_home() -> Path:
    """The cache folder for dequantised models and measurements: $DISTILL_CACHE, or distill/ in the user's cache folder."""
    if explicit := os.environ.get("DISTILL_CACHE"):
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distill"


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, as hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path, remedy: str = "") -> Any:
    """Return what a JSON file holds. Raises DataError, with the remedy, if it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        said = " ".join(str(error).split())[:120]
        raise DataError(f"{path}: not as written ({said}). {remedy}".rstrip()) from None


DIGEST = "sha256"
"""The key of a JSON file's own digest."""


def write_digested(path: Path, tree: Mapping[str, Any]) -> None:
    """Write an object as JSON, with a digest of its values that `read_digested` compares."""
    whole = json.loads(json.dumps(tree))  # as it will be read: tuples are lists, keys are texts
    write_atomic(path, json.dumps({**whole, DIGEST: _digest(whole)}, indent=1, ensure_ascii=False))


def read_digested(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds, without its digest. Raises ValueError if the file is not as written.

    A file without a digest is one of an older version.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if not isinstance(tree, dict):
        raise ValueError("it holds no object")
    written = tree.pop(DIGEST, None)
    if written is not None and written != _digest(tree):
        raise ValueError("its content does not match its digest")
    return tree


def _digest(tree: Mapping[str, Any]) -> str:
    """A hash of an object's values, whatever the order of the keys."""
    text = json.dumps(tree, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
