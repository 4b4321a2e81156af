"""Traces for others: plain SFT JSONL without distributions, and several folders merged into one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pyarrow as pa

from distill.records import UserError
from distill.traces import codec, folder
from distill.traces.reader import open_traces
from distill.traces.writer import TraceWriter

_SFT_COLUMNS = ("trace_id", "problem_id", "messages", "completion", "gold")


def export_sft(source: str | Path, out: str | Path, style: Literal["chat", "text"] = "chat") -> int:
    """One JSON object a trace; returns how many.

    chat: {"messages": [..., {"role": "assistant", "content": completion}], "trace_id", "problem_id", "gold"},
    which chat trainers and the `datasets` library read as it is; text: {"prompt", "completion", ...} with the
    contents of the turns joined by blank lines.
    """
    out, num = Path(out), 0
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}{folder.TEMPORARY}")
    with open(temporary, "w", encoding="utf-8") as file:
        for table in open_traces(source).tables(columns=_SFT_COLUMNS):
            for row in table.to_pylist():
                messages, completion = row.pop("messages"), row.pop("completion")
                if style == "chat":
                    turns = [*messages, {"role": "assistant", "content": completion}]
                    shown: dict[str, object] = {"messages": turns}
                else:
                    prompt = "\n\n".join(turn["content"] for turn in messages)
                    shown = {"prompt": prompt, "completion": completion}
                file.write(json.dumps(shown | row, ensure_ascii=False) + "\n")
                num += 1
    temporary.replace(out)
    return num


def merge(sources: Sequence[str | Path], out: str | Path) -> int:
    """Every trace of several folders or selections, each id once, as one folder; returns how many were added.

    Raises UserError where the sources differ in an identity key. Run again after a kill, it goes on.
    """
    readers = [open_traces(source) for source in sources]
    if not readers:
        raise UserError(f"{out}: nothing to merge.")
    metadata = readers[0].metadata
    for reader in readers[1:]:
        folder.refuse_differences(readers[0].path, metadata, reader.metadata, str(reader.path))
    num = 0
    with TraceWriter(out, metadata) as writer:
        done = writer.done_ids()
        for reader in readers:
            for table in reader.tables():
                new = [trace_id not in done for trace_id in table.column("trace_id").to_pylist()]
                table = table.filter(pa.array(new))
                traces = codec.from_table(table, metadata)
                writer.add(traces)
                done.update(traces.trace_id)
                num += len(traces)
    return num
