"""Other programs' formats: round trips, their bytes by hand, runs of learned tokens, and what they cannot hold."""

from __future__ import annotations

import dataclasses
import json

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import trace_samples as samples
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from distill import models
from distill.errors import DataError, UserError
from distill.traces import quantisation, verify
from distill.traces.exchange import distillkit_codec as codec
from distill.traces.exchange.exporting import export
from distill.traces.exchange.foreign import ForeignRow, distribution, own_logprobs, spans
from distill.traces.exchange.importing import Settings, import_traces
from distill.traces.reader import open_traces

NUM = 40
FORMS = {"distillkit": "set", "axolotl": "set.parquet", "axolotl_jsonl": "set.jsonl"}


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    return samples.write(tmp_path_factory.mktemp("stored") / "traces", NUM)


@pytest.fixture(scope="module")
def imported(stored, tokenizer, tmp_path_factory):
    """The stored traces, exported and imported again, by form."""
    found = {}
    for form, name in FORMS.items():
        folder = tmp_path_factory.mktemp(form)
        style = form.partition("_")[0]
        assert export(stored, folder / name, style) == NUM
        import_traces(folder / name, folder / "traces", style, Settings("me/teacher", tokenizer, exact=True))
        found[form] = folder / "traces"
    return found


def every(path):
    """Each trace's ids and distribution, those without a completion left out, in order."""
    return [
        (block.prompt_ids[n], block.completion_ids[n], block.top_of(n))
        for block in open_traces(path).blocks()
        for n in range(len(block))
        if len(block.completion_ids[n])
    ]


@pytest.mark.parametrize("form", FORMS)
def test_ids_and_entries_survive_the_round_trip(form, stored, imported):
    report = verify.verify(imported[form])
    assert report.ok
    before, after = every(stored), every(imported[form])
    assert len(before) == len(after) > 30
    for (prompt, completion, top), (prompt2, completion2, top2) in zip(before, after, strict=True):
        np.testing.assert_array_equal(prompt2, prompt)
        np.testing.assert_array_equal(completion2, completion)
        np.testing.assert_array_equal(top2.count_T, top.count_T)
        np.testing.assert_array_equal(top2.ids_E, top.ids_E)
        np.testing.assert_allclose(top2.logp_E, top.logp_E, atol=1e-6)
        np.testing.assert_allclose(np.exp(top2.tail_T), np.exp(top.tail_T), atol=2e-6)


def test_metadata_say_where_the_traces_are_from(imported, tokenizer):
    metadata = open_traces(imported["distillkit"]).metadata
    assert (metadata.model, metadata.source, metadata.engine) == ("me/teacher", "distillkit data set set", "distillkit")
    assert metadata.tokenizer == models.tokenizer_fingerprint(tokenizer)
    assert metadata.top_k == samples.metadata().top_k


def test_stored_in_steps_the_entries_are_within_a_64th_of_a_nat(stored, tokenizer, tmp_path):
    export(stored, tmp_path / "set", "distillkit")
    import_traces(tmp_path / "set", tmp_path / "traces", "distillkit", Settings("t", tokenizer))
    for (_, _, top), (_, _, top2) in zip(every(stored), every(tmp_path / "traces"), strict=True):
        np.testing.assert_array_equal(top2.ids_E, top.ids_E)
        np.testing.assert_allclose(top2.logp_E, top.logp_E, atol=1 / 32 + 1e-3)


def test_importing_again_adds_what_is_missing(stored, tokenizer, tmp_path):
    export(stored, tmp_path / "set", "distillkit")
    one, asked = tmp_path / "traces", Settings("t", tokenizer)
    num = import_traces(tmp_path / "set", one, "distillkit", asked)
    assert import_traces(tmp_path / "set", one, "distillkit", asked) == num
    assert open_traces(one).num_rows == num


