"""Split problems into train and held-out ones by their content alone.

The hash of a problem's normalised text decides: one problem in ten is held out, independent of task, seed or position.
So training and evaluation never share a problem, two tasks with the same question agree on its split, and a file of
training rows can be checked without knowing its origin.
"""

from __future__ import annotations

import re
import unicodedata

from distill.records import Split, stable_hash

HELD_OUT_EVERY = 10
"""One problem in this many is held out."""

# Zero-width characters, soft hyphens and byte-order marks are invisible; they do not make a different problem.
_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u2060\ufeff]")


def normalise(text: str) -> str:
    """The text without differences that do not matter: character width, case, whitespace, invisible characters."""
    folded = unicodedata.normalize("NFKC", _INVISIBLE.sub("", text)).casefold()
    return " ".join(folded.split())


def content_hash(question: str) -> str:
    """Hash of the normalised question; equal for questions that differ only in formatting."""
    return stable_hash("content", normalise(question))


def problem_id(source: str, question: str) -> str:
    """Id of a problem: a hash of its source (a generator, a dataset) and its normalised content."""
    return stable_hash(source, normalise(question))


def split_of(question: str) -> Split:
    """The split of a question, by its content only."""
    return _split_of_hash(content_hash(question))


def is_held_out(question: str) -> bool:
    """Whether a question is held out and must not be trained on."""
    return split_of(question) == "held_out"


def _split_of_hash(content: str) -> Split:
    return "held_out" if int(content, 16) % HELD_OUT_EVERY == 0 else "train"
