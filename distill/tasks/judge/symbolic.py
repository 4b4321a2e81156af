r"""Equality of two expressions that a LaTeX parser reads: exact, or equal at many points.

Runs in a worker process (`worker`), which is killed after a time limit. Two constants are equal if they agree to 80
significant digits, or exactly if both are rational: there is no absolute tolerance. Two functions are
equal if they agree to 30 digits at points of all sizes where both are real; equations and inequalities if the
differences of their sides are proportional there. The parser decides what a text means; nothing is simplified.

Strict comparison refuses restatements: an answer may not leave arithmetic between plain numbers undone
(`\sqrt{1+2}`, `2 \cdot 3x`, `x+1-1`) unless the gold does.
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Iterator
from typing import Any

import sympy
from latex2sympy2_extended.latex2sympy2 import (
    ConversionConfig,
    latex2sympy,
)
from sympy import Add, Eq, Float, Integer, MatrixBase, Mul, Ne, Pow, Rational, Symbol
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational

_CONVERSION = ConversionConfig(lowercase_symbols=False)
_CONSTANT_DIGITS, _POINT_DIGITS = 100, 50
_SIZES = [
    "0.31", "1.7", "0.73", "-0.43", "2.9", "-2.3", "5.3", "11.9", "0.17", "-7.1", "29.3", "3.7", "317.3", "-411.7",
]  # fmt: skip
_FAR = ["-2000003.1", "3000017.3", "-50021.9", "70001.7"]
"""Additional points for functions with cases, such as |x - 1000|."""
_CASES = (sympy.Abs, sympy.Max, sympy.Min, sympy.floor, sympy.ceiling, sympy.Mod)
_NUM_WHOLE = 8
_MIN_POINTS = 3


@functools.lru_cache(maxsize=4096)
def parse(text: str) -> Any:
    """Parse the expression in a cleaned text, decimals as fractions; None if it is not an expression."""
    if "..." in text:
        return None
    try:
        expr = latex2sympy(
            text, is_real=True, convert_degrees=False, normalization_config=None, conversion_config=_CONVERSION
        )  # fmt: skip
    except Exception:  # the parser raises exceptions of any kind for texts that it does not understand
        return None
    return _exact(expr)


def _exact(expr: Any) -> Any:
    if isinstance(expr, MatrixBase):
        return expr.applyfunc(_exact)
    if not isinstance(expr, sympy.Basic):
        return None
    return _rebuilt(expr)


def _rebuilt(expr: Any) -> Any:
    """The expression with floats as fractions and the letter i as the imaginary unit, without evaluation."""
    if isinstance(expr, Float):
        return Rational(str(expr))
    if isinstance(expr, Symbol):
        return sympy.I if expr.name == "i" else expr
    if not expr.args or isinstance(expr, sympy.Sum | sympy.Product | sympy.Integral):
        return expr
    args = [_rebuilt(arg) for arg in expr.args]
    if all(new is old for new, old in zip(args, expr.args, strict=True)):
        return expr
    if isinstance(expr, Add | Mul | Pow):
        return expr.func(*args, evaluate=False)
    return expr.func(*args)


def equal(answer: str, gold: str, strict: bool) -> bool:
    """Return whether two cleaned expressions are equal; if strict, the answer must also be fully computed."""
    for mark in (
        "'",
        "^T",
        "^{T}",
        "%",
    ):  # the parser drops the first three and divides by the last
        if answer.count(mark) != gold.count(mark):
            return False
    one, other = parse(answer), parse(gold)
    if one is None or other is None:
        return False
    if strict and (num_unevaluated(one) > num_unevaluated(other) or not _names(one) <= _names(other)):
        return False
    return _same(one, other) or (strict and _rounded(answer, other))


def _rounded(answer: str, gold: Any) -> bool:
    """Whether a decimal with six or more digits is a constant, rounded or truncated."""
    decimal = re.fullmatch(r"-?(\d+)\.(\d{6,})", answer)
    if decimal is None or not isinstance(gold, sympy.Expr) or gold.free_symbols or gold.is_Rational:
        return False
    if len((decimal[1] + decimal[2]).lstrip("0")) < 6 or (value := _value(gold, _POINT_DIGITS)) is None:
        return False
    wanted, unit = Rational(answer), Rational(1, 10 ** len(decimal[2]))
    off = abs(value[0]) - abs(wanted)
    return bool(_is_real(value) and value[0] * wanted > 0 and -unit / 2 <= off < unit)


def _names(expr: Any) -> set[str]:
    return {symbol.name for symbol in expr.free_symbols}


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, MatrixBase) or isinstance(other, MatrixBase):
        both = isinstance(one, MatrixBase) and isinstance(other, MatrixBase)
        return both and one.shape == other.shape and all(map(_same, one.flat(), other.flat()))
    if one == other:
        return not one.has(sympy.nan, sympy.zoo)
    if _is_relation(one) or _is_relation(other):
        return _is_relation(one) and _is_relation(other) and _same_relation(one, other)
    if isinstance(one, sympy.Set) or isinstance(other, sympy.Set):
        both = isinstance(one, sympy.Set) and isinstance(other, sympy.Set)
        return both and bool(one.symmetric_difference(other).is_empty)
    if not (isinstance(one, sympy.Expr) and isinstance(other, sympy.Expr)):
        return False
    if not one.free_symbols and not other.free_symbols and not one.has(AppliedUndef) and not other.has(AppliedUndef):
        return _same_constant(one, other)
    return _same_function(one, other)


# ---------------------------------------------------------------------------------------------------- values


def _same_constant(one: Any, other: Any) -> bool:
    close = _close(_value(one, _CONSTANT_DIGITS), _value(other, _CONSTANT_DIGITS), 80)
    if close is False:
        return False
    exact_one, exact_other = one.doit(), other.doit()
    if exact_one.is_Rational and exact_other.is_Rational:
        return bool(exact_one == exact_other)
    if close is None or (close and exact_one.is_Rational != exact_other.is_Rational):
        return bool(sympy.simplify(exact_one - exact_other) == 0)
    return True


def _value(expr: Any, digits: int) -> Any:
    """The real and imaginary part of a constant; None if it has no finite value."""
    value = expr.evalf(digits)
    if not value.is_number or value.has(sympy.nan, sympy.zoo, sympy.oo, -sympy.oo):
        return None
    real, imaginary = value.as_real_imag()
    return (real, imaginary) if real.is_Float or real.is_Rational else None


def _close(one: Any, other: Any, digits: int) -> bool | None:
    """Whether two values agree to `digits` significant digits; None if one has no value, or both may be zero."""
    if one is None or other is None:
        return None
    size = max(abs(part) for value in (one, other) for part in value)
    if size == 0:
        return True
    off = max(abs(a - b) for a, b in zip(one, other, strict=True))
    if size < Rational(1, 10**digits):  # possibly zero with a numerical error
        return None if off != 0 else True
    return bool(off <= size / 10**digits)


def _points(*exprs: Any) -> Iterator[tuple[Any, ...]]:
    """Yield the expressions with numbers in place of letters, point by point. Bounds of sums need whole numbers."""
    exprs = tuple(_applied_as_letters(expr) for expr in exprs)
    names = sorted({symbol.name for expr in exprs for symbol in expr.free_symbols})
    sums = any(expr.has(sympy.Sum, sympy.Product) for expr in exprs)
    sizes = _SIZES + (_FAR if any(expr.has(*_CASES) for expr in exprs) else [])
    draws = {name: random.Random(name).sample(sizes, len(sizes)) for name in names}
    if len(names) == 1:
        draws[names[0]] = sizes
    for turn in range(len(sizes) + _NUM_WHOLE):
        values = {}
        for number, name in enumerate(names):
            if sums or turn >= len(sizes):  # whole numbers too, for expressions like (-1)^n
                values[name] = Integer(2 + (turn + 3 * number) % 9)
            else:
                values[name] = Rational(draws[name][turn])
        yield tuple(
            expr.xreplace({symbol: values[symbol.name] for symbol in expr.free_symbols}) for expr in exprs
        )  # fmt: skip


def _applied_as_letters(expr: Any) -> Any:
    return expr.xreplace({term: Symbol(str(term)) for term in expr.atoms(AppliedUndef)})


def _same_function(one: Any, other: Any) -> bool:
    if one.has(sympy.Derivative, sympy.Integral) or other.has(sympy.Derivative, sympy.Integral):
        return bool(sympy.simplify(one - other) == 0)
    is_complex = one.has(sympy.I) or other.has(sympy.I)
    agreed = 0
    for pair in _points(one, other):
        a, b = (_value(expr, _POINT_DIGITS) for expr in pair)
        if a is None or b is None or not (is_complex or (_is_real(a) and _is_real(b))):
            continue
        close = _close(a, b, 30)
        if close is False:
            if not is_complex and any(map(_has_complex_part, pair)):
                continue
            return False
        agreed += close is True
    return agreed >= _MIN_POINTS or bool(sympy.simplify(one - other) == 0)


def _has_complex_part(expr: Any) -> bool:
    r"""Return whether a real value has complex intermediate values, as `\sqrt{a}\sqrt{b}` of two negative numbers."""
    roots = [term.base for term in expr.atoms(Pow) if not term.exp.is_integer]
    logs = [term.args[0] for term in expr.atoms(sympy.log)]
    return expr.has(sympy.I) or any(bool(part.evalf(15).is_negative) for part in roots + logs)


def _is_real(value: Any) -> bool:
    real, imaginary = value
    return bool(abs(imaginary) <= abs(real) / 10**40)


# ------------------------------------------------------------------------------------------------- relations


def _is_relation(expr: Any) -> bool:
    if isinstance(expr, Relational):
        return True
    return bool(expr.is_Boolean and expr.args) and all(map(_is_relation, expr.args))


def _single_relations(expr: Any) -> list[Any]:
    return [expr] if isinstance(expr, Relational) else list(getattr(expr, "_unsorted_args", expr.args))


def _same_relation(one: Any, other: Any) -> bool:
    parts = [_single_relations(expr) for expr in (one, other)]
    if len(parts[0]) != len(parts[1]) or not all(isinstance(p, Relational) for side in parts for p in side):
        return False
    if len(parts[0]) > 1:  # any order
        return type(one) is type(other) and all(
            any(_same_relation(a, b) for b in those) for these, those in (parts, parts[::-1]) for a in these
        )
    return _proportional(one, other) or _same_solutions(one, other)


def _sense(relation: Any) -> tuple[str, Any]:
    """Return a relation's sign and the difference of its sides, turned so that the sign is "less"."""
    if isinstance(relation, Eq | Ne):
        return ("=" if isinstance(relation, Eq) else "!="), relation.lhs - relation.rhs
    sign = "<=" if isinstance(relation, sympy.Le | sympy.Ge) else "<"
    less = isinstance(relation, sympy.Le | sympy.Lt)
    return sign, relation.lhs - relation.rhs if less else relation.rhs - relation.lhs


