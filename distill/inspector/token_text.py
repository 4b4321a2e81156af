"""Tokens as visible text for a page.

In: a tokenizer's pieces. Out: text in which control characters, changes of the reading direction and incomplete characters
are visible (‹U+0000›, ‹U+202E›, ‹F0 9F›). A character that several tokens spell is shown at the token that completes it.
Escaping for HTML is done by the caller.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Collection, Iterable, Sequence

from distill.printable import CONTROLS

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """Return the printable character that byte-level BPE uses for each byte (Radford et al. 2019)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_ALPHABET = _byte_alphabet()


def piece_bytes(pieces: Sequence[str | None], byte_level: bool, added: Collection[str] = ()) -> list[bytes]:
    """Return the bytes of each piece.

    pieces: from `convert_ids_to_tokens`; None (an id without a piece) gives no bytes. byte_level: the
    tokenizer spells bytes as characters, like GPT-2; otherwise ▁ is a space and <0x0A> a byte, like
    SentencePiece. added: pieces that are their own text (special tokens).
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
    """Return bytes as text: invalid UTF-8 as hexadecimal, control characters by code point."""
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
    """Replace control characters, changes of the reading direction and lone surrogates by their code points.

    Line feeds and tabs stay.
    """
    return CONTROLS.sub(lambda match: f"‹U+{ord(match[0]):04X}›", text)


def is_partial(data: bytes) -> bool:
    """Return whether bytes end within a character, or start within one."""
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return True
    return False


def completed(pieces: Iterable[bytes]) -> dict[int, str]:
    """Return the text of tokens that complete a character begun by an earlier token, by position."""
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
