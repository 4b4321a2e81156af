"""The judge of answers, which rewards, filters and evaluations share.

`math_verdict` compares an answer with a gold answer: as cleaned text (`spelling`), as plain numbers (`numbers`, `units`),
as a choice or words, as sets of numbers (`number_sets`), as collections item by item (`structure`), and otherwise
symbolically (`symbolic`), in a worker process with a hard limit. It is strict about the value (everything computed,
no contradictory equation, brackets and order as in the gold, no percent for a fraction, no absolute tolerance) and lenient
about notation (units, typography, names on the left).
`judge` turns a completion's text into a verdict. Programs are judged in `tasks.code`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

from distill.reasoning import begins_with
from distill.records import Template, Verdict
from distill.tasks.judge import number_sets, numbers, spelling, structure, units, worker_pool

MAX_ANSWER_CHARS = 1000
MAX_DEPTH = 40
"""The deepest nesting of brackets in an answer."""

Scorer = Callable[[str], Verdict]


def judge(template: Template, completion: str, finished: bool, score: Scorer) -> Verdict:
    """Return a completion's verdict: wrong if it is unfinished or has no answer, otherwise its answer is scored."""
    if not finished:
        return Verdict(False, 0.0, None, "unfinished")
    if template.prefill and not begins_with(completion, template.prefill):
        completion = template.prefill + completion
    answer = template.extract(completion)
    if answer is None:
        return Verdict(False, 0.0, None, "no answer")
    return score(answer)


def math_verdict(answer: str, gold: str) -> Verdict:
    """Return whether an answer equals the gold; None if the comparison did not end in time."""
    if len(answer) > MAX_ANSWER_CHARS:
        return Verdict(False, 0.0, answer, "answer too long")
    if spelling.depth(answer) > MAX_DEPTH:
        return Verdict(False, 0.0, answer, "answer nested too deep")
    try:
        return _verdict(_equal_answers(answer, gold), answer)
    except worker_pool.StuckError as stuck:
        return Verdict(None, None, answer, str(stuck))


def exact_verdict(answer: str, gold: str) -> Verdict:
    """Return whether an answer equals the gold as text, up to runs of whitespace and whitespace at the ends."""
    return _verdict(" ".join(answer.split()) == " ".join(gold.split()), answer)


def why_unreadable(gold: str) -> str | None:
    """Return why a gold answer cannot be compared with anything; None if it can."""
    if len(gold) > MAX_ANSWER_CHARS:
        return "the gold answer is too long"
    if spelling.depth(gold) > MAX_DEPTH:
        return "the gold answer is nested too deep"
    text = spelling.clean(gold)
    if not text:
        return "the gold answer is empty"
    if not spelling.balanced(text) or not spelling.balanced(gold):
        return "the gold answer's braces do not match"
    try:
        return None if _readable(text) else "the gold answer cannot be parsed"
    except worker_pool.StuckError as stuck:
        return f"the gold answer cannot be parsed: {stuck}"


def _readable(text: str) -> bool:
    if numbers.number(text) is not None or structure.words(text) is not None or structure.positional(text):
        return True
    if number_sets.pieces(text) or structure.choice(text):
        return True
    if shape := structure.shape(text):
        return all(item and _readable(item) for item in shape.items)
    name, *values = structure.sides(text)
    if len(values) == 1 and values[0] and structure.is_name(name):
        return _readable(values[0])
    return bool(worker_pool.ask("math", units.split_expression(text)[0]))


def _verdict(correct: bool, answer: str) -> Verdict:
    return Verdict(correct, float(correct), answer, "" if correct else "wrong")


@functools.lru_cache(maxsize=65536)
def _equal_answers(answer: str, gold: str) -> bool:
    return _equal(spelling.clean(answer), spelling.clean(gold))


def _equal(answer: str, gold: str) -> bool:
    """Return whether two cleaned texts are equal, trying certain and cheap comparisons first."""
    if not answer or not gold:
        return False
    if spelling.same_text(answer, gold):
        return True
    if r"\approx" in answer or r"\approx" in gold:
        return _equal_approximately(answer, gold)
    if (gold_time := structure.time_of_day(gold)) and (time := structure.time_of_day(answer)):
        return time[0] == gold_time[0] and (not time[1] or not gold_time[1] or time[1] == gold_time[1])
    gold_number = numbers.number(gold)
    if gold_number is not None:
        answer_number = numbers.number(answer)
        if answer_number is None and gold_number.kind == "decimal":
            answer_number = numbers.number(re.sub(r"(?<=\d),(?=\d+$)", ".", answer, count=1))
        if answer_number is not None:
            return numbers.same_number(answer_number, gold_number)
    elif (gold_choice := structure.choice(gold)) is not None:
        return _equal_choices(answer, gold, gold_choice)
    elif (gold_choices := structure.choices(gold)) is not None and structure.choices(answer) == gold_choices:
        return True
    if number_sets.is_region(answer) or number_sets.is_region(gold):
        return _equal_regions(answer, gold)
    gold_shape = structure.shape(gold)
    if gold_shape is None and (gold_words := structure.words(gold)) is not None:
        *_, last = structure.sides(answer)
        return gold_words in (structure.words(answer), structure.words(last))
    if (answer_shape := structure.shape(answer)) or gold_shape:
        return _equal_shapes(answer, gold, answer_shape, gold_shape)
    return _equal_sides(answer, gold)


