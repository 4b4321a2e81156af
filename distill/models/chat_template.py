"""A tokenizer's chat template: what it reads, how it opens and ends the assistant's turn, and conversations as text.

Families differ: no system role, a date, a switch for thinking, `<think>` opened by the prompt, thinking re-spaced or dropped
from earlier turns, several named templates, arguments of tool calls as an object or as text. `ChatTemplate` finds these out
by rendering small conversations.
"""

from __future__ import annotations

import datetime
import itertools
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from distill.models import tool_calls
from distill.models.probe import PROBE
from distill.models.template_source import NAMED, source_of, variables_of
from distill.reasoning import MARKERS, REASONING_KEYS
from distill.records import Message, UserError

GIVEN = frozenset(
    {
        "messages",
        "add_generation_prompt",
        "strftime_now",
        "raise_exception",
        "bos_token",
        "eos_token",
        "pad_token",
        "unk_token",
    }
)
"""Variables of a template that the renderer sets; all others are options."""
_pinned: datetime.datetime | None = None


def pin_date(date: str) -> None:
    """Make templates that print a date print this one (YYYY-MM-DD), so that a run's prompts stay the same."""
    global _pinned
    _pinned = datetime.datetime.fromisoformat(date)


def pinned_date() -> str:
    """Return the date that templates print, YYYY-MM-DD."""
    return (_pinned or datetime.datetime.now()).date().isoformat()


def _strftime_now(form: str) -> str:
    return (_pinned or datetime.datetime.now()).strftime(form)


