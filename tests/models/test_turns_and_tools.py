"""How turns end, named templates, tool calls and results, prefilled thinking: each is rendered right or refused."""

from __future__ import annotations

import importlib.resources
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from distill import models
from distill.conversations import Reader
from distill.reasoning import begins_with, canonical, reasoning_of, split_reasoning, without_prefill
from distill.records import Template, UserError, Verdict

ASK = ({"role": "user", "content": "What is 3+4?"},)
PLAIN = Template("t", system=None, plain="{question}", extract=lambda text: text)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OPENS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
TOOL = {
    "type": "function",
    "function": {
        "name": "add_up",
        "description": "Adds.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer", "description": "n"}}},
    },
}


def _tokenizer(folder: Any, source: Any, specials: Sequence[str] = (), eos: str | None = None) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": list(specials)})
    tokenizer.chat_template = source
    tokenizer.eos_token = eos or tokenizer.eos_token
    return tokenizer


def _family(folder: Any, family: str) -> Any:
    source = (importlib.resources.files("trl") / "chat_templates" / f"{family}.jinja").read_text(encoding="utf-8")
    found = set(re.findall(r"<\|[^|<>'\"{}\s]{1,40}\|?>|<[^|<>'\"{}\s]{1,40}\|>|<｜[^｜<>'\"{}]{1,40}｜>", source))
    return _tokenizer(folder, source, sorted(found - set(AutoTokenizer.from_pretrained(folder).get_vocab())))


def _call(arguments: Any, content: str | None = "", **beside: str) -> dict[str, Any]:
    function = {"name": "add_up", "arguments": arguments}
    calls = [{"type": "function", "id": "abcdef123", "function": function}]
    return {"role": "assistant", "content": content, "tool_calls": calls, **beside}


def _result(content: str) -> dict[str, Any]:
    return {"role": "tool", "name": "add_up", "tool_call_id": "abcdef123", "content": content}


def _prompt(tokenizer: Any, *turns: Any, template: Template = PLAIN, tools: Any = None) -> str:
    return str(tokenizer.decode(models.render_prompt(tokenizer, template, (*ASK, *turns), tools)))


def _reply(tokenizer: Any, reply: Any, *turns: Any, template: Template = PLAIN, tools: Any = None) -> str:
    return str(tokenizer.decode(models.render_reply(tokenizer, template, (*ASK, *turns), reply, tools)))


def _stops(tokenizer: Any, folder: Path, template: Template | None = None) -> set[str]:
    return {tokenizer.convert_ids_to_tokens(i) for i in models.stop_ids(folder, tokenizer, template)}


# ------------------------------------------------------------------------------------------------ ends of turns


@pytest.mark.parametrize("system", ["", "<|system|>\nBe kind.<|end|>\n"])
def test_the_eos_behind_a_whole_conversation_ends_no_turn(system: str, smollm2_dir: Path, tmp_path: Path) -> None:
    source = (
        system + "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
    )
    specials = ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
    tokenizer = _tokenizer(smollm2_dir, source, specials, "<|endoftext|>")
    assert _reply(tokenizer, {"content": "It is 7."}) == "It is 7.<|end|>"
    assert _stops(tokenizer, tmp_path) == {"<|end|>", "<|endoftext|>"}


@pytest.mark.parametrize("family", ["phi3", "phi3_5"])
def test_a_turn_of_phi_ends_at_its_end_token(family: str, smollm2_dir: Path, tmp_path: Path) -> None:
    tokenizer = _family(smollm2_dir, family)
    tokenizer.eos_token = "<|endoftext|>"
    assert _reply(tokenizer, {"content": "It is 7."}) == "It is 7.<|end|>"
    assert "<|end|>" in _stops(tokenizer, tmp_path)


def test_a_turn_without_an_end_of_its_own_ends_where_the_next_one_would_begin_or_at_eos(smollm2_dir: Path) -> None:
    between = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if not loop.last %}<|sep|>{% endif %}{% endfor %}"
    )
    header = "{% if add_generation_prompt %}<|sep|><|assistant|>{% endif %}"
    specials = ["<|user|>", "<|assistant|>", "<|sep|>"]
    tokenizer = _tokenizer(smollm2_dir, between + header, specials, "<|endoftext|>")
    assert _reply(tokenizer, {"content": "It is 7."}) == "It is 7.<|sep|>"
    no_end = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    tokenizer = _tokenizer(smollm2_dir, no_end + header.replace("<|sep|>", ""), specials, "<|endoftext|>")
    assert _reply(tokenizer, {"content": "It is 7."}) == "It is 7.<|endoftext|>"


