"""Find block sizes for the Triton kernels on this GPU, as entries for the tables in evabyte/eva_tuning.py.

    python examples/benchmarks/tune_attention.py --device cuda --head-dims 64 128 --save tuning-cuda

Every candidate that compiles and gives the table's result within rounding is timed in turn with the entry in use, round
by round; a candidate takes its place when its median is faster. One kernel is tried at a time: the forward one, then
those for dq and for dk and dv, then the decoding one with a tree of 64 nodes. With TRITON_INTERPRET=1 and small sizes
it runs on a CPU, to test the script.

The last line is one JSON object with everything; `--save NAME` keeps it as results/NAME.json.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from typing import Any

import torch
from measure import finish, interleave, provenance, spread
from torch import Tensor

from evabyte import eva_triton
from evabyte.eva_tuning import Blocks, Tuning, device_class, tuning

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
ROWS, COLUMNS, WARPS, STAGES = (16, 32, 64, 128), (16, 32, 64, 128), (4, 8), (1, 2, 3)
TREE = 64


@contextmanager
def in_use(entry: Tuning) -> Iterator[None]:
    """Launch the kernels with this entry instead of the table's."""
    before = eva_triton.tuning
    eva_triton.tuning = lambda *key: entry
    try:
        yield
    finally:
        eva_triton.tuning = before


def workloads(args: argparse.Namespace, head_dim: int) -> dict[str, Callable[[], Sequence[Tensor]]]:
    """By field of `Tuning`, the call that its kernel dominates."""
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    generator = torch.Generator(device).manual_seed(0)

    def states(length: int) -> Tensor:
        shape = (1, args.heads, length, head_dim)
        return torch.randn(*shape, generator=generator, dtype=dtype, device=device)

    closed = (args.length - 1) // args.window * args.window // args.chunk
    inputs = (states(args.length), states(args.length), states(args.length), states(closed), states(closed))
    sizes = (args.length, 0, args.window, args.chunk)
    output, lse = eva_triton.windowed(*inputs, None, *sizes)
    columns = closed + args.window // 2
    first = torch.zeros(1, dtype=torch.int32, device=device)
    open_end = torch.full_like(first, columns)
    chain = torch.ones(1, TREE, TREE, dtype=torch.uint8, device=device).tril()
    tree = (states(TREE), states(columns + TREE), states(columns + TREE), first, open_end, chain)
    back = partial(eva_triton.windowed_backward, states(args.length), *inputs, None, output, lse, *sizes)
    return {
        "forward": partial(eva_triton.windowed, *inputs, None, *sizes),
        "query_grad": back,
        "key_grad": back,
        "decode": lambda: [eva_triton.decode(*tree)],
    }


def candidates(args: argparse.Namespace, field: str) -> Iterator[Blocks]:
    for rows, columns, warps, stages in product(args.rows, args.columns, args.warps, args.stages):
        if field != "decode" or rows == TREE:
            yield Blocks(rows, columns, warps, stages)


def agrees(entry: Tuning, run: Callable[[], Sequence[Tensor]], expected: Sequence[Tensor]) -> bool:
    """Whether the kernels compile with this entry, and give what they gave with the table's."""
    try:
        with in_use(entry):
            results = run()
    except Exception as reason:  # too much shared memory, a shape the compiler refuses: each has its own class
        print(f"  {entry}: {type(reason).__name__}", file=sys.stderr)
        return False
    tolerance = 8 * torch.finfo(expected[0].dtype).eps
    return all(
        bool((ours.float() - theirs.float()).norm() <= tolerance * theirs.float().norm().clamp(min=1))
        for ours, theirs in zip(results, expected, strict=True)
    )


def tune(args: argparse.Namespace, head_dim: int) -> Iterator[dict[str, Any]]:
    """One row a kernel: its best entry and how much faster than the table's it is."""
    device = torch.device(args.device)
    best = tuning(device_class(device), DTYPES[args.dtype].itemsize, head_dim)

    def with_entry(entry: Tuning, run: Callable[[], Sequence[Tensor]], _: int) -> None:
        with in_use(entry):
            run()

    for field, run in workloads(args, head_dim).items():
        table, expected, tried = best, run(), 0
        gain = {"median": 1.0}
        for blocks in candidates(args, field):
            entry = replace(best, **{field: blocks})
            if not agrees(entry, run, expected):
                continue
            tried += 1
            times = interleave(
                {"best": partial(with_entry, best, run), "entry": partial(with_entry, entry, run)}, args.repeats, device
            )
            ratio = spread([a / b for a, b in zip(times["best"], times["entry"], strict=True)])
            if ratio["median"] > 1.0:
                best, gain = entry, {name: value * gain["median"] for name, value in ratio.items()}
        yield {
            "head_dim": head_dim,
            "kernel": field,
            "table": asdict(getattr(table, field)),
            "best": asdict(getattr(best, field)),
            "times_faster": gain,
            "candidates": tried,
        }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--chunk", type=int, default=16)
    for name, values in (("rows", ROWS), ("columns", COLUMNS), ("warps", WARPS), ("stages", STAGES)):
        parser.add_argument(f"--{name}", type=int, nargs="+", default=values, help=f"{name} of the candidates")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--save", metavar="NAME")
    args = parser.parse_args(argv)
    began = provenance("tune_attention.py", argv if argv is not None else sys.argv[1:], torch.device(args.device))
    rows = []
    for head_dim in args.head_dims:
        for row in tune(args, head_dim):
            print(row["head_dim"], row["kernel"], row["best"], f"{row['times_faster']['median']:.2f}x", flush=True)
            rows.append(row)
    finish({**began, "settings": vars(args), "rows": rows}, args.save)


if __name__ == "__main__":
    main()
