"""Reading JSON lines that others wrote: one object a line, and no line can take the others down.

In: a file. Out: (line number, object). A line that is not UTF-8, holds a NUL or half a surrogate pair, is
longer than the limit or is no JSON object is handed to `on_reject` with its number and the reason; without
`on_reject` it is an error. The file is streamed, a line at a time, and an overlong line is never held whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from distill.records import Message, UserError

MAX_LINE_BYTES = 10 * 2**20
_ROLES = ("system", "user", "assistant", "tool")

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
        raise UserError(f"{path}: cannot be read: {error.strerror}.") from None
    with file:
        for number, line in _lines(file, max_line_bytes):
            if line is not None and not line.strip():
                continue
            try:
                if line is None:
                    raise ValueError(f"longer than {max_line_bytes:,} bytes")
                row = _parse(line)
            except ValueError as error:
                if on_reject is None:
                    raise UserError(f"{path}: line {number}: {error}.") from None
                on_reject(number, str(error))
                continue
            yield number, row


def conversation(row: Mapping[str, Any]) -> tuple[tuple[Message, ...], str | None]:
    """(the messages that pose the problem, the reply) of a row.

    Rows are `{"messages": [...]}`, whose last message is the reply if it is the assistant's, or
    `{"question": ...}`; a `completion` beside either is the reply. Raises ValueError with the reason.
    """
    if "messages" in row:
        messages = _messages(row["messages"])
        reply = None
        if messages and messages[-1]["role"] == "assistant":
            messages, reply = messages[:-1], messages[-1]["content"]
        if not any(message["role"] == "user" for message in messages):
            raise ValueError("messages: no user message before the reply")
    else:
        messages = ({"role": "user", "content": text_field(row, "question")},)
        reply = None
    if "completion" in row:
        reply = text_field(row, "completion")
    return messages, reply


def text_field(row: Mapping[str, Any], key: str) -> str:
    """A field that must be text with something in it; raises ValueError with the reason."""
    if key not in row:
        raise ValueError(f"key {key!r} is missing (there are: {', '.join(sorted(row)) or 'none'})")
    value = row[key]
    if not isinstance(value, str):
        raise ValueError(f"{key!r} is {type(value).__name__}, not text")
    if not value.strip():
        raise ValueError(f"{key!r} is empty")
    return value


def _messages(value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError("'messages' is not a list of messages")
    for message in value:
        if not isinstance(message, dict):
            raise ValueError("a message is not an object with role and content")
        if message.get("role") not in _ROLES:
            raise ValueError(f"a message's role is {message.get('role')!r}, not one of {', '.join(_ROLES)}")
        text_field(message, "content")
    return tuple({"role": message["role"], "content": message["content"]} for message in value)


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
        row = json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} (column {error.colno})") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(row, dict):
        raise ValueError(f"is {type(row).__name__}, not an object")
    if "\\u" in text:
        _check_text(row)
    return row


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"not JSON: {name}")


def _check_text(value: Any) -> None:
    """Refuse what an escape can smuggle in: NUL and halves of surrogate pairs."""
    if isinstance(value, str):
        if "\0" in value:
            raise ValueError("holds a NUL character")
        if any("\ud800" <= char <= "\udfff" for char in value):
            raise ValueError("holds half of a surrogate pair")
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_text(key)
            _check_text(item)
    elif isinstance(value, list):
        for item in value:
            _check_text(item)
