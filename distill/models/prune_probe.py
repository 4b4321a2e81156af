"""Measure a model with some of its layers left out, on a few stored positions.

In: a causal model and a `Probe` (token ids of some traces, and the distributions to be matched at some of their positions). Out:
KL divergences, and hidden states before every layer. A model is run from any layer on, from hidden states that were computed
before, through its own forward pass: masks, rotary tables, norms and soft caps are the model's own.

Shapes: N rows (traces) of T tokens, padded at the right, which causal attention never sees from the left; P positions with a
distribution; K entries a position; V the vocabulary; H the hidden size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from distill.models.prune import decoder_layers
from distill.records import Array, TopK, UserError

BATCH_TOKENS = 2048
"""Padded tokens of one batch of a probe."""
BATCH_POSITIONS = 512
"""Positions of one batch of a probe, whose logits are held at the same time."""
OWN_ENTRIES = 64
"""Entries that are kept of a model's own distribution where the traces hold none."""


@dataclass(frozen=True, slots=True, eq=False)
class ProbeTrace:
    """One trace: its prompt, the first tokens of its completion, and their distributions (None if the traces hold none)."""

    prompt_ids: Array
    completion_ids: Array
    top: TopK | None


@dataclass(slots=True, eq=False)
class ProbeBatch:
    """Rows that one forward pass takes.

    ids_NT: token ids. valid_NT: False at the padding. row_P, column_P: the logits that are compared; those at column t are
    about token t + 1. ids_PK, logp_PK, tail_P: the distributions to be matched (log-probabilities, -inf where a position has
    fewer entries); ids beyond them repeat the first.
    """

    ids_NT: Any
    valid_NT: Any
    row_P: Any
    column_P: Any
    ids_PK: Any = None
    logp_PK: Any = None
    tail_P: Any = None

    @property
    def tokens(self) -> int:
        return int(self.valid_NT.sum())


@dataclass(slots=True, eq=False)
class Probe:
    """Batches of traces, and what was computed with them.

    layer_tokens: tokens that passed a layer so far, summed over layers. heads: positions whose logits were computed. tuples: whether the model's layers return tuples; None = not known yet.
    """

    batches: list[ProbeBatch]
    layer_tokens: int = 0
    heads: int = 0
    tuples: bool | None = None

    @property
    def tokens(self) -> int:
        return sum(batch.tokens for batch in self.batches)

    @property
    def positions(self) -> int:
        return sum(len(batch.row_P) for batch in self.batches)


def make_probe(traces: Sequence[ProbeTrace], device: Any = "cpu") -> Probe:
    """Make a probe of traces; the longest first, so that rows of a batch are of similar lengths."""
    ordered = sorted(traces, key=lambda trace: -len(trace.prompt_ids) - len(trace.completion_ids))
    groups: list[list[ProbeTrace]] = []
    for trace in ordered:
        if not groups or not _fits([*groups[-1], trace]):
            groups.append([])
        groups[-1].append(trace)
    return Probe([_batch(group, device) for group in groups])


def _fits(traces: Sequence[ProbeTrace]) -> bool:
    longest = max(len(trace.prompt_ids) + len(trace.completion_ids) for trace in traces)
    positions = sum(len(trace.completion_ids) for trace in traces)
    return longest * len(traces) <= BATCH_TOKENS and positions <= BATCH_POSITIONS


def _batch(traces: Sequence[ProbeTrace], device: Any) -> ProbeBatch:
    import torch

    rows = [np.concatenate([trace.prompt_ids, trace.completion_ids]) for trace in traces]
    ids_NT = np.stack([np.pad(row, (0, max(map(len, rows)) - len(row)), mode="edge") for row in rows]).astype(np.int64)
    valid_NT = np.zeros(ids_NT.shape, bool)
    places = []
    for n, (row, trace) in enumerate(zip(rows, traces, strict=True)):
        valid_NT[n, : len(row)] = True
        first = len(trace.prompt_ids) - 1
        places += [(n, first + t) for t in range(len(trace.completion_ids)) if first + t >= 0]
    row_P, column_P = np.array(places, np.int64).reshape(-1, 2).T
    batch = ProbeBatch(
        *(torch.from_numpy(np.ascontiguousarray(a)).to(device) for a in (ids_NT, valid_NT, row_P, column_P))
    )
    if all(trace.top is not None for trace in traces):
        # A completion without a prompt has no logits about its first token.
        tops = [trace.top.slice(int(len(trace.prompt_ids) == 0), len(trace.top)) for trace in traces if trace.top]
        _set_targets(batch, TopK.concat(tops), device)
    return batch