def _proportional(one: Any, other: Any) -> bool:
    if any(isinstance(side, sympy.Set | MatrixBase) for r in (one, other) for side in r.args):
        return one.lhs == other.lhs and _same(one.rhs, other.rhs)
    (sign, first), (other_sign, second) = _sense(one), _sense(other)
    if sign != other_sign:
        return False
    ratios = []
    for a, b in _points(first, second):
        left, right = _value(a, _POINT_DIGITS), _value(b, _POINT_DIGITS)
        if left is None or right is None or not (_is_real(left) and _is_real(right)) or not left[0] or not right[0]:
            continue
        ratios.append(left[0] / right[0])
    return (
        len(ratios) >= _MIN_POINTS
        and all(_close((ratio, Integer(0)), (ratios[0], Integer(0)), 30) for ratio in ratios)
        and (sign in ("=", "!=") or bool(ratios[0] > 0))
    )


def _same_solutions(one: Any, other: Any) -> bool:
    """Whether two equations have the same solutions for a letter, or two inequalities of one letter the same solutions."""
    if one.free_symbols != other.free_symbols or not one.free_symbols:
        return False
    if isinstance(one, Eq) != isinstance(other, Eq):
        return False
    if isinstance(one, Eq):
        letter = min(one.free_symbols, key=str)
        found, wanted = sympy.solve(one, letter), sympy.solve(other, letter)
        return len(found) == len(wanted) > 0 and all(any(_same(f, w) for f in found) for w in wanted)
    return len(one.free_symbols) == 1 and bool(one.as_set() == other.as_set())


