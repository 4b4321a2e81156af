"""Start the processes of a training stage on this node with torch's launcher: `python -m distill.run.launch RUN STAGE`.

`distill run` starts it for a stage whose `distributed` asks for several processes; on further nodes a launcher command
(srun, ...) or a person does. It ends when all processes have ended, or at once when one fails: the others notice within a
second (`Watcher`) and end too. The reason is in STAGE/error.txt, the number of the process in STAGE/failed_rank, and torch's
own messages in STAGE/launcher.txt. Exit status: that of `stage_process`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from distill import interrupt
from distill.errors import STATUSES, UserError
from distill.recipe import DistributedConfig

PEER_LOST = 75
"""Exit status of a process that ended because another one did."""
PATIENCE = 7 * 24 * 3600
"""Seconds that processes may take to end after a SIGTERM: a rollout may be under way."""
MEET = 3600
"""Seconds until the launchers of all nodes must have met."""
CONNECT = 600
"""Seconds to wait for the first node."""
EVERY = 0.5
"""Seconds between two looks for a failure on another node."""
ELSEWHERE = 3.0
"""Seconds to wait for the reason of a failure on another node."""


def command(run: Path, stage: str) -> list[str]:
    """Return the command that starts a stage's processes on one node."""
    return [sys.executable, "-m", "distill.run.launch", str(run), stage]


def log_name(rank: int) -> str:
    """Return the name of a process's log in the stage's folder."""
    return f"log-{rank}.txt" if rank else "log.txt"


def error_name(rank: int) -> str:
    """Return the name of the file with the reason why a process failed."""
    return f"error-{rank}.txt"


def failed_log(folder: Path) -> Path:
    """Return the log of the process that failed first; of the main one if that is unknown."""
    try:
        return folder / log_name(int((folder / "failed_rank").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return folder / log_name(0)


def main(run: Path, stage: str) -> int:
    """Start the processes of this node and wait for them; return the exit status."""
    from distill import run_folder
    from distill.run.stage_process import die_with_parent, stage_config

    die_with_parent()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, interrupt.SIGNALS)
    folder = run / stage
    config: Any = stage_config(run_folder.recipe(run), stage)
    standing = run_folder.read(folder)
    parallel: DistributedConfig = config.parallel
    attempt = standing.attempts if standing is not None else 1
    for old in (*folder.glob("error-*.txt"), folder / "error.txt", folder / "failed_rank"):
        old.unlink(missing_ok=True)
    name = "launcher.txt" if parallel.nodes == 1 else f"launcher-{socket.gethostname()}.txt"
    with (folder / name).open("ab", buffering=0) as messages:
        os.dup2(messages.fileno(), 2)
    threads = max(1, (os.cpu_count() or 1) // parallel.processes)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    if parallel.nodes > 1:
        threading.Thread(target=_end_with_others, args=(folder,), daemon=True, name="other nodes").start()
    try:
        failures, status = _launch(parallel, f"{run.resolve().name}-{stage}-{attempt}", [str(run), stage])
    except UserError as error:
        (folder / "error.txt").write_text(str(error), encoding="utf-8")
        return 2
    if not failures:
        return status
    return _explain(failures, folder, parallel.world_size)


def _launch(parallel: DistributedConfig, run_id: str, args: list[str]) -> tuple[dict[int, int], int]:
    """Run the stage's processes; return the exit status of each that failed, by rank, and the status of all others."""
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    alone = parallel.nodes == 1
    here, there = ("localhost", "localhost") if alone else _addresses(str(parallel.rendezvous))
    if not alone:
        _use_interface(here)
    config = LaunchConfig(
        min_nodes=parallel.nodes,
        max_nodes=parallel.nodes,
        nproc_per_node=parallel.processes,
        run_id=run_id,
        rdzv_backend="c10d",
        rdzv_endpoint=parallel.rendezvous or "localhost:0",
        rdzv_configs={"timeout": MEET, "read_timeout": CONNECT, "is_host": str(here == there)},
        max_restarts=0,
        local_addr=here,
        shutdown_timeout=PATIENCE,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "distill.run.stage_process", *args)
    except SignalException as stopped:
        return {}, 128 + int(stopped.sigval)
    except ChildFailedError as error:
        return {rank: failure.exitcode for rank, failure in error.failures.items()}, 1
    except (RendezvousError, DistError) as error:
        raise UserError(_not_met(parallel, error)) from error
    return {}, 0


def _addresses(rendezvous: str) -> tuple[str, str]:
    """Return this node's address on the way to the rendezvous, at which other nodes reach it, and that of the rendezvous.

    Raises UserError if the rendezvous has no address or there is no way to it.
    """
    host, _, port = rendezvous.rpartition(":")
    try:
        family, *_, there = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(there)  # sends nothing
            return str(probe.getsockname()[0]), str(there[0])
    except OSError as error:
        raise UserError(f"distributed.rendezvous: {rendezvous} cannot be reached from this node: {error}") from None


def _use_interface(address: str) -> None:
    """Let gloo use the network interface of an address; it would take that of the host's name, often 127.0.0.1."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address.partition("%")[0] == address for each in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def _end_with_others(folder: Path) -> None:
    """Kill this node's processes once a launcher of another node has written why one of its processes failed.

    They would wait for that process: over NCCL nothing tells them that it is gone.
    """
    while not (folder / "failed_rank").exists():
        time.sleep(EVERY)
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _not_met(parallel: DistributedConfig, error: Exception) -> str:
    return (
        f"distributed: the {parallel.nodes} nodes did not meet at {parallel.rendezvous or 'this node'}: {error}. Start the stage "
        "on the first node first; its port must be free and open to the others."
    )


def _explain(failures: Mapping[int, int], folder: Path, size: int) -> int:
    """Find the process that failed first, write why, and return the exit status."""
    if (folder / "failed_rank").exists():  # the launcher of another node has written it
        return 1
    rank, status = min(failures.items(), key=lambda item: _order(item, folder))
    code = 1
    if status == PEER_LOST:
        until = time.monotonic() + ELSEWHERE
        while time.monotonic() < until and not (folder / "failed_rank").exists():
            time.sleep(0.1)
        if (folder / "failed_rank").exists():
            return 1
        reason = "a process on another node was lost; that node's launcher-*.txt says more"
    elif status < 0:
        name = signal.Signals(-status).name
        why = " (most likely because memory ran out)" if status == -signal.SIGKILL else ""
        reason = f"process {rank} of {size} was ended by {name}{why}; its log is {folder / log_name(rank)}"
    else:
        try:
            reason, code = (folder / error_name(rank)).read_text(encoding="utf-8"), status
        except OSError:
            reason = f"process {rank} of {size} ended with status {status}; its log is {folder / log_name(rank)}"
    (folder / "failed_rank").write_text(str(rank), encoding="utf-8")
    (folder / "error.txt").write_text(reason, encoding="utf-8")
    return code


def _order(item: tuple[int, int], folder: Path) -> tuple[int, float, int]:
    """Order failures by how likely each is the first one: killed, refused, failed, ended because another one did."""
    rank, status = item
    if status == PEER_LOST:
        return 3, 0.0, rank
    if status < 0:
        return 0, 0.0, rank
    path = folder / error_name(rank)
    when = path.stat().st_mtime if path.exists() else time.time()
    return (1 if status in STATUSES else 2), when, rank


if __name__ == "__main__":
    code = main(Path(sys.argv[1]), sys.argv[2])
    sys.stdout.flush()
    os._exit(code)  # Python would take a second to free torch
