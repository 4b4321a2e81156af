"""Model folders that say what their files are, so that a damaged one is not used.

`seal` writes SHA256SUMS (the format of `sha256sum`, which can check it too); `verify` compares. Hashing takes a second for
two gigabytes or so, and what was found right is remembered beside the folder by the files' sizes and times, so each folder is hashed
once, and again when a file has changed.
"""

from __future__ import annotations

import contextlib
import functools
import json
from pathlib import Path

from distill.errors import DataError
from distill.files import file_hash, write_atomic
from distill.records import UserError

SUMS = "SHA256SUMS"
WEIGHTS = ".safetensors"
SEALED = (WEIGHTS, ".json", ".jinja", ".txt", ".model", ".py")
"""Endings of the files that make a model what it is; its card may be edited."""


def seal(folder: Path) -> None:
    """Write the hashes of a new model folder's files."""
    lines = [f"{file_hash(path)}  {path.relative_to(folder).as_posix()}\n" for path in _files(folder)]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def verify(folder: Path, remedy: str) -> None:
    """Raise UserError if files of a sealed folder are missing or not what was written; remedy: what to do then. Others pass."""
    if not (folder / SUMS).is_file():
        return
    state = tuple(
        (path.relative_to(folder).as_posix(), path.stat().st_size, path.stat().st_mtime_ns)
        for path in (*_files(folder), folder / SUMS)
    )
    _verify(folder, state, remedy)


def verify_but_weights(folder: Path, remedy: str) -> None:
    """As `verify`, of the config, the tokenizer and all other files that are not weights: in milliseconds, and never remembered."""
    if not (folder / SUMS).exists():
        return
    if wrong := _wrong(folder, weights=False):
        raise DataError(f"{folder}: {', '.join(wrong)}: not as written. {remedy}")


@functools.lru_cache(maxsize=64)
def _verify(folder: Path, state: tuple[tuple[str, int, int], ...], remedy: str) -> None:
    record = folder.with_name(f"{folder.name}.verified")
    here = json.dumps(state)
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if record.read_text(encoding="utf-8") == here:
            return
    if wrong := _wrong(folder):
        raise DataError(f"{folder}: {', '.join(wrong)}: not as written. {remedy}")
    with contextlib.suppress(OSError, UserError):  # a read-only folder is hashed by every process
        write_atomic(record, here)


def _wrong(folder: Path, *, weights: bool = True) -> list[str]:
    """The files of a sealed folder that are missing, or have other bytes than when it was written. weights: look at those too."""
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
        known = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    except (OSError, ValueError):
        return [SUMS]
    if any(len(digest) != 64 for digest in known.values()) or not known:
        return [SUMS]
    wrong = [name for name, digest in known.items() if _counts(name, weights) and not _is(folder / name, digest)]
    found = [path.relative_to(folder).as_posix() for path in _files(folder)]
    return wrong + [name for name in found if _counts(name, weights) and name not in known]


def _counts(name: str, weights: bool) -> bool:
    return weights or not name.endswith(WEIGHTS)


def _is(path: Path, digest: str) -> bool:
    return path.is_file() and file_hash(path) == digest


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix in SEALED)
