"""The answers of an endpoint on disk, until the stage's shards hold them: what was paid for once is never asked for again.

A folder of append-only segments, one JSON line per answer, synced to the disk before the answer counts as done. A segment is
removed when shards hold all its answers; what they were billed is added up in `usage.json`. A kill at any instant loses no
answer and counts none twice: a line that was cut is dropped, and a segment that is counted already is removed.

A request that was being answered at the kill is asked again, and may have been billed: nothing on this side can know.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import threading
from collections.abc import Container, Iterable, Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from distill.engines.served.answers import Answer, Usage
from distill.files import room_for, sync, write_atomic
from distill.records import Array, Completion, TopK, stable_hash

SEGMENT_BYTES = 64 << 20
USAGE = "usage.json"
_NAME = re.compile(r"answers-(\d{6})\.jsonl")
_TYPES = {"ids": np.int32, "logprob": np.float32}
_TOP_TYPES = {"count_T": np.int32, "ids_E": np.int64, "logp_E": np.float32, "tail_T": np.float32}


class AnswerJournal:
    """The journal of one folder of traces. Its methods may be called from several threads.

    stored: the ids that the shards hold already; their answers are only counted.
    """

    def __init__(self, folder: Path, stored: Container[str] = ()) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._where: dict[str, tuple[Path, int, str]] = {}
        self._pending: dict[Path, set[str]] = {}
        self._billed: dict[Path, Usage] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self._folded, done = _read_usage(folder)
        for path in _segments(folder):
            if path.name in done:
                path.unlink()  # killed between the counting and the removal
            else:
                self._read(path, stored)
        number = max((int(path.stem[-6:]) for path in self._billed), default=0)
        number = max([number, *(int(name[-12:-6]) for name in done)])
        self._number, self._current = number, folder
        self._file: FileIO | None = None

    @property
    def usage(self) -> Usage:
        """All tokens that were billed for this folder's answers."""
        with self._lock:
            return sum(self._billed.values(), self._folded)

    def find(self, request_id: str, mark: str) -> Completion | None:
        """Return the answer to a request; None if there is none. mark: hash of what was asked (`asked`)."""
        with self._lock:
            place = self._where.get(request_id)
        if place is None or place[2] != mark:
            return None
        with place[0].open("rb") as file:
            file.seek(place[1])
            return _completion(json.loads(file.readline()))

    def add(self, request_id: str, mark: str, answer: Answer) -> None:
        """Write an answer and sync it to the disk. A second answer to the same request is only counted."""
        tree = _tree(answer.completion) | {"id": request_id, "mark": mark}
        with self._lock:
            before = self._where.get(request_id)
            if before is not None and before[2] == mark:
                tree = {}
            path, offset = self._append({**tree, "usage": [answer.usage.prompt, answer.usage.completion]})
            self._billed[path] += answer.usage
            if tree:
                self._where[request_id] = path, offset, mark
                self._pending[path].add(request_id)

    def add_usage(self, usage: Usage) -> None:
        """Count an answer that was billed and is of no use."""
        if usage == Usage():
            return
        with self._lock:
            path, _ = self._append({"usage": [usage.prompt, usage.completion]})
            self._billed[path] += usage

    def stored(self, ids: Iterable[str]) -> None:
        """Forget the answers of traces that complete shards hold now, and remove segments without others."""
        with self._lock:
            touched = {self._forget(each) for each in ids}
            self._fold([path for path in touched if path and not self._pending[path] and path != self._current])

    def close(self) -> None:
        """Close the journal; segments whose answers are all in shards are removed."""
        with self._lock:
            if self._file is not None:
                self._file.close()
            self._file, self._current = None, self.folder
            self._fold([path for path, pending in self._pending.items() if not pending])

    def _forget(self, request_id: str) -> Path | None:
        place = self._where.pop(request_id, None)
        if place is None:
            return None
        self._pending[place[0]].discard(request_id)
        return place[0]

    def _append(self, tree: Mapping[str, Any]) -> tuple[Path, int]:
        """Append a line and sync it; return its segment and offset."""
        if self._file is None or self._file.tell() >= SEGMENT_BYTES:
            if self._file is not None:
                self._file.close()
            self._number += 1
            self._current = self.folder / f"answers-{self._number:06}.jsonl"
            self._file = self._current.open("ab", buffering=0)
            self._pending[self._current], self._billed[self._current] = set(), Usage()
            sync(self.folder)
        offset = self._file.tell()
        try:
            with room_for(self._current):
                self._file.write(json.dumps(tree).encode() + b"\n")
                os.fsync(self._file.fileno())
        except BaseException:
            self._file.truncate(offset)  # nothing is appended to half a line
            raise
        return self._current, offset

    def _fold(self, paths: list[Path]) -> None:
        """Count segments in usage.json, and remove them."""
        if not paths:
            return
        for path in paths:
            self._folded += self._billed.pop(path)
            del self._pending[path]
        tree = {
            "prompt_tokens": self._folded.prompt,
            "completion_tokens": self._folded.completion,
            "counted": [path.name for path in paths],
        }
        write_atomic(self.folder / USAGE, json.dumps(tree).encode())
        for path in paths:
            path.unlink()

    def _read(self, path: Path, stored: Container[str]) -> None:
        self._pending[path], self._billed[path] = set(), Usage()
        for tree, offset in _lines(path):
            self._billed[path] += Usage(*tree["usage"])
            if "id" in tree and tree["id"] not in stored:
                self._where[tree["id"]] = path, offset, tree["mark"]
                self._pending[path].add(tree["id"])


