"""Properties that hold for any input: data files, shards' metadata, answers, templates, packing over processes.

The fast tests try a few hundred examples of each, the slow one thousands; both the same ones every time.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from changed_trees import changed, places
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distill import models
from distill.records import UserError, Verdict
from distill.tasks import templates
from distill.tasks.jsonl_task import jsonl
from distill.tasks.judge import verdict as judging
from distill.traces.reader import open_traces
from distill.traces.schema import Metadata
from distill.training.packing import Example, pack

FEW = settings(max_examples=150, deadline=None, derandomize=True, database=None, suppress_health_check=[*HealthCheck])
MANY = settings(FEW, max_examples=2000)
GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "v1"

scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20))
trees = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def is_message(error: UserError, words: str = "") -> None:
    assert str(error).strip()
    assert words in str(error)
    assert len(str(error)) < 5000


# ------------------------------------------------------------------------------------------------ data files

KEYS = ["question", "answer", "prompt", "completion", "messages", "problem", "solution", "response", "conversations", "instruction", "output", "input"]  # fmt: skip
roles = st.sampled_from(["user", "assistant", "system", "human", "gpt", "tool", "", "?"])
turns = st.lists(
    st.fixed_dictionaries({"role": roles, "content": st.text(max_size=12)})
    | st.fixed_dictionaries({"from": roles, "value": st.text(max_size=12)})
    | trees,
    max_size=4,
)
rows = st.dictionaries(st.sampled_from(KEYS), st.text(max_size=16) | st.integers() | turns | trees, max_size=4)
lines = st.one_of(
    rows.map(lambda row: json.dumps(row).encode()),
    rows.map(lambda row: json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass")),
    st.binary(max_size=30),
    st.text(max_size=30).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.just(b'{"question": "1 + 1?", "answer": "2"}'),
)


def file_is_problems_or_a_message(content: list[bytes], folder: Path) -> None:
    path = folder / "any.jsonl"
    path.write_bytes(b"\n".join(content))
    try:
        task = jsonl("any", path=str(path))
        found = {split: list(task.problems(split, None, 0)) for split in ("train", "held_out") if _has(task, split)}
    except UserError as error:
        is_message(error)
        return
    ids = [problem.problem_id for problems in found.values() for problem in problems]
    assert ids
    assert len(ids) == len({*ids})
    for problem in (problem for problems in found.values() for problem in problems):
        assert problem.question.strip() or problem.messages
        assert problem.gold
        assert task.holds_out(problem.question) == (problem in found.get("held_out", []))
    assert all(number >= 1 and reason for number, reason in task.rejected)


def _has(task: Any, split: str) -> bool:
    return bool(task._problems().by_split[split])


# ------------------------------------------------------------------------------------------------- metadata

STORED = open_traces(GOLDEN).metadata.tree()


@st.composite
def metadatas(draw: Any) -> str:
    tree: Any = STORED
    for _ in range(draw(st.integers(1, 2))):
        tree = changed(tree, draw(st.sampled_from(places(tree))), draw(trees), draw(st.booleans()))
        if not isinstance(tree, dict):
            break
    text = json.dumps(tree)
    return text[: draw(st.integers(0, len(text)))] if draw(st.integers(0, 9)) == 0 else text


def metadata_is_read_or_a_message(text: str) -> None:
    try:
        found = Metadata.parse(text, "shard")
    except UserError as error:
        is_message(error, "shard")
        return
    assert Metadata.parse(found.to_json(), "again") == found


# -------------------------------------------------------------------------------------------------- answers

numbers = st.one_of(
    st.integers(-(10**6), 10**6).map(str),
    st.tuples(st.integers(-999, 999), st.integers(1, 999)).map(lambda p: f"\\frac{{{p[0]}}}{{{p[1]}}}"),
    st.tuples(st.integers(-999, 999), st.integers(1, 999)).map(lambda p: f"{p[0]}/{p[1]}"),
    st.decimals(-1000, 1000, places=3).map(str),
    st.integers(1, 50).map(lambda n: f"{n}\\%"),
    st.lists(st.integers(-9, 9), min_size=2, max_size=3).map(lambda v: f"({', '.join(map(str, v))})"),
    st.sampled_from(["x", "\\text{yes}", "A", "[0, 1)", "\\pi", "2\\pi", "\\sqrt{2}", "\\{1, 2\\}"]),
)
noise = st.text(st.sampled_from(list("0123456789+-*/^_{}()[]\\ .,%$xyabfracsqrtpi=<>|")), max_size=24)


def judge_is_lawful(one: str, other: str) -> None:
    mine = judging.math_verdict(one, one)
    assert isinstance(mine, Verdict)
    if judging.why_unreadable(one) is None:
        assert mine.correct is not False, f"{one!r} is not itself"
    there, back = judging.math_verdict(one, other), judging.math_verdict(other, one)
    readable = judging.why_unreadable(one) is None and judging.why_unreadable(other) is None
    if readable and _plain(one) and _plain(other) and ("/" in one) == ("/" in other):
        assert there.correct == back.correct, (one, other)
    assert judging.exact_verdict(one, one).correct is True
    assert judging.exact_verdict(one, other).correct == judging.exact_verdict(other, one).correct


def _plain(answer: str) -> bool:
    """Whether an answer is a bare number: notation that only one side may have (names, units, percent) makes the judge one-sided, as a
    fraction that is left for the reader to compute does."""
    return not any(sign in answer for sign in "=<>|%[{(xyab\\")


texts = st.lists(
    st.sampled_from(
        ["<think>", "</think>", "<answer>", "</answer>", "\\boxed{", "}", "{", "12", " ", "\n", "#### 7", "yes", "\\"]
    ),
    max_size=14,
).map("".join)


def extraction_is_total(text: str, answer: str) -> None:
    for template in templates.TEMPLATES.values():
        found = template.extract(text)
        assert found is None or found.strip()
        if "<think>" in text.rpartition("</think>")[2]:
            assert found is None
    closed = text + ("</think>" if "<think>" in text.rpartition("</think>")[2] else "")
    if templates.think_answer.extract("<answer>" + answer + "</answer>") == answer:
        assert templates.think_answer.extract(f"{closed}<answer>{answer}</answer>") == answer


# ------------------------------------------------------------------------------------------- chat templates

pieces = st.sampled_from([
    "{{ m['content'] }}", "{{ m['role'] }}", "<|im_start|>", "<|im_end|>", "\n", "<think>\n", "</think>", "{{ bos_token }}", "{{ eos_token }}",
    "{% if m['role'] == 'assistant' %}{{ m['content'].split('</think>')[-1] }}{% endif %}", "{{ raise_exception('no') }}", "{{ 1 / 0 }}",
    "{{ m['nothing']['there'] }}", "{% if loop.last %}end{% endif %}", "{{ m.content | trim }}", "{% if", "{{ m['content'] | upper }}",
])  # fmt: skip


def chat_of(parts: tuple[list[str], list[str]]) -> str:
    """A chat template of some pieces in its loop, and some behind the assistant's header."""
    turn, header = "".join(parts[0]), "".join(parts[1]).replace("m[", "messages[0][")
    loop = "{% for m in messages %}" + turn + "{% endfor %}"
    return loop + "{% if add_generation_prompt %}<|im_start|>assistant\n" + header + "{% endif %}"


