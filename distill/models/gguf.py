"""Read the header of a GGUF file: its model's metadata, without tensors.

The `gguf` library makes an array of every string of the vocabulary, which takes seconds; a recipe's check needs a few
numbers only. Contents of arrays, tensors, big-endian files and version 1 are not read.
Format: github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any

from distill.errors import UserError

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # fmt: skip
STRING, ARRAY = 8, 9


class _Cursor:
    """A file read sequentially."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._at = data, 0

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self._data, self._at)
        self._at += struct.calcsize(f"<{code}")
        return value

    def skip(self, size: int) -> None:
        self._at += size

    def string(self) -> str:
        size = self.scalar("Q")
        self._at += size
        return self._data[self._at - size : self._at].decode("utf-8")

    def value(self, kind: int) -> Any:
        """Read a value; for an array, its length."""
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            return self.scalar(SCALARS[kind])
        inner, count = self.scalar("I"), self.scalar("Q")
        if inner in SCALARS:
            self.skip(count * struct.calcsize(f"<{SCALARS[inner]}"))
        elif inner == STRING:
            for _ in range(count):
                self.skip(self.scalar("Q"))
        else:
            for _ in range(count):
                self.value(inner)
        return count


def header(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Return (values by key, with an array's length for an array; the tensors' names). Raises UserError for another format."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:4] != b"GGUF" or struct.unpack_from("<I", data, 4)[0] not in (2, 3):
            raise UserError(f"{path} is no GGUF file of version 2 or 3.")
        cursor = _Cursor(data)
        cursor.skip(8)
        num_tensors, num_values = cursor.scalar("Q"), cursor.scalar("Q")
        values = {cursor.string(): cursor.value(cursor.scalar("I")) for _ in range(num_values)}
        names = []
        for _ in range(num_tensors):
            names.append(cursor.string())
            cursor.skip(8 * cursor.scalar("I") + 12)
    return values, names
