"""The one judge of answers: rewards, filters and evaluation all come here.

`math_verdict` compares an answer with a gold answer: as clean text, as plain numbers, as words, as
collections item by item, and only what is left symbolically, in a worker process with a hard limit. It is
stricter than the library below it (nothing unevaluated, no contradictory equation, brackets and order as in
the gold, no percent for a fraction) and more lenient about dress (units, typography, notation).
`judge` takes a completion from its text to a verdict. Left out on purpose: answers that must be run (code).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

from distill.records import Template, Verdict
from distill.tasks import forms, numbers, pool

MAX_ANSWER_CHARS = 1000

Scorer = Callable[[str], Verdict]


def judge(template: Template, completion: str, finished: bool, score: Scorer) -> Verdict:
    """A completion's verdict: cut short or without an answer it is wrong, otherwise its answer is scored."""
    if not finished:
        return Verdict(False, 0.0, None, "unfinished")
    if template.prefill and not completion.startswith(template.prefill):
        completion = template.prefill + completion
    answer = template.extract(completion)
    if answer is None:
        return Verdict(False, 0.0, None, "no answer")
    return score(answer)


def math_verdict(answer: str, gold: str) -> Verdict:
    """Whether an answer equals the gold; None where the comparison did not end in time."""
    if len(answer) > MAX_ANSWER_CHARS:
        return Verdict(False, 0.0, answer, "answer too long")
    try:
        return _verdict(_equal_answers(answer, gold), answer)
    except pool.StuckError as stuck:
        return Verdict(None, None, answer, str(stuck))


def exact_verdict(answer: str, gold: str) -> Verdict:
    """Whether an answer is the gold, whitespace at its ends and runs of it aside."""
    return _verdict(" ".join(answer.split()) == " ".join(gold.split()), answer)


def unreadable(gold: str) -> str | None:
    """Why a gold answer cannot be compared with anything, or None where it can."""
    if len(gold) > MAX_ANSWER_CHARS:
        return "the gold answer is too long"
    text = forms.clean(gold)
    if not text:
        return "the gold answer is empty"
    if not forms.balanced(text):
        return "the gold answer's braces do not match"
    try:
        return None if _readable(text) else "the gold answer cannot be parsed"
    except pool.StuckError as stuck:
        return f"the gold answer cannot be parsed: {stuck}"


def _readable(text: str) -> bool:
    if numbers.number(text) is not None or forms.words(text) is not None or forms.positional(text):
        return True
    if shape := forms.shape(text):
        return all(item and _readable(item) for item in shape.items)
    return bool(pool.ask("math", text))


def _verdict(correct: bool, answer: str) -> Verdict:
    return Verdict(correct, float(correct), answer, "" if correct else "wrong")


@functools.lru_cache(maxsize=65536)
def _equal_answers(answer: str, gold: str) -> bool:
    return _equal(forms.clean(answer), forms.clean(gold))


def _equal(answer: str, gold: str) -> bool:
    """Whether two cleaned texts are equal. The order matters: the certain and cheap readings come first."""
    if not answer or not gold:
        return False
    if forms.same_text(answer, gold):
        return True
    exact, about, _ = answer.partition(r"\approx")
    if about and r"\approx" not in gold:
        return not forms.is_variable(exact.strip()) and _equal(exact.strip(), gold)
    gold_number = numbers.number(gold)
    if gold_number is not None:
        answer_number = numbers.number(answer)
        if answer_number is not None:
            return numbers.same_number(answer_number, gold_number)
    elif (gold_words := forms.words(gold)) is not None:
        return _equal_words(answer, gold_words)
    elif len(_choice(gold)) == 1:
        named = len(forms.sides(answer)) > 1 and _equal_sides(answer, gold)
        return _choice(answer) == _choice(gold) or named
    gold_shape, answer_shape = forms.shape(gold), forms.shape(answer)
    if forms.is_relation(answer) != forms.is_relation(gold):
        return _equal_intervals(answer, gold, gold_shape)
    if gold_shape or answer_shape:
        return _equal_shapes(answer, gold, answer_shape, gold_shape)
    return _equal_sides(answer, gold)


def _equal_words(answer: str, gold_words: str) -> bool:
    *_, last = forms.sides(answer)
    return gold_words in (forms.words(answer), forms.words(last))


def _choice(text: str) -> str:
    """A lettered choice without its brackets and the number that it stands for."""
    if (lettered := re.fullmatch(r"\(?([A-J])\)[.:]? ?(.+)", text)) and numbers.number(lettered[2]):
        return lettered[1]
    return text.strip("()[]. ") if len(text) <= 4 else text


