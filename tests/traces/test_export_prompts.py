"""Exported traces hold the whole conversation: rendered again with the teacher's chat template it has the stored prompt ids."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import trace_samples as samples
from chat_families import FAMILIES, family_tokenizer

from distill import models
from distill.errors import DataError
from distill.records import Ragged, Template, UserError
from distill.stages.trace_sampling import prompt_record
from distill.tasks import templates
from distill.traces.export import export_dataset, export_sft
from distill.traces.prompts import PromptRecord
from distill.traces.reader import open_traces
from distill.traces.writer import TraceWriter

QUESTION = {"role": "user", "content": "What is ⅓ of 12?"}
CONVERSATIONS = (
    (QUESTION,),
    ({"role": "user", "content": "1 + 1"}, {"role": "assistant", "content": "2"}, QUESTION),
    ({"role": "system", "content": "Its own system text."}, QUESTION),
)
KINDS = ("cohere2", "deepseekv3", "gemma3", "gemma4", "gptoss", "llama3_1", "phi3_5", "qwen3", "qwen3_6", "smolvlm")
"""Families without a system role, with thinking opened or none, with content in parts, with a date, with channels."""
PREFILLED = dataclasses.replace(templates.think_answer, name="prefilled", prefill="<think>\nFirst,")
ASKED = dataclasses.replace(templates.think_answer, name="asked", question="Task: {question}\nTake your time.")


def store(path: Path, tokenizer: Any, template: Template, completion: str = "4") -> list[list[int]]:
    """Write a trace of each conversation as a generate stage does; return the prompts' ids."""
    block = samples.traces(range(len(CONVERSATIONS)))
    prompts = [models.render_prompt(tokenizer, template, messages) for messages in CONVERSATIONS]
    block = dataclasses.replace(
        block,
        messages=list(CONVERSATIONS),
        completion=[completion] * len(CONVERSATIONS),
        prompt_ids=Ragged.from_rows(prompts, np.int32),
    )
    record = prompt_record(tokenizer, template)
    with TraceWriter(path, samples.metadata(prompt=record, vocab_size=200_000)) as writer:
        writer.add(block)
    return [ids.tolist() for ids in prompts]


def exported(path: Path, style: str, tokenizer: Any = None) -> list[dict[str, Any]]:
    out = path.with_name(f"{path.name}-{style}.jsonl")
    export_sft(path, out, style, tokenizer)  # type: ignore[arg-type]
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("template", [templates.think_answer, PREFILLED, ASKED], ids=lambda one: one.name)
@pytest.mark.parametrize("family", [family for family in FAMILIES if family in KINDS])
def test_rendered_again_the_messages_are_the_prompts(
    tmp_path: Path, smollm2_dir: Path, family: str, template: Template
) -> None:
    tokenizer = family_tokenizer(smollm2_dir, family)
    try:
        ids = store(tmp_path / "traces", tokenizer, template)
    except UserError:
        pytest.skip("the family's template refuses these conversations")
    chat = models.chat_template_of(tokenizer, template)
    for style in ("chat", "text"):
        for row, expected, given in zip(
            exported(tmp_path / "traces", style, tokenizer), ids, CONVERSATIONS, strict=True
        ):
            if style == "text":
                assert tokenizer(row["prompt"], add_special_tokens=False)["input_ids"] == expected
                assert row["completion"] == "4"
                continue
            *prompt, reply = row["messages"]
            # The oracle: transformers alone, on the exported turns.
            turns = [
                {**m, "content": [{"type": "text", "text": m["content"]}]} if chat._takes_parts else m for m in prompt
            ]
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            opened = models.opened_by(text)
            assert reply["content"].startswith(opened)
            begun = template.prefill.removeprefix(opened).lstrip() if opened else template.prefill
            assert tokenizer(text + begun, add_special_tokens=False)["input_ids"] == expected
            assert reply["content"] == opened + begun + "4"
            own = given[0]["content"] if given[0]["role"] == "system" else template.system
            assert sum(own in message["content"] for message in prompt) == 1
    assert open_traces(tmp_path / "traces").blocks().__next__().messages == list(CONVERSATIONS)


