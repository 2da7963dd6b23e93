"""Average checkpoints of one architecture, from disk to disk: a "model soup" (Wortsman et al., arXiv 2203.05482).

EvaByte's base model was made so, from two annealing runs. No model is built and no file is read whole: a tensor is
averaged in blocks, so that memory stays the same however large the checkpoints are.
"""

import math
import os
import re
import reprlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import INDEX, Checkpoint, check_output

BLOCK = 2**18  # numbers averaged at a time: few enough for a core's cache

# By safetensors' names. Any other format is quantised: its numbers mean nothing without their scales.
_AVERAGED = {"F64", "F32", "F16", "BF16"}
_MUST_BE_EQUAL = {"I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL"}
_KNOWN = {*_AVERAGED, *_MUST_BE_EQUAL}
# What a configuration may say differently without changing what the weights compute.
_FREE_TO_DIFFER = {
    *("transformers_version", "dtype", "torch_dtype", "auto_map", "use_cache", "return_dict"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "attention_dropout"),
}
# Logs and training states are not copied: they tell of the first checkpoint alone.
_COPIED = (
    *("*config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"),
    *("chat_template.*", "*.model", "*.py", "LICENSE*", "NOTICE*"),
)


def merge_checkpoints(
    folders: Sequence[str | os.PathLike],
    output: str | os.PathLike,
    weights: Sequence[float] | None = None,
    *,
    normalize: bool = False,
) -> None:
    """Write the weighted average of checkpoints of one architecture.

    Floating-point tensors are averaged in float32 (float64 for float64) and written in their own dtype; integer and
    bool tensors must be the same everywhere. The output is sharded as the first checkpoint, whose configurations,
    tokenizer, code and card are copied; the card also says what was merged.

    Args:
        folders: at least two, each with `config.json` and safetensors files, which may be sharded differently.
        output: the folder to write; made if it is not there.
        weights: one per folder, summing to 1; negative ones extrapolate. Default: all the same.
        normalize: divide `weights` by their sum first.

    Raises, all before anything is written:
        FileExistsError: `output` is a file, or a folder that is not empty.
        OSError: a folder lacks `config.json` or safetensors files, or one of them is damaged.
        ValueError: `weights` do not fit; or the checkpoints differ in architecture, names, shapes or dtypes of their
            tensors, or in an integer tensor; or they are quantised.
    """
    output = Path(output)
    check_output(output)
    if len(folders) < 2:
        raise ValueError(f"`folders` must name at least two checkpoints, got {len(folders)}.")
    weights = _check_weights(weights, len(folders), normalize)
    checkpoints = [Checkpoint(Path(folder)) for folder in folders]
    first, *others = checkpoints
    for other in others:
        _check_configs(first, other)
        _check_tensors(first, other)
        _check_integers(first, other)

    output.mkdir(parents=True, exist_ok=True)
    for file in first.files:
        _write_average(file, checkpoints, weights, output)
    # The configuration comes last: without it, what an interruption leaves behind is no model.
    if first.sharded:
        shutil.copy(first.folder / INDEX, output)
    _write_card(checkpoints, weights, output)
    for pattern in _COPIED:
        for path in first.folder.glob(pattern):
            shutil.copy(path, output)


def _check_weights(weights: Sequence[float] | None, count: int, normalize: bool) -> list[float]:
    if weights is None:
        return [1 / count] * count
    if len(weights) != count:
        raise ValueError(f"`weights` must be one number per checkpoint: {count}, got {len(weights)}.")
    total = sum(weights)
    if not math.isfinite(total) or (normalize and total == 0):
        raise ValueError(f"`weights` must be finite numbers whose sum is not 0, got {', '.join(map(str, weights))}.")
    if normalize:
        return [weight / total for weight in weights]
    if abs(total - 1) > 1e-6:
        raise ValueError(f"`weights` must sum to 1, not {total:g}: change them, or set normalize to have them divided.")
    return list(weights)


def _check_configs(first: Checkpoint, other: Checkpoint) -> None:
    # Releases of transformers differ in what they write: a key that one of the two lacks tells nothing.
    common = first.config.keys() & other.config.keys() - _FREE_TO_DIFFER
    differing = [
        f"{key} ({reprlib.repr(first.config[key])} and {reprlib.repr(other.config[key])})"
        for key in sorted(common)
        if not key.startswith("_") and first.config[key] != other.config[key]
    ]
    if differing:
        raise ValueError(f"{first.folder} and {other.folder} are of different architectures: {_some(differing)}.")


