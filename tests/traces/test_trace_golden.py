"""Golden shards of every frozen schema: which every later version must read, with our code and with the examples of data/README.md alone."""

from __future__ import annotations

import hashlib
import re
import runpy
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pytest

from distill.traces.reader import open_traces
from distill.traces.verify import verify

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "data" / "golden"

# Digests of the committed files. Changing a byte of them would change the meaning of their version.
SHA256 = {
    "v1/manifest-0.json": "8f97df8cb84e9e9a37b5d5c6956739f76fa590f0bc73c44a3a965cefca1a25c8",
    "v1/shard-0-00000.parquet": "553e3e020827fba81cd4ee44975354c5e751191ce45d6187a72def2267d53307",
    "v1/shard-0-00001.parquet": "511552883cfa4dc6dde759c08284e58c53f290f639888901dbdf32a66cad1301",
    "v1_exact/manifest-0.json": "7e9e17d5f986bc6ce8a8572e6a80e09715e186f1208c49d9a0160f6412dbe379",
    "v1_exact/shard-0-00000.parquet": "dae76a4649a3b69deb05006c7dfe1ce1f946205af87b3bcede89b7b62bf9d132",
    "v1_exact/shard-0-00001.parquet": "1f8a57a4906d3959f1a5952604b4b23f6d5a95f8332ee518286040611c424224",
    "v1_expected.npz": "c650af738c3b54f8fc1ffbb5261c8991e24c7a3270f2ee45efabd3f3320287e1",
    "v2/manifest-0.json": "ccc84a7eee29bdfd1cd84d24edf2b5f4247605c105477b032ce89bc8f38ba682",
    "v2/shard-0-00000.parquet": "f712a3f93369fdeed676c891711c93dc7fe19ed124cda6c54e77f2a90f17be43",
    "v2/shard-0-00001.parquet": "52d1c5b5d83952a196267aa8867c450398f2b417b32ed00739d8d216353d1b89",
    "v2_exact/manifest-0.json": "9e4e2ca018d040692aa2e5947eab2e3f1ac004fc667ee6cabcb24cc4549630a6",
    "v2_exact/shard-0-00000.parquet": "75d90bd02159924270050f7484ebc2b3ebdcd35f5d3d48f4567a6f15275a021b",
    "v2_exact/shard-0-00001.parquet": "dea8eaf0bd0c0ba8ded33023521765ee484c559474c2d8bff20a62b86c8427c7",
    "v2_expected.npz": "e882e611d5a9a05fd0f2c03cc22939b016f26d1514c06daab4d2195058a22cca",
}


@pytest.fixture(scope="module")
def truth():
    """Float64 numbers from before any coding: count, ids, logp, tail a position; completion_ids, logprob, lengths."""
    return np.load(GOLDEN / "v1_expected.npz")


@pytest.fixture(scope="module")
def texts():
    return list(runpy.run_path(str(GOLDEN / "make_v1.py"))["TEXTS"])


