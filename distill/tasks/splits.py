"""Split problems into training and held-out ones by their content only.

A hash of its normalised text decides whether a problem is held out (one in ten), whatever its task, seed or
position. So training and evaluation draw from disjoint sets, two tasks with the same question agree, and a file of training
rows can be checked without knowing its origin.
"""

from __future__ import annotations

import re
import unicodedata

from distill.records import Split, stable_hash

HELD_OUT_EVERY = 10
"""One problem in this many is held out."""

# Zero-width characters, soft hyphens and byte-order marks: invisible, so they do not change a problem.
_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u2060\ufeff]")


def normalise(text: str) -> str:
    """Normalise what does not change a problem: width, case, whitespace, invisible characters."""
    folded = unicodedata.normalize("NFKC", _INVISIBLE.sub("", text)).casefold()
    return " ".join(folded.split())


def content_hash(question: str) -> str:
    """Return the hash of the normalised question; equal for questions that differ in formatting only."""
    return stable_hash("content", normalise(question))


def problem_id(source: str, question: str) -> str:
    """Return a problem's identity: its source (a generator, a data set) and its normalised content."""
    return stable_hash(source, normalise(question))


def split_of(question: str) -> Split:
    """Return a question's split, from its content only."""
    return _split_of_hash(content_hash(question))


def is_held_out(question: str) -> bool:
    """Return whether a question must not be trained on."""
    return split_of(question) == "held_out"


def _split_of_hash(content: str) -> Split:
    return "held_out" if int(content, 16) % HELD_OUT_EVERY == 0 else "train"
