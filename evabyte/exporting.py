"""A published folder with its first code, made into one that brings today's: the weights stay as they are.

What is written beside the weights is what `save_pretrained` of the model, its tokenizer and its processor write. What
a published configuration holds in another form (the expansion dictionary of byte-level Llama and Gemma 2) becomes a
further weight file.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from huggingface_hub import ModelCard, snapshot_download
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, AutoTokenizer, GenerationConfig

from .checkpoint import INDEX, Checkpoint, check_output
from .hub import SelfContainedMixin
from .model_card import CARD, is_hub_id

_COPIED = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "*.png", "*.jpg", "*.jpeg", "*.gif", "*.svg")
_NEEDED = ("*.json", "*.safetensors", "*.jinja", "*.model", CARD, *_COPIED)

_NOTE = """
## About this folder

The weights are those of $source, unchanged. The code beside them is new (`evabyte export`): the folder loads with
transformers 5 and `trust_remote_code=True`, or without it where the package `evabyte` is installed. What this page
says above of other code, or of older releases of transformers, is about the original folder.
"""


def export_folder(
    source: str | os.PathLike,
    output: str | os.PathLike,
    *,
    copy: bool = False,
    revision: str | None = None,
) -> Path:
    """Write a folder with the weights of another, and code, configuration and tokenizer as this package saves them.

    The weight files are hard links to those of `source` where the file system can, so that they need no room of their
    own. Licence and card are kept; the card gets a section that says where the folder comes from. Nothing is left
    behind when it fails.

    Args:
        source: a folder or Hub id of an EvaByte model or, once `byte_llama` is imported, of a byte-level Llama or
            Gemma 2, published under `tpu_llama` or `tpu_gemma2` too.
        output: the folder to write; made if it is not there.
        copy: copy the weight files even where links would do.
        revision: branch, tag or commit on the Hub.

    Returns:
        `output`.

    Raises:
        FileExistsError: `output` is a file, or a folder that is not empty.
        OSError: `source` cannot be downloaded, has no safetensors files, or one of them is damaged.
        ValueError: it is a model of another architecture; or its weights are not those its configuration asks for.
    """
    output = Path(output)
    check_output(output)
    name = str(source) if is_hub_id(str(source)) else Path(source).resolve().name
    folder = Path(source)
    if is_hub_id(str(source)):
        found = snapshot_download(
            str(source), revision=revision, allow_patterns=list(_NEEDED), ignore_patterns=["*/*", "*.bin"]
        )
        folder = Path(found)
    checkpoint = Checkpoint(folder)
    model = _without_weights(folder)
    made = _made_from_config(model, checkpoint)

    with _written_at_once(output) as partial:
        if (folder / CARD).exists():
            shutil.copy(folder / CARD, partial)
        model.save_pretrained(partial, state_dict=dict(made))  # which empties it
        for written in [*partial.glob("*.safetensors"), *partial.glob(INDEX)]:
            written.unlink()
        _place_weights(checkpoint, made, partial, copy)
        _save_tokenizer(folder, partial)
        for path in (path for pattern in _COPIED for path in folder.glob(pattern)):
            shutil.copy(path, partial)
        card = ModelCard.load(partial / CARD)
        card.content = f"{card.content.rstrip()}\n{_NOTE.replace('$source', name)}"
        card.save(partial / CARD)
    return output


def _without_weights(folder: Path) -> Any:
    """The model of a folder, its parameters without memory; what it makes from its configuration is there."""
    config = AutoConfig.from_pretrained(folder)
    with init_empty_weights(include_buffers=False):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    if not issubclass(type(model), SelfContainedMixin):
        raise ValueError(
            f"{folder} is a {config.model_type!r} model: export is for EvaByte and byte-level Llama and Gemma 2. To "
            "make one of a subword model, see `byte-llama convert`."
        )
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def _made_from_config(model: Any, checkpoint: Checkpoint) -> dict[str, Any]:
    """Tensors that a saved model has and a published checkpoint lacks, since the configuration determines them."""
    wanted = model.state_dict()
    made = {name: value for name, value in wanted.items() if name not in checkpoint.tensors and not value.is_meta}
    tied = model.all_tied_weights_keys
    missing = [name for name in wanted if name not in checkpoint.tensors and name not in made and name not in tied]
    if missing:
        raise ValueError(f"{checkpoint.folder} lacks {len(missing)} weights of the model, such as {missing[0]}.")
    for name, header in checkpoint.tensors.items():
        if name in wanted and list(wanted[name].shape) != list(header.shape):
            raise ValueError(
                f"{checkpoint.folder} has {name} of shape {list(header.shape)}; its config.json asks for "
                f"{list(wanted[name].shape)}."
            )
    return made


def _place_weights(checkpoint: Checkpoint, made: dict[str, Any], target: Path, copy: bool) -> None:
    """Link or copy the weight files; with tensors made besides, these become the last of one more, and an index."""
    names = sorted(checkpoint.files)
    total = len(names) + bool(made)
    renamed = {name: f"model-{i:05d}-of-{total:05d}.safetensors" for i, name in enumerate(names, 1)} if made else {}
    for name in names:
        _link(checkpoint.folder / name, target / renamed.get(name, name), copy)
    if not made:
        if checkpoint.sharded:
            shutil.copy(checkpoint.folder / INDEX, target)
        return
    last = f"model-{total:05d}-of-{total:05d}.safetensors"
    save_file({name: value.contiguous() for name, value in made.items()}, target / last, {"format": "pt"})
    places = {tensor: renamed[file] for file, header in checkpoint.files.items() for tensor in header.tensors}
    offsets = [tensor.data_offsets for tensor in checkpoint.tensors.values()]
    size = sum(end - start for start, end in offsets) + sum(value.nbytes for value in made.values())
    index = {
        "metadata": {"total_size": size},
        "weight_map": dict(sorted({**places, **dict.fromkeys(made, last)}.items())),
    }
    (target / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _link(source: Path, target: Path, copy: bool) -> None:
    if not copy:
        try:
            os.link(source.resolve(), target)  # what a download leaves in a folder are symbolic links
            return
        except OSError:  # another disk, or a file system without links
            pass
    shutil.copyfile(source, target)


def _save_tokenizer(folder: Path, target: Path) -> None:
    if (folder / "preprocessor_config.json").exists() or (folder / "processor_config.json").exists():
        AutoProcessor.from_pretrained(folder).save_pretrained(target)
    elif (folder / "tokenizer_config.json").exists() or (folder / "tokenizer.json").exists():
        AutoTokenizer.from_pretrained(folder).save_pretrained(target)


@contextmanager
def _written_at_once(output: Path) -> Iterator[Path]:
    """A folder beside `output` that takes its place at the end, or is removed when anything fails."""
    output.parent.mkdir(parents=True, exist_ok=True)
    # A name of the same end: what is saved into it may call itself by the folder's name.
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".export-") as temporary:
        partial = Path(temporary) / output.resolve().name
        partial.mkdir()
        yield partial
        if output.exists():
            output.rmdir()
        partial.rename(output)


__all__ = ["export_folder"]
