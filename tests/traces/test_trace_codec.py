"""Traces through Parquet and back, with our code and with nobody's."""

from __future__ import annotations

import json

import duckdb
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import trace_samples as samples

from distill.records import Ragged, TopK, UserError
from distill.traces import codec
from distill.traces.reader import decode_file, open_traces
from distill.traces.schema import COLUMNS, METADATA_KEY


def round_trip(traces, metadata):
    table, read = decode_file(codec.encode(codec.to_table(traces, metadata)), "shard")
    assert read == metadata
    return codec.from_table(table, read)


@pytest.mark.parametrize("top", [True, False])
def test_what_comes_back_is_what_went_in(top):
    block = samples.traces(range(40), top=top)
    back = round_trip(block, samples.metadata(top_k=16 if top else 0))
    for name in ("trace_id", "problem_id", "messages", "completion", "answer", "gold", "reward", "rewards",
                 "correct", "finish_reason"):  # fmt: skip
        assert getattr(back, name) == getattr(block, name), name
    for name in ("prompt_ids", "completion_ids", "logprob"):
        np.testing.assert_array_equal(getattr(back, name).values, getattr(block, name).values)
        np.testing.assert_array_equal(getattr(back, name).offsets, getattr(block, name).offsets)
    np.testing.assert_array_equal(back.sample, block.sample)
    if top:
        for name in ("count_T", "ids_E", "logp_E", "tail_T"):
            np.testing.assert_array_equal(getattr(back.top, name), getattr(block.top, name))
    else:
        assert back.top is None


def test_blocks_whose_offsets_do_not_start_at_zero():
    block = samples.traces(range(6))
    for name in ("prompt_ids", "logprob"):
        rows = getattr(block, name)
        shifted = Ragged(
            np.concatenate([rows.values[:3], rows.values, rows.values[:2]]), rows.offsets + 3
        )
        object.__setattr__(block, name, shifted)
    back = round_trip(block, samples.metadata())
    assert {
        t: samples.digest(back, n) for n, t in enumerate(back.trace_id)
    } == samples.expected_digests(range(6))


def test_no_rows_no_tokens_and_ids_near_the_end_of_a_vast_vocabulary():
    assert len(round_trip(samples.traces([]), samples.metadata())) == 0
    assert round_trip(samples.traces([0, 7]), samples.metadata()).top.ids_E.size == 0
    block = samples.traces([1])
    for size in (2**31, 2**32):
        block.completion_ids.values[0] = size - 1
        assert (
            round_trip(block, samples.metadata(vocab_size=size)).completion_ids.values[0]
            == size - 1
        )


def test_no_tail_is_minus_infinity_and_certainty_is_zero():
    block = samples.traces([1])
    num = len(block.completion_ids.values)
    sure = TopK(
        np.ones(num, np.int32),
        np.full(num, 3),
        np.zeros(num, np.float32),
        np.full(num, -np.inf, np.float32),
    )
    object.__setattr__(block, "top", sure)
    back = round_trip(block, samples.metadata())
    assert (back.top.tail_T == -np.inf).all()
    assert (back.top.logp_E == 0).all()


def test_strange_text_never_fails_and_always_reads_the_same(tmp_path):
    strange = {
        "lone \ud800 surrogate": "lone \ufffd surrogate",
        "pair \ud83d\ude00": "pair \U0001f600",
        "nul \x00 and \x1b bell \x07": "nul \x00 and \x1b bell \x07",
        "<script>alert(1)</script>\r\n\u2028": "<script>alert(1)</script>\r\n\u2028",
        "": "",
        "x" * 3_000_000: "x" * 3_000_000,
    }
    block = samples.traces(range(1, 1 + len(strange)))
    for name in ("completion", "answer", "gold"):
        getattr(block, name)[:] = list(strange)
    block.messages[:] = [json.dumps([{"role": "user", "content": text}]) for text in strange]
    back = round_trip(block, samples.metadata())
    for column in (back.completion, back.answer, back.gold):
        assert column == list(strange.values())
    assert [json.loads(m)[0]["content"] for m in back.messages] == list(strange.values())
    again = codec.encode(codec.to_table(back, samples.metadata()))
    assert again == codec.encode(codec.to_table(block, samples.metadata()))
    path = tmp_path / "strange.parquet"
    path.write_bytes(again)
    read = duckdb.sql(f"select completion from '{path}' order by trace_id").fetchall()
    assert [text for (text,) in read] == list(strange.values())


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("ids", lambda b: b.completion_ids.values.__setitem__(0, samples.VOCAB)),
        ("ids", lambda b: b.prompt_ids.values.__setitem__(0, -1)),
        ("ids", lambda b: b.top.ids_E.__setitem__(0, samples.VOCAB)),
        ("logprob", lambda b: b.logprob.values.__setitem__(0, np.nan)),
        ("logprob", lambda b: b.logprob.values.__setitem__(0, 0.5)),
        ("log-prob", lambda b: b.top.logp_E.__setitem__(0, -np.inf)),
        ("tail", lambda b: b.top.tail_T.__setitem__(0, np.nan)),
        ("columns of top", lambda b: b.top.count_T.__setitem__(0, 99)),
        ("rows", lambda b: b.correct.pop()),
        ("keys role and content", lambda b: b.messages.__setitem__(0, '[{"role": "user"}]')),
    ],
)
def test_columns_that_contradict_each_other_are_refused(name, change):
    block = samples.traces(range(1, 4))
    change(block)
    with pytest.raises(ValueError, match=name):
        codec.to_table(block, samples.metadata())


