"""EVA attention beside what it could be replaced with: speed, memory and accuracy of the operator alone.

    python examples/benchmarks/attention.py --threads 2 --published FOLDER --save attention-cpu
    python examples/benchmarks/attention.py --device cuda --published FOLDER --save attention-cuda

On a CPU the backend "sdpa" runs beside "naive", the specification, up to the length where its N x N logits still fit,
and beside the published operator in plain PyTorch: forward, and forward and backward, time and peak memory. On a GPU
the backend "eva_triton" runs beside the published Triton kernels, PyTorch's fused causal attention over all keys, and
FlexAttention with EVA's mask; its summaries and its decoding step are set against the bandwidth of a copy measured in
the same run. FOLDER is a local copy of the published code; without it those rows are left out, and the result says so.

First comes a check, of output and gradients against the specification in float64 on a shorter sequence: where ours
differs nothing is measured; another operator that differs, or does not run, is left out with the reason under
`skipped`. Then alternatives run in turn; a row is the median, with minimum and maximum, of the rounds' ratios, beside
its aim.

Peak memory is what one call adds to the resident memory of a fresh process, output and saved tensors included, inputs
and masks not. It is the system's own high-water mark of that process (Linux, VmHWM), set back before the call, with
memory returned as soon as it is freed: so scratch space of libraries counts, which PyTorch's profiler does not see, and
what the process used before does not, which `ru_maxrss` includes, for a child even what its parent used.

Useful FLOPs are those of visible (query, key or summary) pairs, four times the head dimension each; time spent on
summaries or on hidden pairs counts, their FLOPs do not. A decoding step reads the summaries and keys that the last
position of the context sees; it is timed as a CUDA graph of several layers, each with keys of its own, as a model
replays it: neither launches nor keys still in the processor's caches should blur it.

The last line is one JSON object with everything; `--save NAME` keeps it as results/NAME.json.
"""

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from attention_peers import (
    PUBLISHED_FILES,
    Case,
    Operator,
    Run,
    WrongResult,
    as_full_attention,
    backward,
    bandwidth_share,
    copying,
    eva_operator,
    exact_results,
    flex_windowed,
    forward,
    forward_and_backward,
    full_attention,
    milliseconds,
    published_plain,
    published_triton,
    require_agreement,
    require_exact,
    row,
    timings,
)
from measure import between, finish, provenance, speedup, spread
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

from evabyte.eva_attention import WindowStates, get_backend, summarizer
from evabyte.eva_layout import EvaLayout

CHECKED_WINDOWS = 3  # in the third window queries see summaries of more than the window just closed
LONG = 32768  # from here on EVA should be several times faster than full attention
TRAINING_BRANCH = "it fails on an undefined name; both passes are timed on its prefill branch instead"
CLEAR_REFS = Path("/proc/self/clear_refs")
KERNELS = "eva_triton"
FULL_ATTENTION = {"FlashAttention": SDPBackend.FLASH_ATTENTION, "cuDNN attention": SDPBackend.CUDNN_ATTENTION}
PASSES = {"forward": forward, "forward and backward": forward_and_backward}
Makers = Mapping[str, Callable[[Case], Operator]]
Rows = Iterator[dict[str, Any]]


def attempt(label: str, function: Callable[[], Any], skipped: dict[str, str]) -> Any:
    """What the function of a peer returns, or None and the reason under `skipped`.

    Code that is not ours may fail in any way, and should then cost its own rows only.
    """
    try:
        return function()
    except Exception as reason:
        skipped[label] = f"{type(reason).__name__}: {(str(reason).strip().splitlines() or [''])[0]}"
        return None


