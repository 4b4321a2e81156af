"""A Ray actor with an engine, and what it is told: how to start, which run it works on, and new weights."""

from __future__ import annotations

import os
import socket
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distill import engines, world
from distill.engines.fleet import Feed
from distill.engines.weight_parts import parts
from distill.recipe import EngineConfig
from distill.records import Completion, Request, Sampling, UserError

if TYPE_CHECKING:
    import torch

SLICE = 0.05
"""Seconds after which a call to an actor returns the completions that are finished, once there is one."""
Weights = tuple[list[Any], int]
"""References to the parts of the weights in the object store, and their version."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What an engine says of itself. pid, host: of its actor."""

    vocab_size: int
    max_model_len: int
    note: str
    pid: int
    host: str


@dataclass(frozen=True, slots=True)
class Start:
    """How an actor starts its engine. paths: of Python modules, such as a recipe's own. variables: of the environment."""

    config: EngineConfig
    model_dir: str
    max_model_len: int
    max_top_k: int
    seed: int
    paths: tuple[str, ...]
    variables: dict[str, str]


@dataclass(frozen=True, slots=True)
class Run:
    """One call of `generate` or `score`, as the actors know it."""

    number: int
    method: str
    sampling: Sampling | None
    top_k: int


class Replica:
    """An actor: an engine, and the run that it works on. Its methods are called one after the other."""

    def __init__(self) -> None:
        self.engine: Any = None
        self._run: Run | None = None
        self._feed: Feed[Request] = Feed()
        self._answers: Iterator[Completion] | None = None

    def start(self, start: Start) -> None:
        """Open the engine."""
        for name in world.ENVIRONMENT:  # a trainer's: this process is none of its ranks
            os.environ.pop(name, None)
        os.environ.update(start.variables)
        sys.path.extend(path for path in start.paths if path not in sys.path)
        folder = Path(start.model_dir)
        if not folder.is_dir():
            raise UserError(
                f"engine.ray: {folder} is not on the machine {socket.gethostname()}: the machines of the cluster need the "
                "run's folder and the models' cache at the same paths (a shared file system)."
            )
        self.engine = engines.open_engine(
            start.config, folder, max_model_len=start.max_model_len, max_top_k=start.max_top_k, seed=start.seed
        )

    def facts(self) -> Facts:
        engine = self.engine
        note = getattr(engine, "note", "")
        return Facts(engine.vocab_size, engine.max_model_len, note, os.getpid(), socket.gethostname())

    def work(self, run: Run, requests: list[Request]) -> list[tuple[int, Completion]]:
        """Take further requests of a run and return answers that are there; the request ids are numbers."""
        if self._run != run:
            self._end_run()
            self._run = run
        self._feed.extend(map(_writable, requests))
        began = time.monotonic()
        found: list[tuple[int, Completion]] = []
        while not found or time.monotonic() - began < SLICE:
            if self._answers is None:
                if not self._feed:
                    break
                self._answers = self._begin(run)
            answer = next(self._answers, None)
            if answer is None:
                self._answers = None
            else:
                found.append((int(answer.request_id), answer))
        return found

    def _begin(self, run: Run) -> Iterator[Completion]:
        if run.method == "score":
            return iter(self.engine.score(self._feed, top_k=run.top_k))
        return iter(self.engine.generate(self._feed, run.sampling, top_k=run.top_k))

    def _end_run(self) -> None:
        """Drop what is left of a run that was abandoned."""
        if self._answers is not None and hasattr(self._answers, "close"):
            self._answers.close()
        self._answers, self._feed = None, Feed()

    def transfer(self, call: str, given: Any) -> None:
        """Make one call of vLLM's weight transfer in every process of the engine."""
        self._end_run()
        self.engine.transfer(call, given)

    def transferred(self, version: int) -> int:
        """Count the weights that were transferred as this version."""
        self.engine.transferred(version)
        return version

    def sync(self, weights: Weights) -> int:
        """Take new weights; return their version."""
        self._end_run()
        references, version = weights
        self.engine.sync(_unpacked(references), version)
        return version


def _writable(request: Request) -> Request:
    """Return a request with arrays of its own: those that Ray hands over lie in its object store, and are read-only."""
    given = request.completion_ids
    return replace(
        request,
        prompt_ids=np.array(request.prompt_ids),
        completion_ids=None if given is None else np.array(given),
    )


def packed(weights: Iterable[tuple[str, torch.Tensor]]) -> list[Any]:
    """Put weights into the object store, part by part; returns the references."""
    import ray
    import torch

    def plain(tensor: torch.Tensor) -> Any:
        """numpy knows no bfloat16."""
        return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy(), tensor.dtype

    return [ray.put({name: plain(tensor) for name, tensor in part.items()}) for part in parts(weights)]


def _unpacked(references: list[Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the weights of `packed`, as views of the object store's memory."""
    import ray
    import torch

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        for reference in references:
            for name, (bits, dtype) in ray.get(reference).items():
                tensor = torch.from_numpy(bits)
                yield name, tensor.view(dtype) if tensor.dtype != dtype else tensor
