"""Rollouts one ahead: the next one is sampled in a thread while the model trains on this one.

Rollout n is then written by the weights as they were before the training on rollout n - 1 (one step off-policy, as in
arXiv 2505.24298 and 2410.18252); the objectives' importance weight, policy over engine at every token, corrects for that. The
completions that are under way belong to a checkpoint, so that a resumed run goes on with the same ones.
"""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

import numpy as np
import torch

from distill import world
from distill.recipe import PolicyStage
from distill.records import Array, Completion, Engine, FinishReason, GroupSampler

if TYPE_CHECKING:
    from distill.training.policy import Policy

Made = TypeVar("Made")


class Carried(Protocol):
    """What a checkpoint holds of a source of steps besides weights and counts."""

    def held(self) -> bytes:
        """Return this process's part; waits until it is complete."""
        ...

    def restore(self, parts: Iterable[bytes]) -> None:
        """Take up the parts of all processes that wrote the checkpoint."""
        ...


@dataclass(slots=True)
class Journal:
    """The completions of the rollout that is ahead, by (rollout, attempt, problem, sample), so that they need not be sampled twice.

    held, restore: see `Carried`. A sampler asks `known` before it asks its engine, and calls `add` with every answer.
    """

    wait: Callable[[], None] = lambda: None
    completions: dict[str, Completion] = field(default_factory=dict)

    def known(self, key: str) -> Completion | None:
        return self.completions.get(key)

    def add(self, key: str, completion: Completion) -> None:
        self.completions[key] = completion

    def forget(self) -> None:
        """Drop everything: the rollout is used now."""
        self.completions = {}

    def held(self) -> bytes:
        self.wait()
        file = io.BytesIO()
        kept = list(self.completions.values())
        np.savez(
            file,
            keys=np.array(list(self.completions), np.str_),
            lengths=np.array([len(one.ids_T) for one in kept], np.int64),
            ids=_flat([one.ids_T for one in kept], np.int64),
            logp=_flat([one.logprob_T for one in kept], np.float32),
            stopped=np.array([one.finish_reason == "stop" for one in kept], bool),
            version=np.array([one.version for one in kept], np.int64),
        )
        return file.getvalue()

    def restore(self, parts: Iterable[bytes]) -> None:
        for part in parts:
            with np.load(io.BytesIO(part), allow_pickle=False) as stored:
                if not len(stored["keys"]):
                    continue
                ends = np.cumsum(stored["lengths"])[:-1]
                columns = (
                    stored["keys"].tolist(),
                    np.split(stored["ids"], ends),
                    np.split(stored["logp"], ends),
                    stored["stopped"],
                    stored["version"],
                )
                for key, ids_T, logp_T, stopped, version in zip(*columns, strict=True):
                    reason: FinishReason = "stop" if stopped else "length"
                    self.completions[key] = Completion(key, ids_T, logp_T, None, reason, int(version))


def _flat(arrays: list[Array], dtype: type) -> Array:
    return np.concatenate([np.empty(0, dtype), *(one.astype(dtype) for one in arrays)])


@dataclass(slots=True, eq=False)
class Ahead(Generic[Made]):
    """Makes rollout after rollout, one ahead of the training.

    sample(index, version): make a rollout with the weights that the engine has. engine: gets new weights between two rollouts.
    journal: of the rollout under way. last: the number of rollouts; None = not known.
    """

    sample: Callable[[int, int], Made]
    engine: Engine
    journal: Journal
    last: int | None = None
    _version: int = 0
    _pending: _Thread[Made] | None = None
    _group: object = None

    def __post_init__(self) -> None:
        self.journal.wait = self._wait
        self._group = world.second_group()

    def next(
        self, index: int, version: int, weights: Callable[[], Iterable[tuple[str, torch.Tensor]]]
    ) -> tuple[Made, int]:
        """Return rollout `index` and the version of the weights that wrote it, and begin the one after it.

        version: of the policy now; weights: its weights. The first rollout, and the first after a resumption without stored
        completions, is written by the policy as it is.
        """
        if self._pending is None:
            written = {one.version for one in self.journal.completions.values()}
            self._version = min(written, default=version)
            if not written:
                self.engine.sync(weights(), version=version)
            made = self._sampled(index)
        else:
            made = self._pending.result()
        behind = self._version
        self.journal.forget()
        if self.last is None or index + 1 < self.last:
            self.engine.sync(weights(), version=version)
            self._version = version
            self._pending = _Thread(lambda: self._sampled(index + 1))
        else:
            self._pending = None
        return made, behind

    def _sampled(self, index: int) -> Made:
        with world.using(self._group):
            return self.sample(index, self._version)

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.result()


class _Thread(Generic[Made]):
    """A function's result, computed in a thread that does not outlive the process."""

    def __init__(self, work: Callable[[], Made]) -> None:
        self._made: Made | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(work,), name="rollout-ahead", daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[], Made]) -> None:
        try:
            self._made = work()
        except BaseException as error:
            self._error = error

    def result(self) -> Made:
        """Wait for the result; raises what the function raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._made  # type: ignore[return-value]


def rollout_source(
    config: PolicyStage,
    sampler: GroupSampler,
    policy: Policy,
    journal: Journal | None,
    sample: Callable[[int, int], Made],
) -> Callable[[int], tuple[Made, dict[str, float]]]:
    """Return a function of a rollout's first step that gives the rollout and metrics of how it was made.

    sample(index, version): make a rollout with the weights that the sampler's engine has. Metrics: sync_seconds, without `ahead`;
    with it wait_seconds, which training stood still, and staleness, the optimiser steps between the weights that wrote the
    rollout and those that learn from it.
    """
    a_rollout = config.steps_a_rollout
    ahead = None
    if config.ahead:
        last = None if config.steps is None else config.steps // a_rollout
        ahead = Ahead(sample, sampler.engine, journal or Journal(), last)

    def make(first: int) -> tuple[Made, dict[str, float]]:
        began = time.perf_counter()
        if ahead is None:
            sampler.engine.sync(policy.weights(), version=first)
            seconds = time.perf_counter() - began
            return sample(first // a_rollout, first), {"sync_seconds": seconds}
        rollout, version = ahead.next(first // a_rollout, first, policy.weights)
        if first - version > config.ahead * a_rollout:
            raise RuntimeError(f"the rollout of step {first} was written at step {version}, more than one rollout ago.")
        return rollout, {"wait_seconds": time.perf_counter() - began, "staleness": float(first - version)}

    return make
