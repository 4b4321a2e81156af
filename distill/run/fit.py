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
from distill.machine import Machine
from distill.recipe import OptimStage, PolicyStage, Recipe, TrainStage
from distill.records import UserError
from distill.run import plan
from distill.run.advice import short_list
from distill.run.known_sizes import has_known_sizes
from distill.run.predictions.row import ENGINE_SHARE, Row

USABLE = 0.95
"""Share of a GPU's memory that a stage may take; the rest is lost between the allocator's blocks."""
CACHE_STEP = 0.1 * GIB
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

    cache: bytes of the key-value cache that fit, where vLLM chooses its size. problem: why it does not fit; "" if it does.
    """

    row: Row
    need: float
    problem: str = ""
    remedies: tuple[Remedy, ...] = ()
    cache: float = 0.0

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
    policy = isinstance(stage.config, PolicyStage)
    need, cache = _need(row, cards, policy)
    if need <= _usable(row, cards, policy) and policy and row.sequence_cache:
        why = f"vLLM takes {ENGINE_SHARE:.0%} of the GPU before the trainer starts, unless its cache has a size"
        return Verdict(row, need, why, (Remedy(_cache_words(cache), need, {"engine": _cache_setting(cache)}),), cache)
    if need <= _usable(row, cards, policy):
        return Verdict(row, need, cache=cache)
    why = f"{_gib(need)} on a GPU, {_gib(cards.memory)} there"
    return Verdict(row, need, why, tuple(_remedies(stage, row, cards, machine)), cache)


def _usable(row: Row, cards: Cards, policy: bool) -> float:
    return (ENGINE_SHARE if row.sequence_cache and not policy else USABLE) * cards.memory


def _need(row: Row, cards: Cards, policy: bool) -> tuple[float, float]:
    """Return (bytes that a row needs on a GPU, bytes of its key-value cache among them).

    A cache without a size in the recipe gets what is left, at least one sequence's.
    """
    rest, cache = row.memory.total - row.memory.cache, row.memory.cache
    if row.sequence_cache:
        left, least = _usable(row, cards, policy) - rest, row.sequence_cache
        if policy:  # in the steps in which a recipe writes it
            cache, least = (math.ceil(size / CACHE_STEP) * CACHE_STEP for size in (cache, least))
            left = math.floor(left / CACHE_STEP) * CACHE_STEP
        cache = max(min(cache, left), least)
    return rest + cache, cache


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
    policy = isinstance(stage.config, PolicyStage)
    need, cache = _need(changed, cards, policy)
    if need > _usable(changed, cards, policy):
        return None
    words = [word for word, _ in chosen]
    if policy and changed.sequence_cache:
        words.append(_cache_words(cache))
        changes["engine"] = _cache_setting(cache)
    return Remedy(" with ".join(words), need, changes)


def _cache_setting(cache: float) -> dict[str, Any]:
    return {"kv_cache_gib": round(cache / GIB, 1)}


def _cache_words(cache: float) -> str:
    return f"engine.kv_cache_gib {_cache_setting(cache)['kv_cache_gib']:g}"


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
            words = (
                f"fits with a key-value cache of {_gib(verdict.cache)}: about "
                f"{int(verdict.cache / row.sequence_cache)} completions of full length at a time, not "
                f"{round(row.memory.cache / row.sequence_cache)}; the others wait"
            )
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
