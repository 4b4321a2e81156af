"""`distill inspect` on traces of a tiny model, with another model as the student."""

from __future__ import annotations

import base64
import json
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill import engines, models
from distill.recipe import EngineConfig
from distill.records import Ragged, Request, Sampling, TopK, Traces, UserError
from distill.tools import inspect
from distill.traces.schema import Metadata
from distill.traces.writer import TraceWriter

QUESTIONS = ["Zwei und zwei? 😀", "<script>alert(1)</script>", "4 + 4", "5 + 5"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_dir: Path, tokenizer: Any) -> Path:
    """A folder with four traces of 12 tokens and their distributions."""
    engine = engines.open_engine(EngineConfig(fn="reference"), tiny_dir, max_model_len=64, max_top_k=8)
    prompts = [np.array(tokenizer(q, add_special_tokens=False).input_ids) for q in QUESTIONS]
    requests = [Request(f"trace{n}", prompt, n) for n, prompt in enumerate(prompts)]
    written = list(engine.generate(requests, Sampling(max_tokens=12), top_k=8))
    engine.close()
    written.sort(key=lambda one: one.request_id)
    num = len(written)
    block = Traces(
        trace_id=[one.request_id for one in written],
        problem_id=[f"p{n}" for n in range(num)],
        sample=np.zeros(num, np.int32),
        messages=[({"role": "user", "content": q},) for q in QUESTIONS],
        completion=[tokenizer.decode(one.ids_T) for one in written],
        answer=["4", None, "8", None],
        gold=["4", "6", "8", "10"],
        prompt_ids=Ragged.from_rows(prompts, np.int32),
        completion_ids=Ragged.from_rows([one.ids_T for one in written], np.int32),
        logprob=Ragged.from_rows([one.logprob_T for one in written], np.float32),
        top=TopK.concat([one.top for one in written if one.top is not None]),
        reward=[1.0, 0.0, 1.0, 0.0],
        rewards={"accuracy": [1.0, 0.0, 1.0, 0.0]},
        correct=[True, False, True, False],
        finish_reason=[one.finish_reason for one in written],
    )
    metadata = Metadata(
        model=str(tiny_dir), weights="w", tokenizer=models.tokenizer_fingerprint(tokenizer),
        chat_template="c", vocab_size=len(tokenizer), task="sums", task_fingerprint="f", template="t",
        sampling=Sampling(max_tokens=12), top_k=8, mass=1.0, engine="reference",
    )  # fmt: skip
    path = tmp_path_factory.mktemp("stage") / "traces"
    with TraceWriter(path, metadata) as writer:
        writer.add(block)
    return path


def unpack(path: Path) -> dict[str, Any]:
    packed = re.search(r'id="data">([^<]*)<', path.read_text(encoding="utf-8"))
    assert packed is not None
    data = zlib.decompress(base64.b64decode(packed[1]), 31)
    (length,) = struct.unpack("<I", data[:4])
    header: dict[str, Any] = json.loads(data[4 : 4 + length])
    offset, arrays = 4 + length, {}
    for name, (planes, count) in header["arrays"].items():
        raw = np.frombuffer(data, np.uint8, planes * count, offset).reshape(planes, count)
        arrays[name] = (raw.astype(np.int64) << 8 * np.arange(planes)[:, None]).sum(0)
        offset += planes * count
    return header | {"arrays": arrays}


def test_the_command_line_writes_a_page(folder: Path, tmp_path: Path, tokenizer: Any) -> None:
    out = tmp_path / "page.html"
    command = [sys.executable, "-m", "distill.cli", "inspect", str(folder.parent), "--out", str(out), "--sample", "3"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert str(out) in done.stdout
    header = unpack(out)
    assert len(header["traces"]) == 3
    for trace in header["traces"]:
        n = int(trace["id"].removeprefix("trace"))
        assert trace["question"] == QUESTIONS[n]
        assert trace["prompt"] == QUESTIONS[n]
        assert trace["correct"] is (n % 2 == 0)


def test_the_teacher_as_student_has_the_same_numbers(folder: Path, tmp_path: Path, tiny_dir: Path) -> None:
    path, _ = inspect.write(folder, tmp_path, student=str(tiny_dir))
    arrays = unpack(path)["arrays"]
    assert path == tmp_path / "inspect.html"
    # The transformers engine in bfloat16 against the reference in float32.
    assert arrays["kl"].max() / 1000 < 0.01
    assert np.abs(arrays["student_nll"] - arrays["nll"]).max() / 1000 < 0.2


def test_a_sample_is_the_same_every_time(folder: Path, tmp_path: Path) -> None:
    one, _ = inspect.write(folder, tmp_path / "a.html", sample=2)
    two, _ = inspect.write(folder, tmp_path / "b.html", sample=2)
    assert one.read_bytes() == two.read_bytes()


def test_missing_traces_and_wrong_tokenizers_are_errors(folder: Path, tmp_path: Path, tiny_dir: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        inspect.write(tmp_path / "missing")
    with pytest.raises(UserError, match="no traces here"):
        inspect.write(tmp_path)
    other = tmp_path / "other"
    changed = models.load_tokenizer(tiny_dir)
    changed.add_tokens(["<another>"])
    changed.save_pretrained(other)
    (other / "config.json").write_text((tiny_dir / "config.json").read_text())
    with pytest.raises(UserError, match="is not the tokenizer that wrote these traces"):
        inspect.write(folder, tokenizer=str(other))
    with pytest.raises(UserError, match="--student: the traces' distributions are over another"):
        inspect.write(folder, student=str(other))
