"""Rows of log-probabilities for a completion: its token, the most probable ids, the mass of all others, and draws from those.

The tail's mass is summed over the other ids. As 1 - sum of the top entries it would be the rounding error of float32
log-probabilities where it is small: a hundredth of a nat off already at a mass of 1e-4.

Shapes: B rows, V vocabulary, K top entries, N draws.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class HeadRows:
    """ids, logp [B, 1 + K + N]: the token itself, the K most probable ids, N draws from the rest. tail_B: log of its mass (K = 0: 0)."""

    ids: Tensor
    logp: Tensor
    tail_B: Tensor


def head_rows(logp_BV: Tensor, token_B: Tensor, top_k: int, uniform_BN: Tensor | None = None) -> HeadRows:
    """Pick rows from log-probabilities, which are overwritten.

    token_B: int64. uniform_BN: numbers in [0, 1), one for each draw from the ids beyond the top_k: the inverse of their cumulative
    distribution, in the order of ids. Where there is no such id the draws' log-probabilities are -inf.
    """
    top_logp, top_ids = logp_BV.topk(min(top_k, logp_BV.shape[1]), dim=-1)
    token_B1 = token_B[:, None]
    ids, logp = [token_B1, top_ids], [logp_BV.gather(1, token_B1), top_logp]
    if not top_k:
        return HeadRows(torch.cat(ids, dim=1).to(torch.int32), torch.cat(logp, dim=1), torch.zeros_like(logp[0][:, 0]))
    rest_BV = logp_BV.scatter_(1, top_ids, -torch.inf).exp_()
    tail_B = rest_BV.sum(1).log()
    if uniform_BN is not None:
        total_BV = rest_BV.cumsum(1)
        point_BN = uniform_BN.to(total_BV) * total_BV[:, -1:]
        drawn_BN = torch.searchsorted(total_BV, point_BN, right=True).clamp(max=logp_BV.shape[1] - 1)
        ids.append(drawn_BN)
        logp.append(rest_BV.gather(1, drawn_BN).log())
    return HeadRows(torch.cat(ids, dim=1).to(torch.int32), torch.cat(logp, dim=1), tail_B)
