"""The Triton kernels compiled for several generations of GPUs, without one: they fit registers and shared memory."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")

import ahead_of_time as ahead  # noqa: E402

from distill.training.loss.kernels import HeadForm, fused  # noqa: E402

META = torch.device("meta")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
VOCABULARIES = tuple(2**n for n in range(8, fused.PART.bit_length()))
"""One for every block size from 256 to the largest."""
NUM_IDS = (1, 129, 1025)
"""The label alone, and with the entries of a teacher."""


@pytest.fixture
def kernels(tmp_path):
    from triton.runtime.jit import JITFunction

    from distill.training.loss.kernels import triton_source

    if not isinstance(triton_source.soften, JITFunction):
        pytest.skip("Triton interprets in this process")
    if not getattr(triton.knobs.nvidia.cuobjdump, "path", None):
        pytest.skip("this Triton brings no cuobjdump")
    return ahead.Compiled(triton_source, tmp_path)


def launch(kernels, vocab, num_ids, dtype, *, bias=False, rows=64, tile=fused.TILE):
    """Run the launch code of a chunk's whole life: logits, gradient, and the product with an upstream gradient."""
    weight = torch.empty(vocab, 64, device=META, dtype=dtype)
    head = fused.TritonHeadKernel(weight, weight[:, 0] if bias else None, HeadForm(vocab, scale=0.5), tile)
    head.kernels = kernels
    ids = torch.empty(rows, num_ids, device=META, dtype=torch.long)
    rest = head.rest(torch.empty(rows, 64, device=META, dtype=dtype), ids)
    head.gradient(rest.z_CS, rest.lse_C)
    fused.multiply(weight, rest.lse_C[0], kernels)


def refused(kernels, capability):
    for taken in kernels.taken.values():
        print(capability, *taken)
    return {taken: wrong for taken in kernels.taken.values() if (wrong := taken.excess(capability))}


@pytest.mark.parametrize("capability", ahead.TARGETS)
def test_each_generation_has_room(kernels, capability):
    """Every dtype, a bias, and rows and vocabularies that are multiples of 16 (which Triton compiles apart) and not."""
    dtypes = DTYPES if capability in (80, 90) else DTYPES[1:2]
    with ahead.as_if_on(capability):
        for dtype in dtypes:
            launch(kernels, 49152, 65, dtype)
            launch(kernels, 151643, 65, dtype, bias=True, rows=33)
    names = {taken.kernel for taken in kernels.taken.values()}
    assert names == {"soften", "rescale", "multiply"}
    assert not refused(kernels, capability)


@pytest.mark.parametrize("capability", [80, 90])
def test_every_block_size_has_room(kernels, capability):
    with ahead.as_if_on(capability):
        for vocab in VOCABULARIES:
            launch(kernels, vocab, 17, torch.bfloat16)
    assert not refused(kernels, capability)


@pytest.mark.parametrize("capability", [80, 90])
def test_every_number_of_ids_has_room(kernels, capability):
    with ahead.as_if_on(capability):
        for num in NUM_IDS:
            launch(kernels, 151643, num, torch.bfloat16, bias=True)
    assert not refused(kernels, capability)


def test_too_much_is_noticed(kernels):
    """The check can fail: blocks of eight times the size do not fit the registers."""
    with ahead.as_if_on(80), pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "PART", 65536)
        launch(kernels, 151643, 65, torch.float32, tile=65536)
    assert refused(kernels, 80)
    assert ahead.Resources("k", "", 16, 200, 0, 0).excess(80) == ["102400 registers of a block, at most 65536"]
    assert ahead.Resources("k", "", 8, 32, 100 << 10, 0).excess(89) == ["102400 bytes of shared memory, at most 101376"]
