"""Draws from the tail: unbiased at capture, and the same in a shard, its reader and a packed batch."""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import trace_samples

from distill.engines.tail_rows import head_rows
from distill.records import NO_TAIL, BeyondTop, Draws, TopK, UserError
from distill.tail_draws import DRAW_MASS, draw, uniforms, weights
from distill.traces import codec, export, selection, summary
from distill.traces.reader import open_traces
from distill.traces.verify import check_table, verify
from distill.traces.writer import TraceWriter

V, TOP_K, NUM = 40, 12, 4


def captured(p_V, positions, top_k=TOP_K, mass=0.9, seed=5):
    """What an engine and the stage make of one distribution at many positions: full, kept and draws."""
    logp_TV = torch.from_numpy(np.log(p_V)).expand(positions, -1).clone()
    uniform_TN = torch.from_numpy(uniforms(np.full(positions, seed), np.arange(positions), NUM))
    rows = head_rows(logp_TV, torch.zeros(positions, dtype=torch.long), top_k, uniform_TN)
    ids, logp = rows.ids.numpy(), rows.logp.numpy()
    full = TopK.from_dense(ids[:, 1 : 1 + top_k], logp[:, 1 : 1 + top_k], rows.tail_B.float().numpy())
    kept = full.truncate(top_k=top_k, mass=mass)
    beyond = BeyondTop(ids[:, 1 + top_k :], logp[:, 1 + top_k :])
    return full, kept, draw(full, kept, beyond, NUM, seed, NO_TAIL)


@pytest.mark.parametrize(("sharpness", "mass"), [(1.0, 0.9), (1.0, 0.3), (4.0, 0.9), (6.0, 0.999), (2.0, 1.0)])
def test_the_weighted_draws_are_the_tail_in_expectation(sharpness, mass):
    """At large tails and at those below DRAW_MASS, in the cut entries and beyond the top ones."""
    logits = np.random.default_rng(1).gumbel(size=V) * sharpness
    p_V, positions = np.exp(logits - np.logaddexp.reduce(logits)), 30000
    _, kept, draws = captured(p_V, positions, mass=mass)
    tail = float(np.exp(kept.tail_T[0]))
    in_tail_V = np.ones(V, bool)
    in_tail_V[kept.ids_E[: kept.count_T[0]]] = False
    np.testing.assert_allclose(tail, p_V[in_tail_V].sum(), rtol=1e-5)
    assert in_tail_V[draws.ids_E].all()
    np.testing.assert_allclose(draws.logp_E, np.log(p_V)[draws.ids_E], atol=1e-5)
    weight = weights(kept.tail_T, NUM)
    np.testing.assert_allclose(weight, max(tail, DRAW_MASS) / NUM, rtol=1e-5)
    found_V = np.bincount(draws.ids_E, minlength=V) * weight[0] / positions
    error_V = np.sqrt(p_V * max(tail, DRAW_MASS) / NUM / positions)
    assert (np.abs(found_V - p_V)[in_tail_V] <= 5 * error_V[in_tail_V] + 1e-9).all()
    assert draws.count_T.max() <= NUM
    if tail >= DRAW_MASS:
        assert draws.count_T.min() == NUM
    elif tail < NO_TAIL:
        assert not len(draws.ids_E)
    # Spread evenly: their number varies by one at most around tail / weight.
    assert np.ptp(draws.count_T) <= 1


def test_draws_follow_from_seed_and_position_alone():
    p_V = np.full(V, 1 / V)
    *_, long = captured(p_V, 64)
    *_, short = captured(p_V, 16)
    np.testing.assert_array_equal(long.slice(0, 16).ids_E, short.ids_E)
    *_, other = captured(p_V, 64, seed=6)
    assert (long.ids_E != other.ids_E).mean() > 0.8


def test_the_tail_is_summed_where_it_is_made():
    """A mass of 1e-6 beyond the top entries, from float32 log-probabilities: one minus their sum is rounding noise."""
    rng = np.random.default_rng(0)
    logits = np.concatenate([rng.normal(size=8) + 20, rng.normal(size=5000) - 4])
    true = np.logaddexp.reduce(logits[8:]) - np.logaddexp.reduce(logits)
    logp_BV = torch.from_numpy(logits).float()[None].log_softmax(1)
    rows = head_rows(logp_BV.clone(), torch.tensor([3]), 8)
    by_rest = TopK.from_dense(rows.ids.numpy()[:, 1:], rows.logp.numpy()[:, 1:], rows.tail_B.numpy()).tail_T[0]
    by_sum = TopK.from_dense(rows.ids.numpy()[:, 1:], rows.logp.numpy()[:, 1:]).tail_T[0]
    assert abs(by_rest - true) < 1e-5
    assert abs(by_sum - true) > 1e-3


# ------------------------------------------------------------------------------------------------- schema 2