def measure_cpu(case: Case, options: argparse.Namespace, checks: dict[str, Any], skipped: dict[str, str]) -> Rows:
    """The backend "sdpa" beside "naive" and the published operator; fills in `checks` and `skipped`."""
    for window in options.window:
        checked = replace(case, batch=1, heads=min(2, case.heads), length=CHECKED_WINDOWS * window, window=window)
        exact = exact_results(checked)
        names = ["sdpa", "naive"]
        checks[f"sdpa, window {window}"] = require_exact("sdpa", eva_operator(checked, "sdpa"), checked, exact)
        if options.published is not None:
            label, run = f"published, window {window}", published_plain(options.published, checked)
            errors = attempt(label, partial(require_exact, "published", run, checked, exact), skipped)
            if errors is not None:
                checks[label] = errors
                names.append("published")
                skipped["published, training branch"] = TRAINING_BRANCH
        for length in options.lengths:
            sized = replace(case, length=length, window=window)
            if length > options.naive_up_to:
                skipped[f"naive, length {length}"] = f"N x N logits beyond --naive-up-to {options.naive_up_to}"
            present = [name for name in names if name != "naive" or length <= options.naive_up_to]
            if "time" in options.parts:
                yield from time_rows(sized, present, options.published, options.repeats)
            if "memory" in options.parts:
                yield from memory_rows(sized, present, options.published)


def time_rows(case: Case, names: Sequence[str], published: Path | None, repeats: int) -> Rows:
    """How many times faster the first of the names is than each of the others."""
    ours, *peers = names
    tensors = case.tensors()
    for which, prepare in PASSES.items():
        runs = {name: prepare(cpu_operator(case, name, published), *tensors) for name in names}
        seconds = timings(runs, repeats, case.device)
        for peer in peers:
            aim = ">= 2" if peer == "published" else None
            value, details = speedup(seconds[peer], seconds[ours]), milliseconds(seconds, ours, peer)
            yield row(f"{which}: {peer} / {ours}, time", case, value, aim, milliseconds=details)


def memory_rows(case: Case, names: Sequence[str], published: Path | None) -> Rows:
    """How many times less memory the first of the names needs than each of the others."""
    if not CLEAR_REFS.exists():
        return
    ours, *peers = names
    for which in PASSES:
        peaks = {name: in_fresh_process(peak_bytes, case, name, which, published) for name in names}
        for peer in peers:
            aim = ">= 1" if peer == "published" else None
            value, mib = spread([peaks[peer] / peaks[ours]]), {name: peaks[name] / 2**20 for name in (ours, peer)}
            yield row(f"{which}: {peer} / {ours}, peak memory", case, value, aim, peak_mib=mib)


def cpu_operator(case: Case, name: str, published: Path | None) -> Operator:
    if name == "published" and published is not None:
        return published_plain(published, case)
    return eva_operator(case, name)


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function returns in a new process with as many threads."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(64 * 1024)  # read by glibc as a process starts: freed memory is returned
    threads = torch.get_num_threads()
    with ProcessPoolExecutor(1, get_context("spawn"), torch.set_num_threads, (threads,)) as pool:
        return pool.submit(function, *arguments).result()


def peak_bytes(case: Case, name: str, which: str, published: Path | None) -> int:
    """Memory that one call needs beyond its inputs, in a process that does nothing else; needs `CLEAR_REFS`."""
    small = replace(case, heads=1, length=8 * case.chunk, window=4 * case.chunk)
    forward_and_backward(cpu_operator(small, name, published), *small.tensors())()  # loads libraries, starts threads
    run = PASSES[which](cpu_operator(case, name, published), *case.tensors())
    CLEAR_REFS.write_text("5")  # sets the high-water mark back to what is resident now
    before = resident_kib("VmRSS")
    run()
    return 1024 * (resident_kib("VmHWM") - before)


