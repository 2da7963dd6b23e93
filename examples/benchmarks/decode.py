"""Decoding speed: multibyte decoding beside `generate`, and the time per byte as the context grows.

    python examples/benchmarks/decode.py --threads 2
    python examples/benchmarks/decode.py --device cuda --dtype bfloat16 --batch 1 4 --save decode-cuda

First comes a check: in float32, greedy `multi_byte_generate` must give the bytes of greedy `generate` for every prompt
and draft, or no speed is measured at all. Then two parts:

- multibyte: held-out prompts, continued by `generate` and by `multi_byte_generate` with each draft, in turn. Bytes per
  second count the whole call, prefill included; end of text does not stop it, so all give equally many bytes.
- context: one-byte steps behind 1k to 32k bytes of context, beside a Llama of the same shape with full attention and
  random weights, once on transformers' `DynamicCache`, which copies all keys at every step, and once on its
  `StaticCache`, which does not. Timed in blocks of steps, over as many steps as a window has, so that every state of
  EVA's window counts. The context is prefilled in pieces.

The last line is one JSON object with everything; `--save NAME` keeps it as results/NAME.json.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from context_growth import measure_context, plot_context, print_context
from measure import HELDOUT, between, finish, interleave, provenance, speedup, spread
from torch import Tensor
from transformers import BatchEncoding

from evabyte import EvaByteForCausalLM, EvaByteTokenizer
from evabyte.bundled import bundled_checkpoint

PLAIN = "generate"
DRAFTS = ("chain", "dynamic", "tree31", "tree95")


class PromptBatch(NamedTuple):
    source: str  # "prose" or "code"
    inputs: BatchEncoding  # `input_ids` and `attention_mask`, int64 [B, longest prompt], padded on the left


def prompt_batches(per_source: int, sizes: Sequence[int], batch: int, device: torch.device) -> list[PromptBatch]:
    """Prompts cut from the held-out texts at fixed, evenly spaced offsets.

    Args:
        per_source: prompts of each text.
        sizes: their lengths in bytes, taken in turn.
        batch: rows per batch.

    Raises:
        SystemExit: when the prompts do not fill the batches or do not fit the text.
    """
    if per_source % batch:
        raise SystemExit(f"--prompts {per_source} must be a multiple of every --batch, and {batch} is given.")
    tokenizer = EvaByteTokenizer()
    batches = []
    for path in sorted(HELDOUT.glob("*.txt")):
        text = path.read_bytes()
        distance = len(text) // per_source
        if max(sizes) > distance:
            raise SystemExit(f"--prompts {per_source} of --prompt-bytes {max(sizes)} do not fit into {path.name}.")
        begins_and_sizes = [(index * distance, sizes[index % len(sizes)]) for index in range(per_source)]
        rows = [tokenizer.encode_bytes(text[begin : begin + size]) for begin, size in begins_and_sizes]
        for first in range(0, per_source, batch):
            padded = tokenizer.pad({"input_ids": rows[first : first + batch]}, padding_side="left", return_tensors="pt")
            batches.append(PromptBatch(path.name.split(".")[0], padded.to(device)))
    return batches


def decode(
    model: EvaByteForCausalLM, method: str, inputs: BatchEncoding, new_bytes: int, temperature: float, seed: int = 0
) -> tuple[Tensor, Tensor | None]:
    """Continue prompts with `generate` or with the draft named by `method`.

    Returns:
        ids, int64 [B, prompt + new_bytes]; and int64 [B, forwards], the bytes each forward brought, the prefill's first
        (None for `generate`).
    """
    options: dict[str, Any] = {"max_new_tokens": new_bytes, "do_sample": temperature > 0}
    if temperature > 0:
        options |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
    torch.manual_seed(seed)
    if method == PLAIN:
        return model.generate(**inputs, **options), None
    return model.multi_byte_generate(**inputs, **options, draft=method, return_acc_lengths=True)


def require_equal_bytes(model: EvaByteForCausalLM, batches: Sequence[PromptBatch], new_bytes: int) -> None:
    """The check that comes before every timing.

    Raises:
        SystemExit: when greedy multibyte decoding gives other bytes than greedy `generate`.
    """
    for number, batch in enumerate(batches):
        expected, _ = decode(model, PLAIN, batch.inputs, new_bytes, temperature=0)
        for draft in DRAFTS:
            ids, _ = decode(model, draft, batch.inputs, new_bytes, temperature=0)
            if not torch.equal(ids, expected):
                width = min(ids.shape[1], expected.shape[1])
                differing = (ids[:, :width] != expected[:, :width]).any(dim=0).nonzero().flatten().tolist()
                new = (differing[0] if differing else width) - batch.inputs["input_ids"].shape[1]
                raise SystemExit(
                    f"No speed is measured: with draft {draft!r}, greedy decoding in {model.dtype} differs from "
                    f"`generate` from new byte {new} on, for prompt batch {number} ({batch.source})."
                )


def measure_multibyte(
    model: EvaByteForCausalLM, batches: Sequence[PromptBatch], new_bytes: int, temperature: float, repeats: int
) -> list[dict[str, Any]]:
    """One row of results per source and draft; every prompt batch and repeat is one pair of timings.

    With sampling, each repeat has its own seed, the same for all methods.
    """
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    acc_lengths: dict[tuple[str, str], list[Tensor]] = defaultdict(list)

    def run(batch: PromptBatch, method: str, repeat: int) -> None:
        _, lengths = decode(model, method, batch.inputs, new_bytes, temperature, seed=repeat)
        if lengths is not None:
            acc_lengths[batch.source, method].append(lengths)

    for method in (PLAIN, *DRAFTS):
        decode(model, method, batches[0].inputs, new_bytes, temperature)  # warm-up
    for batch in batches:
        alternatives = {method: partial(run, batch, method) for method in (PLAIN, *DRAFTS)}
        for method, times in interleave(alternatives, repeats, model.device).items():
            seconds[batch.source, method] += times

    rows_per_batch = batches[0].inputs["input_ids"].shape[0]
    results = []
    for (source, draft), lengths in acc_lengths.items():
        plain, times = seconds[source, PLAIN], seconds[source, draft]
        drafted = torch.cat([each[:, 1:].flatten() for each in lengths])  # without the prefill's single byte
        results.append(
            {
                "batch": rows_per_batch,
                "temperature": temperature,
                "source": source,
                "draft": draft,
                "pairs": len(times),
                "generate_bytes_per_second": spread([rows_per_batch * new_bytes / each for each in plain]),
                "bytes_per_second": spread([rows_per_batch * new_bytes / each for each in times]),
                "speedup": speedup(plain, times),
                "bytes_per_forward": round(drafted[drafted > 0].double().mean().item(), 3),
            }
        )
    return results


def print_multibyte(rows: list[dict[str, Any]]) -> None:
    print("\nMultibyte decoding: bytes per second (medians), and speed-up over generate: median (min to max) of pairs")
    print("batch  temp  source  draft    bytes/forward  generate  multibyte  speed-up")
    for row in rows:
        print(
            f"{row['batch']:5}  {row['temperature']:4.1f}  {row['source']:6}  {row['draft']:7}"
            f"  {row['bytes_per_forward']:13.2f}  {row['generate_bytes_per_second']['median']:8.1f}"
            f"  {row['bytes_per_second']['median']:9.1f}  {between(row['speedup'])}"
        )


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub name of an EvaByte (default: the bundled one)")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="default: cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of the timings")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's)")
    parser.add_argument("--parts", nargs="+", choices=["multibyte", "context"], default=["multibyte", "context"])
    parser.add_argument("--repeats", type=int, default=3, help="timings of each prompt batch and of each prefill")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="batch sizes")
    parser.add_argument("--prompts", type=int, default=4, help="prompts per held-out text")
    parser.add_argument("--prompt-bytes", type=int, nargs="+", default=[256, 512, 1024], help="their lengths, in turn")
    parser.add_argument("--new-bytes", type=int, default=256, help="bytes to generate per prompt, 2 or more")
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0, 0.8], help="0 is greedy")
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024 * 2**power for power in range(6)])
    parser.add_argument("--steps", type=int, help="bytes written behind each context (default: a window)")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the time per byte over the context")
    parser.add_argument("--save", metavar="NAME", help="keep the result as results/NAME.json")
    options = parser.parse_args(arguments)
    if options.new_bytes < 2:
        parser.error(f"--new-bytes must be at least 2, since the prefill brings one; got {options.new_bytes}")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse_arguments(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    folder = options.model or bundled_checkpoint()
    result: dict[str, Any] = {
        "benchmark": "decode",
        "provenance": provenance("decode.py", arguments, options.device),
        "settings": vars(options),
    }
    model = EvaByteForCausalLM.from_pretrained(folder, dtype=torch.float32).to(options.device).eval()
    model.generation_config.eos_token_id = None
    result["model"] = {
        "name": Path(folder).name,
        "parameters": model.num_parameters(),
        "attention": model.config._attn_implementation,
        **{name: getattr(model.config, name) for name in ("num_hidden_layers", "hidden_size", "window_size")},
    }

    batches = {
        size: prompt_batches(options.prompts, options.prompt_bytes, size, options.device) for size in options.batch
    }
    for each in batches.values():
        require_equal_bytes(model, each, options.new_bytes)
    result["equal_to_generate_in_float32"] = True
    print(f"Checked: greedy multibyte decoding gives generate's bytes (batch sizes {options.batch}).", flush=True)

    model.to(getattr(torch, options.dtype))
    if "multibyte" in options.parts:
        result["multibyte"] = [
            row
            for each in batches.values()
            for temperature in options.temperature
            for row in measure_multibyte(model, each, options.new_bytes, temperature, options.repeats)
        ]
        print_multibyte(result["multibyte"])
    if "context" in options.parts:
        result["context"] = measure_context(model, options.contexts, options.steps, options.repeats)
        print_context(result["context"])
        if options.plot is not None:
            where = result["provenance"]["device"] if options.device.type != "cpu" else result["provenance"]["cpu"]
            plot_context(result["context"], f"{result['model']['name']}, {options.dtype}, {where}", options.plot)
    finish(result, options.save)


if __name__ == "__main__":
    main()
