"""Which problems may be trained on and which are held out, decided by their content alone.

A problem is held out if the hash of its normalised text says so (one in ten), whatever the task, seed or
position it comes from. So training and evaluation draw from sets that cannot meet, two tasks that pose the
same question agree, and a file of training rows can be checked without knowing where it came from.
"""

from __future__ import annotations

import re
import unicodedata

from distill.records import Split, stable_hash

HELD_OUT_EVERY = 10
"""One problem in this many is held out."""

# Zero-width characters, soft hyphens and byte-order marks: invisible, so they make no other problem.
_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u2060\ufeff]")


def normalise(text: str) -> str:
    """The text without what does not make another problem of it: width, case, whitespace, invisible marks."""
    folded = unicodedata.normalize("NFKC", _INVISIBLE.sub("", text)).casefold()
    return " ".join(folded.split())


def content_hash(question: str) -> str:
    """Hash of the normalised question; equal for questions that differ in formatting only."""
    return stable_hash("content", normalise(question))


def problem_id(source: str, question: str) -> str:
    """Identity of a problem: where it comes from (a generator, a dataset) and its normalised content."""
    return stable_hash(source, normalise(question))


def split_of(question: str) -> Split:
    """The split a question belongs to, from its content only."""
    return _split_of_hash(content_hash(question))


def is_held_out(question: str) -> bool:
    """Whether a question must not be trained on."""
    return split_of(question) == "held_out"


def _split_of_hash(content: str) -> Split:
    return "held_out" if int(content, 16) % HELD_OUT_EVERY == 0 else "train"
