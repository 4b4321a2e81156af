"""The forward pass of a model in the trainer: how a packed batch is laid out for it, and how its logits are formed.

A `ForwardPlan` says both. `prove` finds the plan of a model by comparison with the model's own plain forward pass, one
document at a time. So architectures whose layers mix packed documents (convolutions, state-space and linear-attention
layers), or whose logits are scaled or capped in a way that the config's known keys do not show, are computed correctly or
refused.

    packed   all documents of a batch end to end, shared prompt prefixes computed once (`attention`)
    rows     every trace a row of a padded batch, with the model's own attention
    single   every trace alone
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.models.prune import decoder_layers
from distill.training.attention import PACKED, Layout
from distill.training.batch import Batch
from distill.training.layer_outputs import LayerOutputs
from distill.training.loss.kernels import HeadForm

LayoutName = Literal["packed", "rows", "single"]

EXACT, ROUNDED = 1e-4, 5e-3
"""Relative errors below which logits count as a multiple of the output head's product: in float32, and in bfloat16."""
WASTE = 2
"""A row of a padded batch is at most this many times as long as the shortest one."""


@dataclass(frozen=True, slots=True)
class ForwardPlan:
    """How the trainer computes a model. form: how logits follow from the output head's product."""

    form: HeadForm
    layout: LayoutName = "packed"

    @staticmethod
    def of(model: Any, vocab_size: int) -> ForwardPlan:
        """Return the plan of a Llama-like model, whose scale and cap stand in its config under known keys."""
        return ForwardPlan(HeadForm.of(base_model(model).config.get_text_config(), vocab_size))

    def apply(self, model: Any) -> None:
        """Set the attention implementation that the layout needs."""
        if self.layout == "packed":
            base_model(model).set_attn_implementation(PACKED)

    def hidden(self, model: Any, batch: Batch, rows: Tensor, outputs: LayerOutputs | None = None) -> Tensor:
        """Return the last hidden states [rows, D] at `rows` (positions of the packed batch).

        outputs: filled with those of the layers that it names, at the same rows.
        """
        wanted = outputs or LayerOutputs(())
        if self.layout == "packed":
            found = [state.index_select(0, rows) for state in _packed(model, batch, wanted)]
        else:
            found = _by_rows(model, batch, rows, wanted, alone=self.layout == "single")
        last, *wanted.rows = found
        return last


def base_model(model: Any) -> Any:
    """Return the model inside an adapter, or the model itself."""
    return model.get_base_model() if is_adapted(model) else model


def decoder_of(model: Any) -> Any:
    """Return the part of a model that gives the last hidden states, without the output head."""
    base = base_model(model)
    decoder = base.get_decoder()
    if decoder is base:
        decoder = next(
            (getattr(base, name) for name in ("model", "transformer", "backbone") if hasattr(base, name)), base
        )
    return decoder


def is_adapted(model: Any) -> bool:
    """Return whether a model is wrapped by peft."""
    return hasattr(model, "get_base_model")


def _packed(model: Any, batch: Batch, wanted: LayerOutputs) -> list[Tensor]:
    """Compute all documents of a batch end to end; return the last hidden states and the wanted layers', [T, D] each."""
    with wanted.recorded(_layers(model, wanted)) as states:
        last: Tensor = decoder_of(model)(
            input_ids=batch.ids_T[None],
            position_ids=batch.position_T[None],
            use_cache=False,
            layout=Layout.of(batch.doc_offsets, batch.parent, batch.ids_T.device),
        ).last_hidden_state
    return [state[0] for state in (last, *states)]


def _layers(model: Any, wanted: LayerOutputs) -> Sequence[Any]:
    """Return a model's decoder layers, if any is wanted."""
    return decoder_layers(base_model(model)) if wanted.layers else ()


def _by_rows(model: Any, batch: Batch, rows: Tensor, outputs: LayerOutputs, *, alone: bool) -> list[Tensor]:
    """Compute each trace, its shared prefixes included, as a row of its own.

    Returns the last hidden states and the wanted layers', [rows, D] each.

    Rows are padded at the right, where a causal model's earlier positions do not see it.
    """
    layout = Layout.of(batch.doc_offsets, batch.parent, batch.ids_T.device)
    doc_R = torch.searchsorted(layout.starts, rows.cpu(), right=True) - 1
    place_R = rows.cpu() - layout.starts[doc_R] + layout.before[doc_R]
    wanted: dict[int, list[int]] = {}
    for n, doc in enumerate(doc_R.tolist()):
        wanted.setdefault(doc, []).append(n)
    decoder = decoder_of(model)
    parts: list[list[Tensor]] = [[] for _ in range(1 + len(outputs.layers))]
    order: list[int] = []
    for docs in _groups({doc: int(layout.lengths[doc] + layout.before[doc]) for doc in wanted}, alone):
        ids = [batch.ids_T[layout.tokens(doc)] for doc in docs]
        width = max(map(len, ids))
        ids_BL = torch.stack([F.pad(each, (0, width - len(each))) for each in ids])
        with outputs.recorded(_layers(model, outputs)) as states:
            out_BLD = decoder(input_ids=ids_BL, use_cache=False).last_hidden_state
        for b, doc in enumerate(docs):
            places = place_R[wanted[doc]].to(rows.device)
            for part, state_BLD in zip(parts, (out_BLD, *states), strict=True):
                part.append(state_BLD[b].index_select(0, places))
            order += wanted[doc]
    if not order:
        weight: Tensor = base_model(model).get_output_embeddings().weight
        return [weight.new_zeros(0, weight.shape[1]) for _ in parts]
    back = torch.empty(len(order), dtype=torch.long)
    back[torch.tensor(order)] = torch.arange(len(order))
    return [torch.cat(part).index_select(0, back.to(rows.device)) for part in parts]


