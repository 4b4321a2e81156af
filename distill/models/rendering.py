"""Render prompts to token ids with the task's template and the tokenizer's chat template, and decode completions.

Only this module and `replies` turn messages into ids.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from distill.models.chat_template import ChatTemplate, opened_by
from distill.models.probe import PROBE
from distill.models.template_source import template_names
from distill.models.tool_calls import TURN_ENDS
from distill.reasoning import MARKERS, SHARED, split_reasoning
from distill.records import Array, Message, Template, UserError

TOOL_KEYS = ("tool_calls",)
MARKS = frozenset({mark for pair in MARKERS for mark in pair} | {"<|start|>assistant<|channel|>final<|message|>"})
ENDS_OF_REASONING = frozenset(mark for pair in MARKERS for mark in pair) - set(SHARED)
"""Marks that may be a completion's last token and belong to its text."""

_templates: weakref.WeakKeyDictionary[Any, dict[str, ChatTemplate]] = weakref.WeakKeyDictionary()
_turn_ends: weakref.WeakKeyDictionary[Any, tuple[str, dict[int, str]]] = weakref.WeakKeyDictionary()


def chat_template_of(tokenizer: Any, template: Template, tools: Any = None) -> ChatTemplate | None:
    """Return the tokenizer's chat template under the task template's options; None for prompts of plain text."""
    if not (template.chat and tokenizer.chat_template):
        if template.options:
            raise UserError(
                f"template_options: {', '.join(template.options)} cannot be used: the prompts are plain text, without a "
                "chat template."
            )
        return None
    return _kept(tokenizer, template.options, bool(tools))


def _kept(tokenizer: Any, options: Mapping[str, Any], tools: bool = False) -> ChatTemplate:
    kept = _templates.setdefault(tokenizer, {})
    key = json.dumps([options, str(tokenizer.chat_template), tools], sort_keys=True, default=str)
    if key not in kept:
        kept[key] = ChatTemplate(tokenizer, options, tools=tools)
    return kept[key]


def render_prompt(tokenizer: Any, template: Template, messages: Sequence[Message], tools: Any = None) -> Array:
    """Return the ids [T] of the prompt that poses `messages` under a task's template, ready to be continued.

    With a chat template: the task template's system message, the conversation, the assistant's header. Without
    one (base models), or for a template with chat=False: earlier messages as paragraphs, then the template's plain text
    around the last question, with the special tokens that the tokenizer itself puts in front of a text. Raises UserError for
    what the chat template cannot hold.
    """
    return encode_prompt(tokenizer, template, prompt_text(tokenizer, template, messages, tools))


def encode_prompt(tokenizer: Any, template: Template, text: str) -> Array:
    """Return the ids [T] of a prompt's text, with the special tokens that a tokenizer puts in front of plain text."""
    leading, bos = _leading(tokenizer, template), tokenizer.bos_token
    if bos and len(leading) and leading[-1] == tokenizer.bos_token_id and text.startswith(bos):
        leading = leading[:-1]  # the text begins with its own BOS
    return encode(tokenizer, text, leading)


def prompt_text(tokenizer: Any, template: Template, messages: Sequence[Message], tools: Any = None) -> str:
    """Return the text of `render_prompt`, without the special tokens that a tokenizer puts in front of plain text."""
    chat = chat_template_of(tokenizer, template, tools)
    if chat is None:
        if tools or any(message.get(key) for message in messages for key in TOOL_KEYS):
            raise UserError("tools need a chat template, and the prompts are plain text.")
        return plain_text(template.plain, messages) + template.prefill
    text = _rendered(chat, conversation_of(chat, template, messages), tools)
    return text + rest_of_prefill(template, opened_by(text))


