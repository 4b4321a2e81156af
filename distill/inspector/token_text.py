"""The text that a page shows for a token: its bytes decoded, with control characters and partial characters made visible.

Input: token pieces as a tokenizer names them. Output: text in which control characters, bidirectional overrides and bytes
that are not a whole character appear as ‹U+0000›, ‹U+202E›, ‹F0 9F›. A character made of several tokens is shown at the
token that completes it. Escaping for HTML is not done here.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Collection, Iterable, Sequence

from distill.printable import CONTROLS

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """Character -> byte, as byte-level BPE writes bytes (Radford et al. 2019)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_ALPHABET = _byte_alphabet()


def piece_bytes(pieces: Sequence[str | None], byte_level: bool, added: Collection[str] = ()) -> list[bytes]:
    """The bytes of each piece.

    pieces: as `convert_ids_to_tokens` returns them; None (an id without a piece) gives no bytes. byte_level: whether the
    tokenizer writes bytes as characters, as GPT-2's does; otherwise ▁ is a space and <0x0A> a byte, as in SentencePiece.
    added: pieces that are literal text (special tokens).
    """
    found = []
    for piece in pieces:
        if piece is None:
            found.append(b"")
        elif piece in added or (byte_level and not all(char in _ALPHABET for char in piece)):
            found.append(piece.encode("utf-8", "replace"))
        elif byte_level:
            found.append(bytes(_ALPHABET[char] for char in piece))
        elif match := _BYTE_PIECE.fullmatch(piece):
            found.append(bytes([int(match[1], 16)]))
        else:
            found.append(piece.replace("\u2581", " ").encode("utf-8", "replace"))
    return found


def shown(data: bytes) -> str:
    """Bytes as text: invalid UTF-8 in hexadecimal, control characters by code point."""
    parts, rest, bad = [], data, b""
    while rest:
        try:
            text, broken = rest.decode("utf-8"), b""
        except UnicodeDecodeError as error:
            text, broken = rest[: error.start].decode("utf-8"), rest[error.start : error.end]
        rest = rest[len(text.encode("utf-8")) + len(broken) :]
        if text:
            parts += [_hex(bad), visible(text)]
            bad = b""
        bad += broken
    return "".join([*parts, _hex(bad)])


def visible(text: str) -> str:
    """The text with control characters, bidirectional overrides and lone surrogates by code point.

    Line feeds and tabs stay as they are.
    """
    return CONTROLS.sub(lambda match: f"‹U+{ord(match[0]):04X}›", text)


def is_partial(data: bytes) -> bool:
    """Whether the bytes are not whole UTF-8 characters."""
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return True
    return False


def completed(pieces: Iterable[bytes]) -> dict[int, str]:
    """Position -> text of each token that completes a character begun by an earlier token of the same text."""
    found: dict[int, str] = {}
    decoder = codecs.getincrementaldecoder("utf-8")("strict")
    for position, piece in enumerate(pieces):
        waiting = bool(decoder.getstate()[0])
        try:
            text = decoder.decode(piece)
        except UnicodeDecodeError:
            decoder.reset()
            if waiting and not is_partial(piece):
                continue
            try:
                decoder.decode(piece)
            except UnicodeDecodeError:
                decoder.reset()
            continue
        if waiting and text:
            found[position] = visible(text) + _hex(decoder.getstate()[0])
    return found


def _hex(data: bytes) -> str:
    return f"‹{data.hex(' ').upper()}›" if data else ""