def resident_kib(field: str) -> int:
    """A figure of this process's status, such as VmRSS, the memory resident now."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0])


def measure_kernels(case: Case, options: argparse.Namespace, checks: dict[str, Any], skipped: dict[str, str]) -> Rows:
    """The backend "eva_triton" beside its peers and the bandwidth; fills in `checks` and `skipped`."""
    makers: dict[str, Callable[[Case], Operator]] = {
        name: partial(full_attention, kernel) for name, kernel in FULL_ATTENTION.items()
    }
    if options.published is not None:
        makers["published"] = partial(published_triton, options.published)
    for window in options.window:
        checked = replace(case, batch=1, heads=min(2, case.heads), length=CHECKED_WINDOWS * window, window=window)
        for batch in options.decode_batch:
            check_decoding(replace(checked, batch=batch))
        usable, error_rows = check_kernels(checked, makers, checks, skipped)
        yield from error_rows
        for length in options.lengths:
            sized = replace(case, length=length, window=window)
            yield from operator_rows(sized, usable, options.repeats, skipped)
            yield from flex_rows(sized, options.repeats, skipped)
            yield from summary_rows(sized, options.copy_mib, options.repeats)
        for batch in options.decode_batch:
            decoding = replace(case, batch=batch, length=options.context, window=window)
            yield from decode_rows(decoding, options.copy_mib, options.repeats)


def check_kernels(
    case: Case, makers: Makers, checks: dict[str, Any], skipped: dict[str, str]
) -> tuple[Makers, list[dict[str, Any]]]:
    """The peers that are right, and rows that set the errors of our gradients against those of full attention."""
    full = as_full_attention(case)
    exact, exact_full = exact_results(case), exact_results(full)
    ours = require_exact(KERNELS, eva_operator(case, KERNELS), case, exact)
    checks[f"{KERNELS}, window {case.window}"] = ours
    usable, rows = {}, []
    for name, make in makers.items():
        label, is_full = f"{name}, window {case.window}", name in FULL_ATTENTION
        sized, expected = (full, exact_full) if is_full else (case, exact)
        errors = attempt(label, partial(require_exact, name, make(sized), sized, expected), skipped)
        if errors is None:
            continue
        usable[name], checks[label] = make, errors
        if is_full:
            worst = max(ours[each] / errors[each] for each in ("query", "key", "value"))
            rows.append(row(f"gradient error: ours / {name}, worst", case, spread([worst]), "<= 1"))
    return usable, rows


def operator_rows(case: Case, makers: Makers, repeats: int, skipped: dict[str, str]) -> Rows:
    """The whole operator, summaries included, forward and backward."""
    inputs, upstream = case.tensors()
    ours = eva_operator(case, KERNELS)
    runs = {"forward": forward(ours, inputs, upstream), "backward": backward(ours, inputs, upstream)}
    expected = runs["forward"]()
    for name, make in makers.items():
        prepare = partial(peer_runs, case, name, make, inputs, upstream, expected)
        runs |= attempt(f"{name}, length {case.length}, window {case.window}", prepare, skipped) or {}
    seconds = timings(runs, repeats, case.device)
    rate = spread([case.useful_flops / each / 1e12 for each in seconds["forward"]])
    yield row("forward: useful TFLOP/s", case, rate, ">= 400", milliseconds=milliseconds(seconds, "forward"))
    yield row("backward / forward, time", case, speedup(seconds["backward"], seconds["forward"]), "<= 2.5")
    for label in runs:
        which, _, peer = label.partition(" of ")
        if peer:
            aim = ">= 2" if peer == "published" else ">= 5" if case.length >= LONG else None
            value, details = speedup(seconds[label], seconds[which]), milliseconds(seconds, which, label)
            yield row(f"{which}: {peer} / ours, time", case, value, aim, milliseconds=details)


def peer_runs(
    case: Case,
    name: str,
    make: Callable[[Case], Operator],
    inputs: Sequence[Tensor],
    upstream: Tensor,
    expected: Tensor,
) -> dict[str, Run]:
    """A peer's passes, each of which has run once; one that computes the same as ours must agree with it."""
    peer = make(case)
    passes = {f"forward of {name}": forward(peer, inputs, upstream)}
    output = passes[f"forward of {name}"]()
    if name not in FULL_ATTENTION:
        require_agreement(output, expected)
        passes[f"backward of {name}"] = backward(peer, inputs, upstream)
        passes[f"backward of {name}"]()
    return passes


