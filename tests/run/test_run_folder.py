"""stage.json counts the time of killed attempts."""

from __future__ import annotations

import os

import pytest

from distill import run_folder


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
