"""Render messages to token ids with the task's template and the tokenizer's chat template; the only place that does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from distill.records import Array, Message, Template, UserError


def render_prompt(tokenizer: Any, template: Template, messages: Sequence[Message]) -> Array:
    """Ids [T] of the prompt that poses `messages` under a task's template, ready to be continued.

    With a chat template: the template's system message, the conversation, the assistant's header. Without
    one (base models), or for a template with chat=False: its plain text around the last question.
    """
    if template.chat and tokenizer.chat_template:
        conversation = [dict(message) for message in messages]
        if template.system is not None and conversation[0]["role"] != "system":
            conversation.insert(0, {"role": "system", "content": template.system})
        text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    else:
        text = template.plain.replace("{question}", messages[-1]["content"])
    return _encode(tokenizer, text + template.prefill)


def render_completion(tokenizer: Any, completion: str) -> Array:
    """Ids [T] of a completion that someone else wrote as text, with the final EOS that the student must learn.

    For text from files only; what an engine sampled keeps its ids.
    """
    ids = _encode(tokenizer, completion)
    if tokenizer.eos_token_id is None:
        return ids
    return np.append(ids, np.int32(tokenizer.eos_token_id))


def check_template(tokenizer: Any, template: Template, where: str) -> None:
    """Refuse a chat template that loses the reasoning: `<think>` must survive a round trip through it.

    R1-style templates strip the thinking of earlier turns, or open it themselves; a prompt that they end with
    `<think>` needs a task template with that prefill taken into account.
    """
    if not (template.chat and tokenizer.chat_template):
        return
    marker = "<think>distill checks this</think>"
    question = {"role": "user", "content": "q"}
    full = tokenizer.apply_chat_template(
        [question, {"role": "assistant", "content": f"{marker}<answer>1</answer>"}], tokenize=False
    )
    prompt = tokenizer.apply_chat_template([question], tokenize=False, add_generation_prompt=True)
    if marker not in full and "<think>" not in prompt:
        raise UserError(
            f"{where}: the tokenizer's chat template drops <think>…</think> from the assistant's turn, so the "
            "reasoning would be lost. Use a template that keeps it (tokenizer.chat_template), or template: raw."
        )
    ids = _encode(tokenizer, marker)
    if tokenizer.decode(ids, skip_special_tokens=True) != marker:
        raise UserError(
            f"{where}: the tokenizer does not give <think> back when special tokens are left out of the text, so "
            "completions would lose it. Use a tokenizer that has <think> as plain text."
        )


def _encode(tokenizer: Any, text: str) -> Array:
    return np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)
