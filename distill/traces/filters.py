"""Filters: which traces of a problem are kept. Every public function here can be named in a recipe's `keep`.

A filter gets all traces of one problem, in the order of their samples, and returns one flag a trace; its
keyword-only arguments are its options. It always sees the whole group, so the order of filters does not matter: a trace
is kept if every filter flags it. Groups carry text, ids and verdicts;
`logprob` and `top` are not read. The first line of a filter's docstring says what it keeps; the line `Dropped:` is the reason
that the report gives.

DeepSeek-R1 kept a trace for its students when it was correct and its reasoning had no mixed languages, no long
paragraphs and no code blocks (section 2.3.3 of the paper, without figures): `correct`, `finished`, `language`,
`paragraphs` and `code_blocks` are those. The reasoning is what `reasoning_of` finds, as for the reward `language`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import Annotated

import numpy as np
from pydantic import Field
from rapidfuzz import process
from rapidfuzz.distance import Indel

from distill.language import language_share
from distill.plug import nearest
from distill.reasoning import reasoning_of
from distill.records import Array, Messages, Traces, UserError
from distill.traces.contamination import HeldOut

Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]

_PARAGRAPH = re.compile(r"\n[^\S\n]*\n")
_FENCE = re.compile(r"^[^\S\n]*(`{3,}|~{3,})", re.MULTILINE)


def correct(group: Traces) -> Array:
    """Keep traces that were judged correct.

    Dropped: judged wrong, or could not be judged
    """
    return np.array([flag is True for flag in group.correct], bool)


def finished(group: Traces) -> Array:
    """Keep traces that ended at a stop token.

    Dropped: ended at the token limit, not at a stop token
    """
    return np.array([reason == "stop" for reason in group.finish_reason], bool)


def length(group: Traces, *, min_tokens: Count = 0, max_tokens: Count | None = None) -> Array:
    """Keep completions of min_tokens to max_tokens tokens.

    Dropped: completion shorter than min_tokens or longer than max_tokens
    """
    tokens = group.completion_ids.lengths
    upper = np.inf if max_tokens is None else max_tokens
    return np.asarray((tokens >= min_tokens) & (tokens <= upper))


def duplicates(group: Traces) -> Array:
    """Keep the first of samples with the same text.

    Dropped: the same text as an earlier sample of the problem
    """
    first = {text: row for row, text in reversed(list(enumerate(group.completion)))}
    return np.array([first[text] == row for row, text in enumerate(group.completion)], bool)


def near_duplicates(group: Traces, *, threshold: Annotated[float, Field(gt=0, le=1)] = 0.9) -> Array:
    """Keep the first of samples with nearly the same text.

    Dropped: nearly the same text as an earlier sample of the problem that was kept

    Similarity of two texts: 2 L / (words of one + words of the other), L the length of their longest common
    subsequence of words (case ignored); dropped from `threshold` on. Exact, no sketch: a group is small.
    """
    words = [text.casefold().split() for text in group.completion]
    counts = [Counter(each) for each in words]
    flags = np.ones(len(words), bool)
    for row in range(1, len(words)):
        close = [words[n] for n in np.flatnonzero(flags[:row]) if _shared(counts[row], counts[n]) >= threshold - 1e-9]
        near = process.extractOne(
            words[row],
            close,
            scorer=Indel.normalized_similarity,
            processor=None,
            score_cutoff=threshold,
        )
        flags[row] = near is None
    return flags


def language(group: Traces, *, target: str = "en", min_share: Share = 0.9) -> Array:
    """Keep reasoning in the target language.

    Dropped: reasoning with too few words of the target language

    Judges the same span as the reward `language` (`reasoning_of`). Reasoning that cannot be judged (figures and formulas
    only) is kept: no other language is in it.
    """
    shares = [language_share(reasoning_of(text), target) for text in group.completion]
    return np.array([share is None or share >= min_share for share in shares], bool)


def paragraphs(group: Traces, *, max_chars: Count | None = 2000, max_words: Count | None = None) -> Array:
    """Keep reasoning without long paragraphs.

    Dropped: reasoning with a paragraph longer than max_chars or max_words

    Paragraphs are parted by empty lines.
    """
    chars_limit = math.inf if max_chars is None else max_chars
    words_limit = math.inf if max_words is None else max_words
    return np.array(
        [
            all(
                len(part.strip()) <= chars_limit and len(part.split()) <= words_limit
                for part in _PARAGRAPH.split(reasoning_of(text))
            )
            for text in group.completion
        ],
        bool,
    )


PROMPT_FILTERS = frozenset({"decontaminate"})
"""Filters that look at prompts only: what they keep does not depend on the completions."""


def code_blocks(group: Traces, *, max_blocks: Count = 0) -> Array:
    """Keep reasoning with at most max_blocks fenced code blocks.

    Dropped: reasoning with more than max_blocks fenced code blocks

    A block is enclosed by lines that start with three or more backticks or tildes; one that is never closed
    counts. Code in the answer, after the reasoning, is ignored.
    """
    return np.array([_num_blocks(reasoning_of(text)) <= max_blocks for text in group.completion], bool)


def decontaminate(group: Traces, held_out: HeldOut, *, against: str, ngram: Count = 10) -> Array:
    """Keep problems that share nothing with the evaluation set `against`.

    Dropped: the problem, or ngram words in a row of it, is in the evaluation set `against`

    against: a task of the recipe (its held-out problems) or a JSONL file of problems, which arrives here as held_out.
    Generated problems share their template's words, so only whole problems are compared.
    """
    known: dict[str, bool] = {}
    for prompt in group.messages:
        for text in _questions(prompt):
            if text not in known:
                known[text] = held_out.holds(text, ngram)
    return np.array([not any(known[text] for text in _questions(p)) for p in group.messages], bool)


def best_of_n(group: Traces, *, n: Annotated[int, Field(ge=1)] = 1, reward: str | None = None) -> Array:
    """Keep the n traces of highest reward.

    Dropped: not among the n of highest reward (equal rewards: correct first, then the earlier sample)

    reward: a named reward that the traces carry; None = their `reward`, which is the weighted sum where the stage that wrote
    them names rewards, else the verdict's score. Raises UserError for a name that no trace of the group has.
    """
    if reward is not None and reward not in group.rewards:
        raise UserError(f"keep.best_of_n.reward: the traces have no reward {reward!r}.{nearest(reward, group.rewards)}")
    column = group.reward if reward is None else group.rewards[reward]
    values = [math.nan if value is None else value for value in column]
    judged = [row for row, value in enumerate(values) if not math.isnan(value)]
    best = sorted(judged, key=lambda row: (-values[row], group.correct[row] is not True, row))[:n]
    flags = np.zeros(len(group), bool)
    flags[best] = True
    return flags


def pass_rate(group: Traces, *, low: Share = 0.0, high: Share = 1.0) -> Array:
    """Keep problems whose share of correct samples is low..high.

    Dropped: share of the problem's correct samples outside low..high
    """
    judged = [flag for flag in group.correct if flag is not None]
    rate = sum(judged) / len(judged) if judged else math.nan
    return np.full(len(group), low <= rate <= high)


def _shared(one: Counter[str], other: Counter[str]) -> float:
    """Return the number of words that two texts share in any order: an upper bound of the subsequence, and quicker."""
    total = one.total() + other.total()
    return 2 * (one & other).total() / total if total else 1.0


def _num_blocks(text: str) -> int:
    """Count fenced blocks; a fence is closed by one of the same character that is at least as long."""
    num, opened = 0, ""
    for fence in _FENCE.findall(text):
        if not opened:
            num, opened = num + 1, fence
        elif fence[0] == opened[0] and len(fence) >= len(opened):
            opened = ""
    return num


def _questions(messages: Messages) -> list[str]:
    return [message["content"] for message in messages if message["role"] == "user"]