def test_a_train_stage_learns_from_imported_traces(tiny_dir, tokenizer, tmp_path, imported):
    import shutil

    from project import Project

    shutil.copytree(imported["axolotl"], tmp_path / "traces")
    train = {
        "kind": "train",
        "model": "m",
        "data": "./traces",
        "loss": {"fn": "forward_kl"},
        "steps": 1,
        "keep_truncated": True,
        "batch_traces": 8,
    }
    project = Project(
        tmp_path, {"name": "r", "models": {"m": str(tiny_dir)}, "stages": {"kl": train | {"dtype": "float32"}}}
    )
    done = project.run()
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(loss > 0 for loss in project.losses("kl"))


# ------------------------------------------------------------------------------------------------ the files of others


def test_the_rows_of_a_distillkit_set(tmp_path):
    samples.write(tmp_path / "traces", 2)
    export(tmp_path / "traces", tmp_path / "set", "distillkit")
    config = yaml.safe_load((tmp_path / "set" / "compression_config.yaml").read_text())
    k = samples.metadata().top_k
    assert (config["d"], config["k"], config["exact_k"], config["exact_dtype"]) == (samples.VOCAB, k, k, "float32")
    assert not config["delta_encoding"]
    row = pq.read_table(tmp_path / "set" / "data_0.parquet").to_pylist()[1]
    block = samples.traces([1])
    prompt, completion = block.prompt_ids[0].tolist(), block.completion_ids[0].tolist()
    assert row["input_ids"] == prompt + completion
    assert row["labels"] == [-100] * len(prompt) + completion
    assert len(row["compressed_logprobs"]) == len(row["bytepacked_indices"]) == len(prompt + completion) - 1
    logp = np.array(row["compressed_logprobs"], np.uint8).view("<f4")
    bits = np.unpackbits(np.array(row["bytepacked_indices"], np.uint8), axis=1)[:, : 16 * k].reshape(-1, k, 16)
    ids = bits @ (1 << np.arange(15, -1, -1))
    # Positions that predict the prompt: the token that follows, for sure.
    assert ids[: len(prompt) - 1, 0].tolist() == prompt[1:]
    assert (logp[: len(prompt) - 1, 0] == 0).all()
    top_ids, top_logp = block.top.dense(k)
    np.testing.assert_array_equal(ids[len(prompt) - 1 :], np.maximum(top_ids, 0))
    np.testing.assert_array_equal(logp[len(prompt) - 1 :], np.where(top_logp > -np.inf, top_logp, np.float32(-1e4)))


def test_the_rows_of_an_axolotl_set(tmp_path):
    samples.write(tmp_path / "traces", 2)
    export(tmp_path / "traces", tmp_path / "set.jsonl", "axolotl")
    row = json.loads((tmp_path / "set.jsonl").read_text().splitlines()[1])
    block = samples.traces([1])
    prompt, num = block.prompt_ids[0].tolist(), len(block.completion_ids[0])
    assert {len(row[name]) for name in row} == {len(prompt) + num}
    assert row["target_mask"][: len(prompt) - 1] + row["target_mask"][-1:] == [[0]] * len(prompt)
    rows = range(len(prompt) - 1, len(prompt) + num - 1)
    counts = [len(row["target_mask"][j]) for j in rows]
    assert counts == block.top.count_T.tolist()
    assert [i for j in rows for i in row["target_token_ids"][j]] == block.top.ids_E.tolist()
    assert [p for j in rows for p in row["target_logprobs"][j]] == pytest.approx(block.top.logp_E.tolist())


def test_the_rows_of_a_trl_set(stored, tmp_path):
    assert export(stored, tmp_path / "set.jsonl", "trl") == NUM
    row = json.loads((tmp_path / "set.jsonl").read_text().splitlines()[3])
    assert row["prompt"] == [{"role": "user", "content": "3 + ⅓ = ?"}]
    assert row["completion"] == [{"role": "assistant", "content": "<think>3</think><answer>3</answer>"}]
    assert (row["trace_id"], row["gold"]) == ("trace000003", "3")
    from trl.data_utils import is_conversational

    export(stored, tmp_path / "set.parquet", "trl")
    table = datasets.Dataset.from_parquet(str(tmp_path / "set.parquet"))
    assert is_conversational(table[0])
    assert len(table) == NUM


