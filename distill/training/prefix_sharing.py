"""Share the computation of common prompt prefixes between the traces of a step.

`packing` computes each prefix once, `rank_split` keeps traces of one prompt together, `check` predicts what is saved.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from distill.records import Array

if TYPE_CHECKING:
    from distill.training.packing import Example

MAX_TOKENS = 2048
"""Tokens of prompt and completion up to which a trace takes part."""
MIN_TOKENS_SAVED = 16
"""The least number of tokens that sharing a prefix must save: about the cost of attention to one more doc."""


@dataclass(frozen=True, slots=True, eq=False)
class SharedPrefix:
    """A prompt prefix that several examples share: its ids, which continue those of its parent; computed once.

    end: the number of prompt tokens up to the end of ids, those of the parents included.
    """

    ids: Array
    parent: SharedPrefix | None
    end: int

    def with_parents(self) -> Iterator[SharedPrefix]:
        """Yield this prefix, its parent, that one's parent, …"""
        prefix: SharedPrefix | None = self
        while prefix is not None:
            yield prefix
            prefix = prefix.parent


@dataclass(frozen=True, slots=True, eq=False)
class ExampleWithPrefix:
    """An example and the shared prefix that it continues."""

    example: Example
    prefix: SharedPrefix | None = None

    @property
    def prefix_length(self) -> int:
        """The number of the example's prompt tokens that the prefix covers."""
        return self.prefix.end if self.prefix is not None else 0

    def prefixes(self) -> Iterator[SharedPrefix]:
        """Yield the prefix and its parents."""
        return iter(()) if self.prefix is None else self.prefix.with_parents()


ExampleGroup = list[ExampleWithPrefix]
"""Examples that are computed together because they share a prefix, or one alone."""


def group_by_prefix(examples: Sequence[Example], micro_tokens: int) -> list[ExampleGroup]:
    """Group examples that share a prefix, as many as fit a micro-batch; every other example is a group of one."""
    groups: list[ExampleGroup] = []
    held: set[SharedPrefix] = set()
    size = 0
    for placed in assign_prefixes(examples):
        added = [prefix for prefix in placed.prefixes() if prefix not in held]
        more = len(placed.example) - placed.prefix_length + sum(len(prefix.ids) for prefix in added)
        if not held.isdisjoint(placed.prefixes()) and size + more <= micro_tokens:
            groups[-1].append(placed)
            size, held = size + more, held.union(added)
        else:
            groups.append([placed])
            size, held = len(placed.example), set(placed.prefixes())
    return [group if len(group) > 1 else [ExampleWithPrefix(group[0].example)] for group in groups]


def assign_prefixes(examples: Sequence[Example]) -> list[ExampleWithPrefix]:
    """Sort the examples by prompt, so that those with a common prefix are neighbours, and give each its shared prefix.

    The prefixes form a tree: the prefix of all examples, then longer prefixes of parts of them. A level is made where it
    saves MIN_TOKENS_SAVED tokens. The last prompt token is never shared: it predicts the first token of its own example's
    completion.
    """
    short = [e for e in examples if len(e) <= MAX_TOKENS and len(e.prompt_ids)]
    short.sort(key=lambda e: e.prompt_ids.astype(">u4").tobytes())
    common = [_num_common(a.prompt_ids, b.prompt_ids) for a, b in itertools.pairwise(short)]
    prefixes: list[SharedPrefix | None] = [None] * len(short)
    runs = [(0, len(short))] if short else []
    while runs:
        first, end = runs.pop()
        if end - first < 2:
            continue
        shared, parent = min(common[first : end - 1]), prefixes[first]
        done = parent.end if parent is not None else 0
        if (shared - done) * (end - first - 1) >= MIN_TOKENS_SAVED:
            prefix = SharedPrefix(short[first].prompt_ids[done:shared], parent, shared)
            prefixes[first:end] = [prefix] * (end - first)
        cuts = [n + 1 for n in range(first, end - 1) if common[n] == shared]
        runs += itertools.pairwise([first, *cuts, end])
    placed = [ExampleWithPrefix(e, prefix) for e, prefix in zip(short, prefixes, strict=True)]
    return placed + [ExampleWithPrefix(e) for e in examples if len(e) > MAX_TOKENS or not len(e.prompt_ids)]


def _num_common(a: Array, b: Array) -> int:
    """Return the number of leading tokens that two prompts have in common, without the last token of either."""
    length = min(len(a), len(b)) - 1
    differs = np.flatnonzero(a[:length] != b[:length])
    return int(differs[0]) if len(differs) else length


def num_tokens(group: ExampleGroup) -> int:
    """Return the number of tokens computed for a group, each shared prefix once."""
    prefixes = {prefix for placed in group for prefix in placed.prefixes()}
    own = sum(len(placed.example) - placed.prefix_length for placed in group)
    return own + sum(len(prefix.ids) for prefix in prefixes)
