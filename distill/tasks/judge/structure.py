r"""The structure of a cleaned answer: tuples, sets, lists, matrices, intervals; equations and names; words; choices.

Everything here is fast and certain; other texts are left to the symbolic comparison (`symbolic`). Numbers are read in
`numbers`. The input is text that `spelling` has cleaned.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from distill.tasks.judge.numbers import number

HAN = "\u3400-\u9fff"
_OPEN, _CLOSE = "([{", ")]}"


@dataclass(frozen=True, slots=True)
class Shape:
    """A collection. kind: its brackets ("()", "[)", ...), "set", "list" (no brackets) or "matrix RxC"."""

    kind: str
    items: tuple[str, ...]


_MATRIX = re.compile(r"\\begin\{pmatrix\}((?:(?!\\begin).)*)\\end\{pmatrix\}", re.DOTALL)


def shape(text: str) -> Shape | None:
    """Parse a cleaned text as a collection; None if it is a single item."""
    if match := _MATRIX.fullmatch(text):
        return _matrix(match[1])
    if match := re.fullmatch(r"\\\{(.*)\\\}", text) or re.fullmatch(r"\{(.*)\}", text):
        if is_one_group(text):
            return Shape("set", _both_signs(split(match[1])))
    elif text[:1] in ("(", "[") and text[-1:] in (")", "]") and is_one_group(text):
        items = split(text[1:-1])
        if len(items) > 1 or text[0] == "[":
            return Shape(text[0] + text[-1], tuple(items))
    items = [item for item in split(_JOIN.sub(", ", text)) if item]
    if len(items) > 1:
        return Shape("list", _both_signs(items))
    return Shape("list", _both_signs([text])) if text.count(r"\pm") == 1 else None


_JOIN = re.compile(r",?\s+(?:and|or)\s+|(?<=\))\s*(?:and|or)\s*(?=\()|(?<=\d)(?:or|and)(?=[A-Za-z\d]\w*[(=]|-?\d)")


def _matrix(body: str) -> Shape | None:
    rows = [[cell.strip() for cell in row.split("&")] for row in body.split(r"\\")]
    if len({len(row) for row in rows}) > 1 or not all(cell for row in rows for cell in row):
        return None
    return Shape(f"matrix {len(rows)}x{len(rows[0])}", tuple(cell for row in rows for cell in row))


def _both_signs(items: list[str]) -> tuple[str, ...]:
    """The items, with each `a \\pm b` as two items."""
    found: list[str] = []
    for item in items:
        signs = ("+", "-") if item.count(r"\pm") == 1 else ("",)
        found.extend(item.replace(r"\pm", sign) if sign else item for sign in signs)
    return tuple(found)


def split(text: str) -> list[str]:
    """Split at the semicolons outside all brackets, else at the commas; commas that group thousands are kept."""
    if ";" in text and len(parts := _split_at(text, re.compile(";"))) > 1:
        return parts
    spaced = re.search(r"\d,\d{3}(?!\d)", text) and re.search(r",\s", text)
    return _split_at(text, re.compile(r",(?=\s)" if spaced else ","))


def _split_at(text: str, separator: re.Pattern[str]) -> list[str]:
    parts, depth, start, at = [], 0, 0, 0
    while at < len(text):
        char = text[at]
        if char == "\\" and at + 1 < len(text):
            at += 1
            char = text[at]
        depth += (char in _OPEN) - (char in _CLOSE)
        if depth == 0 and (found := separator.match(text, at)):
            parts.append(text[start:at].strip())
            start = found.end()
        at += 1
    parts.append(text[start:].strip())
    return parts


def is_one_group(text: str) -> bool:
    """Whether the bracket that opens the text closes at the end of the text."""
    depth = 0
    brackets = [(m.start(), m[0]) for m in re.finditer(r"[()\[\]{}]", text)]
    for position, char in brackets:
        depth += 1 if char in _OPEN else -1
        if depth == 0:
            return position == len(text) - 1
    return False


# ------------------------------------------------------------------------------------------ names and equations

_LETTER = r"(?:[A-Za-z]|\\[A-Za-z]+)"
_SUBSCRIPT = r"(?: ?_ ?(?:\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\}|\\?\w+))?"
_BRACKETS = r"(?:\((?:[^()]|\([^()]*\))*\)|\[[^\[\]]*\])"
_NAME = re.compile(
    rf"{_LETTER}{_SUBSCRIPT}'*(?: ?\^ ?\{{ ?-1 ?\}})?'*(?: ?{_BRACKETS})?"  # x, a_n, f(x), f^{-1}(x), P(A|B), E[X]
    r"|\([A-Za-z](?:_\w)?(?:, ?[A-Za-z](?:_\w)?)+\)|[A-Z]{2,5}|\\[a-z]+ ?\{[A-Za-z]+\}|(?:m ?)?(?:\\angle|\\triangle) ?[A-Z]+"
    r"|\|[^|=]*[A-Za-z][^|=]*\||\\\|[^|=]*\\\||\\frac\{[A-Za-z]+\}\{[A-Za-z]+\}|\\(?:sin|cos|tan|cot|log|ln) ?(?:\\angle ?)?\\?[A-Za-z]+"
    r"|[A-Za-z][A-Za-z_{}\d]* ?: ?[A-Za-z][A-Za-z_{}\d]*|\\lim ?_ ?\{[^{}]*\}.*|\\sigma ?\^ ?\{2\}|\([a-z] ?\\circ ?[a-z]\)\(.*\)"
    r"|\\over(?:right|left)arrow\{[A-Z]+\}|(?:the )?(?:final )?(?:answer|result|total|sum|value)"
    rf"|[A-Za-z]{{3,}}(?: [A-Za-z]+)*(?: ?\([^=]*\))?|[{HAN}]+",
)
_EQUALS = re.compile(r"(?<![<>!:=])=(?!=)|(?<=\\)in(?![a-zA-Z])")
_CONSTANTS = frozenset((r"\pi", "e", "i", r"\infty"))
_DENIALS = re.compile(
    r"(?<![A-Za-z])(?:[Nn]ot?|[Nn]ever|[Ww]rong|[Ii]sn't|[Cc]annot|[Ii]ncorrect)(?![A-Za-z])|[不非错]|\\ne(?![a-z])"
)
_COMMANDS = re.compile(
    r"\\(?:frac|sqrt|cdot|times|div|pi|infty|binom|left|right|ln|log|sin|cos|tan|cot|sec|csc|arc(?:sin|cos|tan)|exp|degrees)"
    r"(?![a-zA-Z])|degrees|(?<![a-zA-Z\\])[ei](?![a-zA-Z])"
)


def sides(text: str) -> list[str]:
    """Split a cleaned text at the equals signs outside brackets."""
    if "=" not in text and r"\in" not in text:
        return [text]
    return [part.removesuffix("\\").strip() for part in _split_at(text, _EQUALS)]


def is_name(text: str) -> bool:
    r"""Whether the left side of an equation is only a name: `x`, `f(2)`, `|AB|`, `S_{ABC}`, `Speed`; not `2x+y`."""
    return _NAME.fullmatch(text) is not None and text not in _CONSTANTS and not _DENIALS.search(text)


def is_letter(text: str) -> bool:
    r"""Whether a text is a name and not also an expression: `y`, `CD`; not `\ln x`."""
    return is_name(text) and not re.match(r"\\(?:sin|cos|tan|cot|log|ln)(?![a-zA-Z])", text)


def names_something(text: str) -> bool:
    """Return whether a left side has a letter or word; without one it is a claim about numbers (`3+5 = 7`)."""
    if _DENIALS.search(text) or text.startswith("-"):  # -x = 5
        return False
    return is_name(text) or re.search(rf"[A-Za-z{HAN}]", _COMMANDS.sub("", text)) is not None


def same_name(one: str, other: str) -> bool:
    r"""Whether two left sides name the same thing: `AB` and `|AB|`, `x_1` and `x_{1}`; `f(1)` is not `f(2)`."""
    return _skeleton(one) == _skeleton(other)


def _skeleton(text: str) -> str:
    text = re.sub(r"\\(?:overline|triangle|angle|vec|overrightarrow|mathbb)", "", text)
    return re.sub(r"[^A-Za-z\d'+-]", "", text)


def named_values(shape: Shape) -> dict[str, str] | None:
    """The values by name of a text like `y = 12, x = 2`, in its order; None unless every item has a different name."""
    pairs = [sides(item) for item in shape.items]
    if any(len(pair) != 2 or not is_name(pair[0]) for pair in pairs):
        return None
    values = {_skeleton(name): value for name, value in pairs}
    return values if len(values) == len(pairs) > 1 else None


# ---------------------------------------------------------------------------------------- words and conventions

_FUNCTION_NAMES = "sin cos tan cot sec csc log exp arcsin arccos arctan sqrt min max gcd lcm mod deg inf"
_FUNCTIONS = frozenset(_FUNCTION_NAMES.split())


def words(text: str) -> str | None:
    """Return a cleaned text that is prose (a name, a weekday, a yes), case-folded; None for mathematics."""
    if not re.fullmatch(r"[\w'\"(][\w '\".,:()&!?-]*", text) or "_" in text:
        return None
    if re.fullmatch(r"-?\d+[A-Za-z]+", text):  # 4abc
        return None
    found = re.findall(rf"[^\W\d_]{{3,}}|[{HAN}]+|(?i:\bno\b)", text.lower())
    if not found or _FUNCTIONS & set(found) or number(text) is not None:
        return None
    kept = re.findall(r"\w+", text.casefold())
    if kept and kept[0] in ("on", "in", "at") and len(kept) > 1:
        kept = kept[1:]
    if (reply := re.match(r"(yes|no|true|false)[,.;:] (.*)", text.casefold())) and not re.search(
        r"\b(?:yes|no|true|false|but|or)\b", reply[2]
    ):
        return reply[1]
    return " ".join(word for word in kept if word not in ("the", "a", "an")) or None


def positional(text: str) -> bool:
    """Return whether digits follow a convention outside algebra: bases (101_2), ratios, times, dates."""
    if re.fullmatch(r"\d{4}([-/])\d{1,2}\1\d{1,2}|\d{1,2}([-/.])\d{1,2}\2\d{4}", text):
        return True
    text = re.sub(r"\\log ?_", "", text)
    return re.search(r"(?<![A-Za-z])\d[\d ]*_ ?\{? ?\d|\d ?: ?\d", text) is not None and "=" not in text


def time_of_day(text: str) -> tuple[str, str] | None:
    """Return a time and its half of the day (empty if not given): `10:30 a.m.`; None for anything else."""
    found = re.fullmatch(r"(\d{1,2}:\d\d) ?(?:([ap])\.?m\.?)?", text, re.IGNORECASE)
    return (found[1], (found[2] or "").lower()) if found else None


_CHOICE = re.compile(
    r"\(?([A-J])\)?(?:(?<=\))|[.:)])(?=[ .:\d\\$])[ .:]*(.*)|([A-J])(?:, | (?=[\d\\$]))(.*)",
    re.DOTALL,
)
_BARE_CHOICE = re.compile(r"[(\[]([A-Ja-j])[)\]]|([A-J])[).:]?")
_ANOTHER_CHOICE = re.compile(r"(?<![A-Za-z\\])\(?[A-J](?![A-Za-z])(?! [a-z])")


def choice(text: str) -> tuple[str, str] | None:
    """The letter of a choice and the text after it: `B`, `(B)`, `B. 12`; None for anything else, or for two choices."""
    if bare := _BARE_CHOICE.fullmatch(text):
        return (bare[1] or bare[2]).upper(), ""
    found = _CHOICE.fullmatch(text)
    if found is None:
        return None
    letter, rest = found[1] or found[3], (found[2] or found[4] or "").strip()
    denies = re.match(r"(?:is|are|was|or|and|but|not|nor)\b", rest)
    return None if denies or _ANOTHER_CHOICE.search(rest) else (letter, rest)


def choices(text: str) -> str | None:
    """The letters of several choices: `AC`, `A, C` and `A and C` all give `AC`; None for anything else."""
    letters = re.sub(r"[,;\s()]|and", "", text)
    sorted_ = re.fullmatch("[A-J]{2,6}", letters) and "".join(sorted(set(letters))) == letters
    return letters if sorted_ and not re.search(r"\bor\b", text) else None
