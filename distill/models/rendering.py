"""Render messages to token ids with the task's template and the tokenizer's chat template; the only place that does."""

from __future__ import annotations

import json
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from distill.models.chat_template import PROBE, ChatTemplate
from distill.reasoning import MARKERS, split_reasoning
from distill.records import Array, Message, Template, UserError

REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Keys under which data sets and templates keep an assistant's reasoning beside its content."""
TOOL_KEYS = ("tool_calls",)
MARKS = frozenset({mark for pair in MARKERS for mark in pair} | {"<|start|>assistant<|channel|>final<|message|>"})
ENDS_OF_REASONING = frozenset(mark for pair in MARKERS for mark in pair) - {"<|end|>"}
"""Marks that may be a completion's last token and belong to its text."""

_templates: weakref.WeakKeyDictionary[Any, dict[str, ChatTemplate]] = weakref.WeakKeyDictionary()


def chat_template_of(tokenizer: Any, template: Template) -> ChatTemplate | None:
    """Return the tokenizer's chat template under the task template's options; None for prompts of plain text."""
    if not (template.chat and tokenizer.chat_template):
        if template.options:
            raise UserError(
                f"template_options: {', '.join(template.options)} cannot be used: the prompts are plain text, without a chat template."
            )
        return None
    kept = _templates.setdefault(tokenizer, {})
    key = json.dumps([template.options, str(tokenizer.chat_template)], sort_keys=True, default=str)
    if key not in kept:
        kept[key] = ChatTemplate(tokenizer, template.options)
    return kept[key]


def render_prompt(tokenizer: Any, template: Template, messages: Sequence[Message], tools: Any = None) -> Array:
    """Return the ids [T] of the prompt that poses `messages` under a task's template, ready to be continued.

    With a chat template: the task template's system message, the conversation, the assistant's header. Without
    one (base models), or for a template with chat=False: earlier messages as paragraphs, then the template's plain text
    around the last question, with the special tokens that the tokenizer itself puts in front of a text. Raises UserError for
    what the chat template cannot hold.
    """
    return _encode(tokenizer, prompt_text(tokenizer, template, messages, tools), _leading(tokenizer, template))


def prompt_text(tokenizer: Any, template: Template, messages: Sequence[Message], tools: Any = None) -> str:
    """Return the text of `render_prompt`, without the special tokens that a tokenizer puts in front of plain text."""
    chat = chat_template_of(tokenizer, template)
    if chat is None:
        if tools or any(message.get(key) for message in messages for key in TOOL_KEYS):
            raise UserError("tools need a chat template, and the prompts are plain text.")
        return _plain(template, messages) + template.prefill
    conversation = list(messages)
    if template.system is not None and conversation[0]["role"] not in ("system", "developer"):
        conversation.insert(0, {"role": "system", "content": template.system})
    text = _rendered(chat, chat.with_system(conversation), prompt=True, tools=tools)
    return (
        text
        if template.prefill.strip() and chat.opened.strip() == template.prefill.strip()
        else text + template.prefill
    )


def _rendered(chat: ChatTemplate, messages: Sequence[Message], *, prompt: bool, tools: Any) -> str:
    """Render a conversation. Raises UserError for one that the template refuses or of which it ignores a part."""
    import jinja2

    if tools and "tools" not in chat.variables:
        raise UserError("the model's chat template does not read tools.")
    try:
        text = chat.text(messages, prompt=prompt, tools=tools)
    except (jinja2.TemplateError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"the model's chat template refuses the conversation: {error}") from None
    for message in messages:
        content = message.get("content")
        if message["role"] != "assistant" and isinstance(content, str) and content.strip() not in text:
            raise UserError(f"the model's chat template leaves out a message of role {message['role']!r}.")
    return text


