"""The answers of an endpoint, kept until a stage's shards hold them; nothing for an engine of this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distill.engines.served import journal
from distill.recipe import EngineConfig
from distill.traces.writer import StoredRows, TraceWriter


class KeptAnswers:
    """Passes on to an engine's journal which traces are in complete shards, so that it stays small.

    folder: the folder of traces. The journal is beside it, if the engine keeps one (`keep_answers`, an optional method of
    engines).
    """

    def __init__(self, engine: Any, folder: Path, writer: TraceWriter) -> None:
        keep = getattr(engine, "keep_answers", None)
        self._journal: journal.AnswerJournal | None = None if keep is None else keep(journal_of(folder), writer)
        self._stored: StoredRows[str] = StoredRows(writer)

    def added(self, ids: Sequence[str]) -> None:
        """Note traces that the writer got; it stores them in this order."""
        if self._journal is None:
            return
        self._stored.added(ids)
        self._journal.stored(self._stored.take())

    def close(self) -> None:
        """End the journal after the writer: all traces are in shards."""
        if self._journal is not None:
            self._journal.stored(self._stored.rest())
            self._journal.close()


def journal_of(folder: Path) -> Path:
    """Return the folder of the answers to the requests for a folder of traces."""
    return folder.with_name("answers")


def dollars(config: EngineConfig, folder: Path) -> float:
    """Return what the endpoint charged for a folder of traces, by all attempts; 0 without a price."""
    if config.price is None:
        return 0.0
    billed = journal.billed(journal_of(folder))
    return (billed.prompt * config.price.input + billed.completion * config.price.output) / 1e6
