"""Files and datasets as tasks: bad rows are rejected one by one, splits are kept, and a missing hub is reported quickly."""

import json
import time

import datasets
import pytest
from needs import slowness

from distill.jsonl import read_rows
from distill.records import UserError
from distill.tasks import hub, jsonl, reasoning_gym, splits


def write(path, rows):
    path.write_bytes(b"".join(r if isinstance(r, bytes) else json.dumps(r).encode() + b"\n" for r in rows))
    return str(path)


def addition(n):
    return {"question": f"What is {n} + {n}?", "answer": str(2 * n)}


@pytest.mark.fault(27)
def test_rows_that_cannot_be_read_are_rejected_by_line(tmp_path):
    path = write(
        tmp_path / "rows.jsonl",
        [
            b"\xef\xbb\xbf" + json.dumps(addition(1)).encode() + b"\n",
            b'{"question": "\xff", "answer": "1"}\n',
            b'{"question": "\\ud800", "answer": "1"}\n',
            b'{"question": "a\\u0000", "answer": "1"}\n',
            b'{"question": "a\x00", "answer": "1"}\n',
            b'{"question": "' + b"a" * 3000 + b'", "answer": "1"}\n',
            b'{"question": \n',
            b"[1, 2]\n",
            b'{"question": NaN, "answer": "1"}\n',
            b"[" * 900 + b"\n",
            b"\n",
            addition(2),
            json.dumps(addition(3)).encode(),
        ],
    )
    rejected = []
    rows = list(read_rows(path, lambda *at: rejected.append(at), max_line_bytes=2000))
    assert rows == [(1, addition(1)), (12, addition(2)), (13, addition(3))]
    assert [line for line, _ in rejected] == [2, 3, 4, 5, 6, 7, 8, 9, 10]
    reasons = dict(rejected)
    assert "UTF-8" in reasons[2]
    assert "surrogate" in reasons[3]
    assert "NUL" in reasons[4]
    assert "NUL" in reasons[5]
    assert "longer than 2,000 bytes" in reasons[6]
    with pytest.raises(UserError, match=r"line 2: not UTF-8"):
        list(read_rows(path))
    with pytest.raises(UserError, match=r"cannot be read"):
        list(read_rows(tmp_path / "missing.jsonl"))


@pytest.mark.fault(27)
def test_a_ten_megabyte_line_is_rejected_and_the_next_one_read(tmp_path):
    path = write(tmp_path / "rows.jsonl", [b'{"question": "' + b"a" * 11_000_000 + b'"}\n', addition(1)])
    rejected = []
    assert [line for line, _ in read_rows(path, lambda *at: rejected.append(at))] == [2]
    assert rejected[0][0] == 1


def test_a_file_is_split_ordered_and_judged(tmp_path):
    task = jsonl("adds", path=write(tmp_path / "a.jsonl", map(addition, range(200))))
    train, held_out = (
        list(task.problems("train", None, 1)),
        list(task.problems("held_out", None, 1)),
    )
    assert len(train) + len(held_out) == 200
    assert all(splits.is_held_out(p.question) for p in held_out)
    assert list(task.problems("train", 20, 1)) == train[:20]
    assert list(task.problems("train", 20, 2)) != train[:20]
    assert task.rejected == []
    problem = train[0]
    assert task.judge(problem, f"<think>a</think><answer>{problem.gold}.0</answer>").correct is True
    assert task.judge(problem, "<think>a</think><answer>-1</answer>").correct is False
    with pytest.raises(UserError, match=rf"1000 train problems are wanted, but .* has {len(train)}"):
        task.problems("train", 1000, 1)


