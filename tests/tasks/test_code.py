"""Programs judged by tests: the code that is extracted, what counts as passed, and the reason of each failure."""

import math

import pytest

from distill.errors import UserError
from distill.records import Group, Problem, Verdict
from distill.tasks import code, rewards, sandbox, templates
from distill.tasks.code import code_verdict, code_verdicts, complete, extract, lines, same_value
from distill.tasks.judge import worker_pool
from distill.tasks.sandbox import Isolation, Limits

BROKEN = Isolation(2, ("/bin/false",), False, "broken")


@pytest.fixture(scope="module")
def held():
    return sandbox.choose(unsafe=True)


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("print(1)", "print(1)"),
        ("```python\nprint(1)\n```", "print(1)\n"),
        ("So:\n```py\na\n```\nand better:\n```Python\nb\n```\nIt prints\n```\n1\n```\n", "b\n"),
        ("```\na\n```\n```\nb\n```", "b\n"),
        ("```python\na\n  b\n", "a\n  b\n"),
        ("```python\n```", ""),
        ("  ```python\n  x = '```'\n  ```", "  x = '```'\n"),
        ("````python\na\n````", "a\n````"),
        ("", ""),
    ],
)
def test_the_last_python_block_is_the_program(answer, code):
    assert extract(answer) == code


PROMPT = 'import math\n\ndef helper(x):\n    return x\n\ndef area(r):\n    """Of a circle."""\n'


def test_an_answer_that_defines_the_function_keeps_the_prompts_imports_and_helpers():
    program = complete(PROMPT, "```python\ndef area(r):\n    return math.pi * helper(r) ** 2\n```", "area")
    namespace = {}
    exec(program, namespace)
    assert namespace["area"](1) == math.pi
    assert program.count("def area") == 1


@pytest.mark.parametrize(
    "answer",
    [
        "    return helper(r)\n\ndef area_of_two(r):\n    raise\n",
        "    return helper(r)\n\nprint(area(1))\n1 / 0",
        "    return helper(r)\n# Test\n)",
        "```python\n    return helper(r)\n```",
        "    return helper(r)",
    ],
)
def test_a_continuation_ends_where_something_else_begins(answer):
    namespace = {}
    exec(complete(PROMPT, answer, "area"), namespace)
    assert namespace["area"](7) == 7


@pytest.mark.parametrize(
    ("result", "expected", "same"),
    [
        (1, 1, True), (1, 2, False), (True, 1, True), (1.0, 1, True), ("1", 1, False), (None, None, True),
        (0.1 + 0.2, 0.3, True), (0.3001, 0.3, False), (math.nan, 0.3, False), (math.inf, 1e308, False),
        (10**400, 1.5, False), (1, 1.0, True), ((1, 2), [1, 2], True), ([1, (2, 3)], [1, [2, 3]], True),
        ([1], [1, 2], False), ([1, 2], [1], False), ([], [1], False), ({1, 2}, [1, 2], False),
        ({"a": (1.0,)}, {"a": [1.0]}, True), ({"a": 1}, {"a": 1, "b": 2}, False), ({1: 1}, {"1": 1}, False),
        ("ab", ["a", "b"], False), (b"a", "a", False), ([math.nan], [math.nan], False),
    ],
)  # fmt: skip
def test_results_are_equal_as_python_has_it_but_for_what_json_cannot_say(result, expected, same):
    assert same_value(result, expected) is same


def test_output_is_compared_line_by_line_and_to_the_end():
    assert lines("1 \n2\n\n") == lines("1\r\n2") == ["1", "2"]
    assert lines("1\n2") != lines("1\n2\n3")
    assert lines("\n1") != lines("1")
    assert lines(" 1") != lines("1")
    assert lines("") == lines("\n \n") == [""]


def judged(answer, payload, held, **limits):
    return code_verdict(answer, payload, held, Limits(**{"test_s": 30, "problem_s": 60, **limits}))


STDIN = {"tests": [{"stdin": f"{n}\n", "stdout": f"{n + 1}\n"} for n in range(4)]}
CALLS = {
    "entry_point": "inc",
    "tests": [{"args": [n], "kwargs": {"by": 2}, "expected": n + 2} for n in range(4)],
}


