"""Task templates: the prompt of a problem, and the extraction of the answer from a completion.

A template is data (`records.Template`), named by a recipe or written out in it (`of_text`): a short system message for models with a chat template, the whole
prompt as text for those without, and a function from the completion's text to its answer. `extract` never
raises: a broken format gives None. It reads the text after the *last* `</think>`; a `<think>` that is never
closed has no answer, whatever its reasoning holds. `plain` is filled in with `str.replace("{question}", ...)`, because it
may hold other braces. Whether an answer is right is decided in `judge`.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Annotated, Any

import pydantic
import regex

from distill.plug import explain, nearest
from distill.recipe.fields import TemplateText
from distill.records import Template, UserError

_ANSWER = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)
_BRACES = re.compile(r"(?P<box>\\(?:f?boxed|fbox)\s*\{)|\\.|[{}]", re.DOTALL)
_NUMBER = re.compile(r"(?<![\w.])[-+−]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+|(?<=\d))(?:/\d+)?")


def after_thinking(text: str) -> str | None:
    """Return what follows the last `</think>`: the whole text without reasoning, None if a `<think>` stays open."""
    _, _, rest = text.rpartition("</think>")
    return None if "<think>" in rest else rest


def last_box(text: str) -> str | None:
    r"""Return the content of the last `\boxed{...}` whose braces match; escaped braces do not count.

    A single pass, so a repetitive completion with many unclosed boxes stays fast.
    """
    opened: list[int | None] = []  # where each open brace's content starts, if it is a box's
    last: tuple[int, int] | None = None
    for match in _BRACES.finditer(text):
        if match[0].startswith("\\") and match["box"] is None:
            continue
        if match[0] != "}":
            opened.append(match.end() if match["box"] else None)
        elif opened:
            start = opened.pop()
            if start is not None and (last is None or start > last[0]):
                last = start, match.start()
    return None if last is None else text[last[0] : last[1]].strip()


def last_answer_tag(text: str) -> str | None:
    """Content of the last `<answer>...</answer>`, out of its box if it is in one; None where it is empty."""
    found = _ANSWER.findall(text)
    answer = found[-1].strip() if found else ""
    boxed = re.fullmatch(r"\$*\s*\\boxed\s*\{.*\}\s*\$*", answer, re.DOTALL)
    return (last_box(answer) or answer if boxed else answer) or None


def _extract_answer_tag(text: str) -> str | None:
    rest = after_thinking(text)
    return None if rest is None else last_answer_tag(rest)


def _extract_box(text: str) -> str | None:
    rest = after_thinking(text)
    return None if rest is None else last_box(rest) or None


def _extract_last_number(text: str) -> str | None:
    rest = after_thinking(text)
    if rest is None:
        return None
    if numbers := _NUMBER.findall(rest):
        return str(numbers[-1])
    lines = [line.strip() for line in rest.splitlines() if line.strip()]
    return lines[-1] if lines else None


def _extract_rest(text: str) -> str | None:
    rest = after_thinking(text)
    return rest if rest and rest.strip() else None


def ending(text: str) -> str:
    r"""The answer that a text without reasoning ends in: after `####`, in the last tag or `\boxed{}`, or all of it."""
    if "####" in text:
        return text.rpartition("####")[2].strip()
    return (last_answer_tag(text) or last_box(text) or text).strip()


def _extract_ending(text: str) -> str | None:
    rest = after_thinking(text)
    return None if rest is None else ending(rest) or None


def _extract_tag_or_number(text: str) -> str | None:
    tagged = _extract_answer_tag(text)
    return _extract_last_number(text) if tagged is None else tagged


def _extract_last_line(text: str) -> str | None:
    lines = [line.strip() for line in (after_thinking(text) or "").splitlines() if line.strip()]
    return lines[-1] if lines else None


def _extract_json(text: str) -> str | None:
    """The value of "answer" in the last JSON object that has one, as text."""
    rest = after_thinking(text) or ""
    starts = [match.start() for match in re.finditer(r"\{", rest)][-MAX_OBJECTS:]
    found, end = None, 0
    for start in starts:
        if start >= end:  # not inside of the object before
            try:
                value, end = json.JSONDecoder().raw_decode(rest, start)
            except (ValueError, RecursionError):
                continue
            found = value.get("answer", found)
    if found is None or isinstance(found, str):
        return (found or "").strip() or None
    return json.dumps(found, ensure_ascii=False)


ANSWERS: Mapping[str, tuple[Callable[[str], str | None], str]] = {
    "boxed": (_extract_box, "the last \\boxed{...}"),
    "tags": (_extract_answer_tag, "the last <answer>...</answer>"),
    "tags_or_number": (_extract_tag_or_number, "the last <answer>...</answer>, or without one the last number"),
    "last_number": (_extract_last_number, "the last number, or without one the last line"),
    "last_line": (_extract_last_line, "the last line that is not empty"),
    "json": (_extract_json, 'the value of "answer" in the last JSON object that has one'),
    "any_mark": (
        _extract_ending,
        "the last box, <answer> tag or text after ####, or without any of them all of the reply",
    ),
    "all": (_extract_rest, "all of the reply after its reasoning"),
}
"""What a template's text may name as `answer`: the function, and a description."""
MAX_OBJECTS = 64
"""Opening braces, from the end of a reply, at which a JSON object is looked for."""
SEARCH_S = 1.0
"""Seconds after which the search for a regular expression is given up."""

