"""Loading a model beside reading its files: what `from_pretrained` adds to them.

    python examples/benchmarks/loading.py --threads 1 --save loading-cpu

Makes a folder of random weights of the published EvaByte's width with a few layers, in shards, in bfloat16 (or takes
`--model FOLDER`). First comes a check: the loaded weights are those of the files, or no time is measured. Then run in
turn, all with the files in the system's page cache:

- read: the bytes of the weight files, block by block into one buffer.
- tensors: every tensor of the files, copied into memory of its own, with safetensors alone.
- from_pretrained: the model, and one pass over its weights, since what is only mapped has not been read.

The last line is one JSON object with everything; `--save NAME` keeps it as results/NAME.json.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from measure import between, finish, interleave, provenance, speedup, spread
from safetensors import safe_open
from torch import Tensor
from transformers.utils import logging

from evabyte import EvaByteConfig, EvaByteForCausalLM

BLOCK = 2**24


def read_files(folder: Path) -> None:
    """Read the weight files to the end."""
    buffer = bytearray(BLOCK)
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, each in memory of its own."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors.update({name: file.get_tensor(name).clone() for name in file.keys()})  # noqa: SIM118
    return tensors


def load(folder: Path) -> EvaByteForCausalLM:
    """The model, its weights read once."""
    model = EvaByteForCausalLM.from_pretrained(folder)
    for parameter in model.parameters():
        parameter.detach().view(torch.int16 if parameter.dtype == torch.bfloat16 else parameter.dtype).max()
    return model


def make_folder(folder: Path, layers: int, shard_size: str) -> None:
    torch.manual_seed(0)
    config = EvaByteConfig(num_hidden_layers=layers, dtype=torch.bfloat16)
    EvaByteForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size=shard_size)


def measure(folder: Path, repeats: int) -> dict[str, Any]:
    """Seconds of each way, round by round.

    Raises:
        RuntimeError: the loaded weights are not those of the files.
    """
    stored, loaded = read_tensors(folder), load(folder).state_dict()
    if stored.keys() != loaded.keys() or not all(torch.equal(loaded[name], stored[name]) for name in stored):
        raise RuntimeError(f"{folder}: the loaded weights are not those of the files, so nothing is timed")
    size = sum(tensor.nbytes for tensor in stored.values())
    del stored, loaded
    ways = {"read": read_files, "tensors": read_tensors, "from_pretrained": load}
    # A way's result is dropped within its own time, as freeing memory is part of having used it.
    seconds = interleave(
        {name: (lambda number, way=way: (way(folder), None)[1]) for name, way in ways.items()},
        repeats,
        torch.device("cpu"),
    )
    return {
        "bytes": size,
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "from_pretrained_over_read": speedup(seconds["from_pretrained"], seconds["read"]),
        "from_pretrained_over_tensors": speedup(seconds["from_pretrained"], seconds["tensors"]),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=None, metavar="FOLDER")
    parser.add_argument(
        "--layers", type=int, default=2, help="layers of the folder that is made (default: %(default)s)"
    )
    parser.add_argument("--shard-size", default="300MB")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--save", default=None, metavar="NAME", help="keep the result as results/NAME.json")
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    logging.disable_progress_bar()
    words = sys.argv[1:] if arguments is None else arguments
    # What is recorded names models, not where they lay.
    words = [Path(word).name if Path(word).is_absolute() else word for word in words]
    facts = {"provenance": provenance("loading.py", words, torch.device("cpu")), "layers": options.layers}
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.model or Path(temporary) / "model"
        if options.model is None:
            make_folder(folder, options.layers, options.shard_size)
        measured = measure(folder, options.repeats)
        files = len(list(folder.glob("*.safetensors")))
    for name, values in measured["seconds"].items():
        print(f"{name:16} {between(values)} s", flush=True)
    finish({**facts, "files": files, **measured}, options.save)


if __name__ == "__main__":
    main()
