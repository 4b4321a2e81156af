"""Audit: traces scored again by the model that wrote them, and by others."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from scored_runs import context
from typer.testing import CliRunner

from distill import models
from distill.cli import app
from distill.records import TopK, UserError
from distill.stages import score
from distill.tools.audit import _choose, _compare_position, audit
from distill.traces import provenance
from distill.traces.reader import open_traces
from distill.traces.writer import TraceWriter


@pytest.fixture
def run(tiny_dir, written, tmp_path) -> Path:
    """A run with a finished generate stage, as the pipeline writes it."""
    shutil.copytree(written, tmp_path / "traces")
    tree = context(tmp_path, {"a": tiny_dir, "b": tiny_dir}).recipe.model_dump(mode="json")
    (tmp_path / "resolved.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path


def test_the_weights_that_wrote_the_traces_certify_them(tiny_dir, run):
    folder = run / "traces" / "traces"
    found = audit(folder, 20)
    assert found.ok
    assert found.positions == 20
    assert found.token_worst < 2e-3
    assert 0 < found.entry_mean < found.entry_worst < 1 / 16
    assert found.kl_worst < 2e-3
    assert found.weights == models.weights_fingerprint(tiny_dir)
    kept = provenance.certificate(open_traces(folder))
    assert kept is not None
    assert (kept["positions"], kept["token_mean"]) == (20, found.token_mean)
    more = dataclasses.replace(open_traces(folder), fingerprint="another content")
    (folder / provenance.CERTIFICATE).rename(folder.parent / provenance.CERTIFICATE)
    assert provenance.certificate(dataclasses.replace(more, path=folder.parent)) is None
    assert "20 positions of" in str(found)
    whole = audit(folder, 10**6, seed=1)
    assert whole.positions == int(open_traces(folder).lengths().completion.sum())


def test_a_model_with_other_weights_is_refused_and_false_distributions_are_found(
    tiny_dir,
    other_dir,
    run,
    tmp_path,
):
    folder = run / "traces" / "traces"
    with pytest.raises(UserError, match="Give the model that wrote the traces with --model"):
        audit(folder, 5, model=str(other_dir))
    honest = open_traces(folder)
    forged = tmp_path / "forged"
    ctx = context(tmp_path, {"a": tiny_dir, "b": other_dir})
    score.run(ctx.recipe.stages["scored"], ctx)
    claim = honest.metadata.model_copy(update={"model": "somebody"})
    with TraceWriter(forged, claim) as writer:
        for block in open_traces(ctx.folder / "traces").blocks():
            writer.add(block)
    with pytest.raises(UserError, match="Give it with --model"):
        audit(forged, 5)
    found = audit(forged, 30, model=str(tiny_dir))
    assert not found.ok
    assert found.token_mean > 0.05
    assert "these are not the distributions" in str(found)


def test_from_the_command_line(tiny_dir, run):
    folder = run / "traces" / "traces"
    result = CliRunner().invoke(app, ["traces", "verify", str(folder), "--audit", "4"])
    assert result.exit_code == 0, result.output
    assert "4 positions of" in result.output


def test_positions_are_drawn_uniformly_and_rows_without_any_are_left_out(written):
    reader = open_traces(written / "traces")

    @dataclasses.dataclass
    class Fake:
        path = Path()

        def lengths(self):
            return dataclasses.replace(reader.lengths(), completion=np.array([3, 0, 5, 1]), prompt=np.ones(4))

    every = _choose(Fake(), 100, 0)  # type: ignore[arg-type]
    assert {n: p.tolist() for n, p in every.items()} == {0: [0, 1, 2], 2: [0, 1, 2, 3, 4], 3: [0]}
    some = _choose(Fake(), 4, 7)  # type: ignore[arg-type]
    assert sum(len(p) for p in some.values()) == 4
    counts = np.zeros(9)
    for seed in range(300):
        for n, positions in _choose(Fake(), 3, seed).items():  # type: ignore[arg-type]
            counts[positions + {0: 0, 2: 3, 3: 8}[n]] += 1
    assert counts.min() > 60
    assert counts.max() < 140


def test_the_difference_at_a_position_by_hand():
    """p = .7 .2 (.1), q = .5 .3 (.2): KL .0851228."""

    def top(ids: list[int], probs: list[float]) -> TopK:
        rest = np.log([1 - sum(probs)]).astype(np.float32)
        logp = np.log(probs).astype(np.float32)
        return TopK(np.array([len(ids)], np.int32), np.array(ids), logp, rest)

    entry, kl, unlisted = _compare_position(top([4, 9], [0.7, 0.2]), top([4, 9, 5], [0.5, 0.3, 0.1]))
    assert kl == pytest.approx(0.0851228, abs=1e-6)
    np.testing.assert_allclose(entry, [np.log(0.7 / 0.5), np.log(0.3 / 0.2)], rtol=1e-5)
    assert unlisted == 0
    entry, kl, unlisted = _compare_position(top([4, 9], [0.7, 0.2]), top([4, 5], [0.5, 0.3]))
    assert unlisted == 1
    assert entry[1] == pytest.approx(np.log(0.3 / 0.2), rel=1e-5)
