"""stage.json counts the time of killed attempts, and is not believed when it has changed."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from distill import run_folder
from distill.files import DIGEST
from distill.records import UserError
from distill.run.pipeline import Runner


def standing(**changes):
    return run_folder.State(kind="train", config={}, inputs={}, seconds=5.0, **changes)


def test_a_killed_attempt_counts_up_to_the_last_file_it_wrote(tmp_path):
    killed = standing(began=1000.0)
    run_folder.write(tmp_path, killed)
    (tmp_path / "checkpoints").mkdir()
    for name, when in (("metrics.jsonl", 1030.0), ("checkpoints/state.json", 1042.0)):
        (tmp_path / name).write_text("{}")
        os.utime(tmp_path / name, (when, when))
    os.utime(tmp_path / run_folder.FILE, (1000.0, 1000.0))
    run_folder.add_killed_time(tmp_path, killed)
    assert killed.seconds == pytest.approx(47.0)
    run_folder.add_killed_time(tmp_path, killed)
    assert killed.seconds == pytest.approx(47.0)  # the killed attempt is counted once


def test_an_ended_attempt_adds_nothing(tmp_path):
    for status in ("done", "failed"):
        ended = standing(began=1000.0, status=status)
        run_folder.write(tmp_path, ended)
        run_folder.add_killed_time(tmp_path, ended)
        assert ended.seconds == 5.0


@pytest.mark.parametrize(("began", "took"), [(86_400.0, 0.0), (-86_400.0, 3.0), (-1.0, 1.0)])
def test_a_clock_that_is_set_meanwhile_makes_no_time(tmp_path, began, took):
    """The clock went back, or forward, by a day; an attempt takes from nothing to what its process lived."""
    run_folder.write(tmp_path / "kl", standing(began=time.time() + began))
    runner = Runner(SimpleNamespace(name="r"), tmp_path, tmp_path, ())
    runner._fail([SimpleNamespace(name="kl")], lived=3.0)
    failed = run_folder.read(tmp_path / "kl")
    assert failed.status == "failed"
    assert failed.seconds == pytest.approx(5.0 + took, abs=0.5)


def test_a_state_is_read_as_it_was_written(tmp_path):
    state = standing(
        status="done", metrics={"loss": float("nan"), "per": {3: (1, 2)}, "text": "ä\u2028"}, fingerprint="f"
    )
    run_folder.write(tmp_path, state)
    again = run_folder.read(tmp_path)
    assert again.metrics["per"] == {"3": [1, 2]}
    assert again.metrics["text"] == state.metrics["text"]
    run_folder.write(tmp_path, again)
    assert run_folder.read(tmp_path).fingerprint == "f"


def test_a_state_without_a_digest_is_one_of_an_older_version(tmp_path):
    run_folder.write(tmp_path, standing())
    tree = json.loads((tmp_path / "stage.json").read_text())
    del tree[DIGEST], tree["logged"]
    (tmp_path / "stage.json").write_text(json.dumps(tree))
    assert run_folder.read(tmp_path).seconds == 5.0


DAMAGES = {
    "a digit": lambda text: text.replace("0.4375", "0.9375"),
    "cut": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "a list": lambda text: "[]",
    "another key": lambda text: text.replace('"seconds"', '"second"'),
    "deep": lambda text: "[" * 100_000,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_changed_state_is_named_with_its_remedy(tmp_path, damage):
    run_folder.write(tmp_path, standing(status="done", metrics={"accuracy": 0.4375}))
    path = tmp_path / "stage.json"
    path.write_text(DAMAGES[damage](path.read_text()))
    with pytest.raises(UserError, match=r"stage\.json: not as written .*Remove this file"):
        run_folder.read(tmp_path)


def test_a_changed_environment_is_named_with_its_remedy(tmp_path):
    for text in ("", "[]", '{"date": '):
        (tmp_path / "environment.json").write_text(text)
        with pytest.raises(UserError, match=r"environment\.json: not as written \(.*\)\. Remove"):
            run_folder.environment(tmp_path)


def test_a_log_that_has_changed_since_the_stage_ended_is_not_used(tmp_path):
    log: Path = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 1, "loss": 2.5}\n')
    from distill.files import file_hash

    done = standing(status="done", logged=file_hash(log))
    assert run_folder.log_of(tmp_path, done) == (log, True)
    log.write_text('{"step": 1, "loss": 0.5}\n')
    assert run_folder.log_of(tmp_path, done) == (None, False)
    assert run_folder.log_of(tmp_path, standing()) == (log, True)  # a stage that still writes it
    log.unlink()
    assert run_folder.log_of(tmp_path, done) == (None, False)
