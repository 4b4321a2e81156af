"""Memory of training and of engines, by use, for one process: from a model's shape and a stage's settings.

In: shapes, token counts, the stage's adapter and processes. Out: `Memory`, in bytes at the peak of a step.

A step has two peaks. At the end of a forward pass all activations, the head's chunk and the gradients of the micro-batches
before are held; at the end of the last backward pass the activations are gone and all gradients are there. The larger
counts, so gradients that fit in the memory that activations free add nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from distill.compute.adapters import is_target, lora_params, saved_params
from distill.compute.flops import BYTES
from distill.models.shape import ModelShape
from distill.recipe import DistributedConfig, LoraConfig
from distill.recipe.fields import ONE_PROCESS

PROCESS_BYTES = 0.6e9
"""On a CPU: python, torch and transformers, before any weight."""
PROOF_BYTES = 0.65e9
"""On a CPU: memory that the checks before training leave free in the process's heap, in pieces too small for a step."""
HEAP, LORA_HEAP = 1.3, 1.6
"""On a CPU: the heap's size over the activations and head chunks in it; blocks of changing sizes, more of them with adapters,
leave gaps. Fitted to SmolLM2-135M (tests/bench/RESULTS.md)."""
RECOMPUTED = 3
"""On a CPU: layers' worth of activations, gradients and gaps while a checkpointed layer is recomputed."""
CONTEXT_BYTES = 1.0e9
"""On a GPU: the CUDA context, loaded kernels and the workspaces of cuBLAS and NCCL."""
ENGINE_BYTES = {"vllm": 0.7e9}
"""What an engine's own libraries and buffers take besides."""
SCORED_TOKENS = 32768
"""On a GPU: tokens of sequences whose keys and values are held while an engine only scores: two batches of prompts."""
SCORE_ROWS = {"vllm": 1024}
"""Positions whose logits an engine holds at once in scoring."""
QUANTISED_BYTES = {"nf4": 0.5625, "int8": 1.0}
"""Bytes of a layer's weight under an adapter."""
PREFILL_TOKENS = 16384
"""On a GPU: tokens of prompts that vLLM computes at once (its max_num_batched_tokens on a large GPU)."""
LOGIT_COPIES = 3
"""fp32 rows as long as the vocabulary that an engine holds for a sequence: logits, probabilities, scratch."""
CHUNK_BYTES = {"cpu": 256 << 20, "cuda": 5 << 29}
"""The most that a chunk of the head takes (`training.loss.kernels.chunks`)."""
CHUNK_ROWS = 512
"""The most tokens of a chunk of the head on a CPU (`training.loss.kernels.chunks`)."""
TILE = 8192
"""fp32 logits of a token that the GPU's kernel holds (`training.loss.kernels.fused`)."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one process's memory by use, at the peak.

    masters and moments: of the optimiser, fp32. head: a chunk of logits and the head's gradient. teachers: in the trainer.
    engine: its weights; logits: its rows of logits, a copy of its head and a batch of prompts; cache: its keys and values.
    rewards: reward models. gathered: whole layers of a sharded model. offloaded: held in main memory instead; not part of
    the total.
    """

    weights: float = 0.0
    masters: float = 0.0
    moments: float = 0.0
    gradients: float = 0.0
    activations: float = 0.0
    head: float = 0.0
    reference: float = 0.0
    teachers: float = 0.0
    engine: float = 0.0
    logits: float = 0.0
    rewards: float = 0.0
    cache: float = 0.0
    gathered: float = 0.0
    process: float = 0.0
    offloaded: float = 0.0

    @property
    def total(self) -> float:
        return sum(self.parts().values())

    @property
    def least(self) -> float:
        """A lower bound: what is held from the first step to the last."""
        return self.weights + self.masters + self.moments + self.reference + self.teachers + self.engine + self.rewards

    @property
    def held(self) -> float:
        """Bytes of a trainer between two steps: without gradients, activations, the head's chunk and gathered layers."""
        return self.total - self.gradients - self.activations - self.head - self.gathered

    def parts(self) -> dict[str, float]:
        """Bytes by use, without what is offloaded."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "offloaded"}

    def __add__(self, other: Memory) -> Memory:
        return Memory(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})


# ----------------------------------------------------------------------------------------------- training


def train_memory(
    shape: ModelShape,
    micro_tokens: int,
    *,
    dtype: str = "bfloat16",
    lora: LoraConfig | None = None,
    reference: bool = False,
    teachers: Sequence[ModelShape] = (),
    checkpointing: bool = False,
    micro_batches: int = 2,
    length: float = 0.0,
    parallel: DistributedConfig = ONE_PROCESS,
    on_cpu: bool = True,
) -> Memory:
    """Memory of one process that trains with AdamW.

    bfloat16, a parameter: 2 bytes of weight, 4 of fp32 master, 8 of moments, 4 of fp32 gradient sum and, at the end of a
    backward pass, 2 of bf16 gradient. float32 parameters, which fsdp2 always trains, are their own masters. An adapter is
    trained in float32 and its base frozen. micro_batches: of one process in a step; with more than one, gradients are summed.
    With fsdp2 they are summed whole and not as shards, because they travel at the end of a step only. length: mean tokens of
    a document, whose attention weights are kept on a CPU. teachers: in the trainer, in the student's dtype.
    """
    size, sharded, share = BYTES[dtype], parallel.strategy == "fsdp2", _share(parallel)
    trained = float(shape.params_total)
    frozen_bytes, narrow = 0.0, trained
    if lora is not None:
        base = QUANTISED_BYTES[lora.quantised] if lora.quantised else size
        frozen_bytes = base * shape.params_body + size * (shape.params_total - shape.params_body)
        narrow = saved_params(shape, lora)
        trained = lora_params(shape, lora) + narrow
    if size == 4 or sharded:
        narrow = 0.0  # parameters in fewer bytes than their masters
    heap = 1.0 if not on_cpu else HEAP if lora is None else LORA_HEAP
    activations = micro_tokens * _activation_bytes(shape, size, lora is not None, checkpointing, length, on_cpu) * heap
    head = _head_bytes(shape, micro_tokens, size, _trains_head(lora), len(teachers), on_cpu) * heap
    sums = 4 * trained if micro_batches > 1 else 0.0
    last = sums + 2 * narrow if micro_batches > 1 else 4 * trained * (share if sharded else 1.0)
    gradients = sums + max(0.0, last - sums - activations - head)
    held = Memory(
        weights=frozen_bytes * share + (4 * (trained - narrow) + 2 * narrow) * share,
        masters=4 * narrow * share,
        moments=8 * trained * share,
        reference=size * shape.params_total * share if reference and lora is None else 0.0,
        teachers=sum(size * each.params_total for each in teachers) * share,
    )
    if parallel.offload:
        # Gradients travel to main memory as shards too.
        held = Memory(offloaded=held.total + 4 * trained * share)
    return held + Memory(
        gradients=gradients,
        activations=activations,
        head=head,
        gathered=_gathered_bytes(shape, size, lora is None, teachers, reference) if sharded else 0.0,
        process=PROCESS_BYTES + PROOF_BYTES if on_cpu else CONTEXT_BYTES,
    )


def _share(parallel: DistributedConfig) -> float:
    return 1.0 / parallel.world_size if parallel.strategy == "fsdp2" else 1.0


def _trains_head(lora: LoraConfig | None) -> bool:
    return lora is None or any(is_target(each or [], "lm_head") for each in (lora.target_modules, lora.modules_to_save))


def _activation_bytes(
    shape: ModelShape, size: int, lora: bool, checkpointing: bool, length: float, on_cpu: bool
) -> float:
    """Bytes a token that a backward pass reads, all layers; with checkpointing their inputs and one layer's own.

    A norm keeps its input in fp32 and its result; attention keeps queries, keys, values and its result; the MLP its gate,
    the gate's activation, up and the product. Frozen matrices and norms keep no input, but each adapter a copy in fp32.
    Attention weights are kept on a CPU and where scores are capped. Checked against what autograd saves
    (tests/compute/test_memory.py).
    """
    hidden, inner = shape.hidden, shape.intermediate
    query, value = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    mlp = 4 if shape.gated else 2
    attention = size * (2 * query + 2 * value)
    layer: float
    if lora:
        copies = (5 * hidden + query + inner) if size == 2 else (2 * hidden + query + inner)
        attention -= size * query if on_cpu else 0
        layer = 4 * copies + size * (mlp - 1) * inner + 4 * shape.norms * hidden + attention
    else:
        layer = size * (mlp * inner + 2 * hidden) + shape.norms * (4 + size) * hidden + attention
    if shape.head_norms:
        layer += (4 + (0 if lora else size)) * (query + value)
    if on_cpu or shape.softcap:
        layer += (size if not shape.softcap else 4 + 2 * size) * shape.heads * length
    held = RECOMPUTED if on_cpu else 1
    return size * hidden * shape.layers + held * layer if checkpointing else float(layer * shape.layers)


def _head_bytes(shape: ModelShape, tokens: int, size: int, trained: bool, teachers: int, on_cpu: bool) -> float:
    """Bytes of a chunk of logits, of the head's gradient in the backward pass, and of the hidden states and their gradient.

    A chunk holds fp32 logits and their gradient in the weights' dtype; the GPU's kernel the latter and a tile of logits;
    with teachers in the trainer fp32 logits of every model.
    """
    row = shape.vocab * (4 + (size if size == 2 else 0))
    if teachers:
        row += 4 * shape.vocab * teachers
    elif not on_cpu and not shape.softcap:
        row = size * shape.vocab + 4 * min(TILE, shape.vocab)
    room = CHUNK_BYTES["cpu" if on_cpu else "cuda"] // row
    rows = max(1, min(room, tokens, CHUNK_ROWS if on_cpu else tokens))
    # Sums over several chunks are fp32, and converted at the end.
    by_weight = (4 + (size if size == 2 else 0) if rows < tokens else size) * shape.params_head
    return float(rows * row + (by_weight if trained else 0) + 2 * size * tokens * shape.hidden)


def _gathered_bytes(
    shape: ModelShape, size: int, trained: bool, teachers: Sequence[ModelShape], reference: bool
) -> float:
    """Bytes of whole weights under fsdp2: the layer that is computed and the next, the embedding and the head all along, and
    while gradients travel a layer's in both dtypes."""

    def layer(each: ModelShape) -> float:
        return (each.params_total - _ends(each)) / each.layers

    own = size * (2 * layer(shape) + _ends(shape)) + ((4 + size) * layer(shape) if trained else 0)
    others = [*teachers, *([shape] if reference and trained else [])]
    return own + sum(size * _ends(each) for each in others)


