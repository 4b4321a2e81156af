"""What a recipe will cost, before anything heavy loads: tokens, bytes, FLOPs, memory and seconds, stage by stage.

Lengths are guessed from a few of the task's own problems and from the texts the models learn from; the rest are counts and
`reports.estimate`. What cannot be looked up (a hub model without a network) is reported as unverified.
"""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from distill import gguf, jsonl, plug
from distill.models import PACKAGE, config_of, package_file
from distill.recipe import (
    CompareStage,
    EvalStage,
    FilterStage,
    GenerateStage,
    GrpoStage,
    ModelConfig,
    OnPolicyStage,
    PolicyStage,
    PruneStage,
    Recipe,
    ScoreStage,
    TrainStage,
    data_of,
    order,
    teachers_of,
)
from distill.records import SHARED, Task, UserError
from distill.reports import estimate, flops
from distill.reports.flops import ModelShape
from distill.stages.context import find_data, make_task
from distill.stages.sources import is_hub_id, is_traces, open_rows

CHAT_TOKENS = 12
"""Tokens that a chat template puts around a system message and a question."""
KEPT_BY_CORRECT = 0.7
"""Guess at the share of traces that a `correct` filter keeps."""
ENTRIES = 1.2
"""Guess at the candidates kept a position at mass .98, for a teacher that is mostly sure."""
SAMPLE = 16
ASSUMED_ROWS = (1000.0, 200.0, 2000.0)
"""Traces, and tokens of a prompt and a reply, of a hub dataset that is not looked up."""


@dataclass(frozen=True, slots=True)
class Row:
    """The prediction for one node. amounts: tokens, bytes, flops, memory (peak bytes), seconds."""

    name: str
    kind: str
    amounts: dict[str, float]
    notes: tuple[str, ...] = ()


@dataclass(slots=True)
class _Known:
    """What is known of the recipe's models, data and tasks while its stages are gone through in order."""

    recipe: Recipe
    shapes: dict[str, ModelShape] = field(default_factory=dict)
    replies: dict[str, float] = field(default_factory=dict)
    traces: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    tasks: dict[str, tuple[Task, float]] = field(default_factory=dict)
    spent: dict[str, float] = field(default_factory=dict)
    points: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def budget(self, config: TrainStage | PolicyStage) -> float:
        """The FLOPs that a stage's budget leaves it (see stages.budget)."""
        assert config.budget is not None, "a length is given in steps, epochs or by a budget"
        allowed = config.budget.times * self.spent[config.budget.flops_of]
        return max(allowed - self.spent.get(config.model, 0.0), 0.0)

    def task(self, name: str) -> tuple[Task, float]:
        """The task, and the mean tokens of its prompts."""
        if name not in self.tasks:
            task = make_task(name, self.recipe.tasks[name])
            self.tasks[name] = task, self._prompt_tokens(name, task)
        return self.tasks[name]

    def _prompt_tokens(self, name: str, task: Task) -> float:
        extra = count_tokens(task.template.system or "") + CHAT_TOKENS
        for split in ("train", "held_out"):
            try:
                problems = list(
                    itertools.islice(task.problems(split, SAMPLE, self.recipe.seed), SAMPLE)
                )
            except UserError as error:
                reason = str(error)
                continue
            return extra + sum(count_tokens(p.messages[-1]["content"]) for p in problems) / len(
                problems
            )
        self.notes.append(f"tasks.{name} unverified: {reason}")
        return extra + 100.0

    def shape(self, name: str) -> ModelShape:
        if name not in self.shapes:
            shape, note = model_shape(self.recipe.models[name])
            self.shapes[name] = shape
            if note:
                self.notes.append(f"models.{name} {note}")
        return self.shapes[name]


def predict(recipe: Recipe, machine: estimate.Machine | None = None) -> list[Row]:
    """One row a node, inputs first. Raises UserError for what is wrong in a way that can be told now."""
    machine = machine or estimate.calibrate()
    known = _Known(recipe)
    rows: list[Row] = []
    for name in order(recipe):
        config = recipe.stages[name]
        before = len(known.notes)
        if isinstance(config, PruneStage):
            shape = known.shape(config.model)
            if config.layers > shape.layers:
                raise UserError(
                    f"stages.{name}.layers: {config.layers} of a model that has {shape.layers}."
                )
            known.shapes[name] = shape.with_layers(config.layers)
            known.replies[name] = known.replies.get(config.model, 0.0)
            seconds = estimate.predict_prune_seconds(known.shapes[name], machine)
            amounts = _amounts(seconds=seconds, memory=2.0 * shape.params_total)
        elif isinstance(config, GenerateStage | EvalStage):
            amounts = _sampling(name, config, known, machine)
        elif isinstance(config, ScoreStage):
            amounts = _score(name, config, known, machine)
        elif isinstance(config, FilterStage):
            amounts = _filter(name, config, known)
        elif isinstance(config, TrainStage):
            amounts = _train(name, config, known, machine)
        elif isinstance(config, PolicyStage):
            amounts = _policy(name, config, known, machine)
        else:
            for arm, child in config.children().items():
                rows.append(
                    Row(f"{name}.{arm}", "eval", _sampling(f"{name}.{arm}", child, known, machine))
                )
            amounts = _amounts(seconds=estimate.LIGHT_START)
        rows.append(Row(name, config.kind, amounts, tuple(known.notes[before:])))
    return rows


