"""Whether each stage of a recipe fits on named GPUs, by parts, and which changes would make it fit.

In: a recipe and `Cards`. Out: a `Verdict` for every row of the plan. The recipe is costed as it is written: a stage without
`distributed` runs on one GPU, and the others count in the remedies only. A remedy is a change of the stage's own fields;
each is predicted anew, and only those that fit are named.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distill.compute.cards import GIB, Cards
from distill.compute.shared_gpu import USABLE
from distill.machine import Machine
from distill.recipe import OptimStage, PolicyStage, Recipe, TrainStage
from distill.records import UserError
from distill.run import plan
from distill.run.advice import short_list
from distill.run.known_sizes import has_known_sizes
from distill.run.predictions.row import ENGINE_SHARE, Row

LEAST_MICRO_TOKENS = 512
MOST_NODES = 16
LORA_RANK = 16


@dataclass(frozen=True, slots=True)
class Remedy:
    """A change of a stage that makes it fit. need: bytes on one GPU. changes: fields of the stage."""

    words: str
    need: float
    changes: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a row of the plan fits on one GPU for each of its processes. need: bytes on each.

    cache: bytes of the key-value cache that fit, where vLLM chooses its size. asleep: bytes that are there while the model trains
    and its engine sleeps; 0 if it never does. problem: why it does not fit; "" if it does.
    """

    row: Row
    need: float
    problem: str = ""
    remedies: tuple[Remedy, ...] = ()
    cache: float = 0.0
    asleep: float = 0.0

    @property
    def fits(self) -> bool:
        return not self.problem


def verdicts(recipe: Recipe, cards: Cards) -> list[Verdict]:
    """Return a verdict on every stage, inputs first. Raises UserError for a model whose size is not known at all."""
    for name, model in recipe.models.items():
        if not has_known_sizes(model):
            raise UserError(
                f"models.{name}: the sizes of {model.source!r} are not known here, so nothing can be said about a GPU's memory. Set "
                f"models.{name}.config to the path of its config.json, to its keys and values, or to the name of a known model "
                f"of the same sizes, such as Qwen2.5-7B; or set models.{name}.params to its number of parameters."
            )
    machine = cards.machine(plan.widths(recipe))
    return [_verdict(each, row, cards, machine) for each in plan.planned(recipe, machine) for row in each.rows]


def _verdict(stage: plan.Planned, row: Row, cards: Cards, machine: Machine) -> Verdict:
    if isinstance(stage.config, OptimStage) and stage.config.parallel.processes > cards.count:
        processes = stage.config.parallel.processes
        return Verdict(row, row.memory.total, f"distributed.processes is {processes}, and there are {cards.count} GPUs")
    engine = row.engine
    if engine is not None and engine.ray == "local" and row.processes > cards.count:
        return Verdict(
            row,
            row.memory.total,
            f"the replicas and the trainer need {row.processes} GPUs, and there are {cards.count}: lower engine.replicas or engine.tensor_parallel",
        )
    if row.engine is not None and row.engine.tensor_parallel > cards.count:
        parts = row.engine.tensor_parallel
        return Verdict(row, row.memory.total, f"engine.tensor_parallel is {parts}, and there are {cards.count} GPUs")
    taken = _taken(row, cards)
    if not taken.short:
        return Verdict(row, taken.need, cache=taken.cache, asleep=taken.asleep)
    why = f"{_gib(taken.need)} on a GPU{taken.when}, {_gib(cards.memory)} there"
    if taken.when == IN_SHARE:
        why = f"engine.memory_share {row.engine.memory_share:g} is {_gib(taken.short)} too small for its engine"  # type: ignore[union-attr]
    return Verdict(row, taken.need, why, tuple(_remedies(stage, row, cards, machine)), taken.cache)


@dataclass(frozen=True, slots=True)
class _Taken:
    """What a row takes of a GPU. need: bytes, at its peak; cache: of the key-value caches among them; short: missing bytes."""

    need: float
    cache: float
    short: float = 0.0
    when: str = ""
    asleep: float = 0.0


IN_SHARE = " in the engine's share"


def _taken(row: Row, cards: Cards) -> _Taken:
    """Return what a row takes. A cache without a size in the recipe gets what is left, at least one sequence's."""
    shared = row.shared(cards.memory)
    if shared is None:
        rest, cache = row.memory.total - row.memory.cache, row.memory.cache
        share = None if row.engine is None else row.engine.memory_share
        usable = ((share or ENGINE_SHARE) if row.sequence_cache else USABLE) * cards.memory
        if row.sequence_cache:
            cache = max(min(cache, usable - rest), row.sequence_cache)
        return _Taken(rest + cache, cache, max(0.0, rest + cache - usable))
    assert row.beside is not None
    assert row.engine is not None
    training, own = row.beside
    engine = shared.engine
    if row.sequence_cache and row.engine.memory_share is None:
        engine = min(engine, own.engine + own.logits + own.cache)
    cache = engine - own.engine - own.logits if row.sequence_cache else own.cache
    when = f" {shared.when}" if shared.when else ""
    return _Taken(shared.peak(engine), max(cache, 0.0) + training.cache, shared.short, when, shared.asleep)


# ----------------------------------------------------------------------------------------------- remedies