def test_an_end_of_turn_that_is_not_called_special_stays_out_of_the_text(smollm2_dir: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    tokenizer.add_tokens(["<|fin|>"])
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "<|fin|>")
    ids = models.render_reply(tokenizer, PLAIN, ASK, {"content": "It is 7."})
    assert tokenizer.decode(ids) == "It is 7.<|fin|>"
    assert models.decode(tokenizer, ids) == "It is 7."
    assert "<|fin|>" in _stops(tokenizer, tmp_path)


@pytest.mark.parametrize(
    ("family", "end"), [("gptoss", "<|call|>"), ("gemma4", "<|tool_response>"), ("llama3_1", "<|eot_id|>")]
)
def test_a_turn_of_tool_calls_ends_at_the_family_s_own_token(
    family: str, end: str, smollm2_dir: Path, tmp_path: Path
) -> None:
    tokenizer = _family(smollm2_dir, family)
    text = _reply(tokenizer, _call({"a": 3}), tools=[TOOL])
    assert text.endswith(end)
    assert text.count("add_up") == 1
    assert end in _stops(tokenizer, tmp_path)


# ------------------------------------------------------------------------------------------------ named templates


@pytest.fixture
def named(smollm2_dir: Path) -> Any:
    with_tools = "TOOLS {{ tools | tojson }}\n" + CHATML.replace("<|im_end|>", "<|fin|>")
    sources = {"default": CHATML, "tool_use": with_tools, "broken": "{{ raise_exception('never') }}"}
    return _tokenizer(smollm2_dir, sources, ["<|fin|>"], "<|endoftext|>")


def test_tools_are_rendered_by_the_template_for_them(named: Any) -> None:
    assert _prompt(named, tools=[TOOL]).startswith('TOOLS [{"type": "function"')
    assert _prompt(named).startswith("<|im_start|>user")
    assert _reply(named, {"content": "7"}, tools=[TOOL]) == "7<|fin|>"
    assert _reply(named, {"content": "7"}) == "7<|im_end|>"
    chosen = replace(PLAIN, options={"chat_template": "default"})
    with pytest.raises(UserError, match="does not read tools"):
        _prompt(named, template=chosen, tools=[TOOL])


def test_stop_tokens_are_those_of_the_named_templates(named: Any, tmp_path: Path) -> None:
    assert _stops(named, tmp_path) == {"<|im_end|>", "<|fin|>", "<|endoftext|>"}
    chosen = replace(PLAIN, options={"chat_template": "default"})
    assert _stops(named, tmp_path, chosen) == {"<|im_end|>", "<|endoftext|>"}
    with pytest.raises(UserError, match=r"the chat template called 'broken' of \S+ refuses the conversation: never"):
        _stops(named, tmp_path, replace(PLAIN, options={"chat_template": "broken"}))


def test_a_template_s_error_is_one_message_with_the_model_s_name(smollm2_dir: Path, tmp_path: Path) -> None:
    source = "{% if messages|length > 1 %}{{ raise_exception('one turn only') }}{% endif %}{{ messages[0].content }}"
    tokenizer = _tokenizer(smollm2_dir, source)
    tokenizer.name_or_path = "/cache/models--ex--Tiny-1B/snapshots/0f"
    message = "the chat template of ex/Tiny-1B refuses the conversation: one turn only"
    with pytest.raises(UserError, match=message):
        models.stop_ids(tmp_path, tokenizer)
    with pytest.raises(UserError, match=message):
        models.render_reply(tokenizer, PLAIN, ASK, {"content": "7"})
    tokenizer.chat_template = "{% if %}"
    with pytest.raises(UserError, match="the chat template of ex/Tiny-1B"):
        models.render_prompt(tokenizer, PLAIN, ASK)


# ------------------------------------------------------------------------------------------------ tools


@pytest.mark.parametrize(
    "source",
    [
        CHATML,
        CHATML.replace("{{ m.content }}", "{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls[0].function.name }}{% endif %}"),
        CHATML.replace("{{ m.content }}", "{{ m.content }}{% if m.tool_calls %}A call of add_up: a 3{% endif %}"),
    ],
    ids=["no calls", "no arguments", "the same text for each"],
)  # fmt: skip
def test_tool_calls_that_a_template_leaves_out_are_refused(source: str, smollm2_dir: Path) -> None:
    tokenizer = _tokenizer(smollm2_dir, source)
    with pytest.raises(UserError, match="does not render the tool calls of the assistant"):
        _reply(tokenizer, _call({"a": 3}))
    with pytest.raises(UserError, match="does not render the tool calls of the assistant"):
        _prompt(tokenizer, _call({"a": 3}), _result("3"))


