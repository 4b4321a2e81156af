"""The three products around a chunk, and the gradient in the forward pass.

`over_chunks` iterates over the tokens; a `Chunks` turns a chunk's hidden states into a loss by row and d loss / d (hidden
W^T); d hidden and d weight follow from that and are summed in the wide dtype. The loss is a sum, so its upstream gradient is
a scalar and the backward pass only multiplies. A frozen weight's product is skipped.

Shapes: T tokens with a loss, C of them in a chunk, D hidden, V vocabulary.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial

CHUNK_BYTES = {"cpu": 256 << 20, "cuda": 5 << 29}
"""The largest memory of one chunk. On a GPU every chunk reads and writes d weight, so a few long chunks are faster."""

CPU_ROWS = 512
"""The largest number of tokens a chunk on a CPU: a matrix product gains nothing from more."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A chunk's loss and gradient. loss_C, label_logp_C: by row, detached. factor_C (None: 1) * dz_CV, by row: d hidden W^T.

    dz_CV may have a few more columns than the vocabulary, zeros for padded rows of the weight.
    """

    loss_C: Tensor
    label_logp_C: Tensor
    dz_CV: Tensor | None
    factor_C: Tensor | None = None


class Chunks(Protocol):
    """The computation of one kind of loss on a chunk."""

    def chunk(self, hidden_CD: Tensor, rows: slice, grads: bool) -> Chunk:
        """Compute a chunk: `rows` of the tokens. The derivative includes the weights; the next call may reuse its memory."""
        ...

    def close(self) -> None:
        """Release the memory after the last chunk."""
        ...


def wide_dtype(hidden: Tensor) -> torch.dtype:
    """Return the dtype of everything after the logits: fp32, or fp64 for fp64 inputs."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def wide_product(hidden_CD: Tensor, weight_DV: Tensor, out_CV: Tensor, scratch_CV: Tensor | None = None) -> Tensor:
    """Write hidden W^T [C, V] to out_CV in the wide dtype; scratch_CV holds the product where it has to be narrow."""
    if hidden_CD.dtype == out_CV.dtype:
        return torch.mm(hidden_CD, weight_DV, out=out_CV)
    if hidden_CD.is_cuda:
        return torch.mm(hidden_CD, weight_DV, out_dtype=out_CV.dtype, out=out_CV)
    # No CPU product of bf16 has an fp32 result: the logits are rounded, as transformers' and vLLM's are.
    return out_CV.copy_(torch.mm(hidden_CD, weight_DV, out=scratch_CV))