def _equal_intervals(answer: str, gold: str, gold_shape: forms.Shape | None) -> bool:
    """An inequality against an interval. `(1, 3)` may be a point, which `1 < x < 3` is not."""
    if forms.is_relation(gold):
        interval = forms.as_interval(gold)
        return interval is not None and _equal(answer, interval)
    interval = forms.as_interval(answer)
    is_point = gold_shape is None or (gold_shape.kind == "()" and r"\infty" not in gold)
    return interval is not None and not is_point and _equal(interval, gold)


def _equal_shapes(
    answer: str, gold: str, answer_shape: forms.Shape | None, gold_shape: forms.Shape | None
) -> bool:
    """Brackets and order as in the gold; a list and a set are both unordered; a set of one is its element."""
    if answer_shape is None or gold_shape is None:
        shape, other = answer_shape or gold_shape, gold if answer_shape else answer
        assert shape is not None
        if shape.kind == "set" and len(shape.items) == 1:
            pair = (shape.items[0], gold) if answer_shape else (answer, shape.items[0])
            return _equal(*pair)
        # x = (1, 2), x \in [0, 1]: the collection is on the right of a name.
        name, *rest = forms.sides(other)
        if len(rest) == 1 and forms.is_variable(name):
            return _equal(answer, rest[0]) if answer_shape else _equal(rest[0], gold)
        return False
    if len(answer_shape.items) != len(gold_shape.items):
        return False
    if (answer_shape.kind, gold_shape.kind) == ("list", "()"):
        answer_shape = forms.named_values(answer_shape) or answer_shape
    unordered = {"set", "list"}
    if answer_shape.kind in unordered and gold_shape.kind in unordered:
        return _match_items(list(answer_shape.items), list(gold_shape.items))
    return answer_shape.kind == gold_shape.kind and all(
        map(_equal, answer_shape.items, gold_shape.items)
    )


def _match_items(answer: list[str], gold: list[str]) -> bool:
    """Equality is transitive, so the first match of each item is as good as any other."""
    for item in gold:
        found = next((n for n, other in enumerate(answer) if _equal(other, item)), None)
        if found is None:
            return False
        answer.pop(found)
    return True


def _equal_sides(answer: str, gold: str) -> bool:
    """Single things, perhaps with an equals sign: `x = 5` is 5, `3 + 4 = 7` is 7, `5 = 7` is nothing."""
    answer_sides, gold_sides = forms.sides(answer), forms.sides(gold)
    if len(answer_sides) == 2 and forms.is_variable(answer_sides[1]):
        answer_sides.sort(key=forms.is_variable, reverse=True)  # 5 = x
    if len(gold_sides) == 2 and forms.is_variable(gold_sides[0]):
        if len(answer_sides) == 1:
            return _equal(answer, gold_sides[1])
        if len(answer_sides) == 2 and forms.is_variable(answer_sides[0]):
            same_name = answer_sides[0].replace(" ", "") == gold_sides[0].replace(" ", "")
            return same_name and _equal(answer_sides[1], gold_sides[1])
        return _symbolic(answer, gold)
    if len(gold_sides) > 1:
        return len(answer_sides) == len(gold_sides) and _symbolic(answer, gold)
    if len(answer_sides) > 1:
        *claims, last = answer_sides
        if claims and forms.is_variable(claims[0]):
            claims = claims[1:]
        return _equal(last, gold) and all(_same_value(claim, last) for claim in claims)
    return _equal_expressions(answer, gold)


def _same_value(claim: str, last: str) -> bool:
    one, other = numbers.number(claim), numbers.number(last)
    if one is not None and other is not None:
        return one.value == other.value
    return _symbolic(claim, last, strict=False)


def _equal_expressions(answer: str, gold: str) -> bool:
    if numbers.number(gold) is not None or forms.positional(gold) or forms.positional(answer):
        return False  # only another plain number is a number, written out
    if forms.is_relation(answer) != forms.is_relation(gold) or forms.words(answer) is not None:
        return False
    one, other = forms.as_interval(answer), forms.as_interval(gold)
    if one is not None and other is not None:
        letters = [re.findall(r"(?<![\\a-z])[a-z](?![a-z])", text) for text in (answer, gold)]
        return letters[0] == letters[1] and _equal(one, other)
    return _symbolic(answer, gold)


def _symbolic(answer: str, gold: str, strict: bool = True) -> bool:
    return bool(pool.ask("math", answer, gold, strict))
