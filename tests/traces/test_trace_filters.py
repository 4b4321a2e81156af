"""Filters on hand-made groups; selections, which are read like folders and copy nothing."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import trace_samples as samples

from distill import plug
from distill.reasoning import reasoning_of
from distill.recipe import PlugConfig
from distill.records import Group, Problem, Template, Traces, UserError
from distill.tasks import rewards, templates
from distill.traces import filters
from distill.traces.contamination import HeldOut
from distill.traces.export import export_sft, merge
from distill.traces.prompts import PromptRecord
from distill.traces.reader import content_fingerprint, open_traces
from distill.traces.selection import select
from distill.traces.summary import stats
from distill.traces.verify import verify
from distill.traces.writer import TraceWriter


def group(**columns) -> Traces:
    """Six samples of one problem, completions of 1 to 6 tokens, with the columns changed."""
    block = samples.traces(range(1, 7), samples=100)
    lengths = np.arange(1, 7)
    rows = type(block.completion_ids)(np.zeros(21, np.int64), np.concatenate([[0], np.cumsum(lengths)]))
    fields = {name: getattr(block, name) for name in Traces.__dataclass_fields__}
    return Traces(**(fields | {"top": None, "completion_ids": rows} | columns))


def flags(array) -> str:
    return "".join("+" if flag else "-" for flag in array)


def test_filters_on_a_group_made_by_hand():
    judged = group(correct=[True, False, None, True, False, False])
    assert flags(filters.correct(judged)) == "+--+--"
    assert flags(filters.pass_rate(judged, low=0.4, high=0.4)) == "++++++"
    assert flags(filters.pass_rate(judged, low=0.41)) == "------"
    assert flags(filters.pass_rate(judged, high=0.39)) == "------"
    assert flags(filters.pass_rate(group(correct=[None] * 6))) == "------"
    ended = group(finish_reason=["stop", "length", "stop", "stop", "length", "stop"])
    assert flags(filters.finished(ended)) == "+-++-+"
    assert flags(filters.length(group(), min_tokens=2, max_tokens=4)) == "-+++--"
    assert flags(filters.length(group())) == "++++++"
    assert flags(filters.duplicates(group(completion=["a", "b", "a", "c", "b", "a"]))) == "++-+--"
    scored = group(
        reward=[0.5, None, 1.0, float("nan"), 1.0, 0.0],
        correct=[True, True, False, True, True, False],
    )
    assert flags(filters.best_of_n(scored)) == "----+-"
    assert flags(filters.best_of_n(scored, n=2)) == "--+-+-"
    assert flags(filters.best_of_n(scored, n=9)) == "+-+-++"


def test_best_of_n_by_a_named_reward():
    named = group(
        reward=[0.0] * 6,
        rewards={"format": [0.1, None, 0.3, 0.2, 0.3, float("nan")], "accuracy": [None] * 6},
        correct=[True, True, False, True, True, False],
    )
    assert flags(filters.best_of_n(named, reward="format")) == "----+-"
    assert flags(filters.best_of_n(named, n=3, reward="format")) == "--+++-"
    assert flags(filters.best_of_n(named, reward="accuracy")) == "------"
    with pytest.raises(UserError, match=r"no reward 'formt'\. Did you mean 'format'"):
        filters.best_of_n(named, reward="formt")


def test_near_duplicates_are_recognised_by_their_common_words():
    """Ten words, k of them changed: 2 (10 - k) / 20 of the words are common, in order."""
    base = "one two three four five six seven eight nine ten"
    texts = [
        base,
        base.replace("four", "FOUR"),
        base.replace("four", "4"),
        base.replace("four", "4").replace("nine", "9"),
        "ten nine eight seven six five four three two one",
        base + " eleven twelve",
    ]
    near = group(completion=texts)
    assert flags(filters.near_duplicates(near, threshold=0.95)) == "+-++++"
    assert flags(filters.near_duplicates(near)) == "+--++-"
    assert flags(filters.near_duplicates(near, threshold=0.79)) == "+---+-"
    assert flags(filters.near_duplicates(group(completion=["", "", "a", "b", "c", "a b"]))) == ("+-++++")


def test_near_duplicates_are_compared_with_kept_texts_only():
    """b is near a and dropped; c is near b but not near a, so it stays."""
    a = [f"w{n}" for n in range(20)]
    b = [*a[:18], "x", "y"]
    c = [*a[:16], "p", "q", "x", "y"]
    texts = [" ".join(words) for words in (a, b, c)]
    assert flags(filters.near_duplicates(group(completion=[*texts, "d", "e", "f"]))) == "+-++++"


def common(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence, by the table."""
    row = [0] * (len(b) + 1)
    for x in a:
        before = row
        row = [0]
        for n, y in enumerate(b):
            row.append(before[n] + 1 if x == y else max(before[n + 1], row[n]))
    return row[-1]


