"""Atomic writes of files and folders, and locks."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from distill.errors import UserError
from distill.files import locked, whole_folder, write_atomic


def test_a_failed_write_leaves_the_old_file_and_no_temporary_one(tmp_path: Path) -> None:
    path = write_atomic(tmp_path / "report.md", "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "new \ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_appears_whole_and_replaces_the_old_one(tmp_path: Path) -> None:
    final = tmp_path / "model"
    for text in ("old", "new"):
        with whole_folder(final) as building:
            (building / "below").mkdir()
            (building / "below" / "weights").write_text(text)
            assert not final.exists() or (final / "below" / "weights").read_text() == "old"
        assert (final / "below" / "weights").read_text() == text
    with pytest.raises(ZeroDivisionError), whole_folder(final) as building:
        (building / "half").write_text(str(1 / 0))
    assert (final / "below" / "weights").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from distill.files import whole_folder\n"
        "with whole_folder(Path(sys.argv[1]) / 'model') as building:\n"
        "    (building / 'half').touch(); os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, tmp_path]).returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == [".building-model"]
    with whole_folder(tmp_path / "model"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_lock_names_its_holder_and_is_free_after_it(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    here = rf"in use \(process {os.getpid()} on {socket.gethostname()}\)"
    with locked(path, "in use ({holder})"), pytest.raises(UserError, match=here), locked(path, "in use ({holder})"):
        pass
    with locked(path, "in use ({holder})"):
        pass
    assert list(tmp_path.iterdir()) == []
