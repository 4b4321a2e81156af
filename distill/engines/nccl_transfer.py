"""New weights for engines in Ray actors from GPU to GPU: vLLM's own transfer, over NCCL, driven from the trainer's process.

In: the weights by their names in the checkpoint, on a GPU. Out: every engine has them. vLLM's trainer side calls the engines
through `ActorsClient` and broadcasts the weights in packed buffers; each actor's GPUs are ranks behind the trainer, rank 0.
An actor that dies leaves the group broken, so the group is made anew before the next transfer, and until then no successor
takes the actor's place: only the trainer has the present weights. Written against vLLM 0.32; it needs two GPUs and has not
been run on any.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distill.engines.fleet import Fleet
from distill.records import UserError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Weights:
    """A pass over the weights that can be repeated, as vLLM's trainer side asks for it (its WeightSource)."""

    pairs: list[tuple[str, torch.Tensor]]

    def metadata(self) -> list[Any]:
        """Return name, dtype and shape of every weight."""
        from vllm.distributed.weight_transfer.base import ParamMeta

        return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.pairs]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(self.pairs)


class ActorsClient:
    """vLLM's calls of the engines (its VLLMWeightSyncClient), made to every actor; each returns when all have returned.

    gpus: of each actor.
    """

    def __init__(self, fleet: Fleet[Any], gpus: int) -> None:
        self._fleet, self._gpus = fleet, gpus

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        present = [slot.number for slot in self._fleet.present()]
        first = {number: 1 + place * self._gpus for place, number in enumerate(present)}
        self._every("init_weight_transfer_engine", lambda number: init_info | {"rank_offset": first[number]})

    def start_weight_update(self) -> None:
        self._every("start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        self._every("update_weights", lambda number: update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._every("finish_weight_update")

    def release(self) -> None:
        """Let the actors leave a group that is broken."""
        self._every("shutdown_weight_transfer_engine")

    def _every(self, call: str, given: Any = lambda number: None) -> None:
        self._fleet.call_each(lambda worker, number: worker.transfer.remote(call, given(number)))


class NcclTransfer:
    """Sends weights to the actors of a fleet. gpus: of each actor."""

    def __init__(self, fleet: Fleet[Any], gpus: int) -> None:
        self._fleet, self._gpus = fleet, gpus
        self._client = ActorsClient(fleet, gpus)
        self._trainer: Any = None
        self._of = -1

    def send(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Send the weights to every actor; successors of dead ones take their places first.

        The whole weights are on the trainer's GPU meanwhile: those that are shards or have an adapter, as copies. Raises
        UserError if they are not on a GPU.
        """
        source = Weights([(name, tensor.detach()) for name, tensor in weights])
        if not all(tensor.is_cuda for _, tensor in source.pairs):
            raise UserError("engine.weight_transfer: nccl needs the model in training on a GPU; remove it.")
        self._fleet.revive()
        if self._trainer is None or self._of != self._fleet.replaced:
            self._open(source)
        self._trainer.source = source
        self._trainer.send_weights()

    def _open(self, source: Weights) -> None:
        """Make the group of the trainer and all actors' GPUs."""
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLTrainerWeightTransferEngine

        if self._trainer is not None:
            self._trainer.shutdown()
            self._client.release()
        init = NCCLTrainerInitInfo(
            master_address=_address(),
            master_port=_free_port(),
            world_size=1 + self._gpus * len(self._fleet.present()),
            rank=0,
        )
        self._trainer = NCCLTrainerWeightTransferEngine.trainer_init(init, client=self._client, source=source)
        self._of = self._fleet.replaced


def _address() -> str:
    """Return this machine's address as the cluster knows it."""
    import ray

    return str(ray.util.get_node_ip_address())


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("", 0))
        return int(one.getsockname()[1])