def _check_tensors(first: Checkpoint, other: Checkpoint) -> None:
    """Check names, shapes and dtypes."""
    for one, two in ((first, other), (other, first)):
        missing = sorted(one.tensors.keys() - two.tensors.keys())
        if missing:
            raise ValueError(
                f"{two.folder} lacks tensors of {one.folder}: {_some(missing)}. If they are tied to others, or made "
                "when loading, load both with `from_pretrained` and save them again with `save_pretrained`."
            )
    shapes = _differing(first, other, "shape")
    if shapes:
        raise ValueError(f"{first.folder} and {other.folder} have tensors of different shapes: {_some(shapes)}.")
    dtypes = _differing(first, other, "dtype")
    if dtypes:
        raise ValueError(
            f"{first.folder} and {other.folder} have tensors of different dtypes: {_some(dtypes)}. Convert one of "
            "them: load it with `from_pretrained(folder, dtype=...)`, and save it again with `save_pretrained`."
        )
    unknown = [f"{name} ({tensor.dtype})" for name, tensor in first.tensors.items() if tensor.dtype not in _KNOWN]
    if unknown:
        raise ValueError(f"{first.folder} is quantised, so has no average: {_some(unknown)}. Merge the originals.")


def _check_integers(first: Checkpoint, other: Checkpoint) -> None:
    differing = [
        name
        for name, tensor in sorted(first.tensors.items())
        if tensor.dtype in _MUST_BE_EQUAL and not torch.equal(first.read(name), other.read(name))
    ]
    if differing:
        raise ValueError(
            f"{first.folder} and {other.folder} differ in integer tensors, which have no average: {_some(differing)}. "
            "Merge checkpoints of one run or one original, unquantised."
        )


def _differing(first: Checkpoint, other: Checkpoint, fact: str) -> list[str]:
    """The tensors of which a fact, "shape" or "dtype", is not the same in two checkpoints; with what it is in each."""
    pairs = (
        (name, getattr(tensor, fact), getattr(other.tensors[name], fact)) for name, tensor in first.tensors.items()
    )
    return [f"{name} ({one} and {two})" for name, one, two in sorted(pairs) if one != two]


def _some(items: Sequence[str]) -> str:
    return ", ".join(items[:3]) + (f" and {len(items) - 3} more" if len(items) > 3 else "")


def _average(tensors: Sequence[Tensor], weights: Sequence[float]) -> Iterator[Tensor]:
    """The weighted average of flat tensors of one dtype, block by block in that dtype.

    With x the first tensor it is x + sum_i w_i (x_i - x), the same since the weights sum to 1; but equal tensors so
    give exactly themselves, and weights such as 0.333333 take nothing away.
    """
    dtype = tensors[0].dtype
    precise = torch.promote_types(dtype, torch.float32)
    for start in range(0, tensors[0].numel(), BLOCK):
        first, *others = (tensor[start : start + BLOCK] for tensor in tensors)
        first = first.to(precise)
        average = first.clone()
        for other, weight in zip(others, weights[1:], strict=True):
            average.add_(other.to(precise) - first, alpha=weight)
        yield average.to(dtype)


def _write_average(file: str, checkpoints: Sequence[Checkpoint], weights: Sequence[float], output: Path) -> None:
    """Write one safetensors file like the first checkpoint's, tensor by tensor.

    Names, dtypes and shapes are the same, so the header is, too: 8 bytes, the length of the json that follows. Then
    come the tensors, without gaps, in the order of their offsets.
    """
    first = checkpoints[0]
    with (first.folder / file).open("rb") as source, (output / file).open("wb") as target:
        length = source.read(8)
        target.write(length + source.read(int.from_bytes(length, "little")))
        tensors = first.files[file].tensors
        for name in sorted(tensors, key=lambda name: tensors[name].data_offsets):
            averaged = tensors[name].dtype in _AVERAGED
            parts = [checkpoint.read(name) for checkpoint in checkpoints]
            for block in _average(parts, weights) if averaged else parts[0].split(BLOCK):
                target.write(block.view(torch.uint8).numpy().data)


def _write_card(checkpoints: Sequence[Checkpoint], weights: Sequence[float], output: Path) -> None:
    """The first checkpoint's card, with a note on top of what was merged."""
    # Folders by their names only: a path would tell strangers about a machine, and nothing about the model.
    parts = [
        f"- {weight:g} x `{checkpoint.folder.resolve().name}`"
        for checkpoint, weight in zip(checkpoints, weights, strict=True)
    ]
    note = (
        f"\n> **Merged.** The weights in this folder are the average of {len(parts)} checkpoints, made with "
        "`evabyte merge`. What\n> else this page says is about the first of them; figures were not measured on the "
        f"average.\n\n{chr(10).join(parts)}\n"
    )
    card, text = checkpoints[0].folder / "README.md", f"# {output.resolve().name}\n"
    if card.is_file():
        text = card.read_text(encoding="utf-8", errors="surrogateescape")
    front_matter = re.match(r"---\n.*?\n---\n", text, re.DOTALL)
    start = front_matter.end() if front_matter else 0
    text = f"{text[:start]}{note}\n{text[start:].lstrip()}"
    (output / "README.md").write_text(text, encoding="utf-8", errors="surrogateescape")


__all__ = ["merge_checkpoints"]
