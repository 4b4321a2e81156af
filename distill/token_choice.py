"""Which tokens of a completion are learned, or stored with their distribution: a score a token, the highest share kept.

A function of `token_weights` gives every token of one completion a score; the `share` of tokens with the highest scores is
kept (weight 1) and the others are left out (weight 0). Equal scores: the earlier token is kept first. The choice is made trace
by trace, so it does not depend on packing, batches or the number of processes, and the number kept follows from the
completion's length alone.

In: ids, and the stored distribution where there is one. Out: the tokens that are kept.

Shapes: C tokens of a completion, K entries a token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from distill.records import Array, TopK, UserError

PREFIX = "prefix"
"""The function that keeps the first tokens: which they are follows from the completion's length alone."""


@dataclass(frozen=True, slots=True, eq=False)
class TokenValues:
    """One completion, as a function that scores its tokens sees it.

    completion_ids int [C]. ids_CK (-1 = no entry), logp_CK (-inf there) and tail_C (log of the mass outside the entries): the
    stored distributions, nats; None where the data hold none.
    """

    completion_ids: Array
    ids_CK: Array | None = None
    logp_CK: Array | None = None
    tail_C: Array | None = None

    def __len__(self) -> int:
        return len(self.completion_ids)

    def at(self, kept_C: Array) -> TokenValues:
        """Return the values at some of the tokens."""
        if self.ids_CK is None or self.logp_CK is None or self.tail_C is None:
            return TokenValues(self.completion_ids[kept_C])
        return TokenValues(self.completion_ids[kept_C], self.ids_CK[kept_C], self.logp_CK[kept_C], self.tail_C[kept_C])

    @staticmethod
    def of(completion_ids: Array, top: Any) -> TokenValues:
        """top: a TopK, a mixture of several teachers', or None."""
        if top is None:
            return TokenValues(completion_ids)
        ids_CK, logp_CK = top.dense(top.width)
        return TokenValues(completion_ids, ids_CK, logp_CK, top.tail_T)


ScoreTokens = Callable[[TokenValues], Array]


def num_kept(num: int, share: float) -> int:
    """The number of tokens kept of `num`: the share, rounded up; at least one of any."""
    return max(math.ceil(round(num * share, 6)), min(num, 1))


def keep_highest(score_C: Array, share: float) -> Array:
    """Return which tokens are kept, bool [C]: those with the highest scores; of equal ones the earlier."""
    kept_C = np.zeros(len(score_C), bool)
    kept_C[np.argsort(-score_C, kind="stable")[: num_kept(len(score_C), share)]] = True
    return kept_C


def choose(score: ScoreTokens, tokens: TokenValues, share: float, where: str) -> Array:
    """Return which tokens a function keeps, bool [C]. Raises UserError if it does not return a finite score a token."""
    score_C = np.asarray(score(tokens), np.float64)
    if score_C.shape != (len(tokens),) or not np.isfinite(score_C).all():
        wrong = (
            f"an array of shape {score_C.shape}" if score_C.shape != (len(tokens),) else "scores that are not finite"
        )
        raise UserError(
            f"{where}: the function returned {wrong} for {len(tokens)} tokens; return one finite score a token."
        )
    return keep_highest(score_C, share)


def only(top: TopK, kept_T: Array) -> TopK:
    """Return the distributions at the kept positions; the others have no entry and a tail of mass 1 (log 0.0)."""
    count_T = np.where(kept_T, top.count_T, 0).astype(np.asarray(top.count_T).dtype)
    kept_E = np.repeat(kept_T, top.count_T)
    return TopK(count_T, top.ids_E[kept_E], top.logp_E[kept_E], np.where(kept_T, top.tail_T, 0.0).astype(np.float32))
