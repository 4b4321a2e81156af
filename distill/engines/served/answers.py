"""The answers of an endpoint as Completions: token ids and their log-probabilities, or text in this side's tokens.

Every function raises MalformedError for an answer that contradicts itself: ids, log-probabilities and text come from one answer
and must fit one another, so that no log-probability is ever stored for another token than its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from distill import models
from distill.engines import completions
from distill.engines.served.client import MalformedError
from distill.records import Array, Completion, FinishReason, Request

CLAMPED = -9000.0
"""Servers write -inf as -9999, for JSON has no infinity."""
MAX_MASS_ERROR = 5e-3
"""The entries of a position may add up to this much more than 1, for servers that compute in half precision."""
MAX_TOKEN_ERROR = 1e-3
"""A token's own log-probability may differ this much from its entry's, in nats."""


@dataclass(frozen=True, slots=True)
class Usage:
    """The tokens that an endpoint bills: of prompts and of completions."""

    prompt: int = 0
    completion: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(self.prompt + other.prompt, self.completion + other.completion)


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """A completion and what it is billed for."""

    completion: Completion
    usage: Usage


class LocalTokens:
    """The tokenizer of the stage's model: texts as its ids, and an endpoint's tokens as its ids by their bytes."""

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        self._tokenizer, self.vocab_size = tokenizer, vocab_size

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """The ids that end a turn."""
        ends = models.turn_end_ids(self._tokenizer) if self._tokenizer.chat_template else frozenset()
        own = self._tokenizer.eos_token_id
        return ends | (frozenset() if own is None else {own})

    @cached_property
    def end_id(self) -> int | None:
        """The id that ends a completion: the chat template's end of a turn, or the EOS token."""
        own = self._tokenizer.eos_token_id
        return own if own in self.end_ids or not self.end_ids else min(self.end_ids)

    @cached_property
    def by_bytes(self) -> Mapping[bytes, int]:
        """The id of every text of a token that only one id stands for; empty if the tokens' bytes are not known."""
        found: dict[bytes, int] = {}
        several: set[bytes] = set()
        for index, text in enumerate(models.vocabulary_bytes(self._tokenizer) or ()):
            if index < self.vocab_size and text:
                if text in found:
                    several.add(text)
                found[text] = index
        return {text: index for text, index in found.items() if text not in several}


# ------------------------------------------------------------------------------------------------- token ids


def from_ids(
    tree: Any, request: Request, *, top_k: int, stop_ids: frozenset[int], vocab_size: int, version: int
) -> Answer:
    """Parse an answer of /completions with token ids and log-probabilities by id."""
    choice, usage = _choice(tree)
    ids = choice.get("token_ids")
    table = choice.get("logprobs") or {}
    tokens, sampled, tops = (table.get(key) for key in ("tokens", "token_logprobs", "top_logprobs"))
    if not (isinstance(ids, list) and ids and all(isinstance(each, int) for each in ids)):
        raise MalformedError("it has no token_ids", tree.get("usage"))
    if not (isinstance(tokens, list) and isinstance(sampled, list) and len(tokens) == len(sampled) == len(ids)):
        raise MalformedError(f"it has {len(ids)} token_ids and other numbers of log-probabilities", tree.get("usage"))
    if not 0 <= min(ids) <= max(ids) < vocab_size:
        raise MalformedError(f"it has the token id {max(ids)}, outside a vocabulary of {vocab_size}", tree.get("usage"))
    if [_numbered(token) for token in tokens] != ids:
        raise MalformedError("its log-probabilities are about other tokens than its token_ids", tree.get("usage"))
    if top_k and not (isinstance(tops, list) and len(tops) == len(ids)):
        raise MalformedError("it lacks top_logprobs at some positions", tree.get("usage"))
    entries = (
        [{_numbered(token): value for token, value in (top or {}).items()} for top in tops or ()] if top_k else None
    )
    rows_ids, rows_logp = _rows(ids, sampled, entries, top_k, vocab_size, usage=tree.get("usage"))
    made = completions.completion(
        request, np.array(ids), rows_ids, rows_logp, top_k=top_k, stop_ids=stop_ids, version=version
    )
    return _billed(made, usage, request)


