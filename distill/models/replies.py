"""Render an assistant's message to the token ids that continue a prompt, with its reasoning and its tool calls."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distill.models.chat_template import ChatTemplate, is_thinking_closed, opened_by
from distill.models.rendering import (
    TOOL_KEYS,
    chat_template_of,
    conversation_of,
    encode,
    prompt_text,
    render_completion,
    rest_of_prefill,
)
from distill.models.tool_calls import TURN_ENDS
from distill.reasoning import MARKERS, REASONING_KEYS, canonical, split_reasoning
from distill.records import Array, Message, Template, UserError


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
    conversation continues the prompt and holds all of the reply, the ids are those; else reasoning is written between the
    marks that the template knows, or `<think>` and `</think>`, without the one that the prompt has opened already. The token
    that ends the turn is included unless the reply was cut (finished False). Raises UserError for a reply that cannot be
    rendered, such as tool calls in plain text.
    """
    chat = chat_template_of(tokenizer, template, tools)
    beside = next((reply[key] for key in REASONING_KEYS if reply.get(key)), None)
    content = reply.get("content") or ""
    calls = any(reply.get(key) for key in TOOL_KEYS)
    if chat is None:
        if calls:
            raise UserError("tool calls need a chat template, and the prompts are plain text.")
        text = content if beside is None else f"<think>{beside}</think>{content}"
        return render_completion(tokenizer, text.removeprefix(template.prefill), finished)
    inside, answer = (None, content) if beside is not None else split_reasoning(content)
    reasoning = beside if beside is not None else inside
    prompt = prompt_text(tokenizer, template, messages, tools)
    if reasoning is not None and reasoning.strip() and is_thinking_closed(prompt):
        raise UserError("the prompt switches thinking off, and the reply has reasoning.")
    conversation = conversation_of(chat, template, messages)
    given = _Given(reply, reasoning, answer, tools, prompt)
    opened, written = _begun(template, prompt)
    thinks = reasoning is None and (bool(opened) or canonical(content).lstrip().startswith("<think>"))
    is_answered = bool(answer.strip()) and not thinks
    own = _own_form(chat, conversation, given) if finished or is_answered else None
    if own is not None:
        rest, after = own
        return encode(tokenizer, _ended(rest, after, chat.turn_end, calls=calls) if finished else rest[:after])
    if calls:
        raise UserError(
            "the model's chat template cannot render this turn of tool calls: it leaves out the text or the reasoning beside "
            "them, or does not continue the prompt."
        )
    if opened == chat.opened and not template.prefill:
        form = chat.thinking_form
        if form is not None and reasoning is not None and reasoning.strip():
            body = form[0] + reasoning.strip() + form[1] + answer.strip()
            return encode(tokenizer, body + chat.turn_end if finished else body)
        if chat.answer_header and reasoning is None and is_answered:
            content = chat.answer_header + content
    if chat.answer_header and reasoning is not None:
        raise UserError("the model's chat template has no place for the reasoning of the reply.")
    body = _our_form((opened, written), content, reasoning, answer, beside=beside is not None, finished=finished)
    return encode(tokenizer, body + chat.turn_end if finished else body)


@dataclass(frozen=True, slots=True)
class _Given:
    """A reply, its reasoning and answer, the conversation's tools, and the text of the prompt."""

    reply: Mapping[str, Any]
    reasoning: str | None
    answer: str
    tools: Any
    prompt: str


def _begun(template: Template, prompt: str) -> tuple[str, str]:
    """Return (the thinking marker that the prompt has opened, the text that it has written after that)."""
    for prefill in (template.prefill, template.prefill.lstrip(), rest_of_prefill(template, "<think>")):
        opened = opened_by(prompt.removesuffix(prefill)) if prompt.endswith(prefill) else ""
        if opened:
            return opened, prefill
    inside = next((o for o, _ in MARKERS if template.prefill.lstrip().startswith(o)), "")
    if not inside:
        return "", template.prefill
    written = template.prefill.lstrip().removeprefix(inside)
    return inside + written[: len(written) - len(written.lstrip())], written.lstrip()


