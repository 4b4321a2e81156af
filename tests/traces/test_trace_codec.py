"""Traces through Parquet and back, with our code and with other Parquet readers."""

from __future__ import annotations

import json

import duckdb
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import trace_samples as samples

from distill.records import Ragged, TopK, UserError
from distill.traces import codec, quantisation
from distill.traces.reader import decode_file, open_traces
from distill.traces.schema import METADATA_KEY


def encoded(traces, metadata):
    return codec.encode(codec.to_table(traces, metadata), metadata)


def round_trip(traces, metadata):
    table, read = decode_file(encoded(traces, metadata), "shard")
    assert read == metadata
    return codec.from_table(table, read)


@pytest.mark.parametrize("top", [True, False])
def test_a_round_trip_changes_nothing(top):
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
        shifted = Ragged(np.concatenate([rows.values[:3], rows.values, rows.values[:2]]), rows.offsets + 3)
        object.__setattr__(block, name, shifted)
    back = round_trip(block, samples.metadata())
    assert {t: samples.digest(back, n) for n, t in enumerate(back.trace_id)} == samples.expected_digests(range(6))


def test_a_slice_of_a_table_is_its_rows():
    whole, rows = samples.traces(range(1, 9)), samples.traces(range(3, 6))
    back = codec.from_table(codec.to_table(whole, samples.metadata()).slice(2, 3), samples.metadata())
    assert back.trace_id == rows.trace_id
    for name in ("prompt_ids", "completion_ids", "logprob"):
        np.testing.assert_array_equal(getattr(back, name).values, getattr(rows, name).values)
        np.testing.assert_array_equal(getattr(back, name).offsets, getattr(rows, name).offsets)
    for name in ("count_T", "ids_E", "logp_E", "tail_T"):
        np.testing.assert_array_equal(getattr(back.top, name), getattr(rows.top, name))


def test_no_rows_no_tokens_and_ids_near_the_end_of_a_vast_vocabulary():
    assert len(round_trip(samples.traces([]), samples.metadata())) == 0
    assert round_trip(samples.traces([0, 7]), samples.metadata()).top.ids_E.size == 0
    block = samples.traces([1])
    for size in (2**31, 2**32):
        block.completion_ids.values[0] = size - 1
        assert round_trip(block, samples.metadata(vocab_size=size)).completion_ids.values[0] == size - 1


def raw_distribution(num: int, rng: np.random.Generator) -> TopK:
    """Return a distribution as an engine gives it: peaked and flat, cut by mass and by number, some certain, some without a tail."""
    logits = rng.gumbel(size=(num, 400)) * rng.gamma(2.0, 2.0, size=(num, 1))
    logits[rng.random(num) < 0.1, 0] += 60
    logp = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    order = np.argsort(-logp, axis=1)[:, :300]
    ids = np.argsort(rng.random((num, 400)), axis=1)[:, :300]
    full = TopK.from_dense(ids, np.take_along_axis(logp, order, 1))
    return full.truncate(top_k=int(rng.integers(1, 300)), mass=float(rng.uniform(0.5, 1)))


@pytest.mark.parametrize("top_k", [None, 1, 7])
@pytest.mark.parametrize("mass", [None, 0.6, 0.95, 1.0])
def test_truncation_is_the_smallest_head_that_reaches_the_mass(top_k, mass):
    rng = np.random.default_rng(6)
    logits = rng.gumbel(size=(50, 20)) * rng.uniform(0.5, 4, size=(50, 1))
    logp = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    ids = rng.permuted(np.tile(np.arange(20), (50, 1)), axis=1)
    cut = TopK.from_dense(ids[:, :15], logp[:, :15]).truncate(top_k=top_k, mass=mass)
    for t in range(50):
        pairs = sorted(
            zip(np.exp(logp[t, :15].astype(np.float32).astype(float)), ids[t], strict=False),
            reverse=True,
        )
        kept, total = [], 0.0
        for probability, token in pairs:
            if kept and (len(kept) == top_k or (mass is not None and total >= mass)):
                break
            kept.append(token)
            total += probability
        at = cut.slice(t, t + 1)
        assert at.ids_E.tolist() == kept
        assert np.exp(at.tail_T[0]) == pytest.approx(1 - total, abs=1e-6)


