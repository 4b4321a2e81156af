"""The columns of a trace shard and the metadata each one carries.

One row a trace, in plain Parquet types that any reader supports. The distribution is flat over the trace:
position t, which is token t of the completion, has `top_count[t]` entries; they follow those of the previous positions
in `top_ids` (by descending probability) and `top_steps`, which one formula turns into probabilities
(`quantisation.py`; data/README.md has it for pandas and DuckDB). `tail_logprob[t]` is the log of the mass outside the
entries. If a folder's metadata says `exact: true`, `top_logprobs` holds the entries' float32 log-probabilities and
`top_steps` is null; otherwise `top_logprobs` is null. Without a distribution (`top_k: 0`) all five columns are null. If the
metadata has a `position_share` below 1, only that share of each completion's positions has a distribution; at the others
`top_count` is 0 and `tail_logprob` is 0 (all mass is outside the entries).

`messages` is the conversation that was sampled, with the system message of the task's template; `prompt` in the metadata
says how it was rendered (`prompts.py`).

Schema 2 is schema 1 with draws from the tail: position t has `draw_count[t]` of them, ids in `draw_ids` and their
log-probabilities in `draw_logprobs`. Each stands for max(exp(tail_logprob[t]), 0.01) / tail_draws of the tail's mass. Traces without
draws (`tail_draws: 0`) are written in schema 1.

The metadata is stored as JSON under the key `distill` in every file's key-value metadata, and in the manifest. How shards
are cut, found and locked is in `folder.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final, Literal

import pyarrow as pa
import pydantic
from pydantic import Field

from distill import plug
from distill.errors import DataError
from distill.records import Sampling
from distill.tail_draws import MAX_DRAWS
from distill.traces.prompts import PromptRecord
from distill.traces.quantisation import STEPS_PER_NAT

SCHEMA_VERSIONS: Final = (1, 2)
"""Frozen: `data/golden/` holds shards of them that every later version must read. Other versions are refused."""

METADATA_KEY = b"distill"

VALUE_COLUMNS = ("top_steps", "top_logprobs")
"""The two forms of an entry's value; a folder has one of them. Asking for either column reads both."""
DISTRIBUTION_COLUMNS = ("top_count", "top_ids", *VALUE_COLUMNS, "tail_logprob")
DRAW_COLUMNS = ("draw_count", "draw_ids", "draw_logprobs")
"""Only in schema 2."""


# Lists of tokens have 64-bit offsets in memory: a buffer of long traces may hold more than 2^31 entries, and the offsets
# become those of `Ragged` without a copy. In the file they are plain lists.
def _list_of(kind: pa.DataType) -> pa.DataType:
    return pa.large_list(pa.field("element", kind, nullable=False))


_IDS = _list_of(pa.uint32())
_LOGPROBS = _list_of(pa.float32())

