"""Chat templates of many families, as TRL ships them, on a real tokenizer with the special tokens that they write."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from chat_families import FAMILIES, family_tokenizer, source, with_template
from transformers import AutoTokenizer

from distill import models
from distill.reasoning import canonical, reasoning_of
from distill.records import Template, UserError
from distill.tasks import templates

SWITCHED_OFF = {"qwen3_5_nothink"}
ASK = ({"role": "user", "content": "What is 3+4?"},)
PLAIN = Template("t", system=None, plain="{question}", extract=lambda text: text)
SYSTEM = replace(PLAIN, system="Reply with INSTRUCTION-XYZ.")


def _text(tokenizer: Any, ids: Any) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False))


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_hold_every_message_once(family: str, smollm2_dir: Any) -> None:
    tokenizer = family_tokenizer(smollm2_dir, family)
    prompt = _text(tokenizer, models.render_prompt(tokenizer, PLAIN, ASK))
    plain = tokenizer.apply_chat_template([dict(m) for m in ASK], tokenize=False, add_generation_prompt=True)
    assert prompt == plain or "What is 3+4?" not in plain  # templates that read parts only
    assert prompt.count("What is 3+4?") == 1
    with_system = _text(tokenizer, models.render_prompt(tokenizer, SYSTEM, ASK))
    assert with_system.count("INSTRUCTION-XYZ") == 1
    turns = (*ASK, {"role": "assistant", "content": "It is 7."}, {"role": "user", "content": "And twice that?"})
    whole = _text(tokenizer, models.render_prompt(tokenizer, SYSTEM, turns))
    assert [whole.count(text) for text in ("What is 3+4?", "It is 7.", "And twice that?", "INSTRUCTION-XYZ")] == [1] * 4


REPLIES = (
    {"content": "<think>\nthree and four\n</think>\n\nIt is 7."},
    {"content": "<think>three and four</think>It is 7."},
    {"content": "It is 7.", "reasoning_content": "three and four"},
    {"content": "It is 7.", "thinking": "three and four"},
)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.fault(10)
def test_replies_hold_reasoning_and_answer_once_and_end_at_a_stop_token(
    family: str, smollm2_dir: Any, tmp_path: Any
) -> None:
    tokenizer = family_tokenizer(smollm2_dir, family)
    begun = models.opened_thinking(tokenizer, PLAIN)
    stops = models.stop_ids(tmp_path, tokenizer)
    answer = models.render_reply(tokenizer, PLAIN, ASK, {"content": "It is 7."})
    assert int(answer[-1]) in stops
    assert canonical(begun + models.decode(tokenizer, answer)).rpartition("</think>")[2].strip().endswith("It is 7.")
    for reply in REPLIES:
        if family in SWITCHED_OFF:
            with pytest.raises(UserError, match="switches thinking off"):
                models.render_reply(tokenizer, PLAIN, ASK, reply)
            continue
        ids = models.render_reply(tokenizer, PLAIN, ASK, reply)
        assert int(ids[-1]) in stops
        text = canonical(begun + models.decode(tokenizer, ids))
        assert (text.count("<think>"), text.count("</think>")) == (1, 1), text
        assert reasoning_of(text).strip() == "three and four"
        assert text.rpartition("</think>")[2].strip().endswith("It is 7.")
        cut = models.render_reply(tokenizer, PLAIN, ASK, reply, finished=False)
        assert int(cut[-1]) not in stops
        assert _text(tokenizer, cut).strip().endswith("It is 7.")


@pytest.mark.parametrize("family", ["qwen3", "qwen3_5_think", "deepseek_r1_distill", "gptoss", "llama3_2"])
def test_the_format_reward_can_be_one_whatever_the_family_opens(family: str, smollm2_dir: Any) -> None:
    from distill.records import Group, Problem, Verdict
    from distill.stages.sampling import Grader
    from distill.tasks.rewards import think_format

    class OneTask:
        template = templates.find("think_answer")
        judge = staticmethod(lambda problem, text, finished: Verdict(True, 1.0, "7"))

    tokenizer = family_tokenizer(smollm2_dir, family)
    grader = Grader.of(OneTask(), tokenizer)  # type: ignore[arg-type]
    reply = {"content": "<think>three and four</think><answer>7</answer>"}
    text = grader.seen(models.decode(tokenizer, models.render_reply(tokenizer, OneTask.template, ASK, reply)))
    problem = Problem("p", "t", "What is 3+4?", ASK, "7")
    group = Group(problem, OneTask.template, (text,), (9,), (True,), (Verdict(True, 1.0, "7"),), 64)
    assert think_format(group) == [1.0], text
    assert OneTask.template.extract(text) == "7"


def test_a_switch_is_passed_on_and_an_option_that_is_not_read_is_refused(smollm2_dir: Any) -> None:
    tokenizer = with_template(smollm2_dir, source("qwen3"))
    off = replace(PLAIN, options={"enable_thinking": False})
    assert "<think>\n\n</think>" in _text(tokenizer, models.render_prompt(tokenizer, off, ASK))
    assert "<think>" not in _text(tokenizer, models.render_prompt(tokenizer, PLAIN, ASK))
    with pytest.raises(UserError, match=r"template_options.enable_thinkin: .* reads .*enable_thinking"):
        models.render_prompt(tokenizer, replace(PLAIN, options={"enable_thinkin": False}), ASK)


def test_one_of_several_named_templates_is_chosen(smollm2_dir: Any) -> None:
    tokenizer = with_template(
        smollm2_dir, {"plain": "{{ messages[0].content }}!", "rag": "RAG {{ messages[0].content }}"}
    )
    with pytest.raises(UserError, match="choose one of plain, rag"):
        models.render_prompt(tokenizer, PLAIN, ASK)
    chosen = replace(PLAIN, options={"chat_template": "rag"})
    assert _text(tokenizer, models.render_prompt(tokenizer, chosen, ASK)) == "RAG What is 3+4?"


def test_a_date_in_a_template_is_the_pinned_one(smollm2_dir: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from distill.models import chat_template

    monkeypatch.setattr(chat_template, "_pinned", None)
    tokenizer = with_template(smollm2_dir, "{{ strftime_now('%d %b %Y') }} {{ messages[0].content }}")
    models.pin_date("2024-02-29")
    assert _text(tokenizer, models.render_prompt(tokenizer, PLAIN, ASK)) == "29 Feb 2024 What is 3+4?"
    assert models.chat_template_of(tokenizer, PLAIN).has_date


def test_tools_are_passed_on_or_refused(smollm2_dir: Any) -> None:
    tool = {
        "type": "function",
        "function": {"name": "add_up", "description": "Adds.", "parameters": {"type": "object", "properties": {}}},
    }
    tokenizer = with_template(smollm2_dir, source("qwen3"))
    assert "add_up" in _text(tokenizer, models.render_prompt(tokenizer, PLAIN, ASK, [tool]))
    call = {"content": "", "tool_calls": [{"type": "function", "function": {"name": "add_up", "arguments": {"a": 3}}}]}
    assert "add_up" in _text(tokenizer, models.render_reply(tokenizer, PLAIN, ASK, call, [tool]))
    without = with_template(smollm2_dir, "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    with pytest.raises(UserError, match="does not read tools"):
        models.render_prompt(without, PLAIN, ASK, [tool])
    with pytest.raises(UserError, match="does not render the tool calls"):
        models.render_reply(without, PLAIN, ASK, call)


def test_a_template_that_leaves_a_message_out_or_refuses_it_is_one_message(smollm2_dir: Any) -> None:
    last_only = with_template(smollm2_dir, "{{ messages[-1].content }}")
    turns = (*ASK, {"role": "assistant", "content": "7"}, {"role": "user", "content": "And?"})
    with pytest.raises(UserError, match="leaves out a message of role 'user'"):
        models.render_prompt(last_only, PLAIN, turns)
    gemma = with_template(smollm2_dir, source("gemma"))
    with pytest.raises(UserError, match="refuses the conversation"):
        models.render_prompt(gemma, PLAIN, (*ASK, *ASK))


def test_a_base_model_gets_its_bos_and_all_turns(smollm2_dir: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    tokenizer.chat_template = None
    assert models.render_prompt(tokenizer, PLAIN, ASK).tolist() == tokenizer("What is 3+4?")["input_ids"]
    bos = "<|im_start|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A <|im_end|>",
        special_tokens=[(t, tokenizer.convert_tokens_to_ids(t)) for t in (bos, "<|im_end|>")],
    )
    ids = models.render_prompt(tokenizer, PLAIN, ASK)
    assert _text(tokenizer, ids) == f"{bos}What is 3+4?"
    turns = (
        {"role": "system", "content": "Be brief."},
        *ASK,
        {"role": "assistant", "content": "7"},
        {"role": "user", "content": "And?"},
    )
    text = _text(tokenizer, models.render_prompt(tokenizer, PLAIN, turns))
    assert text == f"{bos}Be brief.\n\nUser: What is 3+4?\n\nAssistant: 7\n\nAnd?"


def test_thinking_marks_that_are_special_tokens_stay_in_the_text(smollm2_dir: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    ids = tokenizer("<think>a</think>b<|im_end|>", add_special_tokens=False)["input_ids"]
    assert models.decode(tokenizer, np.array(ids)) == "<think>a</think>b"


@pytest.mark.parametrize(
    "text",
    [
        "<think>a</think>b",
        "<|begin_of_thought|>a<|end_of_thought|><|begin_of_solution|>b<|end_of_solution|>",
        "[THINK]a[/THINK]b",
        "<|START_THINKING|>a<|END_THINKING|><|START_RESPONSE|>b<|END_RESPONSE|>",
        "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>b",
    ],
)
def test_every_family_s_marks_are_reasoning(text: str) -> None:
    assert canonical(text) == "<think>a</think>b"
    assert reasoning_of(text) == "a"
