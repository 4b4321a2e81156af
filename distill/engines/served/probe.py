"""What an endpoint offers, found out with a few requests of one token each before anything is spent.

Three ways to ask for completions, the best that the endpoint has:
    ids     /completions with token ids, which answers with token ids and log-probabilities by id (vLLM's server), from the
            same tokenizer: ids travel in both directions
    mapped  /chat/completions with log-probabilities; the endpoint's tokens are found among the local ones by their bytes
    text    /chat/completions; the text is tokenised here, and there are no log-probabilities
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from distill.engines.served.answers import LocalTokens, token_bytes
from distill.engines.served.client import Client, MalformedError, RefusedError
from distill.plug import nearest
from distill.records import UserError

TEXT = "The  quick brown fox; 1234567 naïve Zürich 数据 — def f(x):\n\treturn x**2  # <b>ok</b> 🙂"
"""A text that tokenizers cut in different ways: spaces, digits, accents, other scripts, code."""
COOL, CUT = 0.5, 0.5
"""Temperature and top_p of the request that shows whether log-probabilities are those before sampling."""
MAX_CHANGE = 0.25
"""Largest difference in nats that noise makes between two answers about the same position."""
SMALLER = (20, 5, 1)
"""Numbers of entries tried after one that the endpoint refuses."""
NEUTRAL = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
"""Servers fill in what a request leaves out from the model's generation_config.json, which may cut the distribution."""

Mode = Literal["ids", "mapped", "text"]


@dataclass(frozen=True, slots=True)
class Offer:
    """What an endpoint offers. body: fields that every request carries. limit: the name of the limit on tokens.

    raw: whether its log-probabilities are of the distribution before temperature and top-p.
    given: the number of entries at a position. tokens: the longest prompt and completion together; None = unknown.
    """

    mode: Mode
    body: Mapping[str, Any]
    limit: str
    given: int
    raw: bool
    tokens: int | None
    note: str


def offer_of(client: Client, model: str, tokens: LocalTokens, top_k: int) -> Offer:
    """Find out how to ask the endpoint for completions with `top_k` entries at a position (0: none are needed).

    Raises UserError if it cannot be used, or gives no log-probabilities that fit the local tokenizer.
    """
    context = _check_model(client, model)
    if (offer := _ids(client, model, tokens, top_k, context)) is not None:
        return offer
    return _chat(client, model, tokens, top_k, context)


def check_scores(client: Client, model: str, tokens: LocalTokens, offer: Offer, top_k: int) -> None:
    """Check that the endpoint returns `prompt_logprobs` for token ids. Raises UserError otherwise."""
    cannot = (
        "engine: scoring needs log-probabilities of given texts (prompt_logprobs of /completions with token ids and the same "
        "tokenizer), which vLLM's server returns and this endpoint does not; use it for generate, or score with an engine of "
        "this machine."
    )
    if offer.mode != "ids":
        raise UserError(cannot)
    body = {
        **offer.body,
        "prompt": tokens.encode(TEXT)[:4],
        "max_tokens": 1,
        "temperature": 0,
        "prompt_logprobs": top_k,
    }
    try:
        rows = client.post("/completions", body, lambda tree: tree["choices"][0].get("prompt_logprobs"))
    except RefusedError as refused:
        if refused.status != 400:
            raise UserError(client.message(refused)) from None
        raise UserError(
            f"engine: the endpoint refuses prompt_logprobs: {top_k} ({refused.words!r}): lower top_logprobs, or start vLLM's "
            f"server with --max-logprobs {top_k}."
        ) from None
    if not isinstance(rows, list):
        raise UserError(cannot)


def _check_model(client: Client, model: str) -> int | None:
    """Check that the endpoint has the model; return its longest context, if it states that."""
    try:
        listed = client.get("/models")
    except RefusedError as refused:
        if refused.status in (404, 405, 501):
            return None  # not every endpoint lists its models
        raise UserError(client.message(refused)) from None
    rows = listed.get("data") if isinstance(listed, dict) else None
    if not isinstance(rows, list):
        return None
    known = {row["id"]: row for row in rows if isinstance(row, dict) and isinstance(row.get("id"), str)}
    if known and model not in known:
        raise UserError(f"engine.model: the endpoint has no model {model!r}.{nearest(model, known)}")
    length = known.get(model, {}).get("max_model_len")
    return length if isinstance(length, int) else None


# ------------------------------------------------------------------------------------------------- token ids


def _ids(client: Client, model: str, tokens: LocalTokens, top_k: int, context: int | None) -> Offer | None:
    """The offer of an endpoint that takes and returns ids of the same tokenizer; None of any other."""
    common = {
        "model": model,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "add_special_tokens": False,
        "skip_special_tokens": False,
        "ignore_eos": True,
        **NEUTRAL,
    }
    ids = tokens.encode(TEXT)

    def ask(prompt: Any, **more: Any) -> Mapping[str, Any]:
        body = {**common, "prompt": prompt, "max_tokens": 1, "seed": 0, **more}
        return client.post("/completions", body, _first_choice)

    try:
        by_text = ask(TEXT, temperature=0.0, logprobs=top_k)
        if by_text.get("prompt_token_ids") != ids or not by_text.get("token_ids"):
            return None
        by_ids = ask(ids, temperature=1.0, logprobs=top_k)
    except RefusedError as refused:
        if refused.status in (401, 403):
            raise UserError(client.message(refused)) from None
        if top_k and "logprob" in refused.words.lower():
            raise UserError(
                _too_many(top_k, refused.words, _most(lambda few: ask(ids, temperature=1.0, logprobs=few)))
            ) from None
        return None
    if by_ids.get("prompt_token_ids") != ids:
        return None
    given, raw = 0, True
    if top_k:
        # The most probable token is sampled, so that it is no entry beside those that were asked for.
        given = min(top_k, len(_top(by_text)))
        if not given:
            raise UserError(_too_many(top_k, "it returns none", 0))
        raw = _is_raw(_top(by_ids), _top(ask(ids, temperature=COOL, top_p=CUT, logprobs=top_k)))
    note = "the endpoint takes and returns token ids of the same tokenizer"
    return Offer("ids", common, "max_tokens", given, raw, context, note)