def encoded(logp_RK, config: codec.Compression):
    """The bytes of one position after another, written anew from the format's description."""
    parts = []
    for logp in np.asarray(logp_RK, np.float64):
        values = np.diff(logp, prepend=0.0) if config.delta_encoding else logp
        data = values[: config.exact_k].astype("<f4").tobytes()
        if config.exact_dtype == "bfloat16":
            exact = values[: config.exact_k].astype("<f4").view("<u4")
            data = ((exact + 0x7FFF + ((exact >> 16) & 1)) >> 16).astype("<u2").tobytes()
        rest = values[config.exact_k :]
        rank = np.arange(len(rest), dtype=np.float64)
        if config.normalize_t:
            rank = rank / (len(rest) - 1)
        terms = np.stack([np.sqrt(rank) if term == "sqrt" else rank**term for term in config.polynomial_terms], 1)
        fit = np.linalg.lstsq(terms, rest, rcond=None)[0].astype("<f4")
        data += fit.tobytes()
        residual = rest - terms @ fit
        for group in config.residual_bins:
            mine, residual = residual[: group.num_elements], residual[group.num_elements :]
            half = 2 ** (group.element_bits - 1)
            scale = np.float32(np.abs(mine).max() / half or 1.0)
            levels = np.clip(np.rint(mine / scale), -half, half - 1).astype(int) + half
            text = "".join(f"{level:0{group.element_bits}b}" for level in levels)
            text += "0" * (-len(text) % 8)
            data += scale.astype("<f4").tobytes() + bytes(int(text[i : i + 8], 2) for i in range(0, len(text), 8))
        parts.append(np.frombuffer(data, np.uint8))
    return np.stack(parts)


def entries(rows: int, k: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    z = -np.sort(-rng.gumbel(size=(rows, 400)) * 2, axis=1)
    return (z - np.logaddexp.reduce(z, axis=1, keepdims=True))[:, :k]


BINS = [{"scale_dtype": "float32", "element_bits": 8, "num_elements": 20}, {"scale_dtype": "float32", "element_bits": 3, "num_elements": 5}]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "close"),
    [
        ({"polynomial_terms": [0, 1, 2, "sqrt"], "residual_bins": BINS}, 0.02),
        ({"polynomial_terms": [0, 1, 2], "residual_bins": BINS, "normalize_t": True}, 0.05),
        ({"polynomial_terms": [0, 1, "sqrt"], "exact_dtype": "bfloat16"}, 0.6),
        ({"polynomial_terms": [0, 1], "delta_encoding": True, "residual_bins": BINS}, 0.3),
    ],
)
def test_lossy_forms_decode_to_their_precision(changes, close):
    config = codec.Compression(**{"d": 49152, "k": 33, "exact_k": 8, "delta_encoding": False, **changes})
    logp = entries(50, 33)
    found = codec.decode_logprobs(encoded(logp, config), config)
    assert found.shape == logp.shape
    exact = 2**-8 * np.abs(logp[:, :8]).max() if config.exact_dtype == "bfloat16" else 1e-5
    np.testing.assert_allclose(found[:, :8], logp[:, :8], atol=exact)
    assert np.abs(found - logp).mean() < close


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 2**18), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_packed_ids_are_exact(vocab, k, seed):
    config = codec.exact_config(vocab, k)
    ids = np.random.default_rng(seed).integers(0, vocab, (7, k))
    packed = codec.encode_ids(ids, config)
    assert packed.shape[1] == -(-k * (vocab - 1).bit_length() // 8)
    np.testing.assert_array_equal(codec.decode_ids(packed, config), ids)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 20), st.integers(1, 30), st.integers(0, 2**32 - 1))
def test_float32_log_probabilities_are_exact(rows, k, seed):
    logp = np.float32(entries(rows, k, seed))
    np.testing.assert_array_equal(codec.decode_logprobs(codec.encode_logprobs(logp), codec.exact_config(100, k)), logp)