def test_near_duplicates_against_the_table_on_random_texts():
    rng = np.random.default_rng(3)
    dropped = 0
    for _ in range(150):
        threshold = float(rng.choice([0.55, 0.71, 0.83]))
        texts = [rng.choice(list("abcd"), rng.integers(0, 9)).tolist() for _ in range(6)]
        kept: list[list[str]] = []
        want = ""
        for words in texts:
            total = [len(words) + len(other) for other in kept]
            near = any(
                num == 0 or 2 * common(words, other) / num >= threshold for num, other in zip(total, kept, strict=True)
            )
            want += "-" if near else "+"
            kept += [] if near else [words]
        shown = group(completion=[" ".join(words) for words in texts])
        assert flags(filters.near_duplicates(shown, threshold=threshold)) == want
        dropped += want.count("-")
    assert 80 < dropped < 600


ENGLISH = "We are asked how many apples are left, so we take three away from the seven that he had."
PREFILLED = Template("prefilled", None, "{question}", templates.think_answer.extract, prefill="Let me see. <think>\n")
CHINESE = "我们需要先计算苹果的总数，然后再减去他吃掉的三个苹果，最后得到答案。"


def test_language_judges_the_reasoning_alone():
    texts = [
        f"<think>{ENGLISH}</think><answer>4</answer>",
        f"<think>{ENGLISH} {CHINESE}</think><answer>4</answer>",
        f"<think>{ENGLISH}</think>{CHINESE}",
        "<think>7 - 3 = 4</think><answer>4</answer>",
        CHINESE,
        f"<think>{ENGLISH} {CHINESE}",
    ]
    mixed = group(completion=texts)
    assert flags(filters.language(mixed)) == "+-++--"
    assert flags(filters.language(mixed, min_share=0.0)) == "++++++"
    assert flags(filters.language(mixed, target="zh")) == "---++-"
    with pytest.raises(UserError, match="language 'klingon' is not known"):
        filters.language(mixed, target="klingon")


@pytest.mark.timeout(60)
def test_a_model_that_repeats_a_letter_for_ever_is_judged_in_time():
    texts = ["a" * 100_000, "a." * 50_000, "a@" * 50_000, "\n" * 100_000, ""]
    assert flags(filters.language(group(completion=texts))) == "+++++"


@pytest.mark.parametrize("template", [templates.think_answer, templates.raw, PREFILLED], ids=lambda each: each.name)
def test_the_filter_and_the_reward_judge_the_same_span(template):
    texts = [
        f"<think>{ENGLISH}</think>{CHINESE}",
        f"{CHINESE} <think>{ENGLISH}</think>4",
        f"{ENGLISH} <think>{CHINESE}</think>4",
        f" <think>{ENGLISH} {CHINESE}",
        f"{ENGLISH}</think>{CHINESE}",
        f"{ENGLISH}</think>{CHINESE}</think>4",
        f"{CHINESE}</think><think>{ENGLISH}",
        f"{CHINESE} <think> {ENGLISH}",
        f"{ENGLISH} {CHINESE}",
        CHINESE,
    ]
    problem = Problem("p", "t", "q", ({"role": "user", "content": "q"},))
    ones = (1,) * len(texts)
    rewarded = Group(problem, template, tuple(template.prefill + text for text in texts), ones, ones, ones, 100)
    shares = rewards.language(rewarded)
    for start in range(0, len(texts), 5):
        six = group(completion=[*texts[start : start + 5], ""])
        for min_share in (0.2, 0.5, 0.9):
            want = [share >= min_share for share in shares[start : start + 5]]
            assert filters.language(six, min_share=min_share).tolist()[:5] == want