def test_the_golden_files_are_those_that_were_frozen():
    found = {
        str(path.relative_to(GOLDEN)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in GOLDEN.rglob("*")
        if path.is_file() and path.suffix != ".py" and "__pycache__" not in path.parts
    }
    assert found == SHA256


@pytest.mark.parametrize("name", ["v1", "v1_exact"])
@pytest.mark.fault(7)
def test_our_reader_reads_version_1(name, truth, texts):
    assert verify(GOLDEN / name).ok
    reader = open_traces(GOLDEN / name)
    assert (reader.metadata.schema_version, reader.metadata.vocab_size) == (1, 2**32)
    (shard_a, shard_b) = blocks = list(reader.blocks(8))
    assert (len(shard_a), len(shard_b)) == (8, 4)

    def joined(read):
        return np.concatenate([np.asarray(read(block)) for block in blocks])

    np.testing.assert_array_equal(joined(lambda b: b.completion_ids.values), truth["completion_ids"])
    np.testing.assert_array_equal(joined(lambda b: b.completion_ids.lengths), truth["lengths"])
    np.testing.assert_array_equal(joined(lambda b: b.top.count_T), truth["count"])
    np.testing.assert_array_equal(joined(lambda b: b.top.ids_E), truth["ids"])
    logprob, logp = joined(lambda b: b.logprob.values), joined(lambda b: b.top.logp_E)
    tail = joined(lambda b: b.top.tail_T)
    if name == "v1_exact":
        np.testing.assert_array_equal(logprob, truth["logprob"].astype(np.float32))
        np.testing.assert_array_equal(logp, truth["logp"].astype(np.float32))
        np.testing.assert_array_equal(tail, truth["tail"].astype(np.float32))
    else:
        np.testing.assert_allclose(logprob, truth["logprob"], atol=1 / 2048 + 1e-6)
        assert divergence(truth, logp, tail) < 2e-4
    rows = [row for block in blocks for row in zip(block.trace_id, block.sample, block.answer, block.correct, strict=True)]  # fmt: skip
    assert rows[3:5] == [("golden03", 1, None, None), ("golden04", 0, "4", False)]
    assert [text for block in blocks for text in block.completion] == texts
    assert [m[0]["content"] for block in blocks for m in block.messages] == texts
    assert shard_a.rewards == {"accuracy": [None, 0.0, 1.0, None, 0.0, 1.0, None, 0.0], "format": [0.25] * 8}  # fmt: skip


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.fault(7)
def test_our_reader_reads_version_2(exact):
    """The traces of version 1, and draws from their tails."""
    name, truth = "v2_exact" if exact else "v2", np.load(GOLDEN / "v2_expected.npz")
    assert verify(GOLDEN / name).ok
    reader, older = open_traces(GOLDEN / name), open_traces(GOLDEN / name.replace("2", "1"))
    assert (reader.metadata.schema_version, reader.metadata.tail_draws) == (2, 4)
    blocks, former = (list(each.blocks(8)) for each in (reader, older))
    count, ids, logp = (
        np.concatenate([getattr(block.draws, field) for block in blocks]) for field in ("count_T", "ids_E", "logp_E")
    )
    np.testing.assert_array_equal(count, truth["count"])
    np.testing.assert_array_equal(ids, truth["ids"])
    np.testing.assert_allclose(logp, truth["logp"].astype(np.float32), atol=0 if exact else 1 / 16 + 1e-6)
    assert 0 < (count == 0).sum() < len(count)
    for one, other in zip(blocks, former, strict=True):
        assert one.completion == other.completion
        np.testing.assert_array_equal(one.top.logp_E, other.top.logp_E)
        assert other.draws is None


def divergence(truth, logp, tail) -> float:
    """The largest KL(true || decoded) over entries and tail of any position, in nat, position by position."""
    worst, start = 0.0, 0
    for count, t, d in zip(truth["count"], truth["tail"], np.asarray(tail, float), strict=True):
        p, q = truth["logp"][start : start + count], np.asarray(logp[start : start + count], float)
        kl = float(np.sum(np.exp(p) * (p - q)))
        if t > -np.inf:
            kl += float(np.exp(t) * (t - d))
        worst, start = max(worst, abs(kl)), start + count
    return worst


# --------------------------------------------------------------------------------- the data card's examples


def example(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", (ROOT / "data" / "README.md").read_text(), re.DOTALL)  # fmt: skip
    return found


def test_the_pandas_example_decodes_a_shard(truth, monkeypatch):
    monkeypatch.chdir(ROOT)
    names: dict = {}
    exec(example("python"), names)
    assert list(names["entries"]) == [3, 1, 2]
    np.testing.assert_allclose(list(names["entries"].values()), [0.5, 0.3, 0.2], rtol=1 / 64)
    start = position = 0
    for shard in ("00000", "00001"):
        frame = pd.read_parquet(f"data/golden/v1/shard-0-{shard}.parquet")
        for _, trace in frame.iterrows():
            for t in range(len(trace.completion_ids)):
                entries, tail = names["distribution"](trace, t)
                stop = start + truth["count"][position]
                np.testing.assert_array_equal(list(entries), truth["ids"][start:stop])
                np.testing.assert_allclose(list(entries.values()), np.exp(truth["logp"][start:stop]), rtol=0.06)
                assert sum(entries.values()) + tail == pytest.approx(1, abs=1e-6)
                start, position = stop, position + 1
    assert position == len(truth["count"])


def test_the_duckdb_example_decodes_what_the_reader_does(monkeypatch):
    monkeypatch.chdir(ROOT)
    rows = duckdb.sql(example("sql")).fetchall()
    want = []
    for block in open_traces("data/golden/v1").blocks():
        for n, trace_id in enumerate(block.trace_id):
            top = block.top_of(n)
            for t in range(len(top)):
                at = top.slice(t, t + 1)
                want += [
                    (trace_id, t, int(token), np.exp(float(logp)), np.exp(float(at.tail_T[0])))
                    for token, logp in zip(at.ids_E, at.logp_E, strict=True)
                ]
    assert [row[:3] for row in rows] == [row[:3] for row in want]
    np.testing.assert_allclose([row[3:] for row in rows], [row[3:] for row in want], rtol=2e-6)


def test_the_datasets_library_reads_them_too(tmp_path):
    """This is how users load a folder of traces from the hub."""
    import datasets

    files = [str(path) for path in sorted((GOLDEN / "v1").glob("*.parquet"))]
    rows = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path))
    assert len(rows) == 12
    assert rows[0]["rewards"] == [
        {"name": "accuracy", "value": None},
        {"name": "format", "value": 0.25},
    ]