@pytest.mark.fault(26)
def test_rows_without_a_usable_answer_are_rejected_by_line(tmp_path):
    user = {"role": "user", "content": "What is 1 + 1?"}
    rows = [
        {
            "messages": [
                user,
                {"role": "assistant", "content": "<think>a</think><answer>2</answer>"},
            ]
        },
        {"messages": [{**user, "content": "Half of 1?"}], "answer": r"\frac{1}{2}"},
        {"question": "Broken?", "answer": r"\frac{1}{"},
        {"question": "No answer?"},
        {"question": "What is  1 + 1?", "answer": "3"},
        {"question": "A number?", "answer": 7},
        {
            "messages": [
                {**user, "content": "Worked?"},
                {"role": "assistant", "content": "so\n#### 12"},
            ]
        },
    ]
    task = jsonl("adds", path=write(tmp_path / "a.jsonl", rows), held_out="all")
    golds = {p.question: p.gold for p in task.problems("held_out", None, 1)}
    assert golds == {
        "What is 1 + 1?": "2",
        "Half of 1?": r"\frac{1}{2}",
        "A number?": "7",
        "Worked?": "12",
    }
    reasons = dict(task.rejected)
    assert list(reasons) == [3, 4, 5]
    assert "braces" in reasons[3]
    assert "there is no answer (there are: question)" in reasons[4]
    assert "the same question as 1, with another answer ('2')" in reasons[5]


def test_a_gold_that_is_a_list_is_its_answers_and_an_object_is_refused(tmp_path):
    golds = [["1,200", "-3"], [7], 2.5, {"ground_truth": "4"}, [["1"], ["2"]], [], True, None, [""]]
    rows = [{"question": f"{n}?", "answer": gold} for n, gold in enumerate(golds)]
    task = jsonl("golds", path=write(tmp_path / "a.jsonl", rows), held_out="all")
    problems = {p.question: p for p in task.problems("held_out", None, 1)}
    assert {q: p.gold for q, p in problems.items()} == {"0?": "1200, -3", "1?": "7", "2?": "2.5"}
    assert task.judge(problems["0?"], "<answer>-3 and 1,200</answer>").correct is True
    assert task.judge(problems["0?"], "<answer>1200</answer>").correct is False
    reasons = dict(task.rejected)
    assert list(reasons) == [4, 5, 6, 7, 8, 9]
    assert reasons[4] == "the answer is dict with the keys ground_truth, not a text, a number or a list of them"
    assert "list" in reasons[5]


def test_a_dataset_with_a_list_as_gold(tmp_path):
    import datasets

    def save(name, golds):
        table = datasets.Dataset.from_list([{"question": "Q?", "answer": gold} for gold in golds])
        datasets.DatasetDict({"test": table}).save_to_disk(tmp_path / name)
        return hub(name, dataset=str(tmp_path / name))

    assert next(save("lists", [["2", "5"]]).problems("held_out", 1, 1)).gold == "2, 5"
    with pytest.raises(UserError, match="the answer is dict with the keys value"):
        save("objects", [{"value": "2"}]).problems("held_out", 1, 1)


def test_an_evaluation_file_has_nothing_to_train_on(tmp_path):
    task = jsonl("adds", path=write(tmp_path / "a.jsonl", map(addition, range(5))), held_out="all")
    assert len(list(task.problems("held_out", None, 1))) == 5
    with pytest.raises(UserError, match=r"no train problems, only held-out ones"):
        task.problems("train", 1, 1)


def test_a_file_with_nothing_left_says_why(tmp_path):
    task = jsonl("adds", path=write(tmp_path / "a.jsonl", [b"{\n", {"question": "a"}]))
    with pytest.raises(UserError, match=r"no usable problem. Rejected 2, by line or row: 1: not JSON"):
        task.problems("train", 1, 1)
    with pytest.raises(UserError, match=r"tasks.adds.path: 'missing.jsonl': no such file"):
        jsonl("adds", path="missing.jsonl")


def test_exact_answers_are_not_parsed(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"question": "Say {.", "answer": "{"}])
    task = jsonl("echo", path=path, held_out="all", judge="exact", template="raw")
    problem = next(task.problems("held_out", 1, 1))
    assert task.judge(problem, "{").correct is True
    assert task.judge(problem, "}").correct is False


