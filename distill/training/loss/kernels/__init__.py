"""Kernels for one chunk of logits: `plain` in torch on any device, `fused` in Triton on a GPU.

Both are a `HeadKernel`: it computes the chunk's logits, separates the chosen ones, sums the rest, and later turns the chunk
into its gradient, in the same memory. Neither knows a loss. Both give the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

OUTSIDE = -1e30
"""Stands for log 0 where -inf would turn gradients into NaN (inf - inf)."""


@dataclass(frozen=True, slots=True)
class HeadForm:
    """How logits come from the product of hidden and weight.

    scale multiplies it (Cohere, Granite: 1 / logits_scaling); a softcap c then gives c * tanh(z / c) (Gemma 2);
    rows of the weight beyond vocab_size are padding and take no part in the softmax (151936 rows against 151643 tokens).
    """

    vocab_size: int
    scale: float = 1.0
    softcap: float | None = None

    @staticmethod
    def of(config: Any, vocab_size: int) -> HeadForm:
        """Read the form from a transformers config; vocab_size is the tokenizer's length."""
        scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
        return HeadForm(
            min(vocab_size, config.vocab_size),
            scale,
            getattr(config, "final_logit_softcapping", None),
        )


@dataclass(frozen=True, slots=True)
class Rest:
    """A chunk's logits, separated into chosen ones and the rest; S ids a row, repeats allowed.

    z_CS: at the chosen ids. lse_C: log-sum-exp of all others (OUTSIDE if there are none). best_C: the highest of them.
    """

    z_CS: Tensor
    lse_C: Tensor
    best_C: Tensor


class HeadKernel(Protocol):
    """One lm_head and the memory of one chunk."""

    @staticmethod
    def row_bytes(form: HeadForm, dtype: torch.dtype) -> int:
        """Return the bytes that one token of a chunk takes."""
        ...

    def rest(self, hidden_CD: Tensor, ids_CS: Tensor) -> Rest:
        """Compute the logits of a chunk of C tokens, in the wide dtype (fp32; fp64 for fp64)."""
        ...

    def gradient(self, g_CS: Tensor, g_rest_C: Tensor) -> tuple[Tensor, Tensor | None]:
        """Compute the derivative by hidden W^T of the last chunk from those by z_CS and lse_C, in the chunk's memory.

        Returns ([C, V] in hidden's dtype, row factors [C] to multiply it by, or None for 1).
        """
        ...

    def close(self) -> None:
        """Release the memory after the last chunk."""
        ...
