"""Sizes of a recipe's models, data and tasks before the run; lengths are estimated from a few examples.

No model is loaded. A size that cannot be looked up (of a hub model without a network) is assumed and noted as unverified.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from distill.compute.flops import ModelShape
from distill.conversations import Reader
from distill.models import PACKAGE, architectures, check_folder, config_of, gguf, hub, package_file
from distill.plug import nearest
from distill.recipe import (
    ModelConfig,
    PolicyStage,
    Recipe,
    RewardConfig,
    RowsConfig,
    StageConfig,
    TrainStage,
    WeightsConfig,
)
from distill.recipe.paths import RULE
from distill.records import Task, UserError
from distill.stages.context import find_data, make_task
from distill.stages.inputs.conversation_data import DroppedRows, conversations, is_hub_id, nothing_found, open_rows
from distill.stages.inputs.score_inputs import is_traces

CHAT_TOKENS = 12
"""Tokens that a chat template adds to a system message and a question."""
SAMPLE = 16
"""Problems from which the prompt length of a task is estimated."""
ASSUMED_ROWS = (1000.0, 200.0, 2000.0)
"""Assumed size of a hub dataset: traces, prompt tokens and reply tokens; it is not downloaded to find out."""


@dataclass(slots=True)
class Known:
    """Sizes of the recipe's models, data and tasks, filled in stage by stage, inputs first.

    By name: shapes of models; replies: mean reply tokens that a model learned; traces: (number, prompt tokens, reply
    tokens); held: the positions of a set of traces that have a distribution, where not all have; tasks_of: the task of a set of traces; tasks: (task, mean prompt tokens); spent: FLOPs of the whole training of a
    model; snapshots: number of snapshots.
    """

    recipe: Recipe
    shapes: dict[str, ModelShape] = field(default_factory=dict)
    replies: dict[str, float] = field(default_factory=dict)
    traces: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    held: dict[str, WeightsConfig] = field(default_factory=dict)
    tasks_of: dict[str, str] = field(default_factory=dict)
    tasks: dict[str, tuple[Task, float]] = field(default_factory=dict)
    spent: dict[str, float] = field(default_factory=dict)
    snapshots: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def copy(self) -> Known:
        """A copy that can be filled in further on its own."""
        held = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "recipe"}
        return Known(self.recipe, **{name: value.copy() for name, value in held.items()})

    def assume(self, name: str, config: StageConfig) -> None:
        """Fill in the output of a stage that has no prediction: the size of its input, or an assumed size."""
        model, data = (next(iter(config.reads(sort)), "") for sort in ("model", "data"))
        if config.writes == "model":
            self.shapes[name] = self.shape(model) if model else ModelShape.from_params(1e9)
            self.replies[name] = self.replies.get(model, 0.0)
            self.spent[name] = self.spent.get(model, 0.0)
        elif config.writes == "traces":
            self.traces[name] = self.traces.get(data, ASSUMED_ROWS)

    def budget(self, config: TrainStage | PolicyStage) -> float:
        """The FLOPs that a stage may spend under its budget (see stages.budget)."""
        assert config.budget is not None, "the config has steps, epochs or a budget"
        allowed = config.budget.times * self.spent[config.budget.flops_of]
        return max(allowed - self.spent.get(config.model, 0.0), 0.0)

    def task(self, name: str) -> tuple[Task, float]:
        """A task, and the mean number of tokens of its prompts."""
        if name not in self.tasks:
            task = make_task(name, self.recipe.tasks[name])
            self.tasks[name] = task, self._prompt_tokens(name, task)
        return self.tasks[name]

    def frame(self, data: str, task: str | None) -> float:
        """Tokens at the start that all prompts of a data set share: the task's system message and half of the chat
        template's tokens."""
        name = task or self.tasks_of.get(data)
        if name is None:
            return 0.0
        return count_tokens(self.task(name)[0].template.system or "") + CHAT_TOKENS / 2

    def _prompt_tokens(self, name: str, task: Task) -> float:
        form = task.template.question.replace("{question}", "")
        extra = count_tokens(task.template.system or "") + count_tokens(form) + CHAT_TOKENS
        for split in ("train", "held_out"):
            try:
                problems = list(itertools.islice(task.problems(split, SAMPLE, self.recipe.seed), SAMPLE))
            except UserError as error:
                reason = str(error)
                continue
            return extra + sum(count_tokens(p.messages[-1]["content"]) for p in problems) / len(problems)
        self.notes.append(f"tasks.{name} unverified: {reason}")
        return extra + 100.0

    def shape(self, name: str) -> ModelShape:
        if name not in self.shapes:
            shape, note = model_shape(self.recipe.models[name])
            self.shapes[name] = shape
            if note:
                self.notes.append(f"models.{name} {note}")
        return self.shapes[name]