def same_region(relation: str, region: str) -> bool:
    r"""Whether an inequality of one letter, such as `|x| < 3`, describes the given set of numbers."""
    found, wanted = parse(relation), parse(region)
    if found is None or not _is_relation(found) or not isinstance(wanted, sympy.Set) or len(found.free_symbols) != 1:
        return False
    return bool(found.as_set().symmetric_difference(wanted).is_empty)


# ------------------------------------------------------------------------------------------------ restatement


def num_unevaluated(expr: Any) -> int:
    """Count operations between plain numbers that are not computed; fractions, signs and powers of ten do not count."""
    if isinstance(expr, MatrixBase):
        return sum(num_unevaluated(item) for item in expr.flat())
    if not getattr(expr, "args", ()) or _is_power_of_ten(expr):
        return 0
    if isinstance(expr, Mul):
        return _num_unevaluated_factors(expr)
    inner = sum(num_unevaluated(arg) for arg in expr.args)
    if isinstance(expr, Add):
        numbers = [arg for arg in expr.args if arg.is_number and _is_rational(arg)]
        return inner + (len(numbers) > 1 or Integer(0) in numbers)
    if (
        isinstance(expr, Pow)
        and expr.args[1] == -1
        and (isinstance(expr.args[0], Rational) or _is_power_of_ten(expr.args[0]))
    ):
        return inner
    return inner + (inner == 0 and expr.is_number is True and _is_rational(expr))


def _num_unevaluated_factors(expr: Any) -> int:
    """Count, in a product, numbers beyond the first above or below the line, and divisions without remainder."""
    factors = list(_factors(expr))
    inner = sum(num_unevaluated(factor) for factor in factors)
    numbers = [factor for factor in factors if factor.is_number and _is_rational(factor)]
    below = [factor for factor in numbers if isinstance(factor, Pow) and not _is_power_of_ten(factor)]
    above = [factor for factor in numbers if not isinstance(factor, Pow) and factor != -1]
    leaves_none = len(below) == len(above) == 1 and (above[0] * below[0]).doit().is_Integer
    return inner + (len(below) > 1 or len(above) > 1 or leaves_none)


def _factors(expr: Any) -> Iterator[Any]:
    for arg in expr.args:
        if isinstance(arg, Mul):
            yield from _factors(arg)
        else:
            yield arg


def _is_power_of_ten(expr: Any) -> bool:
    return isinstance(expr, Pow) and expr.args[0] == 10 and isinstance(expr.args[1], Integer)


def _is_rational(expr: Any) -> bool:
    if isinstance(expr, Rational | Float):
        return True
    return expr.args != () and isinstance(expr.doit(), Rational | Float)
