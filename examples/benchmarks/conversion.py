"""A subword model converted into a byte-level one, before any training: cost of the conversion, bits per byte of both.

    python examples/benchmarks/conversion.py FOLDER --gguf-file NAME.gguf --threads 2

Both models read the same bytes of held-out text in consecutive windows of `--context` ids of their own, so that the
subword model's reach back over several times as many bytes. Each byte is predicted once; windows begin with the last id
of the one before, the first with the beginning-of-text token. The last line is one JSON object; `--save NAME` keeps it.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from measure import HELDOUT, finish, provenance
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

import byte_llama  # noqa: F401  makes the architectures known to the Auto classes
from byte_llama.conversion import convert
from evabyte.bits_per_byte import bits_of_ids

PROMPT = "The President of the United States"

Result = TypeVar("Result")


def timed(work: Callable[[], Result]) -> tuple[Result, float]:
    """What `work` returns, and the seconds that it took."""
    began = time.perf_counter()
    result = work()
    return result, round(time.perf_counter() - began, 2)


def bits(model: Any, ids: Sequence[int], context: int) -> float:
    """Bits that `model` needs for all ids but the first, in windows of `context` ids."""
    return bits_of_ids(model, ids, None, context, stride=context)


def measure_byte(source: str, folder: Path, text: str, options: Any) -> tuple[dict[str, Any], str]:
    """Convert into `folder`; facts about the result, and the text that both models' ids begin with."""
    _, converting = timed(lambda: convert(source, folder, gguf_file=options.gguf_file, dtype="float32"))
    files = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model, loading = timed(lambda: AutoModelForCausalLM.from_pretrained(folder).to(options.device).eval())
    first = tokenizer.bos_token or tokenizer.eos_token
    ids = [tokenizer.convert_tokens_to_ids(first), *tokenizer.encode_bytes(text.encode(), add_special_tokens=False)]
    needed, seconds = timed(lambda: bits(model, ids, options.context))
    prompt = tokenizer(PROMPT, return_tensors="pt").to(options.device)
    written = model.generate(**prompt, do_sample=False, max_new_tokens=40)[0, prompt["input_ids"].shape[1] :]
    return {
        "conversion_seconds": converting,
        "folder_megabytes": round(files / 1e6, 1),
        "load_seconds": loading,
        "parameters": model.num_parameters(),
        "vocabulary": model.config.vocab_size,
        "bits_per_byte": round(needed / len(text.encode()), 4),
        "seconds": seconds,
        "continuation": tokenizer.decode(written),
    }, first


def measure_subword(source: str, first: str, text: str, options: Any) -> dict[str, Any]:
    """Facts about the subword model."""
    quantization = None if options.gguf_file is None else GgufConfig(dequantize=True)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=options.gguf_file)
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=options.gguf_file, dtype=torch.float32, quantization_config=quantization
    )
    model = model.to(options.device).eval()
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    needed, seconds = timed(lambda: bits(model, [tokenizer.convert_tokens_to_ids(first), *tokens], options.context))
    return {
        "parameters": model.num_parameters(),
        "vocabulary": model.config.vocab_size,
        "bytes_per_token": round(len(text.encode()) / len(tokens), 3),
        "bits_per_byte": round(needed / len(text.encode()), 4),
        "seconds": seconds,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id of the subword model")
    parser.add_argument("--gguf-file", default=None)
    parser.add_argument("--output", default=None, help="keep the converted checkpoint in this folder")
    parser.add_argument("--text", type=Path, default=HELDOUT / "prose.txt")
    parser.add_argument("--bytes", type=int, default=10000, help="how much of the text to read")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--save", default=None, metavar="NAME", help="keep the result as results/NAME.json")
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    words = sys.argv[1:] if arguments is None else arguments
    # What is recorded names models, not where they lay.
    words = [Path(word).name if Path(word).is_absolute() else word for word in words]
    text = options.text.read_bytes()[: options.bytes].decode("utf-8", "ignore")
    facts = {
        "provenance": provenance("conversion.py", words, options.device),
        "model": options.gguf_file or Path(options.model).name,
        "dtype": "float32",
        "text": options.text.name,
        "text_bytes": len(text.encode()),
        "context": options.context,
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.output or Path(temporary) / "byte")
        byte, first = measure_byte(options.model, folder, text, options)
    subword = measure_subword(options.model, first, text, options)
    for name, measured in (("subword", subword), ("byte, untrained", byte)):
        print(f"{name:15} {measured['bits_per_byte']:.3f} bits per byte of {facts['text_bytes']:,} bytes", flush=True)
    print(f"{PROMPT!r} + {byte['continuation']!r}", flush=True)
    finish({**facts, "subword": subword, "byte_untrained": byte}, options.save)


if __name__ == "__main__":
    main()
