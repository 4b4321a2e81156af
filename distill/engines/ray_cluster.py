"""The connection of this process to a Ray cluster, and the room on it."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import socket
import sys
from collections.abc import Iterator
from typing import Any

from distill import engines, world
from distill.errors import MachineError
from distill.machine import cores
from distill.recipe import EngineConfig

OPTIONS: dict[str, Any] = {"configure_logging": True, "logging_level": "WARNING", "log_to_driver": True}
AUTHENTICATION = "RAY_AUTH_MODE"
KNOCK = 10.0
"""Seconds in which a cluster's address must answer."""

_users = 0
"""The number of engines of this process that use the connection to the cluster."""


def connect(config: EngineConfig) -> None:
    """Connect this process to the cluster that `config.ray` names; start one on this machine for "local".

    Raises UserError if Ray is not installed or there is no such cluster.
    """
    global _users
    if importlib.util.find_spec("ray") is None:
        raise MachineError(f"engine.ray: {engines.NO_RAY}")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # of the other actors, where one's error ends the stage
    with _own_signal_handlers():
        if config.ray == "local":
            _connect_here(config)
        else:
            _join(str(config.ray))
    _users += 1


def _connect_here(config: EngineConfig) -> None:
    """Start a cluster on this machine in the stage's main process, and join it in the others."""
    address, mode = "", None
    if world.is_main():
        import ray

        if not ray.is_initialized():
            with _without_trainers_gpus():
                ray.init(address="local", num_cpus=max(cores(), config.replicas), include_dashboard=False, **OPTIONS)
        address, mode = ray.get_runtime_context().gcs_address, os.environ.get(AUTHENTICATION)
    address, mode = world.broadcast((address, mode))
    if not world.is_main():
        if mode is not None:
            os.environ[AUTHENTICATION] = mode  # before the import: Ray reads it then
        _join(address)


def _join(address: str) -> None:
    import ray

    if ray.is_initialized():
        return
    _knock(address)
    try:
        ray.init(address=address, **OPTIONS)
    except ConnectionError as error:
        raise MachineError(_missing(address, str(error).splitlines()[0][:200])) from None


def _knock(address: str) -> None:
    """Refuse an address at which nobody listens; Ray would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        return  # "auto", or a name that Ray looks up itself
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=KNOCK).close()
    except OSError as error:
        raise MachineError(_missing(address, str(error))) from None


def _missing(address: str, why: str) -> str:
    return f"engine.ray: no Ray cluster is found at {address!r} ({why}). Start one with `ray start --head`, or set ray: local."


def disconnect() -> None:
    """Give up the connection to the cluster; the last engine's ends a local cluster."""
    global _users
    _users -= 1
    if _users == 0:
        import ray

        ray.shutdown()


@contextlib.contextmanager
def _own_signal_handlers() -> Iterator[None]:
    """Keep this process's signal handlers, which Ray replaces when it is imported."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            with contextlib.suppress(ValueError):  # not in the main thread
                signal.signal(number, handler)


@contextlib.contextmanager
def _without_trainers_gpus() -> Iterator[None]:
    """Hide the GPUs of the model in training, the first ones of this machine, from a local cluster."""
    torch = sys.modules.get("torch")
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    if torch is not None and torch.cuda.is_initialized():
        taken = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        every = before.split(",") if before else [str(n) for n in range(torch.cuda.device_count())]
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(every[taken:])
    try:
        yield
    finally:
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        if before is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = before


def check_room(config: EngineConfig, replicas: int, gpus: int, cpus: int) -> None:
    """Refuse more replicas than the cluster has room for now; Ray would wait for it without end.

    replicas: of this process. gpus, cpus: of each.
    """
    import ray

    there, free = ray.cluster_resources(), ray.available_resources()
    for kind, each in (("GPU", gpus), ("CPU", cpus)):
        if free.get(kind, 0) < each * replicas:
            what = "engine.replicas x engine.tensor_parallel" if gpus > 1 else "engine.replicas"
            raise MachineError(
                f"{what}: {each * replicas} {kind}s are needed, but the Ray cluster has {there.get(kind, 0):g}, of which "
                f"{free.get(kind, 0):g} are free. Lower it, or wait until other work on the cluster has ended."
            )