def flex_rows(case: Case, repeats: int, skipped: dict[str, str]) -> Rows:
    """Attention alone, summaries being given, beside FlexAttention over [summaries, keys] already side by side."""
    (query, key, value, mu, phi), upstream = case.tensors()
    closed_key, closed_value = (states[:, :, : case.closed].detach() for states in (key, value))
    with torch.no_grad():
        summaries = summarizer(mu, phi, case.chunk, KERNELS, True)(closed_key, closed_value)
    joined = [torch.cat(pair, dim=2).detach() for pair in zip(summaries, (key, value), strict=True)]
    windowed = partial(get_backend(KERNELS).windowed, window_size=case.window, chunk_size=case.chunk)
    inputs = {
        "ours": (query, key, value, *(tensor.requires_grad_() for tensor in summaries)),
        "FlexAttention": (query, *(tensor.requires_grad_() for tensor in joined)),
    }

    def prepare() -> dict[str, Run]:
        runs: dict[str, Callable[..., Tensor]] = {"ours": windowed, "FlexAttention": flex_windowed(case)}
        prepared = {
            f"{which} of {name}": make(run, inputs[name], upstream)
            for which, make in PASSES.items()
            for name, run in runs.items()
        }
        require_agreement(prepared["forward of FlexAttention"](), prepared["forward of ours"]())
        prepared["forward and backward of FlexAttention"]()
        return prepared

    runs = attempt(f"FlexAttention, length {case.length}, window {case.window}", prepare, skipped)
    if runs is None:
        return
    seconds = timings(runs, repeats, case.device)
    for which in PASSES:
        names = f"{which} of ours", f"{which} of FlexAttention"
        ratio, details = speedup(seconds[names[1]], seconds[names[0]]), milliseconds(seconds, *names)
        yield row(f"{which}: FlexAttention / ours, time", case, ratio, ">= 1.3", milliseconds=details)


def summary_rows(case: Case, copy_mib: float, repeats: int) -> Rows:
    """The pass that summarises all closed windows, against the bandwidth."""
    if not case.closed:
        return
    (_, key, value, mu, phi), _ = case.tensors()
    key, value = (states[:, :, : case.closed].detach() for states in (key, value))
    summarize = torch.no_grad()(summarizer(mu, phi, case.chunk, KERNELS, True))
    copy, copied = copying(copy_mib, case.device)
    seconds = timings({"summaries": partial(summarize, key, value), "copy": copy}, repeats, case.device)
    share = bandwidth_share(case.summary_bytes, seconds["summaries"], copied, seconds["copy"])
    details = {"copy_gb_per_second": spread([copied / each / 1e9 for each in seconds["copy"]])}
    label = "summaries: % of copy bandwidth"
    yield row(label, case, share, ">= 80", milliseconds=milliseconds(seconds, "summaries"), **details)


def decode_step(case: Case, layers: int) -> tuple[Callable[[], list[Tensor]], list[Tensor]]:
    """Attention of the context's last position in so many layers, and their queries, keys and values.

    Keys and values [layers, B, H, columns, D] lie as the cache holds them: summaries, then the open window.
    """
    generator = torch.Generator(case.device).manual_seed(0)
    shapes = [(layers, case.batch, case.heads, columns, case.head_dim) for columns in (1, *[case.decode_columns] * 2)]
    inputs = [torch.randn(s, generator=generator, device=case.device, dtype=case.dtype) for s in shapes]
    past = [case.length - 1] * case.batch
    layout = EvaLayout.build(case.batch, 1, window_size=case.window, chunk_size=case.chunk, past=past)
    attend = get_backend(KERNELS).within_window

    def step() -> list[Tensor]:
        layer_inputs = zip(*inputs, strict=True)
        return [attend(query, WindowStates(keys, values), layout, True) for query, keys, values in layer_inputs]

    return step, inputs


def check_decoding(case: Case) -> None:
    """Raises `WrongResult` when a step differs from the plain form by more than rounding explains."""
    step, inputs = decode_step(case, layers=1)
    query, keys, values = (tensor[0].double() for tensor in inputs)
    require_agreement(step()[0], nn.functional.scaled_dot_product_attention(query, keys, values))


def decode_rows(case: Case, copy_mib: float, repeats: int) -> Rows:
    """Attention of one new token per sequence, the last of the context, against the bandwidth."""
    layers = math.ceil(copy_mib * 2**20 / case.decode_bytes)
    step, _ = decode_step(case, layers)
    step()
    copy, copied = copying(copy_mib, case.device)
    steps: dict[str, Run] = {"decoding step": step}
    if case.device.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        steps = {"decoding step": graph.replay, "decoding step, launched one by one": step}
    seconds = timings(steps | {"copy": copy}, repeats, case.device)
    for name in steps:
        share = bandwidth_share(layers * case.decode_bytes, seconds[name], copied, seconds["copy"])
        per_layer = {name: spread([1e3 * each / layers for each in seconds[name]])}
        aim = ">= 70" if name == "decoding step" else None
        yield row(f"{name}: % of copy bandwidth", case, share, aim, milliseconds=per_layer)