@pytest.mark.parametrize("seed", range(8))
def test_rounding_stays_within_the_stated_error_and_happens_once(seed):
    top = raw_distribution(300, np.random.default_rng(seed))
    steps_E, tail_T = quantisation.quantise(top)
    assert (steps_E.dtype, tail_T.dtype) == (np.uint16, np.float32)
    logp_E = quantisation.dequantise(top.count_T, steps_E, tail_T)
    errors, start = [], 0
    for t, count in enumerate(top.count_T):
        # The formula of the data card, a position at a time, in float64.
        weight = np.exp(-np.cumsum(steps_E[start : start + count].astype(int)) / 32)
        tail = np.exp(float(tail_T[t]))
        probability = weight / weight.sum() * (1 - tail)
        np.testing.assert_allclose(logp_E[start : start + count], np.log(probability), atol=2e-6, rtol=1e-6)
        p = np.exp(top.logp_E[start : start + count].astype(float))
        p, true_tail = p / (p.sum() + np.exp(float(top.tail_T[t]))), np.exp(float(top.tail_T[t]))
        kl = np.sum(p * np.log(p / probability))
        kl += true_tail * np.log(true_tail / tail) if true_tail else 0.0
        errors.append(kl)
        start += count
    assert min(errors) > -1e-6
    assert max(errors) < 2e-4
    assert np.mean(errors) < 7e-5
    again = TopK(top.count_T, top.ids_E, logp_E, tail_T)
    for once, twice in zip((steps_E, tail_T), quantisation.quantise(again), strict=True):
        np.testing.assert_array_equal(once, twice)


def test_a_confident_position_loses_nothing():
    # One entry at 1 - 1e-9, one 16.5 and one 30 nats down: the first is decoded as 1 minus the others.
    logp = np.array([np.log1p(-1e-7), -16.5, -30.0], np.float32)
    top = TopK(np.array([3]), np.arange(3), logp, np.array([np.log(3e-8)], np.float32))
    steps_E, tail_T = quantisation.quantise(top)
    back = quantisation.dequantise(top.count_T, steps_E, tail_T)
    assert abs(back[0] - logp[0]) < 1e-8
    np.testing.assert_allclose(back[1:], logp[1:], atol=1 / 64 + 1e-5)
    np.testing.assert_allclose(tail_T, top.tail_T, atol=1 / 32 + 1e-5)


def test_exact_keeps_every_bit():
    block = samples.traces(range(12))
    num = len(block.completion_ids.values)
    rng = np.random.default_rng(3)
    object.__setattr__(block, "top", raw_distribution(num, rng))
    block.logprob.values[:] = -rng.exponential(size=num)
    back = round_trip(block, samples.metadata(exact=True, top_k=300))
    for name in ("count_T", "ids_E", "logp_E", "tail_T"):
        np.testing.assert_array_equal(getattr(back.top, name), getattr(block.top, name))
    np.testing.assert_array_equal(back.logprob.values, block.logprob.values)
    rounded = round_trip(block, samples.metadata(top_k=300))
    assert np.abs(rounded.logprob.values - block.logprob.values).max() <= 1 / 2048
    assert (rounded.top.logp_E != block.top.logp_E).any()


def at_a_share(keep_T):
    """Test traces with a distribution at some positions only."""
    block = samples.traces(range(1, 9))
    top, keep_T = block.top, np.resize(keep_T, len(block.top))
    chosen = [top.slice(t, t + 1) for t in range(len(top))]
    empty = TopK(np.zeros(1, np.int32), top.ids_E[:0], top.logp_E[:0], np.zeros(1, np.float32))
    object.__setattr__(
        block, "top", TopK.concat([one if keep else empty for one, keep in zip(chosen, keep_T, strict=True)])
    )
    return block


def test_positions_without_a_distribution_stay_empty_and_the_others_as_they_were():
    block = at_a_share([True, False, False])
    share = samples.metadata(positions="entropy", position_share=1 / 3)
    back = round_trip(block, share)
    for name in ("count_T", "ids_E", "logp_E", "tail_T"):
        np.testing.assert_array_equal(getattr(back.top, name), getattr(block.top, name))
    assert (back.top.count_T == 0).sum() > len(back.top) // 2
    whole = samples.traces(range(1, 9))
    assert round_trip(whole, share).top.ids_E.tolist() == whole.top.ids_E.tolist()
    block.top.tail_T[1] = -0.5
    with pytest.raises(ValueError, match="without entries has a tail whose mass is not 1"):
        codec.to_table(block, share)
    with pytest.raises(ValueError, match="1 to 16"):
        codec.to_table(at_a_share([True, False]), samples.metadata())


