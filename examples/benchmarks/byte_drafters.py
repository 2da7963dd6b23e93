"""Training-free drafts for a byte-level Llama or Gemma 2: bytes per full forward, and speed over plain decoding.

    python examples/benchmarks/byte_drafters.py --model FOLDER --threads 2 --save byte-drafters-cpu

The drafters: "lookup" (what followed the same bytes earlier), "subword" (completions of the current word from the
vocabulary the model came from), "self" (the model without the `--skip` layers whose absence changes its predictions on
another text least), and unions of them. First comes a check: greedy decoding with every drafter must give the bytes of
greedy `generate`. Then all continue the same held-out prompts in turn, as text "own". As text "forced" the held-out
continuation is written whatever the model would: with a model that is not trained on bytes yet, only that text is real.

The last line is one JSON object with everything; `--save NAME` keeps it as results/NAME.json.
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from drafters import ForcedText, bytes_per_forward
from measure import HELDOUT, finish, interleave, provenance, spread
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessorList

import byte_llama

PLAIN = "generate"
DRAFTERS = ["lookup", "subword", "subword+lookup", "self"]
CALIBRATED_ON = 192  # bytes of text that decide which layers are skipped; prompts come from elsewhere in the file


def prompts(tokenizer: Any, options: argparse.Namespace) -> list[tuple[str, Tensor, Tensor]]:
    """Kind, prompt int64 [1, n] and how it goes on, int64 [1, new_bytes], from both held-out files."""
    found = []
    for file in sorted(HELDOUT.glob("*.txt")):
        ids = tokenizer.encode_bytes(file.read_bytes(), add_special_tokens=True)
        size = options.prompt_bytes + options.new_bytes
        for number in range(options.prompts):
            begin = CALIBRATED_ON + number * (len(ids) - size - CALIBRATED_ON) // options.prompts
            piece = torch.tensor([ids[:1] + ids[begin : begin + size]])
            found.append((file.stem.split(".")[0], piece[:, : -options.new_bytes], piece[:, -options.new_bytes :]))
    return found


def run(
    model: Any, drafter: str, prompt: Tensor, forced: Tensor | None, new_bytes: int
) -> tuple[Tensor, Tensor | None]:
    """Ids and bytes per forward of one prompt, by `generate` or with a drafter."""
    how: dict[str, Any] = {"max_new_tokens": new_bytes, "do_sample": False, "eos_token_id": None}
    if forced is not None:
        how["logits_processor"] = LogitsProcessorList([ForcedText(forced, prompt.shape[1])])
    if drafter == PLAIN:
        return model.generate(prompt, **how), None
    return model.multi_byte_generate(prompt, draft=drafter, return_acc_lengths=True, **how)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a byte-level model")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--dtype", default="float32", help="dtype of the timings; the check runs in float32")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads")
    parser.add_argument("--drafter", nargs="+", default=DRAFTERS)
    parser.add_argument("--skip", type=int, default=6, help="layers that self-speculation leaves out")
    parser.add_argument("--prompts", type=int, default=2, help="prompts from each held-out file")
    parser.add_argument("--prompt-bytes", type=int, default=384)
    parser.add_argument("--new-bytes", type=int, default=96)
    parser.add_argument("--save", default=None, metavar="NAME", help="keep the result as results/NAME.json")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    arguments = [options.model.name if word == str(options.model) else word for word in sys.argv[1:]]
    began = provenance("byte_drafters.py", arguments, options.device)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).to(options.device).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    skipped = None
    if any(drafter.startswith("self") for drafter in options.drafter):
        text = next(HELDOUT.glob("prose*")).read_bytes()[:CALIBRATED_ON]
        skipped = byte_llama.layers_to_skip(model, torch.tensor([tokenizer.encode_bytes(text)]), options.skip)
        model.skip_layers(skipped)
    todo = [(kind, p.to(options.device), c.to(options.device)) for kind, p, c in prompts(tokenizer, options)]
    for drafter in options.drafter:
        for forced in (None, todo[0][2]):
            expected, _ = run(model, PLAIN, todo[0][1], forced, 32)
            if not torch.equal(run(model, drafter, todo[0][1], forced, 32)[0], expected):
                raise SystemExit(f"No speed is measured: drafter {drafter!r} changes greedy output.")
    model = model.to(getattr(torch, options.dtype))

    rows = []
    for text in ("forced", "own"):
        for kind in sorted({kind for kind, _, _ in todo}):
            rows += compare(model, text, [(p, c) for k, p, c in todo if k == kind], kind, options)
    result = {"provenance": began, "model": options.model.name, "skipped_layers": skipped, "rows": rows}
    finish(result, options.save)


def compare(
    model: Any, text: str, todo: list[tuple[Tensor, Tensor]], kind: str, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """All drafters on the same prompts in turn; prints and returns a row of results each."""
    counts: dict[str, list[float]] = {drafter: [] for drafter in options.drafter}
    seconds: dict[str, list[float]] = {drafter: [] for drafter in (PLAIN, *options.drafter)}

    def decode(drafter: str, prompt: Tensor, forced: Tensor | None, _: int) -> None:
        lengths = run(model, drafter, prompt, forced, options.new_bytes)[1]
        if lengths is not None:
            counts[drafter].append(bytes_per_forward(lengths))

    for prompt, continuation in todo:
        forced = continuation if text == "forced" else None
        alternatives = {drafter: partial(decode, drafter, prompt, forced) for drafter in seconds}
        for drafter, measured in interleave(alternatives, 1, options.device).items():
            seconds[drafter] += measured
    rows = []
    for drafter, measured in seconds.items():
        row: dict[str, Any] = {
            "text": text,
            "kind": kind,
            "drafter": drafter,
            "bytes_per_second": spread([options.new_bytes / s for s in measured]),
            "over_generate": spread([base / s for base, s in zip(seconds[PLAIN], measured, strict=True)]),
        }
        if drafter != PLAIN:
            row["bytes_per_forward"] = spread(counts[drafter])
        rows.append(row)
        forwards = f"{row['bytes_per_forward']['mean']:5.2f} bytes/forward" if drafter != PLAIN else " " * 19
        speed = f"{row['bytes_per_second']['median']:7.1f} bytes/s  {row['over_generate']['median']:5.2f} x generate"
        print(f"{text:7} {kind:6} {drafter:16} {forwards} {speed}", flush=True)
    return rows


if __name__ == "__main__":
    main()
