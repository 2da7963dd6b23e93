"""Where a step of multibyte decoding goes: drafting, the model's forward, the walk, the commit.

    python examples/benchmarks/overhead.py --threads 2

Every part is timed from outside, by wrapping the method that does it, over a whole run at batch size 1. "Overhead" is
the share of a step that is not the model's forward. The last line is one JSON object; `--save NAME` keeps it.
"""

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import HELDOUT, finish, provenance, spread, synchronize

from evabyte import EvaByteForCausalLM, EvaByteTokenizer
from evabyte.bundled import bundled_checkpoint
from evabyte.multibyte_generation import _Run
from evabyte.tree_verifier import TreeVerifier

PARTS = {
    "draft": (TreeVerifier, "draft"),
    "forward": (TreeVerifier, "verify"),
    "walk": (_Run, "_walk"),
    "commit": (TreeVerifier, "commit"),
}


class Stopwatch:
    """Seconds spent in methods, by name; also calls."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)

    def wrap(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            synchronize(self.device)
            began = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                synchronize(self.device)
                self.seconds[name] += time.perf_counter() - began

        return timed


def profile(model: EvaByteForCausalLM, prompt: torch.Tensor, draft: str, nodes: int | None, new_bytes: int) -> dict:
    """Milliseconds per step of every part, for one greedy run."""
    stopwatch = Stopwatch(model.device)
    parts = {**PARTS, "step": (_Run, "step")}
    originals = {part: getattr(owner, method) for part, (owner, method) in parts.items()}
    try:
        for part, (owner, method) in parts.items():
            setattr(owner, method, stopwatch.wrap(part, originals[part]))
        arguments: dict[str, Any] = {"draft": draft, "draft_nodes": nodes, "max_new_tokens": new_bytes}
        _, lengths = model.multi_byte_generate(
            prompt, do_sample=False, eos_token_id=None, return_acc_lengths=True, **arguments
        )
    finally:
        for part, (owner, method) in parts.items():
            setattr(owner, method, originals[part])
    steps = lengths.shape[1] - 1
    return {part: 1000 * seconds / steps for part, seconds in stopwatch.seconds.items()} | {"steps": steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=None, help="model folder (default: the bundled model)")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--draft", nargs="+", default=["chain", "dynamic", "tree31", "dynamic+lookup"])
    parser.add_argument("--new-bytes", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--save", default=None, metavar="NAME", help="keep the result as results/NAME.json")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    folder = options.model or bundled_checkpoint()
    dtype = getattr(torch, options.dtype)
    model = EvaByteForCausalLM.from_pretrained(folder, dtype=dtype).to(options.device).eval()
    text = next(HELDOUT.glob("prose*")).read_bytes()[:512]
    prompt = torch.tensor([EvaByteTokenizer().encode_bytes(text)], device=options.device)

    rows = []
    for draft in options.draft:
        profile(model, prompt, draft, None, 40)  # warm-up
        runs = [profile(model, prompt, draft, None, options.new_bytes) for _ in range(options.repeats)]
        row = {part: spread([run[part] for run in runs])["median"] for part in (*PARTS, "step")}
        row["overhead"] = spread([1 - run["forward"] / run["step"] for run in runs])
        rows.append({"draft": draft, **row})
        parts = "  ".join(f"{part} {row[part]:6.3f}" for part in PARTS)
        print(
            f"{draft:15} ms per step: {row['step']:6.3f} = {parts}; overhead {row['overhead']['median']:.1%}",
            flush=True,
        )
    facts = {"provenance": provenance("overhead.py", sys.argv[1:], options.device), "model": folder.name, "rows": rows}
    finish(facts, options.save)


if __name__ == "__main__":
    main()