def test_an_earlier_answer_that_a_template_leaves_out_is_refused(smollm2_dir: Path) -> None:
    tokenizer = _tokenizer(smollm2_dir, CHATML.replace("in messages", "in messages if m.role != 'assistant'"))
    with pytest.raises(UserError, match="leaves out a message of role 'assistant'"):
        _prompt(tokenizer, {"role": "assistant", "content": "It is 7."}, {"role": "user", "content": "And?"})


def test_a_tool_s_result_may_be_written_as_json(smollm2_dir: Path) -> None:
    result = '{"sum": "7 ä"}'
    for family in ("llama3_1", "gptoss"):
        assert json.dumps(result, ensure_ascii=False) in _prompt(
            _family(smollm2_dir, family), _call({"a": 3}), _result(result), tools=[TOOL]
        )
    dropped = CHATML.replace("in messages", "in messages if m.role != 'tool'")
    tokenizer = _tokenizer(smollm2_dir, dropped.replace("{{ m.content }}", "{{ m.content }}{{ m.tool_calls }}"))
    with pytest.raises(UserError, match="leaves out a message of role 'tool'"):
        _prompt(tokenizer, _call({"a": 3}), _result(result))


@pytest.mark.parametrize("family", ["qwen2_5", "qwen3", "llama3_1", "glm4moe", "lfm2_v2", "gptoss", "nemotron_3_nano"])
def test_arguments_may_be_json_text_or_an_object(family: str, smollm2_dir: Path) -> None:
    tokenizer = _family(smollm2_dir, family)
    one, other = (_reply(tokenizer, _call(given), tools=[TOOL]) for given in ({"a": 'b"c'}, '{"a": "b\\"c"}'))
    assert one == other
    assert 'b"c' in one or 'b\\"c' in one
    assert "b\\\\" not in one
    with pytest.raises(UserError, match="arguments are not JSON"):
        _reply(tokenizer, _call("{a"), tools=[TOOL])


def test_arguments_are_json_text_and_content_is_none_for_templates_that_need_that(smollm2_dir: Path) -> None:
    for family in ("deepseekv3", "deepseek_r1_distill"):
        text = _prompt(_family(smollm2_dir, family), _call({"a": "b"}), _result("7"))
        assert '```json\n{"a": "b"}\n```' in text


def test_calls_may_follow_thinking_that_the_prompt_opens(smollm2_dir: Path) -> None:
    nemotron = _family(smollm2_dir, "nemotron_3_nano")
    assert _prompt(nemotron, tools=[TOOL]).endswith("<think>\n")
    assert _reply(nemotron, _call({"a": 3}), tools=[TOOL]).startswith("</think>\n<tool_call>\n<function=add_up>")
    with_reasoning = _reply(nemotron, _call({"a": 3}, reasoning_content="three"), tools=[TOOL])
    assert with_reasoning.startswith("three\n</think>\n<tool_call>")


def test_reasoning_beside_calls_is_written_or_refused(smollm2_dir: Path) -> None:
    call = _call({"a": 3}, reasoning_content="three")
    text = _reply(_family(smollm2_dir, "qwen2_5"), call, tools=[TOOL])
    assert text.startswith("<think>\nthree\n</think>\n<tool_call>")
    with pytest.raises(UserError, match="leaves out the text or the reasoning beside them"):
        _reply(_family(smollm2_dir, "llama3_1"), call, tools=[TOOL])


def test_the_id_of_a_call_is_kept(smollm2_dir: Path) -> None:
    messages = [*ASK, _call('{"a": 3}'), _result("7"), {"role": "assistant", "content": "7"}]
    (read,) = Reader().read({"messages": messages})
    assert read.messages[1]["tool_calls"] == _call({"a": 3})["tool_calls"]


# ------------------------------------------------------------------------------------------------ thinking


@pytest.mark.parametrize("prefill", ["<think>\nOkay, ", "<think>Okay, ", "Okay, "])
def test_a_prefill_continues_the_thinking_that_the_template_opens(prefill: str, smollm2_dir: Path) -> None:
    from distill.stages.sampling import Grader
    from distill.tasks.judge.verdict import judge

    class OneTask:
        template = replace(PLAIN, prefill=prefill)
        judge = staticmethod(lambda problem, text, finished: Verdict(True, 1.0, "7"))

    tokenizer = _tokenizer(smollm2_dir, OPENS)
    assert _prompt(tokenizer, template=OneTask.template).endswith("assistant\n<think>\nOkay, ")
    assert models.opened_thinking(tokenizer, OneTask.template) == "<think>\nOkay, "
    seen = Grader.of(OneTask(), tokenizer).seen("so a b</think>c")  # type: ignore[arg-type]
    assert seen == "<think>\nOkay, so a b</think>c"
    assert judge(OneTask.template, seen, True, lambda answer: Verdict(True, 1.0, answer)).answer == seen
    assert reasoning_of(without_prefill(seen, prefill)).strip() == "so a b"
    reply = {"content": "<think>\nOkay, so a b</think>c"}
    assert _reply(tokenizer, reply, template=OneTask.template) == "so a b</think>c<|im_end|>"


