"""`distill new`: from questions and two models to a recipe that checks and runs, by flags and in a dialogue."""

from __future__ import annotations

import gzip
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_bytes
import yaml
from project import Project

from distill import recipe as recipes
from distill.errors import UserError
from distill.tools.new import Given, create, recipe_text
from distill.tools.new.asking import settle_all
from distill.tools.new.dialogue import Dialogue

NAMES = ("Mira", "Tom", "Ada", "Ben", "Lea", "Noor", "Ivo", "Uma")
SAID = r"\boxed{4}"


def question(n: int) -> str:
    return f"{NAMES[n % 8]} has {n % 5} apples of {n} and 2 pears. What is 2 + 2?"


def judged(n: int = 60) -> list[dict]:
    return [{"question": question(i), "answer": "4"} for i in range(n)]


def bare(n: int = 60) -> list[dict]:
    return [{"prompt": question(i)} for i in range(n)]


def chats(n: int = 60) -> list[dict]:
    return [
        {
            "messages": [
                {"role": "user", "content": question(i)},
                {"role": "assistant", "content": "It is four, I think."},
            ]
        }
        for i in range(n)
    ]


def lines(folder: Path, rows: list[dict], name: str = "data.jsonl") -> str:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@dataclass(frozen=True)
class Models:
    """Folders of tiny models: a teacher that answers every question alike, students, one of them without chat template, one with
    another tokenizer."""

    teacher: Path
    student: Path
    base: Path
    foreign: Path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Models:
    folder, tokens = tmp_path_factory.mktemp("bytes"), tiny_bytes.tokenizer()
    asks = r"<|system|>Reason step by step, then put the final answer in \boxed{}.<|end|>"
    asked = tuple(f"{asks * (n % 2)}<|user|>{question(n)}<|end|><|assistant|>" for n in range(16))
    return Models(
        tiny_bytes.save(folder / "teacher", 3, tokens, SAID, asked),
        tiny_bytes.save(folder / "student", 2, tokens),
        tiny_bytes.save(folder / "base", 2, tiny_bytes.tokenizer(chat=False)),
        tiny_bytes.save(folder / "foreign", 1, tiny_bytes.tokenizer("<|more|>")),
    )


def made(
    tiny: Models, data: str, teacher: Path | str | None = None, student: Path | str | None = None, **given
) -> dict:
    """Make a recipe by flags; return its tree, after the loader has read it."""
    asked = {
        "name": "mine",
        "data": data,
        "teacher": str(teacher or tiny.teacher),
        "student": str(student or tiny.student),
    }
    path, ready = create(Given(**asked | given), asks=False)
    assert ready
    recipes.load(path)
    return yaml.safe_load(path.read_text())


# ----------------------------------------------------------------------------------------------- what is written


def test_questions_with_answers_are_judged_filtered_and_compared(here, tiny, capsys):
    tree = made(tiny, lines(here, judged()))
    assert list(tree["stages"]) == ["traces", "clean", "unseen", "kl", "sft", "verdict"]
    assert tree["tasks"]["questions"] == {"fn": "jsonl", "path": "./data.jsonl", "judge": "math", "template": "boxed"}
    assert tree["stages"]["clean"]["keep"] == [{"fn": "correct"}, {"fn": "finished"}]
    assert tree["stages"]["verdict"]["targets"] == "unseen"
    said = capsys.readouterr().out
    total = tree["stages"]["traces"]["problems"] + tree["stages"]["verdict"]["problems"]
    assert total == 60
    assert "60 questions are few" in said
    assert "a teacher of this size rarely writes a right answer" in said
    assert "distill doctor mine.yaml" in said
    assert "on this machine" in said


