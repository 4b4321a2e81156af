"""Generated problems: disjoint splits, lists that are prefixes of longer ones, errors that say what to do."""

import subprocess
import sys

import pytest

from distill import plug
from distill.records import UserError
from distill.tasks import reasoning_gym, reasoning_gym_task, splits

QUICKSTART = {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2}
TWO_TERMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}


def sums(**options):
    return reasoning_gym("sums", dataset="chain_sum", options=options or QUICKSTART)


def ids(task, split, num, seed):
    return [problem.problem_id for problem in task.problems(split, num, seed)]


@pytest.mark.parametrize("options", [QUICKSTART, TWO_TERMS])
def test_no_seed_brings_a_problem_of_the_other_split(options):
    task = sums(**options)
    train = {q for seed in range(3) for q in ids(task, "train", 600, seed)}
    held_out = {q for seed in range(3) for q in ids(task, "held_out", 200, seed)}
    assert not train & held_out
    assert len(train) > 600  # the seeds differ
    assert all(splits.is_held_out(p.question) for p in task.problems("held_out", 100, 9))
    assert not any(splits.is_held_out(p.question) for p in task.problems("train", 100, 9))


def test_more_problems_begin_with_the_fewer():
    task = sums()
    many = ids(task, "train", 700, 5)
    assert ids(task, "train", 300, 5) == many[:300]
    assert len(set(many)) == 700
    assert ids(sums(), "train", 300, 5) == many[:300]
    assert ids(task, "train", 300, 6) != many[:300]
    assert ids(task, "train", 0, 5) == []


def test_a_tenth_is_held_out():
    questions = [f"{a} + {b} =" for a in range(100) for b in range(100)]
    assert 900 < sum(map(splits.is_held_out, questions)) < 1100


def test_formatting_does_not_move_a_problem():
    plain = "What is 3 + 4?"
    for dressed in (
        "what is  3 + 4?",
        " What is\n3 + 4?\t",
        "Ｗhat is ３ + 4?",
        "What is 3\u200b + 4?",
    ):
        assert splits.split_of(dressed) == splits.split_of(plain)
        assert splits.problem_id("a", dressed) == splits.problem_id("a", plain)
    assert splits.problem_id("a", plain) != splits.problem_id("b", plain)


def test_too_few_problems_says_how_many_there_are():
    # One term of one digit: only ten problems exist.
    task = sums(min_terms=1, max_terms=1, min_digits=1, max_digits=1)
    num = sum(
        not splits.is_held_out(f"State the final answer to the following arithmetic problem: {n} =") for n in range(10)
    )
    assert len(ids(task, "train", num, 1)) == num
    with pytest.raises(UserError, match=f"found only {num} distinct train problems after"):
        task.problems("train", 50, 1)
    with pytest.raises(UserError, match="without end"):
        task.problems("train", None, 1)


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        ("chain_sums", {}, "tasks.sums.dataset: .* 'chain_sums'. Did you mean 'chain_sum'"),
        (
            "chain_sum",
            {"min_term": 2},
            "tasks.sums.options.min_term: unknown option. Did you mean 'min_terms'",
        ),
        ("chain_sum", {"seed": 2}, "tasks.sums.options.seed: is set by the stage"),
        ("chain_sum", {"min_terms": 3, "max_terms": 2}, "max_terms must be >= min_terms"),
        ("chain_sum", {"min_terms": "two"}, "tasks.sums.options: chain_sum refuses them"),
    ],
)
def test_mistakes_name_the_nearest_right_name(dataset, options, message):
    with pytest.raises(UserError, match=message):
        reasoning_gym("sums", dataset=dataset, options=options)


def test_the_scorer_is_the_generators_own():
    task = sums()
    problem = next(task.problems("train", 1, 1))
    gold = problem.gold

    def verdict(text, finished=True):
        return task.judge(problem, text, finished)

    assert verdict(f"<think>a</think><answer>{gold}</answer>").correct is True
    assert verdict(f"<think>a</think><answer>{gold}.0</answer>").correct is True
    assert verdict(f"<think>a</think><answer>1{gold}1</answer>").correct is False
    assert verdict(f"<think>a</think><answer>{gold}</answer>", False).reason == "unfinished"
    assert verdict(f"<think><answer>{gold}</answer>").reason == "no answer"


