"""The fast path of decoding: a step on the dynamic cache, on a static one, and compiled.

    python examples/benchmarks/engine.py --threads 1 --save engine-cpu
    python examples/benchmarks/engine.py --device cuda --dtype bfloat16 --shape 6.5b --save engine-cuda-6.5b
    python examples/benchmarks/engine.py --threads 1 --shape byte-llama-small --save engine-byte-llama-cpu

First comes a check: in float32, every way of running must give the bytes of greedy `generate`, or nothing is timed.
Then, for each batch size and number of drafted nodes (0: `generate`, byte by byte), the same greedy call runs

- dynamic: on the cache that grows (the plain path),
- static: on the cache of fixed size, without compilation,
- compiled: the same, each step one compiled graph (on CUDA a CUDA graph),

in turn. The time of a step is that of a call less that of one which writes a single byte, over the steps between.
On CUDA also: the time in which the weights and the cache can be read at the bandwidth that a large copy reaches, the
prefill's share of what a large matrix product reaches, and peak memory beyond weights and cache.

`--shape` takes random weights of a published size, or of a small byte-level Llama; their drafts are worth nothing, so
that only the time of a step says something. The last line is one JSON object; `--save NAME` keeps it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import HELDOUT, between, finish, interleave, provenance, speedup, spread, synchronize
from torch import Tensor
from transformers.generation import CompileConfig

from byte_llama import ByteLlamaConfig, ByteLlamaForCausalLM
from byte_llama.static_tree_cache import static_tree_cache_bytes
from evabyte import EvaByteConfig, EvaByteForCausalLM, EvaByteTokenizer
from evabyte.bundled import bundled_checkpoint
from evabyte.eva_static_cache import static_cache_bytes

WAYS: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "compiled": {"cache_implementation": "static"},
}


def words_of_prose() -> list[Any]:
    """A dictionary of subwords in the published form: the words of the held-out prose, spelt in EvaByte's ids."""
    words = sorted({word[-16:] for word in next(HELDOUT.glob("prose*")).read_bytes().split()})
    paths = [[str(byte + 1) for byte in reversed(EvaByteTokenizer().encode_bytes(word))] for word in words]
    return [{",".join(path): subword + 2 for subword, path in enumerate(paths)}, []]


def small_byte_llama() -> ByteLlamaConfig:
    """A byte-level Llama of some 6 million parameters that expands its inputs."""
    dictionary = words_of_prose()
    return ByteLlamaConfig(
        vocab_size=320,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=2,
        num_pred_heads=8,
        expand_input_ids=True,
        expand_input_ids_vocab_size=len(dictionary[0]) + 2,
        expand_input_ids_dict=dictionary,
    )


SHAPES: dict[str, Callable[[], Any]] = {
    "6.5b": EvaByteConfig,
    "byte-llama-small": small_byte_llama,
    "byte-llama-3b": lambda: ByteLlamaConfig(
        vocab_size=320,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        num_pred_heads=8,
    ),
}


def load(options: argparse.Namespace) -> Any:
    """The model to measure, in float32, ends of text ignored."""
    if options.shape is None:
        model: Any = EvaByteForCausalLM.from_pretrained(options.model or bundled_checkpoint(), dtype=torch.float32)
    else:
        config = SHAPES[options.shape]()
        kind = EvaByteForCausalLM if options.shape == "6.5b" else ByteLlamaForCausalLM
        torch.manual_seed(0)
        with torch.device(options.device):
            model = kind(config)
    model.to(options.device).eval().generation_config.eos_token_id = None
    return model


def prompts(batch: int, size: int, device: torch.device) -> Tensor:
    """int64 [batch, size], pieces of the held-out prose."""
    text = next(HELDOUT.glob("prose*")).read_bytes()
    distance = (len(text) - size) // batch
    rows = [EvaByteTokenizer().encode_bytes(text[row * distance :][: size - 1])[:size] for row in range(batch)]
    shortest = min(map(len, rows))
    return torch.tensor([row[:shortest] for row in rows], device=device)


def write(model: Any, ids: Tensor, nodes: int, new_bytes: int, **how: Any) -> tuple[Tensor, int]:
    """Greedy bytes, and the number of forwards."""
    how |= {"max_new_tokens": new_bytes, "do_sample": False}
    if not nodes:
        return model.generate(ids, **how), new_bytes
    out, lengths = model.multi_byte_generate(ids, draft="dynamic", draft_nodes=nodes, return_acc_lengths=True, **how)
    return out, lengths.shape[1]


