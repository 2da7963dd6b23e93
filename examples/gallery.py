"""What a model writes, good or bad, as a page: docs/gallery.md is this script's output for the bundled model.

    python examples/gallery.py > docs/gallery.md
    python examples/gallery.py --model FOLDER

Prompts and seeds are fixed, none was chosen for its answer. A bar stands where a forward ended: the bytes between two
bars were written by one forward.
"""

import argparse
from collections.abc import Sequence

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import byte_llama  # noqa: F401  makes its architectures known to the Auto classes
import evabyte  # noqa: F401  likewise
from evabyte.bundled import bundled_checkpoint

PROMPTS = (
    "The President of the United States",
    "To the Senate and House of Representatives:",
    "It was a dark and stormy night",
    "def read_lines(path):\n",
    "class Stack:\n    def __init__(self):\n",
    "The :func:`open` function returns",
    "Der Mond ist",
)
SETTINGS = {
    "greedy": {"do_sample": False},
    "sampled, temperature 0.8, top-p 0.95, seed 0": {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "top_k": 0},
}
HEAD = """# Gallery

What the bundled model writes: 2.3 million parameters, trained for an hour on two CPU cores on addresses of presidents,
Python and its documentation. Grammar and indentation are within its reach, sense is not, and German it has hardly seen.
Bytes between two bars were written by one forward. Written by `examples/gallery.py`; prompts and seeds are fixed, none
was chosen for its answer.
"""


def write(model, tokenizer, prompt: str, new_bytes: int, **settings) -> tuple[str, float]:
    """The prompt and what follows, with a bar where each forward ended; bytes per forward."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
    torch.manual_seed(0)
    written, lengths = model.multi_byte_generate(ids, max_new_tokens=new_bytes, return_acc_lengths=True, **settings)
    new, pieces = written[0, ids.shape[1] :], []
    for length in lengths.flatten().tolist():
        pieces.append(tokenizer.decode(new[:length], skip_special_tokens=True))
        new = new[length:]
    return prompt + "|" + "|".join(pieces), (written.shape[1] - ids.shape[1]) / len(pieces)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or Hub id (default: the bundled model)")
    parser.add_argument("--new-bytes", type=int, default=240)
    options = parser.parse_args(words)
    folder = options.model or bundled_checkpoint()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    print(HEAD if options.model is None else f"# {options.model}\n")
    for prompt in PROMPTS:
        title = prompt.strip().splitlines()[0]
        print(f"## {title}\n")
        for name, settings in SETTINGS.items():
            text, bytes_per_forward = write(model, tokenizer, prompt, options.new_bytes, **settings)
            print(f"{name}, {bytes_per_forward:.1f} bytes a forward:\n\n```text\n{text}\n```\n")


if __name__ == "__main__":
    main()