def _ends(shape: ModelShape) -> float:
    """Parameters of the embedding and the head."""
    return float(shape.params_head * (1 if shape.tied else 2))


# ------------------------------------------------------------------------------------------------ engines


def engine_memory(
    shape: ModelShape,
    sequences: int,
    max_len: int,
    *,
    dtype: str = "bfloat16",
    engine: str = "vllm",
    cache_gib: float | None = 1.0,
    scored: bool = False,
    tensor_parallel: int = 1,
    on_cpu: bool = True,
) -> Memory:
    """Memory of an engine: weights, the key-value cache, rows of logits, its libraries.

    cache_gib: what vLLM reserves (None: what `sequences` need at `max_len` tokens each, as transformers does). scored: rows of
    logits of SCORE_ROWS positions. tensor_parallel: GPUs that weights and keys and values are divided over; of one of them.
    """
    size = BYTES[dtype]
    if scored and not on_cpu:
        sequences = min(sequences, max(1, SCORED_TOKENS // max(max_len, 1)))
    cache = cache_bytes(shape, dtype, max_len) * sequences / tensor_parallel
    if engine == "vllm" and cache_gib is not None:
        cache = cache_gib * 2**30
    rows = SCORE_ROWS.get(engine, 256) if scored else sequences
    # A bfloat16 engine on a CPU keeps its head in float32 too.
    head = 4.0 * shape.params_head if size == 2 and on_cpu else 0.0
    # A layer's input, gate, up and their product for a batch of prompts.
    batched = 0 if on_cpu or engine != "vllm" else PREFILL_TOKENS
    prompts = float(size * batched * (shape.hidden + 3 * shape.intermediate))
    return Memory(
        engine=float(size * shape.params_total) / tensor_parallel,
        logits=head + 4.0 * LOGIT_COPIES * shape.vocab * rows + prompts,
        cache=cache,
        process=(PROCESS_BYTES if on_cpu else CONTEXT_BYTES) + ENGINE_BYTES.get(engine, 0.0),
    )


def cache_bytes(shape: ModelShape, dtype: str, length: float) -> float:
    """Bytes of the keys and values of a sequence of `length` tokens."""
    return BYTES[dtype] * shape.cached_values(length)
