r"""The written form of an answer: clean text; tuples, sets and lists; equations; words.

Everything here is quick and certain; what it cannot read is left to the symbolic comparison (`worker`).
Numbers have a module of their own (`numbers`).
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

from distill.tasks.numbers import number

_SUPER = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_SUPER_RUN = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+")
_SUB = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_SUB_RUN = re.compile("[₀₁₂₃₄₅₆₇₈₉]+")
_VULGAR = re.compile("(\\d*)\\s*([¼½¾⅐-⅞↉])")
_SYMBOLS = {
    "−": "-", "–": "-", "—": "-", "‒": "-", "\u200b": "", "\ufeff": "", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": r"\div ",
    "∗": "*", "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "±": r"\pm ",
    "∈": r"\in ", "∪": r"\cup ", "∩": r"\cap ", "∅": r"\emptyset ", "θ": r"\theta ", "°": r"^\circ ",
    "’": "'", "“": '"', "”": '"', "⁄": "/", "≈": r"\approx ",
}  # fmt: skip
_DROP = re.compile(
    r"(?<!\\)(?:\\[!,;:> ]|\\(?:left|right|quad|qquad|displaystyle|textstyle|limits)(?![a-zA-Z]))"
)
_TEXT = re.compile(
    r"\\(?:text|textbf|textit|textrm|mbox|mathrm|mathbf|mathit|operatorname|hbox|rm)\s*\{([^{}]*)\}"
)
_PREFACE = re.compile(
    r"(?:(?:therefore|thus|hence|so),? )?(?:(?:the )?(?:final |correct )*answer(?: is)?:? |it(?: is|'s) "
    r"|(?:the )?(?:result|total|sum|value|solution) (?:is:?|:) ?|(?:option|choice) (?=\(?[A-J]\)?$))|= ?",
    re.IGNORECASE,
)
_LOOSE_SPACE = re.compile(r"(?<![\w\\]) | (?!\w)")
_WRAPS = (
    re.compile(r"\$\$(.*)\$\$", re.DOTALL),
    re.compile(r"\$([^$]*)\$", re.DOTALL),
    re.compile(r"\\\((.*)\\\)", re.DOTALL),
    re.compile(r"\\\[(.*)\\\]", re.DOTALL),
    re.compile(r"\*\*([^*]*)\*\*", re.DOTALL),
    re.compile(r"\*([^*]*)\*", re.DOTALL),
    re.compile(r"__(.*)__", re.DOTALL),
    re.compile(r"`(.*)`", re.DOTALL),
    re.compile(r"\\f?boxed\s*\{(.*)\}", re.DOTALL),
    re.compile(r"\\(?:text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}", re.DOTALL),
)


def clean(text: str) -> str:
    """The answer in one plain LaTeX spelling: no wrappers, no typographic variants, no closing full stop."""
    if not text.isascii():
        text = _without_typography(text)
    text = _unwrap(text)
    if "**" in text:
        text = re.sub(r"(?<![\w)}*])\*\*([^*]+)\*\*", r"\1", text)
    if "pi" in text:
        text = re.sub(r"(?<![\\A-Za-z])pi(?![A-Za-z])", r"\\pi ", text)
    if "\\" in text or "{" in text:
        text = _plain_latex(text)
    text = text.replace("~", " ").replace("<=", r"\le ").replace(">=", r"\ge ")
    text = " ".join(text.replace("<", " < ").replace(">", " > ").split())
    if preface := _PREFACE.match(text):
        text = text[preface.end() :]
    return _unwrap(text)


def _without_typography(text: str) -> str:
    text = _VULGAR.sub(_spell_vulgar, text)
    text = _SUPER_RUN.sub(lambda run: "^{%s}" % run[0].translate(_SUPER), text)  # noqa: UP031
    text = _SUB_RUN.sub(lambda run: "_{%s}" % run[0].translate(_SUB), text)  # noqa: UP031
    for symbol, spelled in _SYMBOLS.items():
        text = text.replace(symbol, spelled)
    text = unicodedata.normalize("NFKC", text)
    return re.sub(r"√\s*(\d+|[A-Za-z]|\(([^()]*)\))", _spell_root, text).replace("√", r"\sqrt ")


def _plain_latex(text: str) -> str:
    text = re.sub(r"\\f?boxed\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\(?:mathrm|text|operatorname)\s*\{([ie])\}", r"\1", text)
    text = _TEXT.sub(r" \1 ", text)
    text = _DROP.sub("", text.replace(r"\dots", "..."))
    text = re.sub(r"\\[dtc]frac(?![a-zA-Z])", r"\\frac", text)
    text = re.sub(r"\{([^{}]*)\\over(?![a-zA-Z])([^{}]*)\}", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\sqrt\s*(\d)(?!\d)", r"\\sqrt{\1}", text)
    text = re.sub(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)", " degrees ", text)
    text = re.sub(r"(\d)\{,\}(?=\d{3})", r"\1", text)
    for command, plain in ((r"\$", "$"), (r"\%", "%"), (r"\lbrace", r"\{"), (r"\rbrace", r"\}")):
        text = text.replace(command, plain)
    text = re.sub(r"\\(leq|geq|neq)(?![a-zA-Z])", lambda name: "\\" + name[1][:-1], text)
    text = re.sub(r"_ ?\{(\w)\}", r"_\1", text)
    return re.sub(r"(\\(?:log|ln|lg)(?:_\w)?) ?\{([^{}]*)\}", r"\1(\2)", text)


def same_text(one: str, other: str) -> bool:
    """Whether two cleaned texts differ in spaces only that separate nothing (not `4 2` and `42`)."""
    return _LOOSE_SPACE.sub("", one) == _LOOSE_SPACE.sub("", other)


def _spell_vulgar(found: re.Match[str]) -> str:
    value = Fraction(unicodedata.numeric(found[2])).limit_denominator(100)
    if found[1]:
        value += int(found[1])
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def _spell_root(found: re.Match[str]) -> str:
    return r"\sqrt{%s}" % (found[1] if found[2] is None else found[2])


def _unwrap(text: str) -> str:
    """Out of dollar signs, boxes, bold and the like, as often as there are any."""
    while True:
        before = text
        text = text.strip()
        if not text.endswith("..."):
            text = re.sub(r"(?:(?<!\\)[.,;:])+$", "", text).strip()
        text = text.removesuffix(r"\\").strip()
        for wrap in _WRAPS:
            if (match := wrap.fullmatch(text)) and balanced(match[1]):
                text = match[1]
        if text == before:
            return text


def balanced(text: str) -> bool:
    """Whether the unescaped braces match."""
    depth = 0
    for char in re.sub(r"\\.", "", text):
        depth += {"{": 1, "}": -1}.get(char, 0)
        if depth < 0:
            return False
    return depth == 0


# -------------------------------------------------------------------------------------------------- shapes

_OPEN, _CLOSE = "([{", ")]}"


@dataclass(frozen=True, slots=True)
class Shape:
    """A collection as written. kind: its brackets ("()", "[)", ...), "set" or "list" (no brackets)."""

    kind: str
    items: tuple[str, ...]


def shape(text: str) -> Shape | None:
    """The collection that a cleaned text is, or None for a single thing."""
    text = text.replace(r"\langle", "(").replace(r"\rangle", ")")
    if match := re.fullmatch(r"\\\{(.*)\\\}", text) or re.fullmatch(r"\{(.*)\}", text):
        if _is_one_group(text):
            return Shape("set", tuple(split(match[1])))
    elif text[:1] in ("(", "[") and text[-1:] in (")", "]") and _is_one_group(text):
        items = split(text[1:-1])
        if len(items) > 1 or text[0] == "[":
            return Shape(text[0] + text[-1], tuple(items))
    items = split(re.sub(r",?\s+(?:and|or)\s+", ", ", text))
    if len(items) > 1:
        return Shape("list", tuple(items))
    if text.count(r"\pm") == 1:
        return Shape("list", (text.replace(r"\pm", "+"), text.replace(r"\pm", "-")))
    return None


def split(text: str) -> list[str]:
    """Parts at the commas and semicolons outside all brackets; commas that group thousands stay."""
    spaced = re.search(r"\d,\d{3}(?!\d)", text) and re.search(r",\s", text)
    separator = re.compile(r"[,;](?=\s)|;" if spaced else r"[,;]")
    parts, depth, start, at = [], 0, 0, 0
    while at < len(text):
        char = text[at]
        if char == "\\" and at + 1 < len(text):
            at += 1
            char = text[at]
        depth += (char in _OPEN) - (char in _CLOSE)
        if depth == 0 and separator.match(text, at):
            parts.append(text[start:at].strip())
            start = at + 1
        at += 1
    parts.append(text[start:].strip())
    return parts


def _is_one_group(text: str) -> bool:
    """Whether the bracket that opens the text closes at its very end."""
    depth = 0
    brackets = [(m.start(), m[0]) for m in re.finditer(r"[()\[\]{}]", text)]
    for position, char in brackets:
        depth += 1 if char in _OPEN else -1
        if depth == 0:
            return position == len(text) - 1
    return False


# --------------------------------------------------------------------------------------------- other forms

_VARIABLE = re.compile(
    r"(?:[A-Za-z]|\\[a-z]+)(?: ?_ ?(?:\{\w+\}|\w))?'*(?: ?\([A-Za-z](?:, ?[A-Za-z])*\))?"
    r"|\([A-Za-z](?:, ?[A-Za-z])+\)|[A-Z]{2,3}|(?:m ?)?\\angle ?[A-Z]+|P ?\([^()=]*\)"
    r"|(?:the )?(?:final )?(?:answer|result|total|sum|value)"
)
_FUNCTION_NAMES = (
    "sin cos tan cot sec csc log exp arcsin arccos arctan sqrt min max gcd lcm mod deg inf"
)
_FUNCTIONS = frozenset(_FUNCTION_NAMES.split())
_RELATION = re.compile(r"<|>|\\(?:le|ge|lt|gt|ne)(?![a-zA-Z])")
_MIRRORED = {">": "<", r"\ge": r"\le"}


def is_relation(text: str) -> bool:
    """Whether a cleaned text holds an inequality."""
    return _RELATION.search(text) is not None


def as_interval(text: str) -> str | None:
    """The interval that an inequality of one letter describes, `2 < x` or `1 \\le x < 3` say; None for any other text."""
    parts = [part.strip() for part in _RELATION.split(text)]
    signs = _RELATION.findall(text)
    if not 1 <= len(signs) <= 2 or any(
        "gt" in sign or "lt" in sign or "ne" in sign for sign in signs
    ):
        return None
    if signs[0] in (">", r"\ge"):  # read from the right
        parts, signs = parts[::-1], [_MIRRORED.get(sign, sign) for sign in signs[::-1]]
    if any(sign in (">", r"\ge") for sign in signs) or not all(parts):
        return None
    if len(signs) == 1:
        is_letter = [re.fullmatch("[A-Za-z]", part) is not None for part in parts]
        if is_letter == [True, False]:
            parts, signs = [r"-\infty", *parts], ["<", *signs]
        elif is_letter == [False, True]:
            parts, signs = [*parts, r"\infty"], [*signs, "<"]
    if len(parts) != 3 or not re.fullmatch("[A-Za-z]", parts[1]):
        return None
    left, right = "(" if signs[0] == "<" else "[", ")" if signs[1] == "<" else "]"
    return f"{left}{parts[0]}, {parts[2]}{right}"


def sides(text: str) -> list[str]:
    """What stands around the equals signs of a cleaned text."""
    return [side.strip() for side in re.split(r"(?<![<>!:=])=(?!=)|\\in(?![a-zA-Z])", text)]


def named_values(shape: Shape) -> Shape | None:
    """`y = 12, x = 2` as the tuple (2, 12), by the alphabet; None for a collection of anything else."""
    pairs = [sides(item) for item in shape.items]
    if any(len(pair) != 2 or not re.fullmatch("[a-z]", pair[0]) for pair in pairs):
        return None
    if len({name for name, _ in pairs}) != len(pairs):
        return None
    return Shape("()", tuple(value for _, value in sorted(pairs)))


def is_variable(text: str) -> bool:
    """Whether the left side of an equation only names what is on its right."""
    return _VARIABLE.fullmatch(text) is not None and text not in (r"\pi", "e", "i", r"\infty")


def words(text: str) -> str | None:
    """A cleaned text that is prose (a name, a weekday, a yes), folded; None for mathematics."""
    if not re.fullmatch(r"[\w '\".,:()&-]+", text) or "_" in text:
        return None
    found = re.findall(r"[^\W\d_]{3,}", text.lower())
    if not found or _FUNCTIONS & set(found) or number(text) is not None:
        return None
    kept = re.findall(r"\w+", text.casefold())
    return " ".join(word for word in kept if word not in ("the", "a", "an")) or None


def positional(text: str) -> bool:
    """Whether digits are read by a convention that algebra does not know: bases (101_2), ratios, times, dates."""
    if re.fullmatch(r"\d{4}([-/])\d{1,2}\1\d{1,2}|\d{1,2}([-/.])\d{1,2}\2\d{4}", text):
        return True
    text = re.sub(r"\\log ?_", "", text)
    return re.search(r"\w ?_ ?\{? ?\d|\d ?: ?\d", text) is not None and "=" not in text