def test_partial_credit_is_a_score_but_not_correct():
    task = reasoning_gym("spell", dataset="spell_backward")
    problem = next(p for p in task.problems("train", 50, 1) if len(p.gold) >= 4)
    swapped = problem.gold[:-1] + ("x" if problem.gold[-1] != "x" else "y")
    verdict = task.judge(problem, f"<think>a</think><answer>{swapped}</answer>")
    assert verdict.correct is False
    assert 0 < verdict.score < 1


def test_a_scorer_that_raises_judges_nothing():
    task = reasoning_gym("boxes", dataset="boxnet")
    problem = next(task.problems("train", 1, 1))
    verdict = task.judge(problem, "<think>a</think><answer>5</answer>")
    assert (verdict.correct, verdict.score) == (None, None)
    assert verdict.reason.startswith("scorer failed: TypeError")


def test_scorers_that_evaluate_run_no_code(tmp_path):
    task = reasoning_gym("count", dataset="countdown")
    problem = next(task.problems("train", 1, 1))
    target = tmp_path / "written"
    for attack in (
        f"__import__('pathlib').Path({str(target)!r}).touch()",
        f"[open][0]({str(target)!r}, 'w')",
        f"open({str(target)!r}, 'w')",
        "().__class__",
        "(lambda: 1)()",
    ):
        verdict = task.judge(problem, f"<answer>{attack}</answer>")
        assert (verdict.correct, verdict.reason) == (False, "not an expression")
    assert not target.exists()
    assert task.judge(problem, f"<answer>{problem.gold}</answer>").correct is True


@pytest.mark.parametrize(
    ("answer", "good"),
    [
        ("3*(4+5)", True),
        ("x**2 + sin(x)/2 + C", True),
        ("[1, 2, 3]", True),
        ("Q _ _\n_ _ Q", True),
        ("5!", True),
        ("exec('1')", False),
        ("(exec)('1')", False),
        ("x.y", False),
        ("f'{exec(1)}'", False),
        ("[c for c in 'abc']", False),
    ],
)
def test_what_a_scorer_may_evaluate(answer, good):
    assert reasoning_gym_task.is_arithmetic(answer) is good


def test_every_process_draws_the_same_problems():
    code = (
        "from distill.tasks import reasoning_gym\n"
        "for name in ('ransom_note', 'chain_sum'):\n"
        "    print(*[p.problem_id for p in reasoning_gym('t', dataset=name).problems('train', 3, 1)])"
    )
    run = subprocess.run(
        [sys.executable, "-W", "error::SyntaxWarning", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "1", "PATH": "", "PYTHONPATH": ":".join(filter(None, sys.path))},
    )
    here = [
        problem.problem_id
        for name in ("ransom_note", "chain_sum")
        for problem in reasoning_gym("t", dataset=name).problems("train", 3, 1)
    ]
    assert run.stdout.split() == here


def test_the_room_offers_exactly_its_tasks():
    assert set(plug.names("distill.tasks")) == {"humaneval", "hub", "jsonl", "reasoning_gym"}
    make = plug.bind("reasoning_gym", {"dataset": "chain_sum"}, "distill.tasks")
    assert make("sums").template.name == "think_answer"
    with pytest.raises(UserError, match=r"datset: unknown key\. Did you mean 'dataset'"):
        plug.bind("reasoning_gym", {"datset": "chain_sum", "dataset": "chain_sum"}, "distill.tasks")


def test_the_fingerprint_follows_what_matters():
    assert sums().fingerprint == sums().fingerprint
    others = [
        sums(**TWO_TERMS),
        reasoning_gym("sums", dataset="gcd"),
        reasoning_gym("sums", dataset="chain_sum", options=QUICKSTART, template="boxed"),
    ]
    assert len({task.fingerprint for task in [sums(), *others]}) == 4
    renamed = reasoning_gym("other", dataset="chain_sum", options=QUICKSTART)
    assert renamed.fingerprint == sums().fingerprint