@pytest.mark.parametrize(
    ("program", "score", "reason"),
    [
        ("print(int(input()) + 1)", 1.0, ""),
        ("n = int(input())\nprint(n + 1 if n else 0)", 0.75, "test 1 of 4: wrong output"),
        ("print(1)", 0.25, "test 2 of 4: wrong output"),
        ("print(int(input()) + 1)\nraise SystemExit(2)", 0.0, "test 1 of 4: exit status 2"),
        ("print(int(input()) + 1)\n1 / 0", 0.0, "test 1 of 4: exit status 1"),
        (
            "import os\nn = int(input())\nprint(n + 1, flush=True)\nif n == 2: os.abort()",
            0.75,
            None,
        ),
        ("print(int(input()) + 1", 0.0, "test 1 of 4: exit status 1"),
        ("while True: print(2**64)", 0.0, None),
        ("", 0.0, "test 1 of 4: wrong output"),
    ],
)
def test_the_score_of_a_program_is_its_share_of_tests_passed(program, score, reason, held):
    verdict = judged(program, STDIN, held)
    assert (verdict.correct, verdict.score, verdict.answer) == (score == 1.0, score, program)
    assert reason is None or verdict.reason == reason


@pytest.mark.parametrize(
    ("program", "score", "reason"),
    [
        ("def inc(n, by): return n + by", 1.0, ""),
        ("def inc(n, *, by=0): return n + by * (n != 3)", 0.75, "test 4 of 4: wrong result"),
        ("def inc(n, by): return [2, 3, 4, 5][n:][0] if n % 2 else 1 / 0", 0.5, "test 1 of 4: ZeroDivisionError: division by zero"),
        ("import os\ndef inc(n, by): return n + by if n != 1 else os._exit(0)", 0.75, "test 2 of 4: ended early"),
        ("def inc(n, by): return object() if n == 0 else n + by", 0.75, "test 1 of 4: a object is not of a built-in type"),
        ("def dec(n): return n", 0.0, "test 1 of 4: AttributeError: module 'program' has no attribute 'inc'"),
        ("def inc(n): return n", 0.0, None),
        ("def inc(n, by: return n", 0.0, None),
    ],
)  # fmt: skip
def test_the_score_of_a_function_is_its_share_of_tests_passed(program, score, reason, held):
    verdict = judged(program, CALLS, held)
    assert (verdict.correct, verdict.score) == (score == 1.0, score)
    assert reason is None or verdict.reason == reason
    assert (verdict.reason == "") == verdict.correct


def test_a_method_is_called_on_a_fresh_instance(held):
    program = "class Solution:\n    def two(self, xs):\n        self.n = getattr(self, 'n', 0) + 1\n        return [self.n, *xs]"
    payload = {"entry_point": "Solution.two", "tests": [{"args": [[5]], "expected": [1, 5]}]}
    assert judged(program, payload, held).correct


def test_what_cannot_be_run_is_wrong_and_what_cannot_be_judged_is_nothing(held):
    assert judged("x = '\ud800'", STDIN, held).score == 0.0
    assert judged("x = '\0'", STDIN, held).score == 0.0
    assert judged("#" * 300_000, STDIN, held).score == 0.0
    assert judged("pass", {"tests": []}, held).correct is None
    assert judged("print(1)", STDIN, BROKEN).correct is None


ALL_OF_MANY = {
    "prompt": "def f(x):\n    ...\n",
    "entry_point": "f",
    "check": "def check(candidate):\n    for got, x in zip(map(candidate, range(5)), range(5)):\n        assert got == x + 1\n"
    "    for _ in range(candidate(4) - 5): pass\n",
}  # fmt: skip


@pytest.mark.parametrize(
    "raised",
    ["StopIteration", "StopAsyncIteration", "GeneratorExit", "SystemExit", "KeyboardInterrupt", "type('StopIteration', (Exception,), {})"],
)  # fmt: skip
def test_what_a_program_raises_does_not_end_a_check_early(raised, held):
    assert judged("def f(x):\n    return x + 1", ALL_OF_MANY, held).correct
    verdict = judged(f"def f(x):\n    raise {raised}", ALL_OF_MANY, held)
    assert (verdict.correct, verdict.score) == (False, 0.0)