def test_every_value_has_its_reason_beside_it(here, tiny):
    made(tiny, lines(here, judged()))
    text = (here / "mine.yaml").read_text()
    for key in (
        "judge",
        "template",
        "problems",
        "samples",
        "top_logprobs",
        "mass",
        "keep",
        "lr",
        "epochs",
        "batch_traces",
    ):
        line = next(line for line in text.splitlines() if line.strip().startswith(f"{key}:"))
        assert "  # " in line, line
    assert max(map(len, text.splitlines())) < 200


def test_questions_without_answers_are_measured_by_distance(here, tiny):
    tree = made(tiny, lines(here, bare()))
    stages = tree["stages"]
    assert tree["tasks"]["questions"]["judge"] == "none"
    assert stages["clean"]["keep"] == [{"fn": "finished"}]
    assert {name: stages[name]["model"] for name in stages if name.startswith("near")} == {
        "near_start": "student", "near_kl": "kl", "near_sft": "sft",
    }  # fmt: skip
    assert "verdict" not in stages


def test_programs_with_tests_are_not_judged_and_that_is_said(here, tiny, capsys):
    rows = [
        {"prompt": f"Write a function f{n}.", "code": "def f(): 4", "test_list": ["assert f() == 4"]} for n in range(40)
    ]
    assert made(tiny, lines(here, rows))["tasks"]["questions"]["judge"] == "none"
    assert "column 'test_list' looks like tests of programs" in capsys.readouterr().out


def test_completions_in_the_data_are_learned_and_scored(here, tiny):
    data = lines(here, chats())
    stages = made(tiny, data)["stages"]
    assert list(stages)[:2] == ["scored", "unseen"]
    assert stages["scored"]["data"] == stages["sft"]["data"] == "./data.jsonl"
    assert stages["kl"]["data"] == "scored"
    assert stages["sft"]["task"] == "questions"  # which keeps held-out questions out
    again = made(tiny, data, learn_from="teacher", force=True)["stages"]
    assert "traces" in again
    assert again["sft"]["data"] == "clean"


def test_words_that_are_no_mathematics_are_compared_as_text(here, tiny):
    rows = [{"question": question(i), "answer": "the {left} one, [not the right"} for i in range(40)]
    assert made(tiny, lines(here, rows))["tasks"]["questions"]["judge"] == "exact"


def test_different_tokenizers_compare_text_with_the_teacher_in_the_trainer(here, tiny):
    stages = made(tiny, lines(here, judged()), student=tiny.foreign)["stages"]
    assert stages["kl"]["loss"] == {"fn": "aligned"}
    assert stages["kl"]["teacher"] == "teacher"
    assert stages["traces"]["top_logprobs"] == 0
    assert "unseen" not in stages


def test_a_base_student_reads_plain_text_like_its_teacher(here, tiny, capsys):
    tree = made(tiny, lines(here, judged()), student=tiny.base)
    assert tree["tasks"]["questions"]["template"] == "boxed_plain"
    assert "no chat template" in capsys.readouterr().out


def test_a_pruned_student_is_made_of_the_teacher(here, tiny):
    tree = made(tiny, lines(here, judged()), student="pruned")
    assert tree["stages"]["student"]["layers"] == 2  # of 3
    assert "student" not in tree["models"]
    assert tree["stages"]["kl"]["model"] == "student"
    with pytest.raises(UserError, match=r"--student: pruned:3: the teacher has 3 layers"):
        made(tiny, "data.jsonl", student="pruned:3", force=True)


def test_a_served_teacher_is_asked_over_http(here, tiny, monkeypatch):
    monkeypatch.setenv("MY_KEY", "none")
    data, url = lines(here, judged()), "http://localhost:9/v1"
    tree = made(tiny, data, url, teacher_name="big", teacher_key="$MY_KEY")
    assert tree["stages"]["traces"]["engine"]["base_url"] == url
    assert tree["stages"]["traces"]["engine"]["key"] == "$MY_KEY"
    assert tree["stages"]["traces"]["top_logprobs"] == 20
    assert "teacher" not in tree["stages"]["verdict"]["arms"]
    assert tree["stages"]["teacher_verdict"]["kind"] == "eval"