# The prompt of DeepSeek-R1-Zero (DeepSeek-AI 2025, table 1): the instructions, then the question.
_R1_ZERO = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. "
    "The assistant first thinks about the reasoning process in the mind and then provides the user "
    "with the answer. The reasoning process and answer are enclosed within <think> </think> and "
    "<answer> </answer> tags, respectively, i.e., <think> reasoning process here </think> "
    "<answer> answer here </answer>."
)
_R1_ZERO_PLAIN = f"{_R1_ZERO} User: {{question}}\nAssistant:"

think_answer = Template(
    name="think_answer",
    system="Reply as <think>reasoning</think><answer>result</answer>.",
    plain=_R1_ZERO_PLAIN,
    extract=_extract_answer_tag,
)

# For reinforcement learning from a model that never saw the format: it asks for the tags, but accepts the last number as
# an answer until they appear, so that rewards differ from the start. The format reward requires the tags.
r1_zero = Template(
    name="r1_zero",
    system=_R1_ZERO,
    plain=_R1_ZERO_PLAIN,
    extract=_extract_tag_or_number,
)

boxed = Template(
    name="boxed",
    system="Reason step by step, then put the final answer in \\boxed{}.",
    plain="{question}\nReason step by step, then put the final answer in \\boxed{}.\n",
    extract=_extract_box,
)

raw = Template(name="raw", system=None, plain="{question}", extract=_extract_last_number, chat=False)

# Plain text also for models with a chat template, so that an instructed teacher and a base student read the same prompt.
boxed_plain = replace(boxed, name="boxed_plain", chat=False)

# For questions that stand as they are: nothing is asked beyond them, and an answer may stand in any of the usual marks.
direct = Template(name="direct", system=None, plain="{question}", extract=_extract_ending)
direct_plain = replace(direct, name="direct_plain", chat=False)

code = Template(
    name="code",
    system="Write the Python code that is asked for, whole, in one ```python block.",
    # Bare: a model without a chat template continues a function's header.
    plain="{question}",
    extract=_extract_rest,
)


def _name_or_text(value: Any) -> Any:
    if isinstance(value, str | Mapping):
        return value
    raise ValueError(
        "a template is a name from `distill ls templates`, package.module:attribute, or a mapping with `answer`"
    )


Given = Annotated[str | dict[str, Any], pydantic.BeforeValidator(_name_or_text)]
"""What a task's `template` may be: a name or a text."""