def ways_of(model: Any) -> dict[str, dict[str, Any]]:
    """`WAYS`, for this model."""
    if isinstance(model, EvaByteForCausalLM) or model.device.type != "cpu":
        return WAYS
    everywhere = CompileConfig(mode="default")
    everywhere._compile_all_devices = True  # transformers' own `generate` compiles on accelerators alone, unless told
    return {**WAYS, "compiled": {"cache_implementation": "static", "compile_config": everywhere}}


def agreement(model: Any, ids: Tensor, nodes: int, new_bytes: int) -> dict[str, Any]:
    """By way: the share of rows' bytes that are those of plain `generate`, up to their first difference."""
    expected, _ = write(model, ids, 0, new_bytes)
    shares = {}
    for way, how in ways_of(model).items():
        same = write(model, ids, nodes, new_bytes, **how)[0][:, ids.shape[1] :] == expected[:, ids.shape[1] :]
        shares[way] = float(same.long().cumprod(-1).double().mean())
    return shares


def measure(model: Any, batch: int, nodes: int, options: argparse.Namespace) -> dict[str, Any]:
    """One row of results."""
    ids = prompts(batch, options.prompt_bytes, options.device)
    ways = ways_of(model)
    steps: dict[str, int] = {}
    compile_seconds: dict[str, float] = {}
    for way, how in ways.items():  # warm-up: compiles, records CUDA graphs
        began = time.perf_counter()
        steps[way] = write(model, ids, nodes, options.new_bytes, **how)[1]
        synchronize(options.device)
        compile_seconds[way] = round(time.perf_counter() - began, 2)
        write(model, ids, nodes, 1, **how)
    whole = {way: partial(_run, model, ids, nodes, options.new_bytes, how) for way, how in ways.items()}
    first = {f"{way} first": partial(_run, model, ids, nodes, 1, how) for way, how in ways.items()}
    seconds = interleave({**whole, **first}, options.repeats, options.device)
    row: dict[str, Any] = {"batch": batch, "nodes": nodes, "forwards": steps, "first_call_seconds": compile_seconds}
    decode = {
        way: [max(total - one, 1e-9) for total, one in zip(seconds[way], seconds[f"{way} first"], strict=True)]
        for way in ways
    }
    row["ms_per_step"] = {way: spread([1000 * s / (steps[way] - 1) for s in decode[way]]) for way in ways}
    row["bytes_per_second"] = {way: spread([batch * options.new_bytes / s for s in seconds[way]]) for way in ways}
    row["prefill_ms"] = spread([1000 * s for s in seconds["dynamic first"]])
    for way in ways.keys() - {"dynamic"}:
        row[f"{way}_step_speedup"] = speedup(decode["dynamic"], decode[way])
        row[f"{way}_call_speedup"] = speedup(seconds["dynamic"], seconds[way])
    if options.device.type == "cuda":
        row |= on_cuda(model, ids, nodes, row, options)
    return row


def _run(model: Any, ids: Tensor, nodes: int, new_bytes: int, how: dict[str, Any], repeat: int) -> None:
    write(model, ids, nodes, new_bytes, **how)


