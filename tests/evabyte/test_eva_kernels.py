"""Every kernel compiles ahead of time for NVIDIA and AMD devices, without a GPU and within a budget of spills."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from evabyte.eva_tuning import TABLES

pytest.importorskip("triton")

# Compiled in a process of its own: here the kernels may have been imported for the interpreter.
COMPILE = r"""
import sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from evabyte import eva_decode_kernels, eva_kernels, eva_summary_kernels
from evabyte.eva_triton import decode_launch, launch, summary_launch
from evabyte.eva_tuning import tuning

device_class, backend, arch, warp, dtype_name, head_dim, folder = sys.argv[1:]
head_dim = int(head_dim)
target = GPUTarget(backend, int(arch) if arch.isdigit() else arch, int(warp))
dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype_name]
tuned = tuning(device_class, dtype.itemsize, head_dim)
columns, chunks = launch(tuned.key_grad, head_dim), {**summary_launch(16, head_dim), "num_stages": 2}
rows = launch(tuned.query_grad, head_dim)
kernels = {
    "fwd": (eva_kernels.eva_windowed_fwd_kernel, launch(tuned.forward, head_dim)),
    "fwd_table": (eva_kernels.eva_windowed_fwd_kernel, launch(tuned.forward, head_dim)),
    "delta": (eva_kernels.eva_delta_kernel, {name: rows[name] for name in rows if name != "BN"}),
    "dq_table": (eva_kernels.eva_windowed_bwd_dq_kernel, rows),
    "dkv_table": (eva_kernels.eva_windowed_bwd_dkv_kernel, {**columns, "IS_SUMMARY": False}),
    "dsummary_table": (eva_kernels.eva_windowed_bwd_dkv_kernel, {**columns, "IS_SUMMARY": True}),
    "summary_fwd_table": (eva_summary_kernels.eva_summary_fwd_kernel, chunks),
    "summary_bwd_table": (eva_summary_kernels.eva_summary_bwd_kernel, chunks),
    "decode": (eva_decode_kernels.eva_decode_fwd_kernel, decode_launch(tuned.decode, head_dim, 64)),
    "decode_one": (eva_decode_kernels.eva_decode_fwd_kernel, decode_launch(tuned.decode, head_dim, 1)),
}
POINTERS = {
    **dict.fromkeys(["q", "k", "v", "sk", "sv", "o", "do", "dq", "dk", "dv", "dsk", "dsv"], dtype_name),
    **dict.fromkeys(["lse", "delta", "mu", "phi", "dmu", "dphi", "parts"], "fp32"),
    **dict.fromkeys(["table", "starts", "first", "open_end"], "i32"),
    "tree": "u8",
}
for name, (kernel, sizes) in kernels.items():
    sizes = dict(sizes)
    options = {"num_warps": sizes.pop("num_warps"), "num_stages": sizes.pop("num_stages", 1)}
    signature = {}
    for parameter in kernel.params:
        at = parameter.name
        if at in ("table", "starts") and not name.endswith("_table"):
            signature[at], sizes[at] = "constexpr", None
        elif parameter.is_constexpr:
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
TARGETS = {"sm_80": ("cuda", "80", 32), "sm_90": ("cuda", "90", 32), "gfx942": ("hip", "gfx942", 64)}
SHARED_BYTES = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}
SPILL_BUDGET = {"sm_80": 128, "sm_90": 128, "gfx942": 180}  # bytes of stack on NVIDIA, registers on AMD


def spills(backend, code):
    if backend == "hip":
        return int(re.search(rb"\.vgpr_spill_count:\s*(\d+)", code.read_bytes())[1])
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    cubin = code.rename(code.with_suffix(".cubin"))
    usage = subprocess.run([cuobjdump, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", usage)[1])


def compile_all(device_class, dtype, head_dim):
    """Compile every kernel as `eva_tuning` launches it; -> by kernel, bytes of shared memory and spills."""
    backend, arch, warp = TARGETS[device_class]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", COMPILE, device_class, backend, arch, str(warp), dtype, str(head_dim), folder]
        run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "0"})
        assert run.returncode == 0, run.stderr[-3000:]
        lines = [line.split() for line in run.stdout.splitlines()]
        return {name: (int(shared), spills(backend, Path(folder) / name)) for name, shared in lines}


def check(device_class, dtype, head_dim):
    for name, (shared, spilled) in compile_all(device_class, dtype, head_dim).items():
        assert shared <= SHARED_BYTES[device_class], (name, shared)
        assert spilled <= SPILL_BUDGET[device_class], (name, spilled)


def test_the_published_shape_on_hopper():
    check("sm_90", "bf16", 128)


ENTRIES = [
    (device_class, {2: "bf16", 4: "fp32"}[itemsize], head_dim)
    for device_class, by_size in TABLES.items()
    for itemsize, entries in by_size.items()
    for head_dim in entries
]


@pytest.mark.slow
@pytest.mark.parametrize(("device_class", "dtype", "head_dim"), ENTRIES)
def test_every_entry_of_the_tables(device_class, dtype, head_dim):
    check(device_class, dtype, head_dim)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [16, 80, 128])
@pytest.mark.parametrize("device_class", TABLES)
def test_other_head_dimensions_in_float16(device_class, head_dim):
    check(device_class, "fp16", head_dim)