def _remedies(stage: plan.Planned, row: Row, cards: Cards, machine: Machine) -> list[Remedy]:
    """Return the changes that make a stage fit: single ones or, if none does, the smallest combinations."""
    config = stage.config
    if not isinstance(config, OptimStage):
        return []
    groups = list(_changes(config, cards))
    for size in range(1, len(groups) + 1):
        found = []
        for chosen in itertools.combinations(groups, size):
            fitting = (_tried(stage, row, each, cards, machine) for each in itertools.product(*chosen))
            if first := next((remedy for remedy in fitting if remedy is not None), None):
                found.append(first)
        if found:
            return found
    return []


Change = tuple[str, Mapping[str, Any]]


def _changes(config: OptimStage, cards: Cards) -> Iterable[list[Change]]:
    """Yield the possible changes of a stage by kind, each kind from the mildest on."""
    if config.lora is None:
        yield [("lora", {"lora": {"rank": LORA_RANK}})]
    elif config.lora.quantised is None and isinstance(config, TrainStage) and config.parallel.strategy == "ddp":
        yield [("lora.quantised nf4", {"lora": {"quantised": "nf4"}})]
    quantised = config.lora is not None and config.lora.quantised is not None
    if not quantised and (sharded := list(_sharded(config, cards))):
        yield sharded
    if isinstance(config, PolicyStage) and not config.engine.sleep and config.engine.ray is None:
        yield [("engine.sleep", {"engine": {"sleep": True}})]
    if not config.gradient_checkpointing:
        yield [("gradient_checkpointing", {"gradient_checkpointing": True})]
    halves = [config.micro_tokens >> n for n in range(1, 20)]
    if smaller := [n for n in halves if n >= LEAST_MICRO_TOKENS]:
        yield [(f"micro_tokens {n}", {"micro_tokens": n}) for n in smaller]


def _sharded(config: OptimStage, cards: Cards) -> Iterable[Change]:
    """Yield shardings over more GPUs: those named, or 2, 4 and 8 if one is named; then over several such nodes; then with
    the shards in main memory."""
    now = config.parallel
    counts = [cards.count] if cards.count > 1 else [2, 4, 8]
    worlds = [(count, 1) for count in counts]
    worlds += [(counts[-1], 2**n) for n in range(1, int(math.log2(MOST_NODES)) + 1)]
    for processes, nodes in worlds:
        if now.strategy == "fsdp2" and processes * nodes <= now.world_size:
            continue
        nodes_of = {"nodes": nodes, "rendezvous": "node0:29500"} if nodes > 1 else {}
        where = f"{processes * nodes}" + (f" ({nodes} nodes)" if nodes > 1 else "")
        yield f"fsdp2 over {where}", {"distributed": {"processes": processes, "strategy": "fsdp2", **nodes_of}}
    if not now.offload:
        processes = counts[-1]
        changes = {"processes": processes, "strategy": "fsdp2", "offload": True}
        yield f"fsdp2 over {processes} with offload", {"distributed": changes}


def _tried(stage: plan.Planned, row: Row, chosen: Sequence[Change], cards: Cards, machine: Machine) -> Remedy | None:
    """Predict a stage with some changes; None if it does not fit then, or the changes exclude each other."""
    changes: dict[str, Any] = {key: value for _, each in chosen for key, value in each.items()}
    try:
        rows = stage.with_changes(changes, machine)
    except ValueError:  # pydantic: for example a quantised base cannot be sharded
        return None
    changed = next(each for each in rows if each.name == row.name)
    taken = _taken(changed, cards)
    return None if taken.short else Remedy(" with ".join(word for word, _ in chosen), taken.need, changes)


# -------------------------------------------------------------------------------------------------- words


def lines(found: Sequence[Verdict]) -> list[str]:
    """Return a line for each problem and each engine with a smaller cache than its requests could use; stages with the same
    words share a line."""
    said: dict[str, list[str]] = {}
    for verdict in found:
        row = verdict.row
        if verdict.problem:
            words = f"does not fit: {verdict.problem}{_remedy_words(verdict.remedies)}"
            said.setdefault(words, []).append(row.name)
        elif row.sequence_cache and verdict.cache < row.memory.cache:
            others = 0.0 if row.beside is None else row.beside[0].cache
            cache = verdict.cache - others
            words = (
                f"fits with a key-value cache of {_gib(cache)}: about "
                f"{int(cache / row.sequence_cache)} completions of full length at a time, not "
                f"{round((row.memory.cache - others) / row.sequence_cache)}; the others wait"
            )
            said.setdefault(words, []).append(row.name)
        if verdict.asleep:
            words = f"holds {_gib(verdict.asleep)} of a GPU while the model trains and its engine sleeps"
            said.setdefault(words, []).append(row.name)
        if row.memory.offloaded:
            words = f"holds {_gib(row.memory.offloaded)} for each process in main memory"
            said.setdefault(words, []).append(row.name)
    return [f"{short_list(names)}: {words}" for words, names in said.items()]


def _remedy_words(remedies: Sequence[Remedy]) -> str:
    if not remedies:
        return "; a smaller model or a GPU with more memory would"
    named = [f"{remedy.words} ({_gib(remedy.need)})" for remedy in remedies]
    last = f"{', '.join(named[:-1])} or {named[-1]}" if len(named) > 1 else named[0]
    return f"; {last} would"


def _gib(size: float) -> str:
    return f"{size / GIB:.0f} GiB" if size >= 10 * GIB else f"{size / GIB:.1f} GiB"
