"""Many requests: an engine that rows join and leave, beside one request after the other and padded batches.

    python examples/benchmarks/batching.py --threads 1 --save engine-batch-cpu
    python examples/benchmarks/batching.py --device cuda --dtype bfloat16 --rows 1 8 32 --requests 64 --model FOLDER

Requests are held-out prompts of different lengths that ask for different numbers of bytes. Three ways to serve them:

- alone: `multi_byte_generate`, one request after the other;
- padded: `multi_byte_generate` on batches of `rows` requests, each batch as long as its longest request;
- engine: `ByteEngine(max_batch_size=rows)`, all requests submitted at once.

First comes a check: in float32, greedy, every request's bytes must be those of `generate`, or nothing is timed. Bytes
per second count what was asked for, prefill included; end of text stops no request. Ways run in turn, round by round.

The last line is one JSON object with everything; `--save NAME` keeps it as results/NAME.json.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measure import HELDOUT, between, finish, interleave, provenance, speedup, spread
from torch import Tensor
from transformers import AutoModelForCausalLM

from evabyte import EvaByteTokenizer
from evabyte.bundled import bundled_checkpoint
from evabyte.engine import ByteEngine

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


class Job(NamedTuple):
    prompt: list[int]
    new_bytes: int


def heldout_jobs(count: int, prompt_bytes: Sequence[int], new_bytes: Sequence[int]) -> list[Job]:
    """Requests cut from the held-out texts at evenly spaced offsets; sizes are taken in turn.

    Raises:
        SystemExit: when the texts are too short for so many.
    """
    tokenizer, texts = EvaByteTokenizer(), [path.read_bytes() for path in sorted(HELDOUT.glob("*.txt"))]
    distance = min(map(len, texts)) // -(-count // len(texts))
    if max(prompt_bytes) > distance:
        raise SystemExit(
            f"--requests {count} of --prompt-bytes {max(prompt_bytes)} do not fit into the held-out texts."
        )
    jobs = []
    for number in range(count):
        begin, size = number // len(texts) * distance, prompt_bytes[number % len(prompt_bytes)]
        prompt = tokenizer.encode_bytes(texts[number % len(texts)][begin : begin + size])
        # Sizes of prompts and answers go round at different times.
        jobs.append(Job(prompt, new_bytes[number // len(prompt_bytes) % len(new_bytes)]))
    return jobs


def alone(model: Any, jobs: Sequence[Job]) -> list[list[int]]:
    """New ids of every job, one after the other."""
    return [written for job in jobs for written in padded(model, [job], 1)]


def padded(model: Any, jobs: Sequence[Job], rows: int) -> list[list[int]]:
    """New ids of every job, in batches padded on the left."""
    written = []
    for first in range(0, len(jobs), rows):
        batch = jobs[first : first + rows]
        longest = max(len(job.prompt) for job in batch)
        missing = [longest - len(job.prompt) for job in batch]
        ids = torch.tensor([[0] * pads + job.prompt for pads, job in zip(missing, batch, strict=True)])
        mask = torch.arange(longest) >= torch.tensor(missing)[:, None]
        most = max(job.new_bytes for job in batch)
        output: Tensor = model.multi_byte_generate(
            ids.to(model.device), attention_mask=mask.long().to(model.device), max_new_tokens=most, **GREEDY
        )
        new = output[:, longest:].tolist()
        written += [ids[: job.new_bytes] for ids, job in zip(new, batch, strict=True)]
    return written


def in_engine(model: Any, jobs: Sequence[Job], rows: int, **sizes: Any) -> list[list[int]]:
    """New ids of every job, all submitted at once."""
    engine = ByteEngine(model, max_batch_size=rows, **sizes)
    requests = [engine.submit(job.prompt, max_new_tokens=job.new_bytes, **GREEDY) for job in jobs]
    engine.run()
    return [request.new_ids for request in requests]


Serve = Callable[[], list[list[int]]]


def ways_to_serve(model: Any, jobs: Sequence[Job], rows: Sequence[int], **sizes: Any) -> dict[tuple[str, int], Serve]:
    """By name and number of rows."""
    ways: dict[tuple[str, int], Serve] = {("alone", 1): partial(alone, model, jobs)}
    for count in rows:
        if count > 1:
            ways["padded", count] = partial(padded, model, jobs, count)
        ways["engine", count] = partial(in_engine, model, jobs, count, **sizes)
    return ways


def require_equal_bytes(model: Any, jobs: Sequence[Job], ways: dict[tuple[str, int], Serve]) -> None:
    """The check that comes before every timing.

    Raises:
        SystemExit: when a request's bytes are not those of greedy `generate`.
    """
    expected = []
    for job in jobs:
        ids = torch.tensor([job.prompt], device=model.device)
        output = model.generate(ids, max_new_tokens=job.new_bytes, multibyte=False, **GREEDY)
        expected.append(output[0, len(job.prompt) :].tolist())
    for (name, rows), serve in ways.items():
        for number, (found, wanted) in enumerate(zip(serve(), expected, strict=True)):
            if found != wanted:
                raise SystemExit(
                    f"No speed is measured: request {number} gets other bytes from {name!r} at {rows} rows in "
                    f"{model.dtype} than from `generate`."
                )


def measure(model: Any, jobs: Sequence[Job], ways: dict[tuple[str, int], Serve], repeats: int) -> list[dict[str, Any]]:
    """One row of results per way; each repeat serves all requests once."""
    for serve in ways.values():
        serve()  # warm-up
    rounds = {way: (lambda _, serve=serve: serve()) for way, serve in ways.items()}
    seconds = interleave(rounds, repeats, model.device)
    total = sum(job.new_bytes for job in jobs)
    return [
        {
            "way": name,
            "rows": rows,
            "bytes_per_second": spread([total / each for each in times]),
            "speedup_over_alone": speedup(seconds["alone", 1], times),
            **({"speedup_over_padded": speedup(seconds["padded", rows], times)} if ("padded", rows) in seconds else {}),
            **({"speedup_over_one_row": speedup(seconds["engine", 1], times)} if ("engine", 1) in seconds else {}),
        }
        for (name, rows), times in seconds.items()
    ]


def print_measured(results: list[dict[str, Any]]) -> None:
    print("\nway     rows  bytes/s (median)  over one after the other: median (min to max)")
    for row in results:
        print(
            f"{row['way']:6}  {row['rows']:4}  {row['bytes_per_second']['median']:16.1f}"
            f"  {between(row['speedup_over_alone'])}"
        )


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub name of a byte-level model (default: the bundled EvaByte)")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="default: cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of the timings")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's)")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8], help="rows of a batch")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--prompt-bytes", type=int, nargs="+", default=[64, 256, 600], help="taken in turn")
    parser.add_argument("--new-bytes", type=int, nargs="+", default=[64, 128, 256], help="taken in turn")
    parser.add_argument("--nodes-per-step", type=int, help="the engine's (default: by device and rows)")
    parser.add_argument("--prefill-chunk-size", type=int, default=512, help="the engine's")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--save", metavar="NAME", help="keep the result as results/NAME.json")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse_arguments(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    folder = options.model or bundled_checkpoint()
    jobs = heldout_jobs(options.requests, options.prompt_bytes, options.new_bytes)
    result: dict[str, Any] = {
        "benchmark": "batching",
        "provenance": provenance("batching.py", arguments, options.device),
        "settings": {**vars(options), "model": Path(folder).name},
    }
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(options.device).eval()
    model.generation_config.eos_token_id = None
    result["model"] = {"parameters": model.num_parameters(), "attention": model.config._attn_implementation}

    sizes = {"nodes_per_step": options.nodes_per_step, "prefill_chunk_size": options.prefill_chunk_size}
    ways = ways_to_serve(model, jobs, options.rows, **sizes)
    require_equal_bytes(model, jobs, ways)
    result["equal_to_generate_in_float32"] = True
    print(f"Checked: {len(jobs)} requests get generate's bytes in every way.", flush=True)
    model.to(getattr(torch, options.dtype))
    result["bytes_per_round"] = sum(job.new_bytes for job in jobs)
    result["served"] = measure(model, jobs, ways, options.repeats)
    print_measured(result["served"])
    finish(result, options.save)


if __name__ == "__main__":
    main()
