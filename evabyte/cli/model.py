"""Command line: find and load the model an option names, and say in one line why it cannot be."""

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..bundled import bundled_checkpoint
from ..configuration_evabyte import EvaByteConfig
from ..modeling_evabyte import EvaByteForCausalLM
from ..tokenization_evabyte import EvaByteTokenizer

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
Model = TypeVar("Model", bound=PreTrainedModel)
LOADING_ERRORS = (OSError, ValueError, RuntimeError, SafetensorError, StrictDataclassError)


class CommandError(Exception):
    """A user's error; the message is one line."""


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its name if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def told_in_one_line(what: str) -> Iterator[None]:
    """Turn what loading raises into a [`CommandError`]: `what`, and the first line of the reason."""
    try:
        yield
    except LOADING_ERRORS as error:
        raise CommandError(f"{what}: {first_line(error)}") from error


def find_model(name: str | None) -> str:
    """The folder or Hub id to load: `name`, checked as far as that is possible here, or the bundled model.

    Raises:
        CommandError: `name` is neither a model folder nor looks like a Hub id; or there is no bundled model.
    """
    if name is None:
        try:
            return str(bundled_checkpoint())
        except FileNotFoundError as error:
            raise CommandError(str(error)) from error
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise CommandError(f"{name} is not a model: the folder has no config.json")
        return str(folder)
    if folder.exists():
        raise CommandError(f"{name} is a file: name the folder it is in, or a Hub id")
    if not HUB_ID.fullmatch(name):
        raise CommandError(f"there is no folder {name}, and a Hub id has the form owner/name")
    return name


def load_config(source: str) -> EvaByteConfig:
    """The configuration of a folder or Hub id.

    Raises:
        CommandError: it cannot be read, or is not EvaByte's.
    """
    where = source if Path(source).is_dir() else f"no folder {source} here, and on the Hugging Face Hub"
    with told_in_one_line(where):
        values, _ = EvaByteConfig.get_config_dict(source)
        model_type = values.get("model_type")
        if model_type != EvaByteConfig.model_type:
            raise CommandError(f"{source} is not an EvaByte model: its model_type is {model_type!r}")
        return EvaByteConfig.from_dict(values)


def choose_device(name: str | None) -> torch.device:
    """The device named, or the default one.

    Raises:
        CommandError: there is no such device.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # PyTorch without CUDA raises AssertionError
        raise CommandError(f"--device {name}: there is no such device here") from error
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype named; "auto" is bfloat16 on CUDA, and float32 elsewhere."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)


def load_model(name: str | None, device: str | None, dtype: str) -> tuple[EvaByteForCausalLM, EvaByteTokenizer]:
    """Load a model and its tokenizer as the options say.

    Raises:
        CommandError: it cannot be loaded, completely, onto that device.
    """
    source = find_model(name)
    config = load_config(source)
    place = choose_device(device)
    with told_in_one_line(f"cannot load {source}"), _without_progress_bar(Path(source).is_dir()):
        tokenizer = EvaByteTokenizer.from_pretrained(source)
        model, loading = EvaByteForCausalLM.from_pretrained(
            source, config=config, dtype=choose_dtype(dtype, place), output_loading_info=True
        )
        return _complete(model, loading, source).to(place).eval(), tokenizer


def load_causal_lm(
    name: str, device: str | None, dtype: str, trust_remote_code: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load any causal language model, byte-level or subword, and its tokenizer.

    Raises:
        CommandError: it cannot be loaded, completely, onto that device.
    """
    source = find_model(name)
    place = choose_device(device)
    # The distribution's other package makes further architectures known; a command may use it, the library may not.
    with suppress(ImportError):
        import_module("byte_llama")
    with told_in_one_line(f"cannot load {source}"), _without_progress_bar(Path(source).is_dir()):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
        model, loading = AutoModelForCausalLM.from_pretrained(
            source, dtype=choose_dtype(dtype, place), trust_remote_code=trust_remote_code, output_loading_info=True
        )
        return _complete(model, loading, source).to(place).eval(), tokenizer


def _complete(model: Model, loading: dict[str, Any], source: str) -> Model:
    """The model, unless weights were missing."""
    missing = sorted(loading["missing_keys"])
    if missing:
        raise CommandError(f"cannot load {source}: its files lack {len(missing)} weights, such as {missing[0]}")
    return model


def end_ids(model: EvaByteForCausalLM, tokenizer: EvaByteTokenizer) -> set[int]:
    """The ids that end a text, as the model and its tokenizer say."""
    ids: set[int | None] = set()
    for eos in (tokenizer.eos_token_id, model.config.eos_token_id, model.generation_config.eos_token_id):
        ids.update(eos if isinstance(eos, list) else [eos])
    return {end for end in ids if end is not None}


@contextmanager
def _without_progress_bar(hide: bool) -> Iterator[None]:
    """Hide transformers' progress bars, if `hide`: reading a folder is quick, a download is not."""
    hide = hide and logging.is_progress_bar_enabled()
    if hide:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if hide:
            logging.enable_progress_bar()
