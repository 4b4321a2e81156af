"""Reading: every row once, in an order that can be resumed; damaged files are named and never decoded."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import trace_samples as samples

from distill.recipe import PlugConfig
from distill.records import UserError
from distill.traces import codec, export, folder, push
from distill.traces import reader as reader_module
from distill.traces.reader import content_fingerprint, decode_file, open_traces
from distill.traces.selection import select
from distill.traces.summary import stats
from distill.traces.verify import repair, verify
from distill.traces.writer import TraceWriter, describe

LIGHT = ["trace_id", "problem_id", "completion_ids", "correct", "finish_reason"]


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    return samples.write(tmp_path_factory.mktemp("stored") / "traces", 100)


def ids(blocks) -> list[str]:
    return [trace_id for block in blocks for trace_id in block.trace_id]


def test_blocks_of_any_size_hold_every_row_once_in_order(stored):
    reader = open_traces(stored)
    assert reader.num_rows == len(reader) == 100
    for rows in (1, 7, 16, 1000):
        blocks = list(reader.blocks(rows))
        assert ids(blocks) == [f"trace{n:06d}" for n in range(100)]
        assert max(map(len, blocks)) <= rows
    assert samples.row_digests(stored) == samples.expected_digests(range(100))


def test_only_the_columns_asked_for_come(stored):
    block = next(open_traces(stored).blocks(columns=["completion_ids", "reward"]))
    want = samples.traces(range(16))
    np.testing.assert_array_equal(block.completion_ids.values, want.completion_ids.values)
    assert block.reward == want.reward
    assert block.top is None
    assert len(block.logprob) == len(block) == 16
    assert not block.logprob.lengths.any()
    with pytest.raises(UserError, match="Did you mean 'completion_ids'"):
        next(open_traces(stored).blocks(columns=["completion_id"]))


def test_a_single_shard_reads_alone(stored, tmp_path):
    reader = open_traces(stored / "shard-0-00002.parquet")
    assert ids(reader.blocks()) == [f"trace{n:06d}" for n in range(32, 48)]
    assert reader.metadata == samples.metadata()
    alone = tmp_path / "alone.parquet"
    alone.write_bytes((stored / "shard-0-00002.parquet").read_bytes())
    assert samples.row_digests(alone) == samples.expected_digests(range(32, 48))
    assert open_traces(alone).fingerprint == reader.fingerprint


def test_a_single_shard_is_compared_with_the_manifest_beside_it(tmp_path):
    path = samples.write(tmp_path / "traces", 16) / "shard-0-00000.parquet"
    good, draw = path.read_bytes(), random.Random(1)
    for _ in range(100):
        path.write_bytes(flipped(good, draw))
        with pytest.raises(UserError, match=r"shard-0-00000"):
            list(open_traces(path).blocks())


def test_lengths_are_those_of_the_ids_in_the_order_of_blocks(stored):
    reader = open_traces(stored)
    lengths = reader.lengths()
    blocks = list(reader.blocks())
    np.testing.assert_array_equal(lengths.prompt, np.concatenate([b.prompt_ids.lengths for b in blocks]))
    np.testing.assert_array_equal(lengths.completion, np.concatenate([b.completion_ids.lengths for b in blocks]))


# ------------------------------------------------------------------------------------------------ shuffling


@pytest.mark.parametrize("buffer_rows", [1, 20, 64, 1000])
def test_shuffled_is_every_row_once_and_resumes_at_any_row(stored, buffer_rows):
    reader = open_traces(stored)

    def order(seed=3, **options):
        return ids(reader.shuffled(seed, buffer_rows=buffer_rows, **options))

    whole = order()
    assert sorted(whole) == [f"trace{n:06d}" for n in range(100)]
    assert whole == order(rows=9) == order(columns=["trace_id"])
    assert whole != order(seed=4)
    assert whole != sorted(whole)
    for skip in (1, 15, 16, 50, 99, 100):
        assert order(skip=skip) == whole[skip:]


def test_shuffled_rows_carry_their_own_distribution(stored):
    found = {}
    for block in open_traces(stored).shuffled(1, buffer_rows=40, rows=11):
        found |= {trace_id: samples.digest(block, n) for n, trace_id in enumerate(block.trace_id)}
    assert found == samples.expected_digests(range(100))


def test_within_one_buffer_the_order_does_not_depend_on_the_shards(stored, tmp_path):
    other = samples.write(tmp_path / "other", 100, shard_rows=7)
    assert ids(open_traces(stored).shuffled(5)) == ids(open_traces(other).shuffled(5))


@pytest.mark.parametrize("world", [2, 3, 7])
@pytest.mark.parametrize("buffer_rows", [20, 1000])
def test_ranks_share_the_rows_out_and_each_resumes_at_its_row(stored, world, buffer_rows):
    reader = open_traces(stored)

    def order(rank, skip=0):
        options = {"buffer_rows": buffer_rows, "rows": 5, "rank": rank, "world": world}
        return ids(reader.shuffled(4, skip=skip, **options))

    parts = [order(rank) for rank in range(world)]
    whole = ids(reader.shuffled(4, buffer_rows=buffer_rows))
    assert [whole[rank::world] for rank in range(world)] == parts
    for rank in range(world):
        for skip in (1, 9, len(parts[rank]) - 1, len(parts[rank])):
            assert order(rank, skip) == parts[rank][skip:]
    with pytest.raises(ValueError, match="rank"):
        next(reader.shuffled(4, rank=world, world=world))


def test_long_traces_make_small_buffers(stored, monkeypatch):
    monkeypatch.setattr(reader_module, "BUFFER_ENTRIES", 1)
    reader = open_traces(stored)
    shards = [{*ids(open_traces(stored / shard.file).blocks())} for shard in reader.shards]
    for block in reader.shuffled(3, rows=1000):
        assert set(block.trace_id) in shards
    assert sorted(ids(reader.shuffled(3))) == [f"trace{n:06d}" for n in range(100)]


@pytest.mark.parametrize("values", ["top_logprobs", "top_steps"])
@pytest.mark.parametrize("exact", [False, True])
def test_either_name_of_the_entries_values_gives_the_distribution(tmp_path, values, exact):
    with TraceWriter(tmp_path, samples.metadata(exact=exact)) as writer:
        writer.add(samples.traces(range(20)))
    columns = ["completion_ids", "top_count", "top_ids", values, "tail_logprob"]
    (block,) = open_traces(tmp_path).shuffled(1, columns=columns)
    (whole,) = open_traces(tmp_path).shuffled(1)
    np.testing.assert_array_equal(block.top.logp_E, whole.top.logp_E)
    assert len(block.top) == len(block.completion_ids.values)


def test_skipped_buffers_are_not_read(tmp_path):
    path = samples.write(tmp_path / "traces", 64)
    reader = open_traces(path)
    first = next(reader.shuffled(2, buffer_rows=1))
    (path / next(s.file for s in reader.shards if _holds(path / s.file, first.trace_id[0]))).unlink()
    assert len(ids(reader.shuffled(2, buffer_rows=1, skip=16))) == 48


def _holds(shard: Path, trace_id: str) -> bool:
    return trace_id in ids(open_traces(shard).blocks())


def test_where_restricts_rows_for_every_way_of_reading(stored):
    reader = open_traces(stored)
    keep = np.arange(100) % 3 == 0
    part = reader.where(keep)
    want = [f"trace{n:06d}" for n in range(0, 100, 3)]
    assert part.num_rows == len(want)
    assert ids(part.blocks()) == want
    assert sorted(ids(part.shuffled(1, buffer_rows=10))) == want
    assert ids(part.shuffled(1, buffer_rows=10, skip=20)) == ids(part.shuffled(1, buffer_rows=10))[20:]
    np.testing.assert_array_equal(part.lengths().completion, reader.lengths().completion[keep])
    assert ids(part.where(np.arange(34) < 2).blocks()) == want[:2]
    assert part.fingerprint != reader.fingerprint


# ------------------------------------------------------------------------------------------------- damage


def read_all(path):
    return samples.row_digests(path)


def flipped(good: bytes, draw: random.Random) -> bytes:
    bad = bytearray(good)
    bad[draw.randrange(len(bad))] ^= 1 << draw.randrange(8)
    return bytes(bad)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.fault(2)
def test_a_thousand_flipped_bits_are_all_caught_naming_the_file_and_none_is_decoded(tmp_path, exact):
    with TraceWriter(tmp_path, samples.metadata(exact=exact)) as writer:
        writer.add(samples.traces(range(16)))
    shard = tmp_path / "shard-0-00000.parquet"
    good, draw, caught = shard.read_bytes(), random.Random(8), 0
    for number in range(1000):
        shard.write_bytes(flipped(good, draw))
        read = open_traces(tmp_path).shuffled(1) if number % 2 else open_traces(tmp_path).blocks()
        with pytest.raises(UserError, match=r"shard-0-00000\.parquet.*--repair"):
            next(read)
        caught += 1
    shard.write_bytes(good)
    assert caught == 1000
    assert samples.row_digests(tmp_path) == samples.expected_digests(range(16))


@pytest.mark.parametrize("columns", [LIGHT, ["trace_id", "completion_ids", "logprob"]])
def test_flipped_bits_are_also_caught_in_columns_that_are_not_read(tmp_path, columns):
    path = samples.write(tmp_path / "traces", 16)
    shard = path / "shard-0-00000.parquet"
    good, draw = shard.read_bytes(), random.Random(8)
    for _ in range(300):
        shard.write_bytes(flipped(good, draw))
        with pytest.raises(UserError, match=r"shard-0-00000\.parquet.*--repair"):
            next(open_traces(path).blocks(columns=columns))


def test_without_a_manifest_page_checksums_catch_what_they_cover(tmp_path):
    path = samples.write(tmp_path / "traces", 16)
    good, draw, caught = (path / "shard-0-00000.parquet").read_bytes(), random.Random(8), 0
    alone = tmp_path / "alone.parquet"
    alone.write_bytes(good)
    want = list(samples.row_digests(alone).values())
    for _ in range(400):
        alone.write_bytes(flipped(good, draw))
        try:
            assert list(samples.row_digests(alone).values()) == want
        except UserError as error:
            caught += alone.name in str(error)
    assert caught > 300


def test_a_shard_of_another_tokenizer_is_refused(tmp_path):
    """The shard is put there by hand: under a name in our manifest, and with its own manifest."""
    path = samples.write(tmp_path / "traces", 32)
    with TraceWriter(tmp_path / "other", samples.metadata(tokenizer="t1"), writer="b") as writer:
        writer.add(samples.traces(range(40, 56)))
    stranger = (tmp_path / "other" / "shard-b-00000.parquet").read_bytes()
    manifest = folder.read_manifest(path / "manifest-0.json")
    ours = manifest.shards[0]
    table, _ = decode_file(stranger, "stranger")
    listed = (describe(ours.file, stranger, table), *manifest.shards[1:])
    good = (path / ours.file).read_bytes()
    (path / ours.file).write_bytes(stranger)
    folder.Manifest("0", manifest.metadata, listed).write(path)
    with pytest.raises(UserError, match=r"shard-0-00000.*tokenizer: 't1' != 't0'"):
        list(open_traces(path).blocks())
    assert not verify(path).ok

    (path / ours.file).write_bytes(good)
    manifest.write(path)
    assert verify(path).ok
    for name in ("shard-b-00000.parquet", "manifest-b.json"):
        os.replace(tmp_path / "other" / name, path / name)
    with pytest.raises(UserError, match="tokenizer: 't0' != 't1'"):
        open_traces(path)
    with pytest.raises(UserError, match="tokenizer"):
        TraceWriter(path, samples.metadata(), writer="c")
    assert "manifest-b.json" in {finding.file for finding in verify(path).findings}


@pytest.mark.parametrize("version", [0, 3, None, "1"])
def test_a_folder_of_another_schema_is_refused_naming_both(tmp_path, version):
    path = samples.write(tmp_path / "traces", 3)
    tree = folder.read_json(path / "manifest-0.json")
    tree["metadata"]["schema_version"] = version
    folder.write_json(path / "manifest-0.json", tree)
    for use in (open_traces, lambda p: TraceWriter(p, samples.metadata())):
        with pytest.raises(UserError, match=rf"manifest-0.*version {version!r}.*versions 1 and 2"):
            use(path)


@pytest.mark.fault(2)
def test_verify_catches_every_flipped_bit_in_shards_and_manifest(tmp_path):
    path = samples.write(tmp_path / "traces", 32)
    draw = random.Random(9)
    for name in ("shard-0-00000.parquet", "shard-0-00001.parquet", "manifest-0.json"):
        good = (path / name).read_bytes()
        for _ in range(60):
            bad = bytearray(good)
            bad[draw.randrange(len(bad))] ^= 1 << draw.randrange(8)
            (path / name).write_bytes(bad)
            report = verify(path)
            # White space in the manifest, where a flip may leave the content unchanged.
            same = name.endswith("json") and _parses_the_same(good, bad)
            assert same or (not report.ok and name in {f.file for f in report.findings})
        (path / name).write_bytes(good)
    assert verify(path).ok


def _parses_the_same(good: bytes, bad: bytes) -> bool:
    try:
        return json.loads(good) == json.loads(bad)
    except ValueError:
        return False


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda p: p.unlink(), "missing"),
        (lambda p: p.write_bytes(b""), "empty"),
        (lambda p: p.write_bytes(p.read_bytes()[:-40]), "bytes instead of"),
        (lambda p: p.write_bytes(p.read_bytes()[::-1]), "SHA-256"),
    ],
)
@pytest.mark.fault(1)
def test_a_damaged_shard_is_named_with_the_fix_and_repair_drops_just_that(tmp_path, damage, says):
    path = samples.write(tmp_path / "traces", 48)
    shard = path / "shard-0-00001.parquet"
    damage(shard)
    with pytest.raises(UserError, match=f"{shard.name}.*{says}.*--repair"):
        list(open_traces(path).blocks())
    found = repair(path)
    assert {finding.file for finding in found.findings} == {shard.name}
    assert verify(path).ok
    with TraceWriter(path, samples.metadata()) as writer:
        missing = [n for n in range(48) if f"trace{n:06d}" not in writer]
        assert missing == list(range(16, 32))
        writer.add(samples.traces(missing))
    assert read_all(path) == samples.expected_digests(range(48))


def test_a_damaged_manifest_is_rebuilt_from_the_shards(tmp_path):
    path = samples.write(tmp_path / "traces", 48)
    before = content_fingerprint(path)
    (path / "manifest-0.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest-0\.json.*damaged"):
        open_traces(path)
    repair(path)
    assert verify(path).ok
    assert content_fingerprint(path) == before


def test_a_missing_manifest_is_a_fault_and_written_anew(tmp_path):
    path = samples.write(tmp_path / "traces", 48)
    before = content_fingerprint(path)
    (path / "manifest-0.json").unlink()
    with pytest.raises(UserError, match=r"no manifest that lists them.*--repair"):
        open_traces(path)
    assert [finding.file for finding in repair(path).findings] == ["manifest-0.json"]
    assert verify(path).ok
    assert content_fingerprint(path) == before
    (path / "manifest-0.json").unlink()
    with TraceWriter(path, samples.metadata()) as writer:
        assert sum(f"trace{n:06d}" in writer for n in range(60)) == 48
    assert content_fingerprint(path) == before


def test_paths_that_cannot_be_opened_are_named(tmp_path):
    path = samples.write(tmp_path / "traces", 3)
    (tmp_path / "file").write_text("")
    for use in (
        lambda: TraceWriter(tmp_path / "file", samples.metadata()),
        lambda: export.export_sft(path, tmp_path / "file" / "rows.jsonl"),
        lambda: export.export_dataset(path, tmp_path / "file" / "rows"),
        lambda: push.build(path, tmp_path / "file", name="a/b", licence="mit"),
    ):
        with pytest.raises(UserError, match="file: "):
            use()
    select(path, tmp_path / "clean", [PlugConfig(fn="finished")])
    with pytest.raises(UserError, match="clean: is a selection"):
        export.merge([path], tmp_path / "clean")
    (path / "shard-0-00000.parquet").unlink()
    repair(path)
    with pytest.raises(UserError, match="holds no traces"):
        export.export_dataset(path, tmp_path / "rows")


def test_missing_traces_are_an_error(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="no traces here"):
            open_traces(path)
        with pytest.raises(UserError, match="no traces here"):
            verify(path)


@pytest.mark.fault(5)
def test_verify_finds_duplicates_and_missing_rows(tmp_path):
    path = samples.write(tmp_path / "traces", 16)
    with TraceWriter(tmp_path / "other", samples.metadata(), writer="b") as writer:
        writer.add(samples.traces([3, 50]))
    for name in ("shard-b-00000.parquet", "manifest-b.json"):
        os.replace(tmp_path / "other" / name, path / name)
    report = verify(path, expected_ids=["trace000001", "trace000099"])
    assert [f.file for f in report.findings] == ["shard-b-00000.parquet", str(path)]
    assert "trace000003" in report.findings[0].what
    assert "trace000099" in report.findings[1].what
    repair(path)
    assert samples.row_digests(path) == samples.expected_digests(range(16))


def test_verify_finds_columns_that_contradict_each_other_under_a_right_checksum(tmp_path):
    def faults(name, change):
        """What verify says of a shard that somebody else's code wrote, manifest and all."""
        path = samples.write(tmp_path / name, 3)
        manifest = folder.read_manifest(path / "manifest-0.json")
        table, _ = decode_file((path / manifest.shards[0].file).read_bytes(), "shard")
        number = table.column_names.index
        for column, values in change(table.to_pydict()).items():
            field = table.schema.field(column)
            table = table.set_column(number(column), field, pa.array(values, field.type))
        data = codec.encode(table, manifest.metadata)
        (path / manifest.shards[0].file).write_bytes(data)
        shard = describe(manifest.shards[0].file, data, table)
        folder.Manifest("0", manifest.metadata, (shard,)).write(path)
        return [finding.what for finding in verify(path).findings]

    def first(rows, value):
        return [[value, *row[1:]] if row else row for row in rows]

    assert not faults("good", lambda rows: {})
    fault = faults("count", lambda rows: {"top_count": first(rows["top_count"], 5)})
    assert "does not add up to the entries" in fault[0]
    with pytest.raises(UserError, match="does not add up"):
        list(open_traces(tmp_path / "count").blocks())
    fault = faults("length", lambda rows: {"logprob": [row[1:] for row in rows["logprob"]]})
    assert "logprob and completion_tokens differ" in fault[0]
    fault = faults("steps", lambda rows: {"top_steps": [row[1:] for row in rows["top_steps"]]})
    assert "top_ids and top_steps differ" in fault[0]
    fault = faults("tail", lambda rows: {"tail_logprob": first(rows["tail_logprob"], 0.5)})
    assert "above 0" in fault[0]
    fault = faults("ids", lambda rows: {"top_ids": first(rows["top_ids"], samples.VOCAB)})
    assert "vocabulary" in fault[0]
    fault = faults("twice", lambda rows: {"top_ids": [r[1:2] + r[1:] for r in rows["top_ids"]]})
    assert "positions have an id twice" in fault[0]
    fault = faults("null", lambda rows: {"rewards": [None, *rows["rewards"][1:]]})
    assert "rewards is null in some rows" in fault[0]
    fault = faults("steps null", lambda rows: {"top_steps": [None, None, None]})
    assert "top_ids and top_steps differ" in fault[0]
    with pytest.raises(UserError, match="does not add up"):
        list(open_traces(tmp_path / "steps null").blocks())


