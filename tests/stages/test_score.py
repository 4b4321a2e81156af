"""score: a model's distributions over existing traces of any origin."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scored_runs import context

from distill import models, recipe, run_folder
from distill.compute.ledger import StageCost, arm_cost
from distill.engines.transformers import CHUNK, TransformersEngine
from distill.models import hub
from distill.progress import Screen
from distill.recipe import Input, RowsConfig
from distill.records import Cost, Request, Template, Traces, UserError
from distill.run import decide, nodes
from distill.run.plan import check_plugs, predict
from distill.stages import score
from distill.stages.context import Context
from distill.stages.inputs import score_inputs
from distill.stages.inputs.conversation_data import DroppedRows, open_rows
from distill.stages.inputs.score_inputs import render
from distill.traces import provenance
from distill.traces.reader import open_traces
from distill.traces.verify import verify
from distill.traces.writer import TraceWriter


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
    """The values at every position against transformers' logits of the whole sequence."""
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


def test_scored_traces_are_the_same_rows_with_the_other_models_numbers(tiny_dir, other_dir, tmp_path, written):
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
        provenance.text_from(open_traces(ctx.folder / "traces"))
        == f"a (weights {models.weights_fingerprint(tiny_dir)})"
    )
    assert "its token ids are used as stored" in ctx.screen.stream.getvalue()


def test_the_writer_scored_again_says_what_it_said_while_it_wrote(tiny_dir, tmp_path, written):
    """Generation and teacher-forced scoring give the same log-probabilities."""
    ctx = make(tmp_path, {"a": tiny_dir, "b": tiny_dir}, written)
    run_score(ctx)
    before, after = rows_of(tmp_path / "traces/traces"), rows_of(ctx.folder / "traces")
    for trace_id, (block, n) in before.items():
        np.testing.assert_allclose(block.logprob[n], after[trace_id][0].logprob[after[trace_id][1]], atol=0.02)


def test_resumed_is_uninterrupted(tiny_dir, other_dir, tmp_path, written):
    teachers = {"a": tiny_dir, "b": other_dir}
    whole = make(tmp_path / "whole", teachers, written, shard_rows=2)
    run_score(whole)
    ctx = make(tmp_path / "half", teachers, written, shard_rows=2)
    real = TransformersEngine.score
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(score_inputs, "BLOCK_ROWS", 2)
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
        assert all((getattr(a, f) == getattr(b, f)).all() for f in ("count_T", "ids_E", "logp_E", "tail_T"))


def test_data_that_changed_is_scored_where_it_is_new(tiny_dir, other_dir, tmp_path, written):
    """Score four of eight traces, then all, then three: nothing is scored twice and nothing extra is kept."""
    ids = list(rows_of(written / "traces"))
    teachers = {"a": tiny_dir, "b": other_dir}
    ctx = make(tmp_path, teachers, written)
    whole = make(tmp_path / "whole", teachers, written)
    run_score(whole)
    real = TransformersEngine.score
    for wanted, new in ((ids[:4], 4), (ids, 4), (ids[2:5], 0), (ids, 5)):
        shutil.rmtree(tmp_path / "traces/traces")
        source = open_traces(written / "traces")
        with TraceWriter(tmp_path / "traces/traces", source.metadata) as writer:
            for block in source.where(np.isin(ids, wanted)).blocks():
                writer.add(block)
        scored: list[str] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TransformersEngine, "score", _noting(real, scored))
            run_score(ctx)
        assert len(scored) == new
        assert verify(ctx.folder / "traces").ok
        want = {i: row for i, row in rows_of(whole.folder / "traces").items() if i in wanted}
        _same(want, rows_of(ctx.folder / "traces"))
    assert "5 traces of an earlier attempt are no longer wanted" in ctx.screen.stream.getvalue()
    (former,) = (tmp_path / ".old").iterdir()
    assert set(rows_of(former)) == set(ids)


