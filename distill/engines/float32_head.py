"""The output head with float32 logits from bfloat16 weights.

A bfloat16 logit near 20 is rounded to steps of 0.125, which gives stored distributions ties and an average error of 0.02
nat (SmolLM2). Products of bfloat16 values are exact in float32 and matrix units sum in float32 anyway, so the only change
is that the result is not rounded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F


class Float32Head:
    """Computes float32 logits [..., V] from hidden states [..., D] and a weight [V, D].

    On a CPU it keeps a float32 copy of the weight; call `forget` after each change of the weight.
    """

    def __init__(self) -> None:
        self._copy: torch.Tensor | None = None

    def __call__(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        bias = None if bias is None else bias.float()
        if hidden.is_cuda:
            flat = hidden.reshape(-1, hidden.shape[-1])
            logits: Any = torch.mm(flat, weight.t(), out_dtype=torch.float32)
            logits = logits if bias is None else logits + bias
            return torch.as_tensor(logits).reshape(*hidden.shape[:-1], -1)
        if self._copy is None:
            self._copy = weight.detach().float()
        with _bfloat16_products():
            return F.linear(hidden.float(), self._copy, bias)

    def forget(self) -> None:
        """Drop the float32 copy of the weight."""
        self._copy = None


@contextlib.contextmanager
def _bfloat16_products() -> Iterator[None]:
    """Multiply float32 matrices as bfloat16 with float32 sums; exact for values that come from bfloat16."""
    settings: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before