def test_models_that_are_elsewhere_are_planned_for_named_gpus(here, tiny, capsys):
    data, large, small = lines(here, judged()), "Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct"
    with pytest.raises(UserError, match=r"--gpu h100:1"):
        made(tiny, data, large, small)
    assert "lora" not in made(tiny, data, large, small, gpu="h100:1")["stages"]["kl"]
    assert "on one NVIDIA" in capsys.readouterr().out
    kl = made(tiny, data, large, "Qwen/Qwen2.5-3B-Instruct", gpu="4090", force=True)["stages"]["kl"]
    assert kl["lora"]["rank"] == 64  # 24 GB do not hold the optimiser of 3 billion weights


# ------------------------------------------------------------------------------------------------------- layouts


SHAREGPT = {
    "system": "Reason first.",
    "conversations": [
        {"from": "human", "value": "What is 7 times 8?"},
        {"from": "gpt", "value": "<think>56</think>\\boxed{56}"},
    ],
}
REASONED = {
    "messages": [
        {"role": "user", "content": "What is 3+4?"},
        {"role": "assistant", "reasoning_content": "Seven.", "content": "It is 7."},
    ]
}
GSM8K = {"question": "A van drives 40 km a day for 12 days. How far?", "answer": "40*12=<<40*12=480>>480 km.\n#### 480"}
VERL = {
    "data_source": "dapo",
    "prompt": [{"role": "user", "content": "What is 12*12?"}],
    "reward_model": {"ground_truth": "144", "style": "rule"},
}


def several(row: dict, num: int = 40) -> list[dict]:
    """Copies of a row with other questions."""
    text = json.dumps(row)
    asked = next(q for q in ("What is 7 times 8?", "What is 3+4?", "A van drives", "What is 12*12?") if q in text)
    return [json.loads(text.replace(asked, f"{NAMES[n % 8]} asks, time {n}: {asked}")) for n in range(num)]


@pytest.mark.parametrize(
    ("row", "form", "layout", "judge", "first"),
    [
        (SHAREGPT, "jsonl", "ShareGPT", "math", "scored"),
        (REASONED, "jsonl", "messages", "none", "scored"),
        (GSM8K, "jsonl", "question and reply", "math", "traces"),
        (VERL, "gz", "prompt of messages", "math", "traces"),
        (SHAREGPT, "folder", "ShareGPT", "math", "scored"),
    ],
)
def test_layouts_of_others(here, tiny, row, form, layout, judge, first, capsys):
    rows, data = several(row), "data.jsonl"
    if form == "gz":
        data = "data.jsonl.gz"
        with gzip.open(data, "wt") as file:
            file.writelines(json.dumps(each) + "\n" for each in rows)
    elif form == "folder":
        data = "set"
        Path("set/data").mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows), "set/data/train-00000-of-00001.parquet")
    else:
        lines(here, rows)
    tree = made(tiny, data)
    assert f"read as {layout}" in capsys.readouterr().out
    assert tree["tasks"]["questions"]["judge"] == judge
    assert next(iter(tree["stages"])) == first


def test_an_official_test_split_is_held_out(here, tiny, capsys):
    Path("set").mkdir()
    lines(here / "set", judged(40), "train.jsonl")
    lines(here / "set", [{"question": f"How much is {i} + 4 - {i}?", "answer": "4"} for i in range(12)], "test.jsonl")
    tree = made(tiny, "set")
    assert tree["stages"]["traces"]["problems"] == 40
    assert tree["stages"]["verdict"]["problems"] == 12


