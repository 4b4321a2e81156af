"""The judge against a table of labelled answers, and against inputs that could hang, crash or confuse it."""

import functools
import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
from answer_table import KINDS, RIGHT_COMPLETIONS, ROWS, WRONG_COMPLETIONS
from hypothesis import given, settings
from hypothesis import strategies as st
from needs import slowness

from distill.tasks import templates
from distill.tasks.judge import worker_pool
from distill.tasks.judge.numbers import number
from distill.tasks.judge.verdict import exact_verdict, judge, math_verdict, why_unreadable

TOWER = "9^{9^{9^{9^{9}}}}"


def precision_and_recall(label, accepted_right, accepted_wrong, num_right, num_wrong, capsys):
    num_accepted = len(accepted_right) + len(accepted_wrong)
    precision = len(accepted_right) / num_accepted if num_accepted else 1.0
    recall = len(accepted_right) / num_right if num_right else 1.0
    with capsys.disabled():
        print(f"\n{label}, {num_right} right and {num_wrong} wrong: precision {precision:.3f}, recall {recall:.3f}")
    return precision, recall


@pytest.mark.parametrize("kind", KINDS)
def test_precision_and_recall_on_the_labelled_table(kind, capsys):
    right, wrong = KINDS[kind]
    found = [pair for pair in right if math_verdict(pair[1], pair[0]).correct]
    accepted = [pair for pair in wrong if math_verdict(pair[1], pair[0]).correct is not False]
    _, recall = precision_and_recall(kind, found, accepted, len(right), len(wrong), capsys)
    assert accepted == []
    assert recall >= 0.95, [pair for pair in right if pair not in found]


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
        cut = judge(templates.find(template), text, False, functools.partial(math_verdict, gold=gold))
        assert cut.correct is False


def test_the_table_is_one_table():
    pairs = [(row["gold"], row["answer"]) for row in ROWS]
    assert len(pairs) >= 2000
    assert len(set(pairs)) == len(pairs)
    assert sum(not row["right"] for row in ROWS) >= 800


def test_a_right_answer_has_a_gold_that_can_be_read():
    assert [row["gold"] for row in ROWS if row["right"] and why_unreadable(row["gold"])] == []


@pytest.mark.parametrize(
    "gold",
    ["", "  ", r"\boxed{}", r"\frac{1}{", "3x-", "\\sqrt{", "x" * 1001, "???", "(" * 60 + ")" * 60],
)
@pytest.mark.fault(26)
def test_golds_that_cannot_be_read(gold):
    assert why_unreadable(gold)


def test_plain_answers_need_no_worker(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("asked a worker")

    monkeypatch.setattr(worker_pool, "ask", refuse)
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
        hurry.setitem(worker_pool.LIMIT_S, "math", 1.0)
        start = time.perf_counter()
        verdict = math_verdict(f"{TOWER}+1", TOWER)
        assert (verdict.correct, verdict.score) == (None, None)
        assert verdict.answer == f"{TOWER}+1"
        assert time.perf_counter() - start < 30 * slowness()
    assert math_verdict("x+2", "2+x").correct is True


def test_long_and_deep_answers_are_wrong_not_slow():
    start = time.perf_counter()
    assert math_verdict("1+" * 600 + "1", "x").reason == "answer too long"
    assert math_verdict("(" * 400 + "1" + ")" * 400, "2x").reason == "answer nested too deep"
    assert math_verdict("[" * 499 + "]" * 499, "[1]").reason == "answer nested too deep"
    assert time.perf_counter() - start < 15 * slowness()


@pytest.mark.parametrize("gold", ["7", "(1,2)", "x \\cup [1,2)", "B", "x > 3"])
@pytest.mark.parametrize(
    "unit",
    [
        "$", "*", "**", "`", "|", "<", "=", "x=", "7=", "\\", "\\in ", "\\pm", "\\frac", "\\sqrt", "\\text{", "a ", "1 ", "1,", "x<",
        "7元", "或", "\\cup ", "A. ", "0.3", "...", "\\dot3", "\\boxed{}", "\\approx ", "and ", "P()", "f'", "A:", "\\\\", "\\begin{pmatrix}",
        "1&", "^", "_", "!", "-", "'", "\x00", "é", "\\left", "\\lim_{x\\to 0}", "{,}", "(a),", "6 miles ",
    ],
)  # fmt: skip
def test_no_repetition_holds_up_the_reading_of_an_answer(unit, gold, monkeypatch):
    # The worker has a time limit of its own, so only the work of this process is tested.
    monkeypatch.setattr(worker_pool, "ask", lambda *_args: False)
    start = time.process_time()
    for text in (unit * (1000 // len(unit)), "7" + unit * (990 // len(unit)) + "7"):
        math_verdict(text, gold)
        why_unreadable(text)
    assert time.process_time() - start < 1.0


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
    assert worker_pool.ask("math", "y+x", "x+y", True) is True
    for worker in list(worker_pool._pools["math"]._started):
        os.kill(worker.process.pid, 9)
        worker.process.wait()
    for _ in range(worker_pool.NUM_WORKERS):
        with pytest.raises(worker_pool.StuckError, match="ended"):
            worker_pool.ask("math", "y+x", "x+y", True)
    assert worker_pool.ask("math", "y+x", "x+y", True) is True


def test_a_worker_that_the_machine_held_up_is_asked_once_more():
    assert worker_pool.ask("math", "y+z", "z+y", True) is True
    for worker in list(worker_pool._pools["math"]._started):
        worker.process.send_signal(signal.SIGSTOP)
    for _ in range(worker_pool.NUM_WORKERS):
        assert worker_pool.ask("math", "y+z", "z+y", True, limit_s=1.0) is True


@pytest.mark.skipif(sys.platform != "linux", reason="signals of pipes are Linux's")
def test_a_worker_ends_with_a_killed_parent_even_within_one_long_operation(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import threading, time\nfrom distill.tasks.judge import worker_pool\n"
        "worker_pool.ask('math', 'x+1', '1+x', True)\n"
        f"threading.Thread(target=worker_pool.ask, args=('math', {TOWER + '+1'!r}, {TOWER!r}, True)).start()\n"
        "time.sleep(1)\nprint(*[w.process.pid for w in worker_pool._pools['math']._started], flush=True)\ntime.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as parent:
        pid = int(parent.stdout.readline())
        assert psutil.pid_exists(pid)
        parent.kill()
    deadline = time.monotonic() + 5 * slowness()
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the worker is still at work"
        time.sleep(0.05)


def test_an_unguarded_script_may_judge_and_leaves_no_process_behind(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from distill.tasks.judge import worker_pool\nfrom distill.tasks.judge.verdict import math_verdict\n"
        "print(math_verdict('x+1', '1+x').correct)\n"
        "print(*[w.process.pid for w in worker_pool._pools['math']._started])\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    correct, pid = done.stdout.split()
    assert correct == "True"
    assert not os.path.exists(f"/proc/{pid}")


def test_importing_the_room_loads_nothing_heavy():
    code = (
        "import sys, distill.tasks\n"
        "print([m for m in ('torch', 'datasets', 'reasoning_gym', 'latex2sympy2_extended', 'sympy', 'transformers')"
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
