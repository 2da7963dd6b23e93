"""Answer many prompts at once: they share a batch, and each leaves it when it is done.

    python examples/serve_batch.py prompts.txt --rows 8 --new-bytes 200
    printf 'The House of\ndef main(' | python examples/serve_batch.py --model FOLDER --temperature 0.8
    python examples/serve_batch.py prompts.txt --compare

Prompts are lines of a file or of standard input. Answers are printed as they finish, each behind its prompt's number;
the last line says how many bytes a second came out of all together. `--compare` prints no answers but measures the same
prompts beside one request after the other and padded batches, once greedy bytes are known to be equal.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import byte_llama  # noqa: F401  (makes byte-level Llama and Gemma 2 known to the Auto classes)
from evabyte.bundled import bundled_checkpoint
from evabyte.engine import ByteEngine, Request


def answer_all(engine: ByteEngine, tokenizer: Any, prompts: Sequence[str], options: dict[str, Any]) -> int:
    """Print every answer as it finishes; -> how many ids were written."""
    requests: list[Request] = [engine.submit(tokenizer.encode(prompt), **options) for prompt in prompts]
    open_requests = list(requests)
    while open_requests:
        engine.step()
        for request in [request for request in open_requests if request.ended]:
            open_requests.remove(request)
            text = tokenizer.decode(request.new_ids, skip_special_tokens=True)
            print(f"[{request.number + 1}] {text}", flush=True)
    return sum(len(request.new_ids) for request in requests)


def compare(model: Any, tokenizer: Any, prompts: Sequence[str], new_bytes: int, rows: int) -> None:
    """Print the bytes per second of the ways to serve these prompts."""
    sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
    from batching import Job, measure, print_measured, require_equal_bytes, ways_to_serve

    jobs = [Job(tokenizer.encode(prompt), new_bytes) for prompt in prompts]
    ways = ways_to_serve(model, jobs, sorted({1, rows}))
    require_equal_bytes(model, jobs, ways)
    print_measured(measure(model, jobs, ways, repeats=3))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", nargs="?", type=argparse.FileType("r"), default=sys.stdin, help="one per line")
    parser.add_argument("--model", default=bundled_checkpoint(), help="folder or Hub id (default: the bundled EvaByte)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rows", type=int, default=8, help="prompts that share a batch")
    parser.add_argument("--new-bytes", type=int, default=200, help="per answer, at most")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--seed", type=int, help="with a temperature, for the same answers again")
    parser.add_argument("--draft", help="what is drafted (default: the model's)")
    parser.add_argument("--compare", action="store_true", help="measure instead of answering")
    options = parser.parse_args(arguments)
    prompts = [line.rstrip("\n") for line in options.prompts if line.strip()]
    if not prompts:
        parser.error("there are no prompts: give a file with one per line, or write them to standard input")

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    dtype = getattr(torch, options.dtype)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).to(options.device).eval()
    if options.compare:
        compare(model, tokenizer, prompts, options.new_bytes, options.rows)
        return
    if options.seed is not None:
        torch.manual_seed(options.seed)
    with ByteEngine(model, max_batch_size=options.rows, draft=options.draft, tokenizer=tokenizer) as engine:
        sampling = {"do_sample": options.temperature > 0, "temperature": options.temperature}
        began = time.perf_counter()
        written = answer_all(engine, tokenizer, prompts, {"max_new_tokens": options.new_bytes, **sampling})
        seconds = time.perf_counter() - began
    print(f"{written} bytes for {len(prompts)} prompts in {seconds:.1f} s: {written / seconds:.1f} bytes/s")


if __name__ == "__main__":
    main()
