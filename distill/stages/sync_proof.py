"""The proof of a weight sync: weights that were moved in the trainer give the same log-probabilities in the engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from distill import models
from distill.models.prune import decoder_layers
from distill.records import Engine, Request, UserError, rest
from distill.stages.context import Context
from distill.training.forward import base_model

PROMPT, REPLY = 8, 24
"""Tokens of the document that engine and trainer both score."""
MOVED = 0.2
"""How far weights are moved, as a share of their standard deviation."""
TOLERANCE = 0.1
"""Nats by which the median token may differ more after a sync than before it."""
OTHER_MODEL = 0.5
"""Nats from which on the median token says that the engine computes another model."""


def prove_sync(engine: Engine, model: Any, vocab_size: int, context: Context, *, sleeps: bool = False) -> None:
    """Move some weights of every kind, give them to the engine, and compare a short document's log-probabilities.

    Both have the model's own weights again afterwards. An engine that `sleeps` does so before each sync, and at the end. Raises UserError if the engine does not take new weights, or computes
    another model from them than the trainer.
    """
    context.phase("checking that new weights reach the engine")
    ids_T = np.random.default_rng(3).integers(0, min(vocab_size, _rows(model)), PROMPT + REPLY)
    request = Request("sync", ids_T[:PROMPT], completion_ids=ids_T[PROMPT:])
    before = _gap(engine, request, _own(model, ids_T, vocab_size))
    rest(engine, sleeps)
    with _moved(base_model(model)):
        own_T = _own(model, ids_T, vocab_size)
        try:
            engine.sync(models.exported_weights(model), version=engine.version)
        except ValueError as error:
            raise UserError(_refusal(context, f"does not take new weights of this model ({error})")) from None
        after = _gap(engine, request, own_T)
    rest(engine, sleeps)
    engine.sync(models.exported_weights(model), version=engine.version)
    rest(engine, sleeps)
    if not before < OTHER_MODEL:
        raise UserError(_refusal(context, f"computes another model than the trainer ({before:.2g} nats apart)"))
    if not after - before < TOLERANCE:
        raise UserError(_refusal(context, f"keeps old weights after a sync ({after:.2g} nats from the trainer's)"))


def _refusal(context: Context, what: str) -> str:
    return (
        f"stages.{context.name}.engine: the engine {what}, so its completions would not be the policy's. Use engine: "
        "{fn: transformers}."
    )


def _own(model: Any, ids_T: Any, vocab_size: int) -> Any:
    return models.plain_logps(model, ids_T, vocab_size)[PROMPT - 1 :].numpy()


def _gap(engine: Engine, request: Request, own_T: Any) -> float:
    """Return the median difference between the engine's log-probabilities and the model's own, nats."""
    (scored,) = engine.score([request])
    return float(np.median(np.abs(scored.logprob_T - own_T)))


def _rows(model: Any) -> int:
    return int(model.get_input_embeddings().weight.shape[0])


@contextmanager
def _moved(base: Any) -> Iterator[None]:
    """Move every weight outside of the layers, and one layer of every kind, inside the context; exact copies are put back."""
    layers = decoder_layers(base)
    kinds = {tuple((name, p.shape) for name, p in layer.named_parameters()): layer for layer in layers}
    inside = {id(p) for layer in layers for p in layer.parameters()}
    parts = (base.get_decoder(), base.get_output_embeddings())
    outside = {id(p): p for part in parts for p in part.parameters() if id(p) not in inside}
    chosen = list(outside.values())
    chosen += [p for layer in kinds.values() for p in layer.parameters()]
    copies = [p.detach().clone() for p in chosen]
    generator = torch.Generator().manual_seed(5)
    try:
        with torch.no_grad():
            for p in chosen:
                scale = float(p.float().std()) if p.numel() > 1 else 0.0
                noise = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)
                p.add_(noise, alpha=MOVED * (scale or float(p.float().abs().mean())))
        yield
    finally:
        with torch.no_grad():
            for p, copy in zip(chosen, copies, strict=True):
                p.copy_(copy)
