r"""Sets of numbers: inequalities, intervals and unions, read as pieces of the number line.

`x < -1 or x > 4` has the pieces `(-\infty, -1)` and `(4, \infty)`, as has `x \in (-\infty,-1) \cup (4,\infty)`.
The endpoints are texts, compared by the caller; only plain numbers are ordered here.
"""

from __future__ import annotations

import re

from distill.tasks.judge import numbers, structure

_RELATION = re.compile(r"<|>|\\(?:le|ge|ne)(?![a-zA-Z])")
_MIRRORED = {">": "<", r"\ge": r"\le"}
Bounds = tuple[str, str, str, str]
"""Opening bracket, lower end, upper end, closing bracket."""

ALL: Bounds = ("(", r"-\infty", r"\infty", ")")


def is_relation(text: str) -> bool:
    """Whether a cleaned text contains an inequality."""
    return _RELATION.search(text) is not None


def is_region(text: str) -> bool:
    r"""Whether a cleaned text is an inequality, a union or the set of all numbers.

    `|A \cup B| = 5` is not a region, and a plain interval does not count as one here.
    """
    *_, last = structure.sides(text)
    return is_relation(last) or re.search(r"\\cup(?![a-zA-Z])|\\mathbb ?\{R\}", last) is not None


def names(text: str) -> set[str]:
    """The names (letters, functions) that the inequalities constrain."""
    parts = re.split(r"<|>|\\(?:le|ge|ne|in|cup)(?![a-zA-Z])|,| or | and ", text)
    return {part.replace(" ", "") for part in parts if structure.is_name(part.strip()) and "|" not in part}


def pieces(text: str) -> list[str] | None:
    """Return the intervals and sets whose union a text is; None if it is no region, or a single pair of brackets."""
    text = _without_name(text)
    if is_relation(text) and len(names(text)) > 1:
        return None
    if re.fullmatch(r"\\mathbb ?\{R\}", text):
        return [_written(ALL)]
    found: list[str] = []
    separator = r"\\cup(?![a-zA-Z])|\s+or\s+" if is_relation(text) else r"\\cup(?![a-zA-Z])"
    parts = [_without_name(part.strip().strip(",").strip()) for part in re.split(separator, text)]
    for part in parts:
        if is_relation(part):
            inner = _conjunction(part)
            if inner is None:
                return None
            found.extend(inner)
        elif is_relation(text) and len(sides := structure.sides(part)) == 2 and structure.is_name(sides[0]):
            found.append(rf"\{{{sides[1]}\}}")  # x = 0 or x > 4
        elif (
            (shape := structure.shape(part)) and (shape.kind == "set" or len(shape.items) == 2) and shape.kind != "list"
        ):
            found.append(part)
        else:
            return None
    return found


_BUILDER = re.compile(r"\\\{ ?[A-Za-z] ?(?:\\in ?\\mathbb ?\{R\} ?)?[|:](.*)\\\}")


def _without_name(text: str) -> str:
    r"""Return the set of `x \in (1, 2)` and of `\{x | 1 < x < 2\}`."""
    if builder := _BUILDER.fullmatch(text):
        return builder[1].strip()
    name, *rest = re.split(r"\\in(?![a-zA-Z])", text, maxsplit=1)
    return rest[0].strip() if rest and structure.is_name(name.strip()) else text


def _conjunction(text: str) -> list[str] | None:
    """Return the pieces of inequalities that hold together; a comma between two that exclude each other means `or`."""
    explicit = re.search(r"\s+and\s+", text) is not None
    parts = [part.strip() for part in re.split(r",|\s+and\s+", text) if part.strip()]
    lower, upper, excluded, single = [], [], [], []
    for part in parts:
        if different := re.fullmatch(r"([^<>]+?)\\ne(.+)", part):
            if not structure.is_name(different[1].strip()):
                return None
            excluded.append(different[2].strip())
            continue
        bounds = as_interval(part)
        if bounds is None:
            return None
        single.append(bounds)
        if bounds[1] != r"-\infty":
            lower.append(bounds[:2])
        if bounds[2] != r"\infty":
            upper.append(bounds[2:])
    if len(lower) > 1 or len(upper) > 1:
        return None
    joined: Bounds = (*(lower[0] if lower else ALL[:2]), *(upper[0] if upper else ALL[2:]))
    if lower and upper:
        low, high = numbers.number(joined[1]), numbers.number(joined[2])
        if low is not None and high is not None and low.value >= high.value:
            return None if explicit or excluded or len(single) == 1 else [_written(bounds) for bounds in single]
    return _without(joined, excluded)


def _without(bounds: Bounds, points: list[str]) -> list[str]:
    left, low, high, right = bounds
    ordered = sorted(points, key=lambda point: n.value if (n := numbers.number(point)) else 0)
    ends = [low, *ordered, high]
    return [
        _written((left if at == 0 else "(", ends[at], ends[at + 1], right if at == len(points) else ")"))
        for at in range(len(ends) - 1)
    ]


def _written(bounds: Bounds) -> str:
    left, low, high, right = bounds
    return f"{left}{low}, {high}{right}"


def as_interval(text: str) -> Bounds | None:
    r"""The interval that an inequality of one name describes, such as `2 < x` or `1 \le x < 3`; None for other texts."""
    parts = [part.strip() for part in _RELATION.split(text)]
    signs = _RELATION.findall(text)
    if not 1 <= len(signs) <= 2 or r"\ne" in signs or not all(parts):
        return None
    if signs[0] in (">", r"\ge"):  # read from the right
        parts, signs = parts[::-1], [_MIRRORED.get(sign, sign) for sign in signs[::-1]]
    if any(sign in (">", r"\ge") for sign in signs):
        return None
    if len(signs) == 1:
        named = [structure.is_name(part) for part in parts]
        if named == [True, False]:
            parts, signs = [r"-\infty", *parts], ["<", *signs]
        elif named == [False, True]:
            parts, signs = [*parts, r"\infty"], [*signs, "<"]
    if len(parts) != 3 or not structure.is_name(parts[1]) or parts[1].startswith("|"):
        return None
    return "(" if signs[0] == "<" else "[", parts[0], parts[2], ")" if signs[1] == "<" else "]"
