"""divergence: how far a model is from the teacher that sampled some traces, measured on every token of them.

In: a model, and traces that a teacher sampled at temperature 1 with its distributions. Out: the metrics, and
`divergence.parquet`, the sums of every trace (`reports.divergence` makes intervals and differences of them).

At each token the teacher's kept entries S give sum_S p log(p/q) exactly. The rest of the vocabulary is estimated by the
trace's own token, a draw from p: log(p/q) where the token is not in S, else 0. Its expectation over draws is the sum of
p log(p/q) over all tokens outside S, so the mean over traces is an unbiased estimate of the KL over the whole vocabulary
for any `top_logprobs` and `mass`, up to the rounding of stored values (none with exact: true). More entries lower its variance.
`bound`, where all tokens outside S count as one, is never above the KL and has less variance.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from distill import models, world
from distill.compute.flops import ModelShape, forward_flops
from distill.recipe import DivergenceStage
from distill.records import Array, Cost, Traces, UserError, stable_hash
from distill.reports.divergence import FILE, TraceSums, summary
from distill.stages.context import Context, Result
from distill.stages.inputs.forward_proof import prove_forward
from distill.traces.reader import TraceReader, open_traces
from distill.training.loss import divergences
from distill.training.loss.head import Student, Targets
from distill.training.loss.objective import StoredObjective
from distill.training.loss.stored_targets import outcomes
from distill.training.packing import examples_of, pack
from distill.training.policy import StudentModule

COLUMNS = [
    "trace_id",
    "prompt_ids",
    "completion_ids",
    "logprob",
    "top_count",
    "top_ids",
    "top_logprobs",
    "tail_logprob",
]
BLOCK_ROWS = 64


def run(config: DivergenceStage, context: Context) -> Result:
    folder, trust = context.model_dir(config.model), context.trusts(config.model)
    tokenizer = models.load_tokenizer(folder, trust_remote_code=trust)
    reader = open_targets(config, context, tokenizer)
    lengths = reader.lengths()
    module = measuring_module(config.model, config.dtype, reader, context)
    live = context.live(reader.num_rows, "traces", 0)
    parts = []
    for part in measured(module, reader, config.micro_tokens):
        parts.append(part)
        live.update(sum(len(each.trace_id) for each in parts))
    live.close()
    sums = TraceSums.concat(parts)
    sums.write(context.folder / FILE)
    found = summary([sums])
    context.say(
        f"KL to {reader.metadata.model} {found['kl']['value']:.4f} [{found['kl']['low']:.4f}, {found['kl']['high']:.4f}] nats a "
        f"token on {found['traces']} traces of it"
    )
    tokens, scored = int((lengths.prompt + lengths.completion).sum()), int(lengths.completion.sum())
    mean = float((lengths.prompt + lengths.completion).mean())
    flops = forward_flops(ModelShape.from_config(models.config_of(folder)), tokens, (mean + 1) / 2, scored)
    fingerprint = stable_hash((context.folder / FILE).read_bytes().hex())
    return Result(Cost(tokens_scored=tokens, flops=flops), {**found, "kl_nats": found["kl"]["value"]}, fingerprint)


def open_targets(config: DivergenceStage, context: Context, tokenizer: object) -> TraceReader:
    """Open the teacher's traces. Raises UserError if the model cannot be measured on them."""
    where = f"stages.{context.name}.data: {config.data!r}"
    reader = open_traces(context.data_path(config.data))
    metadata = reader.metadata
    models.check_same_tokenizer(metadata.tokenizer, metadata.vocab_size, tokenizer, f"stages.{context.name}")
    if metadata.top_k == 0:
        raise UserError(f"{where} stores no distributions; generate with top_logprobs above 0.")
    if metadata.source:
        raise UserError(
            f"{where} was scored by {metadata.model!r} and written by another model ({metadata.source}): its tokens are no draws from "
            "the teacher. Generate traces with the teacher."
        )
    if metadata.sampling.temperature != 1.0 or metadata.sampling.top_p != 1.0 or metadata.logprob_temperature != 1.0:
        raise UserError(
            f"{where} was not sampled from the teacher's own distribution; generate with temperature and top_p 1."
        )
    if reader.selected is not None:
        raise UserError(
            f"{where} is a selection: its tokens are no longer draws from the teacher. Name the traces that it was selected from."
        )
    if reader.num_rows < 2:
        raise UserError(f"{where} has {reader.num_rows} traces; an interval needs at least two.")
    return reader


