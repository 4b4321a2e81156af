"""Rows in the layouts that data sets have, as conversations; what is not understood is refused with its reason."""

from __future__ import annotations

import json
from typing import Any

import pytest

from distill.conversations import Reader
from distill.records import UserError

U = {"role": "user", "content": "What is 3+4?"}
A = {"role": "assistant", "content": "It is 7."}
THINK = {"role": "assistant", "content": "It is 7.", "reasoning_content": "three and four"}

ONE_TURN: dict[str, dict[str, Any]] = {
    "messages": {"messages": [U, A]},
    "ShareGPT": {"conversations": [{"from": "human", "value": U["content"]}, {"from": "gpt", "value": "It is 7."}]},
    "ShareGPT with roles": {"conversations": [U, A]},
    "prompt and completion": {"prompt": U["content"], "completion": "It is 7."},
    "prompt and response": {"prompt": U["content"], "response": "It is 7."},
    "TRL's conversational prompt": {"prompt": [U], "completion": [A]},
    "preference": {"prompt": U["content"], "chosen": "It is 7.", "rejected": "8"},
    "preference of conversations": {"chosen": [U, A], "rejected": [U, {**A, "content": "8"}]},
    "Alpaca": {"instruction": U["content"], "input": "", "output": "It is 7."},
    "Dolly": {"instruction": U["content"], "context": "", "response": "It is 7.", "category": "open_qa"},
    "OpenOrca": {"question": U["content"], "response": "It is 7."},
    "NuminaMath": {"source": "x", "problem": U["content"], "solution": "It is 7."},
    "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": U["content"]}]}, A]},
    "messages as JSON text": {"messages": json.dumps([U, A])},
    "nulls of a Parquet file": {
        "messages": [{**U, "tool_calls": None}, {**A, "reasoning_content": None}],
        "system": None,
    },
}


@pytest.mark.parametrize("name", ONE_TURN)
def test_a_question_and_its_reply(name: str) -> None:
    (found,) = Reader().read(ONE_TURN[name], 5)
    assert (found.messages, found.number) == ((U, A), 5)
    assert list(found.replies("all")) == [((U,), A)]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [U, THINK]},
        {"messages": [U, {"role": "assistant", "content": "It is 7.", "reasoning": "three and four"}]},
        {"messages": [U, {"role": "assistant", "content": "It is 7.", "thinking": "three and four"}]},
        {"question": U["content"], "response": "It is 7.", "reasoning": "three and four"},
        {"question": U["content"], "deepseek_thinking_trajectory": "three and four", "deepseek_attempt": "It is 7."},
        {"problem": U["content"], "deepseek_reasoning": "three and four", "deepseek_solution": "It is 7."},
    ],
)
def test_reasoning_beside_the_content(row: dict[str, Any]) -> None:
    assert Reader().read(row)[0].messages == (U, THINK)


def test_reasoning_in_another_family_s_marks() -> None:
    said = "<|begin_of_thought|>\n\nthree and four\n\n<|end_of_thought|>\n\n<|begin_of_solution|>\n\nIt is 7.\n\n<|end_of_solution|>"
    row = {
        "system": "Think.",
        "conversations": [{"from": "user", "value": U["content"]}, {"from": "assistant", "value": said}],
    }
    system, user, reply = Reader().read(row)[0].messages
    assert (system, user) == ({"role": "system", "content": "Think."}, U)
    assert reply["content"] == "<think>three and four</think>It is 7."


def test_several_generations_with_verdicts() -> None:
    row = {
        "problem": U["content"], "solution": "worked", "answer": "7", "messages": [U, A], "generations": ["a 7", "b 8", "c 7"],
        "correctness_math_verify": [True, False, True],
    }  # fmt: skip
    reader = Reader()
    found = reader.read(row)
    assert [each.messages[-1]["content"] for each in found] == ["a 7", "c 7"]
    assert [(each.part, each.answer) for each in found] == [(0, "7"), (2, "7")]
    assert reader.wrong == 1
    assert len(Reader(keep_wrong=True).read(row)) == 3


def test_a_generation_is_wrong_if_every_verdict_of_its_row_says_so() -> None:
    row = {
        "problem": U["content"],
        "generations": ["a", "b"],
        "correctness_math_verify": [False, False],
        "correctness_llama": [True, False],
    }
    assert [each.messages[-1]["content"] for each in Reader().read(row)] == ["a"]


def test_generations_in_numbered_columns() -> None:
    row = {
        "question": U["content"],
        "final_answer": "7",
        "r1_solution_1": "one",
        "r1_solution_2": "two",
        "difficulty": 5,
    }
    assert [(each.messages[-1]["content"], each.answer) for each in Reader().read(row)] == [("one", "7"), ("two", "7")]


