"""Export traces: their text as JSONL or as a `datasets` folder; merge several folders into one."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from distill import models
from distill.errors import DataError
from distill.models.rendering import plain_text
from distill.records import Message, UserError
from distill.traces import codec, folder
from distill.traces.prompts import PromptRecord, conversation
from distill.traces.reader import SELECTION_FILE, TraceReader, open_traces
from distill.traces.writer import TraceWriter

Style = Literal["chat", "text"]
_SFT_LABELS = ("trace_id", "problem_id", "gold")


def export_sft(source: str | Path, out: str | Path, style: Style = "chat", tokenizer: Any = None) -> int:
    """Write one JSON object a trace; return their number.

    chat: {"messages": [..., {"role": "assistant", "content": reply}], "trace_id", "problem_id", "gold"}, the whole conversation as
    it was sampled, which chat trainers and the `datasets` library read directly; with "chat_template_kwargs" if the prompts
    had options of the chat template. text: {"prompt", "completion", ...}, the prompt's text as the model read it.
    tokenizer: of the model that wrote the traces; text needs it for prompts of a chat template. With one, every prompt is
    compared with the stored ids. Raises UserError for a tokenizer that is missing or another one.
    """
    out, num = Path(out), 0
    folder.make_folder(out.parent)
    temporary = out.with_name(f".{out.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        for row in _sft_rows(str(source), style, tokenizer):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            num += 1
    temporary.replace(out)
    return num


def export_dataset(source: str | Path, out: str | Path, style: Style = "chat", tokenizer: Any = None) -> int:
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
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as temporary:
        table = datasets.Dataset.from_generator(
            lambda: _sft_rows(str(source), style, tokenizer),
            features=_features(style, _options(reader)),
            cache_dir=str(Path(temporary) / "cache"),
            fingerprint=reader.fingerprint,
        )
        table.save_to_disk(str(Path(temporary) / "whole"))
        num = len(table)
        if out.exists():
            out.rmdir()
        (Path(temporary) / "whole").rename(out)
    return num


def needs_tokenizer(source: str | Path, style: Style) -> bool:
    """Return whether an export in this style renders prompts with a chat template."""
    prompt = open_traces(source).metadata.prompt
    return style == "text" and (prompt is None or prompt.chat)


def _options(reader: TraceReader) -> dict[str, Any]:
    """The options of the chat template that the prompts were rendered with."""
    prompt = reader.metadata.prompt
    return dict(prompt.options) if prompt is not None and prompt.chat else {}


def _features(style: Style, options: Mapping[str, Any]) -> Any:
    import datasets

    text = datasets.Value("string")
    if style == "text":
        return datasets.Features({"prompt": text, "completion": text, **dict.fromkeys(_SFT_LABELS, text)})
    columns = {"messages": datasets.List({"role": text, "content": text}), **dict.fromkeys(_SFT_LABELS, text)}
    if options:
        kept = pa.schema([("chat_template_kwargs", pa.array([options]).type)])
        columns |= datasets.Features.from_arrow_schema(kept)
    return datasets.Features(columns)


def _sft_rows(source: str, style: Style, tokenizer: Any = None) -> Iterator[dict[str, Any]]:
    reader = open_traces(source)
    prompt, options = reader.metadata.prompt, _options(reader)
    if needs_tokenizer(source, style) and tokenizer is None:
        raise UserError(
            f"{source}: the prompts' text follows from the chat template of {reader.metadata.model!r}, whose tokenizer was not "
            "given. Export with style chat, or name a folder with the tokenizer."
        )
    for table in reader.tables(columns=(*_SFT_LABELS, "messages", "completion", "prompt_ids")):
        for row in table.to_pylist():
            messages, completion, ids = (row.pop(name) for name in ("messages", "completion", "prompt_ids"))
            text = _prompt_text(messages, ids, prompt, tokenizer, row["trace_id"])
            if style == "chat":
                turns = conversation(messages, completion, prompt)
                yield {"messages": turns, **row, **({"chat_template_kwargs": options} if options else {})}
            else:
                yield {"prompt": text, "completion": completion, **row}


def _prompt_text(
    messages: Sequence[Message], ids: Sequence[int], prompt: PromptRecord | None, tokenizer: Any, trace_id: str
) -> str:
    """The text of a prompt; with a tokenizer compared with the stored ids. Empty if neither says it.

    Raises DataError if the ids are others.
    """
    if prompt is None:
        return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False)) if tokenizer is not None else ""
    template = prompt.template()
    if tokenizer is None:
        return "" if prompt.chat else plain_text(prompt.plain, messages) + prompt.prefill
    text = models.prompt_text(tokenizer, template, messages)
    if models.encode_prompt(tokenizer, template, text).tolist() != list(ids):
        raise DataError(
            f"trace {trace_id}: its prompt, rendered again with this tokenizer and chat template, has other ids than the stored "
            "ones: the tokenizer is not the one that the traces were sampled with. Name the model's own folder."
        )
    return text


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
