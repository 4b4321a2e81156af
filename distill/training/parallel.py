"""Training on several processes: gradients summed (ddp), or the model sharded over them with torch's `fully_shard` (fsdp2).

ddp: every process holds the whole model; the float32 gradients, summed over a step's micro-batches, are added up once a
step. torch's DistributedDataParallel would send every micro-batch's gradient, in the dtype of the weights.

fsdp2: decoder layers and the rest are sharded; float32 shards are their own master weights; weights are gathered in the
dtype of the computation, gradients are reduced in float32. The loss is multiplied by the number of processes, because
gradients are averaged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from distill import world
from distill.models.prune import decoder_layers
from distill.recipe import DistributedConfig
from distill.records import UserError
from distill.training.forward import base_model
from distill.training.optim import MasterAdamW


def shard(module: Any, model: Any, config: DistributedConfig, device: torch.device, dtype: torch.dtype) -> Any:
    """Move a module with a causal model in it to the device, sharded if the strategy says so; return the module.

    Frozen weights keep their dtype; trained ones become float32. A layer at a time is moved, so a GPU never holds more than
    one whole layer and the embeddings. Raises UserError for a model whose rows are computed one after another.
    """
    if config.strategy != "fsdp2" or not world.launched():
        return module.to(device)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        MixedPrecisionPolicy,
        OffloadPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    if module.plan.layout != "packed":
        raise UserError(
            "distributed.strategy: fsdp2 is not possible for this model: its traces are not packed but computed as rows, and "
            "the processes would not stay in step. Use strategy: ddp."
        )
    if getattr(base_model(model), "is_quantized", False):
        raise UserError(
            "distributed.strategy: fsdp2 is not possible for a model with quantised weights. Use strategy: ddp, or leave "
            "lora.quantised out."
        )
    on_cpu = device.type == "cpu"
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    options: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (world.size(),)),
        "mp_policy": MixedPrecisionPolicy() if dtype == torch.float32 else precision,
        "offload_policy": CPUOffloadPolicy(pin_memory=not on_cpu) if config.offload else OffloadPolicy(),
    }
    for layer in decoder_layers(base_model(model)):
        fully_shard(_trainable_in_float32(layer.to(device)), **options)
    fully_shard(_trainable_in_float32(module.to(device)), **options)
    register_fsdp_forward_method(module, "label_logp")
    return module


def is_sharded(module: Any) -> bool:
    """Return whether `shard` has sharded a module."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def has_shards(model: nn.Module) -> bool:
    """Return whether a model's weights are shards."""
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def at_rest(module: Any) -> None:
    """Free the gathered weights of a sharded module; its parameters are shards again."""
    if is_sharded(module):
        for part in module.modules():
            if is_sharded(part):
                part.reshard()


def before_backward(module: Any, *, last: bool) -> None:
    """Say whether the next backward pass is the step's last one: only then do sharded gradients travel."""
    if is_sharded(module):
        module.set_requires_gradient_sync(last)


def loss_factor(module: Any) -> int:
    """Return the factor on the loss that makes the gradients of all processes a sum."""
    return world.size() if is_sharded(module) else 1


def sum_gradients(module: Any, optimizer: MasterAdamW) -> None:
    """Sum the masters' gradients over all processes; with fsdp2 this has been done in the backward pass."""
    if world.size() > 1 and not is_sharded(module):
        for master in optimizer.masters:
            if master.grad is None:  # another process may have one
                master.grad = torch.zeros_like(master)
        world.add([master.grad for master in optimizer.masters if master.grad is not None])


def _trainable_in_float32(module: nn.Module) -> nn.Module:
    """Convert a module's trained parameters to float32, in place."""
    for parameter in module.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32 and not hasattr(parameter, "full_tensor"):
            parameter.data = parameter.data.float()
    return module
