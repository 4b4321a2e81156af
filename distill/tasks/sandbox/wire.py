"""Frames between the trusted process and the child: marshal to the child, untrusted JSON back.

A reply is JSON in a frame of bounded length; its values become objects of exactly the built-in types.
"""

from __future__ import annotations

import json
import marshal
import os
import select
import time
from typing import Any

MAX_REPLY_BYTES = 8 * 2**20
MAX_KEYS = 10_000
"""The largest number of hashed items in one value: keys may be chosen to collide, which makes hashing quadratic."""


class FaultError(Exception):
    """A fault of the program: too slow, ended, too much output, an invalid reply. The message is the reason."""


def send(fd: int, message: Any, deadline: float) -> None:
    """Write a frame to a non-blocking pipe. Raises FaultError if the other side has ended or does not read in time."""
    body = marshal.dumps(message, 4)
    rest = memoryview(len(body).to_bytes(4, "big") + body)
    while rest:
        _, ready, _ = select.select([], [fd], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise FaultError("timeout")
        try:
            rest = rest[os.write(fd, rest) :]
        except BrokenPipeError:
            raise FaultError("ended early") from None


def receive(fd: int, deadline: float) -> list[Any]:
    """Return a frame's JSON, a list of at least a nonce and a kind. Raises FaultError without one in time."""
    length = int.from_bytes(_read(fd, 4, deadline), "big")
    if length > MAX_REPLY_BYTES:
        raise FaultError("output too long")
    try:
        reply = json.loads(_read(fd, length, deadline))
    except (ValueError, RecursionError):
        raise FaultError("bad reply") from None
    if not (isinstance(reply, list) and len(reply) >= 2 and all(isinstance(x, str) for x in reply[:2])):
        raise FaultError("bad reply")
    return reply


def _read(fd: int, size: int, deadline: float) -> bytes:
    parts: list[bytes] = []
    while size:
        ready, _, _ = select.select([fd], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise FaultError("timeout")
        part = os.read(fd, min(size, 1 << 20))
        if not part:
            raise FaultError("ended early")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def decode(value: Any) -> Any:
    """Return the value that the child's `encode` wrote, of exactly the built-in types. Raises FaultError for others."""
    try:
        return _Decoder().decode(value)
    except (ValueError, TypeError, LookupError, RecursionError, OverflowError):
        raise FaultError("bad reply") from None


class _Decoder:
    def __init__(self) -> None:
        self.num_keys = 0

    def decode(self, value: Any) -> Any:
        if not isinstance(value, list):
            if isinstance(value, dict | float):
                raise ValueError(value)
            return value  # None, a bool, an int or a string
        tag, *rest = value
        match tag:
            case "i":
                return int(rest[0], 16)
            case "f":
                return float.fromhex(rest[0])
            case "c":
                return complex(float.fromhex(rest[0]), float.fromhex(rest[1]))
            case "b":
                return bytes.fromhex(rest[0])
            case "l":
                return [self.decode(item) for item in rest[0]]
            case "t":
                return tuple([self.decode(item) for item in rest[0]])
            case "s":
                return set(self.hashed(rest[0]))
            case "z":
                return frozenset(self.hashed(rest[0]))
            case "d":
                keys = self.hashed([key for key, _ in rest[0]])
                return dict(zip(keys, [self.decode(item) for _, item in rest[0]], strict=True))
        raise ValueError(tag)

    def hashed(self, items: list[Any]) -> list[Any]:
        self.num_keys += len(items)
        if self.num_keys > MAX_KEYS:
            raise ValueError("too many keys")
        return [self.decode(item) for item in items]
