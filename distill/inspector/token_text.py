"""What a token looks like on a page: its bytes, as text that shows all there is and does nothing.

Comes in: pieces as a tokenizer names them. Goes out: text where control characters, turned reading direction
and bytes that are no character yet are visible (‹U+0000›, ‹U+202E›, ‹F0 9F›). A character that several tokens spell
stands at the one that completes it. Left out on purpose: loading tokenizers, and escaping for HTML.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Collection, Iterable, Sequence

from distill.printable import CONTROLS

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """The printable character that byte-level BPE writes for each byte (Radford et al. 2019)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_ALPHABET = _byte_alphabet()


def piece_bytes(pieces: Sequence[str | None], byte_level: bool, added: Collection[str] = ()) -> list[bytes]:
    """The bytes that each piece stands for.

    pieces: as `convert_ids_to_tokens` names them; None (an id without a piece) gives no bytes. byte_level: the
    tokenizer spells bytes as characters, as GPT-2 does; otherwise ▁ is a space and <0x0A> a byte, as
    SentencePiece has it. added: pieces that stand for themselves (special tokens).
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
    """Bytes as text: what is no UTF-8 stands as hexadecimal, what acts rather than shows as its name."""
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
    """Text with what acts rather than shows (controls, turned reading direction, lone surrogates) by its number.

    Line feeds and tabs stay.
    """
    return CONTROLS.sub(lambda match: f"‹U+{ord(match[0]):04X}›", text)


def is_partial(data: bytes) -> bool:
    """Whether bytes are not whole characters."""
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return True
    return False


def completed(pieces: Iterable[bytes]) -> dict[int, str]:
    """For the tokens of one text: what those that complete a character begun by an earlier one show, by position."""
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