def test_reasoning_is_inside_think_or_before_its_end_or_everything():
    for text, want in {
        "<think>a</think>b": "a",
        "x <think>a</think>b</think>c": "a</think>b",
        "<think>a": "a",
        "a</think>b": "a",
        "a</think><think>b": "b",
        "a": "a",
        "<think></think>a": "",
        "": "",
    }.items():
        assert reasoning_of(text) == want


def test_paragraphs_and_code_blocks_of_the_reasoning():
    long = group(
        completion=[
            "<think>" + "a" * 10 + "\n\n" + "b" * 10 + "</think>" + "c" * 99,
            "<think>" + "a" * 11 + "\n\nb</think>c",
            "a b c d e f",
            "a b c\nd e f",
            "a b c\n \t\nd e f",
            "",
        ]
    )
    assert flags(filters.paragraphs(long, max_chars=10)) == "+---++"
    assert flags(filters.paragraphs(long, max_chars=None, max_words=3)) == "++--++"
    assert flags(filters.paragraphs(long)) == "++++++"
    code = group(
        completion=[
            "<think>plain `x`</think>```python\nx\n```",
            "<think>\n```\nx\n```\n</think>4",
            "<think>\n  ~~~py\nx\n```\n~~~\nand\n```\ny\n```\n</think>4",
            "never closed\n```py\nx",
            "````\n```\n````\n",
            "```\na\n```\n```\nb\n```\n```\nc",
        ]
    )
    assert flags(filters.code_blocks(code)) == "+-----"
    assert flags(filters.code_blocks(code, max_blocks=1)) == "++-++-"
    assert flags(filters.code_blocks(code, max_blocks=2)) == "+++++-"


def asking(*questions: str) -> Traces:
    messages = [({"role": "user", "content": text},) for text in questions]
    filler = [({"role": "user", "content": "filler"},)] * (6 - len(questions))
    return group(messages=messages + filler)


@pytest.mark.fault(28)
def test_decontaminate_by_the_whole_question_and_in_prose_by_ten_words():
    prose = [
        "Tom has seven apples and he gives three of them away to Ann. How many are left?",
        "What is two plus two?",
    ]
    asked = asking(
        "TOM has seven apples  and he gives three of them away to Ann. How many are left?",
        "Long ago: tom has seven apples -- and he gives three of (them). Why?",
        "Tom has seven apples and he gives three. What is two plus two, and why?",
        "what is two plus two?",
    )
    plain = HeldOut(prose, lambda text: " ".join(text.lower().split()), prose=True)

    def decontaminate(held_out: HeldOut, **options) -> str:
        return flags(filters.decontaminate(asked, held_out, against="x", **options))

    assert decontaminate(plain) == "--+-++"
    assert decontaminate(plain, ngram=8) == "----++"
    assert decontaminate(plain, ngram=11) == "-++-++"
    assert decontaminate(plain, ngram=0) == "-++-++"
    generated = HeldOut(prose, lambda text: " ".join(text.lower().split()), prose=False)
    assert decontaminate(generated, ngram=3) == "-++-++"


def test_the_module_is_the_registry():
    names = plug.names("distill.traces.filters")
    assert set(names) == {
        "correct",
        "finished",
        "length",
        "duplicates",
        "near_duplicates",
        "language",
        "paragraphs",
        "code_blocks",
        "decontaminate",
        "best_of_n",
        "pass_rate",
    }
    assert all(function.__doc__ for function in names.values())