def _equal_approximately(answer: str, gold: str) -> bool:
    r"""Whether texts with `\approx` are equal: `\frac13 \approx 0.333` means 1/3, `x \approx 11` means 11."""
    if r"\approx" in gold:
        exact = gold.partition(r"\approx")[0].strip()
        return bool(exact) and not structure.is_name(exact) and _equal(answer, exact)
    exact, _, about = (part.strip() for part in answer.partition(r"\approx"))
    if structure.is_name(exact):
        return _equal(about, gold)
    return numbers.number(about) is not None and _equal(exact, gold)


def _equal_choices(answer: str, gold: str, gold_choice: tuple[str, str]) -> bool:
    """Whether the answer is the letter of the gold choice, or its text; `5 = B` and `x = B` mean the letter B."""
    letter, text = gold_choice
    if (answer_choice := structure.choice(answer)) is not None:
        return answer_choice[0] == letter
    if text and _equal(answer, text):
        return True
    return len(structure.sides(answer)) > 1 and _equal_sides(answer, gold)


# -------------------------------------------------------------------------------------------------- regions


def _equal_regions(answer: str, gold: str) -> bool:
    """Whether inequalities, intervals or unions are equal. `(1, 3)` may be a point, but `1 < x < 3` is not one."""
    about = [number_sets.names(text) for text in (answer, gold) if number_sets.is_relation(text)]
    if len(about) == 2 and all(len(names) == 1 for names in about) and about[0] != about[1]:
        return False
    found, wanted = number_sets.pieces(answer), number_sets.pieces(gold)
    if found is not None and wanted is not None:
        shape = structure.shape(gold)
        is_point = shape is not None and shape.kind == "()" and r"\infty" not in gold
        if is_point and number_sets.is_relation(answer):
            return False
        if len(found) == len(wanted):
            return _match_items(found, wanted)
    for relation, region in ((answer, wanted), (gold, found)):  # |x| < 3
        unread = number_sets.is_relation(relation) and number_sets.pieces(relation) is None
        if unread and region is not None and _in_worker(relation, r" \cup ".join(region)):
            return True
    if number_sets.is_relation(answer) != number_sets.is_relation(gold):
        return False
    return _symbolic(answer, gold)


# -------------------------------------------------------------------------------------------------- collections


def _equal_shapes(
    answer: str, gold: str, answer_shape: structure.Shape | None, gold_shape: structure.Shape | None
) -> bool:
    """Compare collections: brackets and order as in the gold; lists and sets are unordered; a set of one is its element."""
    if answer_shape is None or gold_shape is None:
        shape, other = answer_shape or gold_shape, gold if answer_shape else answer
        assert shape is not None
        if shape.kind == "set" and len(shape.items) == 1 and r"\emptyset" not in shape.items:
            pair = (shape.items[0], gold) if answer_shape else (answer, shape.items[0])
            return _equal(*pair)
        # x = (1, 2), x \in [0, 1]: the collection is the right side, after a name.
        name, *rest = structure.sides(other)
        if len(rest) == 1 and structure.is_name(name):
            return _equal(answer, rest[0]) if answer_shape else _equal(rest[0], gold)
        return False
    if answer_shape.kind == "()" and gold_shape.kind == "set" and len(gold_shape.items) == 1:
        return _equal(answer, gold_shape.items[0])
    if {answer_shape.kind, gold_shape.kind} == {"list", "()"}:
        return _equal_named_tuple(answer_shape, gold_shape)
    if len(answer_shape.items) != len(gold_shape.items):
        return False
    unordered = {"set", "list"}
    if answer_shape.kind in unordered and gold_shape.kind in unordered:
        return _equal_lists(answer_shape, gold_shape)
    return answer_shape.kind == gold_shape.kind and all(map(_equal, answer_shape.items, gold_shape.items))


def _equal_named_tuple(answer: structure.Shape, gold: structure.Shape) -> bool:
    """Whether named values equal a tuple. An answer `y = 12, x = 2` is (2, 12), by alphabet; a gold answer keeps its order."""
    named = structure.named_values(answer if answer.kind == "list" else gold)
    if named is None:
        return False
    if answer.kind == "list":
        values = [value for _, value in sorted(named.items())]
        return len(values) == len(gold.items) and all(map(_equal, values, gold.items))
    return len(named) == len(answer.items) and all(map(_equal, answer.items, named.values()))


