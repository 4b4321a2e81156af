"""AdamW on fp32 master weights behind a model that computes in bf16, and the learning rate's schedule.

bf16 has eight bits of mantissa: an update of 1e-4 relative to a weight would be rounded away. So AdamW updates an fp32
copy of each trainable parameter, and gradients of micro-batches are summed in fp32.
fp32 parameters are their own masters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from distill import world
from distill.records import UserError

MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class MasterAdamW:
    """torch's fused AdamW on master weights. Vectors (norms, biases) are not decayed."""

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        *,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
    ) -> None:
        named = [(name, p) for name, p in named_parameters if p.requires_grad]
        self.names = [name for name, _ in named]
        self.parameters = [p for _, p in named]
        self.masters = [p if p.dtype == torch.float32 else p.detach().float().clone() for p in self.parameters]
        groups = [
            {"params": [m for m in self.masters if m.ndim >= 2], "weight_decay": weight_decay},
            {"params": [m for m in self.masters if m.ndim < 2], "weight_decay": 0.0},
        ]
        self.adamw = torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, fused=True)

    def accumulate(self) -> None:
        """Move the gradients that backward left on the parameters into the masters' fp32 sums."""
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if parameter is master or parameter.grad is None:
                continue
            if master.grad is None:
                master.grad = parameter.grad.float()
            else:
                master.grad += parameter.grad
            parameter.grad = None

    def set_zero_gradient(self) -> None:
        """Set every gradient to zero, for a step without tokens to learn from."""
        for master in self.masters:
            master.grad = torch.zeros_like(master)

    def clip(self, max_norm: float) -> float:
        """Scale the gradients to a global norm of at most max_norm; return the norm before. Shards count as the whole."""
        norm = nn.utils.clip_grad_norm_([m for m in self.masters if m.grad is not None], max_norm)
        return float(world.whole(norm))

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        self.zero_grad()
        copies = [(p, m) for p, m in zip(self.parameters, self.masters, strict=True) if p is not m]
        if copies:
            torch._foreach_copy_([p for p, _ in copies], [m for _, m in copies])

    def zero_grad(self) -> None:
        for tensor in (*self.parameters, *self.masters):
            tensor.grad = None

    def state(self, *, create: bool = False) -> dict[str, Tensor]:
        """Return masters and moments by name: all that a resumed run needs to be bitwise the same.

        create: make the moments that do not exist yet, zero, on their masters' device, for a checkpoint to be read into.
        """
        if create:
            for master in self.masters:
                if not self.adamw.state.get(master):
                    step = torch.zeros((), dtype=torch.float32, device=master.device)
                    moments = (step, torch.zeros_like(master), torch.zeros_like(master))
                    self.adamw.state[master] = dict(zip(MOMENTS, moments, strict=True))
        tensors = {}
        for name, master in zip(self.names, self.masters, strict=True):
            tensors[f"master/{name}"] = master.detach()
            for key, value in self.adamw.state.get(master, {}).items():
                tensors[f"{key}/{name}"] = value
        return tensors

    @torch.no_grad()
    def loaded(self, names: Iterable[str]) -> None:
        """Take up the tensors of `state` that were read in place: copy masters to parameters, drop moments not read.

        Raises UserError if masters are missing: the checkpoint is of other weights.
        """
        found = set(names)
        if missing := [name for name in self.names if found and f"master/{name}" not in found]:
            raise UserError(
                f"the checkpoint has no {missing[0]} ({len(missing)} of {len(self.names)} trained weights are missing): it is "
                "of another model or adapter. Do the stage again with --redo."
            )
        for name, parameter, master in zip(self.names, self.parameters, self.masters, strict=True):
            if found and parameter is not master:
                parameter.copy_(master)
            if f"exp_avg/{name}" not in found:
                self.adamw.state.pop(master, None)


def learning_rate(step: int, *, lr: float, num_steps: int, warmup_ratio: float, min_lr_ratio: float) -> float:
    """Return the learning rate of step `step` (from 0): linear warm-up, then half a cosine to min_lr_ratio * lr."""
    warmup = math.ceil(warmup_ratio * num_steps)
    if step < warmup:
        return lr * (step + 1) / warmup
    progress = (step - warmup) / max(num_steps - warmup, 1)
    return lr * (min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))
