"""The two ways of attention on a GPU, on a CPU: what they hand to the kernels gives the padded blocks' numbers.

Flash attention is a reference in plain torch that takes the same arguments; FlexAttention runs as torch's own unfused
implementation. Outputs and gradients, in float64; the padded blocks compute soft caps and sinks in float32.
"""

from __future__ import annotations

from types import SimpleNamespace

import flash_in_torch
import numpy as np
import pytest
import torch
from tiny_architectures import build
from torch.nn.attention import flex_attention

from distill.training import attention, gpu_attention
from distill.training.attention import Layout, packed_attention
from distill.training.gpu_attention import Scores, flash_size, seen_blocks
from distill.training.loss.objective import StoredObjective
from distill.training.loss.sparse import cross_entropy
from distill.training.packing import Example, pack
from distill.training.policy import StudentModule

LENGTHS = [5, 40, 1, 150, 7, 64, 29, 1, 33, 20, 12]
PARENTS = [-1, 9, 9, -1, 10, 10, -1, 10, -1, -1, 9]


@pytest.fixture
def flash(monkeypatch):
    """Flash attention in plain torch; the calls that it gets."""
    calls = []

    def called(*args, **kwargs):
        calls.append(kwargs)
        return flash_in_torch.flash_attention_forward(*args, **kwargs)

    aten = SimpleNamespace(_flash_attention_forward=called)
    monkeypatch.setattr(gpu_attention, "torch", _With(torch, ops=SimpleNamespace(aten=aten)))
    monkeypatch.setattr(gpu_attention.torch, "cuda", SimpleNamespace(get_device_capability=lambda device: (8, 0)))
    monkeypatch.setattr(attention, "takes_flash", lambda query, value, shape: shape.plain)
    return calls


@pytest.fixture
def flex(monkeypatch):
    """FlexAttention without a compiler; on a CPU torch allows no gradients through it, though its arithmetic has them."""
    calls = []

    def called(*args, **kwargs):
        calls.append(kwargs)
        return flex_attention.flex_attention(*args, **kwargs)

    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    monkeypatch.setattr(gpu_attention, "flex_attention", called)
    monkeypatch.setattr(attention, "takes_flex", lambda query, value, shape: True)
    return calls


class _With:
    """A module with some attributes replaced."""

    def __init__(self, module, **replaced):
        self.__dict__.update(replaced)
        self._module = module

    def __getattr__(self, name):
        return getattr(self._module, name)


def inputs(*, shared, heads=4, groups=2, size=24, value_size=None, sinks=False):
    offsets = torch.tensor([0, *np.cumsum(LENGTHS)])
    layout = Layout.of(offsets, torch.tensor(PARENTS) if shared else None)
    torch.manual_seed(0)
    T = int(offsets[-1])
    shapes = ((heads, size), (groups, size), (groups, value_size or size))
    tensors = [torch.randn(1, n, T, d, dtype=torch.float64) for n, d in shapes]
    return layout, [*tensors, *([torch.randn(heads, dtype=torch.float64)] if sinks else [])]


def attended(layout, tensors, **options):
    """The output and the gradients of queries, keys, values and sinks."""
    leaves = [x.clone().requires_grad_() for x in tensors]
    out, _ = packed_attention(
        SimpleNamespace(), *leaves[:3], None, layout=layout, s_aux=leaves[3] if len(leaves) > 3 else None, **options
    )
    torch.manual_seed(1)
    out.backward(torch.randn(out.shape, dtype=out.dtype))  # not randn_like, which follows the strides
    return [out.detach(), *(x.grad for x in leaves)]


def near(mine, theirs, most=1e-10):
    """The distance, relative to the norm."""
    for a, b in zip(mine, theirs, strict=True):
        assert (a - b).norm() <= most * b.norm().clamp(min=1e-6)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("window", [None, 1, 8, 33, 170])
def test_flash_gets_the_windows_and_prefixes_of_the_padded_blocks(shared, window, flash, monkeypatch):
    layout, tensors = inputs(shared=shared)
    mine = attended(layout, tensors, sliding_window=window)
    assert len(flash) == 1
    assert ("window_size_left" in flash[0]) == (window in (1, 8, 33))  # no window where all docs are shorter
    monkeypatch.setattr(attention, "takes_flash", lambda *_: False)
    near(mine, attended(layout, tensors, sliding_window=window))
    assert len(flash) == 1


@pytest.mark.parametrize(("size", "value_size"), [(24, 16), (16, 24), (20, 20), (9, 3)])
def test_flash_gets_sizes_that_it_has(size, value_size, flash, monkeypatch):
    layout, tensors = inputs(shared=True, size=size, value_size=value_size)
    mine = attended(layout, tensors, sliding_window=50)
    assert len(flash) == 1
    monkeypatch.setattr(attention, "takes_flash", lambda *_: False)
    near(mine, attended(layout, tensors, sliding_window=50))


def test_the_arguments_are_those_of_the_operator():
    """What the reference takes is in the signature of the real operator, in its order."""
    (schema,) = (
        getattr(torch.ops.aten._flash_attention_forward, name)._schema
        for name in torch.ops.aten._flash_attention_forward.overloads()
        if name == "default"
    )
    real = [argument.name for argument in schema.arguments]
    ours = flash_in_torch.flash_attention_forward.__code__
    names = ours.co_varnames[: ours.co_argcount + ours.co_kwonlyargcount]
    assert real[: len(names)] == list(names)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("window", [None, 1, 33])