def print_row(result: Mapping[str, Any]) -> None:
    aim = f"  aim {result['aim']}: {'met' if result['met'] else 'NOT met'}" if "aim" in result else ""
    place = f"{result['length']:7} {result['window']:7} {result['batch']:6}"
    print(f"{result['measure']:54} {place}  {between(result['value'])}{aim}", flush=True)


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--device", type=torch.device, default=device, help="default: cuda where there is one")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="default: bfloat16, float32 on a CPU"
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's)")
    parser.add_argument("--parts", nargs="+", choices=["time", "memory"], default=["time", "memory"], help="on a CPU")
    parser.add_argument("--lengths", type=int, nargs="+", help="default: 8k, 32k, 128k; on a CPU 2k, 8k, 32k")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, help="default: 32, on a CPU 4")
    parser.add_argument("--head-dim", type=int, help="default: 128, on a CPU 64")
    parser.add_argument("--window", type=int, nargs="+", help="default: 2048, on a CPU 256 too")
    parser.add_argument("--chunk", type=int, default=16)
    parser.add_argument("--naive-up-to", type=int, default=4096, help="longest sequence for the specification (CPU)")
    parser.add_argument("--context", type=int, default=32768, help="length behind which a step is decoded (GPU)")
    parser.add_argument("--decode-batch", type=int, nargs="+", default=[1, 32], help="its batch sizes (GPU)")
    parser.add_argument(
        "--copy-mib", type=float, default=1024, help="size of the copy that measures the bandwidth (GPU)"
    )
    parser.add_argument("--repeats", type=int, default=5, help="rounds of timing")
    parser.add_argument("--published", type=Path, metavar="FOLDER", help="a local copy of the published code")
    parser.add_argument("--save", metavar="NAME", help="keep the result as results/NAME.json")
    options = parser.parse_args(arguments)
    on_cpu = options.device.type == "cpu"
    defaults = {
        "dtype": "float32" if on_cpu else "bfloat16",
        "lengths": [2048, 8192, 32768] if on_cpu else [8192, 32768, 131072],
        "heads": 4 if on_cpu else 32,
        "head_dim": 64 if on_cpu else 128,
        "window": [2048, 256] if on_cpu else [2048],
    }
    for name, default in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, default)
    for window in options.window:
        if window % options.chunk or any(length % window for length in options.lengths):
            parser.error(f"--chunk must divide every --window, and each of these every one of --lengths; got {window}")
    missing = [name for name in PUBLISHED_FILES if options.published and not (options.published / name).is_file()]
    if missing:
        parser.error(f"--published {options.published} lacks {', '.join(missing)}")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse_arguments(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    told = [each.replace(str(options.published), "FOLDER") for each in arguments]  # whose copy lay where is no result
    result: dict[str, Any] = {
        "benchmark": "attention",
        "provenance": provenance("attention.py", told, options.device),
        "settings": vars(options) | {"published": options.published and "FOLDER"},
        "checks": {},
        "skipped": {} if options.published else {"published": "no --published FOLDER"},
        "rows": [],
    }
    sizes = {"batch": options.batch, "heads": options.heads, "head_dim": options.head_dim, "chunk": options.chunk}
    first = {"length": options.lengths[0], "window": options.window[0]}
    case = Case(**sizes, **first, dtype=getattr(torch, options.dtype), device=options.device)
    print(f"{'Median (min to max) of the rounds':54}  length  window  batch")
    measure = measure_cpu if options.device.type == "cpu" else measure_kernels
    try:
        for result_row in measure(case, options, result["checks"], result["skipped"]):
            print_row(result_row)
            result["rows"].append(result_row)
    except WrongResult as wrong:
        raise SystemExit(f"No speed is measured: {wrong}.") from wrong
    for label, reason in result["skipped"].items():
        print(f"Skipped: {label} ({reason})")
    finish(result, options.save)


if __name__ == "__main__":
    main()
