"""Drafters compared: bytes per forward and bytes per second, by temperature, kind of text and batch size.

    python examples/benchmarks/drafters.py --threads 2
    python examples/benchmarks/drafters.py --device cuda --dtype bfloat16 --save drafters-cuda

First comes a check: in float32, greedy decoding with every drafter must give the bytes of greedy `generate`. Then every
drafter continues the same held-out prompts in turn. The kinds of text: "prose", "code", and "edit", where the prompt
holds a file and the first part of a copy of it with some words renamed, and the bytes per forward are those of writing
the rest of the copy: the text is forced, so that they do not depend on whether the model would copy.

The last line is one JSON object with everything; `--save NAME` keeps it as results/NAME.json.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from decode import PLAIN, prompt_batches
from measure import HELDOUT, finish, interleave, provenance, spread
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from evabyte import EvaByteForCausalLM, EvaByteTokenizer
from evabyte.bundled import bundled_checkpoint

DRAFTERS = ("chain", "tree31", "tree95", "dynamic:16", "dynamic:32", "dynamic:64", "lookup", "dynamic:16+lookup")


class ForcedText(LogitsProcessor):
    """Makes every row write a given continuation, so that drafters are compared on the same text.

    Args:
        continuations: int64 [B, n].
        start: length of the prompts.
    """

    def __init__(self, continuations: Tensor, start: int) -> None:
        self.continuations = continuations
        self.start = start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        place = input_ids.shape[1] - self.start
        return torch.full_like(scores, float("-inf")).scatter_(1, self.continuations[:, place, None], 0.0)


def edit_batch(batch: int, new_bytes: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A file, then a copy of it with names changed: prompts int64 [B, n] and how they go on, int64 [B, new_bytes]."""
    tokenizer, text = EvaByteTokenizer(), next(HELDOUT.glob("code*")).read_text(encoding="utf-8")
    size = 2 * new_bytes
    prompts, continuations = [], []
    for row in range(batch):
        begin = row * (len(text) - size) // max(batch, 1)
        original = text[begin : begin + size]
        edited = original.replace("self", "this").replace("name", "label")
        whole = tokenizer.encode_bytes(f"{original}\n# renamed:\n{edited}".encode())
        cut = len(whole) - new_bytes
        prompts.append(whole[:cut])
        continuations.append(whole[cut:])
    longest = max(map(len, prompts))
    padded = [[tokenizer.pad_token_id] * (longest - len(prompt)) + prompt for prompt in prompts]
    return torch.tensor(padded, device=device), torch.tensor(continuations, device=device)


def draft_arguments(name: str) -> dict[str, Any]:
    """The arguments that "dynamic:32+lookup" and the like stand for."""
    base, _, other = name.partition("+")
    base, _, nodes = base.partition(":")
    arguments: dict[str, Any] = {"draft": f"{base}+{other}" if other else base}
    return arguments | ({"draft_nodes": int(nodes)} if nodes else {})


def tasks(kind: str, batch: int, prompts: int, new_bytes: int, device: torch.device) -> list[dict[str, Any]]:
    """Arguments for `generate` of every batch of prompts of one kind."""
    if kind == "edit":
        ids, continuations = edit_batch(batch, new_bytes, device)
        forced = LogitsProcessorList([ForcedText(continuations, ids.shape[1])])
        return [{"input_ids": ids, "attention_mask": (ids != 0).long(), "logits_processor": forced}]
    batches = prompt_batches(max(prompts, batch), (256, 512), batch, device)
    return [dict(batch_.inputs) for batch_ in batches if batch_.source == kind]


def run(
    model: EvaByteForCausalLM, drafter: str, task: dict[str, Any], new_bytes: int, temperature: float, seed: int
) -> tuple[Tensor, Tensor | None]:
    """Ids and bytes per forward [B, forwards] of one batch, by `generate` or with a drafter."""
    options: dict[str, Any] = {"max_new_tokens": new_bytes, "do_sample": temperature > 0, "eos_token_id": None}
    if temperature > 0:
        options |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
    torch.manual_seed(seed)
    if drafter == PLAIN:
        return model.generate(**task, **options), None
    return model.multi_byte_generate(**task, **options, **draft_arguments(drafter), return_acc_lengths=True)


