r"""Units of a number or an expression: a measure, a currency, a noun, a percent sign.

Units are part of an answer: two answers are equal if only one names a unit, and differ if their units differ. A percent
sign is a unit (20% is not 0.2). Words that change the number or make a claim (`million`, `or`, `less than`) are not units.
"""

from __future__ import annotations

import re

_CURRENCY = re.compile(r"^([+-]?) ?(?:US|C|A)?([$€£¥₹]|Rs\.?) ?(?=[\d.+-])")
_CURRENCY_BEHIND = re.compile(r"(?<=\d) ?([$€£¥₹])$")
_LETTER = r"[msghlLNJWVACFKTΩ]"
_UNIT = re.compile(
    rf"(%|(?<![\\A-Za-z])[A-Za-zµΩ]{{2,}}|(?<= ){_LETTER}(?![A-Za-z]))(?:[ ./^{{}}()A-Za-zµΩ'’-]|(?<=[A-Za-z^{{-])[1-3])*$"
)
_UNIT_IN_BRACKETS = re.compile(r"(?<=[\d}]) \(([A-Za-z][A-Za-z ./]*)\)$")
_QUOTIENT = re.compile(r" ?\\frac ?\{ ?([A-Za-zµ]+) ?\} ?\{ ?([A-Za-zµ]+) ?(\^ ?\{?[23]\}?)? ?\}$")
_BEHIND_EXPRESSION = re.compile(
    rf"(.*?[\w)}}]) ((?:[A-Za-zµΩ]{{2,}}|{_LETTER}(?![A-Za-z]))(?:[ ./^{{}}A-Za-zµΩ-]|(?<=[A-Za-z^{{-])[1-3])*)"
)
_HAN = "\u3400-\u9fff"
_HAN_UNIT = re.compile(rf"(?<=[\d}})%]) ?\(?([{_HAN}][{_HAN}/]*)\)?$")
# Words after a number that are not units: they change the number, or make a choice or a claim.
_NOT_UNITS = (
    "or half hundred thousand million billion trillion dozen score tenth tenths hundredths thirds quarters halves times "
    "plus minus modulo factorial squared cubed pi sqrt not if than less least most sin cos tan log ln exp inf infinity nan "
    "false wrong choose maybe but one two three four five six seven eight nine ten eleven twelve twenty thirty fifty"
)
_NEVER = frozenset(_NOT_UNITS.split())
_NOT_FIRST = "and to over mod is more at base by from each some plus approximately about"
_NEVER_FIRST = frozenset(_NOT_FIRST.split())
_HAN_NEVER = re.compile("^[万亿千百十倍半几多]|分之|以[上下内外]|[或不非约近超少余减加乘除至到左右]")
_MAX_WORDS = 14
_NAMES = {
    "percent": "%", "percentage": "%", "pct": "%", "deg": "degree", "dollar": "$", "usd": "$", "buck": "$",
    "euro": "€", "eur": "€", "pound": "£", "yuan": "¥", "hr": "hour", "h": "hour", "min": "minute", "sec": "second",
    "s": "second", "centimeter": "cm", "centimetre": "cm", "meter": "m", "metre": "m", "kilometer": "km",
    "kilometre": "km", "millimeter": "mm", "millimetre": "mm", "inche": "inch", "in": "inch", "foot": "feet",
    "ft": "feet", "kilogram": "kg", "gram": "g", "liter": "l", "litre": "l", "mile": "mi", "sq": "square",
}  # fmt: skip
_HAN_NAMES = {
    "厘米": "cm", "毫米": "mm", "分米": "dm", "千米": "km", "公里": "km", "米": "m", "千克": "kg", "公斤": "kg", "克": "g", "元": "¥",
    "度": "degree", "小时": "hour", "分钟": "minute", "秒": "second", "平方": "square", "立方": "cubic", "升": "l", "毫升": "ml",
    "美元": "$", "天": "day", "年": "year", "千瓦": "kw", "吨": "ton",
}  # fmt: skip
_HAN_WORD = re.compile("|".join(sorted(_HAN_NAMES, key=len, reverse=True)))
_OTHER_MEASURES = "dm ml kw ton day week month year cubic mph kmh kph hz v w n j k a mol pa c f µm µs ω kω cent oz lb yard acre gallon kj kn kv mph"
_MEASURES = frozenset(_NAMES.values()) | frozenset(_OTHER_MEASURES.split())