def on_cuda(model: Any, ids: Tensor, nodes: int, row: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """How near a step comes to what the device can do."""
    weights = sum(parameter.nbytes for parameter in model.parameters())
    weights -= model.get_input_embeddings().weight.nbytes  # of which a step reads single rows
    length = ids.shape[1] + options.new_bytes
    cache_bytes = static_cache_bytes if isinstance(model, EvaByteForCausalLM) else static_tree_cache_bytes
    cache = cache_bytes(model.config, ids.shape[0], length, nodes + 1, model.dtype)
    bandwidth, peak = copy_bandwidth(options.device), matmul_peak(model.dtype, options.device)
    torch.cuda.reset_peak_memory_stats(options.device)
    write(model, ids, nodes, options.new_bytes, **ways_of(model)["compiled"])
    beyond = torch.cuda.max_memory_allocated(options.device) - cache
    beyond -= sum(parameter.nbytes for parameter in model.parameters())
    operations = 2 * weights / model.dtype.itemsize * ids.numel()
    floor = 1000 * (weights + cache) / bandwidth
    return {
        "copy_bytes_per_second": bandwidth,
        "floor_ms": floor,
        "share_of_bandwidth": floor / row["ms_per_step"]["compiled"]["median"],
        "matmul_operations_per_second": peak,
        "prefill_share_of_matmul": operations / (row["prefill_ms"]["median"] / 1000) / peak,
        "cache_bytes": cache,
        "peak_bytes_beyond_weights_and_cache": beyond,
    }


def best_seconds(run: Callable[[], Any], device: torch.device, repeats: int = 5) -> float:
    """Seconds of the fastest of some runs, after a warm-up."""
    run()
    return min(interleave({"": lambda _: run()}, repeats, device)[""])


def copy_bandwidth(device: torch.device, size: int = 2**31) -> float:
    """Bytes per second, read and written, of a large copy."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / best_seconds(lambda: target.copy_(source), device)


def matmul_peak(dtype: torch.dtype, device: torch.device, size: int = 8192) -> float:
    """Operations per second of a large matrix product."""
    left, right = torch.randn(2, size, size, dtype=dtype, device=device)
    return 2 * size**3 / best_seconds(lambda: left @ right, device)


def measure_published(options: argparse.Namespace, model: Any) -> dict[str, Any]:
    """Milliseconds a step of the published code, at batch size 1, with the measured model's weights (published.py)."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        task = {
            "weights": folder,
            "ids": prompts(1, options.prompt_bytes, options.device)[0].tolist(),
            "new_bytes": options.new_bytes,
            "repeats": options.repeats,
            "device": str(options.device),
            "dtype": str(model.dtype).removeprefix("torch."),
        }
        command = [options.published_python, Path(__file__).with_name("published.py"), options.published]
        done = subprocess.run(command, input=json.dumps(task), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"--published: the published code failed:\n{done.stderr[-2000:]}")
    result = json.loads(done.stdout.splitlines()[-1])
    for name in ("generate", "multi_byte_generate"):
        row = result[name]
        steps = zip(row.pop("seconds"), row.pop("seconds_of_one_byte"), strict=True)
        row["ms_per_step"] = spread([1000 * (total - one) / max(row["forwards"] - 1, 1) for total, one in steps])
    return result


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", type=Path, help="folder of an EvaByte (default: the bundled one)")
    which.add_argument("--shape", choices=SHAPES, help="random weights of this size")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="default: cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of the timings")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="batch sizes")
    parser.add_argument("--nodes", type=int, nargs="+", default=[0, 8], help="drafted nodes; 0 for `generate`")
    parser.add_argument("--prompt-bytes", type=int, default=512)
    parser.add_argument("--new-bytes", type=int, default=256, help="bytes to write, 2 or more")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--int8", action="store_true", help="weight-only int8 (torchao)")
    parser.add_argument("--published", type=Path, metavar="FOLDER", help="a copy of the published code, to be measured")
    parser.add_argument("--published-python", default=sys.executable, help="of an environment with transformers 4.47")
    parser.add_argument("--save", metavar="NAME", help="keep the result as results/NAME.json")
    options = parser.parse_args(arguments)
    if options.new_bytes < 2:
        parser.error(f"--new-bytes must be at least 2, since the prefill brings one; got {options.new_bytes}")
    return options


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse_arguments(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    result: dict[str, Any] = {"benchmark": "engine", "provenance": provenance("engine.py", arguments, options.device)}
    result["settings"] = {
        name: value
        for name, value in vars(options).items()
        if name not in ("model", "published", "published_python", "save")
    }
    model = load(options)
    result["model"] = {
        "name": options.shape or Path(options.model or bundled_checkpoint()).name,
        "parameters": model.num_parameters(),
        "attention": model.config._attn_implementation,
    }
    cases = [(batch, nodes) for batch in options.batch for nodes in options.nodes]
    for batch, nodes in cases:
        shares = agreement(model, prompts(batch, options.prompt_bytes, options.device), nodes, options.new_bytes)
        if min(shares.values()) < 1:
            raise SystemExit(f"Nothing is timed: batch {batch}, {nodes} nodes differ from `generate`: {shares}.")
    result["equal_to_generate_in_float32"] = True
    print(f"Checked: all ways give generate's bytes in float32 ({len(cases)} cases).", flush=True)

    model.to(getattr(torch, options.dtype))
    if options.int8:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(model, Int8WeightOnlyConfig())
    if options.int8 or options.dtype != "float32":  # rounding differs from way to way: reported, not required
        ids = prompts(1, options.prompt_bytes, options.device)
        result["agreement_with_generate"] = agreement(model, ids, max(options.nodes), options.new_bytes)
    result["rows"] = []
    print("\nmilliseconds a step, median (min to max), and speed-up over the dynamic cache per step and per call")
    for batch, nodes in cases:
        row = measure(model, batch, nodes, options)
        result["rows"].append(row)
        for way, milliseconds in row["ms_per_step"].items():
            faster = ""
            if way != "dynamic":
                faster = f"  x{between(row[f'{way}_step_speedup'])}  x{between(row[f'{way}_call_speedup'])}"
            rate = row["bytes_per_second"][way]["median"]
            print(
                f"batch {batch:3} nodes {nodes:3} {way:9} {between(milliseconds)}  {rate:8.1f} bytes/s{faster}",
                flush=True,
            )
    if options.published is not None:
        result["published"] = measure_published(options, model)
    finish(result, options.save)
    return result


if __name__ == "__main__":
    main()