def _set_targets(batch: ProbeBatch, top: TopK, device: Any) -> None:
    import torch

    width, start_P = top.width, top.offsets[:-1]
    inside_PK = np.arange(width) < np.asarray(top.count_T)[:, None]
    index_PK = start_P[:, None] + np.where(inside_PK, np.arange(width), 0)
    logp_PK = np.where(inside_PK, top.logp_E[index_PK], -np.inf)
    batch.ids_PK = torch.from_numpy(top.ids_E[index_PK].astype(np.int64)).to(device)
    batch.logp_PK = torch.from_numpy(logp_PK.astype(np.float32)).to(device)
    batch.tail_P = torch.from_numpy(np.asarray(top.tail_T, np.float32)).to(device)


def own_targets(model: Any, probe: Probe) -> None:
    """Set the model's own distributions as those to be matched, where the traces hold none."""
    for batch in probe.batches:
        if batch.ids_PK is None:
            logp_PV = _logits(model, probe, batch).log_softmax(-1)
            logp_PK, ids_PK = logp_PV.topk(min(OWN_ENTRIES, logp_PV.shape[-1]), dim=-1)
            _set_targets(batch, TopK.from_dense(ids_PK.cpu().numpy(), logp_PK.cpu().numpy()), batch.ids_NT.device)


def mean_kl(
    model: Any, probe: Probe, skip: Collection[int] = (), start: int = 0, given: Sequence[Any] | None = None
) -> float:
    """Return the mean over positions of KL(target || model) in nats, with the layers `skip` left out.

    given: of each batch the hidden states [N, T, H] before layer `start`; None = from the embeddings on. Entries and tail
    (the mass outside the entries) are buckets, so this is a lower bound of the KL over the whole vocabulary.
    """
    total = 0.0
    for number, batch in enumerate(probe.batches):
        logits_PV = _logits(model, probe, batch, skip, start, None if given is None else given[number])
        total += float(bucket_kl(logits_PV, batch.ids_PK, batch.logp_PK, batch.tail_P).double().sum())
    return total / max(probe.positions, 1)


def bucket_kl(logits_PV: Any, ids_PK: Any, logp_PK: Any, tail_P: Any) -> Any:
    """KL(target || softmax(logits)) [P] on the entries and one bucket for all other tokens.

    The bucket's mass is summed over the other tokens' logits, not taken as 1 minus the entries, which float32 cannot hold.
    """
    logq_PK = logits_PV.gather(1, ids_PK) - logits_PV.logsumexp(-1, keepdim=True)
    inside_PK = logp_PK > -np.inf
    p_PK = logp_PK.exp()
    entries_P = (p_PK * (logp_PK - logq_PK).masked_fill(~inside_PK, 0.0)).sum(1)
    rest_PV = logits_PV.scatter(1, ids_PK, -np.inf)
    logq_tail_P = rest_PV.logsumexp(-1) - logits_PV.logsumexp(-1)
    has_tail_P = (tail_P > -np.inf) & (logq_tail_P > -np.inf)
    tails_P = (tail_P.exp() * (tail_P - logq_tail_P)).masked_fill(~has_tail_P, 0.0)
    return entries_P + tails_P


def hidden_states(model: Any, probe: Probe, skip: Collection[int] = ()) -> list[list[Any]]:
    """Return the hidden states [N, T, H] before each layer and after the last, with `skip` left out: by layer, then batch."""
    layers = decoder_layers(model)
    found: list[list[Any]] = [[] for _ in range(len(layers) + 1)]
    for batch in probe.batches:
        with _replaced(model, probe, skip, 0, None), _watched(layers, found):
            _decode(model, batch)
        probe.layer_tokens += (len(layers) - len(skip)) * batch.tokens
    return found


