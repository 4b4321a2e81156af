"""Rows of a data set as conversations, by the names of their columns.

A layout is recognised in the order of `LAYOUTS`, whatever the case of the columns' names; `fields` names columns by hand, nested ones as `a.b` or `a.0`. Nothing is
guessed from a column's content, and a part of a row that is not understood (an image, an unknown role) rejects the row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from distill.plug import nearest
from distill.reasoning import canonical
from distill.records import Message, Messages, UserError

Fields = Mapping[str, str]

FIELDS = ("messages", "question", "reply", "reasoning", "answer", "system", "tools", "input", "verdicts")
"""The parts of a row that `fields` can name."""
ROLES = {
    "system": "system", "developer": "developer", "user": "user", "human": "user", "prompter": "user", "assistant": "assistant",
    "gpt": "assistant", "model": "assistant", "chatgpt": "assistant", "bot": "assistant", "bing": "assistant", "bard": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "tool_response": "tool", "ipython": "tool", "environment": "tool",
    "function_call": "assistant", "function-call": "assistant", "tool_call": "assistant", "function_response": "tool",
}  # fmt: skip
BESIDE = ("reasoning_content", "reasoning", "thinking", "thoughts", "deepseek_reasoning", "deepseek_thinking_trajectory",
          "thinking_trajectory", "thinking_trajectories", "chain_of_thought", "cot", "r1_reasoning")  # fmt: skip
"""Columns, or keys of a message, that hold reasoning beside the content."""
QUESTIONS = ("question", "problem", "instruction", "query", "prompt", "input", "user", "inputs")
REPLIES = ("completion", "response", "output", "generation", "model_response", "deepseek_solution", "deepseek_attempt", "attempt", "targets",
           "assistant", "solution", "answer")  # fmt: skip
GOLDS = ("answer", "final_answer", "ground_truth", "expected_answer", "gold_answer", "gold", "target", "reference_answer",
         "reward_model.ground_truth", "extra_info.answer")  # fmt: skip
SYSTEMS = ("system", "system_prompt", "system_message")
NUMBERED = re.compile(r"(r1_solution|solution|response|generation|completion|output)_(\d+)")
GENERATIONS = ("generations", "responses", "completions", "samples")
VERDICTS = ("correctness_math_verify", "correctness", "correctness_llama", "is_correct", "correct", "verdicts")

LAYOUTS = {
    "generations": "question and several generations a row with their verdicts (OpenR1-Math): `problem`, `generations`, `correctness_math_verify`",
    "messages": "chat messages: `messages` with role and content",
    "ShareGPT": "`conversations` with from and value (or role and content), `system`",
    "prompt of messages": "`prompt` as a list of messages (verl, DAPO), with `completion`, `chosen` or `reward_model.ground_truth`",
    "preference": "`chosen` and `rejected`: the chosen reply is learned",
    "Alpaca": "`instruction`, `input`, `output`",
    "question and reply": f"one of {', '.join(QUESTIONS)} with one of {', '.join(REPLIES)}",
    "question and answer": f"one of {', '.join(QUESTIONS)} with one of {', '.join(GOLDS)}",
}


IN_JSON = ("messages", "conversations", "conversation", "prompt", "chosen", "rejected", "dialog")
"""Columns whose list of messages some data sets store as JSON text."""
COLUMNS = frozenset(
    {
        *QUESTIONS,
        *REPLIES,
        *GOLDS,
        *SYSTEMS,
        *BESIDE,
        *GENERATIONS,
        *VERDICTS,
        *IN_JSON,
        "context",
        "tools",
        "functions",
        "rejected",
    }
)
"""All names of columns that a layout knows. Others are taken for these if only case, spaces and hyphens differ (`Final Answer`)."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """One conversation of a row.

    messages: all turns, content as text; reasoning and tool calls beside it under reasoning_content and tool_calls. answer:
    the row's gold answer as it stands there, or None. tools: descriptions of functions, or None. number: of the row. part:
    its place among the row's conversations. solution: whether the last reply is the data set's own solution or answer.
    """

    messages: Messages
    answer: Any = None
    tools: Any = None
    number: int = 0
    part: int = 0
    solution: bool = False

    @property
    def prompt(self) -> Messages:
        """The messages before the last reply."""
        return self.messages[:-1] if self.messages[-1]["role"] == "assistant" else self.messages

    @property
    def reply(self) -> Message | None:
        """The last message if it is the assistant's."""
        return self.messages[-1] if self.messages[-1]["role"] == "assistant" else None

    def replies(self, turns: str) -> Iterator[tuple[Messages, Message]]:
        """Yield (the messages before it, reply) of every assistant's turn, or of the last one (turns "last")."""
        for n, message in enumerate(self.messages):
            last = n == len(self.messages) - 1
            if message["role"] == "assistant" and n and (turns == "all" or last):
                yield self.messages[:n], message