def scored(
    tree: Any,
    request: Request,
    ids_T: Array,
    *,
    top_k: int,
    stop_ids: frozenset[int],
    vocab_size: int,
    version: int,
) -> Answer:
    """Parse an answer of /completions with `prompt_logprobs` of prompt and completion together."""
    choice, usage = _choice(tree)
    rows = choice.get("prompt_logprobs")
    first, num = len(request.prompt_ids), len(request.prompt_ids) + len(ids_T)
    if not (isinstance(rows, list) and len(rows) == num):
        raise MalformedError("it lacks prompt_logprobs at some positions", tree.get("usage"))
    entries: list[dict[int, float]] = []
    for row in rows[first:]:
        if not isinstance(row, dict):
            raise MalformedError("it lacks prompt_logprobs at some positions", tree.get("usage"))
        entries.append({int(token): value["logprob"] for token, value in row.items()})
    ids = [int(each) for each in ids_T]
    if any(token not in row for token, row in zip(ids, entries, strict=True)):
        raise MalformedError("its prompt_logprobs are about other tokens than the prompt's", tree.get("usage"))
    sampled = [row[token] for token, row in zip(ids, entries, strict=True)]
    rows_ids, rows_logp = _rows(ids, sampled, entries, top_k, vocab_size, usage=tree.get("usage"))
    made = completions.completion(request, ids_T, rows_ids, rows_logp, top_k=top_k, stop_ids=stop_ids, version=version)
    return Answer(made, usage if usage != Usage() else Usage(num, 1))


def _numbered(token: object) -> int:
    """Return the id of a token that a server writes as `token_id:ID`; -1 for any other."""
    number = token.removeprefix("token_id:") if isinstance(token, str) and token.startswith("token_id:") else ""
    return int(number) if number.isdecimal() else -1


# ------------------------------------------------------------------------------------------------------ text


def from_chat(tree: Any, request: Request, tokens: LocalTokens, *, top_k: int, version: int) -> Answer:
    """Parse an answer of /chat/completions: its text in the local tokenizer's ids, the end of the turn included.

    With top_k: the endpoint's own tokens, as ids, with their distributions. If one of them is not a token of the local
    tokenizer, the completion is the text without a distribution (`top` None).
    """
    choice, usage = _choice(tree)
    message = choice.get("message")
    if not isinstance(message, dict):
        raise MalformedError("it has no message", tree.get("usage"))
    finish: FinishReason = "stop" if choice.get("finish_reason") == "stop" else "length"
    if top_k:
        made = _mapped(choice, request, tokens, top_k, finish, version, tree.get("usage"))
        if made is not None:
            return _billed(made, usage, request)
    text = _continuation(full_text(message), request.opened)
    ids = tokens.encode(text)
    if finish == "stop" and tokens.end_id is not None and ids[-1:] != [tokens.end_id]:
        ids.append(tokens.end_id)
    if not ids:
        raise MalformedError("it has no text", tree.get("usage"))
    none = np.empty(0, np.float32)
    made = Completion(request.request_id, np.array(ids, np.int32), none, None, finish, version, text)
    return _billed(made, usage, request)


def full_text(message: Mapping[str, Any]) -> str:
    """Return a message's text with the reasoning that a server keeps apart, as `<think>…</think>` in front of it."""
    content = message.get("content") or ""
    if isinstance(content, list):
        content = "".join(part.get("text", "") for part in content if isinstance(part, dict))
    reasoning = message.get("reasoning_content") or message.get("reasoning") or ""
    if not isinstance(reasoning, str) or not reasoning.strip():
        return str(content)
    # A completion that was cut within its reasoning has no content, and its reasoning has no end.
    closing = f"\n</think>\n\n{content.lstrip()}" if content else ""
    return f"<think>\n{reasoning.strip()}{closing}"


def _continuation(text: str, opened: str) -> str:
    """Return a text without the beginning that is in the prompt already (the thinking that a chat template opens)."""
    for start in (opened, opened.strip()):
        if start and text.startswith(start):
            return text[len(start) :]
    return text


def _mapped(
    choice: Mapping[str, Any],
    request: Request,
    tokens: LocalTokens,
    top_k: int,
    finish: FinishReason,
    version: int,
    usage: Any,
) -> Completion | None:
    """Return the completion in the endpoint's own tokens; None if they are not all tokens of the local tokenizer, or not
    the whole text (a server may give no log-probabilities of the reasoning)."""
    items = (choice.get("logprobs") or {}).get("content")
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise MalformedError("it lacks log-probabilities", usage)
    items = _without_opened(items, request.opened)
    ids = [tokens.by_bytes.get(token_bytes(item)) for item in items]
    whole = b"".join(token_bytes(item) for item in items).decode("utf-8", "replace")
    if not ids or None in ids or not _holds(whole, choice["message"], request.opened):
        return None
    known = [each for each in ids if each is not None]
    entries: list[dict[int, float]] = []
    for item in items:
        found: dict[int, float] = {}
        for each in item.get("top_logprobs") or ():
            index = tokens.by_bytes.get(token_bytes(each))
            if index is not None:  # any other token is part of the tail
                found[index] = each["logprob"]
        entries.append(found)
    sampled = [item.get("logprob") for item in items]
    rows_ids, rows_logp = _rows(known, sampled, entries, top_k, tokens.vocab_size, usage=usage)
    made = completions.completion(
        request, np.array(known), rows_ids, rows_logp, top_k=top_k, stop_ids=tokens.end_ids, version=version
    )
    return replace(made, finish_reason=finish)


