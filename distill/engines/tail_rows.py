"""Rows of log-probabilities for a completion: its token, the most probable ids, the mass of all others, and draws from those.

The tail's mass is summed over the other ids. As 1 - sum of the top entries it would be the rounding error of float32
log-probabilities where it is small: a hundredth of a nat off already at a mass of 1e-4.

Shapes: B rows, V vocabulary, K top entries, N draws, G blocks of ids, W ids of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 256
"""Ids whose mass is summed up together."""


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
    mass_BG = _block_sums(rest_BV)
    if uniform_BN is not None:
        drawn_BN = _inverse(rest_BV, mass_BG, uniform_BN)
        ids.append(drawn_BN)
        logp.append(rest_BV.gather(1, drawn_BN).log())
    return HeadRows(torch.cat(ids, dim=1).to(torch.int32), torch.cat(logp, dim=1), mass_BG.sum(1).log())


def _block_sums(p_BV: Tensor) -> Tensor:
    """Return the mass of each BLOCK ids in a row, [B, G]."""
    whole = p_BV.shape[1] // BLOCK * BLOCK
    parts = [p_BV[:, :whole].view(len(p_BV), -1, BLOCK).sum(2)] if whole else []
    if whole < p_BV.shape[1]:
        parts.append(p_BV[:, whole:].sum(1, keepdim=True))
    return torch.cat(parts, dim=1)


def _inverse(p_BV: Tensor, mass_BG: Tensor, uniform_BN: Tensor) -> Tensor:
    """Return the ids at which the cumulative mass of a row passes uniform * total, [B, N]; their mass is not 0 if the total is not.

    Only the blocks with these ids are summed up one by one: a running sum over the vocabulary costs a third of its top-k.
    """
    vocab = p_BV.shape[1]
    sum_BG = mass_BG.cumsum(1)
    block_BN, left_BN = _passes(sum_BG, uniform_BN.to(p_BV) * sum_BG[:, -1:])
    ids_BNW = block_BN[:, :, None] * BLOCK + torch.arange(BLOCK, device=p_BV.device)
    p_BNW = p_BV.gather(1, ids_BNW.clamp(max=vocab - 1).flatten(1)).view(ids_BNW.shape).masked_fill(ids_BNW >= vocab, 0)
    within_BN1, _ = _passes(p_BNW.cumsum(2), left_BN[:, :, None])
    return (block_BN * BLOCK + within_BN1.squeeze(2)).clamp(max=vocab - 1)


def _passes(sums: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Return where running sums (last dimension) first pass each point, and what is left of the point there."""
    # Rounding must not put a point at the end, behind which only masked ids may lie.
    points = torch.minimum(points, torch.nextafter(sums[..., -1:], torch.zeros_like(sums[..., -1:])))
    index = torch.searchsorted(sums, points, right=True).clamp(max=sums.shape[-1] - 1)
    before = torch.where(index > 0, sums.gather(-1, (index - 1).clamp(min=0)), 0.0)
    return index, points - before
