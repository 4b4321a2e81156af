"""A worker process for jobs that may never end, such as the symbolic comparison of two expressions.

`python -m distill.tasks.judge.worker JOB LIMIT` answers requests, one JSON line each. The job `math` compares or parses
expressions (`symbolic`), `score` runs generators and their scorers (`reasoning_gym_task`), `check` runs tests that are
written as code (`code_checks`).

`worker_pool` kills the process after a time limit: towers of powers and deep parentheses keep sympy busy forever. It ends
by itself if its parent does (at once on Linux, even within a single operation on huge numbers), or if the parent has not
killed it soon after the limit.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

MEMORY_BYTES = 4 * 2**30


def reply_math(request: list[Any]) -> bool:
    """Answer a `math` request.

    `[gold]`: whether it can be parsed. `[answer, gold, strict]`: whether they are equal. `[relation, region]`: whether
    they describe the same set of numbers.
    """
    from distill.tasks.judge import symbolic

    try:
        if len(request) == 1:
            return symbolic.parse(request[0]) is not None
        compare = symbolic.same_region if len(request) == 2 else symbolic.equal
        return bool(compare(*request))
    except Exception:
        # An expression on which sympy fails cannot be equal to the gold.
        return False


def reply_score(request: list[Any]) -> Any:
    """Answer a `score` request.

    `[dataset, options, seed, index]`: question and answer of a generator's item. `[..., answer]`: the score of an
    answer to it. Returns a text with the reason if this fails.
    """
    from distill.tasks import reasoning_gym_task

    try:
        if len(request) == 4:
            entry = reasoning_gym_task.item(*request)[1]
            return [entry["question"], entry["answer"]]
        *reference, answer = request
        return reasoning_gym_task.score(*reference, answer=answer)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _replier(job: str) -> Callable[[list[Any]], Any]:
    """Return the function that answers a job's requests, after its heavy imports."""
    if job == "math":
        reply_math(["x+1", "1+x", True])
        return reply_math
    if job == "check":
        from distill.tasks import code_checks

        return code_checks.reply
    from distill.tasks import reasoning_gym_task

    reasoning_gym_task.library()
    return reply_score


@contextlib.contextmanager
def _ending_with_parent() -> Iterator[None]:
    """Let the kernel end this process when the parent does: its end of the pipe closes, which raises SIGIO (fatal by default).

    The parent writes nothing while it waits for a reply, so nothing else raises the signal. A signal needs no interpreter, which
    may be in one long operation. Linux only (fcntl(2), O_ASYNC).
    """
    if sys.platform != "linux":
        yield
        return
    flags = fcntl.fcntl(0, fcntl.F_GETFL)
    fcntl.fcntl(0, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(0, fcntl.F_SETFL, flags | os.O_ASYNC)
    try:
        if os.getppid() == 1:  # the parent ended before
            os._exit(1)
        yield
    finally:
        fcntl.fcntl(0, fcntl.F_SETFL, flags)


def main() -> None:
    """Answer requests from standard input until it ends."""
    job, limit_s = sys.argv[1], float(sys.argv[2])
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    logging.disable(logging.CRITICAL)
    reply = _replier(job)
    replies.write("ready\n")
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_REAL, 2 * limit_s + 1)
        request = json.loads(line)
        with _ending_with_parent():
            answer = reply(request)
        signal.setitimer(signal.ITIMER_REAL, 0)
        replies.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
