"""Functions that all engines share: length limits of requests, and building a Completion.

For each completion an engine passes ids and log-probabilities [T, 1 + K]: column 0 is the token itself, columns 1..K the
most probable candidates at its position (which include the token again if it is probable enough). If the request asks for tail
draws, they are the last columns, and the engine passes the log of the mass beyond the candidates.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from distill import models
from distill.records import Array, BeyondTop, Completion, FinishReason, Request, TopK, UserError


def room(request: Request, max_model_len: int, max_tokens: int) -> int:
    """The number of tokens that a request may generate: `max_tokens`, or what the context leaves if that is less.

    Raises ValueError, naming the request, if the prompt is empty or fills the context.
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
    """The completion ids to score of a request. Raises ValueError if there are none or they do not fit the context."""
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
    tail_T: Array | None = None,
) -> Completion:
    """Build the Completion of tokens ids_T from rows [T, 1 + K + draws]; candidates beyond top_k are dropped.

    tail_T: log of the mass beyond the candidates; None = 1 - their sum.
    """
    finish: FinishReason = "stop" if int(ids_T[-1]) in stop_ids else "length"
    top = beyond = None
    if top_k > 0:
        top = TopK.from_dense(rows_ids[:, 1 : top_k + 1], rows_logp[:, 1 : top_k + 1], tail_T)
        if num := request.tail_draws:
            beyond = BeyondTop(rows_ids[:, -num:], rows_logp[:, -num:])
    return Completion(
        request_id=request.request_id,
        ids_T=np.asarray(ids_T, dtype=np.int32),
        logprob_T=np.ascontiguousarray(rows_logp[:, 0], dtype=np.float32),
        top=top,
        finish_reason=finish,
        version=version,
        beyond=beyond,
    )


def vocabulary(model_dir: Path) -> tuple[int, frozenset[int]]:
    """(vocabulary size without padding, ids that end a completion) of a model folder.

    A model's output head may have more rows than its tokenizer has ids; those are never sampled, stored or counted.
    """
    tokenizer = models.load_tokenizer(model_dir)
    stop = models.stop_ids(model_dir, tokenizer)
    return min(len(tokenizer), head_size(model_dir)), frozenset(stop)


def head_size(model_dir: Path) -> int:
    """Return the number of rows of the model's output head, padding included."""
    config = models.config_of(model_dir)
    return int(config.get("text_config", config)["vocab_size"])


def check_context(model_dir: Path, max_model_len: int) -> None:
    """Raise UserError if the context is longer than the model's maximum number of positions."""
    config = models.config_of(model_dir)
    limit = config.get("text_config", config).get("max_position_embeddings")
    if limit is not None and max_model_len > limit:
        raise UserError(
            f"engine.max_model_len: {max_model_len} tokens are needed, but the model in {model_dir} has {limit} "
            "positions. Lower sampling.max_tokens, or use a model with a longer context."
        )
