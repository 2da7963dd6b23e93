"""Time per byte as the context grows: an EvaByte beside a Llama of the same shape. A part of decode.py."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import HELDOUT, between, interleave, speedup, spread
from torch import Tensor
from transformers import AutoModelForCausalLM, Cache, DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from evabyte import EvaByteForCausalLM, EvaByteTokenizer

PREFILL_PIECE = 2048  # bytes that go through a model at once, so that memory stays bounded
BLOCK = 32  # steps timed in a row; single steps in turn would empty the processor's caches for each other
LABELS = {
    "evabyte": "EvaByte",
    "llama": "Llama, DynamicCache",
    "llama_static": "Llama, StaticCache",
}


class CachedModel:
    """A model, the cache of what it has read, and the byte it would write next; batch 1, greedy."""

    def __init__(self, model: EvaByteForCausalLM | LlamaForCausalLM) -> None:
        self.model = model
        self.cache: Cache | None = None

    def read(self, ids: Tensor) -> None:
        """Continue the cache by ids, int64 [1, N]."""
        outputs = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.next_id = outputs.logits[:, -1].argmax(dim=-1, keepdim=True)

    def prefill(self, ids: Tensor, repeat: int = 0) -> None:
        """Start a new cache with ids, int64 [1, N]."""
        self.cache = DynamicCache(config=self.model.config)
        for piece in ids.split(PREFILL_PIECE, dim=1):
            self.read(piece)

    def write(self, count: int, repeat: int = 0) -> None:
        """Write `count` bytes, one step each."""
        for _ in range(count):
            self.read(self.next_id)

    def copy_to_static_cache(self, steps: int) -> "CachedModel":
        """The same in a `StaticCache` with room for so many steps more."""
        copy = CachedModel(self.model)
        copy.cache = StaticCache(self.model.config, max_cache_len=self.cache.get_seq_length() + steps)
        for index, layer in enumerate(self.cache.layers):
            copy.cache.update(layer.keys, layer.values, index)
        copy.next_id = self.next_id
        return copy


def llama_of_same_shape(model: EvaByteForCausalLM, positions: int) -> LlamaForCausalLM:
    """A Llama with the same layers but full attention, and random weights."""
    config = LlamaConfig(
        vocab_size=model.config.vocab_size,
        hidden_size=model.config.hidden_size,
        intermediate_size=model.config.intermediate_size,
        num_hidden_layers=model.config.num_hidden_layers,
        num_attention_heads=model.config.num_attention_heads,
        max_position_embeddings=positions,
    )
    with model.device:  # made where it is used: a large one would take minutes on the CPU
        return AutoModelForCausalLM.from_config(config, dtype=model.dtype).eval()


def heldout_ids(length: int, device: torch.device) -> Tensor:
    """The held-out texts, repeated to int64 [1, length]."""
    text = b"".join(path.read_bytes() for path in sorted(HELDOUT.glob("*.txt")))
    text *= -(-length // len(text))
    return torch.tensor([EvaByteTokenizer().encode_bytes(text)[:length]], device=device)


@torch.no_grad()
def measure_context(
    model: EvaByteForCausalLM, contexts: Sequence[int], steps: int | None, repeats: int
) -> list[dict[str, Any]]:
    """One row of results per context length: prefill and time per byte of both models, side by side.

    Args:
        contexts: lengths in bytes to prefill.
        steps: bytes to write behind each; None for as many as a window has.
        repeats: times to prefill.
    """
    steps = steps or model.config.window_size
    block = min(BLOCK, steps)
    positions = max(contexts) + steps + 1
    # Speed is the same beyond the trained length; this only silences the warning about it.
    model.config.max_position_embeddings = max(model.config.max_position_embeddings, positions)
    eva, llama = CachedModel(model), CachedModel(llama_of_same_shape(model, positions))
    ids = heldout_ids(max(contexts), model.device)
    for each in (eva, llama):
        each.prefill(ids[:, : min(contexts)])  # warm-up

    results = []
    for context in contexts:
        prompt = ids[:, :context]
        prefill = interleave(
            {"evabyte": partial(eva.prefill, prompt), "llama": partial(llama.prefill, prompt)}, repeats, model.device
        )
        writers = {"evabyte": eva, "llama": llama, "llama_static": llama.copy_to_static_cache(steps + 1)}
        for each in writers.values():
            each.write(1)  # warm-up
        writing = interleave(
            {name: partial(each.write, block) for name, each in writers.items()}, steps // block, model.device
        )
        results.append(
            {
                "context": context,
                "steps": steps // block * block,
                "prefill_seconds": {name: spread(seconds) for name, seconds in prefill.items()},
                "prefill_speedup_over_llama": speedup(prefill["llama"], prefill["evabyte"]),
                "milliseconds_per_byte": {
                    name: spread([1e3 * each / block for each in seconds]) for name, seconds in writing.items()
                },
                "speedup_over": {
                    name: speedup(writing[name], writing["evabyte"]) for name in ("llama", "llama_static")
                },
            }
        )
    return results


def print_context(rows: list[dict[str, Any]]) -> None:
    print("\nOne-byte steps behind a context: medians, and EvaByte's speed-up, median (min to max) of blocks of steps")
    print("         prefill, s     ms per byte                speed-up over Llama with")
    print("context  EvaByte  Llama  EvaByte  dynamic   static  DynamicCache           StaticCache")
    for row in rows:
        prefill = [row["prefill_seconds"][name]["median"] for name in ("evabyte", "llama")]
        step = [row["milliseconds_per_byte"][name]["median"] for name in LABELS]
        print(
            f"{row['context']:7}  {prefill[0]:7.2f}  {prefill[1]:5.2f}  {step[0]:7.2f}  {step[1]:7.2f}  {step[2]:7.2f}"
            f"  {between(row['speedup_over']['llama']):21}  {between(row['speedup_over']['llama_static'])}"
        )


def plot_context(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Draw the median time per byte over the context, with bands from the fastest to the slowest block."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    contexts = [row["context"] for row in rows]
    for name, label in LABELS.items():
        times = [row["milliseconds_per_byte"][name] for row in rows]
        (line,) = axes.plot(contexts, [time["median"] for time in times], marker="o", label=label)
        low, high = ([time[bound] for time in times] for bound in ("min", "max"))
        axes.fill_between(contexts, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(contexts, [f"{context / 1024:g}k" for context in contexts])
    axes.set(xlabel="context (bytes)", ylabel="milliseconds per byte", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
