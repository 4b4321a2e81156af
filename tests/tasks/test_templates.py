"""Extraction: the answer after the last </think>, the last matched box, and never an exception."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill import models
from distill.records import Template, UserError
from distill.tasks import templates
from distill.tasks.judge.verdict import exact_verdict, judge

PREFILLED = Template("prefilled", None, "{question}", templates.think_answer.extract, prefill="<think>")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>2+2</think><answer>4</answer>", "4"),
        ("<think>2+2</think>\n<answer>\n 4 \n</answer>\n", "4"),
        ("2+2</think><answer>4</answer>", "4"),
        ("<answer>4</answer>", "4"),
        ("<think>a</think><answer>3</answer> no, <answer>4</answer>", "4"),
        ("<think>a</think><answer>3 <answer>4</answer>", "4"),
        ("<think>a</think>b</think><answer>4</answer>", "4"),
        ("<think>a</think><answer>\\boxed{4}</answer>", "4"),
        ("<think>a</think><answer>1 2\n3 4</answer>", "1 2\n3 4"),
        ("<think><answer>4</answer>", None),
        ("<think>a</think><think><answer>4</answer>", None),
        ("<think><answer>4</answer></think>", None),
        ("<think>a</think><answer>4", None),
        ("<think>a</think><answer> </answer>", None),
        ("<think>a</think>4", None),
        ("", None),
    ],
)
@pytest.mark.fault(22)
def test_think_answer_reads_the_last_answer_after_the_thinking(text, answer):
    assert templates.think_answer.extract(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{4}", "4"),
        (r"\boxed{3}, no: \boxed{4}.", "4"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ 1 \right.}", r"\left\{ 1 \right."),
        (r"\boxed{x = \boxed{4}}", "4"),
        (r"\boxed {4}", "4"),
        (r"\fbox{4}", "4"),
        (r"} \boxed{{4}} {", "{4}"),
        (r"\boxed{3} " + r"\boxed{" * 100_000, "3"),
        (r"\boxed{3} or \boxed{4", "3"),
        (r"<think>\boxed{3}</think> it is \boxed{4}", "4"),
        (r"<think>\boxed{3}</think> it is 4", None),
        (r"<think>\boxed{3}", None),
        (r"\boxed{}", None),
        (r"\boxed 4", None),
        ("4", None),
    ],
)
def test_boxed_reads_the_last_matched_box_after_the_thinking(text, answer):
    assert templates.boxed.extract(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("3 + 4 is 7", "7"),
        ("The answer is 1,234.", "1,234"),
        ("It costs -2.50", "-2.50"),
        ("1/2", "1/2"),
        ("a7 7b", "7"),
        ("\nyes\n", "yes"),
        ("<think>7</think> 8", "8"),
        ("<think>7", None),
        ("  \n", None),
    ],
)
def test_raw_reads_the_last_number_or_line(text, answer):
    assert templates.raw.extract(text) == answer


TAGS = st.sampled_from(["<think>", "</think>", "<answer>", "</answer>", "\\boxed{", "{", "}", "\\", "7", " x ", "\n"])


@given(st.one_of(st.text(), st.lists(TAGS, max_size=12).map("".join)))
def test_extraction_never_raises_and_never_returns_nothing(text):
    for template in templates.TEMPLATES.values():
        answer = template.extract(text)
        assert answer is None or answer.strip()


@given(st.text(), st.integers())
def test_an_answer_after_whatever_was_thought_is_found(thought, number):
    assert templates.think_answer.extract(f"<think>{thought}</think><answer>{number}</answer>") == str(number)
    assert templates.boxed.extract(f"<think>{thought}</think>\\boxed{{{number}}}") == str(number)


@pytest.mark.fault(10)
def test_a_prefilled_think_counts_whether_or_not_the_completion_repeats_it():
    def verdict(text):
        return judge(PREFILLED, text, True, lambda answer: exact_verdict(answer, "4"))

    assert verdict("2+2</think><answer>4</answer>").correct is True
    assert verdict("<think>2+2</think><answer>4</answer>").correct is True
    assert verdict("2+2 <answer>4</answer>").reason == "no answer"


def test_unfinished_is_wrong_whatever_it_says():
    verdict = judge(templates.think_answer, "<answer>4</answer>", False, lambda a: exact_verdict(a, "4"))
    assert (verdict.correct, verdict.score, verdict.reason) == (False, 0.0, "unfinished")


def test_templates_are_found_by_name_or_import():
    assert templates.find("boxed") is templates.boxed
    assert templates.find("distill.tasks.templates:raw") is templates.raw
    with pytest.raises(UserError, match=r"tasks.sums.template: there is no template 'boxd'. Did you mean 'boxed'"):
        templates.find("boxd", "tasks.sums.template")
    with pytest.raises(UserError, match="cannot import 'nowhere:x'"):
        templates.find("nowhere:x")
    with pytest.raises(UserError, match="is a dict, not a"):
        templates.find("distill.tasks.templates:TEMPLATES")


def test_every_template_has_one_place_for_the_question():
    for template in templates.TEMPLATES.values():
        assert template.plain.count("{question}") == 1


def test_r1_zero_takes_a_bare_number_until_the_tags_come():
    extract = templates.r1_zero.extract
    assert extract("The answer is 12.") == "12"
    assert extract("<think>5 + 7</think> <answer>12</answer> 13") == "12"
    assert extract("<think>5 + 7 = 12") is None
    assert templates.r1_zero.plain == templates.think_answer.plain
    assert templates.r1_zero.plain.startswith(templates.r1_zero.system)


def test_a_direct_question_has_its_answer_in_any_usual_mark():
    direct = templates.find("direct")
    assert (direct.system, direct.plain, direct.chat) == (None, "{question}", True)
    assert not templates.find("direct_plain").chat
    assert not templates.find("boxed_plain").chat
    for completion, answer in [
        ("<think>1 + 1</think>2", "2"),
        ("So it is \\boxed{2}.", "2"),
        ("Two.\n#### 2", "2"),
        ("<answer>2</answer>", "2"),
        (" a whole text ", "a whole text"),
        ("<think>never closed", None),
        ("<think>a</think>", None),
    ]:
        assert direct.extract(completion) == answer


def text(**fields):
    return templates.find(fields, "tasks.sums.template")


@pytest.mark.parametrize(
    ("answer", "reply", "found"),
    [
        ("boxed", r"<think>\boxed{1}</think> so \boxed{42}", "42"),
        ("tags", "<answer> 42 </answer>", "42"),
        ("tags_or_number", "it is 42.", "42"),
        ("last_number", "7 and 42 apples", "42"),
        ("last_line", "Because.\n\n  forty-two \n", "forty-two"),
        ("last_line", "<think>open", None),
        ("json", 'First {"answer": 1}, then {"why": {"answer": 7}, "answer": "42"} {"end": 0}', "42"),
        ("json", '{"answer": [1, 2.5]}', "[1, 2.5]"),
        ("json", '{"answer": false}', "false"),
        ("json", '{"answer": "' + "{" * 5000, None),
        ("json", "<think>{}</think>none", None),
        ("any_mark", "Two.\n#### 42", "42"),
        ("all", "<think>no</think> yes ", " yes "),
        (r"Answer:\s*(.+)", "<think>Answer: 1</think>Answer: 2\nAnswer: 42 \nBye", "42"),
        (r"(?:Answer|Result) = (\d+)", "Result = 42", "42"),
        (r"Answer:\s*(.*)", "Answer: ", None),
        (r"(x+x+)+y", "x" * 60, None),  # exponential: given up after a second
    ],
)
def test_a_text_says_where_the_answer_is(answer, reply, found):
    assert text(answer=answer).extract(reply) == found


def test_a_text_is_a_template():
    plain = text(system="Be short.", answer="boxed")
    assert (plain.system, plain.plain, plain.chat) == ("Be short.", "Be short.\n\n{question}\n", True)
    assert plain.name == '{"system": "Be short.", "answer": "boxed"}'
    again = templates.find(plain.name)  # as the traces' metadata has it
    assert templates.fingerprint(again) == templates.fingerprint(plain)
    assert again.extract(r"\boxed{4}") == "4"
    whole = text(question="Q: {question}?", plain="{question} =", prefill="<think>", answer="last_number", chat=True)
    assert (whole.question, whole.plain, whole.prefill) == ("Q: {question}?", "{question} =", "<think>")
    with templates.given_options({"enable_thinking": False}):
        assert text(answer="boxed").options == {"enable_thinking": False}
    prints = {
        templates.fingerprint(text(answer=a, question=q))
        for a in ("boxed", "tags")
        for q in ("{question}", "{question}?")
    }
    assert len(prints) == 4


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"system": "x"}, "tasks.sums.template.answer: is required."),
        ({"answer": "boxd"}, "tasks.sums.template.answer: there is no answer 'boxd'. Did you mean 'boxed'?"),
        ({"answer": "(a)(b)"}, "tasks.sums.template.answer: the regular expression has 2 groups"),
        ({"answer": "(a"}, "tasks.sums.template.answer: not a regular expression"),
        ({"answer": "boxed", "question": "Solve it."}, "tasks.sums.template: question: write {question} once"),
        ({"answer": "boxed", "plain": "{question}{question}"}, "tasks.sums.template: plain: write {question} once"),
        ({"answer": "boxed", "sytem": "x"}, "tasks.sums.template.sytem: unknown key. Did you mean 'system'?"),
        (
            {"answer": "boxed", "chat": False, "plain": "{question}", "system": "x"},
            "tasks.sums.template: system: with chat: false and `plain`, that is the whole prompt",
        ),
    ],
)
def test_mistakes_in_a_text_are_one_line(fields, said):
    with pytest.raises(UserError) as raised:
        text(**fields)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_the_question_is_in_the_form_of_the_text(tokenizer):
    template = text(system="Be short.", question="Q: {question} Think!", prefill="So", answer="boxed")
    earlier = ({"role": "user", "content": "1?"}, {"role": "assistant", "content": "2"})
    said = models.prompt_text(tokenizer, template, (*earlier, {"role": "user", "content": "6 * 7 = ?"}))
    assert "Be short." in said
    assert "user\n1?<" in said
    assert "user\nQ: 6 * 7 = ? Think!<" in said
    assert said.endswith("assistant\nSo")
