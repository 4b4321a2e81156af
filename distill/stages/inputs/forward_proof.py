"""The start-up proof: the trainer's log-probabilities of a model against the model's own plain forward pass."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch

from distill import machine, models, world
from distill.records import UserError
from distill.stages.auto_settings import keep
from distill.stages.context import Context
from distill.training.forward import ForwardPlan, LayoutName, NotProvenError, base_model, plain_copy, prove
from distill.training.packing import Example, pack

SHARED, LENGTHS = 24, ((40, 9), (44, 17), (5, 30), (70, 12))
"""The test documents: number of prompt tokens that the first two share, and (prompt, completion) tokens of each."""
TOLERANCE = {torch.float32: 2e-3, torch.float64: 1e-6}
HALF_TOLERANCE = 0.2
"""Tolerance in nats for a model in half precision that is too large for a float32 copy."""
COPY_SHARE = 0.25
"""The share of the memory that a float32 copy may take."""


def prove_forward(model: Any, name: str, vocab_size: int, context: Context, max_tokens: int) -> ForwardPlan:
    """Return the plan by which the trainer computes a model, after testing it on a few documents. Prints a line if
    traces are not packed. The main process tests, and all take its plan.

    vocab_size: of the model's tokenizer. max_tokens: of the longest trace. Raises UserError if the trainer cannot compute the
    model's own log-probabilities.
    """
    return world.broadcast(
        _proved(model, name, vocab_size, context, max_tokens) if world.is_main() else ForwardPlan.of(model, vocab_size)
    )


def _proved(model: Any, name: str, vocab_size: int, context: Context, max_tokens: int) -> ForwardPlan:
    context.phase(f"checking {name} against its own forward pass")
    base = base_model(model)
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    if head is not None and getattr(head, "weight", None) is not None:
        models.check_vocabulary(base.config.to_dict(), len(embedding.weight), len(head.weight), vocab_size, name)
    exact = _fits_twice(model)
    parameter = next(base_model(model).parameters())
    tolerance = TOLERANCE[torch.float32] if exact else TOLERANCE.get(parameter.dtype, HALF_TOLERANCE)
    batch = _documents(vocab_size).to_torch(parameter.device)
    windows = _other_windows(base_model(model).config, max_tokens)
    allowed: tuple[LayoutName, ...] = ("rows",) if windows else ("packed", "rows")
    try:
        with plain_copy(model, exact) as copied:
            proof = prove(copied, vocab_size, batch, tolerance, allowed=allowed)
    except NotProvenError as error:
        raise UserError(
            f"{name}: the trainer cannot compute this model ({_layers(model)}): {error}. Use a model of another architecture."
        ) from None
    if proof.plan.layout != "packed":
        reason = windows or proof.rejected[0][1]
        how = {"rows": "each trace is a padded row of its own", "single": "traces are computed one by one"}
        price = {
            "rows": "shared prompts are computed again for each trace, and padding too",
            "single": "several times slower",
        }
        why = f"{how[proof.plan.layout]} ({price[proof.plan.layout]}): {_layers(model)}: {reason}"
        context.say(f"{name}: {why}")
        keep(f"forward of {name}", {"value": proof.plan.layout, "why": why}, context)
    return proof.plan


def _documents(vocab_size: int) -> Any:
    """Return random documents, two of which share the start of their prompt, as one packed batch."""
    rng = np.random.default_rng(0)
    shared = rng.integers(0, vocab_size, SHARED)
    examples = []
    for n, (prompt, completion) in enumerate(LENGTHS):
        ids = rng.integers(0, vocab_size, prompt + completion)
        if n < 2:
            ids[:SHARED] = shared
        examples.append(Example(f"proof-{n}", ids[:prompt], ids[prompt:]))
    (batch,) = pack(examples, micro_tokens=4096)
    return batch


def _fits_twice(model: Any) -> bool:
    """Return whether a float32 copy of the model fits the memory easily; never for a quantised model."""
    if getattr(base_model(model), "is_quantized", False):
        return False
    parameters = sum(p.numel() for p in model.parameters())
    device = next(model.parameters()).device
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else machine.memory_bytes()
    return bool(4 * parameters <= COPY_SHARE * free)


def _other_windows(config: Any, max_tokens: int) -> str:
    """Return why traces may not be packed: a limit of attention, other than a sliding window, that is shorter than a trace."""
    text = config.get_text_config()
    for key, value in text.to_dict().items():
        limits = key != "sliding_window" and re.search(r"window|chunk_size|local_attention|block_size", key)
        if limits and isinstance(value, int) and not isinstance(value, bool) and 1 < value < max_tokens:
            return f"{key} {value} is shorter than max_tokens {max_tokens}"
    return ""


def _layers(model: Any) -> str:
    """Name the model's kinds of layers."""
    inner = base_model(model)
    lists = [m for m in inner.modules() if isinstance(m, torch.nn.ModuleList) and len(m)]
    longest = max(lists, key=len, default=None)
    if longest is None:
        return type(inner).__name__
    mixers = [type(child).__name__ for layer in longest for child in layer.children()]
    kinds = [k for k in dict.fromkeys(mixers) if not re.search(r"norm|mlp|dropout|linear$", k, re.IGNORECASE)]
    return f"{type(inner).__name__} with {', '.join(kinds) or type(longest[0]).__name__}"
