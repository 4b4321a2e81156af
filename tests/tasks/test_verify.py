"""The verifier against a labelled table, and against what would hang, crash or confuse it."""

import functools
import os
import subprocess
import sys
import threading
import time

import pytest
from answer_table import RIGHT, RIGHT_COMPLETIONS, WRONG, WRONG_COMPLETIONS
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.tasks import pool, templates
from distill.tasks.numbers import number
from distill.tasks.verify import exact_verdict, judge, math_verdict, unreadable

TOWER = "9^{9^{9^{9^{9}}}}"


def precision_and_recall(label, accepted_right, accepted_wrong, num_right, num_wrong, capsys):
    precision = len(accepted_right) / (len(accepted_right) + len(accepted_wrong))
    recall = len(accepted_right) / num_right
    with capsys.disabled():
        print(
            f"\n{label}, {num_right} right and {num_wrong} wrong: precision {precision:.3f}, recall {recall:.3f}"
        )
    return precision, recall


def test_precision_and_recall_on_the_labelled_table(capsys):
    accepted_right = [pair for pair in RIGHT if math_verdict(pair[1], pair[0]).correct]
    accepted_wrong = [pair for pair in WRONG if math_verdict(pair[1], pair[0]).correct is not False]
    assert len(RIGHT) + len(WRONG) >= 600
    precision, recall = precision_and_recall(
        "verifier", accepted_right, accepted_wrong, len(RIGHT), len(WRONG), capsys
    )
    assert precision >= 0.99, accepted_wrong
    assert recall >= 0.95, [pair for pair in RIGHT if pair not in accepted_right]


def test_precision_and_recall_on_whole_completions(capsys):
    def accepted(rows):
        return [
            row
            for row in rows
            if judge(
                templates.find(row[0]),
                row[2],
                True,
                functools.partial(math_verdict, gold=row[1]),
            ).correct
            is not False
        ]

    right, wrong = accepted(RIGHT_COMPLETIONS), accepted(WRONG_COMPLETIONS)
    precision, recall = precision_and_recall(
        "completions", right, wrong, len(RIGHT_COMPLETIONS), len(WRONG_COMPLETIONS), capsys
    )
    assert precision == 1.0, wrong
    assert recall == 1.0, [row for row in RIGHT_COMPLETIONS if row not in right]
    for template, gold, text in RIGHT_COMPLETIONS:
        cut = judge(
            templates.find(template), text, False, functools.partial(math_verdict, gold=gold)
        )
        assert cut.correct is False


def test_the_table_is_one_table():
    assert not set(RIGHT) & set(WRONG)
    assert len(set(RIGHT)) == len(RIGHT)
    assert len(set(WRONG)) == len(WRONG)


def test_every_gold_of_the_table_can_be_read():
    assert [gold for gold, _ in RIGHT + WRONG if unreadable(gold)] == []


@pytest.mark.parametrize(
    "gold", ["", "  ", r"\boxed{}", r"\frac{1}{", "3x-", "\\sqrt{", "x" * 1001, "???"]
)
def test_golds_that_cannot_be_read(gold):
    assert unreadable(gold)


def test_plain_answers_need_no_worker(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("asked a worker")

    monkeypatch.setattr(pool, "ask", refuse)
    start = time.process_time()
    for n in range(5000):
        assert math_verdict(f"{n}.0", str(n)).correct is True
        assert math_verdict(str(n + 1), str(n)).correct is False
    assert math_verdict("x^2", "x^2").correct is True
    assert math_verdict("Tuesday", "Monday").correct is False
    assert time.process_time() - start < 5


def test_a_tower_is_cut_off_and_the_next_answer_judged(monkeypatch):
    assert math_verdict("x+1", "1+x").correct is True
    with monkeypatch.context() as hurry:
        hurry.setitem(pool.LIMIT_S, "math", 1.0)
        start = time.perf_counter()
        verdict = math_verdict(TOWER, "2x")
        assert (verdict.correct, verdict.score) == (None, None)
        assert verdict.answer == TOWER
        assert time.perf_counter() - start < 30
    assert math_verdict("x+2", "2+x").correct is True


def test_long_and_deep_answers_are_wrong_not_slow():
    start = time.perf_counter()
    assert math_verdict("1+" * 600 + "1", "x").reason == "answer too long"
    assert math_verdict("(" * 400 + "1" + ")" * 400, "2x").correct is not True
    assert time.perf_counter() - start < 15


def test_judging_works_from_any_thread():
    verdicts = []

    def run(n):
        verdicts.append(math_verdict(f"x+{n}", f"{n}+x").correct)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(10, 18)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == [True] * 8


def test_a_killed_worker_is_replaced():
    assert pool.ask("math", "y+x", "x+y", True) is True
    for worker in list(pool._pools["math"]._started):
        os.kill(worker.process.pid, 9)
        worker.process.wait()
    for _ in range(pool.NUM_WORKERS):
        with pytest.raises(pool.StuckError, match="ended"):
            pool.ask("math", "y+x", "x+y", True)
    assert pool.ask("math", "y+x", "x+y", True) is True


def test_an_unguarded_script_may_judge_and_leaves_no_process_behind(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from distill.tasks import pool\nfrom distill.tasks.verify import math_verdict\n"
        "print(math_verdict('x+1', '1+x').correct)\n"
        "print(*[w.process.pid for w in pool._pools['math']._started])\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    correct, pid = done.stdout.split()
    assert correct == "True"
    assert not os.path.exists(f"/proc/{pid}")


def test_importing_the_room_loads_nothing_heavy():
    code = (
        "import sys, distill.tasks\n"
        "print([m for m in ('torch', 'datasets', 'reasoning_gym', 'math_verify', 'sympy', 'transformers')"
        " if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_exact_is_exact():
    assert exact_verdict(" a  b ", "a b").correct is True
    assert exact_verdict("1.0", "1").correct is False


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=30))
def test_any_text_gets_a_verdict(text):
    assert math_verdict(text, "7").correct in (True, False)


@given(st.integers(-(10**9), 10**9))
def test_every_integer_is_itself_in_any_dress(n):
    for dress in (str(n), f"${n}$", f"{n}.00", f"\\boxed{{{n}}}", f"x = {n}", f"{n} apples"):
        assert math_verdict(dress, str(n)).correct is True
    assert math_verdict(str(n + 1), str(n)).correct is False


@given(st.fractions(max_denominator=1000))
def test_every_fraction_is_read_exactly(value):
    found = number(f"{value.numerator}/{value.denominator}")
    assert found is not None
    assert found.value == value