@dataclass(slots=True)
class Reader:
    """Turns rows into conversations. fields: columns by hand; keep_wrong: also generations that the row says are wrong.

    wrong: the number of generations left out so far. layout: of the last row.
    """

    fields: Fields = field(default_factory=dict)
    keep_wrong: bool = False
    wrong: int = 0
    layout: str = ""

    def __post_init__(self) -> None:
        for name in self.fields:
            if name not in FIELDS:
                raise UserError(f"fields.{name}: there is no such part of a row.{nearest(name, FIELDS)}")

    def read(self, row: Mapping[str, Any], number: int = 0) -> list[Conversation]:
        """Return a row's conversations, usually one; none if all its generations are wrong. Raises ValueError with the reason."""
        if self.fields:
            self.layout = "fields"
            return self._by_fields(_given(row), number)
        row = _given(_with_known_names(row))
        self.layout = layout_of(row)
        if self.layout == "generations":
            return self._generations(row, number)
        answer, system, tools = _first(row, GOLDS), _first(row, SYSTEMS), _tools(row)
        solution = False
        if self.layout in ("messages", "ShareGPT"):
            given = row.get("messages", row.get("conversations", row.get("conversation", row.get("dialog"))))
            messages = _messages(given)
        elif self.layout == "prompt of messages":
            messages = _messages(row["prompt"]) + _continued(row)
        elif self.layout == "preference":
            chosen = row["chosen"]
            messages = _messages(chosen) if isinstance(chosen, list) else ()
            if not messages or messages[0]["role"] == "assistant":
                reply = messages or ({"role": "assistant", "content": _text(chosen, "chosen")},)
                messages = (_asked(row), *reply)
        else:
            messages, answer, solution = self._pair(row, answer)
        if system is not None and messages[0]["role"] not in ("system", "developer"):
            messages = ({"role": "system", "content": _text(system, "system")}, *messages)
        return [Conversation(_checked(messages), answer, tools, number, 0, solution)]

    def _pair(self, row: Mapping[str, Any], answer: Any) -> tuple[Messages, Any, bool]:
        question = _asked(row)
        key = next((k for k in REPLIES if isinstance(row.get(k), str) and row[k].strip()), None)
        reasoning = _first(row, BESIDE)
        if key is None:
            return (question,), answer, False
        solution = key in ("answer", "solution")
        if key == "answer" and not (reasoning or "####" in row[key] or len(row[key].split()) > ANSWER_WORDS):
            return (question,), answer, False
        reply = {"role": "assistant", "content": row[key]}
        if reasoning is not None:
            reply["reasoning_content"] = _text(reasoning, "reasoning")
        return (question, reply), answer, solution

    def _generations(self, row: Mapping[str, Any], number: int) -> list[Conversation]:
        generations = _several(row)
        columns = [row[k] for k in VERDICTS if isinstance(row.get(k), list) and len(row[k]) == len(generations)]
        verdicts = [any(column[n] for column in columns) for n in range(len(generations))] if columns else None
        question, answer, made = _asked(row), _first(row, GOLDS), []
        for part, generation in enumerate(generations):
            if verdicts is not None and not verdicts[part] and not self.keep_wrong:
                self.wrong += 1
                continue
            if isinstance(generation, str) and generation.strip():
                messages = (question, {"role": "assistant", "content": generation})
                made.append(Conversation(_checked(messages), answer, None, number, part))
        return made

    def _by_fields(self, row: Mapping[str, Any], number: int) -> list[Conversation]:
        found = {name: _at(row, path, f"fields.{name}") for name, path in self.fields.items()}
        answer = found.get("answer")
        if "messages" in found:
            messages = _messages(found["messages"])
        elif "question" in found:
            question = found["question"]
            asked = _messages(question) if isinstance(question, list) else ()
            text = "" if asked else _text(question, "question")
            if found.get("input"):
                text += f"\n\n{found['input']}"
            messages = asked or ({"role": "user", "content": text},)
        else:
            raise ValueError("fields names neither messages nor question")
        if found.get("system") and messages[0]["role"] not in ("system", "developer"):
            messages = ({"role": "system", "content": _text(found["system"], "system")}, *messages)
        replies = found.get("reply")
        if replies is None:
            return [Conversation(_checked(messages), answer, found.get("tools"), number)]
        several = replies if isinstance(replies, list) else [replies]
        verdicts = found.get("verdicts")
        verdicts = verdicts if isinstance(verdicts, list) else [verdicts] * len(several)
        made = []
        for part, reply in enumerate(several):
            if verdicts[part] is False and not self.keep_wrong:
                self.wrong += 1
                continue
            message = {"role": "assistant", "content": _text(reply, "reply")}
            if found.get("reasoning"):
                message["reasoning_content"] = _text(found["reasoning"], "reasoning")
            made.append(Conversation(_checked((*messages, message)), answer, found.get("tools"), number, part))
        return made


