"""score: another model's distributions over traces that exist, whoever wrote them."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from scored_runs import context

from distill import models, recipe
from distill.engines.transformers import CHUNK, TransformersEngine
from distill.records import Request, Template, Traces, UserError
from distill.stages import score, sources
from distill.stages.context import Context
from distill.stages.plan import check_plugs, predict
from distill.stages.sources import render
from distill.traces import notes
from distill.traces.reader import open_traces


def make(run: Path, teachers: dict[str, Path], written: Path | None = None, **changes) -> Context:
    """A score stage's context, in a run whose traces stage is done."""
    if written is not None:
        shutil.copytree(written, run / "traces", dirs_exist_ok=True)
    return context(run, teachers, **changes)


def run_score(ctx: Context):
    return score.run(ctx.recipe.stages["scored"], ctx)


def rows_of(path: Path) -> dict[str, tuple[Traces, int]]:
    return {t: (b, n) for b in open_traces(path).blocks() for n, t in enumerate(b.trace_id)}


def check_against_a_forward_pass(folder: Path, path: Path) -> None:
    """Every position's numbers against transformers' own logits of the whole sequence."""
    import torch

    model = models.load(folder, dtype="float32").eval()
    rows = rows_of(path)
    assert rows
    for block, n in rows.values():
        prompt, reply = block.prompt_ids[n], block.completion_ids[n]
        ids = torch.from_numpy(np.concatenate([prompt, reply]).astype(np.int64))
        with torch.no_grad():
            logq = model(ids[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1).numpy()
        np.testing.assert_allclose(block.logprob[n], logq[np.arange(len(reply)), reply], atol=0.02)
        top = block.top_of(n)
        kept, logp = top.dense()
        for t in range(len(reply)):
            k = int(top.count_T[t])
            np.testing.assert_allclose(logp[t, :k], logq[t][kept[t, :k]], atol=0.05)
            assert set(kept[t, :k]) == set(np.argsort(-logq[t])[:k])


def test_scored_traces_are_the_same_rows_with_the_other_models_numbers(
    tiny_dir, other_dir, tmp_path, written
):
    ctx = make(tmp_path, {"a": tiny_dir, "b": other_dir}, written)
    result = run_score(ctx)
    before, after = rows_of(tmp_path / "traces/traces"), rows_of(ctx.folder / "traces")
    assert list(before) == list(after)
    for trace_id, (block, n) in before.items():
        mine, m = after[trace_id]
        for name in (
            "problem_id",
            "messages",
            "completion",
            "gold",
            "answer",
            "reward",
            "correct",
            "finish_reason",
        ):
            assert getattr(block, name)[n] == getattr(mine, name)[m]
        assert (block.completion_ids[n] == mine.completion_ids[m]).all()
        assert (block.prompt_ids[n] == mine.prompt_ids[m]).all()
        assert abs(block.logprob[n] - mine.logprob[m]).max() > 0.01
    check_against_a_forward_pass(other_dir, ctx.folder / "traces")
    metadata = open_traces(ctx.folder / "traces").metadata
    assert (metadata.model, metadata.weights) == ("b", models.weights_fingerprint(other_dir))
    assert metadata.sampling.max_tokens == 6
    lengths = open_traces(ctx.folder / "traces").lengths()
    assert result.cost.tokens_scored == int(lengths.prompt.sum() + lengths.completion.sum())
    assert result.cost.tokens_generated == 0
    assert result.cost.flops > 0
    nll = -np.concatenate([b.logprob[n] for b, n in after.values()]).mean()
    assert result.metrics["mean_nll"] == pytest.approx(nll, rel=1e-4)
    assert (
        notes.text_from(open_traces(ctx.folder / "traces"))
        == f"a (weights {models.weights_fingerprint(tiny_dir)})"
    )
    assert "its ids as they were sampled" in ctx.screen.getvalue()


def test_the_writer_scored_again_says_what_it_said_while_it_wrote(tiny_dir, tmp_path, written):
    """Generation and teacher-forced scoring are two paths to one number."""
    ctx = make(tmp_path, {"a": tiny_dir, "b": tiny_dir}, written)
    run_score(ctx)
    before, after = rows_of(tmp_path / "traces/traces"), rows_of(ctx.folder / "traces")
    for trace_id, (block, n) in before.items():
        np.testing.assert_allclose(
            block.logprob[n], after[trace_id][0].logprob[after[trace_id][1]], atol=0.02
        )


def test_resumed_is_uninterrupted(tiny_dir, other_dir, tmp_path, written):
    teachers = {"a": tiny_dir, "b": other_dir}
    whole = make(tmp_path / "whole", teachers, written, shard_rows=2)
    run_score(whole)
    ctx = make(tmp_path / "half", teachers, written, shard_rows=2)
    real = TransformersEngine.score
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "BLOCK_ROWS", 2)
        patch.setattr(TransformersEngine, "score", _after(real, 3, OSError))
        with pytest.raises(OSError):
            run_score(ctx)
    there = rows_of(ctx.folder / "traces")
    assert 0 < len(there) < 8
    scored: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TransformersEngine, "score", _noting(real, scored))
        run_score(ctx)
    assert sorted(scored) == sorted(set(rows_of(whole.folder / "traces")) - set(there))
    _same(rows_of(whole.folder / "traces"), rows_of(ctx.folder / "traces"))