def billed(folder: Path) -> Usage:
    """Return all tokens that were billed for a journal's folder; none if there is no journal."""
    total, done = _read_usage(folder)
    for path in _segments(folder):
        if path.name not in done:
            total = sum((Usage(*tree["usage"]) for tree, _ in _lines(path)), total)
    return total


def mark_of(*parts: Any) -> str:
    """Hash everything that decides the answer to a request; arrays by their values."""
    return stable_hash(*[part.tolist() if isinstance(part, np.ndarray) else part for part in parts])


# ------------------------------------------------------------------------------------------------------ files


def _segments(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("answers-*.jsonl") if _NAME.fullmatch(path.name))


def _lines(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield (line, offset); a last line that a kill cut is left out. Nothing is appended to a segment of an earlier process."""
    offset = 0
    with path.open("rb") as file:
        for line in file:
            # A machine that stopped may leave a line that is whole in length only.
            with contextlib.suppress(ValueError):
                if line.endswith(b"\n"):
                    yield json.loads(line), offset
            offset += len(line)


def _read_usage(folder: Path) -> tuple[Usage, set[str]]:
    """Return the billed tokens of the segments that were removed, and their names."""
    path = folder / USAGE
    if not path.is_file():
        return Usage(), set()
    tree = json.loads(path.read_bytes())
    return Usage(tree["prompt_tokens"], tree["completion_tokens"]), set(tree["counted"])


def _tree(completion: Completion) -> dict[str, Any]:
    arrays = {"ids": completion.ids_T, "logprob": completion.logprob_T}
    tree: dict[str, Any] = {name: _packed(array, _TYPES[name]) for name, array in arrays.items()}
    if completion.top is not None:
        tree["top"] = {name: _packed(getattr(completion.top, name), kind) for name, kind in _TOP_TYPES.items()}
    return tree | {"finish": completion.finish_reason, "version": completion.version, "text": completion.text}


def _completion(tree: Mapping[str, Any]) -> Completion:
    top = tree.get("top")
    return Completion(
        request_id=tree["id"],
        ids_T=_unpacked(tree["ids"], _TYPES["ids"]),
        logprob_T=_unpacked(tree["logprob"], _TYPES["logprob"]),
        top=None if top is None else TopK(**{name: _unpacked(top[name], kind) for name, kind in _TOP_TYPES.items()}),
        finish_reason=tree["finish"],
        version=tree["version"],
        text=tree["text"],
    )


def _packed(array: Array, kind: Any) -> str:
    return base64.b64encode(np.ascontiguousarray(array, kind).tobytes()).decode()


def _unpacked(text: str, kind: Any) -> Array:
    return np.frombuffer(base64.b64decode(text), kind)
