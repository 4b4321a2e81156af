"""Repair a pruned model in closed form: fit its output projections to the hidden states of the whole model.

In: the whole model's hidden states on a probe, and the pruned model. Out: changed weights in place.

A pruned model differs from the whole one at known places: before each gap, where layers are missing, and in every layer whose
width was cut. There the matrix that writes into the residual stream (down_proj of the MLP, or o_proj of the attention) is fit
anew, from the lowest layer up, so that the stream after it is the whole model's stream at the same place. Errors of the layers
below are seen by the fit, and corrected.

The fit is a ridge regression around the present weights W: of X (the matrix's input), R (what the stream lacks) and strength s,
    D = argmin sum_t w_t |R_t - D x_t|^2 + s m |D|^2,    m = the mean diagonal entry of sum_t w_t x_t x_t',
and W + D is the new matrix. The weight w_t of a token is 1 / |stream|^2, because the RMSNorm that reads the stream divides by
its size; else the few tokens of very large states (attention sinks) would decide the fit.

Shapes: N rows of T tokens, M tokens of all rows without padding, H the hidden size, I a matrix's input size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from distill.models.prune import decoder_layers
from distill.models.prune_probe import Probe, hidden_states, mean_kl, prepare, run_layer
from distill.records import UserError

HELD = 4
"""Every HELD-th trace chooses the strength; the others are fit."""
STRENGTHS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Ridge strengths, of which held-out positions choose one."""
CLOSE = 1e-3
"""Relative difference by which a layer's output may differ from a sum of its parts."""
DOWN = ("mlp.down_proj", "mlp.fc2", "mlp.c_proj", "mlp.dense_4h_to_h", "feed_forward.w2", "fc2")
"""Places of the matrix by which the MLP writes into the residual stream, in a layer."""


@dataclass(frozen=True, slots=True)
class Repair:
    """The outcome of a repair. strength: the ridge strength that was chosen; None = no fit was better than none.

    before, after: mean KL in nats on the held-out positions, without and with the repair. fitted: the layers of the pruned
    model whose matrices were fit.
    """

    strength: float | None
    before: float
    after: float
    fitted: tuple[int, ...]


def down_projection(layer: Any, name: str = "") -> Any:
    """Return the matrix by which a layer's MLP writes into the residual stream. Raises UserError if it is not found."""
    import torch

    for path in DOWN:
        found = layer
        for part in path.split("."):
            found = getattr(found, part, None)
        if isinstance(found, torch.nn.Linear):
            return found
    raise UserError(
        f"repair: {name or type(layer).__name__} has no matrix of a known name that its MLP ends in ({', '.join(DOWN)}), so it cannot "
        "be repaired in closed form. Set repair: false; training repairs it too."
    )


def check_repairable(model: Any, probe: Probe) -> None:
    """Refuse a model whose MLP ends in no matrix that is known, or does not add that matrix's output to the stream as it is.

    The first layer is run with the matrix, and with twice the matrix: the difference must be the matrix's output.
    """
    matrix = down_projection(decoder_layers(model)[0], type(model).__name__)
    prepare(model, probe)
    batch = probe.batches[0]
    weight = matrix.weight.data.clone()
    with _inputs_and_outputs(matrix) as seen:
        once = run_layer(model, probe, 0, batch, None)
        matrix.weight.data.mul_(2)
        twice = run_layer(model, probe, 0, batch, None)
    matrix.weight.data.copy_(weight)
    added = seen[1][1] - seen[0][1]
    gap = (twice - once - added)[batch.valid_NT].norm() / added[batch.valid_NT].norm()
    if not float(gap) <= CLOSE:
        raise UserError(
            f"repair: {type(model).__name__} does not add its MLP's output to the stream as it is (a norm or a factor is between), so "
            "a linear fit does not repair it. Set repair: false; training repairs it too."
        )


@dataclass(frozen=True, slots=True, eq=False)
class Streams:
    """The whole model's residual stream where the pruned model's layers end: of each of its layers, by batch, [N, T, H].

    after: before the next kept layer, or after the last. middle: between attention and MLP, empty if no width was cut.
    """

    after: Sequence[Sequence[Any]]
    middle: Sequence[Sequence[Any]] = ()

    def at(self, channels: list[int] | None) -> Streams:
        """The streams of some hidden channels; None = all."""
        if channels is None:
            return self
        parts = [[[x_NTH[..., channels] for x_NTH in each] for each in part] for part in (self.after, self.middle)]
        return Streams(*parts)


def streams_of(model: Any, probe: Probe, kept: Sequence[int], *, middle: bool = False) -> Streams:
    """Record the streams of the whole model at the places where its `kept` layers alone will end."""
    layers = decoder_layers(model)
    states = hidden_states(model, probe)
    ends = [*kept[1:], len(layers)]
    between = []
    if middle:
        for index in kept:
            projection = attention_projection(layers[index])
            rows = []
            for batch, hidden_NTH in zip(probe.batches, states[index], strict=True):
                with _inputs_and_outputs(projection) as seen:
                    run_layer(model, probe, index, batch, hidden_NTH)
                rows.append(hidden_NTH + seen[0][1])
            between.append(rows)
    return Streams([states[end] for end in ends], between)