def test_golds_wherever_they_stand() -> None:
    dapo = {"prompt": [U], "reward_model": {"ground_truth": "7", "style": "rule"}, "extra_info": {"index": "1"}}
    assert Reader().read(dapo)[0].answer == "7"
    assert Reader().read(dapo)[0].reply is None
    gsm8k = Reader().read({"question": U["content"], "answer": "3+4=<<3+4=7>>7\n#### 7"})[0]
    assert gsm8k.reply == {"role": "assistant", "content": "3+4=<<3+4=7>>7\n#### 7"}
    short = Reader().read({"question": U["content"], "answer": "7"})[0]
    assert (short.reply, short.answer) == (None, "7")
    limo = Reader().read({"question": U["content"], "solution": "It is 7.", "answer": "7"})[0]
    assert (limo.reply, limo.answer) == (A, "7")
    assert Reader().read({"question": U["content"], "final_answer": ["6", "8"]})[0].answer == ["6", "8"]


def test_the_case_of_a_columns_name_does_not_matter() -> None:
    """AIME_2024 has capitals, exports of spreadsheets have spaces; a name as the layouts have it comes first."""
    aime = Reader().read({"ID": "1", "Problem": U["content"], "Solution": "It is 7.", "Answer": 7})[0]
    assert (aime.messages, aime.answer) == ((U, A), 7)
    sheet = Reader().read({"Question ": U["content"], "Final Answer": "7"})[0]
    assert (sheet.messages, sheet.answer) == ((U,), "7")
    both = Reader().read({"Answer": "8", "question": U["content"], "answer": "7", "ANSWER": "9"})[0]
    assert both.answer == "7"
    (chat,) = Reader().read({"Messages": json.dumps([U, A])})
    assert chat.messages == (U, A)
    with pytest.raises(ValueError, match="there is no 'question'"):
        Reader({"question": "question"}).read({"Question": U["content"]})


def test_fields_name_the_columns_of_any_other_layout() -> None:
    row = {"meta": {"q": U["content"]}, "runs": [{"text": "It is 7.", "why": "three and four"}], "key": {"a": [7]}}
    fields = {"question": "meta.q", "reply": "runs.0.text", "reasoning": "runs.0.why", "answer": "key.a.0"}
    (found,) = Reader(fields).read(row)
    assert (found.messages, found.answer) == ((U, THINK), 7)
    with pytest.raises(ValueError, match=r"there is no 'wy' in 'runs.0.wy' \(there are: text, why\)"):
        Reader({**fields, "reasoning": "runs.0.wy"}).read(row)
    with pytest.raises(UserError, match="Did you mean 'question'"):
        Reader({"questoin": "a"})


def test_every_turn_of_the_assistant_and_no_other() -> None:
    tool = {"type": "function", "function": {"name": "add", "arguments": {"a": 3}}}
    row = {
        "messages": [
            {"role": "developer", "content": "Use tools."}, U,
            {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 3}'}}]},
            {"role": "tool", "content": "7"}, A, {"role": "user", "content": "Thanks"}, {"role": "assistant", "content": "Welcome"},
        ],
        "tools": [tool],
    }  # fmt: skip
    (found,) = Reader().read(row)
    replies = list(found.replies("all"))
    assert [reply["content"] for _, reply in replies] == ["", "It is 7.", "Welcome"]
    assert [len(before) for before, _ in replies] == [2, 4, 6]
    assert replies[0][1]["tool_calls"] == [tool]
    assert [reply["content"] for _, reply in found.replies("last")] == ["Welcome"]
    assert found.messages[0]["role"] == "developer"
    assert found.tools == [tool]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, "no known layout: its columns are none"),
        ({"text": "just prose"}, "plain text has no reply"),
        ({"completion": "7"}, "a column of questions is missing"),
        ({"question": 3}, "no known layout"),
        ({"messages": []}, "not a list of messages"),
        ({"messages": [A]}, "no user's message"),
        ({"messages": [A, U, A]}, "begins with the assistant"),
        ({"messages": [{"role": "me", "content": "a"}]}, "role is 'me', not one of"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, A]}, "a part of type 'image'"),
        ({"messages": [U, {"role": "assistant", "content": "   \n"}]}, "is empty"),
        ({"messages": [U, {"role": "assistant", "content": {"a": 1}}]}, "content is dict"),
        (
            {
                "messages": [
                    U,
                    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
                ]
            },
            "not JSON",
        ),
    ],
)
def test_what_is_no_conversation_is_refused_with_its_reason(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Reader().read(row)