def plain_set(folder, tokenizer, **changes):
    """A DistillKit set of plain top-k rows: one conversation of two answers, and two texts packed into one row."""
    rng = np.random.default_rng(0)
    logp = np.float32(entries(9, 3))
    row = {
        "input_ids": list(range(10, 20)),
        "labels": [-100, -100, 12, 13, -100, -100, 16, 17, 18, -100],
        "token_ids": rng.integers(0, 1000, (9, 3)).tolist(),
        "top_values": logp.tolist(),
    }
    packed = row | {"labels": list(range(10, 20)), "attention_mask": [1] * 4 + [2] * 6}
    rows = [row | {"attention_mask": [1] * 10}, packed]
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist([each | changes for each in rows]), folder / "data_0.parquet")
    return rows, logp


def test_a_plain_set_gives_a_trace_for_each_answer_and_each_packed_text(tokenizer, tmp_path):
    rows, logp = plain_set(tmp_path / "set", tokenizer)
    table = datasets.Dataset.from_parquet(str(tmp_path / "set" / "data_0.parquet"), cache_dir=str(tmp_path / "cache"))
    table.save_to_disk(str(tmp_path / "saved"))
    for source in ("set", "saved"):
        asked = Settings("t", tokenizer, exact=True)
        assert import_traces(tmp_path / source, tmp_path / f"of_{source}", "distillkit", asked) == 4
        found = every(tmp_path / f"of_{source}")
        assert [(p.tolist(), c.tolist()) for p, c, _ in found] == [
            ([10, 11], [12, 13]),
            ([10, 11, 12, 13, 14, 15], [16, 17, 18]),
            ([10], [11, 12, 13]),
            ([14], [15, 16, 17, 18, 19]),
        ]
        assert found[1][2].ids_E.tolist() == [i for j in (5, 6, 7) for i in rows[0]["token_ids"][j]]
        np.testing.assert_allclose(found[1][2].logp_E, logp[5:8].flatten(), atol=1e-6)
        reasons = [
            reason for block in open_traces(tmp_path / f"of_{source}").blocks() for reason in block.finish_reason
        ]
        assert reasons == ["stop", "stop", "length", "length"]
        tails = np.log1p(-np.exp(logp[5:8].astype(float)).sum(1))
        np.testing.assert_allclose(found[1][2].tail_T, tails, atol=1e-4)


# ------------------------------------------------------------------------------------------------ rows in memory


def foreign(logp, **changes):
    num = len(logp) + 1
    row = ForeignRow(
        np.arange(num), np.ones(num, bool), np.ones(num), np.arange(logp.size).reshape(logp.shape), np.float32(logp)
    )
    return dataclasses.replace(row, **changes)


def test_positions_without_entries_are_left_out():
    logp = np.log([[0.5, 0.25], [0.5, 0.25], [0.5, 0.25]])
    logp[1] = -1e9
    assert [(s.start, s.first, s.stop) for s in spans(foreign(logp))] == [(0, 1, 2), (0, 3, 4)]


def test_entries_are_sorted_and_masses_above_1_are_scaled():
    row = foreign(np.log([[0.25, 0.5], [0.51, 0.51]]))
    (span,) = spans(row)
    top = distribution(row, span)
    assert top.ids_E.tolist()[:2] == [1, 0]
    np.testing.assert_allclose(np.exp(top.logp_E), [0.5, 0.25, 0.5, 0.5], rtol=1e-6)
    np.testing.assert_allclose(np.exp(top.tail_T), [0.25, 0], atol=1e-7)
    quantisation.check(top, 2)
    np.testing.assert_allclose(np.exp(own_logprobs(top, np.array([0, 999]))), [0.25, 2e-22], rtol=0.1)


@pytest.mark.parametrize(
    ("logp", "said"), [([[3.0, 2.0]], "they are no log-probabilities"), ([[np.nan, -1.0]], "are not numbers")]
)
def test_logits_are_refused(logp, said):
    row = foreign(np.array(logp))
    with pytest.raises(DataError, match=said):
        [distribution(row, span) for span in spans(row)]


def test_a_wrong_number_of_positions_is_refused():
    row = foreign(np.log([[0.5], [0.5]]), ids_L=np.arange(9), learned_L=np.ones(9, bool), doc_L=np.ones(9))
    with pytest.raises(DataError, match="2 positions with entries for 9 tokens"):
        list(spans(row))