@pytest.fixture
def stored(tmp_path):
    """40 traces, 4 samples a problem, the samples of a problem far apart."""
    with TraceWriter(tmp_path / "traces", samples.metadata(), shard_rows=8) as writer:
        for sample in range(4):
            writer.add(samples.traces(range(sample, 40, 4), samples=4))
    return tmp_path / "traces"


def keep(*names, **options) -> list[PlugConfig]:
    return [PlugConfig(fn=name, **options) for name in names]


def test_a_selection_reads_as_the_rows_that_every_filter_keeps(stored, tmp_path):
    result = select(stored, tmp_path / "clean", keep("correct", "finished"))
    want = [n for n in range(40) if n % 5 and n % 2 == 1 and n % 4 != 3]
    assert samples.row_digests(tmp_path / "clean") == samples.expected_digests(want, samples=4)
    assert open_traces(tmp_path / "clean").num_rows == result.kept == len(want)
    assert (result.rows, result.problems, result.problems_kept) == (
        40,
        10,
        len({n // 4 for n in want}),
    )
    correct, finished = result.filters
    assert correct.dropped == sum(not (n % 5 and n % 2 == 1) for n in range(40))
    assert finished.dropped == 10
    assert finished.alone == sum(n % 4 == 3 and n % 5 != 0 and n % 2 == 1 for n in range(40))
    assert "token limit" in str(result)
    assert verify(tmp_path / "clean").rows == 40
    files = {p.name for p in (tmp_path / "clean").iterdir()}
    assert files == {"keep.parquet", "dropped.parquet", "selection.json"}
    refused = pq.read_table(tmp_path / "clean" / "dropped.parquet").to_pylist()
    assert {row["trace_id"] for row in refused} == {f"trace{n:06d}" for n in {*range(40)} - {*want}}
    by = {row["trace_id"]: (row["problem_id"], row["by"]) for row in refused}
    assert by["trace000003"] == ("problem000000", ["finished"])
    assert by["trace000002"] == ("problem000000", ["correct"])
    assert by["trace000015"] == ("problem000003", ["correct", "finished"])
    assert finished.first == ("trace000003", "trace000007", "trace000011")
    assert "(trace000003, trace000007, trace000011, …)" in str(result)
    tree = json.loads((tmp_path / "clean" / "selection.json").read_text())
    assert tree["source"] == "../traces"
    lengths = open_traces(tmp_path / "clean").lengths().completion
    assert lengths.sum() == stats(tmp_path / "clean").completion_tokens


def test_filters_see_a_problems_whole_group_wherever_its_rows_are_stored(stored, tmp_path):
    select(stored, tmp_path / "best", keep("best_of_n", n=1))
    kept = open_traces(tmp_path / "best")
    problems = [p for block in kept.blocks() for p in block.problem_id]
    assert len(problems) == len(set(problems)) == 10
    for block in kept.blocks():
        for trace_id, reward in zip(block.trace_id, block.reward, strict=True):
            first = int(trace_id[5:]) // 4 * 4
            assert reward == max((n % 3) / 2 for n in range(first, first + 4) if n % 5)


def test_a_selection_of_a_selection(stored, tmp_path):
    select(stored, tmp_path / "one", keep("correct"))
    select(tmp_path / "one", tmp_path / "two", keep("finished"))
    select(stored, tmp_path / "both", keep("correct", "finished"))
    assert samples.row_digests(tmp_path / "two") == samples.row_digests(tmp_path / "both")
    shutil.copytree(tmp_path, tmp_path.parent / (tmp_path.name + "-moved"))
    moved = tmp_path.parent / (tmp_path.name + "-moved")
    assert samples.row_digests(moved / "two") == samples.row_digests(tmp_path / "both")
    assert content_fingerprint(moved / "two") == content_fingerprint(tmp_path / "two")
    assert content_fingerprint(tmp_path / "two") != content_fingerprint(tmp_path / "one")


def test_a_selection_whose_source_changed_is_refused(stored, tmp_path):
    select(stored, tmp_path / "clean", keep("correct"))
    with TraceWriter(stored, samples.metadata()) as writer:
        writer.add(samples.traces([77]))
    for look in (open_traces, verify):
        with pytest.raises(UserError, match="changed since"):
            look(tmp_path / "clean")


def test_a_damaged_selection_is_refused(stored, tmp_path):
    select(stored, tmp_path / "clean", keep("correct"))
    rows = (tmp_path / "clean" / "keep.parquet").read_bytes()
    (tmp_path / "clean" / "keep.parquet").write_bytes(rows[:50] + b"x" + rows[51:])
    with pytest.raises(UserError, match=r"keep\.parquet: damaged"):
        open_traces(tmp_path / "clean")
    text = (tmp_path / "clean" / "selection.json").read_text()
    (tmp_path / "clean" / "selection.json").write_text(text.replace("correct", "correkt"))
    with pytest.raises(UserError, match=r"selection\.json: damaged"):
        open_traces(tmp_path / "clean")


def nonsense(group: Traces) -> list[int]:
    return [1] * len(group)


@pytest.mark.parametrize(
    ("filters", "says"),
    [
        (keep("corect"), "Did you mean 'correct'"),
        (keep("length", max_token=3), "Did you mean 'max_tokens'"),
        (keep("length", max_tokens="many"), "keep.length.max_tokens"),
        (keep("length", min_tokens=-1), "keep.length.min_tokens"),
        (keep("best_of_n", n=0), "keep.best_of_n.n"),
        (keep("pass_rate", low=20), "keep.pass_rate.low"),
        (keep("length", min_tokens=10**6), "the filters drop every trace"),
        (keep("test_trace_filters:nonsense"), "4 booleans for 4 traces"),
        (keep("decontaminate", against="sums"), "keep.decontaminate.against: is required"),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(stored, tmp_path, filters, says):
    with pytest.raises(UserError, match=says):
        select(stored, tmp_path / "clean", filters)
    assert not (tmp_path / "clean").exists()


def test_a_selection_is_refused_in_its_sources_folder(stored):
    with pytest.raises(UserError, match="cannot be written into the folder of its traces"):
        select(stored, stored, keep("correct"))


def test_sft_export_is_chat_jsonl(stored, tmp_path):
    select(stored, tmp_path / "clean", keep("correct"))
    num = export_sft(tmp_path / "clean", tmp_path / "out" / "sft.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "out" / "sft.jsonl").read_text().splitlines()]
    assert num == len(rows) == open_traces(tmp_path / "clean").num_rows
    n = int(rows[0]["gold"])
    assert rows[0]["messages"] == [
        {"role": "user", "content": f"{n} + ⅓ = ?"},
        {"role": "assistant", "content": f"<think>{n}</think><answer>{n}</answer>"},
    ]
    plain = samples.metadata(prompt=PromptRecord(chat=False, plain="{question}"))
    with TraceWriter(tmp_path / "plain", plain) as writer:
        writer.add(samples.traces(range(4)))
    export_sft(tmp_path / "plain", tmp_path / "text.jsonl", style="text")
    first = json.loads((tmp_path / "text.jsonl").read_text().splitlines()[0])
    assert first["prompt"] == "0 + ⅓ = ?"


def test_merge_holds_every_trace_once_and_refuses_another_kind(stored, tmp_path):
    with TraceWriter(tmp_path / "more", samples.metadata()) as writer:
        writer.add(samples.traces(range(30, 50), samples=4))
    assert merge([stored, tmp_path / "more"], tmp_path / "all") == 50
    assert samples.row_digests(tmp_path / "all") == samples.expected_digests(range(50), samples=4)
    assert merge([stored, tmp_path / "more"], tmp_path / "all") == 0
    assert verify(tmp_path / "all").ok
    with TraceWriter(tmp_path / "other", samples.metadata(weights="w9")) as writer:
        writer.add(samples.traces([90]))
    with pytest.raises(UserError, match="weights"):
        merge([stored, tmp_path / "other"], tmp_path / "mixed")
