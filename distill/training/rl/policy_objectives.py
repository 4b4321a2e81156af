"""Policy-gradient objectives (GRPO and its relatives), with the conventions of each method.

Their losses are `[T]` and never reduced here; `packing` holds the one division. A recipe names an objective by its
function's name; keyword-only parameters are its options.

    rho  policy over the policy that wrote the rollout, at the sampled token; A advantage; G completions a group
    w    min(pi_old / pi_engine, importance_cap), a constant: a truncated importance weight that corrects for the small
         difference between the engine's probabilities and the trainer's (Yao et al. 2025); gspo's is of a whole completion
    d    log pi_ref - log pi

Before the first update after a rollout there is no old_logp_T: rho is then 1, with its gradient.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from distill.training.loss.head import Student, Targets
from distill.training.loss.objective import Couple
from distill.training.rl.advantages import (
    Kl,
    PolicyObjective,
    old_logp,
    policy_kl,
    required,
    sequence_log_ratios,
)

# ---------------------------------------------------------------------------------------------- objectives


def grpo(
    *,
    eps_low: NonNegativeFloat = 0.2,
    eps_high: NonNegativeFloat | None = None,
    beta: NonNegativeFloat = 0.001,
    kl: Kl = "k3",
    importance_cap: PositiveFloat | None = 2.0,
    mask_truncated: bool = True,
) -> PolicyObjective:
    """GRPO (DeepSeekMath, arXiv 2402.03300, equation 3; R1, arXiv 2501.12948: eps 10, beta 0.001).

    loss = -w min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A) + beta kl; a mean over each completion's tokens,
    then over completions; A divided by the group's standard deviation. eps_high: None = eps_low.
    """
    return _clipped_objective(
        eps_low, eps_high, beta, kl, importance_cap, mask_truncated, scale=True, normalise="sequence"
    )


def dapo(
    *,
    eps_low: NonNegativeFloat = 0.2,
    eps_high: NonNegativeFloat = 0.28,
    beta: NonNegativeFloat = 0.0,
    kl: Kl = "k3",
    importance_cap: PositiveFloat | None = 2.0,
    mask_truncated: bool = False,
    resample: PositiveInt = 3,
) -> PolicyObjective:
    """DAPO (arXiv 2503.14476): GRPO with a higher upper clip, one mean over all tokens, and dynamic sampling.

    Groups whose rewards are all equal are replaced by new ones; at most `resample` times the wanted problems are sampled,
    then such groups (A = 0) fill what is missing. DAPO's soft overlong punishment is the reward `length`.
    """
    return _clipped_objective(
        eps_low,
        eps_high,
        beta,
        kl,
        importance_cap,
        mask_truncated,
        scale=True,
        normalise="token",
        resample=resample,
    )


def dr_grpo(
    *,
    eps_low: NonNegativeFloat = 0.2,
    eps_high: NonNegativeFloat | None = None,
    beta: NonNegativeFloat = 0.0,
    kl: Kl = "k3",
    importance_cap: PositiveFloat | None = 2.0,
    mask_truncated: bool = False,
) -> PolicyObjective:
    """Dr. GRPO (arXiv 2503.20783): GRPO without division by the standard deviation.

    The sum over tokens is divided by completions x max_tokens whatever their lengths, so that long wrong answers are not
    favoured.
    """
    return _clipped_objective(
        eps_low, eps_high, beta, kl, importance_cap, mask_truncated, scale=False, normalise="fixed"
    )


def gspo(
    *,
    eps_low: NonNegativeFloat = 3e-4,
    eps_high: NonNegativeFloat = 4e-4,
    beta: NonNegativeFloat = 0.0,
    kl: Kl = "k3",
    importance_cap: PositiveFloat | None = 2.0,
    mask_truncated: bool = True,
) -> PolicyObjective:
    """GSPO (arXiv 2507.18071): GRPO with one ratio a completion, rho = exp(mean over its tokens of log pi/pi_old).

    w is of the completion too: exp(sum over its tokens of log pi_old/pi_engine), truncated (TRL's `sequence_truncate`). Every token carries its completion's ratio and a gradient of its own log-probability (the paper's GSPO-token
    form, whose value and gradient equal the sequence form's when A is one number a completion).
    """
    return _clipped_objective(
        eps_low,
        eps_high,
        beta,
        kl,
        importance_cap,
        mask_truncated,
        scale=True,
        normalise="sequence",
        couple=sequence_log_ratios,
    )


def cispo(
    *,
    ratio_max: PositiveFloat = 5.0,
    beta: NonNegativeFloat = 0.0,
    kl: Kl = "k3",
    importance_cap: PositiveFloat | None = 2.0,
    mask_truncated: bool = True,
) -> PolicyObjective:
    """CISPO (MiniMax-M1, arXiv 2506.13585): loss = -w sg(min(rho, ratio_max)) A log pi, one mean over all tokens.

    The ratio is clipped, not the update: every token keeps its gradient.
    """

    def loss(student: Student, targets: Targets) -> Tensor:
        logp_T, advantage_T = student.label_T, required(targets.advantage_T)
        ratio_T = (logp_T - old_logp(logp_T, targets)).exp().detach().clamp(max=ratio_max)
        policy_T = -ratio_T * advantage_T * logp_T
        return _with_correction_and_kl(policy_T, logp_T, targets, beta, kl, importance_cap)

    def measure(student: Student, targets: Targets) -> dict[str, Tensor]:
        logp_T = student.label_T
        clipped_T = (logp_T - old_logp(logp_T, targets)).exp() > ratio_max
        return {"clip_fraction": clipped_T.to(logp_T.dtype), **_kl_metrics(logp_T, targets)}

    return PolicyObjective(loss, measure, reference=beta > 0, normalise="token", mask_truncated=mask_truncated)


def _clipped_objective(
    eps_low: float,
    eps_high: float | None,
    beta: float,
    kl: Kl,
    importance_cap: float | None,
    mask_truncated: bool,
    *,
    scale: bool,
    normalise: Literal["sequence", "token", "fixed"],
    resample: int = 1,
    couple: Couple | None = None,
) -> PolicyObjective:
    """The clipped surrogate of PPO (arXiv 1707.06347, equation 7), which all but CISPO use."""
    low, high = 1.0 - eps_low, 1.0 + (eps_low if eps_high is None else eps_high)

    def loss(student: Student, targets: Targets) -> Tensor:
        logp_T, advantage_T = student.label_T, required(targets.advantage_T)
        ratio_T = _log_ratio(logp_T, targets).exp()
        policy_T = -torch.minimum(ratio_T * advantage_T, ratio_T.clamp(low, high) * advantage_T)
        return _with_correction_and_kl(policy_T, logp_T, targets, beta, kl, importance_cap)

    def measure(student: Student, targets: Targets) -> dict[str, Tensor]:
        logp_T = student.label_T
        ratio_T, advantage_T = _log_ratio(logp_T, targets).exp(), required(targets.advantage_T)
        clipped_T = ((ratio_T < low) & (advantage_T < 0)) | ((ratio_T > high) & (advantage_T > 0))
        return {"clip_fraction": clipped_T.to(logp_T.dtype), **_kl_metrics(logp_T, targets)}

    return PolicyObjective(
        loss,
        measure,
        couple,
        reference=beta > 0,
        scale=scale,
        normalise=normalise,
        mask_truncated=mask_truncated,
        resample=resample,
        couples_engine=couple is not None and importance_cap is not None,
    )


# --------------------------------------------------------------------------------------------------- parts


def _with_correction_and_kl(
    policy_T: Tensor,
    logp_T: Tensor,
    targets: Targets,
    beta: float,
    kl: Kl,
    importance_cap: float | None,
) -> Tensor:
    if importance_cap is not None and targets.engine_logp_T is not None:
        if targets.coupled_T is None:
            log_weight_T = old_logp(logp_T, targets) - targets.engine_logp_T
        else:
            log_weight_T = targets.coupled_T[:, 1]
        policy_T = policy_T * log_weight_T.exp().clamp(max=importance_cap)
    return policy_T + beta * policy_kl(logp_T, targets, kl) if beta else policy_T


def _log_ratio(logp_T: Tensor, targets: Targets) -> Tensor:
    if targets.coupled_T is None:
        return logp_T - old_logp(logp_T, targets)
    return targets.coupled_T[:, 0] + (logp_T - logp_T.detach())


def _kl_metrics(logp_T: Tensor, targets: Targets) -> dict[str, Tensor]:
    """Metrics: kl_ref, to the reference; kl_engine, engine against trainer with the same weights. Both are k3 estimates."""
    found = {}
    if targets.ref_logp_T is not None:
        found["kl_ref"] = policy_kl(logp_T, targets, "k3")
    if targets.engine_logp_T is not None:
        d_T = old_logp(logp_T, targets) - targets.engine_logp_T
        found["kl_engine"] = torch.expm1(d_T) - d_T
    return found