chats = st.tuples(st.lists(pieces, max_size=5), st.lists(pieces, max_size=2)).map(chat_of)


def template_is_rendered_or_refused(tokenizer: Any, chat: str, answer: str) -> None:
    tokenizer.chat_template = chat
    messages = ({"role": "user", "content": "What is 12 + 30?"},)
    reply = {"role": "assistant", "content": f"<think>\nI add.\n</think>\n\n{answer}"}
    try:
        prompt = models.prompt_text(tokenizer, templates.boxed, messages)
        ids = models.render_reply(tokenizer, templates.boxed, messages, reply)
    except UserError as error:
        is_message(error)
        return
    assert "What is 12 + 30?" in prompt
    said = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    whole = prompt + said
    assert "I add." in said
    assert answer.strip() in said
    assert whole.count("I add.") == 1


# -------------------------------------------------------------------------------------------------- packing

lengths = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 12)), min_size=1, max_size=14)


def packing_is_complete(sizes: list[tuple[int, int]], world: int, micro: int, normalise: Any) -> None:
    examples = [
        Example(str(n), np.arange(prompt, dtype=np.int32) + n, np.arange(reply, dtype=np.int32) + 100 * n)
        for n, (prompt, reply) in enumerate(sizes)
    ]
    ranks = [pack(examples, micro_tokens=micro, rank=rank, world=world, normalise=normalise) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    every = [batch for batches in ranks for batch in batches]
    assert len({batch.denominator for batch in every}) == 1
    seen: dict[str, int] = {}
    for batch in every:
        assert len(batch.ids_T) <= max(micro, max(sum(size) for size in sizes))
        bounds = batch.doc_offsets
        for trace_id, start, end in zip(batch.trace_ids, bounds, bounds[1:], strict=False):
            learned = int((batch.weight_T[start:end] > 0).sum())
            if learned:
                seen[trace_id] = seen.get(trace_id, 0) + learned
    assert seen == {str(n): reply for n, (_, reply) in enumerate(sizes) if reply}
    total = sum(float(batch.weight_T.sum()) for batch in every)
    wanted = sum(reply for _, reply in sizes) if normalise == "token" else sum(reply > 0 for _, reply in sizes)
    assert total == pytest.approx(wanted, rel=1e-5)


# ---------------------------------------------------------------------------------------------------- tests


@pytest.fixture(scope="module")
def own_tokenizer(tiny_dir):
    return models.load_tokenizer(tiny_dir)


PROPERTIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "files": (file_is_problems_or_a_message, {"content": st.lists(lines, max_size=6)}),
    "metadata": (metadata_is_read_or_a_message, {"text": metadatas()}),
    "judge": (judge_is_lawful, {"one": numbers | noise, "other": numbers}),
    "extraction": (extraction_is_total, {"text": texts, "answer": numbers}),
    "templates": (template_is_rendered_or_refused, {"chat": chats, "answer": numbers}),
    "packing": (
        packing_is_complete,
        {"sizes": lengths, "world": st.integers(1, 4), "micro": st.integers(8, 40), "normalise": st.sampled_from(["token", "sequence"])},
    ),
}  # fmt: skip


def check(name: str, how: settings, folder: Path, tokenizer: Any) -> None:
    holds, given_ = PROPERTIES[name]
    fixed: dict[str, Any] = {"files": {"folder": folder}, "templates": {"tokenizer": tokenizer}}.get(name, {})

    @how
    @given(**given_)
    def tried(**values: Any) -> None:
        holds(**values, **fixed)

    tried()


@pytest.mark.parametrize("name", PROPERTIES)
def test_properties_hold(name, tmp_path, own_tokenizer):
    check(name, FEW, tmp_path, own_tokenizer)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", PROPERTIES)
def test_properties_hold_in_thousands_of_examples(name, tmp_path, own_tokenizer):
    check(name, MANY, tmp_path, own_tokenizer)


def test_a_metadata_field_that_is_not_known_is_refused():
    with pytest.raises(UserError, match="shard"):
        Metadata.parse({**STORED, "unknown": 1}, "shard")
    assert dataclasses.is_dataclass(Example)