def test_a_data_set_of_the_hub_is_named_with_its_splits(here, tiny):
    """What would be read from the hub is read from a file here."""
    dialogue = Dialogue(asks=False)
    found, _ = settle_all(
        dialogue, Given(data=lines(here, chats()), teacher=str(tiny.teacher), student=str(tiny.student))
    )
    there = replace(found, data=replace(found.data, given="owner/chats", path=None, splits=("train_sft", "hash")))
    tree = yaml.safe_load(recipe_text.write(there, here))
    assert tree["tasks"]["questions"] == {
        "fn": "hub", "dataset": "owner/chats", "train_split": "train_sft", "held_out_split": "hash", "judge": "none", "template": "direct",
    }  # fmt: skip
    for name in ("scored", "sft"):
        assert (tree["stages"][name]["data"], tree["stages"][name]["split"]) == ("owner/chats", "train_sft")
    recipes.validate(tree)


def test_rows_that_cannot_be_used_are_counted_with_a_reason(here, tiny, capsys):
    lines(here, chats(40))
    with Path("data.jsonl").open("ab") as file:
        file.write(b'{"messages":[{"role":"user","content":"half \\ud83d"}]}\n[1,2]\n{"a":1,}\n\n{"messages": NaN}\n')
    made(tiny, "data.jsonl")
    assert "left out  4 rows cannot be used; row 41:" in capsys.readouterr().out


def test_columns_of_other_names(here, tiny):
    data = lines(here, [{"frage": question(i), "loesung": "4"} for i in range(40)])
    with pytest.raises(UserError, match=r"columns are frage, loesung.*--column question=COLUMN"):
        made(tiny, data)
    with pytest.raises(UserError, match=r"no column 'fragen'.*Did you mean 'frage'"):
        made(tiny, data, columns=("question=fragen",))
    tree = made(tiny, data, columns=("question=frage", "answer=loesung"))
    assert tree["tasks"]["questions"]["fields"] == {"question": "frage", "answer": "loesung"}
    assert tree["tasks"]["questions"]["judge"] == "math"


# -------------------------------------------------------------------------------------------------- wrong answers