ANSWER_WORDS = 12
"""An `answer` of more words than this is a worked reply; a shorter one is the gold answer alone."""


def layout_of(row: Mapping[str, Any]) -> str:
    """Return the layout of a row by its columns. Raises ValueError, naming the nearest one, if it has none."""
    asked = any(isinstance(row.get(key), str) for key in QUESTIONS)
    if asked and _several(row):
        return "generations"
    if isinstance(row.get("messages"), list):
        return "messages"
    if any(isinstance(row.get(key), list) for key in ("conversations", "conversation", "dialog")):
        return "ShareGPT"
    if isinstance(row.get("prompt"), list):
        return "prompt of messages"
    if "chosen" in row:
        return "preference"
    if isinstance(row.get("instruction"), str) and "output" in row:
        return "Alpaca"
    if asked:
        return "question and reply"
    raise ValueError(f"no known layout: {nearest_layout(row)}")


def _several(row: Mapping[str, Any]) -> list[Any]:
    """Return a row's generations: a list in one column, or numbered columns such as r1_solution_1; empty if it has none."""
    for key in GENERATIONS:
        if isinstance(row.get(key), list) and all(isinstance(each, str) for each in row[key]):
            return list(row[key])
    numbered = {key: NUMBERED.fullmatch(key) for key in row}
    named = sorted((int(found[2]), key) for key, found in numbered.items() if found)
    return [row[key] for _, key in named if isinstance(row[key], str)]


def nearest_layout(row: Mapping[str, Any]) -> str:
    """Return a row's columns and what the nearest layout would need."""
    columns = ", ".join(sorted(map(str, row))) or "none"
    if set(row) & {"text", "content"}:
        return f"its columns are {columns}; plain text has no reply to learn: give messages, or fields: {{question: …, reply: …}}"
    if any(key in row for key in (*REPLIES, *GOLDS)):
        return f"its columns are {columns}; a column of questions is missing ({', '.join(QUESTIONS)}), or name it by fields: {{question: …}}"
    return f"its columns are {columns}; known layouts are {', '.join(LAYOUTS)}, or name columns by fields: {{question: …, answer: …}}"