def split_number(text: str) -> tuple[str, str]:
    """Split a text into a number and its unit in canonical spelling; the unit is empty if there is none."""
    if currency := _CURRENCY.match(text):
        rest = currency[1] + text[currency.end() :]
        return re.sub(r" (?:dollars?|USD)$", "", rest), currency[2]
    if currency := _CURRENCY_BEHIND.search(text):
        return text[: currency.start()], currency[1]
    if not text.isascii() and (han := _HAN_UNIT.search(text)):
        return _split_han(text, han)
    text = _UNIT_IN_BRACKETS.sub(r" \1", _spelled(text))
    if not (match := _UNIT.search(text)) or match.start() == 0:
        return text, ""
    body, unit = text[: match.start()].rstrip(), text[match.start() :]
    if not re.search(r"[\d}).]$", body) or not _is_unit(unit, attached=body == text[: match.start()]):
        return text, ""
    name = _name(unit)
    return (body, name) if name else (text, "")


def split_expression(text: str) -> tuple[str, str]:
    r"""As `split_number`, for an expression with a measure or noun after it (`25\pi cm^2`, `3x+2 dollars`)."""
    spelled = _spelled(text)
    match = _BEHIND_EXPRESSION.fullmatch(spelled)
    if match is None or not re.search(r"[\d\\]", match[1]) or re.search(r"(?<![\\A-Za-z])[A-Za-z]{4}", match[1]):
        return text, ""
    has_letters = re.search(r"(?<![\\A-Za-z])[A-Za-z]", match[1]) is not None
    if not _is_unit(match[2], attached=False) or (has_letters and re.match(r"[A-Za-z](?![A-Za-z])", match[2])):
        return text, ""
    name = _name(match[2])
    return (match[1].strip(), name) if name else (text, "")


def same(one: str, other: str) -> bool:
    """Return whether two units agree: one of them is missing, or they name the same measure or thing."""
    if not one or not other or one == other:
        return True
    measures = [[word for word in unit.split() if word.rstrip("23") in _MEASURES] for unit in (one, other)]
    if measures[0] or measures[1]:
        return measures[0] == measures[1]
    return bool(set(one.split()) & set(other.split()) - {"in", "the", "of", "a", "and"})


def _spelled(text: str) -> str:
    text = text.replace(r"\mu", "µ").replace(r"\Omega", "Ω")
    text = re.sub(r"µ +(?=[A-Za-z])", "µ", text)
    text = re.sub(r"(?<=[A-Za-z]) *\\cdot *(?=[A-Za-z])", " ", text)
    text = re.sub(r"(?<=[A-Za-z]) +Ω", "Ω", text)
    return _QUOTIENT.sub(lambda unit: f" {unit[1]}/{unit[2]}{unit[3] or ''}", text)


def _split_han(text: str, han: re.Match[str]) -> tuple[str, str]:
    body, unit = text[: han.start()], han[1]
    known = _HAN_WORD.match(unit)
    if _HAN_NEVER.search(unit) and not known:
        return text, ""
    names = " ".join(_HAN_NAMES[word] for word in _HAN_WORD.findall(unit))
    return body.rstrip(), names if known else unit


def _is_unit(unit: str, attached: bool) -> bool:
    """Whether the first word is a measure or looks like a noun. `ab` in `2ab` and `xyz` in `2 xyz` are products of letters.

    attached: whether there is no space between the number and the unit.
    """
    first = re.match(r"[A-Za-zµΩ]+|%", unit)
    if first is None:
        return False
    word = first[0]
    if word in ("%", "of") or word.lower() in _NAMES or _singular(word.lower()) in _MEASURES:
        return True
    if attached or len(word) < 3:
        return len(word) > 4
    return len(word) > 3 or (re.search("[aeiou]", word) is not None and "".join(sorted(word)) != word)


def _name(unit: str) -> str:
    """The canonical spelling of a unit; "" if the words are not a unit."""
    words = re.findall(r"[A-Za-z%µΩ]+", re.sub(r"\b(?:mph)\b", "mi/h", unit))
    lower = {word.lower() for word in words}
    factors = [word for word in words if re.fullmatch(rf"(?!{_LETTER}|[aAIcf])[A-Za-z]", word)]
    if factors or re.match("%[^ ]", unit):
        return ""
    if len(words) > _MAX_WORDS or _NEVER & lower or words[0].lower() in _NEVER_FIRST:
        return ""
    names = [_singular(word.lower()) for word in words if word.lower() != "per" or len(words) == 1]
    return " ".join(names) + "".join(re.findall(r"[23]", unit))


def _singular(word: str) -> str:
    single = word[:-1] if len(word) > 2 and word.endswith("s") and not word.endswith("ss") else word
    return _NAMES.get(single, single)