def _amounts(
    tokens: float = 0.0,
    bytes: float = 0.0,
    flops: float = 0.0,
    memory: float = 0.0,
    seconds: float = 0.0,
) -> dict[str, float]:
    return {"tokens": tokens, "bytes": bytes, "flops": flops, "memory": memory, "seconds": seconds}


def _sampling(
    name: str, config: GenerateStage | EvalStage, known: _Known, machine: estimate.Machine
) -> dict[str, float]:
    shape, (_, prompt) = known.shape(config.model), known.task(config.task)
    learned = known.replies.get(config.model) or 0.6 * config.sampling.max_tokens
    reply = min(learned, config.sampling.max_tokens)
    folders = [config.problems * config.samples]
    if isinstance(config, EvalStage) and config.points:
        tried = min(config.points, config.problems) * config.samples
        folders += [tried] * known.points.get(config.model, 0)
    sequences = sum(folders)
    captured = isinstance(config, GenerateStage) and config.top_k > 0
    shard_rows = config.shard_rows if isinstance(config, GenerateStage) else 256
    known.traces[name] = (sequences, prompt, reply)
    return _amounts(
        tokens=sequences * (prompt + reply),
        bytes=sum(
            estimate.predict_trace_bytes(
                rows, rows * reply, ENTRIES if captured else 0.0, shard_rows=shard_rows
            )
            for rows in folders
        ),
        flops=flops.generate_flops(shape, sequences * prompt, sequences * reply, sequences),
        memory=flops.generate_memory(
            shape, config.engine.batch_size, int(prompt + config.sampling.max_tokens)
        ).total,
        seconds=estimate.predict_generate_seconds(
            shape,
            sequences,
            sequences * prompt,
            sequences * reply,
            machine,
            batch_size=config.engine.batch_size,
            dtype=config.engine.dtype,
            engine=config.engine.fn,
        ),
    )


def _score(
    name: str, config: ScoreStage, known: _Known, machine: estimate.Machine
) -> dict[str, float]:
    shape = known.shape(config.model)
    rows, prompt, reply = known.traces.get(config.data) or _rows_of(config, config.data, known)
    known.traces[name] = rows, prompt, reply
    tokens = rows * (prompt + reply)
    total = flops.forward_flops(shape, tokens, (prompt + reply + 1) / 2, rows * reply)
    return _amounts(
        tokens=tokens,
        bytes=estimate.predict_trace_bytes(
            int(rows), rows * reply, ENTRIES, shard_rows=config.shard_rows
        ),
        flops=total,
        memory=flops.generate_memory(shape, config.engine.batch_size, int(prompt + reply)).total,
        seconds=estimate.predict_score_seconds(
            shape, total, machine, config.engine.dtype, config.engine.fn
        ),
    )


