"""Every kernel compiles ahead of time for NVIDIA and AMD devices, without a GPU and within a budget of spills."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("triton")

# Compiled in a process of its own: here the kernels may have been imported for the interpreter.
COMPILE = r"""
import sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from evabyte import eva_decode_kernels, eva_kernels, eva_summary_kernels
from evabyte.eva_triton import _summary_sizes, decode_sizes, launch_sizes

backend, arch, warp, dtype_name, head_dim, folder = sys.argv[1:]
head_dim = int(head_dim)
target = GPUTarget(backend, int(arch) if arch.isdigit() else arch, int(warp))
dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype_name]
blocks = {**launch_sizes(head_dim, dtype), "D": head_dim}
columns = {**blocks, "BM": blocks["BN"], "BN": max(blocks["BM"] // 2, 16)}
tree = {**decode_sizes(head_dim, dtype, 64), "D": head_dim}
chunks = {**_summary_sizes(16, head_dim), "num_stages": 2}
kernels = {
    "fwd": (eva_kernels.eva_windowed_fwd_kernel, blocks),
    "dq": (eva_kernels.eva_windowed_bwd_dq_kernel, blocks),
    "dkv": (eva_kernels.eva_windowed_bwd_dkv_kernel, {**columns, "IS_SUMMARY": False}),
    "dsummary": (eva_kernels.eva_windowed_bwd_dkv_kernel, {**columns, "IS_SUMMARY": True}),
    "summary_fwd": (eva_summary_kernels.eva_summary_fwd_kernel, chunks),
    "summary_bwd": (eva_summary_kernels.eva_summary_bwd_kernel, chunks),
    "decode": (eva_decode_kernels.eva_decode_fwd_kernel, tree),
}
POINTERS = {
    **dict.fromkeys(["q", "k", "v", "sk", "sv", "o", "do", "dq", "dk", "dv", "dsk", "dsv"], dtype_name),
    **dict.fromkeys(["lse", "delta", "mu", "phi", "dmu", "dphi", "parts"], "fp32"),
    **dict.fromkeys(["first_summary", "first", "open_end"], "i32"),
    "tree": "u8",
}
for name, (kernel, sizes) in kernels.items():
    sizes = dict(sizes)
    options = {"num_warps": sizes.pop("num_warps"), "num_stages": sizes.pop("num_stages")}
    signature = {}
    for parameter in kernel.params:
        at = parameter.name
        if parameter.is_constexpr:
            signature[at] = "constexpr"
        elif at in POINTERS:
            signature[at] = "*" + POINTERS[at]
        else:
            signature[at] = "fp32" if at.startswith("scale") else "i32"
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, (at, kind) in enumerate(signature.items())
        if kind.startswith("*") or at.startswith("stride")
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=sizes, attrs=aligned)
    compiled = triton.compile(source, target=target, options=options)
    code = compiled.asm.get("cubin") or compiled.asm["amdgcn"].encode()
    open(f"{folder}/{name}", "wb").write(code)
    print(name, compiled.metadata.shared)
"""
SHARED_BYTES = {"80": 163 * 1024, "90": 227 * 1024, "gfx942": 64 * 1024}
SPILL_BUDGET = {"80": 128, "90": 128, "gfx942": 180}  # bytes of stack on NVIDIA, registers on AMD


def spills(backend, code):
    if backend == "hip":
        return int(re.search(rb"\.vgpr_spill_count:\s*(\d+)", code.read_bytes())[1])
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    cubin = code.rename(code.with_suffix(".cubin"))
    usage = subprocess.run([cuobjdump, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", usage)[1])


def compile_all(backend, arch, warp, dtype, head_dim):
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", COMPILE, backend, arch, str(warp), dtype, str(head_dim), folder]
        run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "0"})
        assert run.returncode == 0, run.stderr[-3000:]
        for line in run.stdout.splitlines():
            name, shared = line.split()
            assert int(shared) <= SHARED_BYTES[arch], (name, shared)
            found = spills(backend, Path(folder) / name)
            assert found <= SPILL_BUDGET[arch], (name, found)


def test_the_published_shape_on_hopper():
    compile_all("cuda", "90", 32, "bf16", 128)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize(("backend", "arch", "warp"), [("cuda", "80", 32), ("cuda", "90", 32), ("hip", "gfx942", 64)])
def test_every_configuration(backend, arch, warp, dtype, head_dim):
    compile_all(backend, arch, warp, dtype, head_dim)