def sites_of(kept: Sequence[int], total: int, *, narrowed: bool) -> list[int]:
    """Return which of the pruned model's layers are fit: those before a gap, or all if widths were cut too."""
    ends = [*kept[1:], total]
    return [n for n, index in enumerate(kept) if narrowed or ends[n] > index + 1]


def repair(
    model: Any,
    probe: Probe,
    held: Probe,
    streams: Streams,
    sites: Sequence[int],
    strengths: Sequence[float] = STRENGTHS,
) -> Repair:
    """Fit the pruned model's matrices at `sites` (its layers) in place, with the strength that is best on the held-out probe."""
    layers = decoder_layers(model)
    matrices = [down_projection(layers[n], type(model).__name__) for n in sites]
    if streams.middle:
        matrices += [attention_projection(layers[n]) for n in sites]
    former = [matrix.weight.data.clone() for matrix in matrices]

    def put(weights: Sequence[Any]) -> None:
        for matrix, weight in zip(matrices, weights, strict=True):
            matrix.weight.data.copy_(weight)

    before = mean_kl(model, held)
    best, strength, chosen = before, None, former
    if sites:
        states = hidden_states(model, probe)[sites[0]]
        for each in strengths:
            _fit_upwards(model, probe, streams, sites, each, states)
            kl = mean_kl(model, held)
            if kl < best:
                best, strength, chosen = kl, each, [matrix.weight.data.clone() for matrix in matrices]
            put(former)
    put(chosen)
    return Repair(strength, before, best, tuple(sites) if strength is not None else ())


def _fit_upwards(
    model: Any, probe: Probe, streams: Streams, sites: Sequence[int], strength: float, states: Sequence[Any]
) -> None:
    """Fit the matrices of one layer after the other. states: before the first of `sites`, by batch."""
    layers = decoder_layers(model)
    rows = list(states)
    for n in range(sites[0], sites[-1] + 1):
        fits = n in sites
        if fits and streams.middle:
            matrix = attention_projection(layers[n])
            seen = _seen(model, probe, n, rows, matrix)
            lacks = [m - h - y for m, h, (_, y) in zip(streams.middle[n], rows, seen.pairs, strict=True)]
            _fit(matrix, probe, [x for x, _ in seen.pairs], lacks, streams.middle[n], strength)
        matrix = down_projection(layers[n]) if fits else None
        seen = _seen(model, probe, n, rows, matrix)
        rows = seen.out
        if matrix is not None:
            lacks = [t - y for t, y in zip(streams.after[n], rows, strict=True)]
            change = _fit(matrix, probe, [x for x, _ in seen.pairs], lacks, streams.after[n], strength)
            # What the layer gives now: its MLP's output is added as it is (`check_repairable`).
            rows = [y + x @ change.T for y, (x, _) in zip(rows, seen.pairs, strict=True)]


@dataclass(frozen=True, slots=True, eq=False)
class _Seen:
    """What a layer did on a probe: out, the stream after it; pairs, one matrix's inputs and outputs."""

    out: list[Any]
    pairs: list[tuple[Any, Any]]


def _seen(model: Any, probe: Probe, index: int, given: Sequence[Any], matrix: Any) -> _Seen:
    out, pairs = [], []
    for batch, hidden_NTH in zip(probe.batches, given, strict=True):
        with _inputs_and_outputs(matrix) as seen:
            out.append(run_layer(model, probe, index, batch, hidden_NTH))
        pairs += seen
    return _Seen(out, pairs)


@contextlib.contextmanager
def _inputs_and_outputs(matrix: Any) -> Iterator[list[tuple[Any, Any]]]:
    """Keep the inputs and outputs of a module inside the context; of None, nothing."""
    seen: list[tuple[Any, Any]] = []
    hook = None if matrix is None else matrix.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    try:
        yield seen
    finally:
        if hook is not None:
            hook.remove()


def _fit(
    matrix: Any, probe: Probe, inputs: Sequence[Any], lacks: Sequence[Any], streams: Sequence[Any], strength: float
) -> Any:
    """Add the ridge solution [H, I] to a matrix in place; return it. inputs [N, T, I], lacks and streams [N, T, H], by batch."""
    import torch

    valid = [batch.valid_NT for batch in probe.batches]
    x_MI = torch.cat([x[v] for x, v in zip(inputs, valid, strict=True)])
    r_MH = torch.cat([r[v] for r, v in zip(lacks, valid, strict=True)])
    size_M1 = torch.cat([s[v] for s, v in zip(streams, valid, strict=True)]).norm(dim=-1, keepdim=True)
    x_MI, r_MH = x_MI / size_M1, r_MH / size_M1
    gram_II = (x_MI.T @ x_MI).double()
    ridge = strength * gram_II.diagonal().mean()
    gram_II.diagonal().add_(ridge)
    change_IH = torch.linalg.solve(gram_II, (x_MI.T @ r_MH).double())
    change_HI = change_IH.T.to(matrix.weight.dtype)
    matrix.weight.data.add_(change_HI)
    return change_HI


def attention_projection(layer: Any) -> Any:
    """Return the matrix by which a layer's attention writes into the residual stream."""
    return layer.self_attn.o_proj
