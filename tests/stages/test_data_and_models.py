"""Stages on data sets as they lie and on models of other kinds: the same path for all, or one sentence."""

from __future__ import annotations

import gzip
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_architectures import build

from distill import models, recipe, run_folder
from distill.progress import Screen
from distill.records import UserError
from distill.stages import score, train
from distill.stages.context import Context
from distill.tools.preview import Preview, previews

ENGINE = {"fn": "transformers", "dtype": "float32"}
ASK = [{"role": "user", "content": "What is 3+4?"}]


def _context(run: Path, base: Path, name: str, stages: dict[str, Any], tasks: dict[str, Any] | None = None) -> Context:
    tree = {"name": "t", "models": {"base": str(base)}, "tasks": tasks or {}, "stages": stages}
    resolved = recipe.validate(tree)
    context = Context(recipe=resolved, run=run, name=name, screen=Screen(io.StringIO()))
    context.folder.mkdir(parents=True, exist_ok=True)
    state = run_folder.State(kind=stages[name]["kind"], config=resolved.stages[name].model_dump(mode="json"), inputs={})
    run_folder.write(context.folder, state)
    return context


def _train(run: Path, base: Path, data: Any, **changes: Any) -> tuple[Any, Context]:
    stage = {"kind": "train", "model": "base", "data": str(data), "loss": {"fn": "cross_entropy"}, "steps": 1, "dtype": "float32",
             "batch_traces": 8, **changes}  # fmt: skip
    context = _context(run, base, "student", {"student": stage})
    return train.run(context.recipe.stages["student"], context), context


def _rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_all_turns_of_a_conversation_are_learned_or_the_last(tiny_dir: Path, tmp_path: Path) -> None:
    turns = [
        *ASK,
        {"role": "assistant", "content": "7"},
        {"role": "user", "content": "And twice?"},
        {"role": "assistant", "content": "14"},
    ]
    data = _rows(tmp_path / "chat.jsonl", [{"messages": turns}])
    assert _train(tmp_path / "a", tiny_dir, data, turns="all")[0].metrics["examples"] == 2
    assert _train(tmp_path / "b", tiny_dir, data)[0].metrics["examples"] == 1


def test_a_parquet_folder_of_generations_and_its_wrong_ones(tiny_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set" / "data"
    folder.mkdir(parents=True)
    row = {
        "problem": "What is 3+4?",
        "answer": "7",
        "generations": ["<think>a</think>7", "8"],
        "correctness_math_verify": [True, False],
    }
    pq.write_table(pa.Table.from_pylist([row]), folder / "train-00000-of-00001.parquet")
    result, context = _train(tmp_path / "a", tiny_dir, tmp_path / "set")
    assert result.metrics["examples"] == 1
    assert "1 left out: generations that their row calls wrong" in context.screen.stream.getvalue()  # type: ignore[attr-defined]
    assert _train(tmp_path / "b", tiny_dir, tmp_path / "set", keep_wrong=True)[0].metrics["examples"] == 2


def test_a_file_that_gives_nothing_says_its_columns_and_what_to_do(tiny_dir: Path, tmp_path: Path) -> None:
    data = _rows(tmp_path / "other.jsonl", [{"q": "a", "text": "b"}])
    with pytest.raises(
        UserError, match=r"holds nothing to learn from\. .*its columns are q, text; plain text has no reply"
    ):
        _train(tmp_path / "a", tiny_dir, data)
    fields = {"question": "q", "reply": "text"}
    assert _train(tmp_path / "b", tiny_dir, data, fields=fields)[0].metrics["examples"] == 1


@pytest.mark.parametrize("model_type", ["lfm2", "mamba", "gemma2", "gpt_oss", "mixtral", "gpt2"])
def test_a_model_against_its_own_stored_distributions_has_a_kl_of_zero(
    model_type: str, tokenizer: Any, tmp_path: Path
) -> None:
    """Through the engine, the shards, the packing and the head: whatever shares a micro-batch."""
    base = tmp_path / "m"
    model = build(model_type, len(tokenizer))
    model.config.eos_token_id = tokenizer.eos_token_id
    models.save(model, tokenizer, base)
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What is {n} + {n}?"},
                {"role": "assistant", "content": f"It is {2 * n}. " * (1 + n % 3)},
            ]
        }
        for n in range(8)
    ]
    data = tmp_path / "chat.jsonl.gz"
    data.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    stages = {
        "scored": {"kind": "score", "model": "base", "data": str(data), "top_logprobs": 16, "mass": 1.0, "exact": True, "engine": ENGINE},
        "kl": {"kind": "train", "model": "base", "data": "scored", "loss": {"fn": "forward_kl"}, "lr": 1e-9, "steps": 1,
               "batch_traces": 8, "dtype": "float32", "micro_tokens": 200},
    }  # fmt: skip
    scored = _context(tmp_path / "run", base, "scored", stages)
    score.run(scored.recipe.stages["scored"], scored)
    context = _context(tmp_path / "run", base, "kl", stages)
    train.run(context.recipe.stages["kl"], context)
    first = json.loads((context.folder / "metrics.jsonl").read_text().splitlines()[0])
    assert abs(first["loss"]) < 1e-6
    decided = run_folder.read(context.folder).decided  # type: ignore[union-attr]
    rows_apart = model_type in ("lfm2", "mamba")
    assert (decided.get("forward of base", {}).get("value") == "rows") == rows_apart
    assert ("each trace is a padded row" in context.screen.stream.getvalue()) == rows_apart  # type: ignore[attr-defined]


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    models.save(build("llama", 1000), tokenizer, tmp_path / "m")
    data = _rows(tmp_path / "chat.jsonl", [{"messages": [*ASK, {"role": "assistant", "content": "7"}]}])
    with pytest.raises(UserError, match=r"the tokenizer has 49152 tokens and the model's embedding 1000 rows"):
        _train(tmp_path / "a", tmp_path / "m", data)