class ChatTemplate:
    """The chat template of a tokenizer under some options, and for conversations with or without tools.

    Raises UserError for options that it does not read, and for conversations that it refuses.
    """

    def __init__(self, tokenizer: Any, options: Mapping[str, Any], *, tools: bool = False) -> None:
        self._tokenizer = tokenizer
        self.options = {k: v for k, v in options.items() if k != NAMED}
        self.name, self.source = source_of(tokenizer.chat_template, options.get(NAMED), tools)
        for name in self.options:
            if name not in self.variables:
                known = sorted(self.variables - GIVEN - {"tools", "documents"})
                raise UserError(
                    f"template_options.{name}: the model's chat template does not read it; it reads "
                    f"{', '.join(known) or 'no options'}."
                )

    @cached_property
    def variables(self) -> frozenset[str]:
        """The names that the template reads and does not set itself."""
        import jinja2

        try:
            return variables_of(self.source)
        except jinja2.TemplateError as error:
            raise UserError(f"{self.described} is not valid jinja: {error}") from None

    @property
    def described(self) -> str:
        """The words that name the template in a message."""
        named = f" called {self.name!r}" if self.name else ""
        return f"the chat template{named} of {_model(self._tokenizer)}"

    @property
    def has_date(self) -> bool:
        """Whether the template prints the date of the day."""
        return "strftime_now" in self.variables

    def text(self, messages: Sequence[Message], *, prompt: bool, tools: Any = None) -> str:
        """Render a conversation; prompt: with the header of the assistant's turn. Raises UserError if it is refused."""
        conversation = [dict(message) for message in messages]
        if any(message.get("tool_calls") for message in conversation):
            conversation = [self.call_form.applied(message) for message in conversation]
        return self._text(_in_parts(conversation) if self._takes_parts else conversation, prompt, tools)

    def _attempt(self, messages: Sequence[Message]) -> str:
        """Render a prompt; empty if the template refuses it."""
        try:
            return self.text(messages, prompt=True)
        except UserError:
            return ""

    @cached_property
    def _takes_parts(self) -> bool:
        """Whether the template reads content as a list of parts only, as those of models that also see images."""
        question: list[dict[str, Any]] = [{"role": "user", "content": PROBE[0]}]
        found = []
        for form in (question, _in_parts(question)):
            try:
                found.append(PROBE[0] in self._text(form, True, None))
            except UserError:
                found.append(False)
        return found == [False, True]

    @cached_property
    def call_form(self) -> tool_calls.Form:
        """How the template reads tool calls: the first form of which it renders the function's name and its arguments."""
        for form in tool_calls.FORMS:
            probe = [form.applied(message) for message in tool_calls.PROBE_CALL]
            try:
                text = self._text(_in_parts(probe) if self._takes_parts else probe, True, None)
            except UserError:
                continue
            if tool_calls.is_rendered(text):
                return form
        return tool_calls.FORMS[0]

    def check_calls(self, messages: Sequence[Message], tools: Any) -> None:
        """Raise UserError if the template leaves out a tool call of the conversation, its name or its arguments."""
        marked, words = tool_calls.marked(messages)
        if words:
            text = self.text(marked, prompt=False, tools=tools)
            if not all(word in text for word in words):
                raise UserError("the model's chat template does not render the tool calls of the assistant.")

    def _text(self, conversation: list[dict[str, Any]], prompt: bool, tools: Any) -> str:
        import jinja2

        try:
            text: str = self._tokenizer.apply_chat_template(
                conversation,
                tokenize=False,
                add_generation_prompt=prompt,
                chat_template=self.source,
                tools=tools,
                strftime_now=_strftime_now,
                **self.options,
            )
        except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise UserError(f"{self.described} refuses the conversation: {' '.join(str(error).split())}") from None
        return text

    def with_system(self, messages: Sequence[Message]) -> list[Message]:
        """Return the conversation as the template takes it: system text in the first user's turn if it has no such role."""
        if not messages or messages[0]["role"] not in ("system", "developer"):
            return list(messages)
        return in_roles(messages, self.roles)

    @property
    def roles(self) -> tuple[str, ...]:
        """Of `system` and `developer`, the roles that the template has."""
        return tuple(role for role, there in self._roles.items() if there)

    @cached_property
    def _roles(self) -> dict[str, bool]:
        question, _, _, system = PROBE
        found = {}
        for role in ("system", "developer"):
            text = self._attempt([{"role": role, "content": system}, {"role": "user", "content": question}])
            found[role] = system in text and question in text
        return found

    @cached_property
    def prompt_end(self) -> str:
        """The text of a prompt after the user's question: the end of the turn and the assistant's header."""
        return self.text([{"role": "user", "content": PROBE[0]}], prompt=True).rpartition(PROBE[0])[2]

    @cached_property
    def thinking_form(self) -> tuple[str, str] | None:
        """The texts before an assistant's reasoning, behind the prompt, and between it and the answer.

        Of a template that drops reasoning, with the markers it knows; None if those are `<think>` and `</think>`, or none.
        """
        _, thought, answer, _ = PROBE
        before, found, rest = self._reply(**dict.fromkeys(REASONING_KEYS, thought)).partition(thought)
        between, answered, _ = rest.partition(answer)
        if found and answered:
            return before, between
        marks = next((pair for pair in MARKERS if pair[0] in self.source), MARKERS[0])
        if self.opened or self.answer_header or marks == MARKERS[0]:
            return None
        return f"{marks[0]}\n", f"\n{marks[1]}"

    @cached_property
    def answer_header(self) -> str:
        """The text between a prompt and an answer without reasoning, such as a channel; empty if it is thinking alone."""
        before, found, _ = self._reply().partition(PROBE[2])
        marks = "|".join(re.escape(mark) for pair in MARKERS for mark in pair)
        return before if found and re.sub(rf"{marks}|\s", "", before) else ""

    def _reply(self, **beside: str) -> str:
        """Return what the template writes behind a prompt for an answer; empty if it does not continue the prompt."""
        asked: Message = {"role": "user", "content": PROBE[0]}
        prompt = self.text([asked], prompt=True)
        try:
            whole = self.text([asked, {"role": "assistant", "content": PROBE[2], **beside}], prompt=False)
        except UserError:
            return ""
        return whole[len(prompt) :] if whole.startswith(prompt) else ""

    @property
    def opened(self) -> str:
        """The thinking marker that a prompt ends with, with the white space behind it; empty if it opens none."""
        return opened_by(self.prompt_end)

    @cached_property
    def turn_end(self) -> str:
        """The text that ends the assistant's turn, up to the token that stops generation.

        Where a conversation goes on, the same token stands before the next turn; what a template writes only after a whole
        conversation (the EOS of Phi) ends no turn.
        """
        question, second, answer, _ = PROBE
        asked: list[Message] = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        last = self.text(asked, prompt=False).rpartition(answer)[2]
        tokens = {token.content for token in self._tokenizer.added_tokens_decoder.values()}
        eos = self._tokenizer.eos_token or ""
        pattern = "|".join(map(re.escape, sorted(filter(None, {*tokens, eos}), key=len, reverse=True)))
        between, header = self._between(question, answer, second)
        at_end, within = (re.findall(rf"\s*(?:{pattern})", _run(pattern, text)) for text in (last, between))
        pairs = itertools.takewhile(lambda pair: pair[0].strip() == pair[1].strip(), zip(at_end, within, strict=False))
        shared = [token for token, _ in pairs]
        for run in (shared, at_end):
            if eos and any(token.strip() == eos.strip() for token in run):
                ends = next(n for n, token in enumerate(run) if token.strip() == eos.strip())
                return "".join(run[: ends + 1])
            if run is shared and run:
                return "".join(run)
        before_header = re.match(rf"\s*(?:{pattern})", between.removesuffix(header)) if pattern else None
        return at_end[0] if at_end else before_header[0] if before_header else eos

    def _between(self, question: str, answer: str, second: str) -> tuple[str, str]:
        """Return the text between an answer and the next user's turn, and the end of it that is that turn's header."""
        turns = [("user", question), ("assistant", answer), ("user", second)]
        text = self._attempt([{"role": role, "content": content} for role, content in turns])
        start, asked, rest = text.partition(question)
        between, found, _ = rest.rpartition(answer)[2].partition(second)
        if not (asked and found):
            return "", ""
        same = itertools.takewhile(
            lambda pair: pair[0] == pair[1], zip(reversed(between), reversed(start), strict=False)
        )
        return between, between[len(between) - len(list(same)) :]