def measuring_module(model_name: str, dtype: str, reader: TraceReader, context: Context) -> StudentModule:
    """Load a model of the recipe for `token_measures` on traces of its tokenizer; its forward pass is proven first."""
    folder, trust = context.model_dir(model_name), context.trusts(model_name)
    context.phase(f"loading {model_name}")
    model = models.load(folder, dtype=dtype, trust_remote_code=trust).eval().requires_grad_(False)
    model.to(world.device())
    models.without_dropout(model)
    tokenizer = models.load_tokenizer(folder, trust_remote_code=trust)
    vocab_size = models.vocabulary_size(tokenizer, models.config_of(folder))
    lengths = reader.lengths()
    plan = prove_forward(model, model_name, vocab_size, context, int((lengths.prompt + lengths.completion).max()))
    return StudentModule(model, StoredObjective(divergences_of, divergences_of_token), vocab_size, plan=plan).eval()


def measured(module: StudentModule, reader: TraceReader, micro_tokens: int) -> Iterator[TraceSums]:
    """Yield the sums of the traces, block by block."""
    for block in reader.blocks(BLOCK_ROWS, COLUMNS):
        for numbers, each in token_measures(module, block, micro_tokens):
            trace_ids = tuple(block.trace_id[n] for n in numbers)
            yield trace_sums(trace_ids, [block.logprob[n] for n in numbers], each)


def token_measures(
    module: StudentModule, block: Traces, micro_tokens: int
) -> Iterator[tuple[list[int], dict[str, Array]]]:
    """Yield, for some of a block's rows at a time, (the rows, `divergences_of_token` of their tokens, [T] of all rows in turn)."""
    device = world.device()
    rows_of = {trace_id: n for n, trace_id in enumerate(block.trace_id)}
    for batch in pack(list(examples_of(block)), micro_tokens=micro_tokens):
        rows = torch.from_numpy(batch.weight_T.nonzero()[0]).to(device)
        with torch.no_grad():
            measures = module(batch.to_torch(device), rows).measures
        each = {name: value.double().cpu().numpy() for name, value in measures.items()}
        yield [rows_of[trace_id] for trace_id in batch.trace_ids], each


def trace_sums(trace_ids: tuple[str, ...], logprob: list[Array], each: dict[str, Array]) -> TraceSums:
    """Add up each trace's tokens. logprob: the teacher's log-probability of the tokens; each: [T] of all traces in turn."""
    teacher_T = np.concatenate(logprob).astype(np.float64)
    outside_T = np.where(each["label_kept"] > 0, 0.0, teacher_T + each["label_nll"])
    tokens_N = np.array([len(row) for row in logprob])
    starts_N = np.concatenate([[0], np.cumsum(tokens_N)[:-1]])

    def total(value_T: Array) -> Array:
        return np.where(tokens_N > 0, np.add.reduceat(np.append(value_T, 0.0), starts_N), 0.0)

    return TraceSums(
        trace_id=list(trace_ids),
        tokens_N=tokens_N,
        sums={
            "kl": total(each["inside"] + outside_T),
            "bound": total(each["bound"]),
            "label_nll": total(each["label_nll"]),
            "overconfidence": total(each["confidence"] - each["hit"]),
        },
    )


def divergences_of(student: Student, targets: Targets) -> Tensor:
    """KL(p || q) over the kept entries and the rest as one outcome, nats [T]."""
    return divergences.forward_kl(*outcomes(student, targets))


def divergences_of_token(student: Student, targets: Targets) -> dict[str, Tensor]:
    """What is measured at a token, [T] each.

    inside: the part of the KL over the kept entries. bound: with all other tokens as one outcome. label_kept: 1 where the trace's
    token is among the kept. confidence: the student's highest probability. hit: 1 where the trace's token has it.
    """
    ids_TK, logp_TK = targets.teacher_ids_TK, targets.teacher_logp_TK
    assert ids_TK is not None, "traces without distributions are refused"
    assert logp_TK is not None, "traces without distributions are refused"
    kept_TK = logp_TK > -torch.inf
    logq_TK = torch.where(kept_TK, student.top_TK, 0.0)
    inside_T = torch.where(kept_TK, logp_TK.exp() * (logp_TK - logq_TK), 0.0).sum(1)
    highest_T = torch.where(kept_TK, student.top_TK, -math.inf).amax(1).maximum(student.best_outside_T)
    return {
        "inside": inside_T,
        "bound": divergences_of(student, targets),
        "label_nll": -student.label_T,
        "label_kept": ((ids_TK == targets.label_T[:, None]) & kept_TK).any(1).to(inside_T.dtype),
        "confidence": highest_T.exp(),
        "hit": (student.label_T >= highest_T).to(inside_T.dtype),
    }
