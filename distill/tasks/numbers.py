"""Plain numbers as people write them: read exactly, as fractions, with the unit beside them.

The common answers are compared here and never reach a symbolic library. Units are part of a number: equal
where only one side names one, different where the two differ, and a percent sign is such a unit (20% is not
0.2). A comma groups thousands only where it cannot make a list: `1,000` and `12,345` are numbers, `100,200`
(equal groups, each a number by itself) is a list of two unless a currency or a unit says otherwise.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

MAX_EXPONENT = 400

Kind = Literal["integer", "decimal", "fraction"]


@dataclass(frozen=True, slots=True)
class Number:
    """A plain number as written. decimals: digits after the point. unit: in canonical spelling, or empty."""

    value: Fraction
    kind: Kind
    decimals: int = 0
    unit: str = ""


_DIGITS = r"\d+|\d{1,3}(?:[, ]\d{3})+"
_DECIMAL = re.compile(rf"([+-]?) ?(?:({_DIGITS})(\.\d*)?|(\.\d+))")
_REPEATING = re.compile(r"([+-]?) ?(\d+)\.(\d*)\\overline ?\{(\d+)\}")
_SCIENTIFIC = re.compile(
    r"([+-]? ?(?:\d+(?:\.\d*)?|\.\d+)) ?(?:[eE]([+-]?\d{1,4})"
    r"|(?:\\times|\\cdot|\*|x) ?10 ?\^ ?(?:\{ ?([+-]?\d{1,4}) ?\}|\( ?([+-]?\d{1,4}) ?\)|([+-]?\d{1,4})))"
)
_POWER_OF_TEN = re.compile(r"()10 ?\^ ?(?:\{ ?([+-]?\d{1,4}) ?\}|([+-]?\d{1,4}))")
_FRACTION = re.compile(
    r"([+-]?) ?(?:(\d+) ?)?(?:\\frac ?\{ ?([+-]? ?\d+) ?\} ?\{ ?([+-]? ?\d+) ?\})"
    r"|([+-]?) ?(?:(\d+) )?(\d+) ?/ ?(\d+)"
)
_CURRENCY = re.compile(r"^([+-]?) ?(?:US|C|A)?([$€£¥₹]) ?(?=[\d.+-])")
_UNIT = re.compile(
    r"(%|[A-Za-z]{2,}|(?<= )[msghlLNJWVACFKT](?![A-Za-z]))(?:[ ./^{}()A-Za-z-]|(?<=[A-Za-z^{-])[23])*$"
)
_UNIT_IN_BRACKETS = re.compile(r"(?<=[\d}]) \(([A-Za-z][A-Za-z ./]*)\)$")
# Words after a number that make another number, a choice or a claim of it, not a unit.
_OTHER_WORDS = (
    "or and to of half hundred thousand million billion trillion dozen score tenth tenths hundredths thirds "
    "quarters halves times plus minus over mod modulo factorial squared cubed pi sqrt not is if than more less "
    "at least most sin cos tan log ln exp inf infinity nan false wrong base by from choose each"
)
_NO_UNIT = frozenset(_OTHER_WORDS.split())
_UNIT_NAMES = {
    "percent": "%", "percentage": "%", "pct": "%", "deg": "degree", "dollar": "$", "usd": "$", "buck": "$",
    "euro": "€", "eur": "€", "pound": "£", "hr": "hour", "h": "hour", "min": "minute", "sec": "second",
    "s": "second", "centimeter": "cm", "centimetre": "cm", "meter": "m", "metre": "m", "kilometer": "km",
    "kilometre": "km", "millimeter": "mm", "millimetre": "mm", "inche": "inch", "in": "inch", "foot": "feet",
    "ft": "feet", "kilogram": "kg", "gram": "g", "liter": "l", "litre": "l", "mile": "mi",
}  # fmt: skip
_SPELLED_OUT = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
)
_SPELLED = {
    word: Number(Fraction(value), "integer") for value, word in enumerate(_SPELLED_OUT.split())
}
_SCALES = {
    "hundred": 10**2,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}
_SCALED = re.compile(rf"(.+?) ({'|'.join(_SCALES)})", re.IGNORECASE)


def number(text: str) -> Number | None:
    """A cleaned text as a plain number: integer, decimal, fraction, mixed or scientific, with its unit; up to twenty in words."""
    if spelled := _SPELLED.get(text.lower()):
        return spelled
    if scaled := _SCALED.fullmatch(text):
        return _scaled(scaled)
    text, unit = _take_unit(_bare(text))
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
    if match := _REPEATING.fullmatch(text):
        sign, whole, fixed, cycle = match.groups()
        value = Fraction(int(whole + fixed + cycle) - int(whole + fixed))
        value /= (10 ** len(cycle) - 1) * 10 ** len(fixed)
        return Number(-value if sign == "-" else value, "fraction", 0, unit)
    return None


def _scaled(match: re.Match[str]) -> Number | None:
    count = number(match[1])
    if count is None or count.kind == "fraction" or count.unit not in ("", "$", "€", "£", "¥", "₹"):
        return None
    value = count.value * _SCALES[match[2].lower()]
    return Number(value, "integer" if value.denominator == 1 else "decimal", 0, count.unit)


def same_number(answer: Number, gold: Number) -> bool:
    """Whether the two are one number, written out as far as the gold is."""
    if answer.unit and gold.unit and answer.unit != gold.unit:
        return False
    if answer.value == gold.value:
        # 14/2 for 7 restates the question.
        return not (answer.kind == "fraction" and gold.value.denominator == 1)
    # A fraction without an end, rounded or cut at six places or more, is that fraction.
    for rounded, exact in ((answer, gold), (gold, answer)):
        if rounded.kind == "decimal" and rounded.decimals >= 6 and exact.kind == "fraction":
            off, unit = abs(exact.value) - abs(rounded.value), Fraction(1, 10**rounded.decimals)
            return rounded.value * exact.value > 0 and -unit / 2 <= off < unit
    return False


def _bare(text: str) -> str:
    """Without parentheses around the whole."""
    while (match := re.fullmatch(r"\(([^(),]*)\)|\{([^{},]*)\}", text)) is not None:
        text = (match[1] or match[2] or "").strip()
    return text


def _take_unit(text: str) -> tuple[str, str]:
    if currency := _CURRENCY.match(text):
        rest = currency[1] + text[currency.end() :]
        rest = re.sub(r" (?:dollars?|USD)$", "", rest)
        return rest, currency[2]
    text = _UNIT_IN_BRACKETS.sub(r" \1", text)
    if not (match := _UNIT.search(text)) or match.start() == 0:
        return text, ""
    body, unit = text[: match.start()].rstrip(), text[match.start() :]
    words = re.findall(r"[A-Za-z%]+", unit.lower())
    if len(words) > 5 or _NO_UNIT & set(words) or not re.search(r"[\d}).]$", body):
        return text, ""
    names = [_unit_name(word) for word in words]
    digits = "".join(re.findall(r"[23]", unit))
    return body, " ".join(names) + digits


def _unit_name(word: str) -> str:
    singular = (
        word[:-1] if len(word) > 2 and word.endswith("s") and not word.endswith("ss") else word
    )
    return _UNIT_NAMES.get(singular, singular)


def _decimal(match: re.Match[str], unit: str) -> Number | None:
    sign, whole, fraction, only_fraction = match.groups()
    groups = re.split("[, ]", whole or "0")
    grouped_like_a_list = len(groups[0]) == 3 and not any(g.startswith("0") for g in groups[1:])
    if len(groups) > 1 and (groups[0].startswith("0") or (grouped_like_a_list and not unit)):
        return None
    digits = (fraction or only_fraction or ".")[1:]
    value = Fraction(int("".join(groups) + digits), 10 ** len(digits))
    kind: Kind = "integer" if value.denominator == 1 else "decimal"
    return Number(-value if sign == "-" else value, kind, len(digits), unit)


def _fraction(match: re.Match[str], unit: str) -> Number | None:
    sign, whole, top, bottom = match.groups()[:4] if match[3] else match.groups()[4:]
    numerator, denominator = (int(part.replace(" ", "")) for part in (top, bottom))
    if denominator == 0 or (whole and (numerator < 0 or denominator < 0)):
        return None
    value = int(whole or 0) + Fraction(numerator, denominator)
    return Number(-value if sign == "-" else value, "fraction", 0, unit)