def test_rows_without_log_probabilities_are_those_of_an_endpoint_that_gives_text_alone():
    block = samples.traces(range(1, 4), top=False)
    empty = Ragged.from_rows([block.logprob[0], [], block.logprob[2]], np.float32)
    object.__setattr__(block, "logprob", empty)
    back = round_trip(block, samples.metadata(top_k=0, mass=1.0))
    assert [len(back.logprob[n]) for n in range(3)] == [
        len(block.completion_ids[0]),
        0,
        len(block.completion_ids[2]),
    ]
    object.__setattr__(block, "top", samples.traces(range(1, 4)).top)
    with pytest.raises(ValueError, match="logprob"):
        codec.to_table(block, samples.metadata())
    one = samples.traces(range(1, 4), top=False)
    short = [one.logprob[0], one.logprob[1][:1], one.logprob[2]]
    object.__setattr__(one, "logprob", Ragged.from_rows(short, np.float32))
    with pytest.raises(ValueError, match="logprob"):
        codec.to_table(one, samples.metadata(top_k=0, mass=1.0))


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
        b"bytes \xff\xfe that are no UTF-8".decode(errors="surrogateescape"): "bytes \ufffd\ufffd that are no UTF-8",
        "nul \x00 and \x1b bell \x07": "nul \x00 and \x1b bell \x07",
        "<script>alert(1)</script>\r\n\u2028": "<script>alert(1)</script>\r\n\u2028",
        "": "",
        "x" * 3_000_000: "x" * 3_000_000,
    }
    block = samples.traces(range(1, 1 + len(strange)))
    for name in ("completion", "answer", "gold"):
        getattr(block, name)[:] = list(strange)
    block.messages[:] = [({"role": "user", "content": text},) for text in strange]
    back = round_trip(block, samples.metadata())
    for column in (back.completion, back.answer, back.gold):
        assert column == list(strange.values())
    assert [m[0]["content"] for m in back.messages] == list(strange.values())
    again = encoded(back, samples.metadata())
    assert again == encoded(block, samples.metadata())
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
        ("descending", lambda b: b.top.logp_E.__setitem__(slice(0, 2), b.top.logp_E[1::-1])),
        ("add up to 1", lambda b: b.top.tail_T.__setitem__(0, 0.0)),
        ("1 to 16", lambda b: b.top.count_T.__setitem__(slice(0, 2), [0, b.top.count_T[:2].sum()])),
        ("rows", lambda b: b.correct.pop()),
        ("keys role and content", lambda b: b.messages.__setitem__(0, ({"role": "user"},))),
    ],
)
def test_columns_that_contradict_each_other_are_refused(name, change):
    block = samples.traces(range(1, 4))
    change(block)
    with pytest.raises(ValueError, match=name):
        codec.to_table(block, samples.metadata())


# ------------------------------------------------------------------------------------------- other readers


def test_duckdb_alone_reads_verdicts(tmp_path):
    path = samples.write(tmp_path / "traces", 16) / "*.parquet"
    block = samples.traces(range(16))
    verdicts = duckdb.sql(
        f"select count(*), sum(list_filter(rewards, lambda x: x.name = 'accuracy')[1].value), sum(correct::int) from '{path}'"
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
    assert tree == open_traces(path).metadata.tree()


@pytest.mark.fault(7)
def test_another_schema_version_is_refused_naming_both():
    table = codec.to_table(samples.traces([1]), samples.metadata())
    tree = json.loads(samples.metadata().to_json()) | {"schema_version": 7}
    table = table.replace_schema_metadata({METADATA_KEY: json.dumps(tree)})
    data = codec.encode(table, samples.metadata())
    with pytest.raises(UserError, match=r"version 7.*versions 1 and 2"):
        decode_file(data, "shard")


def test_another_parquet_file_is_refused(tmp_path):
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(UserError, match="not a trace shard"):
        open_traces(tmp_path / "a.parquet")
