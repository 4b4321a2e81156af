"""Several engines as one: each runs in a Ray actor of its own, and requests are spread over them (`fleet`).

New weights travel through Ray's object store: they are put there once, and every actor reads them from its machine's copy.
The actors need the package, the model's folder (a shared file system where there are several machines) and, for `auto` and
an address, a Ray cluster that runs.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distill import engines, world
from distill.engines.fleet import Fleet, WorkerLostError
from distill.engines.ray_cluster import check_room, connect, disconnect
from distill.machine import cores
from distill.recipe import EngineConfig
from distill.records import Completion, Request, Sampling, UserError

if TYPE_CHECKING:
    import torch

SLICE = 0.05
"""Seconds after which a call to an actor returns the completions that are finished, once there is one."""
BUCKET_BYTES = 512 << 20
"""Weights are put into the object store in parts of about this size."""
ANSWERS_HELD = 4
"""`score` holds back at most this many windows of answers that came before earlier ones."""

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
        self._feed = Feed()
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


class Feed:
    """An iterator over requests that grows: it ends when it is empty, and goes on when there are more."""

    def __init__(self) -> None:
        self._requests: deque[Request] = deque()

    def extend(self, requests: Iterable[Request]) -> None:
        self._requests.extend(requests)

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Feed:
        return self

    def __next__(self) -> Request:
        if not self._requests:
            raise StopIteration
        return self._requests.popleft()


class Replicas:
    """This process's share of the replicas, and its connection to the cluster; a context manager.

    In a stage of several processes each of them has its share. start: how their engines are opened. Raises UserError if Ray or the
    cluster is missing, or the cluster has no room for them.
    """

    def __init__(
        self, config: EngineConfig, model_dir: Path, *, max_model_len: int, max_top_k: int, seed: int = 0
    ) -> None:
        assert config.ray is not None
        self.num = config.replicas // world.size()
        if self.num * world.size() != config.replicas:
            raise UserError(
                f"engine.replicas is {config.replicas}: it must be a multiple of the {world.size()} processes that train "
                "(distributed), each of which samples its share of the prompts."
            )
        connect(config)
        import ray

        self._fleet: Fleet[Any] | None = None
        try:
            self._gpus = config.tensor_parallel if ray.cluster_resources().get("GPU") else 0
            # On one machine the engines share the cores as processes do.
            self._cpus = 0 if self._gpus or config.ray == "local" else 1
            check_room(config, self.num, self._gpus, self._cpus)
        except BaseException:
            disconnect()
            raise
        self.start = Start(
            config=config.model_copy(update={"ray": None, "replicas": 1}),
            model_dir=str(Path(model_dir).resolve()),
            max_model_len=max_model_len,
            max_top_k=max_top_k,
            seed=seed,
            paths=tuple(path for path in sys.path if path),
            variables=_variables(config),
        )

    def fleet(self, actor: type, prepare: Callable[[Any, int], list[Any]], *, sticky: bool = False) -> Fleet[Any]:
        """Start the actors; see `Fleet`."""
        import ray

        made = ray.remote(actor).options(num_cpus=self._cpus, num_gpus=self._gpus, scheduling_strategy="SPREAD")
        self._fleet = Fleet(self.num, RayCalls(), made.remote, prepare, sticky=sticky, say=_say)
        return self._fleet

    def close(self) -> None:
        """End the actors, and a local cluster with the last of them."""
        if self._fleet is not None:
            self._fleet.close()
        disconnect()

    def __enter__(self) -> Replicas:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class RayCalls:
    """Calls of Ray actors; see `fleet.Calls`."""

    def get(self, reference: Any) -> Any:
        import ray

        try:
            return ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, UserError | ValueError):
                raise error.cause from None
            raise
        except ray.exceptions.RayError as error:
            raise WorkerLostError(_reason(error)) from None

    def wait(self, references: list[Any]) -> list[Any]:
        import ray

        ray.wait(references, num_returns=1)
        ready: list[Any] = ray.wait(references, num_returns=len(references), timeout=0)[0]
        return ready

    def end(self, worker: Any) -> None:
        import ray

        with contextlib.suppress(ray.exceptions.RayError):  # its cluster may have ended before
            ray.kill(worker)


def _reason(error: Exception) -> str:
    """Return Ray's explanation in a few words."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    for line in lines:
        if detail := re.search(r"Worker exit detail: ([^.]*)", line):
            return detail[1]
    return (lines or [type(error).__name__])[0][:200].rstrip(".")


