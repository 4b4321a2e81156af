"""A tokenizer's chat template: what it reads, how it opens and ends the assistant's turn, and conversations as text.

Families differ: no system role, a date, a switch for thinking, `<think>` opened by the prompt, thinking re-spaced or dropped
from earlier turns, several named templates. `ChatTemplate` finds these out by rendering small conversations.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from distill.reasoning import MARKERS
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
NAMED = "chat_template"
"""The option that chooses one of several named templates."""
PROBE = ("Qwa17", "Zpo38", "Vex59", "Jub26")
"""Words that stand for a question, a thought, an answer and a system message."""

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
    """The chat template of a tokenizer under some options. Raises UserError for options that it does not read."""

    def __init__(self, tokenizer: Any, options: Mapping[str, Any]) -> None:
        self._tokenizer = tokenizer
        self.options = {k: v for k, v in options.items() if k != NAMED}
        self.source = _source(tokenizer.chat_template, options.get(NAMED))
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
        import jinja2.meta
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(extensions=[_generation_tag(), loopcontrols])
        return frozenset(jinja2.meta.find_undeclared_variables(environment.parse(self.source)))

    @property
    def has_date(self) -> bool:
        """Whether the template prints the date of the day."""
        return "strftime_now" in self.variables

    def text(self, messages: Sequence[Message], *, prompt: bool, tools: Any = None) -> str:
        """Render a conversation; prompt: with the header of the assistant's turn. Raises jinja2's TemplateError."""
        conversation = [dict(message) for message in messages]
        return self._text(_in_parts(conversation) if self._takes_parts else conversation, prompt, tools)

    @cached_property
    def _takes_parts(self) -> bool:
        """Whether the template reads content as a list of parts only, as those of models that also see images."""
        question: list[dict[str, Any]] = [{"role": "user", "content": PROBE[0]}]
        if PROBE[0] in self._text(question, True, None):
            return False
        return PROBE[0] in self._text(_in_parts(question), True, None)

    def _text(self, conversation: list[dict[str, Any]], prompt: bool, tools: Any) -> str:
        text: str = self._tokenizer.apply_chat_template(
            conversation,
            tokenize=False,
            add_generation_prompt=prompt,
            chat_template=self.source,
            tools=tools,
            strftime_now=_strftime_now,
            **self.options,
        )
        return text

    def with_system(self, messages: Sequence[Message]) -> list[Message]:
        """Return the conversation as the template takes it: system text in the first user's turn if it has no such role."""
        given = list(messages)
        if not given or given[0]["role"] not in ("system", "developer") or self._has_role(given[0]["role"]):
            return given
        system, *rest = given
        if self._has_role("system"):
            return [{**system, "role": "system"}, *rest]
        first = next((n for n, message in enumerate(rest) if message["role"] == "user"), None)
        if first is None:
            raise UserError(
                "the model's chat template has no system role, and there is no user's turn to hold the system message."
            )
        joined = {**rest[first], "content": f"{system['content']}\n\n{rest[first]['content']}"}
        return [*rest[:first], joined, *rest[first + 1 :]]

    def _has_role(self, role: str) -> bool:
        return self._roles[role]

    @cached_property
    def _roles(self) -> dict[str, bool]:
        import jinja2

        question, _, _, system = PROBE
        found = {}
        for role in ("system", "developer"):
            try:
                text = self.text(
                    [{"role": role, "content": system}, {"role": "user", "content": question}], prompt=True
                )
            except (jinja2.TemplateError, KeyError, TypeError):
                text = ""
            found[role] = system in text and question in text
        return found

    @cached_property
    def prompt_end(self) -> str:
        """The text of a prompt after the user's question: the end of the turn and the assistant's header."""
        return self.text([{"role": "user", "content": PROBE[0]}], prompt=True).rpartition(PROBE[0])[2]

    @cached_property
    def opened(self) -> str:
        """The thinking marker that a prompt ends with, with the white space behind it; empty if it opens none."""
        for opening, _ in MARKERS:
            found = re.search(re.escape(opening) + r"\s*$", self.prompt_end)
            if found:
                return found[0]
        return ""

    @cached_property
    def closes_thinking(self) -> bool:
        """Whether a prompt ends with thinking that it has opened and closed: thinking is switched off."""
        return any(re.search(rf"{re.escape(o)}\s*{re.escape(c)}\s*$", self.prompt_end) for o, c in MARKERS)

    @cached_property
    def turn_end(self) -> str:
        """The text that ends the assistant's turn, up to the token that stops generation."""
        question, _, answer, _ = PROBE
        asked: list[Message] = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        rest = self.text(asked, prompt=False).rpartition(answer)[2]
        specials = sorted((t.content for t in self._tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
        eos = self._tokenizer.eos_token or ""
        run = re.match(rf"(?:\s*(?:{'|'.join(map(re.escape, specials))}))+", rest) if specials else None
        if run is None:
            return eos
        if eos and eos in run[0]:
            return run[0][: run[0].index(eos) + len(eos)]
        first = re.match(rf"\s*(?:{'|'.join(map(re.escape, specials))})", rest)
        return first[0] if first else eos


def _in_parts(conversation: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {**m, "content": [{"type": "text", "text": m["content"]}]} if isinstance(m.get("content"), str) else m
        for m in conversation
    ]


def _generation_tag() -> Any:
    """Return transformers' extension for {% generation %} blocks, which some templates have for trainers."""
    import jinja2.nodes
    from jinja2.ext import Extension

    class GenerationTag(Extension):
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(line)

    return GenerationTag


def _source(chat_template: Any, name: Any) -> str:
    """Return one template's text, chosen by name if the tokenizer has several."""
    if isinstance(chat_template, str):
        if name not in (None, "default"):
            raise UserError(f"template_options.{NAMED}: the tokenizer has one template only, and none called {name!r}.")
        return chat_template
    named = (
        dict(chat_template) if isinstance(chat_template, Mapping) else {t["name"]: t["template"] for t in chat_template}
    )
    chosen = "default" if name is None else name
    if chosen not in named:
        raise UserError(
            f"template_options.{NAMED}: the tokenizer has several chat templates and none called {chosen!r}; "
            f"choose one of {', '.join(sorted(named))}."
        )
    return str(named[chosen])