def chat_messages(tokenizer: Any, template: Template, messages: Sequence[Message]) -> tuple[Message, ...]:
    """Return the messages of `render_prompt`'s prompt, for a server that renders them itself: with the task template's system
    message, or one message that holds a prompt of plain text. What the prompt begins for the assistant is left out."""
    chat = chat_template_of(tokenizer, template)
    if chat is None:
        return ({"role": "user", "content": plain_text(template.plain, messages)},)
    return tuple(conversation_of(chat, template, messages))


def conversation_text(tokenizer: Any, messages: Sequence[Message]) -> str:
    """Return a whole conversation as the tokenizer's chat template writes it. Raises UserError if it is refused."""
    return _kept(tokenizer, {}).text(messages, prompt=False)


def rest_of_prefill(template: Template, opened: str) -> str:
    """Return the template's prefill without the thinking marker that the chat template has opened already."""
    prefill = template.prefill.lstrip()
    if opened and prefill.startswith(opened.strip()):
        return prefill.removeprefix(opened.strip()).lstrip()
    return template.prefill


def conversation_of(chat: ChatTemplate, template: Template, messages: Sequence[Message]) -> list[Message]:
    """Return messages with the task template's system message and its form of the question (the user's last turn), in the roles
    that the chat template has."""
    conversation = list(messages)
    if template.question != "{question}":
        last = max(n for n, message in enumerate(conversation) if message["role"] == "user")
        asked = template.question.replace("{question}", conversation[last]["content"])
        conversation[last] = {**conversation[last], "content": asked}
    if template.system is not None and conversation[0]["role"] not in ("system", "developer"):
        conversation.insert(0, {"role": "system", "content": template.system})
    return chat.with_system(conversation)


def _rendered(chat: ChatTemplate, messages: Sequence[Message], tools: Any) -> str:
    """Render a prompt. Raises UserError for a conversation that the template refuses or of which it ignores a part.

    Reasoning of earlier turns may be left out, as many templates do, and the text beside a tool call.
    """
    if tools and "tools" not in chat.variables:
        raise UserError("the model's chat template does not read tools.")
    text = chat.text(messages, prompt=True, tools=tools)
    chat.check_calls(messages, tools)
    for message in messages:
        content = message.get("content")
        if message["role"] == "assistant" and isinstance(content, str):
            content = None if message.get("tool_calls") else split_reasoning(content)[1]
        if isinstance(content, str) and not any(form in text for form in _forms(content.strip())):
            raise UserError(f"the model's chat template leaves out a message of role {message['role']!r}.")
    return text


def _forms(content: str) -> tuple[str, ...]:
    """Return a text as a template may write it: as it is, or as JSON (tool results in Llama 3 and GPT-OSS)."""
    return content, json.dumps(content, ensure_ascii=False)[1:-1], json.dumps(content)[1:-1]


def plain_text(plain: str, messages: Sequence[Message]) -> str:
    """Return a prompt of plain text: earlier messages as paragraphs, then `plain` around the last question."""
    *earlier, last = messages
    parts = [m["content"] if m["role"] == "system" else f"{m['role'].capitalize()}: {m['content']}" for m in earlier]
    return "".join(f"{part}\n\n" for part in parts) + plain.replace("{question}", last["content"])


def render_completion(tokenizer: Any, completion: str, finished: bool = True) -> Array:
    """Return the ids [T] of a completion of a plain-text prompt, with the final EOS unless it was cut.

    For text from files only; what an engine sampled keeps its ids.
    """
    ids = encode(tokenizer, completion)
    if tokenizer.eos_token_id is None or not finished:
        return ids
    return np.append(ids, np.int32(tokenizer.eos_token_id))


def opened_thinking(tokenizer: Any, template: Template) -> str:
    """Return the text that a prompt has begun the completion with: the thinking it opens and the template's prefill."""
    chat = chat_template_of(tokenizer, template)
    opened = "" if chat is None else chat.opened
    return opened + rest_of_prefill(template, opened)


def turn_end(tokenizer: Any, template: Template) -> str:
    """Return the text that ends a completion: that of the assistant's turn, or the EOS token of plain text."""
    chat = chat_template_of(tokenizer, template)
    return (tokenizer.eos_token or "") if chat is None else chat.turn_end


