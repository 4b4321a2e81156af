"""Lines of YAML with a comment beside each: what a person writes, not what a library dumps."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

PLAIN = re.compile(r"[A-Za-z_./~][\w./~@$+-]*(://[\w./~@:+-]+)?")
WORDS = frozenset({"true", "false", "null", "yes", "no", "on", "off", "y", "n", "~"})
COMMENTS_AT = 46
"""Column at which comments begin, where the value leaves room."""
WIDTH = 150


def scalar(value: Any) -> str:
    """A value as YAML reads it back: text is quoted where it would mean something else."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {scalar(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(scalar(each) for each in value) + "]"
    if isinstance(value, str) and not (PLAIN.fullmatch(value) and value.lower() not in WORDS):
        return json.dumps(value, ensure_ascii=False)
    return str(value)


class Lines:
    """A text that grows line by line."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def comment(self, text: str, depth: int = 0) -> None:
        """Add a comment, wrapped, on lines of its own."""
        import textwrap

        indent = "  " * depth
        self.lines += [
            f"{indent}# {line}" for line in textwrap.wrap(text, WIDTH - len(indent) - 2, break_long_words=False)
        ]

    def key(self, depth: int, key: str, value: Any = None, why: str = "") -> None:
        """Add `key: value  # why`. value: None for a section; numbers that are given as text stay as they are written."""
        text = f"{'  ' * depth}{key}:" + ("" if value is None else f" {value if key == 'lr' else scalar(value)}")
        self.lines.append(f"{text:<{COMMENTS_AT}}  # {why}" if why else text)

    def text(self) -> str:
        return "\n".join(self.lines) + "\n"
