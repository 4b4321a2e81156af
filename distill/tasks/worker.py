r"""Symbolic comparison of two expressions with math-verify, in a process of its own.

`python -m distill.tasks.worker math LIMIT` answers JSON lines: `[answer, gold, strict]` -> are they equal,
`[gold]` -> can it be parsed. With `score` for `math` it runs generators and their scorers (see
`generated`), with `check` tests that are written as code (see `checking`).

The process is there to be killed (`pool`): towers and deep parentheses keep sympy busy for ever, and
math-verify's own limit, a SIGALRM, works in a main thread only. It ends itself if its parent does, or if the
parent has not killed it soon after the limit.

Strict comparison refuses restatements: an answer may leave no arithmetic between plain numbers undone
(`\sqrt{1+2}`, `2 \cdot 3x`, `x+1-1`) unless the gold does.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

MEMORY_BYTES = 4 * 2**30


def parse(text: str) -> Any:
    """The expression in a cleaned answer, or None."""
    import math_verify

    # Bare 2\sqrt{3} would be read as 2: only what is in a box is read whole.
    found = math_verify.parse(
        "\\boxed{%s}" % text,  # noqa: UP031
        extraction_config=[math_verify.LatexExtractionConfig(boxed_match_priority=0)],
        fallback_mode="no_fallback",
        parsing_timeout=None,
    )
    return found[0] if found else None


def equal(answer: str, gold: str, strict: bool) -> bool:
    """Whether two cleaned expressions are equal; strictly, whether the answer is also written out."""
    import math_verify
    from sympy import Basic, MatrixBase  # type: ignore[import-untyped]

    answer_expr, gold_expr = parse(answer), parse(gold)
    if answer_expr is None or gold_expr is None:
        return False
    if isinstance(answer_expr, MatrixBase) != isinstance(gold_expr, MatrixBase):
        return False
    if isinstance(answer_expr, MatrixBase) and answer_expr.shape != gold_expr.shape:
        return False
    if (
        strict
        and isinstance(answer_expr, Basic | MatrixBase)
        and num_undone(answer_expr) > num_undone(gold_expr)
    ):
        return False
    return bool(math_verify.verify(gold_expr, answer_expr, timeout_seconds=None))


def num_undone(expr: Any) -> int:
    """Operations between plain numbers that were left to the reader; fractions and signs are not any."""
    from sympy import Add, MatrixBase, Mul, Pow, Rational

    if isinstance(expr, MatrixBase):
        return sum(num_undone(item) for item in expr.flat())
    if not getattr(expr, "args", ()):
        return 0
    inner = sum(num_undone(arg) for arg in expr.args)
    numbers = [arg for arg in expr.args if arg.is_number and _is_rational(arg)]
    if isinstance(expr, Add):
        return inner + (len(numbers) > 1)
    if isinstance(expr, Mul):
        below = [arg for arg in numbers if isinstance(arg, Pow)]
        above = [arg for arg in numbers if not isinstance(arg, Pow) and arg != -1]
        return inner + (len(below) > 1 or len(above) > 1)
    if isinstance(expr, Pow) and expr.args[1] == -1 and isinstance(expr.args[0], Rational):
        return inner
    return inner + (inner == 0 and expr.is_number is True and _is_rational(expr))


def _is_rational(expr: Any) -> bool:
    from sympy import Float, Rational

    if isinstance(expr, Rational | Float):
        return True
    return expr.args != () and isinstance(expr.doit(), Rational | Float)


def reply_math(request: list[Any]) -> bool:
    """`[gold]`: can it be parsed? `[answer, gold, strict]`: are they equal?"""
    try:
        return parse(request[0]) is not None if len(request) == 1 else equal(*request)
    except Exception:
        # Whatever sympy trips over is no expression that could be equal to the gold.
        return False


def reply_score(request: list[Any]) -> Any:
    """`[dataset, options, seed, index]`: question and answer of a generator's item; with an answer behind
    these: its score. A text says why there is none.
    """
    from distill.tasks import generated

    try:
        if len(request) == 4:
            entry = generated.item(*request)[1]
            return [entry["question"], entry["answer"]]
        *reference, answer = request
        return generated.score(*reference, answer=answer)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _replier(job: str) -> Callable[[list[Any]], Any]:
    """The function that answers a job's requests, its heavy imports done."""
    if job == "math":
        parse("1")
        return reply_math
    if job == "check":
        from distill.tasks import checking

        return checking.reply
    from distill.tasks import generated

    generated.library()
    return reply_score


def main() -> None:
    job, limit_s = sys.argv[1], float(sys.argv[2])
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    logging.disable(logging.CRITICAL)
    reply = _replier(job)
    replies.write("ready\n")
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_REAL, 2 * limit_s + 1)
        request = json.loads(line)
        answer = reply(request)
        signal.setitimer(signal.ITIMER_REAL, 0)
        replies.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