def bytes_per_forward(lengths: Tensor) -> float:
    """Mean over the verifying forwards that brought a row something; the prefill's byte is left out."""
    verified = lengths[:, 1:]
    return verified.sum().item() / max((verified > 0).sum().item(), 1)


def require_equal_bytes(model: EvaByteForCausalLM, drafters: Sequence[str], new_bytes: int) -> None:
    """The check that comes before every timing.

    Raises:
        SystemExit: when a drafter changes what greedy decoding writes.
    """
    for kind in ("prose", "code", "edit"):
        task = tasks(kind, 2, 2, new_bytes, model.device)[0]
        expected, _ = run(model, PLAIN, task, new_bytes, 0.0, 0)
        for drafter in drafters:
            if not torch.equal(run(model, drafter, task, new_bytes, 0.0, 0)[0], expected):
                raise SystemExit(f"No speed is measured: drafter {drafter!r} changes greedy output on {kind}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=None, help="model folder (default: the bundled model)")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--dtype", default="float32", help="dtype of the timings; the check runs in float32")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0, 0.7, 1.0])
    parser.add_argument("--kind", nargs="+", default=["prose", "code", "edit"], choices=["prose", "code", "edit"])
    parser.add_argument("--drafter", nargs="+", default=list(DRAFTERS))
    parser.add_argument("--prompts", type=int, default=4, help="prompts of each kind (at least the batch size)")
    parser.add_argument("--new-bytes", type=int, default=192)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--save", default=None, metavar="NAME", help="keep the result as results/NAME.json")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    folder = options.model or bundled_checkpoint()
    model = EvaByteForCausalLM.from_pretrained(folder, dtype=torch.float32).to(options.device).eval()
    require_equal_bytes(model, options.drafter, min(options.new_bytes, 64))
    model = model.to(getattr(torch, options.dtype))

    rows = []
    for kind in options.kind:
        for batch in options.batch:
            todo = tasks(kind, batch, options.prompts, options.new_bytes, options.device)
            for temperature in options.temperature if kind != "edit" else [0.0]:
                rows += compare(model, kind, batch, temperature, todo, options)
    result = {"provenance": provenance("drafters.py", sys.argv[1:], options.device), "model": folder.name, "rows": rows}
    finish(result, options.save)


def compare(
    model: EvaByteForCausalLM,
    kind: str,
    batch: int,
    temperature: float,
    todo: list[dict[str, Any]],
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    """All drafters on the same prompts in turn; prints and returns a row of results each."""
    seen: dict[str, list[Tensor]] = {drafter: [] for drafter in options.drafter}
    seconds: dict[str, list[float]] = {drafter: [] for drafter in (PLAIN, *options.drafter)}

    def alternative(drafter: str, task: dict[str, Any]) -> Any:
        def decode(seed: int) -> None:
            lengths = run(model, drafter, task, options.new_bytes, temperature, seed)[1]
            if lengths is not None:
                seen[drafter].append(lengths)

        return decode

    for task in todo:
        alternatives = {drafter: alternative(drafter, task) for drafter in seconds}
        for drafter, measured in interleave(alternatives, options.repeats, options.device).items():
            seconds[drafter] += measured
    rows = []
    for drafter, measured in seconds.items():
        row = {
            "kind": kind,
            "batch": batch,
            "temperature": temperature,
            "drafter": drafter,
            "bytes_per_second": spread([batch * options.new_bytes / s for s in measured]),
            "over_generate": spread([base / s for base, s in zip(seconds[PLAIN], measured, strict=True)]),
        }
        if drafter != PLAIN:
            counts = [bytes_per_forward(lengths) for lengths in seen[drafter]]
            row["bytes_per_forward"] = spread(counts)
        rows.append(row)
        forwards = f"{row['bytes_per_forward']['mean']:5.2f} bytes/forward" if drafter != PLAIN else " " * 19
        print(
            f"{kind:6} batch {batch:3} T {temperature:3.1f} {drafter:18} {forwards} "
            f"{row['bytes_per_second']['median']:8.0f} bytes/s  {row['over_generate']['median']:5.2f} x generate",
            flush=True,
        )
    return rows


if __name__ == "__main__":
    main()
