"""Read JSON lines: one object a line; a bad line does not affect the others.

In: a file. Out: (line number, object). A line that is not UTF-8, holds a NUL or half a surrogate pair, is
longer than the limit or is no JSON object is handed to `on_reject` with its number and the reason; without
`on_reject` it is an error. The file is streamed, a line at a time, and an overlong line is never held whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from distill.errors import DataError

MAX_LINE_BYTES = 10 * 2**20

Reject = Callable[[int, str], None]


def read_rows(
    path: str | Path, on_reject: Reject | None = None, *, max_line_bytes: int = MAX_LINE_BYTES
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of every good line; empty lines are skipped.

    Raises UserError if the file cannot be read, and, where there is no `on_reject`, at the first bad line.
    """
    path = Path(path)
    try:
        file = path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}.") from None

    def refuse(number: int, reason: str) -> None:
        raise DataError(f"{path}: line {number}: {reason}.")

    with file:
        yield from rows(file, on_reject or refuse, max_line_bytes)


def rows(file: BinaryIO, reject: Reject, max_line_bytes: int = MAX_LINE_BYTES) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, object) of every good line of an open file; pass others to `reject`."""
    for number, line in _lines(file, max_line_bytes):
        if line is not None and not line.strip():
            continue
        try:
            if line is None:
                raise ValueError(f"longer than {max_line_bytes:,} bytes")
            row = _parse(line)
        except ValueError as error:
            reject(number, str(error))
            continue
        yield number, row


def _lines(file: BinaryIO, limit: int) -> Iterator[tuple[int, bytes | None]]:
    """Every line with its number; None for one that is over the limit."""
    number = 0
    while line := file.readline(limit + 1):
        number += 1
        if len(line) > limit and not line.endswith(b"\n"):
            while (more := file.readline(limit)) and not more.endswith(b"\n"):
                pass
            yield number, None
        else:
            yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


def _parse(line: bytes) -> dict[str, Any]:
    if b"\0" in line:
        raise ValueError("holds a NUL character")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start + 1})") from None
    try:
        row = json.loads(text, parse_constant=refuse_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} (column {error.colno})") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(row, dict):
        raise ValueError(f"is {type(row).__name__}, not an object")
    if "\\u" in text:
        check_text(row)
    return row


def refuse_constant(name: str) -> Any:
    raise ValueError(f"not JSON: {name}")


def check_text(value: Any) -> None:
    """Refuse what an escape can smuggle in: NUL and halves of surrogate pairs."""
    if isinstance(value, str):
        if "\0" in value:
            raise ValueError("holds a NUL character")
        if any("\ud800" <= char <= "\udfff" for char in value):
            raise ValueError("holds half of a surrogate pair")
    elif isinstance(value, dict):
        for key, item in value.items():
            check_text(key)
            check_text(item)
    elif isinstance(value, list):
        for item in value:
            check_text(item)