def _own_form(chat: ChatTemplate, conversation: list[Message], given: _Given) -> tuple[str, int] | None:
    """Return (the rest of the template's own rendering behind the prompt, where the reply ends in it).

    None if it does not hold the whole reply. Raises UserError if the template refuses the reply or leaves out its calls.
    """
    reasoning, answer, calls = given.reasoning, given.answer, bool(given.reply.get("tool_calls"))
    beside = {**given.reply, "role": "assistant", "content": answer}
    inline = {**given.reply, "role": "assistant", "content": given.reply.get("content") or ""}
    tried = [(beside, ""), (inline, "")]
    if reasoning is not None:
        beside |= dict.fromkeys(REASONING_KEYS, reasoning.strip())
        if calls:
            spelled = f"<think>\n{reasoning.strip()}\n</think>\n\n{answer}".rstrip()
            tried.append(({**inline, "content": spelled}, "<think>"))
    refusals = []
    for message, beginning in tried:
        try:
            text = chat.text([*conversation, message], prompt=False, tools=given.tools)
            chat.check_calls([*conversation, message], given.tools)
        except UserError as error:
            refusals.append(error)
            continue
        rest = _behind(given.prompt, text, calls=calls)
        if rest is None or not rest.lstrip().startswith(beginning):
            continue
        needed = [part.strip() for part in (reasoning, answer) if part and part.strip()]
        if all(part in rest for part in needed) and _one_thought(opened_by(given.prompt) + rest, reasoning):
            return rest, max((rest.rfind(part) + len(part) for part in needed), default=0)
    if len(refusals) == len(tried):
        raise refusals[0]
    return None


def _behind(prompt: str, text: str, *, calls: bool) -> str | None:
    """Return what a conversation's text holds behind the prompt; None if it does not continue it.

    A turn of tool calls without reasoning may close the thinking at once that the prompt opens with a line of its own.
    """
    if text.startswith(prompt):
        return text[len(prompt) :]
    opened = opened_by(prompt)
    start = prompt[: len(prompt) - len(opened)] + opened.strip()
    closed = calls and any(opened.strip() == o and text.startswith(start + c) for o, c in MARKERS)
    return text[len(start) :] if closed else None


def _ended(rest: str, after: int, turn_end: str, *, calls: bool) -> str:
    """Return a turn's text up to the token that ends it, which stands behind the place `after`, or is added."""
    called = re.search(rf"(?:{'|'.join(map(re.escape, TURN_ENDS))})\s*\Z", rest) if calls else None
    if called:
        return rest.rstrip()
    end = rest.find(turn_end, after) if turn_end else -1
    return rest[: end + len(turn_end)] if end >= 0 else rest + turn_end


def _one_thought(text: str, reasoning: str | None) -> bool:
    """Return whether a reply's text opens and closes its reasoning once, or never if it has none."""
    for opening, closing in MARKERS:
        if opening in text:
            closed = text.count(opening) == 1 and text.count(closing) == 1
            return closed or (reasoning is None and text.count(closing) <= 1)
    return reasoning is None


def _our_form(
    begun: tuple[str, str], content: str, reasoning: str | None, answer: str, *, beside: bool, finished: bool
) -> str:
    """Write a reply with its reasoning between `<think>` and `</think>`, or the marks that the prompt has begun with.

    Text that holds its reasoning is kept word for word, without what the prompt has written already. begun: the mark that
    opened the thinking, and the text after it.
    """
    opened, written = begun
    opening, closing = next(((o, c) for o, c in MARKERS if opened.startswith(o)), MARKERS[0])
    if beside and reasoning is not None:
        thought = reasoning.strip()
        if not opened:
            return f"{opening}\n{thought}\n{closing}\n\n{answer.lstrip()}"
        body = f"{thought.removeprefix(written)}\n{closing}\n\n{answer.lstrip()}"
        return body if written or opened.endswith("\n") else f"\n{body}"
    if not opened:
        return content.removeprefix(written)
    if content.lstrip().startswith(opening):
        return content.lstrip().removeprefix(opening).lstrip("\n").removeprefix(written)
    if reasoning is None and finished:
        return f"\n{closing}\n\n{content}"
    return content.removeprefix(written)
