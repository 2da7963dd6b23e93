"""`evabyte info`: describe a model from its configuration and the headers of its weight files."""

from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path

from huggingface_hub import get_local_safetensors_metadata, get_safetensors_metadata

from ..configuration_evabyte import EvaByteConfig
from .model import CommandError, find_model, first_line, load_config

CONTEXTS = (2048, 8192, 32768)
# Names and bytes of the number formats that weights come in, by safetensors' own names.
DTYPE_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


def run(options: Namespace) -> int:
    """Print the description to standard output."""
    source = find_model(options.model)
    config = load_config(source)
    parameters = count_parameters(source)
    print(*describe(source, config, parameters, options.context or CONTEXTS), sep="\n")
    return 0


def count_parameters(source: str) -> dict[str, int]:
    """Number of parameters by dtype, from the headers of the safetensors files in a folder or on the Hub.

    Raises:
        CommandError: there are no such files, or they cannot be read.
    """
    try:
        if Path(source).is_dir():
            weights = get_local_safetensors_metadata(source)
        else:
            weights = get_safetensors_metadata(source)
    except Exception as error:  # the Hub client's errors, of the network too, have no base class in common
        raise CommandError(f"{source}: {first_line(error)}") from error
    parameters = {str(dtype): count for dtype, count in weights.parameter_count.items()}
    unknown = sorted(parameters.keys() - DTYPE_NAMES.keys())
    if unknown or not parameters:
        raise CommandError(f"{source}: info knows weights in floating point only, not {', '.join(unknown) or 'none'}")
    return parameters


def cache_bytes(config: EvaByteConfig, context: int, item_size: int) -> int:
    """Bytes of keys and values that EVA's cache holds, at most, for one text of up to `context` bytes.

    They are those of the open window, those of the last closed window, set aside for going back, and the summaries of
    all closed windows. Room kept for further summaries is not counted.
    """
    closed = context // config.window_size
    chunks_per_window = config.window_size // config.chunk_size
    rows = min(context, config.window_size) + min(closed, 1) * config.window_size + closed * chunks_per_window
    return full_cache_bytes(config, rows, item_size)


def full_cache_bytes(config: EvaByteConfig, context: int, item_size: int) -> int:
    """Bytes of keys and values that full attention would hold for one text of `context` bytes."""
    return 2 * config.num_hidden_layers * config.hidden_size * item_size * context


def describe(source: str, config: EvaByteConfig, parameters: dict[str, int], contexts: Sequence[int]) -> Iterator[str]:
    """The lines of the description.

    Args:
        parameters: number of parameters by safetensors' name of their dtype.
        contexts: lengths of text to give the size of the cache at.
    """
    weights_size = sum(count * DTYPE_BYTES[dtype] for dtype, count in parameters.items())
    main_dtype = max(parameters, key=parameters.__getitem__)
    yield source
    facts = {
        "architecture": (config.architectures or ["EvaByte"])[0],
        "parameters": f"{sum(parameters.values()):,}",
        "weights": f"{size(weights_size)}, {' and '.join(DTYPE_NAMES[dtype] for dtype in parameters)}",
        "layers": f"{config.num_hidden_layers} of width {config.hidden_size}, feed-forward {config.intermediate_size}",
        "attention": f"{config.num_attention_heads} heads, window {config.window_size}, chunk {config.chunk_size}",
        "prediction": f"{config.num_pred_heads} heads: up to {config.num_pred_heads} bytes per forward",
        "trained for": f"{config.max_position_embeddings} bytes of text",
    }
    for name, value in facts.items():
        yield f"  {name:<14}{value}"
    yield f"\nCache of one text, in {DTYPE_NAMES[main_dtype]}:"
    yield f"  {'bytes of text':>13}  {'EVA':>14}  {'full attention':>14}"
    for context in contexts:
        eva = cache_bytes(config, context, DTYPE_BYTES[main_dtype])
        full = full_cache_bytes(config, context, DTYPE_BYTES[main_dtype])
        yield f"  {context:>13,}  {size(eva):>14}  {size(full):>14}"


def size(count: int) -> str:
    """A number of bytes in decimal units, such as "12.98 GB"."""
    amount = float(count)
    for unit in ("bytes", "kB", "MB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "bytes" else f"{amount:.2f} {unit}"
        amount /= 1000
    return f"{amount:.2f} GB"
