"""What EVA layers cost a byte-level student, and what they save: the same student with and without them, in one run.

    python examples/benchmarks/eva_layers.py --recipe recipe.yaml --steps 12 --save eva-layers-cpu

Quality: held-out bits per byte before and after the same few distillation steps of the recipe. Cost: bytes of the cache
and seconds per byte, of reading and of writing one byte at a time, at each of `--lengths`. What is read there is the
recipe's held-out text over and over: time does not depend on it.
"""

import argparse
import sys
import tempfile
import time
from dataclasses import asdict
from itertools import islice
from typing import Any

import torch
from measure import finish, interleave, provenance, speedup, spread, synchronize
from transformers import AutoTokenizer, DynamicCache

from byte_llama.byte_history import ByteHistory
from byte_llama.distillation import Recipe, make_trainer, read_documents

LOSSES = ("loss_sft", "loss_alm", "loss_latents", "loss_heads")


def distilled(recipe: Recipe, own: dict[str, Any], steps: int) -> tuple[Any, dict[str, Any]]:
    """The student after so many steps, and its log: bits per byte before and after, losses, seconds."""
    with tempfile.TemporaryDirectory() as folder:
        training = {**recipe.training, "max_steps": steps, "save_strategy": "no", "eval_strategy": "no"}
        fields = {**asdict(recipe), **own, "output": folder, "sample_prompts": (), "training": training}
        trainer = make_trainer(Recipe(**fields))
        before, began = trainer.evaluate(), time.perf_counter()
        trainer.args.eval_on_start = False
        trainer.train()
        seconds, after = time.perf_counter() - began, trainer.evaluate()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    return trainer.accelerator.unwrap_model(trainer.model).eval(), {
        "bits_per_byte_before": round(before["eval_bits_per_byte"], 4),
        "bits_per_byte_after": round(after["eval_bits_per_byte"], 4),
        "teacher_bits_per_byte": round(after["eval_teacher_bits_per_byte"], 4),
        "training_seconds": round(seconds, 1),
        "last_losses": {name: round(history[-1][name], 4) for name in LOSSES if name in history[-1]},
    }


def cache_bytes(cache: Any) -> int:
    """Memory of the keys and values of a cache, windows set aside for `crop` included."""
    tensors: list[torch.Tensor] = []
    for layer in cache.layers:
        if not isinstance(layer, ByteHistory):
            tensors += [layer.keys, layer.values]
            tensors += [part for row in getattr(layer, "closed_windows", ()) for pair in row for part in pair]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@torch.no_grad()
def costs(models: dict[str, Any], ids: torch.Tensor, lengths: list[int], written: int, repeats: int) -> list[Any]:
    """At each length: memory of each model's cache, seconds per byte read since the last length, and per byte written.

    Args:
        ids: int64 [1, N], at least as many as the longest of `lengths`, in ascending order, and `written`.
    """
    device, found, read = ids.device, [], 0
    caches = {name: DynamicCache(config=model.config) for name, model in models.items()}
    for length in lengths:
        reading: dict[str, float] = {}
        for name, model in models.items():
            synchronize(device)
            began = time.perf_counter()
            for piece in ids[:, read:length].split(1024, dim=1):
                model(piece, past_key_values=caches[name], logits_to_keep=1)
            synchronize(device)
            reading[name] = (time.perf_counter() - began) / (length - read)
        memory = {name: cache_bytes(cache) for name, cache in caches.items()}

        def write(name: str, length: int = length) -> None:
            for place in range(length, length + written):
                models[name](ids[:, place : place + 1], past_key_values=caches[name])
            caches[name].crop(-written)

        for name in models:
            write(name)  # warm-up
        seconds = interleave({name: lambda _, name=name: write(name) for name in models}, repeats, device)
        found.append(
            {
                "length": length,
                "cache_bytes": memory,
                "cache_full_over_eva": round(memory["full"] / memory["eva"], 2),
                "ms_per_byte_read": {name: round(1000 * value, 4) for name, value in reading.items()},
                "ms_per_byte_written": {
                    name: spread([1000 * second / written for second in runs]) for name, runs in seconds.items()
                },
                "times_as_fast_written": speedup(seconds["full"], seconds["eva"]),
            }
        )
        read = length
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", required=True, help="a distillation recipe")
    parser.add_argument("--layers", default="all", help="'all', or numbers as in 0,2")
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--chunk", type=int, default=16)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--written", type=int, default=32, help="bytes written at each length")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--save", help="name of the result file")
    options = parser.parse_args()

    recipe = Recipe.from_file(options.recipe)
    layers = options.layers if options.layers == "all" else [int(number) for number in options.layers.split(",")]
    eva = {"eva_layers": layers, "eva_window_size": options.window, "eva_chunk_size": options.chunk}
    models, quality = {}, {}
    for name, own in {"full": {}, "eva": eva}.items():
        models[name], quality[name] = distilled(recipe, own, options.steps)
    model = models["full"]
    machine = provenance("eva_layers.py", sys.argv[1:], model.device)

    tokenizer = AutoTokenizer.from_pretrained(recipe.student)
    documents = islice(read_documents(recipe.heldout, recipe.document_bytes), 64)
    text = [i for document in documents for i in tokenizer(document["text"], add_special_tokens=False).input_ids]
    wanted = max(options.lengths) + options.written
    ids = torch.tensor([(text * (wanted // len(text) + 1))[:wanted]], device=model.device)
    result = {
        **machine,
        "eva": eva,
        "recipe": asdict(recipe),
        "layers": model.config.num_hidden_layers,
        "dtype": str(model.dtype),
        "quality": quality,
        "costs": costs(models, ids, sorted(options.lengths), options.written, options.repeats),
    }
    finish(result, options.save)


if __name__ == "__main__":
    main()