def test_a_prefill_is_found_at_the_start_of_a_text_only() -> None:
    assert begins_with("<think>\nOkay", "Okay")
    assert begins_with("<think>\nOkay", "<think>Okay")
    assert not begins_with("a</think>b", "<think>\n")
    assert not begins_with("So. Okay", "Okay")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<thinking>a</thinking>Use <thinking> x </thinking>", "<think>a</think>Use <thinking> x </thinking>"),
        ("Write <reasoning> x </reasoning>.", "Write <reasoning> x </reasoning>."),
        ("<think>a</think><answer>use <reasoning> 7</answer>", "<think>a</think><answer>use <reasoning> 7</answer>"),
        ("a</thinking>b <thinking>c", "a</think>b <thinking>c"),
        ("[THINK]a[/THINK]mark it <|START_RESPONSE|> so", "<think>a</think>mark it <|START_RESPONSE|> so"),
        (
            "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>analysis<|message|>b<|end|>"
            "<|start|>assistant<|channel|>final<|message|>c",
            "<think>a</think><think>b</think>c",
        ),
    ],
)
def test_marks_inside_an_answer_stay_as_they_are(text: str, expected: str) -> None:
    assert canonical(text) == expected


def test_a_row_s_answer_keeps_the_spacing_of_the_tags_that_it_mentions() -> None:
    reply = "<thinking>\n a \n</thinking>\n\nWrite <think>\n x \n</think> or <thinking> y </thinking>."
    (read,) = Reader().read({"question": "How?", "response": reply})
    assert read.reply is not None
    assert read.reply["content"] == "<think>a</think>Write <think>\n x \n</think> or <thinking> y </thinking>."
    assert split_reasoning(read.reply["content"]) == ("a", "Write <think>\n x \n</think> or <thinking> y </thinking>.")
    assert split_reasoning("Write <think> and </think>.") == (None, "Write <think> and </think>.")


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("gemma4", "<|channel>thought\nso\n<channel|>It is 7.<turn|>"),
        ("muse_glimmer", " to=self<|message|>so<|eom|><|start|>assistant to=user<|message|>It is 7.<|eot|>"),
        ("qwen2_5", "<think>\nso\n</think>\n\nIt is 7.<|im_end|>"),
    ],
)
def test_reasoning_after_a_tool_s_result_is_in_the_family_s_marks(
    family: str, expected: str, smollm2_dir: Path
) -> None:
    tokenizer = _family(smollm2_dir, family)
    turns = (_call({"a": 3}), _result("7"))
    assert _reply(tokenizer, {"content": "It is 7.", "reasoning_content": "so"}, *turns, tools=[TOOL]) == expected


@pytest.mark.parametrize(
    ("family", "text", "expected"),
    [
        ("gptoss", "<|channel|>analysis<|message|>three and", "<|channel|>analysis<|message|>three and"),
        ("gptoss", "It is", "<|channel|>final<|message|>It is"),
        ("qwen3", "<think>\nthree and", "<think>\nthree and"),
        ("qwen3_5_think", "three and", "three and"),
        ("qwen3_5_think", "three\n</think>\n\nIt is", "three\n</think>\n\nIt is"),
    ],
)
def test_a_cut_reply_ends_where_it_was_cut(family: str, text: str, expected: str, smollm2_dir: Path) -> None:
    tokenizer = _family(smollm2_dir, family)
    ids = models.render_reply(tokenizer, PLAIN, ASK, {"content": text}, finished=False)
    assert tokenizer.decode(ids) == expected


# ------------------------------------------------------------------------------------------------ BOS


@pytest.mark.parametrize("plain", ["{question}", "<|im_start|>{question}"])
def test_a_prompt_has_one_bos(plain: str, smollm2_dir: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = _tokenizer(smollm2_dir, None)
    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    assert _prompt(tokenizer, template=replace(PLAIN, plain=plain)) == f"{bos}What is 3+4?"
    tokenizer.chat_template = "{{ bos_token }}{{ messages[0].content }}"
    ids = models.render_prompt(tokenizer, PLAIN, ASK)
    assert int(np.sum(ids == tokenizer.bos_token_id)) == 1
