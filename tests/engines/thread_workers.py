"""Workers of a fleet that are threads of this process, and can be made to die."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from distill.engines.fleet import WorkerLostError


class ThreadWorker:
    """An object whose methods run one after the other in a thread: `worker.method.remote(...)` returns a reference."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.made = make()
        self.pool = ThreadPoolExecutor(1)
        self.dead = False

    def __getattr__(self, name: str) -> Any:
        return Method(self, name)

    def die(self) -> None:
        """Lose this and all later answers, as a killed process does."""
        self.dead = True


class Method:
    def __init__(self, worker: ThreadWorker, name: str) -> None:
        self.worker, self.name = worker, name

    def remote(self, *given: Any) -> Future[Any]:
        def call() -> Any:
            if not self.worker.dead:
                answer = getattr(self.worker.made, self.name)(*given)
                if not self.worker.dead:
                    return answer
            raise WorkerLostError("killed")

        return self.worker.pool.submit(call)


class ThreadCalls:
    """Calls of ThreadWorkers; see distill.engines.fleet.Calls."""

    def get(self, reference: Future[Any]) -> Any:
        return reference.result()

    def wait(self, references: list[Future[Any]]) -> list[Future[Any]]:
        return list(wait(references, return_when=FIRST_COMPLETED).done)

    def end(self, worker: ThreadWorker) -> None:
        worker.die()
        worker.pool.shutdown(wait=False, cancel_futures=False)