def test_a_file_is_known_by_its_content(tmp_path):
    one = jsonl("a", path=write(tmp_path / "a.jsonl", [addition(1)]))
    other = jsonl("b", path=write(tmp_path / "b.jsonl", [addition(1)]))
    changed = jsonl("b", path=write(tmp_path / "c.jsonl", [addition(2)]))
    assert one.fingerprint == other.fingerprint != changed.fingerprint


def saved_gsm8k(folder):
    import datasets

    def table(numbers):
        return datasets.Dataset.from_list(
            [{"question": f"Twice {n}?", "answer": f"{n} + {n} = {2 * n}\n#### {2 * n:,}"} for n in numbers]
        )

    return datasets.DatasetDict({"train": table(range(500, 530)), "test": table(range(525, 535))}), folder


def test_a_saved_dataset_keeps_its_official_splits(tmp_path):
    tables, folder = saved_gsm8k(tmp_path / "gsm8k")
    tables.save_to_disk(folder)
    task = hub("gsm8k", dataset="gsm8k", folder=str(folder))
    train, test = list(task.problems("train", None, 1)), list(task.problems("held_out", None, 1))
    assert len(test) == 10
    assert len(train) == 25  # five of the thirty are test questions too
    assert not {p.problem_id for p in train} & {p.problem_id for p in test}
    assert {p.gold for p in test} == {str(2 * n) for n in range(525, 535)}
    problem = next(p for p in test if p.gold == "1060")
    assert task.judge(problem, r"<think>a</think>It is \boxed{1{,}060}.").correct is True
    assert len(task.rejected) == 5


def test_math_has_answers_beside_its_solutions(tmp_path):
    """The layout of the data set behind `math`; the last boxed text of a solution is not what is compared."""
    for split, numbers in (("train", range(4)), ("test", range(3, 5))):  # 3 is in both
        rows = [
            {"problem": f"Half of {n}?", "solution": f"Not $\\boxed{{{n}}}$ but half.", "answer": f"\\frac{{{n}}}{{2}}",
             "subject": "Algebra", "level": 1, "unique_id": f"{split}/{n}.json"}
            for n in numbers
        ]  # fmt: skip
        write(tmp_path / f"{split}.jsonl", rows)
    task = hub("m", dataset="math", folder=str(tmp_path))
    train, test = list(task.problems("train", None, 1)), list(task.problems("held_out", None, 1))
    assert {p.gold for p in train} == {rf"\frac{{{n}}}{{2}}" for n in range(3)}
    assert {p.gold for p in test} == {r"\frac{3}{2}", r"\frac{4}{2}"}
    problem = next(p for p in test if "3" in str(p.gold))
    assert task.judge(problem, r"It is \boxed{1.5}.").correct is True
    assert task.judge(problem, r"It is \boxed{3}.").correct is False


def test_a_folder_of_parquet_files_is_a_dataset(tmp_path):
    tables, folder = saved_gsm8k(tmp_path / "mine")
    folder.mkdir()
    for split, table in tables.items():
        table.rename_column("question", "asked").to_parquet(folder / f"{split}-00000-of-00001.parquet")
    fields = {"question": "asked", "reply": "answer"}
    task = hub("mine", dataset=str(folder), fields=fields)
    assert len(list(task.problems("held_out", None, 1))) == 10
    wrong = hub("mine", dataset=str(folder), fields={"question": "askd", "reply": "answer"})
    with pytest.raises(UserError, match=r"there is no 'askd' in 'askd' \(there are: "):
        wrong.problems("held_out", 1, 1)
    wrong = hub("mine", dataset=str(folder), fields=fields, train_split="a", held_out_split="b")
    with pytest.raises(UserError, match=r"has the splits test, train; say which is which"):
        wrong.problems("held_out", 1, 1)