def rows_of(data: str, config: RowsConfig, known: Known) -> tuple[float, float, float]:
    """Return (rows, mean prompt tokens, mean reply tokens) of a data set, estimated from its first rows; exact for a
    folder of shards."""
    path = find_data(data)
    if path is None and is_hub_id(data):
        rows, *lengths = ASSUMED_ROWS
        rows = config.max_rows or rows
        known.notes.append(f"data {data!r} unverified: assumed to have {rows:g} traces")
        return rows, lengths[0], lengths[1]
    if path is None:
        raise UserError(f"data: {data!r} does not exist. {RULE} ({Path.cwd()}).")
    if is_traces(path):
        return stored(data)
    table, left_out = open_rows(data, config, "data"), DroppedRows()
    reader = Reader(config.fields, config.keep_wrong)
    every = getattr(config, "turns", "last")
    replies, prompts = [], []
    for given in itertools.islice(conversations(table, reader, left_out), 200):
        for messages, reply in given.replies(every):
            prompts.append(sum(count_tokens(m["content"]) for m in messages) + CHAT_TOKENS)
            replies.append(count_tokens(f"{reply.get('reasoning_content', '')} {reply['content']}") + 1)
    if not replies:
        why = nothing_found(table, left_out) or (
            f"Its rows are read as {reader.layout!r} and hold no reply: generate traces for a task of them, or name the column of "
            "replies by fields: {question: …, reply: …}."
        )
        raise UserError(f"data: {data!r} holds nothing to learn from. {why}")
    known.notes.append(_seen(data, reader, left_out))
    task = getattr(config, "task", None)
    extra = count_tokens(known.task(task)[0].template.system or "") if task else 0
    count = sum(1 for _ in table.rows(lambda number, reason: None))
    return count, extra + sum(prompts) / len(prompts), sum(replies) / len(replies)


def _seen(data: str, reader: Reader, left_out: DroppedRows) -> str:
    """Describe how a data set's first rows are read, and which of them are left out."""
    lost = sum(left_out.reasons.values())
    first = f" ({left_out.first[0]})" if left_out.first else ""
    return f"data {data!r}: rows read as {reader.layout}" + (
        f"; {lost} of the first rows left out{first}" if lost else ""
    )


def stored(reference: str) -> tuple[float, float, float]:
    """(rows, mean prompt tokens, mean reply tokens) of a folder of shards."""
    from distill.traces.reader import open_traces

    lengths = open_traces(Path(reference).expanduser()).lengths()
    rows = max(len(lengths.prompt), 1)
    return rows, float(lengths.prompt.sum()) / rows, float(lengths.completion.sum()) / rows


def count_tokens(text: str) -> float:
    """Estimated number of tokens of a text: 1.2 for each word, 0.9 for each digit and sign."""
    words = len(re.findall(r"[^\W\d_]+", text))
    others = len(re.findall(r"\d|[^\w\s]|_", text))
    return 1.2 * words + 0.9 * others