def in_roles(messages: Sequence[Message], roles: Sequence[str]) -> list[Message]:
    """Return a conversation for a template that has these of the roles system and developer.

    Without either, the system text stands in front of the first question. Raises UserError if there is no question.
    """
    given = list(messages)
    if not given or given[0]["role"] not in ("system", "developer") or given[0]["role"] in roles:
        return given
    system, *rest = given
    if "system" in roles:
        return [{**system, "role": "system"}, *rest]
    first = next((n for n, message in enumerate(rest) if message["role"] == "user"), None)
    if first is None:
        raise UserError(
            "the model's chat template has no system role, and there is no user's turn to hold the system message."
        )
    joined = {**rest[first], "content": f"{system['content']}\n\n{rest[first]['content']}"}
    return [*rest[:first], joined, *rest[first + 1 :]]


def opened_by(prompt: str) -> str:
    """Return the thinking marker that a prompt's text ends with, with the white space behind it."""
    found = (re.search(re.escape(opening) + r"\s*\Z", prompt) for opening, _ in MARKERS)
    return next((match[0] for match in found if match), "")


def is_thinking_closed(prompt: str) -> bool:
    """Return whether a prompt's text ends with thinking that it opens and closes: thinking is switched off."""
    return any(re.search(rf"{re.escape(o)}\s*{re.escape(c)}\s*\Z", prompt) for o, c in MARKERS)


def _run(pattern: str, text: str) -> str:
    """Return the added tokens that a text begins with, and the white space between them."""
    found = re.match(rf"(?:\s*(?:{pattern}))+", text) if pattern else None
    return found[0] if found else ""


def _model(tokenizer: Any) -> str:
    """Return a model's name on the hub if its folder tells, or the folder."""
    path = str(tokenizer.name_or_path or "the model")
    cached = re.search(r"models--(.+?)--([^/\\]+)", path)
    return f"{cached[1]}/{cached[2]}" if cached else path


def _in_parts(conversation: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {**m, "content": [{"type": "text", "text": m["content"]}]} if isinstance(m.get("content"), str) else m
        for m in conversation
    ]
