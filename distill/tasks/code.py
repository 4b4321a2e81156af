"""Judge programs by running them: extract a completion's code and count the problem's tests that it passes.

A problem's payload holds its tests, in one of three forms:

    {"tests": [{"stdin": "3\\n", "stdout": "4\\n"}, ...]}
        The program runs with each input. A test passes if the exit status is 0 and the lines are equal; spaces at the
        ends of lines and empty lines at the end are ignored.
    {"entry_point": "f", "tests": [{"args": [3], "kwargs": {}, "expected": 4}, ...]}
        The function is called (`Solution.f`: on a new instance). A test passes if the results are equal in Python; a
        tuple equals a list, and floats are compared with relative tolerance 1e-9. `kwargs` is optional.
    {"entry_point": "f", "prompt": "def f(x): ...", "check": "def check(candidate): ..."}
        HumanEval's form: tests written as code, which run in a trusted process (`code_checks`).

Expected results stay in this process; the program sees inputs only (`sandbox`). Any fault of the program scores 0; only a
failure of the sandbox itself gives no verdict.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

from distill.records import Verdict, stable_hash
from distill.tasks.judge import worker_pool
from distill.tasks.sandbox import (
    NUM_AT_ONCE,
    FaultError,
    Isolation,
    Limits,
    RaisedError,
    SandboxError,
    Session,
)

Payload = Mapping[str, Any]
Test = Mapping[str, Any]

CHECK_GRACE_S = 20.0
"""Seconds that a problem's trusted process gets beyond the problem's limit, to start and for its own work."""

MAX_PROGRAM_CHARS = 200_000
_MAX_REMEMBERED = 4096
_NEXT_THING = re.compile(r"\n(?:class|def|#|if|print|```)")
_remembered: dict[str, Verdict] = {}


def extract(answer: str) -> str:
    """Return the last fenced block marked as Python, else the last fenced block, else the whole text.

    A fence that is never closed extends to the end.
    """
    blocks: list[tuple[bool, list[str]]] = []
    inside = False
    for line in answer.splitlines(keepends=True):
        mark = line.strip()
        if not inside and mark.startswith("```"):
            language = mark.strip("`").strip().lower()
            blocks.append((language in ("python", "py", "python3"), []))
            inside = True
        elif inside and mark == "```":
            inside = False
        elif inside:
            blocks[-1][1].append(line)
    chosen = [lines for marked, lines in blocks if marked] or [lines for _, lines in blocks]
    return "".join(chosen[-1]) if chosen else answer


def complete(prompt: str, answer: str, entry_point: str) -> str:
    """Build the program from a function's header and docstring (the prompt) and an answer.

    An answer that defines the function is put after the prompt's imports and helpers; any other answer continues the
    prompt, up to the stop sequences of Chen et al. 2021 (arXiv 2107.03374).
    """
    code = extract(answer)
    definition = re.compile(rf"^(?:async\s+)?def\s+{re.escape(entry_point)}\b", re.MULTILINE)
    if definition.search(code):
        start = definition.search(prompt)
        return prompt[: start.start() if start else 0] + "\n" + code
    return prompt + _NEXT_THING.split(code, maxsplit=1)[0] + "\n"


def code_verdicts(answers: Sequence[str], payload: Payload, isolation: Isolation, limits: Limits) -> list[Verdict]:
    """Return the `code_verdict` of each answer, in parallel on all cores."""
    with ThreadPoolExecutor(min(NUM_AT_ONCE, max(1, len(answers)))) as threads:
        return list(threads.map(lambda a: code_verdict(a, payload, isolation, limits), answers))


def code_verdict(answer: str, payload: Payload, isolation: Isolation, limits: Limits | None = None) -> Verdict:
    """Run an answer's program against the payload's tests. The score is the share of tests passed.

    Score and verdict are None if the sandbox failed. Results are cached in the process, so that a reward does not run a
    program again that the task's judge has run.
    """
    limits = limits or Limits()
    if "check" in payload:
        program = complete(payload["prompt"], answer, payload["entry_point"])
    else:
        program = extract(answer)
    if len(program) > MAX_PROGRAM_CHARS:
        return Verdict(False, 0.0, None, "program too long")
    if "\0" in program or any(0xD800 <= ord(char) < 0xE000 for char in program):
        return Verdict(False, 0.0, None, "not text")
    key = stable_hash(program, json.dumps(payload, sort_keys=True), isolation, limits, length=64)
    found = _remembered.get(key)
    if found is None:
        found = _run(program, payload, isolation, limits)
        if found.correct is not None:
            if len(_remembered) >= _MAX_REMEMBERED:
                _remembered.clear()
            _remembered[key] = found
    return found


def _run(program: str, payload: Payload, isolation: Isolation, limits: Limits) -> Verdict:
    for last in (False, True):
        try:
            if "check" in payload:
                return _checked(program, payload, isolation, limits)
            return _tested(program, payload, isolation, limits)
        except (SandboxError, worker_pool.StuckError) as error:
            if last or isinstance(error, worker_pool.StuckError):
                return Verdict(None, None, program, f"not judged: {error}")
    raise AssertionError


def _checked(program: str, payload: Payload, isolation: Isolation, limits: Limits) -> Verdict:
    try:
        reply = worker_pool.ask(
            "check", program, payload["prompt"], payload["check"], payload["entry_point"],
            asdict(isolation), asdict(limits), limit_s=limits.problem_s + CHECK_GRACE_S,
        )  # fmt: skip
    except worker_pool.SlowError as slow:
        # The program's own time is limited within. A worker that computed all the time is at work on what the program returned;
        # one that did not was kept from it by the machine.
        if slow.busy_s < CHECK_GRACE_S / 4:
            raise
        return Verdict(False, 0.0, program, "timeout: the test did not end with what the program returned")
    if isinstance(reply, list):
        raise SandboxError(reply[0])
    return Verdict(reply is None, float(reply is None), program, reply or "")


def _tested(program: str, payload: Payload, isolation: Isolation, limits: Limits) -> Verdict:
    entry_point, tests = payload.get("entry_point"), payload["tests"]
    if not tests:
        return Verdict(None, None, program, "not judged: the problem has no tests")
    judge = _judge_run if entry_point is None else _judge_call
    left_s = limits.problem_s
    reasons: list[str | None] = []
    while len(reasons) < len(tests):
        if left_s <= 0:
            reasons += ["timeout"] * (len(tests) - len(reasons))
            break
        with Session(isolation, program, entry_point=entry_point, limits=limits, budget_s=left_s) as session:
            reasons += _run_tests(session, tests[len(reasons) :], judge)
            left_s = session.left_s
    passed = reasons.count(None)
    failed = [(n, text) for n, text in enumerate(reasons, 1) if text is not None]
    reason = f"test {failed[0][0]} of {len(tests)}: {failed[0][1]}" if failed else ""
    return Verdict(passed == len(tests), passed / len(tests), program, reason)


def _run_tests(
    session: Session, tests: Sequence[Test], judge: Callable[[Session, Test], str | None]
) -> list[str | None]:
    """Return why each test failed (None: passed), up to the test that ended the session.

    A reason may be the program's own message, or empty; it never means that a test passed.
    """
    reasons: list[str | None] = []
    for test in tests:
        try:
            reasons.append(judge(session, test))
        except RaisedError as error:
            if not session.loaded:
                return [str(error)] * len(tests)  # the program does not load, so no test can run
            reasons.append(str(error))
        except FaultError as fault:
            return [*reasons, str(fault)]
    return reasons


def _judge_run(session: Session, test: Test) -> str | None:
    status, stdout = session.run(test["stdin"])
    if status:
        return f"exit status {status}"
    return None if lines(stdout) == lines(test["stdout"]) else "wrong output"


def _judge_call(session: Session, test: Test) -> str | None:
    result = session.call(*test["args"], **test.get("kwargs", {}))
    return None if same_value(result, test["expected"]) else "wrong result"


def lines(text: str) -> list[str]:
    """Return the lines without trailing spaces, and without empty lines at the end."""
    return "\n".join(line.rstrip() for line in text.splitlines()).rstrip().split("\n")


def same_value(result: Any, expected: Any) -> bool:
    """Return whether a function's result equals the result in a test's JSON; both are of built-in types."""
    if isinstance(result, list | tuple) and isinstance(expected, list | tuple):
        return len(result) == len(expected) and all(map(same_value, result, expected))
    if isinstance(result, dict) and isinstance(expected, dict):
        return result.keys() == expected.keys() and all(same_value(result[key], expected[key]) for key in expected)
    if isinstance(result, int | float) and isinstance(expected, float):
        try:
            return math.isclose(result, expected, rel_tol=1e-9, abs_tol=1e-12)
        except OverflowError:
            return False
    return bool(result == expected)