_OPTIONS: contextvars.ContextVar[Mapping[str, Any]] = contextvars.ContextVar("template options", default={})  # noqa: B039
TEMPLATES = {
    template.name: template for template in (think_answer, r1_zero, boxed, boxed_plain, raw, direct, direct_plain, code)
}


@contextlib.contextmanager
def given_options(options: Mapping[str, Any]) -> Iterator[None]:
    """Give the templates found inside the context these options for the model's chat template."""
    token = _OPTIONS.set(options)
    try:
        yield
    finally:
        _OPTIONS.reset(token)


def find(name: str | Mapping[str, Any], where: str = "template") -> Template:
    """The template called `name`, the one that `package.module:attribute` names, or the one of a text (`of_text`), which may be
    given as JSON too, as traces record it.

    Raises UserError where there is none.
    """
    if not isinstance(name, str) or name.startswith("{"):
        template = of_text(json.loads(name) if isinstance(name, str) else name, where)
        return replace(template, options=_OPTIONS.get()) if _OPTIONS.get() else template
    if ":" not in name:
        if name not in TEMPLATES:
            raise UserError(f"{where}: there is no template {name!r}.{nearest(name, TEMPLATES)}")
        return replace(TEMPLATES[name], options=_OPTIONS.get()) if _OPTIONS.get() else TEMPLATES[name]
    module_name, _, attribute = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # a module beside the recipe, as plug.find looks for it
    try:
        template = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{where}: cannot import {name!r}: {error}. Write it as package.module:attribute.") from error
    if not isinstance(template, Template):
        raise UserError(f"{where}: {name!r} is a {type(template).__name__}, not a distill.records.Template.")
    return replace(template, options=_OPTIONS.get()) if _OPTIONS.get() else template


def of_text(text: Mapping[str, Any], where: str = "template") -> Template:
    """The template of a recipe's text, with the keys of `TemplateText`. Its name is the text itself, as JSON: so traces record it.

    Raises UserError with a line for each mistake.
    """
    try:
        given = TemplateText.model_validate(dict(text))
    except pydantic.ValidationError as error:
        raise UserError(explain(error, where, TemplateText.model_fields)) from None
    before = f"{given.system}\n\n" if given.system else ""
    return Template(
        name=json.dumps(given.model_dump(exclude_defaults=True), ensure_ascii=False),
        system=given.system,
        plain=f"{before}{given.question}\n" if given.plain is None else given.plain,
        extract=_extraction(given.answer, f"{where}.answer"),
        chat=given.chat,
        prefill=given.prefill,
        question=given.question,
    )


def _extraction(answer: str, where: str) -> Callable[[str], str | None]:
    """Return the function of a name in ANSWERS or of a regular expression."""
    if answer in ANSWERS:
        return ANSWERS[answer][0]
    if re.fullmatch(r"[\w-]*", answer):
        raise UserError(
            f"{where}: there is no answer {answer!r}.{nearest(answer, ANSWERS)} A regular expression needs a group in parentheses."
        )
    try:
        pattern = regex.compile(answer)
    except regex.error as error:
        raise UserError(f"{where}: not a regular expression: {error}.") from None
    if pattern.groups != 1:
        raise UserError(
            f"{where}: the regular expression has {pattern.groups} groups, but one must hold the answer; (?:...) groups without "
            "being counted."
        )
    return functools.partial(_last_match, pattern)


def _last_match(pattern: Any, text: str) -> str | None:
    """The group of the last match after the reasoning; None without one, where it is empty, or after SEARCH_S seconds."""
    rest = after_thinking(text)
    if rest is None:
        return None
    found = None
    try:
        for match in pattern.finditer(rest, timeout=SEARCH_S):
            found = match[1]
    except TimeoutError:
        return None
    return (found or "").strip() or None


def fingerprint(template: Template) -> tuple[str, ...]:
    """The texts of a template that another result follows from."""
    return (
        template.name,
        str(template.system),
        template.plain,
        str(template.chat),
        template.prefill,
        *([repr(sorted(template.options.items()))] if template.options else []),
        *([template.question] if template.question != "{question}" else []),
    )