def test_what_is_missing_is_one_message(here):
    done = subprocess.run(
        [sys.executable, "-m", "distill.cli", "new", "--teacher", "x/y"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert done.returncode == 2
    assert "needs --data and --student" in done.stderr
    assert "Traceback" not in done.stderr


def test_wrong_answers_by_flags(here, tiny):
    data = lines(here, judged(40))
    (here / "empty.jsonl").touch()
    (here / "some.gguf").touch()
    for said, file, given in [
        (r"--data: dat.jsonl: no such file.*Did you mean 'data.jsonl'", "dat.jsonl", {}),
        (r"--data: empty.jsonl: has no rows", "empty.jsonl", {}),
        (r"--student: .*is the teacher itself", data, {"student": tiny.teacher}),
        (r"--student: .*larger .*swapped", data, {"teacher": tiny.foreign}),
        (r"--teacher: .*cannot be reached on the hub", data, {"teacher": "nobody/nothing"}),
        (r"--questions: '5000': give a whole number from 1 to 3", data, {"questions": "5000"}),
        (r"--max-tokens: .*context", data, {"max_tokens": "9999"}),
        (r"Did you mean 'h100'", data, {"gpu": "h1000"}),
        (r"hold no completions", data, {"learn_from": "data"}),
    ]:
        with pytest.raises(UserError, match=said):
            made(tiny, file, **given)
    assert not (here / "mine.yaml").exists()


def test_a_recipe_is_not_replaced_unless_forced(here, tiny):
    data = lines(here, judged(40))
    (here / "mine.yaml").write_text("mine")
    with pytest.raises(UserError, match=r"exists already"):
        made(tiny, data)
    assert (here / "mine.yaml").read_text() == "mine"
    made(tiny, data, force=True)


# ------------------------------------------------------------------------------------------------------ dialogue


def test_wrong_answers_are_asked_again(here, tiny, monkeypatch, capsys):
    lines(here, [{"frage": question(i), "loesung": "4"} for i in range(40)])
    answers = [
        "nothing.jsonl",
        "data.jsonl",
        "question=frag",
        "question=frage,answer=loesung",
        "nowhere",
        "",
        "none/such",
    ]
    answers += [str(tiny.teacher), str(tiny.teacher), str(tiny.student), "many", "32", "", "my run", "mine"]
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{each}\n" for each in answers)))
    path, ready = create(Given(), asks=True)
    assert ready
    assert path == Path("mine.yaml")
    said = capsys.readouterr().err
    for part in (
        "no such file",
        "no column 'frag'",
        "cannot be reached",
        "teacher itself",
        "there is no GPU",
        "whole number",
        "begins with",
    ):
        assert part in said, part
    tree = yaml.safe_load(path.read_text())
    assert tree["stages"]["traces"]["sampling"]["max_tokens"] == 32


def test_a_dialogue_on_a_terminal_and_its_interruption(here, tiny):
    lines(here, judged(40))
    before = sorted(path.name for path in here.iterdir())
    status, text = talk([("Questions or conversations", "data.jsonl"), ("Where will", ""), ("Teacher", "\x03")])
    assert status == 130, text
    assert "nothing was written" in text
    assert sorted(path.name for path in here.iterdir()) == before
    status, text = talk(
        [
            ("Questions or conversations", "data.jsonl"),
            ("Where will", ""),
            ("Teacher", str(tiny.teacher)),
            ("Student", str(tiny.student)),
            ("Tokens", ""),
            ("Questions to learn", ""),
            ("Name", ""),
        ]
    )
    assert status == 0, text
    assert "It is ready" in text
    assert (here / "data.yaml").is_file()


def talk(answers: list[tuple[str, str]]) -> tuple[int, str]:
    """Answer the dialogue on a pseudo-terminal: each answer after its question was shown. Returns (exit status, output)."""
    process, terminal = pty.fork()
    if process == 0:
        # A worker of pytest-xdist ignores it, and a new program inherits that.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.execv(sys.executable, [sys.executable, "-m", "distill.cli", "new"])
    seen, begin = "", 0
    deadline = time.monotonic() + 240
    waiting = list(answers)
    while time.monotonic() < deadline:
        if not select.select([terminal], [], [], 1)[0]:
            continue
        try:
            read = os.read(terminal, 65536)
        except OSError:
            break
        if not read:
            break
        seen += read.decode(errors="replace")
        if waiting and waiting[0][0] in seen[begin:] and seen.rstrip(" ").endswith(":"):
            answer = waiting.pop(0)[1]
            begin = len(seen)
            os.write(terminal, answer.encode() if answer == "\x03" else f"{answer}\n".encode())
    else:
        os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    return os.waitstatus_to_exitcode(status), seen


# ---------------------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize("rows", [judged, bare, chats])
def test_a_new_recipe_runs_to_its_end(here, tiny, rows):
    tree = made(tiny, lines(here, rows(60)), questions="24", max_tokens="12")
    for stage in tree["stages"].values():
        if stage["kind"] in ("generate", "score", "compare"):
            stage["engine"] = {"fn": "transformers", "dtype": "float32", "batch_size": 32}
        if stage["kind"] == "train":
            stage |= {"dtype": "float32", "lr": 1e-3, "epochs": 1}
    project = Project(here, tree)
    done = project.run()
    assert done.returncode == 0, done.stderr + done.stdout
    report = json.loads((project.run_dir / "report.json").read_text())
    if rows is judged:
        assert set(report["arms"]) >= {"teacher", "start", "kl", "sft"}
        assert project.state("traces")["metrics"]["correct_rate"] > 0.9
    else:
        kl, start = (project.state(name)["metrics"]["kl"]["value"] for name in ("near_kl", "near_start"))
        assert kl < start
        assert "correct" not in (project.run_dir / "unseen" / "log.txt").read_text()
    assert (project.run_dir / "report.html").is_file()