def _points(config: TrainStage | PolicyStage, num_steps: float) -> int:
    """Models kept along the way, the end not counted."""
    return int((num_steps - 1) // config.points_every) if config.points_every else 0


def _filter(name: str, config: FilterStage, known: _Known) -> dict[str, float]:
    rows, prompt, reply = known.traces.get(config.data) or _stored(config.data)
    kept = rows * KEPT_BY_CORRECT if any(f.fn == "correct" for f in config.keep) else rows
    known.traces[name] = (kept, prompt, reply)
    return _amounts(seconds=estimate.predict_filter_seconds(int(rows)))


def _train(
    name: str, config: TrainStage, known: _Known, machine: estimate.Machine
) -> dict[str, float]:
    shape = known.shape(config.model)
    # Of several sets that hold the same traces, the one with fewest is the most there can be in common.
    rows, prompt, reply = min(
        known.traces.get(data) or _rows_of(config, data, known) for data in data_of(config.data)
    )
    steps_an_epoch = max(1, -(-int(rows) // config.batch_traces))
    prompt_trained = _prompt_trained(config, known, prompt, reply)

    def own_flops(traces: float) -> float:
        return flops.train_flops(
            shape,
            traces * (prompt_trained + reply),
            (prompt + reply + 1) / 2,
            traces * reply,
            lora=config.lora is not None,
            checkpointing=config.gradient_checkpointing,
        )

    if config.epochs is not None:
        seen, num_steps = rows * config.epochs, float(config.epochs * steps_an_epoch)
    else:
        a_step = min(config.batch_traces, rows)
        num_steps = config.steps or known.budget(config) / own_flops(a_step)
        seen = num_steps * a_step
    tokens, head_tokens = seen * (prompt_trained + reply), seen * reply
    total = own_flops(seen)
    known.spent[name] = known.spent.get(config.model, 0.0) + total
    known.points[name] = _points(config, num_steps)
    total += sum(
        flops.forward_flops(known.shape(teacher), tokens, (prompt + reply + 1) / 2, head_tokens)
        for teacher in teachers_of(config.teacher)
    )
    known.shapes[name], known.replies[name] = shape, reply
    memory = flops.train_memory(
        shape,
        int(min(config.micro_tokens, config.batch_traces * (prompt + reply))),
        dtype_bytes=2 if config.dtype == "bfloat16" else 4,
        checkpointing=config.gradient_checkpointing,
    )
    seconds = estimate.predict_train_seconds(shape, total, round(num_steps), machine, config.dtype)
    return _amounts(tokens=tokens, flops=total, memory=memory.total, seconds=seconds)


def _policy(
    name: str, config: PolicyStage, known: _Known, machine: estimate.Machine
) -> dict[str, float]:
    """Its own sampling and its training; every group is taken to have something to learn from."""
    from distill.stages.resolve import resolve_objective

    shape, (_, prompt) = known.shape(config.model), known.task(config.task)
    learned = known.replies.get(config.model) or 0.6 * config.sampling.max_tokens
    reply = min(learned, config.sampling.max_tokens)
    passes, scorings, teachers = 1, 0, []
    if isinstance(config, GrpoStage):
        passes = config.passes
        reference = resolve_objective(config, f"stages.{name}").reference
        scorings = (config.mini_batches * config.passes > 1) + reference
    elif isinstance(config, OnPolicyStage):
        teachers = [known.shape(teacher) for teacher in teachers_of(config.teacher)]
    prompt_trained = _prompt_trained(config, known, prompt, reply, config.group_size)
    context = (prompt + reply + 1) / 2

    def training_flops(sampled: float) -> float:
        tokens, heads = sampled * (prompt_trained + reply), sampled * reply
        trained = flops.train_flops(
            shape,
            passes * tokens,
            context,
            passes * heads,
            lora=config.lora is not None,
            checkpointing=config.gradient_checkpointing,
        )
        return trained + scorings * flops.forward_flops(shape, tokens, context, heads)

    def generation_flops(sampled: float) -> float:
        return flops.generate_flops(shape, sampled * prompt, sampled * reply, sampled)

    a_step = config.prompts_a_rollout * config.group_size / config.steps_a_rollout
    num_steps = config.steps or known.budget(config) / (
        training_flops(a_step) + generation_flops(a_step)
    )
    sampled = num_steps * a_step
    own = training_flops(sampled) + generation_flops(sampled)
    teaching = sum(
        flops.forward_flops(teacher, sampled * (prompt_trained + reply), context, sampled * reply)
        for teacher in teachers
    )
    known.spent[name] = known.spent.get(config.model, 0.0) + own
    known.points[name] = _points(config, num_steps)
    seconds = estimate.predict_train_seconds(
        shape, training_flops(sampled) + teaching, round(num_steps), machine, config.dtype
    ) + estimate.predict_generate_seconds(
        shape,
        round(sampled),
        sampled * prompt,
        sampled * reply,
        machine,
        batch_size=config.engine.batch_size,
        dtype=config.engine.dtype,
        engine=config.engine.fn,
    )
    memory = (
        flops.train_memory(
            shape, config.micro_tokens, checkpointing=config.gradient_checkpointing
        ).total
        + flops.generate_memory(
            shape, config.engine.batch_size, int(prompt + config.sampling.max_tokens)
        ).total
    )
    known.shapes[name], known.replies[name] = shape, reply
    return _amounts(
        tokens=sampled * (prompt + reply) + passes * sampled * (prompt_trained + reply),
        flops=own + teaching,
        memory=memory,
        seconds=seconds,
    )


def _prompt_trained(
    config: TrainStage | PolicyStage, known: _Known, prompt: float, reply: float, group: int = 1
) -> float:
    """Prompt tokens computed a trace: once a group, and what all prompts begin with next to never (`training.packing`)."""
    if prompt + reply > SHARED or config.task is None:
        return prompt
    system = known.task(config.task)[0].template.system
    frame = count_tokens(system or "") + CHAT_TOKENS / 2
    return max(prompt - frame, 1.0) / group + (group > 1)


def _rows_of(
    config: TrainStage | ScoreStage, data: str, known: _Known
) -> tuple[float, float, float]:
    """(rows, prompt tokens, reply tokens) of a file or dataset, from its first rows; of a folder of shards, exactly."""
    path = find_data(data)
    if path is None and isinstance(config, ScoreStage) and is_hub_id(data):
        known.notes.append(f"data {data!r} unverified: {ASSUMED_ROWS[0]} traces are assumed")
        return ASSUMED_ROWS
    if path is None:
        raise UserError(f"data: {data!r} does not exist (looked in {Path.cwd()}).")
    if is_traces(path) or not (isinstance(config, ScoreStage) or path.suffix == ".jsonl"):
        return _stored(data)
    source = open_rows(data, config.split if isinstance(config, ScoreStage) else "", "data")
    replies, prompts = [], []
    rejected: list[int] = []
    for _, row in itertools.islice(source.rows(lambda line, _: rejected.append(line)), 200):
        try:
            messages, reply = jsonl.conversation(row)
        except ValueError:
            continue
        prompts.append(sum(count_tokens(m["content"]) for m in messages) + CHAT_TOKENS)
        replies.append(count_tokens(reply or "") + 1)
    if not replies:
        raise UserError(f"data: {data!r} holds no usable row.")
    extra = count_tokens(known.task(config.task)[0].template.system or "") if config.task else 0
    return source.count(), extra + sum(prompts) / len(prompts), sum(replies) / len(replies)


def _stored(reference: str) -> tuple[float, float, float]:
    from distill.traces.reader import open_traces

    lengths = open_traces(Path(reference).expanduser()).lengths()
    rows = max(len(lengths.prompt), 1)
    return rows, float(lengths.prompt.sum()) / rows, float(lengths.completion.sum()) / rows


def count_tokens(text: str) -> float:
    """Roughly, without a tokenizer: a token for every digit and sign, 1.2 for a word (numbers and code are not prose)."""
    words = len(re.findall(r"[^\W\d_]+", text))
    others = len(re.findall(r"\d|[^\w\s]|_", text))
    return 1.2 * words + 0.9 * others


def model_shape(model: ModelConfig) -> tuple[ModelShape, str]:
    """A model's sizes, and a note where they are only assumed."""
    if model.source.startswith(PACKAGE):
        return _gguf_shape(package_file(model.source)[1]), ""
    folder = Path(model.source).expanduser()
    if folder.is_dir():
        return ModelShape.from_config(config_of(folder)), ""
    cached = _cached_config(model)
    if cached is not None:
        return ModelShape.from_config(cached), ""
    if model.params is None:
        return ModelShape.from_params(1e9), (
            f"unverified: {model.source!r} is not in the local cache; say its `params` for a better estimate "
            "(one billion is assumed)"
        )
    return ModelShape.from_params(
        model.params
    ), f"unverified: {model.source!r} is not in the local cache"


def _cached_config(model: ModelConfig) -> dict[str, Any] | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model.source, "config.json", revision=model.revision)
    except HFValidationError:
        raise UserError(
            f"model {model.source!r} is neither a folder nor a valid hub id (owner/name)."
        ) from None
    return json.loads(Path(found).read_text(encoding="utf-8")) if isinstance(found, str) else None


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


def check_plugs(recipe: Recipe) -> None:
    """Every loss, filter, reward and engine named in a recipe exists and takes the options given. Raises UserError."""
    from distill.stages.compare import check_start
    from distill.stages.resolve import resolve_loss, resolve_objective, resolve_rewards

    for name, config in recipe.stages.items():
        if isinstance(config, TrainStage | OnPolicyStage):
            resolve_loss(config, f"stages.{name}")
        elif isinstance(config, GrpoStage):
            resolve_objective(config, f"stages.{name}")
            resolve_rewards(config, f"stages.{name}")
        elif isinstance(config, FilterStage):
            for number, keep in enumerate(config.keep):
                plug.bind(
                    keep.fn, keep.options, "distill.traces.filters", f"stages.{name}.keep.{number}"
                )
        elif isinstance(config, CompareStage):
            check_start(config, recipe)
        if isinstance(config, PolicyStage | GenerateStage | ScoreStage | EvalStage | CompareStage):
            plug.find(config.engine.fn, "distill.engines.kinds", f"stages.{name}.engine.fn")