def _top(choice: Mapping[str, Any]) -> dict[str, float]:
    rows = (choice.get("logprobs") or {}).get("top_logprobs") or [{}]
    return dict(rows[0] or {})


# ------------------------------------------------------------------------------------------------------ chat


def _chat(client: Client, model: str, tokens: LocalTokens, top_k: int, context: int | None) -> Offer:
    """The offer of an endpoint that is asked for chat completions. Raises UserError if it refuses those too."""
    messages = [{"role": "user", "content": "Say a random word."}]
    refused: RefusedError | None = None
    # Servers of open models take the neutral values; providers refuse fields that they do not know, or another limit's name.
    for extra, limit in ((NEUTRAL, "max_tokens"), ({}, "max_tokens"), ({}, "max_completion_tokens")):
        common = {"model": model, **extra}

        def ask(common: Mapping[str, Any] = common, limit: str = limit, **more: Any) -> Mapping[str, Any]:
            body = {**common, "messages": messages, limit: 16, "seed": 0, "temperature": 1.0, **more}
            return client.post("/chat/completions", body, _first_choice)

        try:
            plain = ask()
        except RefusedError as error:
            refused = error
            if error.status not in (400, 422):
                break
            continue
        del plain
        if not top_k:
            return Offer(
                "text",
                common,
                limit,
                0,
                True,
                context,
                "the endpoint is asked for chat completions: text without log-probabilities",
            )
        try:
            choice = ask(logprobs=True, top_logprobs=top_k)
        except RefusedError as error:
            most = _most(lambda few, ask=ask: ask(logprobs=True, top_logprobs=few))
            raise UserError(_too_many(top_k, error.words, most)) from None
        given = _mapped_entries(choice, tokens)
        second = _chat_top(ask(logprobs=True, top_logprobs=top_k, temperature=COOL, top_p=CUT))
        raw = _is_raw(_chat_top(choice), second)
        note = "the endpoint is asked for chat completions; its tokens are those of the local tokenizer, by their bytes"
        return Offer("mapped", common, limit, given, raw, context, note)
    assert refused is not None
    raise UserError(client.message(refused))


def _mapped_entries(choice: Mapping[str, Any], tokens: LocalTokens) -> int:
    """Return the number of entries at a position. Raises UserError if the tokens are not those of the local tokenizer."""
    items = (choice.get("logprobs") or {}).get("content")
    way = "Set top_logprobs: 0 to store the text, and learn from it with loss: {fn: cross_entropy} or have it scored by a model of this machine (kind: score)."
    if not isinstance(items, list) or not items or not items[0].get("top_logprobs"):
        raise UserError(f"engine: top_logprobs is set, but the endpoint returns no log-probabilities. {way}")
    for item in items:
        if token_bytes(item) not in tokens.by_bytes:
            raise UserError(
                f"engine: top_logprobs is set, but the endpoint's token {item.get('token')!r} is no token of the stage's model: "
                f"the endpoint has another tokenizer. {way}"
            )
    return min(len(item["top_logprobs"]) for item in items)


def _chat_top(choice: Mapping[str, Any]) -> dict[str, float]:
    items = (choice.get("logprobs") or {}).get("content") or [{}]
    return {token_bytes(each).hex(): each["logprob"] for each in items[0].get("top_logprobs") or ()}


# ----------------------------------------------------------------------------------------------------- common


def _first_choice(tree: Any) -> Mapping[str, Any]:
    choices = tree.get("choices") if isinstance(tree, dict) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise MalformedError("it has not one choice")
    return choices[0]


def _is_raw(plain: Mapping[str, float], cooled: Mapping[str, float]) -> bool:
    """Whether another temperature and top_p leave the log-probabilities of the same position alone."""
    common = [
        abs(plain[key] - cooled[key]) for key in plain.keys() & cooled.keys() if max(plain[key], cooled[key]) > -50
    ]
    return len(common) >= min(2, len(plain)) and max(common, default=0.0) <= MAX_CHANGE


def _most(ask: Any) -> int:
    """Return the largest of a few numbers of entries that the endpoint gives."""
    for few in SMALLER:
        try:
            ask(few)
        except RefusedError:
            continue
        return few
    return 0


def _too_many(top_k: int, words: str, most: int) -> str:
    if not most:
        return (
            f"engine: the endpoint gives no log-probabilities ({words!r}); set top_logprobs: 0 to store the text only."
        )
    return (
        f"engine: the endpoint refuses {top_k} entries a position ({words!r}); set top_logprobs: {most}, or start vLLM's server "
        f"with --max-logprobs {top_k}."
    )