# ------------------------------------------------------------------------------------------- other readers


def test_pandas_alone_decodes_the_distribution(tmp_path):
    path = samples.write(tmp_path / "traces", 16) / "shard-0-00000.parquet"
    frame = pd.read_parquet(path)
    assert list(frame.columns) == list(COLUMNS)
    block = samples.traces(range(16))
    for n, row in frame.iterrows():
        top = block.top_of(n)
        ends = np.cumsum(row.top_count)
        for t, end in enumerate(ends):
            start = end - row.top_count[t]
            want = top.slice(t, t + 1)
            np.testing.assert_array_equal(row.top_ids[start:end], want.ids_E)
            np.testing.assert_array_equal(row.top_logprobs[start:end], want.logp_E)
            np.testing.assert_allclose(
                np.exp(row.top_logprobs[start:end].astype(float)).sum()
                + np.exp(row.tail_logprob[t]),
                1,
                atol=1e-5,
            )
        assert json.loads(block.messages[n]) == list(row.messages)
        assert dict(row.rewards)["format"] == 0.5


def test_duckdb_alone_decodes_the_distribution(tmp_path):
    path = samples.write(tmp_path / "traces", 16) / "*.parquet"
    rows = duckdb.sql(
        f"""
        with position as (
            select trace_id, unnest(top_count) as count, unnest(tail_logprob) as tail,
                   generate_subscripts(top_count, 1) as t, top_ids, top_logprobs, top_count
            from '{path}')
        select trace_id, t, tail, top_ids[list_sum(top_count[1:t]) - count + 1 : list_sum(top_count[1:t])],
               top_logprobs[list_sum(top_count[1:t]) - count + 1 : list_sum(top_count[1:t])]
        from position order by trace_id, t
        """
    ).fetchall()
    block = samples.traces(range(16))
    want = [
        (block.trace_id[n], t + 1, at.tail_T[0], at.ids_E.tolist(), at.logp_E.tolist())
        for n in range(16)
        for t in range(len(block.completion_ids[n]))
        for at in [block.top_of(n).slice(t, t + 1)]
    ]
    assert rows == want
    verdicts = duckdb.sql(
        f"select count(*), sum(rewards['accuracy']), sum(correct::int) from '{path}'"
    ).fetchall()
    assert verdicts == [
        (
            16,
            sum(r or 0 for r in block.rewards["accuracy"]),
            sum(c is True for c in block.correct),
        )
    ]


def test_the_file_says_what_it_is(tmp_path):
    path = samples.write(tmp_path / "traces", 3) / "shard-0-00000.parquet"
    tree = json.loads(pq.read_schema(path).metadata[METADATA_KEY])
    assert tree["sampling"] == {"temperature": 1.0, "top_p": 1.0, "max_tokens": 256}
    assert tree == open_traces(path).metadata.model_dump()


def test_another_schema_version_is_refused_naming_both():
    table = codec.to_table(samples.traces([1]), samples.metadata())
    tree = json.loads(samples.metadata().to_json()) | {"schema_version": 7}
    data = codec.encode(table.replace_schema_metadata({METADATA_KEY: json.dumps(tree)}))
    with pytest.raises(UserError, match=r"version 7.*version 0"):
        decode_file(data, "shard")


def test_a_parquet_file_of_another_sort_is_refused(tmp_path):
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(UserError, match="not a trace shard"):
        open_traces(tmp_path / "a.parquet")