def _after(real, number: int, error: type[Exception]):
    seen = []

    def score(self, requests, *, top_k=0):
        for completion in real(self, requests, top_k=top_k):
            seen.append(completion)
            if len(seen) > number:
                raise error
            yield completion

    return score


def _noting(real, names: list[str]):
    def score(self, requests, *, top_k=0):
        for completion in real(self, requests, top_k=top_k):
            names.append(completion.request_id)
            yield completion

    return score


def _same(mine: dict, theirs: dict) -> None:
    assert mine.keys() == theirs.keys()
    for trace_id, (block, n) in mine.items():
        other, m = theirs[trace_id]
        assert (block.logprob[n] == other.logprob[m]).all()
        a, b = block.top_of(n), other.top_of(m)
        assert all(
            (getattr(a, f) == getattr(b, f)).all() for f in ("count_T", "ids_E", "logp_E", "tail_T")
        )


CHAT = [
    {"messages": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "<think>a</think>2"}]},
    {"messages": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "two"}]},
    {"messages": [{"role": "user", "content": "no reply"}]},
    {"messages": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "two"}]},
    {"question": "2+2?", "completion": "4 " * 300},
    {"question": "2+2?", "completion": "four"},
]  # fmt: skip


def write_rows(path: Path) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in CHAT) + "not json\n")
    return path


def test_a_file_of_conversations_is_rendered_and_scored(tiny_dir, other_dir, tokenizer, tmp_path):
    rows = write_rows(tmp_path / "r1.jsonl")
    ctx = make(tmp_path, {"a": tiny_dir, "b": other_dir}, data=str(rows), max_tokens=100)
    result = run_score(ctx)
    blocks = list(open_traces(ctx.folder / "traces").blocks())
    assert [text for b in blocks for text in b.completion] == ["<think>a</think>2", "two", "four"]
    assert [int(s) for b in blocks for s in b.sample] == [0, 1, 1]
    (block,) = blocks
    assert block.problem_id[0] == block.problem_id[1] != block.problem_id[2]
    assert tokenizer.decode(block.completion_ids[1]) == "two<|im_end|>"
    assert tokenizer.decode(block.prompt_ids[2]).endswith("<|im_start|>assistant\n")
    assert "2+2?" in tokenizer.decode(block.prompt_ids[2])
    assert json.loads(block.messages[2]) == [{"role": "user", "content": "2+2?"}]
    check_against_a_forward_pass(other_dir, ctx.folder / "traces")
    assert result.metrics["left_out"] == {
        "not usable": 2,
        "the same conversation as an earlier one": 1,
        "longer than the limit": 1,
    }
    assert result.cost.samples_failed == 4
    said = ctx.screen.getvalue()
    assert "row 3 left out: there is no reply to score" in said
    assert "row 7 left out: not JSON" in said
    assert "1 traces left out: longer than the limit" in said
    assert "rendered in the model's own tokens" in said
    assert notes.text_from(open_traces(ctx.folder / "traces")).startswith("r1.jsonl (")


