"""The Triton kernels compiled for two generations of GPUs, without one: they fit the registers."""

from __future__ import annotations

import re
import subprocess

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")

POINTERS = {"e_ptr": "*bf16", "ids_ptr": "*i64"}


def compiled(kernel, capability: int, constants: dict[str, object], tmp_path) -> str:
    """Return ptxas's report on a kernel's registers and spills."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    kinds = {name: POINTERS.get(name, "*fp32") if name.endswith("_ptr") else "i32" for name in names}
    kinds |= {"scale": "fp32"} if "scale" in names else {}
    kinds |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, signature=kinds, constexprs=constants)
    # An old version of PTX, which every ptxas reads.
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8, "ptx_version": 84})
    listing = tmp_path / "kernel.ptx"
    listing.write_text(made.asm["ptx"])
    (target,) = re.findall(r"\.target (\w+)", made.asm["ptx"])
    command = [triton.knobs.nvidia.ptxas.path, "-v", f"--gpu-name={target}", str(listing), "-o", str(tmp_path / "out")]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("name", "constants"),
    [
        ("soften", {"HAS_BIAS": False, "IDS": 128, "BLOCK": 8192}),
        ("soften", {"HAS_BIAS": True, "IDS": 256, "BLOCK": 8192}),
        ("rescale", {"BLOCK": 8192}),
        ("multiply", {"BLOCK": 4096}),
    ],
)
def test_no_register_is_spilled(name, constants, capability, tmp_path):
    from triton.runtime.jit import JITFunction

    from distill.training.loss.kernels import triton_source

    kernel = getattr(triton_source, name)
    if not isinstance(kernel, JITFunction):
        pytest.skip("Triton interprets in this process")
    if not getattr(triton.knobs.nvidia.ptxas, "path", None):
        pytest.skip("this Triton brings no ptxas")
    said = compiled(kernel, capability, constants, tmp_path)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", said)
    assert spills, said
    assert set(spills) == {"0"}, said