def _given(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns of a row that hold something; lists of messages that are stored as JSON text as lists."""
    return {key: _listed(value) if key in IN_JSON else value for key, value in row.items() if value is not None}


def _with_known_names(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a row with columns such as `Problem` or `Final Answer` under the names of the layouts, unless these are there too."""
    made = dict(row)
    for key in row:
        if key in COLUMNS:
            continue
        plain = re.sub(r"[ -]", "_", str(key).strip().lower())
        if plain in COLUMNS and plain not in made:
            made[plain] = made.pop(key)
    return made


def _listed(value: Any) -> Any:
    """Return the list of messages that a text is the JSON of; any other value as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith("[{"):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _asked(row: Mapping[str, Any]) -> Message:
    key = next((k for k in QUESTIONS if isinstance(row.get(k), str) and row[k].strip()), None)
    if key is None:
        raise ValueError(f"there is no question (columns: {', '.join(sorted(row))})")
    text = row[key]
    for extra in ("input", "context"):
        if key == "instruction" and isinstance(row.get(extra), str) and row[extra].strip():
            text = f"{text}\n\n{row[extra]}"
    return {"role": "user", "content": text}


def _continued(row: Mapping[str, Any]) -> Messages:
    for key in ("completion", "response", "chosen", "output"):
        value = row.get(key)
        if isinstance(value, list) and value:
            return _messages(value)
        if isinstance(value, str) and value.strip():
            reply: Message = {"role": "assistant", "content": value}
            return (reply,)
    return ()


def _tools(row: Mapping[str, Any]) -> Any:
    value = row.get("tools", row.get("functions"))
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            raise ValueError("tools is text that is not JSON") from None
    return value or None


def _messages(value: Any) -> Messages:
    if not isinstance(value, list) or not value:
        raise ValueError("messages is not a list of messages")
    return tuple(_message(each) for each in value)


def _message(message: Any) -> Message:
    if not isinstance(message, Mapping):
        raise ValueError("a message is not an object with role and content")
    given = message.get("role", message.get("from"))
    role = ROLES.get(str(given).lower())
    if role is None:
        raise ValueError(f"a message's role is {given!r}, not one of {', '.join(sorted(set(ROLES.values())))}")
    made: dict[str, Any] = {"role": role, "content": _content(message.get("content", message.get("value")))}
    reasoning = next((message[key] for key in BESIDE if message.get(key)), None)
    if reasoning is not None:
        made["reasoning_content"] = _text(reasoning, "reasoning")
    if calls := message.get("tool_calls") or message.get("function_call"):
        made["tool_calls"] = _calls(calls)
    made |= {key: message[key] for key in ("name", "tool_call_id") if message.get(key)}
    if not made["content"].strip() and role != "tool" and not made.get("tool_calls") and not reasoning:
        raise ValueError(f"a message of role {role!r} is empty")
    return made


def _content(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError(f"a message's content is {type(value).__name__}, not text")
    texts = []
    for part in value:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, Mapping) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise ValueError(f"a message holds a part of type {kind!r}; only text can be learned")
    return "".join(texts)


def _calls(calls: Any) -> list[Any]:
    made = []
    for call in calls if isinstance(calls, list) else [calls]:
        if not isinstance(call, Mapping):
            raise ValueError("a tool call is not an object")
        function = dict(call.get("function") or call)
        if isinstance(function.get("arguments"), str):
            try:
                function["arguments"] = json.loads(function["arguments"])
            except json.JSONDecodeError:
                raise ValueError("a tool call's arguments are not JSON") from None
        named = {"id": call["id"]} if call.get("id") else {}
        told = {k: v for k, v in function.items() if v is not None and k not in ("id", "type")}
        made.append({"type": "function", **named, "function": told})
    return made


def _checked(messages: Messages) -> Messages:
    """Return the messages from the first one of system or user on. Raises ValueError if no user asks before the reply."""
    asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    if not any(message["role"] == "user" for message in asked):
        raise ValueError("no user's message stands before the reply")
    if messages[0]["role"] == "assistant":
        raise ValueError("the conversation begins with the assistant")
    return tuple({**m, "content": _joined(m["content"])} if m["role"] == "assistant" else m for m in messages)


def _joined(content: str) -> str:
    """Return a reply with reasoning in `<think>` if a family's own markers enclose it."""
    plain = canonical(content)
    if plain == content:
        return content
    return re.sub(r"\A\s*<think>\s*(.*?)\s*</think>\s*", r"<think>\1</think>", plain, flags=re.DOTALL).strip()


def _first(row: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    for key in keys:
        value: Any = row
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is not None and value not in ("", [], {}):
            return value
    return None


def _at(row: Mapping[str, Any], path: str, where: str) -> Any:
    """Return the value at a path such as `a.b` or `a.0.b`; None if it is null. Raises ValueError if there is no such place."""
    value: Any = row
    for part in path.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            keys = ", ".join(map(str, value)) if isinstance(value, Mapping) else type(value).__name__
            raise ValueError(f"{where}: there is no {part!r} in {path!r} (there are: {keys})")
    return value


def _text(value: Any, name: str) -> str:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, str):
        raise ValueError(f"{name} is {type(value).__name__}, not text")
    if not value.strip():
        raise ValueError(f"{name} is empty")
    return value
