"""TRL's conversational prompt and completion: what SFTTrainer, its on-policy trainers and others read. Text only.

    {"prompt": [{"role", "content"}, ...], "completion": [{"role": "assistant", "content"}], "trace_id", "problem_id", "gold"}

TRL has no format for stored distributions; `distill.integrations.trl` trains on the shards themselves.
"""

from __future__ import annotations

from typing import Final

import pyarrow as pa

from distill.traces.prompts import PromptRecord, conversation

TURNS = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
LABELS: Final = ("trace_id", "problem_id", "gold")
SCHEMA: Final = pa.schema(
    [("prompt", TURNS), ("completion", TURNS), *((name, pa.string()) for name in LABELS)]
)  # fmt: skip
COLUMNS: Final = (*LABELS, "messages", "completion")


def table(block: pa.Table, prompt: PromptRecord | None) -> pa.Table:
    """Return a block of a shard's columns `COLUMNS` as rows of TRL's: the conversation as it was sampled, the reply apart."""
    said = zip(block.column("messages").to_pylist(), block.column("completion").to_pylist(), strict=True)
    turns = [conversation(messages, completion, prompt) for messages, completion in said]
    columns = {
        "prompt": pa.array([each[:-1] for each in turns], TURNS),
        "completion": pa.array([each[-1:] for each in turns], TURNS),
    }
    return pa.table(columns | {name: block.column(name) for name in LABELS}, schema=SCHEMA)
