"""Where the documents ("docs") of a packed batch lie, in the forms that the ways of attention take.

A doc that continues others (`Batch.parent`) also sees all of their tokens, which were computed once for all that continue
them. `Padded`: blocks of similar length. `Spans`: docs end to end, for flash attention. `Nested`: three numbers a token, for
masks by token.

Shapes: N docs, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from distill.records import SHORT

SMALLEST = 16


class Block(NamedTuple):
    """B docs of similar length, padded to L tokens.

    prefix [B * P]: the packed tokens that each doc continues, padded to P; None if no doc has a parent.
    hidden bool [B or 1, 1, L, P + L]: True where a query must not see a key; None = causal by the fused kernel.
    before [B]: the number of tokens that each doc continues.
    """

    docs: int
    length: int
    prefix: Tensor | None
    hidden: Tensor | None
    before: Tensor

    def mask(self, window: int | None) -> Tensor | None:
        """Return `hidden` for attention to the last `window` tokens only; as it is for None."""
        if window is None:
            return self.hidden
        L, device = self.length, self.before.device
        P = 0 if self.prefix is None else len(self.prefix) // self.docs
        query_L, key_P = torch.arange(L, device=device), torch.arange(P, device=device)
        before_B11 = self.before[:, None, None]
        far_BLP = before_B11 + query_L[:, None] - key_P >= window
        hidden_BLP = far_BLP | (key_P >= before_B11)
        gap_LL = query_L[:, None] - query_L
        own_BLL = ((gap_LL < 0) | (gap_LL >= window)).expand(self.docs, L, L)
        return torch.cat([hidden_BLP, own_BLL], dim=2)[:, None]


@dataclass(frozen=True, slots=True)
class Padded:
    """The mapping between packed tokens and padded blocks.

    gather [padded tokens]: the packed token at each padded position (0 at padding). padding: positions without a token.
    scatter [T]: each packed token's padded position.
    """

    blocks: tuple[Block, ...]
    gather: Tensor
    padding: Tensor
    scatter: Tensor


@dataclass(frozen=True, slots=True)
class Spans:
    """The docs of a batch for flash attention, which takes them end to end.

    query_offsets, key_offsets int32 [N+1]: the start of each doc's own tokens, and of the tokens that it sees.
    num_queries, num_keys: the largest number of either in a doc. keys: the packed token of each key; None if they are all
    tokens in order.
    """

    query_offsets: Tensor
    key_offsets: Tensor
    num_queries: int
    num_keys: int
    keys: Tensor | None


@dataclass(frozen=True, slots=True)
class Nested:
    """The docs of a batch as nested intervals: a doc lies within those that it continues.

    enter, leave, place int32 [T]: token i sees token j if enter[j] <= enter[i] < leave[j] and place[j] <= place[i], where
    place counts a trace's tokens from 0, shared prefixes included.
    """

    enter: Tensor
    leave: Tensor
    place: Tensor


@dataclass(frozen=True)
class Layout:
    """The docs of a batch; made once per micro-batch, used by every layer.

    starts, lengths, before [N], on the CPU: each doc's first packed token, its number of tokens, and the number of tokens
    of its parents. prefixes: the packed positions of those, in order. longest: the length of the longest trace in tokens.
    """

    starts: Tensor
    lengths: Tensor
    before: Tensor
    prefixes: list[list[range]]
    longest: int
    device: torch.device

    @staticmethod
    def of(doc_offsets: Tensor, parent: Tensor | None = None, device: torch.device | None = None) -> Layout:
        """Build the layout from doc boundaries [N+1] and each doc's parent [N] (-1: none), best both on the CPU.

        device: of the tokens; None = that of doc_offsets.
        """
        offsets = doc_offsets.cpu()
        starts, lengths = offsets[:-1], offsets.diff()
        prefixes = _prefixes(starts.tolist(), lengths.tolist(), parent)
        before = torch.tensor([sum(map(len, prefix)) for prefix in prefixes])
        return Layout(starts, lengths, before, prefixes, int((lengths + before).max()), device or doc_offsets.device)

    def tokens(self, doc: int) -> Tensor:
        """Return the packed positions of all tokens that a doc's last one sees: those of its parents and its own."""
        start = int(self.starts[doc])
        return _tokens([*self.prefixes[doc], range(start, start + int(self.lengths[doc]))]).to(self.device)

    @cached_property
    def padded(self) -> Padded:
        """Return the docs in padded blocks; docs whose lengths round up to the same power of two share one."""
        starts, lengths, before, device = self.starts, self.lengths, self.before, self.device
        kinds = [
            (int(num) > 0, max(SMALLEST, 1 << (int(n) - 1).bit_length()))
            for n, num in zip(lengths, before, strict=True)
        ]
        blocks, parts = [], []
        for kind in sorted(set(kinds)):
            chosen = [i for i, k in enumerate(kinds) if k == kind]
            own = lengths[chosen, None]
            within = torch.arange(int(own.max()))[None]
            parts.append(torch.where(within < own, starts[chosen, None] + within, -1).flatten())
            num = within.shape[1]
            prefix = hidden = None
            if kind[0]:
                tokens = [_tokens(self.prefixes[i]) for i in chosen]
                prefix = pad_sequence(tokens, batch_first=True)
                place = torch.arange(prefix.shape[1])
                hidden = _hidden(before[chosen, None] <= place, num).to(device)
                prefix = prefix.flatten().to(device)
            elif num <= SHORT and device.type == "cpu":
                hidden = _hidden(torch.empty(1, 0, dtype=torch.bool), num)
            blocks.append(Block(len(chosen), num, prefix, hidden, before[chosen].to(device)))
        gather = torch.cat(parts)
        real = gather >= 0
        scatter = torch.empty(int(lengths.sum()), dtype=torch.long)
        scatter[gather[real]] = real.nonzero()[:, 0]
        padding = (~real).nonzero()[:, 0]
        return Padded(tuple(blocks), gather.clamp(min=0).to(device), padding.to(device), scatter.to(device))

    @cached_property
    def spans(self) -> Spans:
        """Return the docs end to end, each doc's prefix before its own tokens."""
        seen = self.lengths + self.before
        keys = None
        if int(self.before.max()):
            docs = zip(self.prefixes, self.starts.tolist(), self.lengths.tolist(), strict=True)
            keys = _tokens([r for prefix, start, num in docs for r in (*prefix, range(start, start + num))])
            keys = keys.to(self.device)
        query_offsets, key_offsets = (
            F.pad(counts.cumsum(0), (1, 0)).to(self.device, torch.int32) for counts in (self.lengths, seen)
        )
        return Spans(query_offsets, key_offsets, int(self.lengths.max()), int(seen.max()), keys)

    @cached_property
    def nested(self) -> Nested:
        """Return the docs as nested intervals: numbered depth first, so that a doc's descendants follow it."""
        starts = self.starts.tolist()
        by_start = {start: doc for doc, start in enumerate(starts)}
        parents = [by_start[prefix[-1].start] if prefix else -1 for prefix in self.prefixes]
        inside = [1] * len(starts)  # the doc and its descendants
        for doc in sorted(range(len(starts)), key=lambda doc: -len(self.prefixes[doc])):
            if parents[doc] >= 0:
                inside[parents[doc]] += inside[doc]
        enter, following = [0] * len(starts), {-1: 0}
        for doc in sorted(range(len(starts)), key=lambda doc: len(self.prefixes[doc])):
            enter[doc] = following[parents[doc]]
            following[parents[doc]] += inside[doc]
            following[doc] = enter[doc] + 1
        enter_N = torch.tensor(enter, dtype=torch.int32)
        place_T = torch.arange(int(self.lengths.sum())) + (self.before - self.starts).repeat_interleave(self.lengths)
        enter_T, leave_T = (
            each_N.repeat_interleave(self.lengths) for each_N in (enter_N, enter_N + torch.tensor(inside))
        )
        return Nested(*(each_T.to(self.device, torch.int32) for each_T in (enter_T, leave_T, place_T)))

    @cached_property
    def kept(self) -> dict[Any, Any]:
        """What a way of attention makes of the docs once, for all layers."""
        return {}


def _prefixes(starts: list[int], lengths: list[int], parent: Tensor | None) -> list[list[range]]:
    """Return the packed tokens before each doc's own: those of its parent's parents, then its parent's."""
    parents = [-1] * len(starts) if parent is None else parent.tolist()
    found: dict[int, list[range]] = {-1: []}

    def through(doc: int) -> list[range]:
        """Return the tokens of a doc's parents and its own."""
        if doc not in found:
            own = range(starts[doc], starts[doc] + lengths[doc])
            found[doc] = [*through(parents[doc]), own]
        return found[doc]

    return [through(doc) for doc in parents]


def _tokens(ranges: list[range]) -> Tensor:
    return torch.cat([torch.arange(r.start, r.stop) for r in ranges])


def _hidden(padding_BP: Tensor, num: int) -> Tensor:
    """Return a mask [B, 1, L, P + L], True at the padding of the prefixes and at later tokens among the L = num own ones."""
    later_LL = torch.ones(num, num, dtype=torch.bool).triu(1)
    B = len(padding_BP)
    both = [padding_BP[:, None].expand(B, num, -1), later_LL.expand(B, num, num)]
    return torch.cat(both, dim=2)[:, None]
