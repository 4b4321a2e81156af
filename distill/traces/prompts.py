"""The prompt that traces were sampled under, and the whole conversation of a trace as it was sampled.

A shard's `messages` hold the whole conversation: with the system message of the task's template in front. In memory
(`Traces.messages`) they are the problem's own, so that a stage can render them with another template; `PromptRecord`, in
the metadata, tells the two apart. `conversation` is what an export holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pydantic

from distill.models.chat_template import in_roles
from distill.models.rendering import plain_text
from distill.records import Message, Messages, Template

SYSTEM_ROLES = ("system", "developer")


class PromptRecord(pydantic.BaseModel):
    """How the prompts of a folder of traces were made: the task's template, and what the model's chat template makes of it."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    chat: bool
    """Whether the model's chat template rendered the prompts; otherwise they are plain text."""
    system: str | None = None
    """The system message of the task's template, in front of every conversation that has none of its own."""
    question: str = "{question}"
    """Under a chat template: the user's last turn, around the problem's own text."""
    plain: str = ""
    """Of prompts of plain text: the text around {question}."""
    prefill: str = ""
    """Text that the prompts end with, as if the model had begun its reply so."""
    begun: str = ""
    """Text with which the prompts begin the reply: thinking that the chat template opens, and the prefill."""
    roles: tuple[str, ...] = ()
    """Of `system` and `developer`, the roles that the chat template has. Without any the system message is in the first question."""
    options: dict[str, Any] = {}
    """Options of the chat template, such as enable_thinking."""
    rendered: str = ""
    """The prompt of {question}, as the model reads it."""

    def template(self) -> Template:
        """Return the template with which the prompts can be rendered again from a shard's messages, which have the form of the
        question already."""
        return Template("recorded", self.system, self.plain, str, self.chat, self.prefill, self.options)


def whole(messages: Messages, prompt: PromptRecord | None) -> Messages:
    """Return a problem's messages as a shard holds them: with the system message and the form of the question that the prompts
    had."""
    if prompt is None or not prompt.chat or not messages:
        return messages
    before, after = prompt.question.split("{question}", 1)
    turns = _with_question(messages, lambda text: f"{before}{text}{after}")
    if prompt.system is None or turns[0]["role"] in SYSTEM_ROLES:
        return turns
    return ({"role": "system", "content": prompt.system}, *turns)


def own(messages: Messages, prompt: PromptRecord | None) -> Messages:
    """Return a shard's messages as they are in the problem itself, the inverse of `whole`."""
    if prompt is None or not prompt.chat or not messages:
        return messages
    before, after = prompt.question.split("{question}", 1)
    turns = _with_question(messages, lambda text: text.removeprefix(before).removesuffix(after))
    if prompt.system is None or len(turns) < 2:
        return turns
    first = turns[0]
    return turns[1:] if first["role"] == "system" and first["content"] == prompt.system else turns


def _with_question(messages: Messages, changed: Callable[[str], str]) -> Messages:
    """Return messages with another text of the user's last turn."""
    last = max((n for n, message in enumerate(messages) if message["role"] == "user"), default=None)
    if last is None:
        return messages
    turn = {**messages[last], "content": changed(messages[last]["content"])}
    return (*messages[:last], turn, *messages[last + 1 :])


def conversation(messages: Sequence[Message], completion: str, prompt: PromptRecord | None) -> list[dict[str, Any]]:
    """Return a trace as a conversation: the turns that the model read, and its reply with what the prompt began for it.

    messages: a shard's. A chat template that has no system role gets the system message in the first question, as it was
    sampled. A prompt of plain text is one turn of the user.
    """
    if prompt is None:
        return [*map(dict, messages), {"role": "assistant", "content": completion}]
    if prompt.chat:
        turns = in_roles(messages, prompt.roles)
    else:
        turns = [{"role": "user", "content": plain_text(prompt.plain, messages)}]
    begun = "" if completion.startswith(prompt.begun) else prompt.begun
    return [*map(dict, turns), {"role": "assistant", "content": begun + completion}]
