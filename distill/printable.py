"""Untrusted text made safe to display: control characters are replaced."""

from __future__ import annotations

import re

CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)
"""Terminal controls, bidirectional overrides, line and paragraph separators, byte-order marks, lone surrogates."""


def printable(text: str) -> str:
    r"""The text with line ends as \n and every character of `CONTROLS` replaced by U+FFFD."""
    return CONTROLS.sub("\ufffd", text.replace("\r\n", "\n").replace("\r", "\n"))