def _groups(lengths: dict[int, int], alone: bool) -> Iterator[list[int]]:
    """Yield documents of similar length, shortest first; each alone if so wanted."""
    group: list[int] = []
    for doc in sorted(lengths, key=lambda doc: lengths[doc]):
        if group and (alone or lengths[doc] > WASTE * lengths[group[0]]):
            yield group
            group = []
        group.append(doc)
    if group:
        yield group


# -------------------------------------------------------------------------------------------------- proof


class NotProvenError(Exception):
    """No plan gives the model's own log-probabilities; the message says what was tried."""


@dataclass(frozen=True, slots=True)
class Proof:
    """A plan, and why faster layouts were rejected: (layout, reason), in the order tried."""

    plan: ForwardPlan
    rejected: tuple[tuple[LayoutName, str], ...] = ()


class _Capture:
    """Keeps the output head's input and output, and the decoder's hidden states, of one forward pass."""

    hidden: Tensor
    before: Tensor
    after: Tensor

    def decoder(self, module: Any, args: Any, out: Any) -> None:
        self.hidden = out.last_hidden_state if hasattr(out, "last_hidden_state") else out[0]

    def head(self, module: Any, args: Any, out: Tensor) -> None:
        self.before, self.after = args[0], out


@contextlib.contextmanager
def plain_copy(model: Any, exact: bool) -> Iterator[Any]:
    """Give a model for the proof in evaluation mode: a float32 copy if `exact`, else the model itself; both restored."""
    if exact:
        yield copy.deepcopy(model).float().eval()
        return
    training, attention = model.training, base_model(model).config._attn_implementation
    model.eval()
    try:
        yield model
    finally:
        model.train(training)
        base_model(model).set_attn_implementation(attention)


@torch.no_grad()
def prove(
    model: Any, vocab_size: int, batch: Batch, tolerance: float, *, allowed: tuple[LayoutName, ...] = ("packed", "rows")
) -> Proof:
    """Find the first layout that gives the model's own label log-probabilities on a batch, with the form of its logits.

    model: in evaluation mode; its attention implementation is changed. batch: tensors on the model's device. tolerance:
    nats, by which at most one label in twenty may differ (a router's or a threshold's rounding may move single tokens).
    Raises NotProvenError if no layout does, or the logits are formed in a way that is not supported.
    """
    from distill.training.policy import label_logp

    rows = batch.weight_T.nonzero()[:, 0]
    form, own_T = _plain(model, vocab_size, batch, rows)
    rejected: list[tuple[LayoutName, str]] = []
    for layout in (*allowed, "single"):
        plan = ForwardPlan(form, layout)
        own_attention = base_model(model).config._attn_implementation
        try:
            plan.apply(model)
            found_T = label_logp(model, plan, batch, rows).to(own_T)
        # Any layer of any architecture may raise anything when it is called in another way than its authors do.
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            rejected.append((layout, reason))
        else:
            gap_T = (found_T - own_T).abs()
            if bool(torch.isfinite(gap_T).all()) and float(gap_T.quantile(0.95)) <= tolerance:
                return Proof(plan, tuple(rejected))
            rejected.append((layout, f"log-probabilities differ by {float(gap_T.mean()):.2g} nats on average"))
        base_model(model).set_attn_implementation(own_attention)
    raise NotProvenError("; ".join(f"{layout}: {reason}" for layout, reason in rejected))