def model_shape(model: ModelConfig) -> tuple[ModelShape, str]:
    """The sizes of a model, and a note if they were not read from the model itself ("" otherwise)."""
    shape, note = _exact_shape(model)
    if shape is not None:
        return shape, note
    where = note or "it is neither in the local cache, nor a known model, nor can the hub be reached"
    ways = "set `config` to the path of its config.json, to its keys and values, or to the name of a known model such as Qwen2.5-7B"
    if model.params is None:
        return ModelShape.from_params(1e9), (
            f"unverified: {model.source!r}: {where}; so one billion parameters are assumed; {ways}"
        )
    return ModelShape.from_params(model.params), (
        f"unverified: {model.source!r}: {where}; of its {model.params:.3g} parameters a "
        f"typical shape without grouped heads is assumed, so its key-value cache may be several times smaller; {ways}"
    )


def reward_bytes(rewards: Sequence[RewardConfig]) -> float:
    """Bytes of the weights of the reward models among some rewards; a model that is not known has an assumed size."""
    paths = [str(one.options.get("path")) for one in rewards if one.fn == "model"]
    return sum(2.0 * model_shape(ModelConfig(source=path))[0].params_total for path in paths)


def has_known_sizes(model: ModelConfig) -> bool:
    """Whether a model's sizes can be looked up, here or in the table of known models, or are at least counted."""
    return model.params is not None or _exact_shape(model)[0] is not None


def _exact_shape(model: ModelConfig) -> tuple[ModelShape | None, str]:
    """The sizes from the model, the recipe's `config`, the cache, the table of known models, or the hub; None if there are none."""
    if model.source.startswith(PACKAGE):
        return _gguf_shape(package_file(model.source)[1]), ""
    folder = Path(model.source).expanduser()
    if folder.is_dir():
        check_folder(folder)
        return ModelShape.from_config(config_of(folder)), ""
    if model.config is not None:
        return ModelShape.from_config(_given_config(model.config)), "sizes as the recipe's `config` says"
    cached = _cached_config(model)
    if cached is not None:
        return ModelShape.from_config(cached), ""
    if (known := architectures.known_config(model.source)) is not None:
        return ModelShape.from_config(known[1]), f"sizes of {known[0]}, from the table of known models"
    fetched, refusal = hub.model_config(model.source, model.revision)
    return (None, refusal) if fetched is None else (ModelShape.from_config(fetched), "")


def _given_config(config: str | dict[str, Any]) -> Mapping[str, Any]:
    """The recipe's `config` of a model as a mapping. Raises UserError if it names nothing."""
    if not isinstance(config, str):
        return config
    path = Path(config).expanduser()
    path = path / "config.json" if path.is_dir() else path
    if path.is_file():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, UnicodeDecodeError):
            found = None
        if not isinstance(found, dict):
            raise UserError(f"models: config {config!r} is not a config.json.")
        return found
    if (known := architectures.known_config(config)) is not None:
        return known[1]
    raise UserError(
        f"models: config {config!r} is neither a file nor a known model.{nearest(config, architectures.names())}"
    )


def _cached_config(model: ModelConfig) -> dict[str, Any] | None:
    found = hub.cached_folder(model.source, model.revision)
    return None if found is None else json.loads((found / "config.json").read_text(encoding="utf-8"))


def _gguf_shape(path: Path) -> ModelShape:
    values, tensors = gguf.header(path)
    architecture = values["general.architecture"]

    def size(key: str) -> int | None:
        return values.get(f"{architecture}.{key}")

    vocab = size("vocab_size") or values["tokenizer.ggml.tokens"]
    shape = ModelShape.from_config(
        {
            "num_hidden_layers": size("block_count"),
            "hidden_size": size("embedding_length"),
            "intermediate_size": size("feed_forward_length"),
            "num_attention_heads": size("attention.head_count"),
            "num_key_value_heads": size("attention.head_count_kv"),
            "vocab_size": vocab,
            "model_type": architecture,
        }
    )
    return replace(shape, tied="output.weight" not in tensors)
