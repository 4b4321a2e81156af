"""Tool calls of assistants as chat templates read them: arguments as an object or as JSON text, empty content as "" or none.

Data sets have both kinds of arguments. A template that reads the other kind writes them quoted twice, as Python writes a
dict, or not at all, so the form is found out by rendering a call.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distill.models.probe import PROBE
from distill.records import Message, UserError

TURN_ENDS = ("<|call|>", "<|eom_id|>", "<|tool_response>")
"""Tokens that end a turn of tool calls, where the family ends other turns with another one: GPT-OSS, Llama 3.1, Gemma 4."""
PROBE_CALL: tuple[dict[str, Any], ...] = (
    {"role": "user", "content": PROBE[0]},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {
                "type": "function",
                "id": "abcdef123",
                "function": {"name": PROBE[1], "arguments": {PROBE[2]: PROBE[3]}},
            }
        ],
    },
    {"role": "tool", "name": PROBE[1], "tool_call_id": "abcdef123", "content": "1"},
)


@dataclass(frozen=True, slots=True)
class Form:
    """How a template reads a turn of tool calls. as_text: arguments as JSON text. none: empty content is None."""

    as_text: bool
    none: bool

    def applied(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Return a message in this form. Raises UserError for arguments that are not a JSON object."""
        if not message.get("tool_calls"):
            return dict(message)
        calls = [_with_arguments(call, self.as_text) for call in message["tool_calls"]]
        content = message.get("content") or ("" if not self.none else None)
        return {**message, "content": content, "tool_calls": calls}


FORMS = (Form(False, False), Form(True, False), Form(False, True), Form(True, True))


def is_rendered(text: str) -> bool:
    """Return whether a text holds the call of PROBE_CALL once, its arguments neither escaped nor as Python writes them."""
    _, name, key, value = PROBE
    return all(word in text for word in (name, key, value)) and f'\\"{key}' not in text and f"'{key}'" not in text


def marked(messages: Sequence[Message]) -> tuple[list[Message], list[str]]:
    """Return the messages with other names and arguments in their tool calls, and the words that stand there."""
    found: list[Message] = []
    words: list[str] = []
    for message in messages:
        calls = []
        for call in message.get("tool_calls") or []:
            function = dict(call.get("function") or call)
            name, key, value = (f"{word}n{len(words)}x" for word in PROBE[1:])
            words.append(name)
            given = function.get("arguments")
            if given and parsed(given):
                function["arguments"] = {key: value}
                words += [key, value]
            calls.append({**call, "function": {**function, "name": name}})
        found.append({**message, "tool_calls": calls} if calls else message)
    return found, words


def parsed(arguments: Any) -> dict[str, Any]:
    """Return a call's arguments as a dict. Raises UserError if they are neither an object nor the JSON text of one."""
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except json.JSONDecodeError:
            raise UserError("a tool call's arguments are not JSON.") from None
    if arguments is None:
        return {}
    if not isinstance(arguments, Mapping):
        raise UserError("a tool call's arguments are not a JSON object.")
    return dict(arguments)


def _with_arguments(call: Mapping[str, Any], as_text: bool) -> dict[str, Any]:
    function = dict(call.get("function") or call)
    given = function.get("arguments")
    if as_text:
        function["arguments"] = given if isinstance(given, str) else json.dumps(parsed(given), ensure_ascii=False)
    else:
        function["arguments"] = parsed(given)
    return {"type": "function", **{k: v for k, v in call.items() if k == "id" and v}, "function": function}