def run_layer(model: Any, probe: Probe, index: int, batch: ProbeBatch, hidden_NTH: Any) -> Any:
    """Run one layer alone on given hidden states; return its output [N, T, H]."""
    layers = decoder_layers(model)
    found: list[list[Any]] = [[] for _ in range(len(layers) + 1)]
    others = {*range(index + 1, len(layers))}
    with _replaced(model, probe, others, index, hidden_NTH), _watched(layers, found):
        _decode(model, batch)
    probe.layer_tokens += batch.tokens
    return found[index + 1][0]


def _decode(model: Any, batch: ProbeBatch) -> None:
    """Run the model without its output head."""
    import torch

    with torch.no_grad():
        model.get_decoder()(input_ids=batch.ids_NT, use_cache=False)


def _logits(
    model: Any, probe: Probe, batch: ProbeBatch, skip: Collection[int] = (), start: int = 0, hidden_NTH: Any = None
) -> Any:
    """Return the logits [P, V] in float32 at the batch's positions; caps and scales on them are the model's own."""
    import torch

    layers, head = decoder_layers(model), model.get_output_embeddings()
    if head is None:
        raise UserError(f"prune: {type(model).__name__} has no output head to compare with the stored distributions.")

    def at_positions(hidden_NTH: Any) -> Any:
        return type(head).forward(head, hidden_NTH[batch.row_P, batch.column_P][None])

    with torch.no_grad(), _replaced(model, probe, skip, start, hidden_NTH), _forward_of(head, at_positions):
        logits_1PV = model(input_ids=batch.ids_NT, use_cache=False).logits
    probe.layer_tokens += batch.tokens * sum(index >= start and index not in skip for index in range(len(layers)))
    probe.heads += len(batch.row_P)
    return logits_1PV[0].float()


@contextlib.contextmanager
def _forward_of(module: Any, forward: Any) -> Iterator[None]:
    """Replace one module's forward method inside the context."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


@contextlib.contextmanager
def _replaced(model: Any, probe: Probe, skip: Collection[int], start: int, hidden_NTH: Any) -> Iterator[None]:
    """Let layers before `start` and those in `skip` return what they get; the first of them returns `hidden_NTH` if start > 0."""
    prepare(model, probe)

    def returns(hidden_NTH: Any) -> Any:
        def forward(*args: Any, **options: Any) -> Any:
            got = args[0] if args else options["hidden_states"]
            hidden = got if hidden_NTH is None else hidden_NTH
            return (hidden, None) if probe.tuples else hidden

        return forward

    with contextlib.ExitStack() as stack:
        for index, layer in enumerate(decoder_layers(model)):
            if index < start or index in skip:
                stack.enter_context(_forward_of(layer, returns(hidden_NTH if index == 0 and start > 0 else None)))
        yield


def prepare(model: Any, probe: Probe) -> None:
    """Learn what the model's layers return, from a run of two tokens; done once, before anything is watched or replaced."""
    import torch

    if probe.tuples is not None:
        return
    found = []
    layer = decoder_layers(model)[0]
    hook = layer.register_forward_hook(lambda module, args, out: found.append(isinstance(out, tuple | list)))
    try:
        with torch.no_grad():
            model.get_decoder()(input_ids=torch.zeros((1, 2), dtype=torch.long, device=model.device), use_cache=False)
    finally:
        hook.remove()
    probe.tuples = bool(found[0])


@contextlib.contextmanager
def _watched(layers: Any, found: list[list[Any]]) -> Iterator[None]:
    """Keep the input of every layer and the output of the last inside the context."""

    def before(index: int) -> Any:
        def keep(module: Any, args: Any, options: Any) -> None:
            found[index].append(args[0] if args else options["hidden_states"])

        return keep

    def after(module: Any, args: Any, out: Any) -> None:
        found[-1].append(out[0] if isinstance(out, tuple | list) else out)

    hooks = [layer.register_forward_pre_hook(before(n), with_kwargs=True) for n, layer in enumerate(layers)]
    hooks.append(layers[-1].register_forward_hook(after))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
