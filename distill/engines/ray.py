"""Several engines as one: each runs in a Ray actor of its own, and requests are spread over them (`fleet`).

New weights travel through Ray's object store: they are put there once, and every actor reads them from its machine's copy.
The actors need the package, the model's folder (a shared file system where there are several machines) and, for `auto` and
an address, a Ray cluster that runs.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill import engines, world
from distill.engines.fleet import Fleet, WorkerLostError, requests_held
from distill.engines.nccl_transfer import NcclTransfer
from distill.engines.ray_cluster import check_room, connect, disconnect
from distill.engines.ray_replica import Facts, Replica, Run, Start, Weights, packed
from distill.machine import cores
from distill.recipe import EngineConfig
from distill.records import Completion, Request, Sampling, UserError

if TYPE_CHECKING:
    import torch

ANSWERS_HELD = 4
"""`score` holds back at most this many windows of answers that came before earlier ones."""


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

    def fleet(self, actor: type, prepare: Callable[[Any, int], list[Any]], **options: Any) -> Fleet[Any]:
        """Start the actors; options: see `Fleet`."""
        import ray

        made = ray.remote(actor).options(num_cpus=self._cpus, num_gpus=self._gpus, scheduling_strategy="SPREAD")
        self._fleet = Fleet(self.num, RayCalls(), made.remote, prepare, say=_say, **options)
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
        self._nccl: NcclTransfer | None = None
        self._runs = 0
        self._transferred = False
        self.version = 0
        self._window = requests_held(config.batch_size)
        self._replicas = Replicas(config, model_dir, max_model_len=max_model_len, max_top_k=max_top_k, seed=seed)
        try:
            # Where the weights travel from GPU to GPU, only the trainer has the present ones: a successor waits for the next.
            self.fleet = self._replicas.fleet(Replica, self._prepared, may_replace=lambda: not self._transferred)
            if config.weight_transfer == "nccl":
                self._nccl = NcclTransfer(self.fleet, config.tensor_parallel)
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
        """Give new weights to every engine, and wait until all have them."""
        if self._nccl is not None:
            self._nccl.send(weights)
            self._transferred = True
            versions = self.fleet.call(lambda actor: actor.transferred.remote(version))
        else:
            self._weights = None  # frees the former parts before there are new ones
            self._weights = packed(weights), version
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
    if (runner := os.environ.get(engines.RUNNER_V2)) is not None:
        variables[engines.RUNNER_V2] = runner
    if config.ray == "local":
        variables["OMP_NUM_THREADS"] = str(max(1, cores() // config.replicas))
    else:
        variables.pop("OMP_NUM_THREADS", None)
    return variables


def _say(message: str) -> None:
    print(message, flush=True)