def _plain(template: Template, messages: Sequence[Message]) -> str:
    *earlier, last = messages
    parts = [m["content"] if m["role"] == "system" else f"{m['role'].capitalize()}: {m['content']}" for m in earlier]
    return "".join(f"{part}\n\n" for part in parts) + template.plain.replace("{question}", last["content"])


def render_reply(
    tokenizer: Any,
    template: Template,
    messages: Sequence[Message],
    reply: Mapping[str, Any],
    tools: Any = None,
    finished: bool = True,
) -> Array:
    """Return the ids [T] of an assistant's message that continues `render_prompt(tokenizer, template, messages)`.

    Reasoning may stand beside the content (REASONING_KEYS) or in it. If the chat template's own rendering of the whole
    conversation continues the prompt and holds all of the reply, the ids are those; else reasoning is written between
    `<think>` and `</think>`, without the `<think>` that the prompt has opened already. The token that ends the turn is
    included unless the reply was cut (finished False). Raises UserError for a reply that cannot be rendered, such as tool calls in plain text.
    """
    chat = chat_template_of(tokenizer, template)
    beside = next((reply[key] for key in REASONING_KEYS if reply.get(key)), None)
    content = reply.get("content") or ""
    if chat is None:
        if any(reply.get(key) for key in TOOL_KEYS):
            raise UserError("tool calls need a chat template, and the prompts are plain text.")
        text = content if beside is None else f"<think>{beside}</think>{content}"
        return render_completion(tokenizer, text, finished)
    inside, answer = (None, content) if beside is not None else split_reasoning(content)
    reasoning = beside if beside is not None else inside
    if reasoning is not None and reasoning.strip() and chat.closes_thinking:
        raise UserError("the prompt switches thinking off, and the reply has reasoning.")
    prompt = prompt_text(tokenizer, template, messages, tools)
    whole = _own_form(chat, template, messages, reply, reasoning, answer, tools, prompt) if finished else None
    if whole is None:
        if any(reply.get(key) for key in TOOL_KEYS):
            raise UserError("the model's chat template does not render the tool calls of the assistant.")
        begun = opened_thinking(tokenizer, template)
        begun = begun if any(begun.lstrip().startswith(opening) for opening, _ in MARKERS) else ""
        whole = (
            _our_form(begun, content, reasoning, answer, beside=beside is not None, finished=finished) + chat.turn_end
        )
    return _encode(tokenizer, whole if finished else whole.removesuffix(chat.turn_end))


def _own_form(
    chat: ChatTemplate,
    template: Template,
    messages: Sequence[Message],
    reply: Mapping[str, Any],
    reasoning: str | None,
    answer: str,
    tools: Any,
    prompt: str,
) -> str | None:
    """Return the rest of the template's own rendering after the prompt; None if it does not hold the whole reply."""
    import jinja2

    conversation = list(messages)
    if template.system is not None and conversation[0]["role"] not in ("system", "developer"):
        conversation.insert(0, {"role": "system", "content": template.system})
    beside = {**reply, "role": "assistant", "content": answer}
    if reasoning is not None:
        beside |= dict.fromkeys(REASONING_KEYS, reasoning.strip())
    inline = {**reply, "role": "assistant", "content": reply.get("content") or ""}
    for message in (beside, inline):
        try:
            text = chat.text([*chat.with_system(conversation), message], prompt=False, tools=tools)
        except (jinja2.TemplateError, KeyError, TypeError, ValueError):
            continue
        if not text.startswith(prompt):
            continue
        rest = text[len(prompt) :]
        needed = [part.strip() for part in (reasoning, answer) if part and part.strip()]
        calls = [str(call.get("function", call).get("name")) for call in reply.get("tool_calls") or []]
        if all(rest.count(part) >= 1 for part in [*needed, *calls]) and _one_thought(chat.opened + rest, reasoning):
            after = max((rest.rfind(part) + len(part) for part in needed), default=0)
            end = rest.find(chat.turn_end, after) if chat.turn_end else -1
            return rest[: end + len(chat.turn_end)] if end >= 0 else rest + chat.turn_end
    return None


