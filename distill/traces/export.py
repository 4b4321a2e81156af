"""Export traces: their text as JSONL or as a `datasets` folder; merge several folders into one."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from distill.records import UserError
from distill.traces import codec, folder
from distill.traces.reader import SELECTION_FILE, open_traces
from distill.traces.writer import TraceWriter

Style = Literal["chat", "text"]
_SFT_LABELS = ("trace_id", "problem_id", "gold")


def export_sft(source: str | Path, out: str | Path, style: Style = "chat") -> int:
    """Write one JSON object a trace; return their number.

    chat: {"messages": [..., {"role": "assistant", "content": completion}], "trace_id", "problem_id", "gold"},
    which chat trainers and the `datasets` library read directly; text: {"prompt", "completion", ...} with the
    contents of the turns joined by blank lines.
    """
    out, num = Path(out), 0
    folder.make_folder(out.parent)
    temporary = out.with_name(f".{out.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        for row in _sft_rows(str(source), style):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            num += 1
    temporary.replace(out)
    return num


def export_dataset(source: str | Path, out: str | Path, style: Style = "chat") -> int:
    """Write the same rows as a folder for `datasets.load_from_disk`, streamed; return their number.

    Raises UserError if `out` is not empty, or there is no trace.
    """
    import datasets

    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists already and is not an empty folder; name a new one.")
    folder.make_folder(out.parent)
    reader = open_traces(source)
    if not reader.num_rows:
        raise UserError(f"{source}: holds no traces, so there is nothing to export.")
    text = datasets.Value("string")
    said = (
        {"messages": datasets.List({"role": text, "content": text})}
        if style == "chat"
        else {"prompt": text, "completion": text}
    )
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as temporary:
        table = datasets.Dataset.from_generator(
            _sft_rows,
            gen_kwargs={"source": str(source), "style": style},
            features=datasets.Features({**said, **dict.fromkeys(_SFT_LABELS, text)}),
            cache_dir=str(Path(temporary) / "cache"),
            fingerprint=reader.fingerprint,
        )
        table.save_to_disk(str(Path(temporary) / "whole"))
        num = len(table)
        if out.exists():
            out.rmdir()
        (Path(temporary) / "whole").rename(out)
    return num


def _sft_rows(source: str, style: Style) -> Iterator[dict[str, Any]]:
    for table in open_traces(source).tables(columns=(*_SFT_LABELS, "messages", "completion")):
        for row in table.to_pylist():
            messages, completion = row.pop("messages"), row.pop("completion")
            if style == "chat":
                turns = [*messages, {"role": "assistant", "content": completion}]
                yield {"messages": turns, **row}
            else:
                prompt = "\n\n".join(turn["content"] for turn in messages)
                yield {"prompt": prompt, "completion": completion, **row}


def merge(sources: Sequence[str | Path], out: str | Path) -> int:
    """Merge the traces of several folders or selections into one folder, each id once; return the number added.

    Raises UserError if the sources differ in an identity key. After a kill, run it again to continue.
    """
    readers = [open_traces(source) for source in sources]
    if not readers:
        raise UserError(f"{out}: no folder of traces to merge was given.")
    if (Path(out) / SELECTION_FILE).exists():
        raise UserError(f"{out}: is a selection of other traces; name another folder.")
    metadata = readers[0].metadata
    for reader in readers[1:]:
        folder.refuse_differences(readers[0].path, metadata, reader.metadata, str(reader.path))
    num = 0
    with TraceWriter(out, metadata) as writer:
        for reader in readers:
            for table in reader.tables():
                new = [trace_id not in writer for trace_id in table.column("trace_id").to_pylist()]
                table = table.filter(pa.array(new))
                traces = codec.from_table(table, metadata)
                writer.add(traces)
                num += len(traces)
    return num