def _holds(whole: str, message: Mapping[str, Any], opened: str) -> bool:
    """Return whether a text holds all that a message says: its content and its reasoning, but for white space."""

    def bare(text: str) -> str:
        return "".join(text.split())

    said = _continuation(full_text(message), opened)
    parts = [part for part in re.split(r"</?think>", said) if part.strip()]
    return all(bare(part) in bare(whole) for part in parts)


def _without_opened(items: Sequence[Mapping[str, Any]], opened: str) -> Sequence[Mapping[str, Any]]:
    """Return the tokens behind those that are in the prompt already, if a token ends where they do."""
    if not opened:
        return items
    so_far = b""
    for number, item in enumerate(items):
        so_far += token_bytes(item)
        if so_far == opened.encode():
            return items[number + 1 :]
        if not opened.encode().startswith(so_far):
            break
    return items


def token_bytes(item: Mapping[str, Any]) -> bytes:
    """Return the bytes of a token in a chat answer's log-probabilities."""
    given = item.get("bytes")
    if isinstance(given, list) and given:
        return bytes(given)
    token = item.get("token")
    return token.encode() if isinstance(token, str) else b""


# ----------------------------------------------------------------------------------------------------- common


def _choice(tree: Any) -> tuple[Mapping[str, Any], Usage]:
    """Return the one choice of an answer, and its usage."""
    if not isinstance(tree, dict):
        raise MalformedError("it is no JSON object")
    usage, choices = tree.get("usage"), tree.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        number = len(choices) if isinstance(choices, list) else "no"
        raise MalformedError(f"it has {number} choices where one was asked for", usage)
    return choices[0], usage_of(usage)


def usage_of(usage: Any) -> Usage:
    """Return the billed tokens of an answer; none if it does not state them."""
    if not isinstance(usage, dict):
        return Usage()
    return Usage(int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0))


def _billed(completion: Completion, usage: Usage, request: Request) -> Answer:
    """Return the answer; its tokens are counted here if the endpoint does not state them."""
    counted = Usage(len(request.prompt_ids), len(completion.ids_T))
    return Answer(completion, usage if usage != Usage() else counted)


def _rows(
    ids: Sequence[int],
    sampled: Sequence[Any],
    entries: Sequence[Mapping[int, float]] | None,
    top_k: int,
    vocab_size: int,
    *,
    usage: Any,
) -> tuple[Array, Array]:
    """Return ids and log-probabilities [T, 1 + K] as `completions.completion` takes them, checked."""
    rows_ids = np.full((len(ids), 1 + top_k), -1, np.int64)
    rows_logp = np.full((len(ids), 1 + top_k), -np.inf, np.float32)
    rows_ids[:, 0] = ids
    if not all(isinstance(value, int | float) and value <= MAX_TOKEN_ERROR for value in sampled):
        raise MalformedError("some tokens have no log-probability, or one above 0", usage)
    rows_logp[:, 0] = np.minimum(np.array(sampled, np.float64), 0.0)
    for t, top in enumerate(entries or ()):
        if -1 in top:
            raise MalformedError("its top_logprobs are not about token ids", usage)
        # Ids above the vocabulary are padding of the model's output head: part of the tail.
        known = [(token, value) for token, value in top.items() if token < vocab_size and value > CLAMPED]
        best = sorted(known, key=lambda item: -item[1])[:top_k]
        if not best:
            raise MalformedError("it lacks top_logprobs at some positions", usage)
        if ids[t] in top and abs(top[ids[t]] - sampled[t]) > MAX_TOKEN_ERROR:
            raise MalformedError("a token and its entry have different log-probabilities", usage)
        rows_ids[t, 1 : 1 + len(best)] = [token for token, _ in best]
        rows_logp[t, 1 : 1 + len(best)] = np.minimum([value for _, value in best], 0.0)
    if top_k and (np.exp(rows_logp[:, 1:].astype(np.float64)).sum(1) > 1 + MAX_MASS_ERROR).any():
        raise MalformedError("the probabilities at a position add up to more than 1", usage)
    return rows_ids, rows_logp