def test_carrying_over_survives_a_kill_between_its_two_renames(tiny_dir, other_dir, tmp_path, written):
    ctx = make(tmp_path, {"a": tiny_dir, "b": other_dir}, written)
    folder = tmp_path / "scored" / "traces"
    shutil.copytree(written / "traces", folder)
    reader = open_traces(folder)
    want = rows_of(folder)
    ids = list(want)
    known = {i: (int(block.sample[n]), block.gold[n]) for i, (block, n) in want.items()}
    last = {i: known[i] for i in ids[3:]}
    renames: list[Path] = []
    real = Path.rename

    def killed(self, target):
        if renames:
            raise KeyboardInterrupt
        renames.append(self)
        return real(self, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            score.carry_over(ctx, folder, reader.metadata, last)
    assert not folder.exists()
    score.carry_over(ctx, folder, reader.metadata, last)
    _same({i: want[i] for i in ids[3:]}, rows_of(folder))
    (folder.with_name(".carrying")).mkdir()
    score.carry_over(ctx, folder, reader.metadata, last)
    assert not folder.with_name(".carrying").exists()
    other = reader.metadata.model_copy(update={"weights": "others"})
    score.carry_over(ctx, folder, other, known)
    assert not list(folder.glob("*.parquet"))


def test_a_file_that_grew_or_was_corrected_is_scored_where_it_is_new(tiny_dir, other_dir, tmp_path):
    rows = [{"question": q, "completion": f"{q}!", "answer": q} for q in "abc"]
    ctx = make(tmp_path, {"a": tiny_dir, "b": other_dir}, data=str(tmp_path / "rows.jsonl"))
    real, seen = TransformersEngine.score, []
    for correct, more, new in (
        ({}, [], "abc"),
        ({}, ["d"], "d"),
        ({"b": "B"}, [], "b"),
        ({}, [], ""),
    ):
        rows = [row | {"answer": correct.get(row["question"], row["answer"])} for row in rows]
        rows += [{"question": q, "completion": f"{q}!", "answer": q} for q in more]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        scored: list[str] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TransformersEngine, "score", _noting(real, scored))
            run_score(ctx)
        there = {block.completion[n][0]: (block, n) for block, n in rows_of(ctx.folder / "traces").values()}
        assert {block.trace_id[n] for block, n in (there[q] for q in new)} == set(scored)
        assert {q: block.gold[n] for q, (block, n) in there.items()} == {row["question"]: row["answer"] for row in rows}
        seen.append(open_traces(ctx.folder / "traces").metadata.source)
    assert len(set(seen)) == 3


COMMITS = ("1" * 40, "2" * 40)


@pytest.fixture
def cached_dataset(tmp_path, monkeypatch):
    """A hub dataset in the library's cache; the second call makes a newer commit."""
    import datasets.config
    from datasets.arrow_writer import ArrowWriter

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    hub.dataset_commit.cache_clear()

    def cache(commit: str, questions: str) -> None:
        folder = tmp_path / "cache" / "some___chats" / "default" / "0.0.0" / commit
        folder.mkdir(parents=True)
        features = datasets.Features(dict.fromkeys(("question", "completion"), datasets.Value("string")))
        with ArrowWriter(path=str(folder / "chats-train.arrow"), features=features) as writer:
            for question in questions:
                writer.write({"question": question, "completion": f"{question}!"})
            num, size = writer.finalize()
        split = datasets.SplitInfo("train", num_bytes=size, num_examples=num, dataset_name="chats")
        info = datasets.DatasetInfo(
            features=features, builder_name="parquet", dataset_name="chats", config_name="default",
            version="0.0.0", splits=datasets.SplitDict({"train": split}),
        )  # fmt: skip
        info.write_to_directory(str(folder))
        hub.dataset_commit.cache_clear()

    yield cache
    hub.dataset_commit.cache_clear()


def test_a_hub_dataset_counts_by_the_commit_that_is_read(tiny_dir, other_dir, tmp_path, cached_dataset):
    ctx = make(tmp_path, {"a": tiny_dir, "b": other_dir}, data="some/chats")
    node = next(n for n in nodes.nodes(ctx.recipe) if n.name == "scored")

    def action() -> str:
        return decide.decide(node, ctx.recipe, tmp_path).action

    def finish() -> str:
        run_score(ctx)
        inputs = decide.input_fingerprints(node, ctx.recipe, tmp_path)
        config = node.config.model_dump(mode="json")
        run_folder.write(ctx.folder, run_folder.State("score", config, inputs, status="done"))
        return inputs["data"]

    assert decide.input_fingerprints(node, ctx.recipe, tmp_path)["data"] == hub.UNVERIFIED
    cached_dataset(COMMITS[0], "ab")
    assert finish() == COMMITS[0]
    assert open_traces(ctx.folder / "traces").metadata.source == f"some/chats ({COMMITS[0][:16]}), split train"
    assert action() == "skip"
    cached_dataset(COMMITS[1], "abc")
    assert action() == "grow"
    assert finish() == COMMITS[1]
    assert open_traces(ctx.folder / "traces").num_rows == 3
    # A file that is gone does not count as changed.
    shutil.rmtree(tmp_path / "cache")
    hub.dataset_commit.cache_clear()
    assert action() == "skip"


