"""What every engine shares: how long a request may be, and rows of numbers turned into a Completion.

Engines hand over, for each completion, ids and log-probabilities [T, 1 + K]: column 0 is the token of the
trace, columns 1..K the most probable candidates at its position (the token is among them a second time
when it is probable enough).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from distill import models
from distill.records import Array, Completion, FinishReason, Request, TopK, UserError


def room(request: Request, max_model_len: int, max_tokens: int) -> int:
    """Tokens that a request may still write: its limit, or what the context leaves.

    Raises ValueError, naming the request, when the prompt is empty or fills the context.
    """
    length = len(request.prompt_ids)
    if length == 0:
        raise ValueError(f"request {request.request_id!r}: the prompt is empty.")
    if length >= max_model_len:
        raise ValueError(
            f"request {request.request_id!r}: its prompt of {length} tokens does not fit a context of {max_model_len}."
        )
    return min(max_tokens, max_model_len - length)


def given(request: Request, max_model_len: int) -> Array:
    """The completion that a request asks to score; raises ValueError where there is none or it does not fit."""
    if request.completion_ids is None or len(request.completion_ids) == 0:
        raise ValueError(f"request {request.request_id!r}: there is no completion to score.")
    room(request, max_model_len, 1)
    length = len(request.prompt_ids) + len(request.completion_ids)
    if length > max_model_len:
        raise ValueError(
            f"request {request.request_id!r}: its {length} tokens do not fit a context of {max_model_len}."
        )
    return np.asarray(request.completion_ids)


def completion(
    request: Request,
    ids_T: Array,
    rows_ids: Array,
    rows_logp: Array,
    *,
    top_k: int,
    stop_ids: frozenset[int],
    version: int,
) -> Completion:
    """A Completion of tokens ids_T from rows [T, 1 + K]; candidates beyond top_k are left out."""
    finish: FinishReason = "stop" if int(ids_T[-1]) in stop_ids else "length"
    top = None
    if top_k > 0:
        top = TopK.from_dense(rows_ids[:, 1 : top_k + 1], rows_logp[:, 1 : top_k + 1])
    return Completion(
        request_id=request.request_id,
        ids_T=np.asarray(ids_T, dtype=np.int32),
        logprob_T=np.ascontiguousarray(rows_logp[:, 0], dtype=np.float32),
        top=top,
        finish_reason=finish,
        version=version,
    )


def vocabulary(model_dir: Path) -> tuple[int, frozenset[int]]:
    """(entries of the vocabulary that mean something, ids that end a completion) of a model folder.

    A model's head may be padded past its tokenizer; those ids are never drawn, stored or counted as mass.
    """
    tokenizer = models.load_tokenizer(model_dir)
    stop = models.stop_ids(model_dir, tokenizer)
    return min(len(tokenizer), head_size(model_dir)), frozenset(stop)


def head_size(model_dir: Path) -> int:
    """Rows of the model's output head, padding included."""
    config = models.config_of(model_dir)
    return int(config.get("text_config", config)["vocab_size"])


def check_context(model_dir: Path, max_model_len: int) -> None:
    """Refuse a context longer than the model's positions."""
    config = models.config_of(model_dir)
    limit = config.get("text_config", config).get("max_position_embeddings")
    if limit is not None and max_model_len > limit:
        raise UserError(
            f"engine.max_model_len: {max_model_len} tokens asked for, but the model in {model_dir} has {limit} "
            "positions. Lower sampling.max_tokens, or take a model with a longer context."
        )
