"""Where a completion's reasoning ends and its answer begins, in tokens, for any family's markers.

In: a prompt and a completion's tokens as bytes. Out: the number of tokens of the reasoning; a token that holds the end of
the closing marker and the beginning of the answer belongs to both, and is cut there for display.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

from distill.inspector import token_text
from distill.reasoning import MARKERS, SHARED

_MARKS = [(opening.encode(), closing.encode()) for opening, closing in MARKERS]
_SHARED = [closing.encode() for closing in SHARED]
_NEXT_BLOCK = rb"\s*(?:<\|start\|>assistant)?"
"""What may stand between two blocks of reasoning that follow each other."""


class Sections(NamedTuple):
    """tokens: leading tokens that hold reasoning. split: of the last of them, the UTF-16 units of its text that belong to it;
    None if all do."""

    tokens: int
    split: int | None = None


def thinking(prompt: bytes, spelled: Sequence[bytes]) -> Sections:
    """Return the reasoning of a completion, its closing marker included.

    All tokens if it is opened (at the start of the completion, or at the end of the prompt) and never closed; none without
    a marker. As judges read it, the answer follows the last closing marker.
    """
    end = _end(prompt.rstrip(), b"".join(spelled))
    if end is None:
        return Sections(len(spelled))
    if not end:
        return Sections(0)
    reach = list(itertools.accumulate(map(len, spelled)))
    last = next(n for n, until in enumerate(reach) if until >= end)
    rest = reach[last] - end
    if not rest:
        return Sections(last + 1)
    inside = token_text.shown(spelled[last][: len(spelled[last]) - rest])
    return Sections(last + 1, len(inside.encode("utf-16-le", "surrogatepass")) // 2)


def _end(prompt: bytes, text: bytes) -> int | None:
    """Return the number of bytes up to the end of the reasoning; None if it does not end."""
    for opening, closing in _MARKS:
        begun = re.match(rb"\s*" + re.escape(opening), text)
        if begun or prompt.endswith(opening):
            return _closed(text, begun.end() if begun else 0, opening, closing)
    for opening, closing in _MARKS:
        place = text.find(closing)
        if place >= 0 and closing not in _SHARED and opening not in text[:place]:
            return text.rfind(closing) + len(closing)
    return 0


def _closed(text: bytes, start: int, opening: bytes, closing: bytes) -> int | None:
    """Return the end of reasoning that is open at `start`, or of the last of several blocks that follow each other."""
    while True:
        place = text.find(closing, start)
        if place < 0:
            return None
        end = place + len(closing)
        again = re.match(_NEXT_BLOCK + re.escape(opening), text[end:])
        if again is None:
            break
        start = end + again.end()
    return end if closing in _SHARED else text.rfind(closing) + len(closing)
