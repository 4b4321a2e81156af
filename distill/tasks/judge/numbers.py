"""Plain numbers, read exactly as fractions, with their units.

Most answers are compared here without a symbolic library. Units are part of a number (`units`). A comma groups
thousands only if the text cannot be a list: `1,000` and `12,345` are numbers; `100,200` (equal groups, each a number) is
a list of two numbers unless it has a currency or a unit.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from distill.tasks.judge import units

MAX_EXPONENT = 400

Kind = Literal["integer", "decimal", "fraction"]


@dataclass(frozen=True, slots=True)
class Number:
    """A plain number as written. decimals: number of digits after the point. unit: in canonical spelling, or empty."""

    value: Fraction
    kind: Kind
    decimals: int = 0
    unit: str = ""


_DIGITS = r"\d+|\d{1,3}(?:[, ]\d{3})+"
_DECIMAL = re.compile(rf"([+-]?) ?(?:({_DIGITS})(\.\d*)?|(\.\d+))")
_REPEATING = re.compile(
    r"([+-]?) ?(\d+)\.(\d*)"
    r"(?:\\(?:overline|bar) ?\{ ?(\d+) ?\}|\((\d+)\)|(\\dot ?\{?\d\}?(?:\d*\\dot ?\{?\d\}?)?))"
)
_ENDLESS = re.compile(r"([+-]?) ?(\d+)\.(\d*?)(?=\d{3})((\d{1,6}?)\5+) ?\.\.\.")
_SCIENTIFIC = re.compile(
    r"([+-]? ?(?:\d+(?:\.\d*)?|\.\d+)) ?(?:[eE]([+-]?\d{1,4})"
    r"|(?:\\times|\\cdot|\*|x) ?10 ?\^ ?(?:\{ ?([+-]?\d{1,4}) ?\}|\( ?([+-]?\d{1,4}) ?\)|([+-]?\d{1,4})))"
)
_POWER_OF_TEN = re.compile(r"()10 ?\^ ?(?:\{ ?([+-]?\d{1,4}) ?\}|([+-]?\d{1,4}))")
_FRACTION = re.compile(
    r"([+-]?) ?(?:(\d+) ?)?(?:\\frac ?\{ ?([+-]? ?\d+) ?\} ?\{ ?([+-]? ?\d+) ?\})"
    r"|([+-]?) ?(?:(\d+) )?(\d+) ?/ ?(\d+)"
)
_SPELLED_OUT = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
)
_SPELLED = {
    word: Number(Fraction(value), "integer")
    for words in (_SPELLED_OUT.split(), "零一二三四五六七八九十")
    for value, word in enumerate(words)
}
_SCALES = {
    "hundred": 10**2,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}
_SCALED = re.compile(rf"(.+?) ({'|'.join(_SCALES)})((?: [A-Za-z]+)?)", re.IGNORECASE)
_HAN_DIGITS = "零一二三四五六七八九十"
_HAN_FRACTION = re.compile(f"([{_HAN_DIGITS}])分之([{_HAN_DIGITS}])")


def number(text: str) -> Number | None:
    """Read a cleaned text as a number: integer, decimal, fraction, mixed or scientific, with its unit; words up to twenty."""
    if spelled := _SPELLED.get(text.lower()):
        return spelled
    if (match := _HAN_FRACTION.fullmatch(text)) and match[1] != "零":
        bottom, top = (_HAN_DIGITS.index(digit) for digit in match.groups())
        return Number(Fraction(top, bottom), "fraction")
    if scaled := _SCALED.fullmatch(text):
        return _scaled(scaled)
    text, unit = units.split_number(_bare(text))
    text = _bare(text)
    if match := _DECIMAL.fullmatch(text):
        return _decimal(match, unit)
    if match := _SCIENTIFIC.fullmatch(text) or _POWER_OF_TEN.fullmatch(text):
        exponent = int(next(group for group in match.groups()[1:] if group))
        if abs(exponent) > MAX_EXPONENT:
            return None
        value = Fraction((match[1] or "1").replace(" ", "")) * Fraction(10) ** exponent
        return Number(value, "integer" if value.denominator == 1 else "decimal", 0, unit)
    if match := _FRACTION.fullmatch(text):
        return _fraction(match, unit)
    if match := _REPEATING.fullmatch(text) or _ENDLESS.fullmatch(text):
        return _repeating(match, unit)
    return None


def _scaled(match: re.Match[str]) -> Number | None:
    count = number(match[1] + match[3])
    if count is None or count.kind == "fraction":
        return None
    value = count.value * _SCALES[match[2].lower()]
    return Number(value, "integer" if value.denominator == 1 else "decimal", 0, count.unit)


def same_number(answer: Number, gold: Number) -> bool:
    """Return whether two numbers are equal and the answer is computed as far as the gold."""
    if not units.same(answer.unit, gold.unit):
        return False
    if answer.value == gold.value:
        # 14/2 is not accepted for 7: the division is not carried out.
        return not (answer.kind == "fraction" and gold.value.denominator == 1)
    # A decimal with six or more digits equals a fraction that it rounds or truncates.
    for rounded, exact in ((answer, gold), (gold, answer)):
        if rounded.kind == "decimal" and exact.kind == "fraction" and _significant(rounded) >= 6:
            off, unit = abs(exact.value) - abs(rounded.value), Fraction(1, 10**rounded.decimals)
            return rounded.value * exact.value > 0 and -unit / 2 <= off < unit
    return False


def _significant(number: Number) -> int:
    """Return the number of digits after the point, without leading zeros."""
    whole = abs(number.value) * 10**number.decimals
    return min(number.decimals, len(str(whole.numerator)))


def _bare(text: str) -> str:
    """Remove parentheses around the whole text."""
    while (match := re.fullmatch(r"\(([^(),]*)\)|\{([^{},]*)\}", text)) is not None:
        text = (match[1] or match[2] or "").strip()
    return text


def _decimal(match: re.Match[str], unit: str) -> Number | None:
    sign, whole, fraction, only_fraction = match.groups()
    groups = re.split("[, ]", whole or "0")
    grouped_like_a_list = (
        "," in (whole or "") and len(groups[0]) == 3 and not any(g.startswith("0") for g in groups[1:])
    )
    if len(groups) > 1 and (groups[0].startswith("0") or (grouped_like_a_list and not unit)):
        return None
    digits = (fraction or only_fraction or ".")[1:]
    value = Fraction(int("".join(groups) + digits), 10 ** len(digits))
    kind: Kind = "integer" if value.denominator == 1 else "decimal"
    return Number(-value if sign == "-" else value, kind, len(digits), unit)


def _repeating(match: re.Match[str], unit: str) -> Number:
    """A repeating decimal: `0.1\\overline{6}`, `0.1(6)`, `0.1\\dot{6}`, or `0.1666...` with at least three repeated digits."""
    sign, whole, fixed, *cycles = match.groups()
    cycle = re.sub(r"\D", "", next(filter(None, cycles)))
    value = Fraction(int(whole + fixed + cycle) - int(whole + fixed))
    value /= (10 ** len(cycle) - 1) * 10 ** len(fixed)
    return Number(-value if sign == "-" else value, "fraction", 0, unit)


def _fraction(match: re.Match[str], unit: str) -> Number | None:
    sign, whole, top, bottom = match.groups()[:4] if match[3] else match.groups()[4:]
    numerator, denominator = (int(part.replace(" ", "")) for part in (top, bottom))
    if denominator == 0 or (whole and (numerator < 0 or denominator < 0)):
        return None
    value = int(whole or 0) + Fraction(numerator, denominator)
    return Number(-value if sign == "-" else value, "fraction", 0, unit)
