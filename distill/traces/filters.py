"""Filters: which traces of a problem are kept. Every public function here can be named in a recipe's `keep`.

A filter gets all traces of one problem, in the order of their samples, and returns one flag a trace; its
keyword-only arguments are its options. It always sees the whole group, whatever other filters say, so that
their order does not matter: a trace is kept when every filter flags it. Groups carry text, ids and verdicts;
`logprob` and `top` are not read. The first line of a filter's docstring is the reason its report gives.
"""

from __future__ import annotations

import math

import numpy as np

from distill.records import Array, Traces


def correct(group: Traces) -> Array:
    """judged wrong, or could not be judged"""
    return np.array([flag is True for flag in group.correct], bool)


def finished(group: Traces) -> Array:
    """ended at the token limit, not at a stop token"""
    return np.array([reason == "stop" for reason in group.finish_reason], bool)


def length(group: Traces, *, min_tokens: int = 0, max_tokens: int | None = None) -> Array:
    """completion shorter than min_tokens or longer than max_tokens"""
    tokens = group.completion_ids.lengths
    upper = np.inf if max_tokens is None else max_tokens
    return np.asarray((tokens >= min_tokens) & (tokens <= upper))


def duplicates(group: Traces) -> Array:
    """the same text as an earlier sample of the problem"""
    first = {text: row for row, text in reversed(list(enumerate(group.completion)))}
    return np.array([first[text] == row for row, text in enumerate(group.completion)], bool)


def best_of_n(group: Traces, *, n: int = 1) -> Array:
    """not among the n of highest reward (equal rewards: correct first, then the earlier sample)"""
    rewards = [math.nan if reward is None else reward for reward in group.reward]
    judged = [row for row, reward in enumerate(rewards) if not math.isnan(reward)]
    best = sorted(judged, key=lambda row: (-rewards[row], group.correct[row] is not True, row))[:n]
    flags = np.zeros(len(group), bool)
    flags[best] = True
    return flags


def pass_rate(group: Traces, *, low: float = 0.0, high: float = 1.0) -> Array:
    """share of the problem's correct samples outside low..high"""
    judged = [flag for flag in group.correct if flag is not None]
    rate = sum(judged) / len(judged) if judged else math.nan
    return np.full(len(group), low <= rate <= high)
