"""A few completions of the stage under way as text, for `distill watch`: the first ones of traces, the latest ones of a policy.

They are written to STAGE/completions.json, at most NUM at a time; nothing reads them but the page.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from distill import world
from distill.records import GradedGroup

FILE = "completions.json"
NUM = 4
MAX_CHARS = 4000
"""Characters of a question or a completion that are shown."""


class ShownCompletions:
    """The completions shown of a stage. folder: the stage's."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / FILE
        self._rows: list[dict[str, Any]] = []

    def first(self, question: str, text: str, correct: bool | None) -> None:
        """Show a completion if it is among the first."""
        if len(self._rows) < NUM:
            self._rows.append(_row(question, text, correct))
            self._write(None)

    def latest(self, rollout: int, groups: Sequence[GradedGroup]) -> None:
        """Show one completion each of the first groups of a rollout, in place of the former ones. rollout: counted from 0."""
        shown = [one.group for one in groups[:NUM]]
        self._rows = [_row(g.problem.question, g.texts[0], g.verdicts[0].correct) for g in shown]
        self._write(rollout)

    def _write(self, rollout: int | None) -> None:
        if not world.is_main():
            return
        temporary = self._file.with_name(f".{FILE}.tmp")
        with suppress(OSError):  # a page misses them, nothing else does
            temporary.write_text(json.dumps({"rollout": rollout, "rows": self._rows}), encoding="utf-8")
            os.replace(temporary, self._file)


def _row(question: str, text: str, correct: bool | None) -> dict[str, Any]:
    return {"question": question[:MAX_CHARS], "text": text[:MAX_CHARS], "correct": correct}