def _equal_lists(answer: structure.Shape, gold: structure.Shape) -> bool:
    """Compare lists in any order, unless only one side names its items."""
    answer_names, gold_names = structure.named_values(answer), structure.named_values(gold)
    if answer_names and gold_names:
        return answer_names.keys() == gold_names.keys() and all(
            _equal(answer_names[name], gold_names[name]) for name in gold_names
        )
    if answer_names or gold_names:
        return all(map(_equal, answer.items, gold.items))
    return _match_items(list(answer.items), list(gold.items))


def _match_items(answer: list[str], gold: list[str]) -> bool:
    """Match items one to one; equality is transitive, so the first match of each item will do."""
    answer = list(answer)
    for item in gold:
        found = next((n for n, other in enumerate(answer) if _equal(other, item)), None)
        if found is None:
            return False
        answer.pop(found)
    return True


# ---------------------------------------------------------------------------------------------------- equations


def _equal_sides(answer: str, gold: str) -> bool:
    """Compare single values, with or without equals signs: `x = 5` is 5, `3 + 4 = 7` is 7, `5 = 7` is a contradiction."""
    answer_sides, gold_sides = structure.sides(answer), structure.sides(gold)
    if len(answer_sides) == 2 and structure.is_name(answer_sides[1]):
        answer_sides.sort(key=structure.is_name, reverse=True)  # 5 = x
    if len(gold_sides) > 1 and structure.is_name(gold_sides[0]) and not any(map(structure.is_letter, gold_sides[1:])):
        if len(answer_sides) == 1:
            return _equal(answer, gold_sides[-1])
        if structure.is_name(answer_sides[0]) and structure.same_name(answer_sides[0], gold_sides[0]):
            return _equal_last(answer_sides, gold_sides[-1])
        return _symbolic(answer, gold)
    if len(gold_sides) > 1:
        return len(answer_sides) == len(gold_sides) and _symbolic(answer, gold)
    if len(answer_sides) > 1:
        return _equal_last(answer_sides, gold)
    return _equal_expressions(answer, gold)


def _equal_last(answer_sides: list[str], gold: str) -> bool:
    """Return whether the last side equals the gold and no earlier side claims another number."""
    *claims, last = answer_sides
    claims = [claim for claim in claims if not structure.names_something(claim)]
    return bool(last) and _equal(last, gold) and all(_same_value(claim, last) for claim in claims)


def _same_value(claim: str, last: str) -> bool:
    one, other = numbers.number(claim), numbers.number(last)
    if one is not None and other is not None:
        return one.value == other.value
    return _symbolic(claim, last, strict=False)


_NUMERAL = re.compile(r"(?:[\d\s+\-*/.,(){}|]|\^ ?\{|\\(?:frac|cdot|times|div)(?![a-zA-Z]))+")


_DIGITS = re.compile(r"[\d\s]+")


def _equal_expressions(answer: str, gold: str) -> bool:
    if numbers.number(gold) is not None and not _NUMERAL.fullmatch(answer):
        return r"\pi" in answer and _equal_angles(answer, gold)  # a plain number is written with digits
    if numbers.number(gold) is not None and _DIGITS.fullmatch(answer):
        return False  # `17 000`: digits that are no number have no operator that a parser could find
    if r"\pi" in answer + gold and "degree" in answer + gold:
        return _equal_angles(answer, gold)
    if structure.positional(gold) or structure.positional(answer) or structure.words(answer) is not None:
        return False
    answer, answer_unit = units.split_expression(answer)
    gold, gold_unit = units.split_expression(gold)
    if answer_unit or gold_unit:
        return units.same(answer_unit, gold_unit) and _equal(answer, gold)
    return _symbolic(answer, gold)


def _equal_angles(answer: str, gold: str) -> bool:
    r"""Whether two angles are equal, one in degrees and one with pi: `30^\circ` and `\frac{\pi}{6}`."""
    one, other = numbers.number(answer), numbers.number(gold)
    if one is not None and one.unit == "degree" and r"\pi" in gold:
        return _symbolic(
            rf"\frac{{{one.value.numerator}\pi}}{{{180 * one.value.denominator}}}",
            gold,
            strict=False,
        )
    return other is not None and other.unit == "degree" and r"\pi" in answer and _equal_angles(gold, answer)


def _symbolic(answer: str, gold: str, strict: bool = True) -> bool:
    if strict and not _letters(answer) <= _letters(gold):
        return False  # the strict comparison would find this too, but only after parsing both
    return _in_worker(answer, gold, strict)


def _letters(text: str) -> set[str]:
    """The letters outside commands, without e, i and d, which have a fixed meaning."""
    return set(re.sub(r"\\[A-Za-z]+|[^A-Za-z]", "", text)) - set("eid")


_PROSE = re.compile(r"(?<![A-Za-z\\])(?:or|and|not)(?![A-Za-z])")


def _in_worker(*request: str | bool) -> bool:
    if any(isinstance(text, str) and _PROSE.search(text) for text in request):
        return False  # the parser would read these words as products of letters
    return bool(worker_pool.ask("math", *request))