def _one_thought(text: str, reasoning: str | None) -> bool:
    """Return whether a reply's text opens and closes its reasoning once, or never if it has none."""
    for opening, closing in MARKERS:
        if opening in text:
            closed = text.count(opening) == 1 and text.count(closing) == 1
            return closed or (reasoning is None and text.count(closing) <= 1)
    return reasoning is None


def _our_form(begun: str, content: str, reasoning: str | None, answer: str, *, beside: bool, finished: bool) -> str:
    """Write a reply with its reasoning between `<think>` and `</think>`, or the marks that the prompt has begun with.

    Text that holds its reasoning is kept word for word, without the mark that the prompt has opened.
    """
    opening, closing = next(((o, c) for o, c in MARKERS if begun.startswith(o)), MARKERS[0])
    if beside and reasoning is not None:
        body = f"{reasoning.strip()}\n{closing}\n\n{answer.lstrip()}"
        return body if begun.endswith("\n") else f"\n{body}" if begun else f"{opening}\n{body}"
    if not begun:
        return content
    if reasoning is None and finished and not content.lstrip().startswith(opening):
        return f"\n{closing}\n\n{content}"
    return content.lstrip().removeprefix(opening).lstrip("\n") if content.lstrip().startswith(opening) else content


def render_completion(tokenizer: Any, completion: str, finished: bool = True) -> Array:
    """Return the ids [T] of a completion of a plain-text prompt, with the final EOS unless it was cut.

    For text from files only; what an engine sampled keeps its ids.
    """
    ids = _encode(tokenizer, completion)
    if tokenizer.eos_token_id is None or not finished:
        return ids
    return np.append(ids, np.int32(tokenizer.eos_token_id))


def opened_thinking(tokenizer: Any, template: Template) -> str:
    """Return the text that a prompt has begun the completion with: the template's prefill, or the thinking it opens."""
    chat = chat_template_of(tokenizer, template)
    return template.prefill or ("" if chat is None else chat.opened)


def turn_end(tokenizer: Any, template: Template) -> str:
    """Return the text that ends a completion: that of the assistant's turn, or the EOS token of plain text."""
    chat = chat_template_of(tokenizer, template)
    return (tokenizer.eos_token or "") if chat is None else chat.turn_end


def decode(tokenizer: Any, ids_T: Array) -> str:
    """Return the text of a completion without special tokens, but with those that mark reasoning and what follows it."""
    ids = np.asarray(ids_T)
    special = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    while len(ids) and special.get(int(ids[-1]), "<think>") not in ENDS_OF_REASONING and int(ids[-1]) in special:
        ids = ids[:-1]
    hidden = [i for i, content in special.items() if not any(content in mark for mark in MARKS)]
    kept = ids[~np.isin(ids, hidden)] if hidden else ids
    text: str = tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def check_template(tokenizer: Any, template: Template, where: str) -> None:
    """Render one question, so that options or a chat template that cannot be used are refused. Raises UserError."""
    try:
        render_prompt(tokenizer, template, ({"role": "user", "content": PROBE[0]},))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _leading(tokenizer: Any, template: Template) -> Array:
    """Return the ids that the tokenizer's own call puts before a text; none for a chat template, which writes its own."""
    if template.chat and tokenizer.chat_template:
        return np.empty(0, np.int32)
    bare = tokenizer(PROBE[0], add_special_tokens=False)["input_ids"]
    called = tokenizer(PROBE[0])["input_ids"]
    starts = [n for n in range(len(called) - len(bare) + 1) if called[n : n + len(bare)] == bare]
    return np.asarray(called[: starts[0]] if starts else [], dtype=np.int32)


def _encode(tokenizer: Any, text: str, leading: Array | None = None) -> Array:
    ids = np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)
    return ids if leading is None or not len(leading) else np.concatenate([leading, ids])
