"""Stages in this process, on a tiny model with the reference engine: skipped rows, refused settings and messages."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from project import REFERENCE as ENGINE
from project import SUMS

from distill import models, recipe
from distill.progress import Screen
from distill.records import UserError
from distill.stages import eval as evaluation
from distill.stages import generate, train
from distill.stages.context import Context
from distill.tasks import reasoning_gym
from distill.tasks.splits import split_of
from distill.traces.reader import open_traces
from distill.traces.writer import TraceWriter


def context(run: Path, name: str, models_: dict, stages: dict, tasks: dict | None = None) -> Context:
    tree = {"name": "t", "models": models_, "tasks": tasks or {"sums": SUMS}, "stages": stages}
    return Context(recipe=recipe.validate(tree), run=run, name=name, screen=Screen(io.StringIO()))


def generate_stage(**changes) -> dict:
    return {
        "kind": "generate",
        "model": "base",
        "task": "sums",
        "problems": 5,
        "sampling": {"max_tokens": 5},
        "top_logprobs": 8,
        "engine": ENGINE,
        **changes,
    }


def train_stage(**changes) -> dict:
    return {
        "kind": "train",
        "model": "base",
        "data": "traces",
        "keep_truncated": True,
        "steps": 2,
        "batch_traces": 4,
        "dtype": "float32",
        **changes,
    }


def run_generate(run: Path, tiny_dir: Path, tasks: dict | None = None, **changes):
    ctx = context(run, "traces", {"base": str(tiny_dir)}, {"traces": generate_stage(**changes)}, tasks)
    ctx.folder.mkdir(parents=True, exist_ok=True)
    return generate.run(ctx.recipe.stages["traces"], ctx), ctx


def run_train(run: Path, base: Path, **changes):
    stages = {"traces": generate_stage(), "student": train_stage(**changes)}
    ctx = context(run, "student", {"base": str(base)}, stages)
    ctx.folder.mkdir(parents=True, exist_ok=True)
    return train.run(ctx.recipe.stages["student"], ctx), ctx


def test_generated_log_probs_are_the_model_s_own(tiny_dir, tmp_path):
    """Stored distributions against a plain forward pass of transformers at every position, tail included."""
    import torch

    result, ctx = run_generate(tmp_path, tiny_dir, mass=0.9, exact=True)
    model = models.load(tiny_dir, dtype="float32").eval()
    (block,) = open_traces(ctx.folder / "traces").blocks()
    assert len(block) == 5
    for n in range(5):
        prompt, reply = block.prompt_ids[n], block.completion_ids[n]
        ids = torch.from_numpy(np.concatenate([prompt, reply]).astype(np.int64))
        with torch.no_grad():
            logq = model(ids[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1).numpy()
        np.testing.assert_allclose(block.logprob[n], logq[np.arange(len(reply)), reply], atol=1e-4)
        top = block.top_of(n)
        kept, logp = top.dense()
        for t in range(len(reply)):
            k = int(top.count_T[t])
            np.testing.assert_allclose(logp[t, :k], np.sort(logq[t])[::-1][:k], atol=1e-4)
            assert np.exp(logp[t, :k]).sum() + np.exp(top.tail_T[t]) == pytest.approx(1, abs=1e-5)
            assert k == 8 or np.exp(logp[t, :k]).sum() >= 0.9 - 1e-6
            assert kept[t, k:].tolist() == [-1] * (kept.shape[1] - k)
    assert result.cost.tokens_generated == block.completion_ids.lengths.sum()


@pytest.mark.fault(23)
def test_a_prompt_that_fills_the_context_is_skipped_and_counted(tiny_dir, tmp_path):
    questions = ["What is 1?", "word " * 700, "And 2 - 1?"]
    in_train = [question for question in questions if split_of(question) == "train"]
    assert "word " * 700 in in_train
    rows = tmp_path / "q.jsonl"
    rows.write_text("".join(json.dumps({"question": q, "answer": "1"}) + "\n" for q in questions))
    tasks = {"sums": {"fn": "jsonl", "path": str(rows), "held_out": "hash"}}
    result, ctx = run_generate(tmp_path, tiny_dir, tasks, problems=len(in_train))
    assert result.metrics["prompts_too_long"] == 1
    assert open_traces(ctx.folder / "traces").num_rows == len(in_train) - 1
    assert "1 prompts skipped" in ctx.screen.stream.getvalue()


def test_too_few_problems_is_an_error_that_says_how_many_there_are(tiny_dir, tmp_path):
    options = {**SUMS["options"], "min_digits": 1, "max_digits": 1}
    with pytest.raises(UserError, match=r"\d+"):
        run_generate(tmp_path, tiny_dir, {"sums": {**SUMS, "options": options}}, problems=5000)


@pytest.mark.fault(8)
def test_kl_on_another_tokenizer_is_refused_and_sft_on_the_text_works(tiny_dir, tmp_path):
    run_generate(tmp_path, tiny_dir)
    other = tmp_path / "other"
    shutil.copytree(tiny_dir, other)
    tree = json.loads((other / "tokenizer.json").read_text())
    vocab = tree["model"]["vocab"]
    a, b = (token for token, index in vocab.items() if index in (1000, 1001))
    vocab[a], vocab[b] = vocab[b], vocab[a]
    (other / "tokenizer.json").write_text(json.dumps(tree))
    with pytest.raises(UserError, match="cross_entropy"):
        run_train(tmp_path, other)
    with pytest.raises(UserError, match=r"student\.task: is required"):
        run_train(tmp_path, other, loss={"fn": "cross_entropy"})
    result, ctx = run_train(tmp_path, other, loss={"fn": "cross_entropy"}, task="sums")
    assert result.metrics["examples"] == 5
    assert "in the student's own tokens" in ctx.screen.stream.getvalue()


def test_distributions_of_another_temperature_or_vocabulary_are_refused(tiny_dir, tmp_path):
    _, ctx = run_generate(tmp_path, tiny_dir)
    written = open_traces(ctx.folder / "traces")
    blocks = list(written.blocks())
    for changes, says in (
        ({"logprob_temperature": 2.0}, r"student\.data: 'traces' .* temperature 2;"),
        ({"vocab_size": written.metadata.vocab_size + 1}, "49153 tokens"),
    ):
        shutil.rmtree(written.path)
        with TraceWriter(written.path, written.metadata.model_copy(update=changes)) as writer:
            for block in blocks:
                writer.add(block)
        with pytest.raises(UserError, match=says):
            run_train(tmp_path, tiny_dir)


def test_kl_on_traces_without_distributions_is_refused(tiny_dir, tmp_path):
    run_generate(tmp_path, tiny_dir, top_logprobs=0)
    with pytest.raises(UserError, match="top_logprobs: 0"):
        run_train(tmp_path, tiny_dir)


@pytest.mark.fault(20)
def test_truncated_and_long_traces_are_left_out_and_counted(tiny_dir, tmp_path):
    run_generate(tmp_path, tiny_dir)
    with pytest.raises(UserError, match="nothing to learn from"):
        run_train(tmp_path, tiny_dir, keep_truncated=False)
    with pytest.raises(UserError, match="nothing to learn from"):
        run_train(tmp_path, tiny_dir, max_tokens=10)


@pytest.mark.fault(28)
def test_a_held_out_question_in_the_training_file_is_left_out_and_said(tiny_dir, tmp_path):
    task = reasoning_gym("sums", **{k: v for k, v in SUMS.items() if k != "fn"})
    (leak,) = task.problems("held_out", 1, 0)
    (good,) = task.problems("train", 1, 0)
    rows = tmp_path / "w.jsonl"
    rows.write_text("".join(json.dumps({"question": p.question, "completion": "x"}) + "\n" for p in (good, leak)))
    result, ctx = run_train(tmp_path, tiny_dir, data=str(rows), task="sums", loss={"fn": "cross_entropy"})
    assert result.metrics["examples"] == 1
    assert "1 left out: one of the task's held-out problems" in ctx.screen.stream.getvalue()


def test_bad_lines_are_left_out_by_number_and_the_rest_is_learned(tiny_dir, tmp_path):
    rows = tmp_path / "w.jsonl"
    good = json.dumps({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "there"}]})
    rows.write_bytes(good.encode() + b'\n\xff\xfe\n{"a": 1}\n' + good.encode() + b"\n")
    result, ctx = run_train(tmp_path, tiny_dir, data=str(rows), loss={"fn": "cross_entropy"})
    assert result.metrics["examples"] == 2
    said = ctx.screen.stream.getvalue()
    assert "row 2 left out: not UTF-8" in said
    assert "row 3 left out: no known layout: its columns are a" in said
    assert "2 left out: not usable" in said


def test_eval_keeps_every_completion_and_counts_over_problems(tiny_dir, tmp_path):
    stages = {
        "test": {
            "kind": "eval",
            "model": "base",
            "task": "sums",
            "problems": 3,
            "samples": 2,
            "pass_at": [1, 2],
            "sampling": {"max_tokens": 4},
            "engine": ENGINE,
        }
    }
    ctx = context(tmp_path, "test", {"base": str(tiny_dir)}, stages)
    result = evaluation.run(ctx.recipe.stages["test"], ctx)
    assert result.metrics["accuracy"]["n"] == 3
    assert set(result.metrics["pass_at"]) == {"1", "2"}
    assert open_traces(ctx.folder / "traces").num_rows == 6
    assert result.metrics["clipped_ratio"] == 1.0