def with_draws(numbers, **options):
    """Test traces with draws that are in no entry of their position; log-probabilities as they are after one rounding."""
    block = trace_samples.traces(numbers, **options)
    rng = np.random.default_rng(len(block))
    count_T = rng.integers(0, NUM + 1, len(block.top)).astype(np.int32)
    num = int(count_T.sum())
    # Entries are 7 modulo 199.
    ids_E = rng.integers(0, trace_samples.VOCAB // 199 - 1, num) * 199 + 8
    logp_E = codec.quantisation.round_draws(-4 - rng.exponential(size=num)).astype(np.float32)
    return dataclasses.replace(block, draws=Draws(count_T, ids_E, logp_E))


def write(path, numbers, **changes):
    with TraceWriter(path, trace_samples.metadata(tail_draws=NUM, **changes), shard_rows=8) as writer:
        writer.add(with_draws(numbers))
    return path


def test_draws_survive_a_shard_unchanged_and_take_few_bytes(tmp_path):
    path = write(tmp_path / "drawn", range(60))
    assert verify(path).ok
    reader, expected = open_traces(path), with_draws(range(60))
    assert (reader.metadata.schema_version, reader.metadata.tail_draws) == (2, NUM)
    start = 0
    for block in reader.blocks(7):
        for n, trace_id in enumerate(block.trace_id):
            assert trace_id == expected.trace_id[start]
            mine, theirs = block.draws_of(n), expected.draws_of(start)
            for name in ("count_T", "ids_E", "logp_E"):
                np.testing.assert_array_equal(getattr(mine, name), getattr(theirs, name))
            start += 1
    assert start == 60
    # The rest is what it is without them.
    plain = trace_samples.write(tmp_path / "plain", 60)
    assert trace_samples.row_digests(path) == trace_samples.row_digests(plain)
    assert next(open_traces(plain).blocks()).draws is None
    np.testing.assert_allclose(summary.stats(path).mean_draws, len(expected.draws.ids_E) / len(expected.draws))
    assert np.isnan(summary.stats(plain).mean_draws)
    # Read without their columns they are absent, not empty.
    assert next(reader.blocks(columns=["top_ids", "top_count", "top_steps", "tail_logprob"])).draws is None


def test_draws_are_rounded_once_or_keep_every_bit():
    block = with_draws(range(1, 9))
    raw_E = (-4 - np.random.default_rng(2).exponential(size=len(block.draws.logp_E))).astype(np.float32)
    block = dataclasses.replace(block, draws=dataclasses.replace(block.draws, logp_E=raw_E))

    def back(**changes):
        metadata = trace_samples.metadata(tail_draws=NUM, **changes)
        return codec.from_table(codec.to_table(block, metadata), metadata).draws.logp_E

    np.testing.assert_array_equal(back(exact=True), raw_E)
    np.testing.assert_array_equal(back(), codec.quantisation.round_draws(raw_E))
    assert (back() != raw_E).any()


def test_a_folder_without_draws_is_written_in_schema_1(tmp_path):
    trace_samples.write(tmp_path, 5)
    assert "tail_draws" not in (tmp_path / "manifest-0.json").read_text()
    (file,) = tmp_path.glob("*.parquet")
    assert not [name for name in pq.read_schema(file).names if name.startswith("draw")]
    with pytest.raises(UserError, match="schema_version"):
        trace_samples.metadata(tail_draws=4).parse(trace_samples.metadata().tree() | {"tail_draws": 4}, "here")


def test_selections_and_merged_folders_keep_draws(tmp_path):
    from distill.recipe import PlugConfig

    write(tmp_path / "a", range(20))
    write(tmp_path / "b", range(20, 40))
    export.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "both")
    assert verify(tmp_path / "both").ok
    first, both = (sum(len(b.draws.ids_E) for b in open_traces(tmp_path / name).blocks()) for name in ("a", "both"))
    assert 0 < first < both
    selection.select(tmp_path / "both", tmp_path / "chosen", [PlugConfig(fn="finished")])
    reader = open_traces(tmp_path / "chosen")
    blocks = {i: (b, n) for b in open_traces(tmp_path / "both").blocks() for n, i in enumerate(b.trace_id)}
    for block in reader.shuffled(3):
        for n, trace_id in enumerate(block.trace_id):
            other, m = blocks[trace_id]
            np.testing.assert_array_equal(block.draws_of(n).ids_E, other.draws_of(m).ids_E)
    assert selection.filters_of(tmp_path / "chosen") == ("finished",)
    selection.select(tmp_path / "chosen", tmp_path / "twice", [PlugConfig(fn="correct")])
    assert selection.filters_of(tmp_path / "twice") == ("finished", "correct")
    plain = trace_samples.write(tmp_path / "plain", 5)
    with pytest.raises(UserError, match="tail_draws: 4 != 0"):
        export.merge([tmp_path / "a", plain], tmp_path / "mixed")


def test_verify_finds_draws_that_cannot_be(tmp_path):
    meta, block = trace_samples.metadata(tail_draws=NUM), with_draws(range(1, 4))

    def faults(**changes):
        table = codec.to_table(block, meta)
        for name, column in changes.items():
            table = table.set_column(table.column_names.index(name), table.schema.field(name), [column(table[name])])
        return check_table(table, meta)

    assert faults() == []
    import pyarrow as pa

    def edited(change):
        return lambda column: pa.array([change(row) for row in column.to_pylist()], column.type)

    assert "draw_ids and draw_logprobs differ" in faults(draw_ids=edited(lambda row: row[1:]))[0]
    assert "draw_count does not add up" in faults(draw_count=edited(lambda row: [NUM, *row[1:-1], 9]))[0]
    assert "log-probabilities of draws" in faults(draw_logprobs=edited(lambda row: [0.5, *row[1:]]))[0]
    # A kept entry of the first position that has a draw is drawn in its place.
    t = int(np.flatnonzero(block.draws.count_T)[0])
    entry = int(block.top.ids_E[block.top.offsets[t]])
    moved = np.array(block.draws.ids_E)
    moved[0] = entry
    wrong = dataclasses.replace(block, draws=dataclasses.replace(block.draws, ids_E=moved))
    assert "1 draws from the tail are among the entries" in check_table(codec.to_table(wrong, meta), meta)[0]
    with pytest.raises(ValueError, match="draws"):
        codec.check(dataclasses.replace(block, draws=None), meta)
