"""Block sizes and warps of the Triton kernels, by device class, width of an element and head dimension.

How they were found: the largest blocks that compile ahead of time for the device class with no more spilled registers
than tests/evabyte/test_eva_kernels.py allows. They have not been measured on a GPU yet;
examples/benchmarks/tune_attention.py tries the candidates there and prints these tables.
"""

from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class Blocks:
    """One kernel's launch: `rows` queries by `columns` keys at a time, by `warps` warps, loads in `stages` stages."""

    rows: int
    columns: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Tuning:
    """Launches of the forward kernel, of those for dq and for dk and dv, and of the decoding kernel.

    The decoding kernel takes as many rows as the tree has nodes, `decode.rows` at the most.
    """

    forward: Blocks
    query_grad: Blocks
    key_grad: Blocks
    decode: Blocks


# Products in full precision are unrolled, not run on tensor cores: small blocks, or they spill.
_FULL = Tuning(Blocks(32, 16, 8, 1), Blocks(32, 16, 8, 1), Blocks(16, 16, 8, 1), Blocks(16, 16, 8, 1))
_FULL_WIDE = Tuning(Blocks(16, 16, 8, 1), Blocks(16, 16, 8, 1), Blocks(16, 16, 8, 1), Blocks(16, 16, 8, 1))

# By bytes of an element, then the largest head dimension an entry serves.
TABLES: dict[str, dict[int, dict[int, Tuning]]] = {
    "sm_80": {
        2: {
            64: Tuning(Blocks(128, 64, 4, 2), Blocks(128, 32, 8, 2), Blocks(64, 64, 8, 2), Blocks(64, 64, 4, 2)),
            128: Tuning(Blocks(128, 32, 8, 2), Blocks(128, 32, 8, 2), Blocks(32, 64, 8, 2), Blocks(64, 64, 4, 2)),
            256: Tuning(Blocks(32, 32, 8, 1), Blocks(32, 32, 8, 1), Blocks(16, 32, 8, 1), Blocks(32, 32, 4, 1)),
        },
        4: {64: _FULL, 256: _FULL_WIDE},
    },
    "sm_90": {
        2: {
            64: Tuning(Blocks(128, 128, 8, 3), Blocks(128, 64, 8, 2), Blocks(32, 128, 8, 2), Blocks(64, 64, 4, 2)),
            128: Tuning(Blocks(128, 128, 8, 2), Blocks(128, 64, 8, 2), Blocks(32, 128, 8, 2), Blocks(64, 64, 4, 2)),
            256: Tuning(Blocks(128, 32, 8, 2), Blocks(64, 32, 8, 2), Blocks(32, 64, 8, 1), Blocks(64, 32, 4, 2)),
        },
        4: {64: _FULL, 256: _FULL_WIDE},
    },
    "gfx942": {
        2: {
            64: Tuning(Blocks(128, 64, 4, 2), Blocks(128, 32, 8, 2), Blocks(32, 64, 8, 2), Blocks(64, 64, 4, 2)),
            128: Tuning(Blocks(128, 32, 8, 1), Blocks(128, 32, 8, 1), Blocks(32, 64, 8, 1), Blocks(64, 32, 4, 1)),
            256: Tuning(Blocks(32, 32, 8, 1), Blocks(64, 16, 8, 1), Blocks(16, 32, 8, 1), Blocks(32, 32, 4, 1)),
        },
        4: {64: _FULL, 256: _FULL_WIDE},
    },
}


def tuning(device_class: str, itemsize: int, head_dim: int) -> Tuning:
    """The entry for elements of `itemsize` bytes; beyond the largest head dimension in the table, that one's."""
    entries = TABLES[device_class][itemsize]
    return entries[min((limit for limit in entries if head_dim <= limit), default=max(entries))]


@cache
def device_class(device: torch.device) -> str:
    """The table that serves a device: an AMD one, NVIDIA's Hopper and newer, or every other."""
    if device.type == "cuda" and torch.version.hip:
        return "gfx942"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0):
        # Consumer Blackwell (12.x) has an Ampere-sized shared memory.
        return "sm_90" if torch.cuda.get_device_capability(device) < (12, 0) else "sm_80"
    return "sm_80"