def _plain(model: Any, vocab_size: int, batch: Batch, rows: Tensor) -> tuple[HeadForm, Tensor]:
    """Return the form of the logits, and the labels' log-probabilities by the model's own forward pass, float32."""
    layout = Layout.of(batch.doc_offsets, batch.parent, batch.ids_T.device)
    doc_R = torch.searchsorted(layout.starts, rows.cpu(), right=True) - 1
    logp_R = torch.empty(len(rows), device=rows.device)
    head = base_model(model).get_output_embeddings()
    if head is None or getattr(head, "weight", None) is None or head.weight.dim() != 2:
        raise NotProvenError("the model has no linear output head")
    vocab, capture, forms = min(vocab_size, head.weight.shape[0]), _Capture(), []
    hooks = [
        head.register_forward_hook(capture.head),
        decoder_of(model).register_forward_hook(capture.decoder),
    ]
    try:
        for doc in sorted(set(doc_R.tolist())):
            tokens = layout.tokens(doc)
            logits = base_model(model)(input_ids=batch.ids_T[tokens][None], use_cache=False).logits[0]
            forms.append(_form(base_model(model).config, capture, logits, vocab))
            chosen = (doc_R == doc).nonzero()[:, 0].to(rows.device)
            if not forms[1:]:
                _check_causal(model, batch.ids_T[tokens][None], logits)
            place = rows[chosen] - int(layout.starts[doc]) + int(layout.before[doc])
            logp = logits[place, :vocab].float().log_softmax(-1)
            logp_R[chosen] = logp.gather(1, batch.label_T[rows[chosen], None])[:, 0]
    finally:
        for hook in hooks:
            hook.remove()
    return forms[0], logp_R


def _check_causal(model: Any, ids_1T: Tensor, logits_TV: Tensor) -> None:
    """Raise NotProvenError if a document's last token changes the predictions at earlier ones."""
    other_1T = ids_1T.clone()
    other_1T[0, -1] = (other_1T[0, -1] + 1) % 7
    other_TV = base_model(model)(input_ids=other_1T, use_cache=False).logits[0]
    gap = (other_TV[:-1] - logits_TV[:-1]).abs().float()
    if float(gap.median()) > ROUNDED * float(logits_TV[:-1].abs().float().mean()):
        raise NotProvenError("it is not causal: a token's prediction depends on later tokens")


def _form(config: Any, capture: _Capture, logits: Tensor, vocab: int) -> HeadForm:
    """Find how logits follow from the hidden states: a scale, a soft cap, or nothing. Raises NotProvenError otherwise."""
    if capture.before.shape[-1] != capture.hidden.shape[-1]:
        raise NotProvenError("the output head reads something else than the last hidden states")
    numbers = _numbers(config)
    inner = _scale(capture.hidden[:, -capture.before.shape[1] :], capture.before, numbers)
    if inner is None:
        raise NotProvenError("a layer between the last hidden states and the output head is not known here")
    raw, final = capture.after[0, :, :vocab].float(), logits[:, :vocab].float()
    outer = _scale(raw, final, numbers)
    rounding = EXACT if logits.dtype in (torch.float32, torch.float64) else ROUNDED
    if outer is not None and outer[1] < rounding:
        return HeadForm(vocab, inner[0] * outer[0])
    capped: list[tuple[float, HeadForm]] = []
    largest = float(final.abs().max())
    for cap in (number for number in numbers if number > largest * 0.99):
        near = final.abs() < 0.9 * cap
        scale = _scale(raw[near], torch.atanh(final[near] / cap) * cap, numbers)
        if scale is not None:
            gap = float((cap * torch.tanh(scale[0] * raw / cap) - final).abs().mean())
            capped.append((gap, HeadForm(vocab, inner[0] * scale[0], cap)))
    gap, form = min(capped, key=lambda each: each[0], default=(torch.inf, None))
    if form is not None and gap < 0.01 * float(final.abs().mean()):
        return form
    raise NotProvenError("the logits are neither a multiple nor a soft-capped multiple of the output head's product")


def _scale(x: Tensor, y: Tensor, numbers: set[float]) -> tuple[float, float] | None:
    """Return (a, relative error) with y = a x, a number of the config if one fits; None if there is no such a."""
    x, y = x.double().flatten(), y.double().flatten()
    fitted = float(x @ y / (x @ x).clamp(min=1e-30))
    error = float((y - fitted * x).norm() / y.norm().clamp(min=1e-30))
    if not error < 10 * ROUNDED:
        return None
    near = [number for number in numbers if abs(number - fitted) <= max(1e-4, error) * abs(fitted)]
    return min(near, key=lambda number: abs(number - fitted), default=fitted), error


def _numbers(config: Any) -> set[float]:
    """Return 1, and the numbers that a config holds, their inverses and the ratios of its sizes."""
    found = {1.0}
    sizes = []
    for text in (config, config.get_text_config()):
        for value in text.to_dict().values():
            if isinstance(value, int | float) and not isinstance(value, bool) and value and abs(value) < 1e6:
                found |= {float(value), 1 / float(value)}
                sizes.append(float(value))
    width = getattr(config.get_text_config(), "hidden_size", None)
    return found | ({size / width for size in sizes} if width else set())


def with_vocab(plan: ForwardPlan, vocab_size: int) -> ForwardPlan:
    """Return the plan for a tokenizer of another length."""
    return replace(plan, form=replace(plan.form, vocab_size=vocab_size))