ARROW_SCHEMA = pa.schema(
    [
        pa.field("trace_id", pa.string(), nullable=False),
        pa.field("problem_id", pa.string(), nullable=False),
        pa.field("sample", pa.int32(), nullable=False),
        pa.field("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        pa.field("completion", pa.string()),
        pa.field("answer", pa.string()),
        pa.field("gold", pa.string()),
        pa.field("prompt_tokens", pa.int32()),
        pa.field("completion_tokens", pa.int32()),
        pa.field("prompt_ids", _IDS),
        pa.field("completion_ids", _IDS),
        pa.field("logprob", _LOGPROBS),
        pa.field("top_count", _list_of(pa.int32())),
        pa.field("top_ids", _IDS),
        pa.field("top_steps", _list_of(pa.uint16())),
        pa.field("top_logprobs", _LOGPROBS),
        pa.field("tail_logprob", _LOGPROBS),
        pa.field("reward", pa.float64()),
        # A list of structs rather than a map, which the `datasets` library cannot read.
        pa.field("rewards", pa.list_(pa.struct([("name", pa.string()), ("value", pa.float64())]))),
        pa.field("correct", pa.bool_()),
        pa.field("finish_reason", pa.string()),
    ]
)
_DRAW_FIELDS = (("draw_count", _list_of(pa.uint8())), ("draw_ids", _IDS), ("draw_logprobs", _LOGPROBS))
ARROW_SCHEMAS: Final = {1: ARROW_SCHEMA, 2: pa.schema([*ARROW_SCHEMA, *(pa.field(*each) for each in _DRAW_FIELDS)])}
COLUMNS = tuple(ARROW_SCHEMAS[2].names)
LIGHT_COLUMNS = tuple(
    name for name in COLUMNS if name not in (*DISTRIBUTION_COLUMNS, *DRAW_COLUMNS) and name != "logprob"
)
"""The columns without a value a position; filters read these."""

Fingerprint = str


class Metadata(pydantic.BaseModel):
    """The metadata of a folder of traces.

    All fields but `dtype`, `versions` and `prompt` are identity: rows that differ in one never share a folder.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    schema_version: Literal[1, 2] = 1
    """2 if and only if there are draws from the tail."""
    model: str
    """The teacher as the recipe names it: a hub id, a folder, a stage."""
    source: str = ""
    """The origin of traces that the model scored but did not write. Empty: the model wrote them."""
    weights: Fingerprint
    tokenizer: Fingerprint
    chat_template: Fingerprint
    vocab_size: int = Field(gt=0, le=2**32)
    """The tokenizer's length: every stored id is below it."""
    task: str
    task_fingerprint: Fingerprint
    template: str
    sampling: Sampling
    logprob_mode: Literal["raw"] = "raw"
    """raw: log-probabilities of the model's own distribution, before temperature and top-p."""
    logprob_temperature: float = 1.0
    shift: Literal[0] = 0
    """Row t of the distribution is over token t of the completion (no shift)."""
    exact: bool = False
    """Whether entries are the engine's float32 log-probabilities instead of quantised steps."""
    steps_per_nat: Literal[32] = STEPS_PER_NAT
    """The unit of `top_steps`."""
    top_k: int = Field(ge=0)
    """The largest number of entries a position; 0: no distribution was captured."""
    mass: float = Field(gt=0, le=1)
    tail_draws: int = Field(0, ge=0, le=MAX_DRAWS)
    """The largest number of draws from the tail a position; 0: none were captured."""
    positions: str = ""
    """The function (`weights.fn`) that chose the positions whose distributions are stored. Empty: all positions."""
    position_share: float = Field(1.0, gt=0, le=1)
    """The share of each completion's positions that it chose, rounded up; the others have `top_count` 0 and `tail_logprob` 0."""
    engine: str
    dtype: str = ""
    """The engine's dtype; recorded, never compared. Empty: not recorded."""
    versions: dict[str, str] = {}
    """Versions of the packages that wrote the traces; recorded, never compared."""
    prompt: PromptRecord | None = None
    """The prompt that the traces were sampled under; compared where both sides record it. None: not recorded."""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _version_of_draws(cls, tree: Any) -> Any:
        """Fill in the schema's version where none is given."""
        if isinstance(tree, dict) and "schema_version" not in tree and tree.get("tail_draws"):
            return {**tree, "schema_version": 2}
        return tree

    @pydantic.model_validator(mode="after")
    def _draws_in_schema_2(self) -> Metadata:
        if (self.schema_version == 2) != (self.tail_draws > 0):
            raise ValueError(
                f"schema_version {self.schema_version} with tail_draws {self.tail_draws}: draws are what schema 2 adds"
            )
        return self

    @property
    def arrow_schema(self) -> pa.Schema:
        """The columns of these traces."""
        return ARROW_SCHEMAS[self.schema_version]

    def identity(self) -> dict[str, Any]:
        """Return the fields that must be equal for rows to share a folder, flat: dotted key -> value."""
        return {
            key: value
            for key, value in _flat(self.model_dump())
            if key.partition(".")[0] not in ("dtype", "versions", "prompt")
        }

    def differences(self, other: Metadata) -> list[str]:
        """Return one line for every identity key in which the two differ."""
        mine, theirs = self.identity(), other.identity()
        found = [f"{key}: {mine[key]!r} != {theirs[key]!r}" for key in mine if mine[key] != theirs[key]]
        if self.prompt is not None and other.prompt is not None:
            here, there = self.prompt.model_dump(exclude={"rendered"}), other.prompt.model_dump(exclude={"rendered"})
            found += [f"prompt.{key}: {here[key]!r} != {there[key]!r}" for key in here if here[key] != there[key]]
        return found

    def to_json(self) -> str:
        """Return the metadata as JSON, without the keys that belong to other traces."""
        return self.model_dump_json(exclude=self._absent)

    def tree(self) -> dict[str, Any]:
        """Return the metadata as a tree, as a manifest holds it."""
        return self.model_dump(exclude=self._absent)

    @property
    def _absent(self) -> set[str]:
        """Keys of other traces: of draws from the tail, of a prompt, and of distributions at a share of the positions."""
        draws = {"tail_draws"} if self.schema_version == 1 else set()
        draws |= {"prompt"} if self.prompt is None else set()
        return draws | ({"positions", "position_share"} if self.position_share == 1 else set())

    @staticmethod
    def parse(text: str | bytes | Mapping[str, Any], where: str) -> Metadata:
        """Parse and check metadata from JSON (or its tree).

        Raises UserError, which names `where` and, for another schema version, both versions.
        """
        try:
            tree = json.loads(text) if isinstance(text, str | bytes) else dict(text)
        except ValueError as error:
            raise DataError(f"{where}: its metadata is not JSON: {error}.") from None
        version = tree.get("schema_version") if isinstance(tree, dict) else None
        if version not in SCHEMA_VERSIONS:
            raise DataError(
                f"{where}: trace schema version {version!r}; this version of distill reads versions 1 and 2. "
                "Read it with the distill that wrote it, or generate the traces again."
            )
        try:
            return Metadata.model_validate(tree)
        except pydantic.ValidationError as error:
            raise DataError(plug.explain(error, where, Metadata.model_fields)) from None


def _flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in tree.items():
        if isinstance(value, Mapping):
            pairs += _flat(value, f"{prefix}{key}.")
        else:
            pairs.append((prefix + key, value))
    return pairs


def metadata_of(schema: Any, where: str) -> Metadata:
    """Return the metadata in an Arrow schema. Raises UserError if the file is not a trace shard."""
    text = (schema.metadata or {}).get(METADATA_KEY)
    if text is None:
        raise DataError(f"{where}: not a trace shard: it carries no distill metadata.")
    metadata = Metadata.parse(text, where)
    if not schema.remove_metadata().equals(metadata.arrow_schema):
        raise DataError(f"{where}: its columns are not those of trace schema {metadata.schema_version}.")
    return metadata
