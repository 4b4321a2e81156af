"""Files that appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from distill.files import write_atomic


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    path = write_atomic(tmp_path / "report.md", "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "new \ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