def end_id(tokenizer: Any, template: Template) -> int | None:
    """Return the id of the token that ends a completion, the last of `turn_end`; None if there is none."""
    text = turn_end(tokenizer, template)
    return int(encode(tokenizer, text)[-1]) if text else None


def turn_end_ids(tokenizer: Any, template: Template | None = None) -> frozenset[int]:
    """Return the ids of the tokens that end an assistant's turn, one that calls a tool included.

    Without a template: in any of the tokenizer's chat templates that renders an assistant's turn.
    """
    if template is not None:
        found = [chat_template_of(tokenizer, template), chat_template_of(tokenizer, template, tools=True)]
        chats = [chat for chat in found if chat is not None]
    else:
        names = template_names(tokenizer.chat_template)
        chats = [_kept(tokenizer, {} if name is None else {"chat_template": name}) for name in names]
    ids: set[int] = set()
    refusals = []
    for chat in chats:
        try:
            ends = [chat.turn_end, *(end for end in TURN_ENDS if end in chat.source)]
        except UserError as error:
            refusals.append(error)
            continue
        known = {token.content for token in tokenizer.added_tokens_decoder.values()}
        for end in ends:
            if end == ends[0] or end in known:
                ids |= set(tokenizer(end, add_special_tokens=False)["input_ids"][-1:])
    if refusals and not ids:
        raise refusals[0]
    return frozenset(ids)


def decode(tokenizer: Any, ids_T: Array) -> str:
    """Return the text of a completion without special tokens, but with those that mark reasoning and what follows it.

    The token that ends the turn is left out even where the tokenizer does not call it special.
    """
    ids = np.asarray(ids_T)
    special = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= {i: token for i, token in _turn_end_tokens(tokenizer).items() if i not in special}
    while len(ids) and special.get(int(ids[-1]), "<think>") not in ENDS_OF_REASONING and int(ids[-1]) in special:
        ids = ids[:-1]
    hidden = [i for i, content in special.items() if not any(content in mark for mark in MARKS)]
    kept = ids[~np.isin(ids, hidden)] if hidden else ids
    text: str = tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def _turn_end_tokens(tokenizer: Any) -> dict[int, str]:
    """Return the added tokens that end a turn in the tokenizer's chat templates; none if those render no such turn."""
    key = str(tokenizer.chat_template)
    if _turn_ends.get(tokenizer, ("", {}))[0] != key:
        try:
            ids = turn_end_ids(tokenizer)
        except UserError:
            ids = frozenset()
        added = tokenizer.added_tokens_decoder
        _turn_ends[tokenizer] = key, {i: added[i].content for i in ids if i in added}
    return _turn_ends[tokenizer][1]


def check_template(tokenizer: Any, template: Template, where: str) -> None:
    """Render one question, so that options or a chat template that cannot be used are refused. Raises UserError."""
    try:
        render_prompt(tokenizer, template, ({"role": "user", "content": PROBE[0]},))
    except UserError as error:
        raise error.within(f"{where}: {error}") from None


def _leading(tokenizer: Any, template: Template) -> Array:
    """Return the ids that the tokenizer's own call puts before a text; none for a chat template, which writes its own."""
    if template.chat and tokenizer.chat_template:
        return np.empty(0, np.int32)
    bare = tokenizer(PROBE[0], add_special_tokens=False)["input_ids"]
    called = tokenizer(PROBE[0])["input_ids"]
    starts = [n for n in range(len(called) - len(bare) + 1) if called[n : n + len(bare)] == bare]
    return np.asarray(called[: starts[0]] if starts else [], dtype=np.int32)


def encode(tokenizer: Any, text: str, leading: Array | None = None) -> Array:
    """Return the ids [T] of a text in which special tokens are written out, after the ids `leading`."""
    ids = np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)
    return ids if leading is None or not len(leading) else np.concatenate([leading, ids])
