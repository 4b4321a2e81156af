"""Parts of policy-gradient objectives: advantages, ratios, estimates of the KL to the reference.

In: rewards of a group, then each sampled token's log-probability under the policy and the streams of a rollout. The
methods that combine them are in `policy_objectives`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from distill.records import Array
from distill.training.loss.head import Targets
from distill.training.loss.objective import StoredObjective

Kl = Literal["k3", "k2", "k3_ratio"]
ADVANTAGE_EPS = 1e-4


@dataclass(frozen=True, slots=True)
class PolicyObjective(StoredObjective):
    """A policy-gradient method: its loss, and how a rollout becomes the streams that the loss reads.

    scale: whether advantages are divided by the group's standard deviation. normalise: "sequence" gives 1/|o_i|
    to each token and divides by the number of completions; "token" divides by the number of tokens; "fixed" by
    completions x max_tokens. mask_truncated: completions cut at the limit are excluded from everything, denominators
    and baseline included; False: they are included with their reward. resample: the most times that the wanted number of
    problems may be sampled, in search of groups whose rewards differ.
    """

    scale: bool = True
    normalise: Literal["sequence", "token", "fixed"] = "sequence"
    mask_truncated: bool = True
    resample: int = 1


def advantages(rewards: Sequence[float | None], *, scale: bool = True) -> Array:
    """Group-relative advantages [G], float64: (r - mean) / (std + 1e-4), std with ddof 1 (DeepSeekMath, arXiv 2402.03300).

    A reward of None is excluded from the baseline and gets 0. All are exactly 0 if the rewards are equal (compared as
    numbers: the mean of seven 0.2s is not 0.2) or fewer than two are known. scale False omits the division.
    """
    known = np.array([r is not None for r in rewards], bool)
    values = np.array([r for r in rewards if r is not None], np.float64)
    out = np.zeros(len(rewards))
    if len(values) < 2 or (values == values[0]).all():
        return out
    centred = values - values.mean()
    out[known] = centred / (values.std(ddof=1) + ADVANTAGE_EPS) if scale else centred
    return out


def sequence_log_ratios(logp_T: Tensor, targets: Targets, trace_T: Tensor) -> Tensor:
    """Two log-ratios of whole traces, at every one of their tokens [T, 2], without a gradient.

    The mean over a trace's tokens of log pi/pi_old (GSPO's ratio), and the sum of log pi_old/pi_engine (the importance weight of
    a completion that another policy sampled; 0 without engine_logp_T). trace_T: which trace a token is of; a trace's tokens
    follow each other.
    """
    old_T = old_logp(logp_T, targets)
    gaps_T2 = torch.zeros(len(logp_T), 2, dtype=logp_T.dtype, device=logp_T.device)
    gaps_T2[:, 0] = logp_T.detach() - old_T
    if targets.engine_logp_T is not None:
        gaps_T2[:, 1] = old_T - targets.engine_logp_T
    # Numbered anew from 0, so that there are at most T of them: the largest index would have to be waited for.
    first_T = torch.ones_like(trace_T)
    first_T[1:] = trace_T[1:] != trace_T[:-1]
    index_T = first_T.cumsum(0) - 1
    sums_T2 = torch.zeros_like(gaps_T2).index_add_(0, index_T, gaps_T2)
    counts_T = torch.zeros_like(gaps_T2[:, 0]).index_add_(0, index_T, torch.ones_like(gaps_T2[:, 0]))
    sums_T2[:, 0] /= counts_T.clamp(min=1)
    return sums_T2[index_T]


def policy_kl(logp_T: Tensor, targets: Targets, kl: Kl) -> Tensor:
    """An estimate of KL(policy || reference) at each sampled token, nats [T] (Schulman's k estimators).

    k3 = e^d - d - 1: unbiased, never negative; its gradient is not the KL's. k2 = d^2 / 2: biased, and its gradient
    is the KL's. k3_ratio = rho k3 (DeepSeek-V3.2, arXiv 2512.02556): unbiased off policy too, gradient included.
    """
    d_T = required(targets.ref_logp_T) - logp_T
    if kl == "k2":
        return 0.5 * d_T.square()
    k3_T = torch.expm1(d_T) - d_T
    return k3_T if kl == "k3" else (logp_T - old_logp(logp_T, targets)).exp() * k3_T


def old_logp(logp_T: Tensor, targets: Targets) -> Tensor:
    """Log-probabilities of the policy that wrote the rollout; before any update these are the policy's own, detached."""
    return logp_T.detach() if targets.old_logp_T is None else targets.old_logp_T


def required(values: Tensor | None) -> Tensor:
    """Return a stream that every rollout has; fail if it is missing."""
    assert values is not None, "a rollout's batches carry this stream"
    return values