def test_a_check_that_never_ends_with_what_the_program_returned_is_wrong(monkeypatch, held):
    """The trusted process computes on and on with a huge number: that is the program's fault, not the judge's."""
    assert judged("def f(x):\n    return x + 1", ALL_OF_MANY, held).correct  # a worker has started
    monkeypatch.setattr(code, "CHECK_GRACE_S", 6.0)
    source = "def f(x):\n    global n\n    n += 1\n    return x + 1 if n < 6 else 1 << 70\nn = 0"
    verdict = code_verdict(source, ALL_OF_MANY, held, Limits(30, 2))
    assert (verdict.correct, verdict.score) == (False, 0.0)
    assert "the test did not end" in verdict.reason
    assert judged("def f(x):\n    return x + 1\n# again", ALL_OF_MANY, held).correct


def test_a_check_that_the_machine_kept_waiting_is_not_judged(monkeypatch, held):
    def slow(*_args, **_kwargs):
        raise worker_pool.SlowError(0.1)

    monkeypatch.setattr(worker_pool, "ask", slow)
    verdict = judged("def f(x):\n    return x + 1\n# waits", ALL_OF_MANY, held)
    assert (verdict.correct, verdict.score, verdict.reason) == (None, None, "not judged: timeout")


def test_a_program_is_run_once_for_the_judge_and_the_rewards_but_again_after_a_failure(tmp_path, held):
    program = "import time\nprint(int(input()) + 1, file=None)\n# counted"
    count = tmp_path / "count"
    counting = tmp_path / "counting"
    counting.write_text(f'#!/bin/sh\necho run >> {count}\nexec /usr/bin/env "$@"\n')
    counting.chmod(0o755)
    counted = Isolation(held.level, (str(counting), *held.argv), held.own_uid, "counted")
    if held.level == 2:
        counted = Isolation(3, (str(counting), *sandbox.isolation.limits_only().argv), False, "counted")
    for _ in range(3):
        assert judged(program, STDIN, counted).correct
    assert count.read_text().count("run") == 1
    assert not judged(program, CALLS, counted).correct
    assert count.read_text().count("run") == 2
    counting.write_text(f"#!/bin/sh\necho run >> {count}\n")
    for _ in range(2):
        assert judged("print(2)", STDIN, counted).correct is None
    assert count.read_text().count("run") == 2 + 4


def test_answers_are_judged_in_order(held):
    answers = [f"print(int(input()) + {n})" for n in (0, 1, 2, 1)]
    verdicts = code_verdicts(answers, STDIN, held, Limits(30, 60))
    assert [verdict.correct for verdict in verdicts] == [False, True, False, True]


# ------------------------------------------------------------------------------------------- the reward


def group(payload, texts, finished=None):
    problem = Problem("p1", "codes", "q", ({"role": "user", "content": "q"},), payload=payload)
    num = len(texts)
    unjudged = Verdict(None, None, None)
    return Group(
        problem, templates.code, tuple(texts), (9,) * num, tuple(finished or (True,) * num), (unjudged,) * num, 100
    )  # fmt: skip


def test_the_reward_is_the_share_of_tests_passed():
    texts = [
        "<think>```python\nno\n```</think>\n```python\nprint(int(input()) + 1)\n```",
        "print(1)",
        "",
        "<think>print(int(input()) + 1)",
        "print(int(input()) + 1)",
    ]
    scores = rewards.code(group(STDIN, texts, (True,) * 4 + (False,)), unsafe=True, test_timeout_s=30, timeout_s=60)
    assert scores == [1.0, 0.25, 0.0, 0.0, 0.0]


def test_the_reward_is_nothing_where_the_sandbox_fails():
    scores = rewards.code(group(STDIN, ["print(2)", ""]), sandbox_command="false")
    assert scores == [None, 0.0]


def test_the_reward_wants_problems_with_tests():
    with pytest.raises(UserError, match=r"'codes' has problems without tests"):
        rewards.code(group({}, ["print(1)"]), unsafe=True)
