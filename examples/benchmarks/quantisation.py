"""Weight-only quantisation by torchao: size of the folder, bits per byte, bytes that change, speed, in one run.

    python examples/benchmarks/quantisation.py --save quantisation-cpu
    python examples/benchmarks/quantisation.py --model FOLDER --device cuda --dtype bfloat16 --save quantisation-cuda

`changed_bytes` is the share of places in the held-out text at which the most probable next byte is another one than
that of the model as it is. The last line is one JSON object; `--save NAME` keeps it in results/NAME.json.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from measure import HELDOUT, finish, interleave, provenance, speedup, spread
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup
from transformers import AutoModelForCausalLM, AutoTokenizer, TorchAoConfig

import byte_llama  # noqa: F401  makes the architectures known to the Auto classes
import evabyte  # noqa: F401  likewise
from evabyte.bits_per_byte import bits_per_byte
from evabyte.bundled import bundled_checkpoint

TEXTS = {"prose": "prose.txt", "code": "code.py.txt"}


def quantisations(group: int) -> dict[str, Any]:
    return {
        "as it is": None,
        "int8": Int8WeightOnlyConfig(),
        # A form of four-bit weights that every device has; it stores each in a byte.
        f"int4, groups of {group}": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(group)),
    }


def load(options: argparse.Namespace, quantisation: Any) -> Any:
    config = None if quantisation is None else TorchAoConfig(quantisation)
    model = AutoModelForCausalLM.from_pretrained(
        options.model, dtype=getattr(torch, options.dtype), device_map=options.device, quantization_config=config
    )
    return model.eval()


def megabytes(model: Any) -> float:
    """Of the weights that `save_pretrained` writes."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return round(sum(file.stat().st_size for file in Path(folder).glob("*.safetensors")) / 1e6, 2)


@torch.no_grad()
def likeliest(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """int64 [N], the most probable next byte at every place."""
    return model(ids.to(model.device), use_cache=False).logits[0].argmax(-1).cpu()


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=bundled_checkpoint(), help="folder or Hub id (default: the bundled model)")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--group", type=int, default=64, help="weights that share a scale, four bits")
    parser.add_argument("--bytes", type=int, default=20_000, help="of each held-out text")
    parser.add_argument("--new-bytes", type=int, default=200, help="to decode in each round")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save", metavar="NAME", help="keep the result as results/NAME.json")
    options = parser.parse_args(words)
    torch.set_num_threads(options.threads)
    facts = provenance("quantisation.py", sys.argv[1:] if words is None else words, options.device)

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    texts = {name: (HELDOUT / file).read_bytes()[: options.bytes] for name, file in TEXTS.items()}
    models = {name: load(options, quantisation) for name, quantisation in quantisations(options.group).items()}
    baseline = models["as it is"]
    rows: dict[str, dict[str, Any]] = {}
    for name, model in models.items():
        rows[name] = {"megabytes": megabytes(model), "bits_per_byte": {}, "changed_bytes": {}}
        for text, data in texts.items():
            rows[name]["bits_per_byte"][text] = round(bits_per_byte(model, tokenizer, data).bits_per_byte or 0.0, 4)
            ids = torch.tensor([tokenizer.encode_bytes(data[:4096])])
            changed = likeliest(model, ids) != likeliest(baseline, ids)
            rows[name]["changed_bytes"][text] = round(changed.float().mean().item(), 4)

    prompt = torch.tensor([tokenizer.encode_bytes(texts["prose"][:400])], device=options.device)
    how = {"max_new_tokens": options.new_bytes, "do_sample": False, "eos_token_id": None}

    def decode(model: Any) -> Any:
        return lambda _: model.multi_byte_generate(prompt, **how)

    work = {name: decode(model) for name, model in models.items()}
    interleave(work, 1, options.device)  # warm up
    seconds = interleave(work, options.repeats, options.device)
    for name, times in seconds.items():
        rows[name]["bytes_per_second"] = spread([options.new_bytes / time for time in times])
        rows[name]["times_as_fast"] = speedup(seconds["as it is"], times)
    for name, row in rows.items():
        print(f"{name}: {row}")
    result = {**facts, "settings": vars(options) | {"model": Path(options.model).name}, "results": rows}
    finish(result, options.save)
    return result


if __name__ == "__main__":
    main()
