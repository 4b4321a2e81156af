"""The processes of a stage: rank, size and device; started by torch's launcher (torchrun), or one without it.

Every function also works in a single process, where it does nothing or returns its argument. Objects travel over gloo,
gradients over NCCL on GPUs. The environment of torchrun says who a process is; `join` makes the process group.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from distill.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")

ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
"""The variables by which torch's launcher tells a process who it is."""

TIMEOUT = datetime.timedelta(hours=12)
"""Of one exchange: a process may wait for another's rollout, or for a large model to be saved."""
MEET = datetime.timedelta(minutes=10)
"""Of the first meeting."""
_of_thread = threading.local()
BUCKET_BYTES = 64 << 20
"""Gradients are summed over the processes in buffers of about this size."""


def launched() -> bool:
    """Return whether torch's launcher started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def rank() -> int:
    """Return this process's number, from 0, over all nodes."""
    return int(os.environ.get("RANK", "0")) if launched() else 0


def size() -> int:
    """Return the number of processes over all nodes."""
    return int(os.environ.get("WORLD_SIZE", "1")) if launched() else 1


def local_rank() -> int:
    """Return this process's number on its node."""
    return int(os.environ.get("LOCAL_RANK", "0")) if launched() else 0


def is_main() -> bool:
    """Return whether this process writes the stage's files and the terminal."""
    return rank() == 0


def join() -> None:
    """Make the process group, before any engine makes one of its own. Does nothing without a launcher.

    Raises UserError if the launcher's variables are incomplete, or the processes on a node outnumber its GPUs.
    """
    if not launched():
        return
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        return
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise UserError(f"RANK is set but {' and '.join(missing)} not: start the processes with torchrun.")
    backend = "gloo"
    if device().type == "cuda":
        if local_rank() >= torch.cuda.device_count():
            raise UserError(
                f"process {local_rank()} of this node has no GPU of its own: there are {torch.cuda.device_count()}. "
                "Lower distributed.processes."
            )
        torch.cuda.set_device(device())
        backend = "cpu:gloo,cuda:nccl"
    else:
        # Accelerate (for its trackers) takes a machine without a GPU for a single process otherwise.
        os.environ["ACCELERATE_USE_CPU"] = "true"
    try:
        dist.init_process_group(backend, timeout=MEET)
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(f"the {size()} processes do not meet at {where}: {error}") from None
    dist.distributed_c10d._set_pg_timeout(TIMEOUT, dist.distributed_c10d._get_default_group())


def leave() -> None:
    """End the process group, if there is one."""
    import torch.distributed as dist

    if launched() and dist.is_initialized():
        dist.destroy_process_group()


def device() -> torch.device:
    """Return the device that this process trains on."""
    import torch

    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        return torch.device("cpu")
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if found is None or (launched() and found.type != "cuda"):
        return torch.device("cpu")
    return torch.device(found.type, local_rank()) if found.type == "cuda" else torch.device(found.type)


def gather(mine: T) -> list[T]:
    """Return one object of every process, in the order of their ranks; every process must call."""
    if size() == 1:
        return [mine]
    import torch.distributed as dist

    found: list[Any] = [None] * size()
    dist.all_gather_object(found, mine, group=getattr(_of_thread, "group", None))
    return found


def second_group() -> Any:
    """Make a process group beside the main one, for exchanges in another thread (`using`); every process must call."""
    if size() == 1:
        return None
    import torch.distributed as dist

    return dist.new_group(backend="gloo", timeout=TIMEOUT)


@contextlib.contextmanager
def using(group: Any) -> Iterator[None]:
    """Let this thread's exchanges of objects travel over a `second_group`, so that they do not meet the main thread's."""
    _of_thread.group = group
    try:
        yield
    finally:
        _of_thread.group = None


def share(items: Sequence[T]) -> list[T]:
    """Return this process's share of a list: every size-th item from its rank on."""
    return list(items[rank() :: size()])


def joined(mine: Sequence[T]) -> list[T]:
    """Return all items in their order, from every process's `share`; every process must call."""
    parts = gather(list(mine))
    every = sum(map(len, parts))
    return [parts[n % len(parts)][n // len(parts)] for n in range(every)]


def whole(tensor: Any) -> Any:
    """Return a tensor, gathered over the processes if it is a shard; every process must call."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def broadcast(mine: T) -> T:
    """Return the main process's object; every process must call."""
    if size() == 1:
        return mine
    import torch.distributed as dist

    found: list[Any] = [mine if is_main() else None]
    dist.broadcast_object_list(found, src=0)
    return found[0]  # type: ignore[no-any-return]


def wait() -> None:
    """Return when every process has called."""
    gather(None)


def add(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over all processes, in place; every process must give the same shapes.

    They travel in buffers of about BUCKET_BYTES, in their own dtype.
    """
    if size() == 1:
        return
    import torch
    import torch.distributed as dist

    bucket: list[Tensor] = []

    def send() -> None:
        if not bucket:
            return
        flat = torch.cat([each.reshape(-1) for each in bucket])
        dist.all_reduce(flat)
        for each, summed in zip(bucket, torch.split(flat, [each.numel() for each in bucket]), strict=True):
            each.copy_(summed.view_as(each))
        bucket.clear()

    held = 0
    for tensor in tensors:
        if bucket and (held + tensor.nbytes > BUCKET_BYTES or bucket[0].dtype != tensor.dtype):
            send()
            held = 0
        bucket.append(tensor)
        held += tensor.nbytes
    send()
