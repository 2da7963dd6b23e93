"""`evabyte info`: describe a model from its configuration and the headers of its weight files."""

import json
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import get_safetensors_metadata

from .cli_model import CommandError, find_model, load_config, told_in_one_line
from .configuration_evabyte import EvaByteConfig

CONTEXTS = (2048, 8192, 32768)
DTYPES = {"F64": ("float64", 8), "F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2)}


@dataclass
class Weights:
    """What the weight files of a model hold.

    Attributes:
        parameters: number of parameters by dtype, as safetensors calls it.
        size: bytes of all tensors.
    """

    parameters: Counter[str]
    size: int

    @property
    def dtype(self) -> str:
        """Name of the dtype that most parameters have."""
        return DTYPES[self.parameters.most_common(1)[0][0]][0]

    @property
    def item_size(self) -> int:
        """Bytes of one number of that dtype."""
        return DTYPES[self.parameters.most_common(1)[0][0]][1]


def run(options: Namespace) -> int:
    """Print the description to standard output."""
    source = find_model(options.model)
    config = load_config(source)
    print(*describe(source, config, read_weights(source), options.context or CONTEXTS), sep="\n")
    return 0


def read_weights(source: str) -> Weights:
    """Read the headers of the safetensors files in a folder or on the Hub.

    Raises:
        CommandError: there are none, or they cannot be read.
    """
    weights = Weights(Counter(), 0)
    for dtype, shape, size in _local_tensors(Path(source)) if Path(source).is_dir() else _hub_tensors(source):
        weights.parameters[dtype] += _product(shape)
        weights.size += size
    unknown = weights.parameters.keys() - DTYPES.keys()
    if unknown or not weights.parameters:
        raise CommandError(f"{source} has no weights in floating point ({', '.join(sorted(unknown)) or 'no tensors'})")
    return weights


def _local_tensors(folder: Path) -> Iterator[tuple[str, list[int], int]]:
    """Dtype, shape and bytes of every tensor in the folder's weight files."""
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise CommandError(f"{folder} has no safetensors weights")
    for path in files:
        with told_in_one_line(f"{path} is not a safetensors file"), path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        header.pop("__metadata__", None)
        for tensor in header.values():
            start, end = tensor["data_offsets"]
            yield tensor["dtype"], tensor["shape"], end - start


def _hub_tensors(hub_id: str) -> Iterator[tuple[str, list[int], int]]:
    """The same of a model on the Hub, without downloading more than the headers."""
    try:
        files = get_safetensors_metadata(hub_id).files_metadata.values()
    except Exception as error:  # the errors of the Hub's client have no base class of their own
        raise CommandError(f"cannot read the weights of {hub_id}: {str(error).strip().splitlines()[0]}") from error
    for file in files:
        for tensor in file.tensors.values():
            start, end = tensor.data_offsets
            yield tensor.dtype, tensor.shape, end - start