def test_two_teachers_of_the_same_data_give_the_same_ids(tiny_dir, other_dir, tmp_path):
    rows = write_rows(tmp_path / "r1.jsonl")
    first = make(tmp_path / "1", {"a": tiny_dir, "b": other_dir}, data=str(rows))
    second = make(tmp_path / "2", {"a": tiny_dir, "b": tiny_dir}, data=str(rows), top_k=4, mass=0.5)
    run_score(first)
    run_score(second)
    mine, theirs = rows_of(first.folder / "traces"), rows_of(second.folder / "traces")
    assert list(mine) == list(theirs)
    for trace_id, (block, n) in mine.items():
        other, m = theirs[trace_id]
        assert (block.prompt_ids[n] == other.prompt_ids[m]).all()
        assert (block.completion_ids[n] == other.completion_ids[m]).all()


def test_a_datasets_folder_and_its_splits(tiny_dir, other_dir, tmp_path):
    import datasets

    table = datasets.Dataset.from_list(CHAT[:2])
    datasets.DatasetDict({"train": table, "rest": table}).save_to_disk(str(tmp_path / "set"))
    data = str(tmp_path / "set")
    ctx = make(tmp_path, {"a": tiny_dir, "b": other_dir}, data=data)
    run_score(ctx)
    file = tmp_path / "same.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in CHAT[:2]))
    again = make(tmp_path / "file", {"a": tiny_dir, "b": other_dir}, data=str(file))
    run_score(again)
    _same(rows_of(ctx.folder / "traces"), rows_of(again.folder / "traces"))
    with pytest.raises(UserError, match=r"scored\.data: there is no split 'trian'. Did you mean"):
        run_score(make(tmp_path, {"a": tiny_dir, "b": other_dir}, data=data, split="trian"))


def test_another_tokenizer_gets_the_text_in_its_own_ids(tiny_dir, narrow_dir, tmp_path, written):
    with pytest.raises(UserError, match=r"scored\.task: is required here"):
        run_score(make(tmp_path, {"a": tiny_dir, "b": narrow_dir}, written))
    ctx = make(tmp_path, {"a": tiny_dir, "b": narrow_dir}, written, task="sums")
    run_score(ctx)
    before, after = rows_of(written / "traces"), rows_of(ctx.folder / "traces")
    assert before.keys() == after.keys()
    narrow = models.load_tokenizer(narrow_dir)
    for trace_id, (block, n) in before.items():
        mine, m = after[trace_id]
        assert block.finish_reason[n] == "length"
        want = narrow(block.completion[n], add_special_tokens=False)["input_ids"]
        assert mine.completion_ids[m].tolist() == want
    check_against_a_forward_pass(narrow_dir, ctx.folder / "traces")
    assert open_traces(ctx.folder / "traces").metadata.vocab_size == len(narrow)


def test_a_cut_trace_gets_no_eos_and_an_opened_thinking_is_not_opened_twice(tokenizer):
    def block(text: str, finish: str) -> Traces:
        columns = dict.fromkeys(Traces.__dataclass_fields__)
        return Traces(
            **{
                **columns,
                "messages": [json.dumps([{"role": "user", "content": "q"}])],
                "completion": [text],
                "finish_reason": [finish],
            }
        )

    opening = Template("opening", None, "{question}", str, prefill="<think>\n")
    plain = Template("plain", None, "{question}", str)
    for template, text, finish, reply in (
        (plain, "<think>\na", "stop", "<think>\na<|im_end|>"),
        (plain, "<think>\na", "length", "<think>\na"),
        (opening, "<think>\na</think>b", "stop", "a</think>b<|im_end|>"),
        (opening, "a</think>b", "length", "a</think>b"),
    ):
        rendered = render(block(text, finish), tokenizer, template)
        assert tokenizer.decode(rendered.completion_ids[0]) == reply
        assert rendered.completion[0] == reply.removesuffix("<|im_end|>")


