"""Traces from Python: single rows, slices, batches, workers, `datasets`, selections, damaged shards."""

from __future__ import annotations

import pickle
import shutil

import numpy as np
import pytest
import torch
import trace_samples as samples
from torch.utils.data import DataLoader

import distill
from distill.recipe import PlugConfig
from distill.traces.batches import IGNORED, collate
from distill.traces.dataset import TraceDataset
from distill.traces.reader import open_traces
from distill.traces.selection import select

NUM = 40


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    return samples.write(tmp_path_factory.mktemp("stored") / "traces", NUM)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "traces"


def names(traces) -> list[str]:
    return [trace["trace_id"] for trace in traces]


def check_row(trace, number: int) -> None:
    """Compare a trace with the sample of its number, as `trace_samples` makes it."""
    want = samples.traces([number])
    assert trace["trace_id"] == want.trace_id[0]
    assert trace["messages"] == [dict(turn) for turn in want.messages[0]]
    assert (trace["completion"], trace["gold"]) == (want.completion[0], want.gold[0])
    assert (trace["reward"], trace["correct"]) == (want.reward[0], want.correct[0])
    assert trace["rewards"] == {name: column[0] for name, column in want.rewards.items()}
    np.testing.assert_array_equal(trace["prompt_ids"], want.prompt_ids[0])
    np.testing.assert_array_equal(trace["completion_ids"], want.completion_ids[0])
    np.testing.assert_array_equal(trace["logprob"], want.logprob[0])
    ids_TK, logp_TK = want.top.dense()
    np.testing.assert_array_equal(trace["top_ids"], ids_TK)
    np.testing.assert_array_equal(trace["top_logprobs"], logp_TK)
    np.testing.assert_array_equal(trace["tail_logprob"], want.top.tail_T)
    assert trace["draw_ids"] is None


def test_every_row_is_what_was_written_in_order_and_by_number(stored, cache):
    traces = distill.load_traces(stored)
    assert len(traces) == NUM
    for number, trace in enumerate(traces):
        check_row(trace, number)
    assert not cache.exists()  # iteration needs no copy
    for number in (37, 0, 16, 15, NUM - 1):
        check_row(traces[number], number)
    assert traces[-1]["trace_id"] == traces[NUM - 1]["trace_id"]
    assert len(list(cache.glob("*.arrow"))) == 3  # of the shards that were asked for, once each
    with pytest.raises(IndexError, match="trace 40 of 40"):
        traces[NUM]
    assert traces.metadata["model"] == "teacher"
    assert "40 traces of teacher" in repr(traces)


def test_slices_and_lists_are_datasets_too(stored):
    traces = distill.load_traces(stored)
    part = traces[30:10:-7]
    assert isinstance(part, TraceDataset)
    assert names(part) == [f"trace{n:06d}" for n in (30, 23, 16)]
    assert names(part[1:]) == names(traces[[23, 16]]) == names(traces[torch.tensor([23, 16])])
    assert names(traces[12:20]) == [f"trace{n:06d}" for n in range(12, 20)]
    assert len(traces[40:]) == 0
    assert list(traces[40:]) == []
    assert names(pickle.loads(pickle.dumps(part))) == names(part)


def test_a_selection_reads_the_same(stored, tmp_path):
    select(stored, tmp_path / "kept", [PlugConfig(fn="correct")])
    kept = distill.load_traces(tmp_path / "kept")
    want = [trace_id for block in open_traces(tmp_path / "kept").blocks() for trace_id in block.trace_id]
    assert 0 < len(want) < NUM
    assert names(kept) == [kept[n]["trace_id"] for n in range(len(kept))] == kept.to_datasets()["trace_id"] == want
    assert all(trace["correct"] for trace in kept)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_gives_batches_aligned_with_the_labels(stored, workers):
    traces = distill.load_traces(stored)
    loader = DataLoader(traces, batch_size=6, shuffle=True, num_workers=workers, collate_fn=traces.collate)
    # The prompts are random ids, so that they tell the traces apart.
    numbers = {tuple(samples.traces([n]).prompt_ids[0].tolist()): n for n in range(NUM)}
    seen = []
    for batch in loader:
        for row, prompt in enumerate(batch["input_ids"][:, :5].tolist()):
            seen.append(numbers[tuple(prompt)])
            want = samples.traces(seen[-1:])
            place = batch["labels"][row] != IGNORED
            length = len(want.completion_ids[0])
            assert place.sum() == length
            assert batch["attention_mask"][row].sum() == 5 + length
            np.testing.assert_array_equal(batch["labels"][row][place], want.completion_ids[0])
            np.testing.assert_array_equal(batch["input_ids"][row][place], want.completion_ids[0])
            np.testing.assert_array_equal(batch["tail_logprob"][row][place], want.top.tail_T)
            mass = batch["top_logprobs"][row].exp().sum(-1)
            np.testing.assert_array_equal(mass[~place], 0)
            torch.testing.assert_close(
                mass[place] + batch["tail_logprob"][row][place].exp(), torch.ones(length), atol=0.02, rtol=0
            )
    assert sorted(seen) == list(range(NUM))


def test_datasets_has_the_same_values_flat_by_position(stored):
    traces = distill.load_traces(stored)
    table = traces.to_datasets()
    assert len(table) == NUM
    for number in (3, 20):
        row, want = table[number], samples.traces([number])
        assert row["completion_ids"] == want.completion_ids[0].tolist()
        assert row["top_count"] == want.top.count_T.tolist()
        assert row["top_ids"] == want.top.ids_E.tolist()
        np.testing.assert_array_equal(row["top_logprobs"], want.top.logp_E)
        np.testing.assert_array_equal(row["tail_logprob"], want.top.tail_T)
    some = [3, 20, 5]
    mine, theirs = traces.collate([traces[n] for n in some]), collate([table[n] for n in some])
    assert mine.keys() == theirs.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=0, atol=0)
    longest = table.map(lambda row: {"tokens": len(row["completion_ids"])}, keep_in_memory=True)
    assert max(longest["tokens"]) == max(len(trace["completion_ids"]) for trace in traces)
    assert traces[[5, 2]].to_datasets()["trace_id"] == ["trace000005", "trace000002"]


def test_traces_without_distributions(tmp_path):
    from distill.traces.writer import TraceWriter

    with TraceWriter(tmp_path / "plain", samples.metadata(top_k=0, mass=1.0)) as writer:
        writer.add(samples.traces(range(4), top=False))
    traces = distill.load_traces(tmp_path / "plain")
    assert traces[1]["top_ids"] is None
    batch = traces.collate([traces[1], traces[2]])
    assert "top_ids" not in batch
    assert "top_ids" not in traces.to_datasets().column_names


def test_damaged_and_missing_shards_are_data_errors(stored, tmp_path):
    copy = shutil.copytree(stored, tmp_path / "copy")
    traces = distill.load_traces(copy)
    assert traces[20]["trace_id"] == "trace000020"
    shard = copy / "shard-0-00001.parquet"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    fresh = distill.load_traces(copy)
    for ask in (lambda: fresh[20], lambda: list(fresh), fresh.to_datasets):  # although a copy of it is in the cache
        with pytest.raises(distill.DataError, match=r"shard-0-00001\.parquet: damaged"):
            ask()
    assert fresh[2]["trace_id"] == "trace000002"
    shard.unlink()
    with pytest.raises(distill.DataError, match="missing"):
        distill.load_traces(copy)[20]
    with pytest.raises(distill.DataError, match="no traces here"):
        distill.load_traces(tmp_path / "nothing")
