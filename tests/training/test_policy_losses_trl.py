"""Policy-gradient losses with importance weights against TRL's own trainer code, value and gradient, on one batch."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch
from trl import GRPOTrainer

from distill.training.loss.head import Student, Targets
from distill.training.rl import policy_objectives as objectives
from distill.training.rl.advantages import sequence_log_ratios

CAP = 2.0
LENGTHS = (7, 3, 5, 1)


def streams(spread: float) -> dict[str, torch.Tensor]:
    """Log-probabilities [B, L] of the policy, of its old self and of the engine, `spread` nats apart."""
    rng = torch.Generator().manual_seed(3)
    new = -3 * torch.rand(len(LENGTHS), max(LENGTHS), generator=rng, dtype=torch.float64)
    noise = torch.randn(2, *new.shape, generator=rng, dtype=torch.float64)
    return {"new": new, "old": new + 0.02 * noise[0], "engine": new + spread * noise[1]}


def trl_loss(found: dict[str, torch.Tensor], advantage_B: torch.Tensor, mask_BL: torch.Tensor, level: str, clip: tuple[float, float]):  # fmt: skip
    """(loss, gradient by the policy's log-probabilities) of TRL's code, with the weights of its rollout."""
    new = found["new"].clone().requires_grad_()
    gap_BL = (found["old"] - found["engine"]) * mask_BL
    gap = gap_BL.sum(-1, keepdim=True) if level == "sequence" else gap_BL
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_args, **_options: (new, torch.zeros_like(new), None),
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None, beta=0.0, loss_type="grpo",
        importance_sampling_level=level, epsilon_low=clip[0], epsilon_high=clip[1], use_vllm=True,
        vllm_importance_sampling_correction=True, args=SimpleNamespace(delta=None, use_bias_correction_kl=False),
        model=SimpleNamespace(training=True), current_gradient_accumulation_steps=1, _entropy_bonus_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        accelerator=SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x, gather_for_metrics=lambda x: x),
    )  # fmt: skip
    nothing = torch.zeros(len(mask_BL), 0, dtype=torch.long)
    inputs = {
        "prompt_ids": nothing, "prompt_mask": nothing, "completion_ids": torch.zeros_like(mask_BL, dtype=torch.long),
        "completion_mask": mask_BL, "advantages": advantage_B, "old_per_token_logps": found["old"],
        "importance_sampling_ratio": gap.exp().clamp(max=CAP),
    }  # fmt: skip
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    (slope,) = torch.autograd.grad(loss, new)
    return float(loss), slope[mask_BL.bool()]


@pytest.mark.parametrize("spread", [0.01, 0.3, 1.0])
@pytest.mark.parametrize(("name", "level", "clip"), [("gspo", "sequence", (3e-4, 4e-4)), ("gspo", "sequence", (0.2, 0.2)), ("grpo", "token", (0.2, 0.2))])  # fmt: skip
def test_weights_by_the_engines_probabilities_are_trls(name, level, clip, spread):
    found = streams(spread)
    length_B = torch.tensor(LENGTHS)
    mask_BL = (torch.arange(max(LENGTHS)) < length_B[:, None]).to(found["new"].dtype)
    advantage_B = torch.tensor([1.2, -0.7, 0.3, -1.5], dtype=torch.float64)
    want, want_slope = trl_loss(found, advantage_B, mask_BL, level, clip)

    trace_T = torch.arange(len(LENGTHS)).repeat_interleave(length_B)
    logp_T = found["new"][mask_BL.bool()].requires_grad_()
    targets = Targets(
        torch.zeros(len(trace_T), dtype=torch.long),
        (1 / length_B.double() / len(LENGTHS))[trace_T],
        advantage_T=advantage_B[trace_T],
        old_logp_T=found["old"][mask_BL.bool()],
        engine_logp_T=found["engine"][mask_BL.bool()],
    )
    objective = getattr(objectives, name)(eps_low=clip[0], eps_high=clip[1], beta=0.0, importance_cap=CAP)
    assert (objective.couple is sequence_log_ratios) == (level == "sequence")
    if objective.couples(targets):
        targets = replace(targets, coupled_T=objective.couple(logp_T.detach(), targets, trace_T))
    others = {field.name: None for field in fields(Student)}
    loss = (objective.loss(Student(**{**others, "label_T": logp_T}), targets) * targets.weight_T).sum()
    (slope_T,) = torch.autograd.grad(loss, logp_T)
    assert float(loss) == pytest.approx(want, rel=1e-9)
    torch.testing.assert_close(slope_T, want_slope, rtol=1e-9, atol=1e-12)


def test_before_the_first_update_a_completion_has_its_weight_too():
    """Without old log-probabilities the policy is its own old one; the engine's may still differ."""
    objective = objectives.gspo(beta=0.0)
    logp_T = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    targets = Targets(
        torch.zeros(3, dtype=torch.long), torch.ones(3), advantage_T=torch.ones(3),
        engine_logp_T=torch.tensor([-1.3, -2.2, -0.5]),
    )  # fmt: skip
    assert objective.couples(targets)
    targets = replace(targets, coupled_T=objective.couple(logp_T.detach(), targets, torch.tensor([0, 0, 1])))
    others = {field.name: None for field in fields(Student)}
    loss_T = objective.loss(Student(**{**others, "label_T": logp_T}), targets)
    weight = torch.tensor(0.5).exp()
    torch.testing.assert_close(loss_T.detach(), -torch.stack([weight, weight, torch.tensor(1.0)]))
    assert not objectives.gspo(beta=0.0, importance_cap=None).couples(targets)
