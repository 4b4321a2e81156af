"""Weights from GPU to GPU, without one: vLLM's own trainer side drives our client; what would travel over NCCL is recorded."""

from __future__ import annotations

import pytest
import torch
from thread_workers import ThreadCalls, ThreadWorker

from distill.engines import nccl_transfer
from distill.engines.fleet import Fleet
from distill.engines.nccl_transfer import NcclTransfer
from distill.records import UserError

pytest.importorskip("vllm", reason="vLLM is not installed")


class Actor:
    """Records the calls that a replica gets."""

    def __init__(self) -> None:
        self.calls = []

    def start(self) -> None:
        self.calls.append(("start", None))

    def transfer(self, call: str, given) -> None:
        self.calls.append((call, given))


@pytest.fixture
def sent(monkeypatch):
    """The endpoint of the trainer is a list of what is broadcast."""
    from vllm.distributed.weight_transfer import nccl_engine

    broadcast = []

    class Endpoint:
        def destroy(self):
            broadcast.append("destroyed")

    def produce(iterator, group, src, post_iter_func, **others):
        assert src == 0
        broadcast.extend((name, tensor.clone()) for name, tensor in iterator)

    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", lambda init: Endpoint())
    monkeypatch.setattr(nccl_engine, "packed_nccl_broadcast_producer", produce)
    monkeypatch.setattr(
        nccl_engine.NCCLTrainerWeightTransferEngine, "_post_send_sync", lambda self: None, raising=False
    )
    monkeypatch.setattr(nccl_transfer, "_address", lambda: "127.0.0.1")
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    return broadcast


def fleet(num: int) -> Fleet:
    return Fleet(
        num,
        ThreadCalls(),
        lambda: ThreadWorker(Actor),
        lambda worker, number: [worker.start.remote()],
        may_replace=lambda: False,
        say=lambda message: None,
    )


WEIGHTS = [("a.weight", torch.arange(6.0).reshape(2, 3)), ("b.bias", torch.ones(4, dtype=torch.bfloat16))]


def test_every_engine_is_told_what_comes_and_in_which_place_it_stands(sent):
    many = fleet(3)
    NcclTransfer(many, gpus=2).send(iter(WEIGHTS))
    assert [(name, tensor.tolist()) for name, tensor in sent] == [(name, tensor.tolist()) for name, tensor in WEIGHTS]
    for number, slot in enumerate(many.slots):
        calls = dict(slot.worker.made.calls)
        assert list(calls) == [
            "start", "init_weight_transfer_engine", "start_weight_update", "update_weights", "finish_weight_update",
        ]  # fmt: skip
        init = calls["init_weight_transfer_engine"]
        assert (init["rank_offset"], init["world_size"]) == (1 + 2 * number, 7)
        told = calls["update_weights"]
        assert told["names"] == ["a.weight", "b.bias"]
        assert told["dtype_names"] == ["float32", "bfloat16"]
        assert told["shapes"] == [[2, 3], [4]]
    many.close()


def test_the_group_lasts_until_an_actor_dies(sent):
    many = fleet(2)
    transfer = NcclTransfer(many, gpus=1)
    transfer.send(WEIGHTS)
    transfer.send(WEIGHTS)
    inits = [call for call, _ in many.slots[0].worker.made.calls].count("init_weight_transfer_engine")
    assert inits == 1
    many.slots[1].worker.die()
    answers = many.run(
        [1, 2], lambda worker, given: worker.start.remote() if worker.dead else _answered(worker, given), 2
    )
    assert len(list(answers)) == 2
    assert many.slots[1].absent
    transfer.send(WEIGHTS)
    calls = [call for call, _ in many.slots[0].worker.made.calls]
    assert calls.count("init_weight_transfer_engine") == 2
    assert calls.index("shutdown_weight_transfer_engine") < len(calls) - 4
    assert "destroyed" in sent
    assert [call for call, _ in many.slots[1].worker.made.calls][:2] == ["start", "shutdown_weight_transfer_engine"]
    many.close()


def _answered(worker, given):
    worker.made.work = lambda asked: [(number, job) for number, job in asked]
    return worker.work.remote(given)


def test_weights_on_a_cpu_are_refused():
    many = fleet(1)
    with pytest.raises(UserError, match=r"weight_transfer: nccl needs the model in training on a GPU"):
        NcclTransfer(many, gpus=1).send(WEIGHTS)
    many.close()


def test_vllms_workers_take_the_calls():
    """Of the GPU worker, whose module is in every build."""
    import inspect

    from vllm.v1.worker.gpu_worker import Worker

    takes = {
        "init_weight_transfer_engine": ["init_info"],
        "start_weight_update": [],
        "update_weights": ["update_info"],
        "finish_weight_update": [],
        "shutdown_weight_transfer_engine": [],
    }
    for name, parameters in takes.items():
        assert list(inspect.signature(getattr(Worker, name)).parameters)[1:] == parameters