@pytest.mark.parametrize("template", [templates.think_answer, PREFILLED, templates.raw, templates.boxed])
def test_prompts_of_plain_text(tmp_path: Path, mistral: Any, template: Template) -> None:
    """A base model with a BOS in front; the template's text around the question, and what the prompt began."""
    mistral.chat_template = None
    ids = store(tmp_path / "traces", mistral, template)
    for style in ("chat", "text"):
        for with_tokenizer in (True, False):
            for row, expected in zip(
                exported(tmp_path / "traces", style, mistral if with_tokenizer else None), ids, strict=True
            ):
                if style == "text":
                    text = row["prompt"]
                else:
                    (asked, reply) = row["messages"]
                    text = asked["content"] + template.prefill
                    assert reply["content"] == template.prefill + "4"
                assert mistral(text)["input_ids"] == expected


def test_a_shard_shows_the_system_message_and_memory_the_problem(tmp_path: Path, tokenizer: Any) -> None:
    store(tmp_path / "traces", tokenizer, templates.think_answer)
    (shard,) = (tmp_path / "traces").glob("*.parquet")
    rows = pq.read_table(shard).to_pylist()
    assert [m["role"] for m in rows[0]["messages"]] == ["system", "user"]
    assert rows[0]["messages"][0]["content"] == templates.think_answer.system
    assert [m["content"] for m in rows[2]["messages"]] == ["Its own system text.", QUESTION["content"]]
    (block,) = open_traces(tmp_path / "traces").blocks()
    assert block.messages == list(CONVERSATIONS)
    record = open_traces(tmp_path / "traces").metadata.prompt
    assert record is not None
    assert record.rendered == tokenizer.apply_chat_template(
        [{"role": "system", "content": templates.think_answer.system}, {"role": "user", "content": "{question}"}],
        tokenize=False, add_generation_prompt=True,
    )  # fmt: skip


def test_options_of_the_chat_template_go_with_the_rows(tmp_path: Path, smollm2_dir: Path) -> None:
    import datasets

    tokenizer = family_tokenizer(smollm2_dir, "qwen3")
    template = dataclasses.replace(templates.boxed, options={"enable_thinking": False})
    ids = store(tmp_path / "traces", tokenizer, template)
    assert export_dataset(tmp_path / "traces", tmp_path / "folder") == 3
    for row, expected in zip(datasets.load_from_disk(str(tmp_path / "folder")), ids, strict=True):
        assert row["chat_template_kwargs"] == {"enable_thinking": False}
        text = tokenizer.apply_chat_template(
            row["messages"][:-1], tokenize=False, add_generation_prompt=True, **row["chat_template_kwargs"]
        )
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == expected


def test_text_without_a_tokenizer_and_with_another_one_are_refused(
    tmp_path: Path, smollm2_dir: Path, tokenizer: Any
) -> None:
    store(tmp_path / "traces", tokenizer, templates.think_answer)
    with pytest.raises(UserError, match="whose tokenizer was not given"):
        exported(tmp_path / "traces", "text")
    with pytest.raises(DataError, match="has other ids than the stored ones"):
        exported(tmp_path / "traces", "text", family_tokenizer(smollm2_dir, "gemma3"))


def test_traces_of_two_prompts_do_not_mix(tmp_path: Path, tokenizer: Any) -> None:
    record = prompt_record(tokenizer, templates.think_answer)
    one, other = (
        samples.metadata(prompt=record),
        samples.metadata(prompt=record.model_copy(update={"system": "Other."})),
    )
    assert one.differences(other) == [f"prompt.system: {record.system!r} != 'Other.'"]
    assert one.differences(samples.metadata()) == []
    assert samples.metadata().differences(one) == []
    assert PromptRecord.model_validate_json(record.model_dump_json()) == record
