"""The bytes that each id of a tokenizer stands for."""

from __future__ import annotations

from typing import Any


def vocabulary_bytes(tokenizer: Any) -> list[bytes] | None:
    """Return the bytes of every id; of an added or special token those of its text, b"" for an id without a token.

    None for a tokenizer that is neither byte-level nor sentencepiece-like: the bytes of its tokens are not known.
    """
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    if any(token.startswith("Ġ") for token in vocabulary):
        table = {char: byte for byte, char in _byte_characters().items()}

        def decode(token: str) -> bytes:
            return bytes(table[char] for char in token)

    elif any(token.startswith("▁") for token in vocabulary):

        def decode(token: str) -> bytes:
            if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                return bytes([int(token[3:5], 16)])
            return token.replace("▁", " ").encode()

    else:
        return None
    found = [b""] * (max(vocabulary.values(), default=-1) + 1)
    added = tokenizer.added_tokens_decoder
    for token, index in vocabulary.items():
        found[index] = str(added[index].content).encode() if index in added else decode(token)
    return found


def _byte_characters() -> dict[int, str]:
    """Return the printable character that byte-level vocabularies use for each byte (GPT-2's table)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {b: chr(256 + n) for n, b in enumerate(others)}