def test_a_hub_dataset_at_a_revision(tmp_path, cached_dataset):
    cached_dataset(COMMITS[0], "ab")
    assert hub.dataset_id(f"some/chats@{COMMITS[0]}") == ("some/chats", COMMITS[0])
    assert hub.dataset_commit("some/chats", COMMITS[1]) == COMMITS[1]
    assert hub.dataset_commit("some/chats", "main") == hub.UNVERIFIED
    source = open_rows(f"some/chats@{COMMITS[0]}", RowsConfig(), "data")
    assert len(list(source.rows(lambda number, reason: None))) == 2
    with pytest.raises(UserError, match=f"there is only some/chats@{COMMITS[0]}"):
        open_rows(f"some/chats@{COMMITS[1]}", RowsConfig(), "data")
    with pytest.raises(UserError, match="Without a network, give a JSONL"):
        open_rows("some/others", RowsConfig(), "data")


def test_only_moved_data_is_added_to(tiny_dir, other_dir, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "a", "completion": "b"}\n')
    ctx = make(tmp_path, {"a": tiny_dir, "b": other_dir}, data=str(rows))
    node = next(n for n in nodes.nodes(ctx.recipe) if n.name == "scored")
    inputs = {each.field: decide.input_fingerprint(ctx.recipe, tmp_path, each.name) for each in node.inputs}
    config = node.config.model_dump(mode="json")

    def action(**moved: str) -> str:
        run_folder.write(ctx.folder, run_folder.State("score", config, inputs | moved, status="done"))
        return decide.decide(node, ctx.recipe, tmp_path).action

    assert action() == "skip"
    assert action(data="another") == "grow"
    assert action(model="another") == "redo"
    assert action(model="another", data="another") == "redo"


def test_an_arm_on_scored_traces_pays_for_writing_and_scoring():
    parents = {
        "traces": [Input("model", "writer"), Input("task", "sums")],
        "scored": [Input("model", "teacher"), Input("data", "traces")],
        "kl": [Input("model", "base"), Input("data", "scored")],
    }
    stages = {
        "traces": StageCost(False, Cost(tokens_generated=5)),
        "scored": StageCost(False, Cost(tokens_scored=7)),
        "kl": StageCost(True, Cost(tokens_trained=11)),
    }
    cost = arm_cost("kl", stages, parents)
    assert cost.student == Cost(tokens_trained=11)
    assert cost.with_inference == Cost(tokens_trained=11, tokens_scored=7, tokens_generated=5)


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
    assert block.messages[2] == ({"role": "user", "content": "2+2?"},)
    check_against_a_forward_pass(other_dir, ctx.folder / "traces")
    assert result.metrics["left_out"] == {
        "not usable": 2,
        "the same conversation as an earlier one": 1,
        "longer than the limit": 1,
    }
    assert result.cost.samples_failed == 4
    said = ctx.screen.stream.getvalue()
    assert "row 3 left out: there is no reply to score" in said
    assert "row 7 left out: not JSON" in said
    assert "1 traces left out: longer than the limit" in said
    assert "it is tokenised with this model's tokenizer" in said
    assert provenance.text_from(open_traces(ctx.folder / "traces")).startswith("r1.jsonl (")


def test_two_teachers_of_the_same_data_give_the_same_ids(tiny_dir, other_dir, tmp_path):
    rows = write_rows(tmp_path / "r1.jsonl")
    first = make(tmp_path / "1", {"a": tiny_dir, "b": other_dir}, data=str(rows))
    second = make(tmp_path / "2", {"a": tiny_dir, "b": tiny_dir}, data=str(rows), top_logprobs=4, mass=0.5)
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
    with pytest.raises(UserError, match=r"scored\.data: .*: there is no split 'trian'. Did you mean"):
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
                "messages": [({"role": "user", "content": "q"},)],
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
        rendered = render(block(text, finish), tokenizer, template, DroppedRows())
        assert tokenizer.decode(rendered.completion_ids[0]) == reply
        assert rendered.completion[0] == reply.removesuffix("<|im_end|>")