def test_stats_are_those_of_the_traces(stored):
    block = samples.traces(range(100))
    found = stats(stored)
    assert (found.traces, found.problems) == (100, 50)
    assert found.completion_tokens == len(block.completion_ids.values)
    assert found.mean_support == pytest.approx(block.top.count_T.mean())
    assert found.mean_tail_mass == pytest.approx(np.exp(block.top.tail_T.astype(float)).mean())
    assert found.correct_rate == np.mean([c for c in block.correct if c is not None])
    assert found.mean_reward == pytest.approx(np.mean([r for r in block.reward if r is not None]))
    assert found.clipped_ratio == 0.25
    assert sum(found.completion_lengths.values()) == 100
    size = sum(p.stat().st_size for p in stored.glob("*.parquet"))
    assert found.bytes_per_position == pytest.approx(size / found.completion_tokens)
    assert "mean support" in str(found)


# ------------------------------------------------------------------------------------------------- memory

READ = """
import resource, sys
from distill.traces.reader import open_traces
from distill.traces.writer import TraceWriter, describe
import trace_samples as samples
from distill.records import Traces
path, num_blocks = sys.argv[1], int(sys.argv[2])
block = samples.traces(range(1, 17), tokens=160)
with TraceWriter(path, samples.metadata(), shard_rows=64) as writer:
    for i in range(num_blocks):
        fields = {f: getattr(block, f) for f in Traces.__dataclass_fields__}
        fields["trace_id"] = [f"{i}-{n}" for n in range(16)]
        writer.add(Traces(**fields))
reader = open_traces(path)
num = sum(len(b.top.ids_E) for b in reader.blocks(32))
num += sum(len(b.top.ids_E) for b in reader.shuffled(1, buffer_rows=64, rows=32))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, num * 8 >> 20)
"""


def test_memory_is_flat_while_the_traces_grow(tmp_path):
    def peak(num_blocks):
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
        run = subprocess.run(
            [sys.executable, "-c", READ, str(tmp_path / str(num_blocks)), str(num_blocks)],
            capture_output=True, text=True, check=True, env=environment,
        )  # fmt: skip
        return map(int, run.stdout.split())

    small, small_data = peak(4)
    large, large_data = peak(400)
    assert large_data - small_data > 50, "MiB decoded, or the test says nothing"
    assert large - small < 20, "MiB"