def test_verdicts_by_the_tasks_judge_and_its_held_out_problems_left_out(
    tiny_dir, other_dir, tmp_path
):
    exam = tmp_path / "exam.jsonl"
    exam.write_text('{"question": "What is 3 + 4?", "answer": "7"}\n')
    rows = tmp_path / "rows.jsonl"
    answers = ("<think>x</think><answer>12</answer>", "<think>x</think><answer>13</answer>")
    kept = [{"question": "What is 5 + 7?", "completion": a, "answer": 12} for a in answers]
    unknown = {"question": "Why?", "completion": "because"}
    leak = {"question": "what is 3 + 4?", "completion": "<answer>7</answer>", "answer": "7"}
    rows.write_text("".join(json.dumps(row) + "\n" for row in [*kept, unknown, leak]))
    ctx = make(tmp_path, {"a": tiny_dir, "b": other_dir})
    tree = ctx.recipe.model_dump(mode="json")
    tree["tasks"]["exam"] = {"fn": "jsonl", "path": str(exam), "held_out": "all"}
    tree["stages"]["scored"] |= {"data": str(rows), "task": "exam"}
    ctx = Context(recipe=recipe.validate(tree), run=tmp_path, name="scored", screen=io.StringIO())
    result = run_score(ctx)
    (block,) = open_traces(ctx.folder / "traces").blocks()
    assert block.correct == [True, False, None]
    assert block.answer == ["12", "13", None]
    assert block.gold == ["12", "12", None]
    assert result.metrics["left_out"] == {"one of the task's held-out problems": 1}


def test_what_cannot_be_scored_is_said(tiny_dir, other_dir, tmp_path):
    teachers = {"a": tiny_dir, "b": other_dir}
    empty = tmp_path / "empty.jsonl"
    empty.write_text("{}\n")
    with pytest.raises(UserError, match="holds nothing to score"):
        run_score(make(tmp_path, teachers, data=str(empty)))
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="nor what `datasets` saved"):
        run_score(make(tmp_path, teachers, data=str(tmp_path / "folder")))
    with pytest.raises(UserError, match="is no stage, file, folder or hub dataset"):
        run_score(make(tmp_path, teachers, data="./none/at/all"))
    with pytest.raises(UserError, match=r"'nobody/nothing' cannot be loaded.*Without a network"):
        run_score(make(tmp_path, teachers, data="nobody/nothing"))


def test_a_score_stage_is_checked_and_predicted(tiny_dir, other_dir, tmp_path):
    ctx = make(tmp_path, {"a": tiny_dir, "b": other_dir})
    check_plugs(ctx.recipe)
    row = next(row for row in predict(ctx.recipe) if row.kind == "score")
    generated = next(row for row in predict(ctx.recipe) if row.kind == "generate")
    assert row.amounts["tokens"] == generated.amounts["tokens"]
    assert row.amounts["flops"] > 0
    file = make(
        tmp_path, {"a": tiny_dir, "b": other_dir}, data=str(write_rows(tmp_path / "r.jsonl"))
    )
    row = next(row for row in predict(file.recipe) if row.kind == "score")
    assert row.amounts["bytes"] > 0
    hub = make(tmp_path, {"a": tiny_dir, "b": other_dir}, data="someone/traces")
    row = next(row for row in predict(hub.recipe) if row.kind == "score")
    assert "unverified" in row.notes[0]


def test_a_long_trace_never_has_its_logits_at_once(tiny_dir):
    """The reference engine's head sees CHUNK positions at a time, whatever the length."""
    engine = TransformersEngine(
        tiny_dir, max_model_len=512, dtype="float32", batch_size=1, device="cpu"
    )
    seen: list[int] = []
    engine._model.get_output_embeddings().register_forward_hook(
        lambda module, inputs, out: seen.append(out.numel() // out.shape[-1])
    )
    ids = np.arange(100, 500, dtype=np.int32)
    (whole,) = engine.score([Request("a", ids[:20], completion_ids=ids[20:])], top_k=2)
    assert sum(seen) == 380
    assert max(seen) <= CHUNK < 380
    assert len(whole.logprob_T) == 380