def test_verdicts_by_the_tasks_judge_and_its_held_out_problems_left_out(tiny_dir, other_dir, tmp_path):
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
    ctx = Context(recipe=recipe.validate(tree), run=tmp_path, name="scored", screen=Screen(io.StringIO()))
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
    with pytest.raises(UserError, match="has no trace that can be scored"):
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
    file = make(tmp_path, {"a": tiny_dir, "b": other_dir}, data=str(write_rows(tmp_path / "r.jsonl")))
    row = next(row for row in predict(file.recipe) if row.kind == "score")
    assert row.amounts["bytes"] > 0
    hub = make(tmp_path, {"a": tiny_dir, "b": other_dir}, data="someone/traces")
    row = next(row for row in predict(hub.recipe) if row.kind == "score")
    assert "unverified" in row.notes[0]


def test_a_long_trace_never_has_its_logits_at_once(tiny_dir):
    """The reference engine's head computes at most CHUNK positions at a time, for any length."""
    engine = TransformersEngine(tiny_dir, max_model_len=512, dtype="float32", batch_size=1, device="cpu")
    seen: list[int] = []
    engine._model.get_output_embeddings().register_forward_hook(
        lambda module, inputs, out: seen.append(out.numel() // out.shape[-1])
    )
    ids = np.arange(100, 500, dtype=np.int32)
    (whole,) = engine.score([Request("a", ids[:20], completion_ids=ids[20:])], top_k=2)
    assert sum(seen) == 380
    assert max(seen) <= CHUNK < 380
    assert len(whole.logprob_T) == 380


@pytest.mark.slow
def test_the_real_model_through_the_command_line(smollm2_dir, tokenizer, tmp_path):
    """vLLM's scores of a file, one row longer than a scoring step, against transformers in float32; then an audit."""
    import torch

    words = " ".join(f"{n} plus {n + 1} is {2 * n + 1}, I think;" for n in range(140))
    rows = [
        ("What is 12 + 30?", "<think>12 + 30 = 42.</think><answer>42</answer>"),
        ("Write a line about the sea.", "The sea is wide, and blue, and it does not mind."),
        ("Add many numbers.", f"<think>{words}</think><answer>done</answer>"),
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"question": q, "completion": c}) + "\n" for q, c in rows))
    recipe_file = tmp_path / "real.yaml"
    stage = {"kind": "score", "model": "base", "data": str(data), "top_logprobs": 32, "mass": 0.95}
    tree = {"name": "real", "models": {"base": str(smollm2_dir)}, "stages": {"scored": stage}}
    recipe_file.write_text(json.dumps(tree))

    def distill(*arguments: str) -> str:
        command = [sys.executable, "-m", "distill.cli", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=800)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    said = distill("run", str(recipe_file), "--kind", "score", "--runs", str(tmp_path))
    assert "it is tokenised with this model's tokenizer" in said
    folder = tmp_path / "real" / "scored" / "traces"
    model = models.load(smollm2_dir, dtype="float32").eval()
    (block,) = open_traces(folder).blocks()
    assert len(block) == 3
    assert int(block.completion_ids.lengths.max()) > 1200
    errors = []
    for n in range(3):
        prompt, reply = block.prompt_ids[n], block.completion_ids[n]
        ids = torch.from_numpy(np.concatenate([prompt, reply]).astype(np.int64))
        with torch.inference_mode():
            logq = model(ids[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1).numpy()
        errors.append(np.abs(block.logprob[n] - logq[np.arange(len(reply)), reply]))
        top = block.top_of(n)
        kept, logp = top.dense()
        agree = [logq[t][kept[t, 0]] >= logq[t].max() - 0.5 for t in range(len(reply))]
        assert np.mean(agree) > 0.99
        np.testing.assert_allclose(np.exp(logp).sum(1) + np.exp(top.tail_T), 1, atol=1e-3)
    print("mean and worst difference", np.concatenate(errors).mean(), np.concatenate(errors).max())
    assert np.concatenate(errors).mean() < 0.03
    said = distill("traces", "verify", str(folder), "--audit", "40", "--engine", "transformers")
    print(said)
    assert "40 positions of" in said
    assert provenance.certificate(open_traces(folder)) is not None
