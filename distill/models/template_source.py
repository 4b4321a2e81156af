"""The jinja text of a tokenizer's chat template: chosen among several by name, and the variables that it reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distill.records import UserError

NAMED = "chat_template"
"""The option that chooses one of several named templates."""
WITH_TOOLS = "tool_use"
"""The named template that renders conversations with tools, where a tokenizer has one (as in transformers)."""


def variables_of(source: str) -> frozenset[str]:
    """Return the names that a template reads and does not set itself. Raises jinja2's TemplateError."""
    import jinja2.meta
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(extensions=[_generation_tag(), loopcontrols])
    return frozenset(jinja2.meta.find_undeclared_variables(environment.parse(source)))


def template_names(chat_template: Any) -> list[str | None]:
    """Return the names of a tokenizer's chat templates; [None] for a single one, [] for none."""
    if not chat_template:
        return []
    return [None] if isinstance(chat_template, str) else list(named_templates(chat_template))


def named_templates(chat_template: Any) -> dict[str, str]:
    """Return the templates of a tokenizer that has several, by name."""
    if isinstance(chat_template, Mapping):
        return dict(chat_template)
    return {each["name"]: each["template"] for each in chat_template}


def source_of(chat_template: Any, name: Any, tools: bool) -> tuple[str, str]:
    """Return (name, text) of one template, chosen by name if the tokenizer has several; a single one has the name ""."""
    if isinstance(chat_template, str):
        if name not in (None, "default"):
            raise UserError(f"template_options.{NAMED}: the tokenizer has one template only, and none called {name!r}.")
        return "", chat_template
    named = named_templates(chat_template)
    chosen = name if name is not None else WITH_TOOLS if tools and WITH_TOOLS in named else "default"
    if chosen not in named:
        raise UserError(
            f"template_options.{NAMED}: the tokenizer has several chat templates and none called {chosen!r}; "
            f"choose one of {', '.join(sorted(named))}."
        )
    return str(chosen), str(named[chosen])


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