@pytest.mark.parametrize(("softcap", "sinks"), [(3.0, False), (None, True), (3.0, True)])
def test_flex_equals_the_padded_blocks(shared, window, softcap, sinks, flex, monkeypatch):
    layout, tensors = inputs(shared=shared, sinks=sinks)
    mine = attended(layout, tensors, sliding_window=window, softcap=softcap, scaling=0.7)
    assert len(flex) == 1
    monkeypatch.setattr(attention, "takes_flex", lambda *_: False)
    near(mine, attended(layout, tensors, sliding_window=window, softcap=softcap, scaling=0.7), most=1e-6)


@pytest.mark.parametrize("size", [16, 7, 128])
@pytest.mark.parametrize("window", [None, 1, 33])
def test_no_seen_block_is_left_out(size, window):
    """Against the mask by token, made from each doc's own list of tokens."""
    layout, _ = inputs(shared=True)
    T = sum(LENGTHS)
    seen_TT = torch.zeros(T, T, dtype=torch.bool)
    for doc, num in enumerate(LENGTHS):
        tokens = layout.tokens(doc)
        for n in range(num):
            last = len(tokens) - num + n + 1
            seen_TT[tokens[last - 1], tokens[:last] if window is None else tokens[max(0, last - window) : last]] = True
    mask = gpu_attention._mask(layout, window)
    at = torch.arange(T)
    assert torch.equal(mask.mask_mod(None, None, at[:, None], at[None]), seen_TT)
    num = -(-T // size)
    padded = torch.zeros(num * size, num * size, dtype=torch.bool)
    padded[:T, :T] = seen_TT
    needed = padded.view(num, size, num, size).any(3).any(1)
    named = seen_blocks(layout, size, window)
    assert not (needed & ~named).any()
    assert named.sum() <= 1.35 * needed.sum()


def test_sizes_of_the_flash_kernels():
    assert [flash_size(n, n, (8, 0)) for n in (64, 100, 192, 256, 257)] == [64, 104, 192, 256, None]
    assert flash_size(192, 128, (9, 0)) == 192
    # No backward pass for (192, 224] on cards with little shared memory, and none with dropout above 192.
    assert [flash_size(n, n, (8, 9)) for n in (192, 200, 224, 256)] == [192, 232, 232, 256]
    assert flash_size(256, 256, (12, 0), dropout=0.1) is None
    assert flash_size(256, 256, (9, 0), dropout=0.1) == 256


def test_a_cpu_takes_neither():
    _, (query, _, value, sinks) = inputs(shared=False, sinks=True)
    for dtype in (torch.float64, torch.bfloat16):
        q, v = query.to(dtype), value.to(dtype)
        assert not gpu_attention.takes_flash(q, v, Scores(1.0))
        assert not gpu_attention.takes_flex(q, v, Scores(1.0, sinks=sinks))


def _examples():
    rng = np.random.default_rng(0)
    shared, made = rng.integers(0, 500, 24), []
    for n, (prompt, completion) in enumerate(((40, 9), (44, 17), (5, 30), (70, 12))):
        ids = rng.integers(0, 500, prompt + completion)
        if n < 2:
            ids[:24] = shared
        made.append(Example(str(n), ids[:prompt], ids[prompt:]))
    return made


@pytest.mark.parametrize("model_type", ["gemma2", "gpt_oss", "gemma3_text", "mistral", "deepseek_v3"])
def test_models_have_the_same_loss_and_gradients(model_type, flash, flex, monkeypatch):
    """With soft caps, sinks, windows, and values smaller than keys; packed docs, two with a shared prefix."""
    (batch,) = pack(_examples(), micro_tokens=4096)
    assert batch.parent.max() >= 0
    rows = torch.from_numpy(batch.weight_T.nonzero()[0])
    found = []
    monkeypatch.setattr(attention, "takes_flex", lambda query, value, shape: not shape.plain)
    for on_gpu in (True, False):
        if not on_gpu:
            assert flash or flex
            monkeypatch.setattr(attention, "takes_flash", lambda *_: False)
            monkeypatch.setattr(attention, "takes_flex", lambda *_: False)
        model = build(model_type, 512)
        out = StudentModule(model, StoredObjective(cross_entropy), 500)(batch.to_torch(), rows)
        out.loss.backward()
        found.append([out.loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert {"gemma2": flex, "gpt_oss": flex}.get(model_type, flash)
    near(*found, most=2e-4)


@pytest.mark.slow
def test_the_masks_and_scores_compile(monkeypatch):
    """On a CPU torch compiles FlexAttention for inference, without sinks: the functions that a GPU's kernel is made of."""
    torch._dynamo.reset()
    monkeypatch.setattr(gpu_attention, "flex_attention", torch.compile(flex_attention.flex_attention, fullgraph=True))
    layout, tensors = inputs(shared=True, size=32)
    query, key, value = (x.float() for x in tensors)
    mine = gpu_attention.by_flex(query, key, value, layout, Scores(0.2, softcap=3.0), 33)
    options = {"sliding_window": 33, "softcap": 3.0, "scaling": 0.2}
    near([mine], [packed_attention(SimpleNamespace(), query, key, value, None, layout=layout, **options)[0]], most=1e-5)