def test_a_hub_that_cannot_be_reached_is_said_in_seconds(tmp_path, monkeypatch):
    import datasets.config
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    start = time.perf_counter()
    task = hub("gsm8k", dataset="gsm8k")
    with pytest.raises(UserError, match=r"'openai/gsm8k' cannot be loaded: .*folder.*JSONL"):
        task.problems("train", 1, 1)
    assert time.perf_counter() - start < 15 * slowness()
    assert constants.HF_HUB_OFFLINE is False


def test_an_unknown_dataset_names_the_nearest():
    with pytest.raises(UserError, match=r"'gsm8' is no known dataset.*Did you mean 'gsm8k'"):
        hub("g", dataset="gsm8")
    with pytest.raises(UserError, match=r"no such folder"):
        hub("g", dataset="gsm8k", folder="nowhere")


def test_a_vote_counts_answers_by_what_they_mean(tmp_path):
    path = write(tmp_path / "a.jsonl", map(addition, range(20)))
    as_mathematics, word_for_word = (
        jsonl("adds", path=path),
        jsonl("adds", path=path, judge="exact"),
    )
    assert as_mathematics.same_answer("7/2", "3.5")
    assert as_mathematics.same_answer(r"\frac{1}{2}", "0.5")
    assert not as_mathematics.same_answer("7", "8")
    assert word_for_word.same_answer(" a  b", "a b")
    assert not word_for_word.same_answer("7/2", "3.5")
    generated = reasoning_gym("sums", dataset="chain_sum", options={})
    assert generated.same_answer("12", "12.0")
    assert not generated.same_answer("12", "21")


def test_questions_without_answers_are_problems_that_nobody_judges(tmp_path):
    rows = [{"prompt": f"Write a line about {n}."} for n in range(60)]
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(UserError, match=r"no usable problem.*there is no answer"):
        jsonl("lines", path=path).problems("train", 1, 1)
    task = jsonl("lines", path=path, judge="none", template="direct")
    problems = [*task.problems("train", None, 1), *task.problems("held_out", None, 1)]
    assert sorted(problem.question for problem in problems) == sorted(row["prompt"] for row in rows)
    verdict = task.judge(problems[0], "<think>hm</think>A line.")
    assert (verdict.correct, verdict.score, verdict.answer) == (None, None, "A line.")
    assert verdict.reason == "not judged"


def test_a_folder_has_its_own_held_out_split_or_none(tmp_path):
    (tmp_path / "both").mkdir()
    write(tmp_path / "both" / "train-0.jsonl", [addition(n) for n in range(30)])
    write(tmp_path / "both" / "test.jsonl", [addition(n) for n in range(25, 40)])
    task = jsonl("adds", path=str(tmp_path / "both"))
    held_out = {problem.question for problem in task.problems("held_out", None, 1)}
    assert held_out == {addition(n)["question"] for n in range(25, 40)}  # what is in both is held out
    assert len(list(task.problems("train", None, 1))) == 25
    (tmp_path / "one").mkdir()
    write(tmp_path / "one" / "a.jsonl", [addition(n) for n in range(30)])
    alone = jsonl("adds", path=str(tmp_path / "one"))
    by_hash = jsonl("adds", path=str(tmp_path / "one" / "a.jsonl"))
    for split in ("train", "held_out"):
        assert [p.problem_id for p in alone.problems(split, None, 1)] == [
            p.problem_id for p in by_hash.problems(split, None, 1)
        ]
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match=r"holds no data files"):
        jsonl("adds", path=str(tmp_path / "bare"))


def test_a_dataset_without_a_test_split_is_split_by_content(tmp_path):
    datasets.Dataset.from_list([addition(n) for n in range(80)]).to_parquet(tmp_path / "train-0.parquet")
    official = hub("adds", dataset=str(tmp_path))
    assert len(list(official.problems("train", None, 1))) == 80
    task = hub("adds", dataset=str(tmp_path), held_out_split="hash")
    held_out = {problem.question for problem in task.problems("held_out", None, 1)}
    assert held_out == {addition(n)["question"] for n in range(80) if splits.is_held_out(addition(n)["question"])}
    assert len(list(task.problems("train", None, 1))) == 80 - len(held_out)
