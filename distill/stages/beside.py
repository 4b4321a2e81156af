"""An engine beside a trainer on one GPU: the order in which they take memory, and the engine's share of it.

First the process group, then the model in training (whole, or with fsdp2 only when it is sharded), then the engines; the rest
of training (optimiser, reference, shards, reward models, activations) comes later and is left out of the engines' shares, by the
project's own count (`compute.memory`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from distill import engines, models, world
from distill.compute.flops import ModelShape
from distill.compute.memory import ENGINE_BYTES, Memory, cache_bytes, engine_memory, train_memory
from distill.compute.shared_gpu import split
from distill.engines import vllm_options
from distill.recipe import EngineConfig, GenerateStage, GrpoStage, ModelConfig, PolicyStage
from distill.records import Engine, UserError
from distill.stages.context import Context


def on_device(model: Any, config: PolicyStage) -> Any:
    """Move the model in training to its device before an engine starts; a model that is to be sharded stays in main memory."""
    return model if config.parallel.strategy == "fsdp2" else model.to(world.device())


def shared_engines(
    config: PolicyStage,
    context: Context,
    max_model_len: int,
    *,
    reference: bool = False,
    teachers: Sequence[str] = (),
    scoring: str | None = None,
) -> tuple[EngineConfig, EngineConfig]:
    """Return the settings of the policy's engine and of the teacher's, with their shares of the GPU if there is one.

    teachers: those in the trainer. scoring: the teacher with an engine of its own. Raises UserError if they do not fit.
    """
    is_vllm = engines.expected(config.engine) == "vllm"
    if is_vllm and (reason := vllm_options.refused(config.engine, world.device().type)):
        raise UserError(f"stages.{context.name}.{reason}")
    if not is_vllm or config.engine.ray is not None or world.device().type != "cuda":
        return config.engine, config.engine.model_copy(update={"sleep": False})
    import torch

    rewards = reward_model_bytes(config) if isinstance(config, GrpoStage) else 0.0
    return divided(
        config,
        _shape(context, config.model),
        total=float(torch.cuda.mem_get_info(world.device())[1]),
        max_model_len=max_model_len,
        where=f"stages.{context.name}",
        reference=reference,
        teachers=[_shape(context, name) for name in teachers],
        scoring=None if scoring is None else _shape(context, scoring),
        rewards=rewards,
    )


def divided(
    config: PolicyStage,
    shape: ModelShape,
    *,
    total: float,
    max_model_len: int,
    where: str,
    reference: bool = False,
    teachers: Sequence[ModelShape] = (),
    scoring: ModelShape | None = None,
    rewards: float = 0.0,
) -> tuple[EngineConfig, EngineConfig]:
    """`shared_engines` on a GPU of `total` bytes, by shapes. rewards: bytes of reward models."""
    engine = config.engine

    def memory(of: ModelShape, scored: bool) -> Memory:
        return engine_memory(
            of,
            engine.batch_size,
            max_model_len,
            dtype=engine.dtype,
            cache_gib=engine.kv_cache_gib,
            scored=scored,
            tensor_parallel=engine.tensor_parallel,
            on_cpu=False,
        )

    training = train_memory(
        shape,
        config.micro_tokens,
        dtype=config.dtype,
        lora=config.lora,
        reference=reference,
        teachers=teachers,
        checkpointing=config.gradient_checkpointing,
        length=max_model_len,
        parallel=config.parallel,
        on_cpu=False,
    ) + Memory(rewards=rewards, process=ENGINE_BYTES["vllm"])
    own, others = memory(shape, False), 0.0
    if scoring is not None:
        taught = memory(scoring, True)
        others = taught.engine + taught.logits + taught.cache + ENGINE_BYTES["vllm"]
    least_cache = cache_bytes(shape, engine.dtype, max_model_len) / engine.tensor_parallel
    found = split(
        training,
        own,
        total=total,
        others=others,
        least_cache=0.0 if engine.kv_cache_gib else least_cache,
        sleep=engine.sleep,
        share=engine.memory_share,
    )
    if found.short:
        gib = 2**30
        remedies = "micro_tokens, gradient_checkpointing, lora or distributed.strategy: fsdp2 take less"
        if not engine.sleep:
            remedies = f"engine.sleep: true frees the engine's memory while the model trains; {remedies}"
        raise UserError(
            f"{where}: trainer and engine do not fit the GPU {found.when}: {found.short / gib:.1f} GiB more than its "
            f"{total / gib:.1f} GiB are needed. {remedies[0].upper()}{remedies[1:]} (distill check RECIPE --gpu NAME predicts them)."
        )
    share = engine.memory_share or _digits((found.engine + ENGINE_BYTES["vllm"]) / total)
    teacher = {"sleep": False, "memory_share": _digits(others / total) if scoring is not None else None}
    return engine.model_copy(update={"memory_share": min(share, 1.0)}), engine.model_copy(update=teacher)


@contextmanager
def opened(engine: Engine, config: EngineConfig, context: Context) -> Iterator[Engine]:
    """Close an engine at the end of the context. Raises UserError if it is to sleep and cannot."""
    context.say_note(engine)
    try:
        if config.sleep and not hasattr(engine, "sleep"):
            raise UserError(
                f"stages.{context.name}.engine.sleep: the engine {config.fn} has no method sleep; remove the key."
            )
        yield engine
    finally:
        engine.close()


def leaving_rewards(config: GenerateStage) -> GenerateStage:
    """Return the stage with a share for its engine that leaves a GPU's room for reward models, which load after it."""
    engine = config.engine
    sized = engine.memory_share is not None or engine.kv_cache_gib is not None or engine.ray is not None
    if sized or engines.expected(engine) != "vllm" or world.device().type != "cuda":
        return config
    import torch

    rewards = reward_model_bytes(config)
    share = math.floor((vllm_options.SHARE - rewards / torch.cuda.mem_get_info(world.device())[1]) * 10000) / 10000
    if not rewards:
        return config
    if share <= 0:
        raise UserError(
            f"rewards: the reward models take {rewards / 2**30:.1f} GiB, more than the GPU has beside an engine."
        )
    return config.model_copy(update={"engine": engine.model_copy(update={"memory_share": share})})


def reward_model_bytes(config: GrpoStage | GenerateStage) -> float:
    """Return the bytes of the weights of a stage's reward models."""
    paths = [str(one.options["path"]) for one in config.rewards if one.fn == "model"]
    folders = [models.resolve(ModelConfig(source=path)) for path in paths]
    return sum(2.0 * ModelShape.from_config(models.config_of(folder)).params_total for folder in folders)


def _shape(context: Context, name: str) -> ModelShape:
    return ModelShape.from_config(models.config_of(context.model_dir(name)))


def _digits(share: float) -> float:
    return math.ceil(share * 10000) / 10000