# ------------------------------------------------------------------------------------------------ refusals


def test_what_formats_cannot_hold_is_refused_in_words(stored, tokenizer, mistral, tmp_path):
    def attempt(source, style, **changes):
        given = {"teacher": "t", "tokenizer": tokenizer} | changes
        import_traces(source, tmp_path / "out", style, Settings(**given))

    export(stored, tmp_path / "set", "distillkit")
    with pytest.raises(UserError, match="Give the tokenizer of the model that the data set was made with"):
        attempt(tmp_path / "set", "distillkit", tokenizer=mistral)
    with pytest.raises(DataError, match="needs the columns input_ids, labels, target_logprobs"):
        attempt(tmp_path / "set", "axolotl")
    with pytest.raises(UserError, match="no such file or folder"):
        attempt(tmp_path / "none", "axolotl")
    (tmp_path / "set" / "compression_config.yaml").unlink()
    with pytest.raises(UserError, match=r"put compression_config\.yaml beside the files"):
        attempt(tmp_path / "set", "distillkit")
    (tmp_path / "wrong.yaml").write_text("{d: 49152, k: 4, exact_k: 4, dleta_encoding: false}")
    with pytest.raises(UserError, match="Did you mean 'delta_encoding'"):
        attempt(tmp_path / "set", "distillkit", config=tmp_path / "wrong.yaml")
    (tmp_path / "wrong.yaml").write_text("{d: 49152, k: 4, exact_k: 4}")
    with pytest.raises(DataError, match="bytes a position, and the compression configuration says 16"):
        attempt(tmp_path / "set", "distillkit", config=tmp_path / "wrong.yaml")
    pq.write_table(pa.table({"input_ids": [[1]], "packed_indices": [[1]], "exact_values": [[1]], "coeffs": [[1]]}), tmp_path / "old.parquet")  # fmt: skip
    with pytest.raises(DataError, match="legacy form"):
        attempt(tmp_path / "old.parquet", "distillkit")


def test_distributions_without_their_tail_are_taken_on_request_only(tokenizer, tmp_path):
    plain_set(tmp_path / "set", tokenizer, top_values=np.log(np.full((9, 3), 1 / 3)).tolist())
    with pytest.raises(UserError, match="the mass of the other ids is lost"):
        import_traces(tmp_path / "set", tmp_path / "out", "distillkit", Settings("t", tokenizer))
    asked = Settings("t", tokenizer, without_tail=True)
    assert import_traces(tmp_path / "set", tmp_path / "out", "distillkit", asked) == 4


def test_traces_without_distributions_are_exported_as_text_only(tmp_path):
    with samples.TraceWriter(tmp_path / "traces", samples.metadata(top_k=0)) as writer:
        writer.add(samples.traces(range(4), top=False))
    for style in ("distillkit", "axolotl"):
        with pytest.raises(UserError, match="hold no distributions"):
            export(tmp_path / "traces", tmp_path / "out.parquet", style)
    assert export(tmp_path / "traces", tmp_path / "out.jsonl", "trl") == 4


def test_the_command_line(stored, tiny_dir, tmp_path):
    from project import Project

    project = Project(tmp_path, {"name": "none"})
    done = project.distill("traces", "export", str(stored), "set", "--style", "distillkit")
    assert (done.stdout, done.returncode) == (f"{NUM} traces in set\n", 0), done.stderr
    done = project.distill("traces", "import", "set", "back", "--style", "distillkit", "--teacher", str(tiny_dir))
    assert done.returncode == 0, done.stderr
    assert project.distill("traces", "verify", "back").returncode == 0
    done = project.distill("traces", "import", "set", "b", "--style", "trl", "--teacher", str(tiny_dir))
    assert done.returncode == 2
    assert "holds text without distributions" in done.stderr
    done = project.distill("traces", "export", str(stored), "set2", "--style", "distilkit")
    assert (done.returncode, "none of chat, text, distillkit" in done.stderr) == (2, True)