class RayEngine:
    """Several engines as one (see distill.records.Engine). Raises UserError when they cannot start."""

    def __init__(
        self, config: EngineConfig, model_dir: Path, *, max_model_len: int, max_top_k: int, seed: int = 0
    ) -> None:
        self._weights: Weights | None = None
        self._runs = 0
        self.version = 0
        self._window = config.batch_size + max(4, config.batch_size // 4)
        self._replicas = Replicas(config, model_dir, max_model_len=max_model_len, max_top_k=max_top_k, seed=seed)
        try:
            self.fleet = self._replicas.fleet(Replica, self._prepared)
            self.facts: list[Facts] = self.fleet.call(lambda actor: actor.facts.remote())
        except BaseException:
            self._replicas.close()
            raise
        self.vocab_size = self.facts[0].vocab_size
        self.max_model_len = min(fact.max_model_len for fact in self.facts)
        self.note = self.facts[0].note

    def _prepared(self, actor: Any, number: int) -> list[Any]:
        calls = [actor.start.remote(self._replicas.start)]
        if self._weights is not None:
            calls.append(actor.sync.remote(self._weights))
        return calls

    def generate(self, requests: Iterable[Request], sampling: Sampling, *, top_k: int = 0) -> Iterator[Completion]:
        """Yield completions as the engines finish them."""
        run = self._run("generate", sampling, top_k)
        for _, request, completion in self.fleet.run(requests, lambda *given: _ask(run, *given), self._window):
            yield replace(completion, request_id=request.request_id)

    def score(self, requests: Iterable[Request], *, top_k: int = 0) -> Iterator[Completion]:
        """Yield the given completions' log-probabilities in the order of the requests."""
        run = self._run("score", None, top_k)
        waiting: dict[int, Completion] = {}
        due = 0
        most = ANSWERS_HELD * self._window * len(self.fleet.slots)
        answers = self.fleet.run(
            requests, lambda *given: _ask(run, *given), self._window, may_take=lambda: len(waiting) < most
        )
        for number, request, completion in answers:
            waiting[number] = replace(completion, request_id=request.request_id)
            while due in waiting:
                yield waiting.pop(due)
                due += 1

    def _run(self, method: str, sampling: Sampling | None, top_k: int) -> Run:
        self._runs += 1
        return Run(self._runs, method, sampling, top_k)

    def sync(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Put new weights into the object store and wait until every engine has them."""
        self._weights = _packed(weights), version  # the former parts are freed here
        versions = self.fleet.call(lambda actor: actor.sync.remote(self._weights))
        if set(versions) != {version}:
            raise RuntimeError(f"the engines have weights of the versions {versions}, not {version}.")
        self.version = version

    def close(self) -> None:
        """End the actors, and a local cluster with the last of them."""
        self._weights = None
        self._replicas.close()


def _ask(run: Run, actor: Any, given: list[tuple[int, Request]]) -> Any:
    return actor.work.remote(run, [replace(request, request_id=str(number)) for number, request in given])


def _variables(config: EngineConfig) -> dict[str, str]:
    """Return the environment of an actor: its engine's, with a share of the cores where all are on this machine."""
    variables = engines.environment(config)
    if config.ray == "local":
        variables["OMP_NUM_THREADS"] = str(max(1, cores() // config.replicas))
    else:
        variables.pop("OMP_NUM_THREADS", None)
    return variables


def _say(message: str) -> None:
    print(message, flush=True)


# ------------------------------------------------------------------------------------------------- weights


def _packed(weights: Iterable[tuple[str, torch.Tensor]]) -> list[Any]:
    """Put weights into the object store, part by part; returns the references."""
    import ray
    import torch

    parts: list[Any] = []
    part: dict[str, Any] = {}
    size = 0
    for name, tensor in weights:
        tensor = tensor.detach().cpu()
        bits = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
        part[name] = bits.numpy(), tensor.dtype
        size += tensor.nbytes
        if size >= BUCKET_BYTES:
            parts.append(ray.put(part))
            part, size = {}, 0
    if part:
        parts.append(ray.put(part))
    return parts


def _unpacked(references: list[Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the weights of `_packed`, as views of the object store's memory."""
    import ray
    import torch

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        for reference in references:
            for name, (bits, dtype) in ray.get(reference).items():
                tensor = torch.from_numpy(bits)
                yield name, tensor.view(dtype) if tensor.dtype != dtype else tensor