def chunk_rows(num_tokens: int, row_bytes: int, device: torch.device) -> int:
    """Return the tokens a chunk: at most CHUNK_BYTES (on a GPU also an eighth of the free memory), chunks of similar size."""
    room = CHUNK_BYTES.get(device.type, CHUNK_BYTES["cpu"])
    most = CPU_ROWS
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        room, most = min(room, (free + cached) // 8), num_tokens
    rows = max(1, min(room // row_bytes, most))
    rows = -(-num_tokens // -(-num_tokens // rows)) if num_tokens else 1
    return rows if rows < 128 else -(-rows // 64) * 64


def gathered(tensor: Tensor) -> Tensor:
    """Gather a weight that is sharded over processes; its gradient is averaged over them."""
    if isinstance(tensor, DTensor):
        whole: Tensor = tensor.full_tensor(grad_placements=[Partial("avg")] * tensor.device_mesh.ndim)
        return whole
    return tensor


def over_chunks(
    hidden_TD: Tensor,
    weight_VD: Tensor | None,
    bias_V: Tensor | None,
    chunks: Chunks,
    weight_T: Tensor,
    vocab_size: int,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (sum of weight * loss, differentiable; loss [T] and log q(label) [T], detached).

    weight_VD None: hidden_TD are the logits [T, V] themselves.
    """
    grads = torch.is_grad_enabled()
    walk = _Walk(chunks, weight_T, vocab_size, chunk, grads)
    loss, loss_T, label_T = _OverChunks.apply(hidden_TD, weight_VD, bias_V, walk)  # type: ignore[no-untyped-call]
    return loss, loss_T, label_T


@dataclass(frozen=True, slots=True)
class _Walk:
    chunks: Chunks
    weight_T: Tensor
    vocab_size: int
    chunk: int
    grads: bool


class _OverChunks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, weight_VD: Tensor | None, bias_V: Tensor | None, walk: _Walk
    ) -> tuple[Tensor, Tensor, Tensor]:
        loss_T, label_T, ctx.gradients = _run(hidden_TD, weight_VD, bias_V, walk)
        ctx.save_for_backward(hidden_TD, weight_VD, bias_V)
        ctx.walk = walk
        ctx.mark_non_differentiable(loss_T, label_T)
        return (loss_T * walk.weight_T).sum(), loss_T, label_T

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        hidden_TD, weight_VD, bias_V = inputs = ctx.saved_tensors
        # Handed out and not kept, so that autograd takes them without a copy; a second backward recomputes them.
        grads = ctx.gradients or _run(hidden_TD, weight_VD, bias_V, ctx.walk)[2]
        ctx.gradients = None
        # On a CPU reading the value is free, and a step's upstream gradient is mostly 1.
        scaled = upstream.device.type != "cpu" or bool(upstream != 1)
        both = zip(grads, inputs, strict=True)
        return *(None if g is None else _times(g, upstream if scaled else None, t.dtype) for g, t in both), None


def _times(grad: Tensor, factor: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return grad * factor in a dtype, in one pass; grad may be overwritten."""
    if factor is None:
        return grad.to(dtype)
    if grad.dtype != dtype:
        return torch.mul(grad, factor, out=torch.empty_like(grad, dtype=dtype))
    if grad.is_cuda and grad.dtype != torch.float64 and grad.numel() and importlib.util.find_spec("triton") is not None:
        from distill.training.loss.kernels import fused, triton_source

        return fused.multiply(grad, factor, triton_source)
    return grad.mul_(factor)


def _run(
    hidden_TD: Tensor, weight_VD: Tensor | None, bias_V: Tensor | None, walk: _Walk
) -> tuple[Tensor, Tensor, tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """Return loss_T, log q(label) [T], and the required gradients, dweight and dbias in the wide dtype.

    With a single chunk nothing is summed, so dweight is the product in its own dtype.
    """
    wide, vocab = wide_dtype(hidden_TD), walk.vocab_size
    weight_wanted = walk.grads and weight_VD is not None and weight_VD.requires_grad
    bias_wanted = walk.grads and bias_V is not None and bias_V.requires_grad
    grads = weight_wanted or bias_wanted or (walk.grads and hidden_TD.requires_grad)
    dhidden_TD = torch.empty_like(hidden_TD) if grads else None
    single = len(hidden_TD) <= walk.chunk
    dweight_VD = None
    if weight_wanted and weight_VD is not None:
        dweight_VD = torch.empty_like(weight_VD, dtype=weight_VD.dtype if single else wide)
    dbias_V = torch.zeros_like(bias_V, dtype=wide) if bias_wanted and bias_V is not None else None
    if dweight_VD is not None:
        dweight_VD[vocab if len(hidden_TD) else 0 :].zero_()
    loss_T = hidden_TD.new_zeros(len(hidden_TD), dtype=wide)
    label_T = torch.zeros_like(loss_T)
    for start in range(0, len(hidden_TD), walk.chunk):
        rows = slice(start, start + walk.chunk)
        hidden_CD = hidden_TD[rows]
        done = walk.chunks.chunk(hidden_CD, rows, grads)
        loss_T[rows], label_T[rows] = done.loss_C, done.label_logp_C
        dz_CV, factor_C = done.dz_CV, done.factor_C
        if dz_CV is None or dhidden_TD is None:
            continue
        width = dz_CV.shape[1]
        if weight_VD is None:  # the derivative by the logits
            dhidden_TD[rows, :width] = dz_CV
            dhidden_TD[rows, width:] = 0
        else:
            torch.mm(dz_CV, weight_VD[:width], out=dhidden_TD[rows])
        if factor_C is not None:
            dhidden_TD[rows] *= factor_C[:, None]
            hidden_CD = hidden_CD if dweight_VD is None else hidden_CD * factor_C[:, None]
        if dweight_VD is not None:
            _add_product(dweight_VD[:width], dz_CV.t(), hidden_CD, first=start == 0)
        if dbias_V is not None:
            by_bias_V = dz_CV.sum(0, dtype=wide) if factor_C is None else factor_C @ dz_CV
            dbias_V[:vocab] += by_bias_V[:vocab]
    walk.chunks.close()
    return loss_T, label_T, (dhidden_TD, dweight_VD, dbias_V)


def _add_product(total_VD: Tensor, left_VC: Tensor, right_CD: Tensor, *, first: bool) -> None:
    """Compute total += left @ right (total = for the first), in total's dtype."""
    beta = 0 if first else 1
    if left_VC.dtype == total_VD.dtype:
        torch.addmm(total_VD, left_VC, right_CD, beta=beta, out=total_VD)
    elif left_VC.is_cuda:
        torch.addmm(total_VD, left_VC, right_CD, beta=beta, out_dtype=total_VD.dtype, out=total_VD)
    elif first:
        total_VD.copy_(torch.mm(left_VC, right_CD))
    else:
        total_VD.add_(torch.mm(left_VC, right_CD))
