"""Export of the text for other trainers, and of a folder of traces as a hub data set, without the upload itself."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import trace_samples as samples
import yaml
from typer.testing import CliRunner

from distill.cli import app
from distill.recipe import PlugConfig
from distill.records import UserError
from distill.traces import provenance, push
from distill.traces.data_card import card
from distill.traces.export import export_dataset, export_sft
from distill.traces.prompts import PromptRecord
from distill.traces.reader import open_traces
from distill.traces.selection import select
from distill.traces.verify import verify
from distill.traces.writer import TraceWriter

CERTIFICATE = {
    "positions": 500, "traces": 30, "token_mean": 0.0012, "token_worst": 0.034, "entry_mean": 0.01,
    "entry_worst": 0.2, "kl_mean": 1e-5, "kl_worst": 2e-4, "engine": "vllm", "dtype": "bfloat16", "date": "2026-01-02",
}  # fmt: skip


@pytest.fixture
def stored(tmp_path) -> Path:
    return samples.write(tmp_path / "traces", 40)


def selected(stored: Path) -> Path:
    select(stored, stored.parent / "clean", [PlugConfig(fn="correct"), PlugConfig(fn="finished")])
    return stored.parent / "clean"


def test_the_datasets_folder_holds_what_the_jsonl_holds(stored, tmp_path):
    import datasets

    class Decoder:
        """Knows no prompt but their ids, as where the traces do not record how they were rendered."""

        def decode(self, ids, **options):
            return " ".join(map(str, ids))

    for source in (stored, selected(stored)):
        for style in ("chat", "text"):
            name = f"{source.name}-{style}"
            num = export_dataset(source, tmp_path / name, style, Decoder())  # type: ignore[arg-type]
            assert export_sft(source, tmp_path / f"{name}.jsonl", style, Decoder()) == num  # type: ignore[arg-type]
            lines = (tmp_path / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
            rows = list(datasets.load_from_disk(str(tmp_path / name)))
            assert rows == [json.loads(line) for line in lines]
            assert len(rows) == num == open_traces(source).num_rows
    row = datasets.load_from_disk(str(tmp_path / "traces-chat"))[3]
    assert row == {
        "messages": [
            {"role": "user", "content": "3 + ⅓ = ?"},
            {"role": "assistant", "content": "<think>3</think><answer>3</answer>"},
        ],
        "trace_id": "trace000003",
        "problem_id": "problem000001",
        "gold": "3",
    }
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]
    with pytest.raises(UserError, match="exists already and is not an empty folder"):
        export_dataset(stored, tmp_path / "traces-chat")


def test_the_command_line_chooses_the_format_by_the_name(stored, tmp_path):
    for out in ("a.jsonl", "folder"):
        result = CliRunner().invoke(app, ["traces", "export", str(stored), str(tmp_path / out)])
        assert result.exit_code == 0, result.output
        assert "40 traces" in result.output
    assert (tmp_path / "a.jsonl").is_file()
    assert (tmp_path / "folder" / "state.json").is_file()


# ---------------------------------------------------------------------------------------------- the card


def front_matter(text: str) -> dict:
    match = re.match(r"\A---\n(.*?)\n---\n", text, re.DOTALL)
    assert match is not None
    return yaml.safe_load(match[1])


def test_the_card_gives_origin_size_and_integrity(stored):
    text = card(stored, name="me/sums", licence="cc-by-4.0")
    front = front_matter(text)
    assert front["license"] == "cc-by-4.0"
    assert front["size_categories"] == ["n<1K"]
    assert front["task_categories"] == ["text-generation"]
    assert front["configs"][0]["data_files"] == [{"split": "train", "path": "*.parquet"}]
    tokens = int(open_traces(stored).lengths().completion.sum())
    for said in ("40 traces of 20 problems", "| distributions of | `teacher`, weights `w0` |", "`t0`, 49,152 tokens",
                 "temperature 1.0, top_p 1.0, max_tokens 256", "at most 16 entries", f"| completion tokens | {tokens:,} |",
                 "No audit was made", "recorded during sampling"):  # fmt: skip
        assert said in text, said
    provenance.write_certificate(stored, {**CERTIFICATE, "fingerprint": open_traces(stored).fingerprint})
    text = card(stored, name="me/sums <script>|", licence="cc-by-4.0")
    assert "| log-probability of the trace's token | 0.0012 | 0.034 |" in text
    assert "500 random positions of 30 traces" in text
    assert "<script>" not in text.partition("\n---\n")[2]
    assert front_matter(text)["pretty_name"] == "me/sums <script>|"


def test_the_card_says_who_wrote_text_that_was_only_scored(tmp_path):
    source = "somebody (weights `x|y`)\n# Not a heading"
    text = card(samples.write(tmp_path / "scored", 4, source=source), name="x")
    assert "that text scored by teacher forcing" in text
    assert "\n# Not" not in text


def test_the_card_shows_the_prompt_that_was_sampled_under(tmp_path):
    record = PromptRecord(
        chat=True, system="Be brief.", begun="<think>\n", options={"enable_thinking": True},
        rendered="<user>Be brief.\n\n{question}\n```code```<model><think>\n",
    )  # fmt: skip
    with TraceWriter(tmp_path / "chat", samples.metadata(prompt=record)) as writer:
        writer.add(samples.traces(range(2)))
    text = card(tmp_path / "chat", name="x")
    section = text.split("## The prompt")[1].split("## ")[0]
    assert f"````text\n{record.rendered}\n````" in section
    assert "`enable_thinking` = `True`" in section
    assert "begin with the system message above. The chat template has no system role" in section
    assert "begun the reply with `<think>`" in section
    plain = PromptRecord(chat=False, plain="Q: {question}\nA:", rendered="Q: {question}\nA:")
    with TraceWriter(tmp_path / "plain", samples.metadata(prompt=plain)) as writer:
        writer.add(samples.traces(range(2)))
    assert "Plain text, without a chat template" in card(tmp_path / "plain", name="x")
    assert "Not recorded beside the traces" in card(samples.write(tmp_path / "old", 2), name="x")


def test_the_cards_configuration_loads_the_shards_with_datasets(tmp_path, monkeypatch):
    """Of a built folder, as the hub's viewer reads it; a licence that is no identifier is refused."""
    import datasets

    built = push.build(samples.write(tmp_path / "traces", 12), tmp_path / "out", name="me/sums", licence="mit")
    rows = datasets.load_dataset(str(built), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(rows) == 12
    assert rows[3]["messages"] == [{"role": "user", "content": "3 + ⅓ = ?"}]
    with pytest.raises(UserError, match="is not an identifier of the hub"):
        push.build(tmp_path / "traces", tmp_path / "other", name="me/sums", licence="my own words")


def test_a_certificate_of_other_content_is_not_shown_and_one_of_the_source_is(stored):
    clean = selected(stored)
    provenance.write_certificate(clean, {**CERTIFICATE, "fingerprint": "another"})
    assert "No audit was made" in card(clean, name="x")
    provenance.write_certificate(stored, {**CERTIFICATE, "fingerprint": open_traces(stored).fingerprint})
    text = card(clean, name="x")
    assert "500 random positions" in text
    assert "## What was left out" in text
    assert "| `correct` |" in text
    assert "To be filled in" in text


def test_the_hub_library_reads_the_card(stored):
    """Its own parser and its own types of the front matter; the hub's validator needs a network."""
    from huggingface_hub import DatasetCard

    found = DatasetCard(card(stored, name="me/sums", licence="cc-by-4.0"))
    assert found.data.license == "cc-by-4.0"
    assert found.data.pretty_name == "me/sums"
    assert "distillation" in found.data.tags
    assert found.text.lstrip().startswith("# me/sums")


def snippet(text: str, language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)
    return found


@pytest.mark.parametrize("exact", [False, True])
def test_the_cards_examples_decode_the_shards(tmp_path, monkeypatch, exact):
    """The card's code, run in the downloaded folder, compared with the stored numbers."""
    import duckdb

    folder = tmp_path / "traces"
    with TraceWriter(folder, samples.metadata(exact=exact), shard_rows=5) as writer:
        writer.add(samples.traces(range(12)))
    text = card(folder, name="x")
    assert ("top_steps" in text) is not exact
    monkeypatch.chdir(folder)
    names: dict = {}
    exec(snippet(text, "python"), names)
    frame: pd.DataFrame = names["frame"].set_index("trace_id")
    table = duckdb.sql(snippet(text, "sql")).df()
    seen = 0
    for block in open_traces(folder).blocks():
        for n, trace_id in enumerate(block.trace_id):
            top = block.top_of(n)
            for t in range(len(top)):
                one = top.slice(t, t + 1)
                want = dict(zip(one.ids_E.tolist(), np.exp(one.logp_E).tolist(), strict=True))
                by_pandas, tail = names["distribution"](frame.loc[trace_id], t)
                rows = table[(table.trace_id == trace_id) & (table.t == t)]
                assert tail == pytest.approx(float(np.exp(one.tail_T[0])), rel=1e-5)
                assert {int(k): v for k, v in by_pandas.items()} == pytest.approx(want, rel=1e-4)
                by_sql = dict(zip(rows.id.tolist(), rows.probability.tolist(), strict=True))
                assert by_sql == pytest.approx(want, rel=1e-4)
                seen += len(want)
    assert seen > 500
    assert len(table) == seen


# ---------------------------------------------------------------------------------------------- the push


def test_what_is_uploaded_is_a_folder_of_traces(stored, tmp_path):
    provenance.write_certificate(stored, {**CERTIFICATE, "fingerprint": open_traces(stored).fingerprint})
    built = push.build(stored, tmp_path / "out", name="me/sums", licence="mit")
    names = {p.name for p in built.iterdir()}
    assert names == {*(p.name for p in stored.iterdir()), "README.md"}
    assert verify(built).ok
    assert samples.row_digests(built) == samples.row_digests(stored)
    assert provenance.certificate(open_traces(built)) is not None
    assert front_matter((built / "README.md").read_text())["license"] == "mit"
    with pytest.raises(UserError, match="exists already and is not an empty folder"):
        push.build(stored, built, name="me/sums", licence="mit")


def test_of_a_selection_only_the_kept_rows_are_uploaded(stored, tmp_path):
    clean = selected(stored)
    built = push.build(clean, tmp_path / "out", name="me/sums", licence="mit")
    assert samples.row_digests(built) == samples.row_digests(clean)
    assert 0 < open_traces(built).num_rows < 40
    assert "What was left out" in (built / "README.md").read_text()


def test_damaged_traces_are_not_published(stored, tmp_path):
    shard = next(stored.glob("*.parquet"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match="has faults, so it is not published"):
        push.build(stored, tmp_path / "out", name="me/sums", licence="mit")


def test_an_unreachable_hub_is_an_error_within_seconds(stored):
    """conftest sets HF_HUB_OFFLINE."""
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    command = ["traces", "push", str(stored), "me/sums", "--license", "mit"]
    result = CliRunner().invoke(app, command)
    assert isinstance(result.exception, UserError)
    assert "cannot be reached (HF_HUB_OFFLINE is set), so nothing was uploaded" in str(result.exception)
    assert "--folder OUT" in str(result.exception)
    assert {p.name for p in stored.parent.iterdir()} == {"traces"}
    with pytest.raises(UserError, match="write owner/name"):
        push.push(stored, "sums", licence="mit")


def test_the_folder_option_builds_without_a_hub(stored, tmp_path):
    command = ["traces", "push", str(stored), "me/sums", "--license", "mit", "--folder"]
    result = CliRunner().invoke(app, [*command, str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "README.md").is_file()