def test_a_type_that_transformers_has_no_language_model_for_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(UserError, match="no causal language model of type 'clip'"):
        models.load(tmp_path)


TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 8, "pad_token_id": 0}  # fmt: skip
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("gemma3", {"text_config": {**TEXT, "sliding_window": 8}, "vision_config": VISION, "mm_tokens_per_image": 4}),
        (
            "mistral3",
            {
                "text_config": {**TEXT, "model_type": "mistral"},
                "vision_config": {**VISION, "model_type": "pixtral", "head_dim": 8},
            },
        ),
    ],
)
def test_the_text_part_of_a_model_that_also_sees_images_is_trained_and_saved(
    model_type: str, fields: dict[str, Any], tokenizer: Any, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    fields["text_config"] |= {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    models.save(
        AutoModelForImageTextToText.from_config(AutoConfig.for_model(model_type, **fields)), tokenizer, tmp_path / "m"
    )
    data = _rows(tmp_path / "chat.jsonl", [{"messages": [*ASK, {"role": "assistant", "content": "7"}]}])
    _, context = _train(tmp_path / "a", tmp_path / "m", data, lr=1e-2, warmup_ratio=0.0)
    before, after = (models.load(folder, dtype="float32") for folder in (tmp_path / "m", context.folder / "model"))
    moved = {
        n for (n, a), b in zip(before.named_parameters(), after.parameters(), strict=True) if not torch.equal(a, b)
    }
    assert any("language_model" in name for name in moved)
    assert not any("vision" in name for name in moved)


def test_a_preview_shows_what_is_supervised(tiny_dir: Path, tmp_path: Path) -> None:
    data = _rows(
        tmp_path / "chat.jsonl", [{"question": "What is 3+4?", "response": "7", "reasoning": "count"}, {"text": "x"}]
    )
    exam = _rows(
        tmp_path / "exam.jsonl", [{"question": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(30)]
    )
    tree = {
        "name": "t", "models": {"base": str(tiny_dir)}, "tasks": {"exam": {"fn": "jsonl", "path": str(exam)}},
        "stages": {
            "sft": {"kind": "train", "model": "base", "data": str(data), "loss": {"fn": "cross_entropy"}, "steps": 1},
            "traces": {"kind": "generate", "model": "sft", "task": "exam", "problems": 2},
            "kl": {"kind": "train", "model": "sft", "data": "traces", "steps": 1},
        },
    }  # fmt: skip
    sft, traces, kl = previews(recipe.validate(tree))
    assert isinstance(sft, Preview)
    assert [supervised for _, supervised in sft.parts] == [False, True]
    assert sft.parts[0][0].endswith("What is 3+4?<|im_end|>\n<|im_start|>assistant\n")
    assert sft.parts[1][0] == "<think>\ncount\n</think>\n\n7<|im_end|>"
    assert "generation stops at <|im_end|> (2)" in sft.facts
    assert isinstance(traces, Preview)
    assert "Reply as <think>" in traces.parts[0][0]
    assert isinstance(kl, str)


def test_a_preview_shows_rows_to_score_the_prompts_of_on_policy_and_the_run_s_date(
    tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distill.models import chat_template

    monkeypatch.setattr(chat_template, "_pinned", None)
    tokenizer = models.load_tokenizer(tiny_dir)
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}\n" + tokenizer.chat_template
    base = tmp_path / "dated"
    shutil.copytree(tiny_dir, base)
    tokenizer.save_pretrained(base)
    data = _rows(tmp_path / "chat.jsonl", [{"question": "What is 3+4?", "response": "7"}])
    bad = _rows(
        tmp_path / "bad.jsonl", [{"messages": [*ASK, {"role": "assistant", "content": "7"}], "tools": [{}]}] * 9
    )
    exam = _rows(
        tmp_path / "exam.jsonl", [{"question": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(30)]
    )
    sft = {"kind": "train", "model": "base", "loss": {"fn": "cross_entropy"}, "steps": 1}
    tree = {
        "name": "t", "models": {"base": str(base)}, "tasks": {"exam": {"fn": "jsonl", "path": str(exam)}},
        "stages": {
            "scored": {"kind": "score", "model": "base", "data": str(data)},
            "own": {"kind": "on_policy", "model": "base", "teacher": "base", "task": "exam", "steps": 1, "prompts": 2,
                    "data": "scored", "offline_share": 0.5},
            "bad": {**sft, "data": str(bad)},
        },
    }  # fmt: skip
    scored, own, *lines = previews(recipe.validate(tree), "2024-02-29")
    assert isinstance(scored, Preview)
    assert isinstance(own, Preview)
    assert scored.parts[1] == ("7<|im_end|>", True)
    assert own.title == "own: first prompt"
    for preview in (scored, own):
        assert preview.parts[0][0].startswith("29 Feb 2024\n")
        assert any("prints the date 2024-02-29" in fact for fact in preview.facts)
    refused = "is left out: the model's chat template does not read tools."
    assert lines[:5] == [f"bad: row {n} {refused}" for n in range(1, 6)]
    assert len(lines) == 6


def test_the_teacher_s_prompts_get_the_stage_s_template_options(tiny_dir: Path, tmp_path: Path) -> None:
    from distill.stages.inputs.train_examples import reader_for

    tokenizer = models.load_tokenizer(tiny_dir)
    tokenizer.chat_template += "{% if enable_thinking is defined and not enable_thinking %}OFF{% endif %}"
    base = tmp_path / "switch"
    shutil.copytree(tiny_dir, base)
    tokenizer.save_pretrained(base)
    data = _rows(tmp_path / "chat.jsonl", [{"messages": [*ASK, {"role": "assistant", "content": "7"}]}])
    stage = {"kind": "train", "model": "base", "teacher": "base", "data": str(data), "loss": {"fn": "uld"}, "steps": 1}
    stages = {"student": {**stage, "template_options": {"enable_thinking": False}}}
    context = _context(tmp_path / "run", base, "student", stages)
    read = reader_for(context.recipe.stages["student"], context, tokenizer)  # type: ignore[arg-type]
    assert read is not None
    retokenized = read(ASK, models.render_completion(tokenizer, "7"))
    assert retokenized is not None
    assert tokenizer.decode(retokenized.prompt_ids).endswith("OFF")


def test_template_options_for_traces_are_refused(tiny_dir: Path, tmp_path: Path) -> None:
    data = _rows(tmp_path / "chat.jsonl", [{"messages": [*ASK, {"role": "assistant", "content": "7"}]}])
    scored = {"kind": "score", "model": "base", "data": str(data), "engine": ENGINE}
    again = {"kind": "score", "model": "base", "data": "scored", "template_options": {"enable_thinking": False}}
    stages = {"scored": scored, "again": again}
    context = _context(tmp_path / "run", tiny_dir, "scored", stages)
    score.run(context.recipe.stages["scored"], context)
    context = _context(tmp_path / "run", tiny_dir, "again", stages)
    with pytest.raises(UserError, match="whose prompts are used as they were generated"):
        score.run(context.recipe.stages["again"], context)
