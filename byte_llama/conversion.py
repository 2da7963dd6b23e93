"""Subword checkpoint to byte-level checkpoint: the same trunk with a byte vocabulary around it, ready for training.

The start of the "byteification" recipe (Minixhofer, Vulić, Ponti: Universal Cross-Tokenizer Distillation via
Approximate Likelihood Matching, arXiv 2503.20083): rows of the byte embeddings are copied from the matching subwords,
and the whole subword embedding stays, to be added where a subword ends.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from huggingface_hub.errors import StrictDataclassClassValidationError
from tokenizers import decoders
from torch import Tensor
from transformers import (
    AutoTokenizer,
    Gemma2ForCausalLM,
    GenerationConfig,
    GgufConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import is_gguf_available

from .conversion_card import write_card
from .counterparts import Counterparts, find_counterparts
from .modeling_byte_gemma2 import ByteGemma2ForCausalLM
from .modeling_byte_llama import ByteLlamaForCausalLM
from .tokenization_byte_llama import ByteLlamaTokenizer, byte_tokenizer_from

# By model type: the in-tree class of the subword model, and the class it becomes.
CONVERTIBLE: dict[str, tuple[type[PreTrainedModel], type[PreTrainedModel]]] = {
    "llama": (LlamaForCausalLM, ByteLlamaForCausalLM),
    "gemma2": (Gemma2ForCausalLM, ByteGemma2ForCausalLM),
}
DTYPES = ("auto", "float32", "bfloat16", "float16", torch.float32, torch.bfloat16, torch.float16)
MAX_SUBWORD_LENGTH = 16  # in byte-vocabulary ids; as in the published models

_ROLES = ("bos_token", "eos_token", "pad_token")
# What else a generation_config.json may say is counted in subwords or names subword ids.
_KEPT_SAMPLING = ("temperature", "top_p", "min_p", "typical_p")


def convert(
    model: str | os.PathLike | PreTrainedModel,
    output: str | os.PathLike,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    gguf_file: str | None = None,
    revision: str | None = None,
    dtype: torch.dtype | str = "auto",
    num_layers: int | None = None,
    template_words: Iterable[str] = (),
    pad_token: str | None = None,
    eva_layers: str | Sequence[int] | None = None,
    eva_window_size: int | None = None,
    eva_chunk_size: int | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
) -> None:
    """Write the byte-level checkpoint of a Llama or Gemma 2 subword model: model, tokenizer, generation config, card.

    The trunk's weights and the whole subword embedding (`model.expand_embed_tokens`) are those of the subword model. A
    row of the byte embeddings and of the output layer, which are never tied, is a copy of its counterpart's: of the
    single-byte token, as text where there is one and else the byte-fallback token; of the same special token; of the
    same word, or the mean of the subwords that it is cut into. Where nothing corresponds it is the mean of all rows.
    The result predicts next to nothing before it has been trained.

    Args:
        model: a folder or Hub id; or a model, with its `tokenizer`.
        output: the folder to write; made if it is not there.
        tokenizer: the subword tokenizer, Rust-backed. Default: that in the folder.
        gguf_file: name of a GGUF file in the folder or Hub repository, which is dequantised.
        revision: branch, tag or commit on the Hub.
        dtype: of the weights, such as `torch.bfloat16` or "bfloat16"; "auto" keeps that of the checkpoint, which for
            GGUF is float32.
        num_layers: keep only the first layers, for tests and experiments.
        template_words: as in `byte_tokenizer_from`.
        pad_token: a special token of the subword tokenizer to pad with, if not the one it names itself.
        eva_layers, eva_window_size, eva_chunk_size: give these layers of a Llama ("all", or their numbers) EVA
            attention over the same weights; fields of `ByteLlamaConfig`, where None stands for their defaults.
        max_shard_size: largest size of a weight file, as in `save_pretrained`.
        overwrite: write into a folder that is not empty; files of the same names are replaced.

    Raises, all before any weight is read:
        FileExistsError: `output` is a file, or not empty and `overwrite` is not set.
        ImportError: `gguf_file` is given but the package `gguf` is not installed.
        OSError: the model cannot be found or read.
        TypeError: the subword tokenizer is not backed by the `tokenizers` library.
        ValueError: the model is of another architecture, or quantised; its tokens do not tell their bytes; or an
            argument does not fit.

    Raises, after that:
        ValueError: the checkpoint lacks weights.
    """
    output = Path(output)
    _check_output(output, overwrite)
    if dtype not in DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(map(str, DTYPES))}, got {dtype}.")
    split_torch_state_dict_into_shards({}, max_shard_size=max_shard_size)  # refuses what is not a size
    if isinstance(model, PreTrainedModel):
        if tokenizer is None or gguf_file is not None or revision is not None:
            raise ValueError(
                "convert takes a model together with its `tokenizer`; `gguf_file` and `revision` go with a folder or "
                "Hub id."
            )
        source = model.config.name_or_path
        values = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    else:
        source = os.fspath(model)
        if Path(source).resolve() == output.resolve():
            raise ValueError(f"`output` {output} is the subword model's own folder: name another one.")
        values = _read_config(source, gguf_file, revision)
    subword_class, byte_class = _choose_classes(source or "The model", values)
    config = subword_class.config_class.from_dict(values)
    if num_layers is not None and not 1 <= num_layers <= config.num_hidden_layers:
        raise ValueError(f"`num_layers` must be from 1 to {config.num_hidden_layers}, got {num_layers}.")
    eva = {"eva_layers": eva_layers, "eva_window_size": eva_window_size, "eva_chunk_size": eva_chunk_size}
    eva = {name: value for name, value in eva.items() if value is not None}
    try:
        byte_class.config_class(**_trunk_config(config, num_layers), **eva)
    except StrictDataclassClassValidationError as error:  # wraps what a validator raised
        raise ValueError(str(error.__cause__)) from error
    if tokenizer is None:
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf_file, revision=revision)
        if gguf_file is not None:
            _repair_tokenizer(tokenizer, config)
    byte_tokenizer = _byte_tokenizer(tokenizer, template_words, pad_token)
    counterparts = find_counterparts(byte_tokenizer, tokenizer, config.vocab_size)

    if not isinstance(model, PreTrainedModel):
        model = _load(subword_class, source, gguf_file, revision, dtype)
    byte_model = _with_bytes(model, byte_class, counterparts, byte_tokenizer, num_layers, dtype, eva)
    byte_model.save_pretrained(output, max_shard_size=max_shard_size)
    byte_tokenizer.save_pretrained(output)
    write_card(output, source, config.num_hidden_layers, byte_model, byte_tokenizer, gguf_file, revision)


def _check_output(output: Path, overwrite: bool) -> None:
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"`output` {output} is a file: name a folder.")
    if not overwrite and output.is_dir() and any(output.iterdir()):
        raise FileExistsError(f"`output` {output} is not empty: name another folder, or set overwrite.")


def _read_config(source: str, gguf_file: str | None, revision: str | None) -> dict[str, Any]:
    """The configuration of a folder or Hub id, whatever its architecture."""
    if gguf_file is not None and not is_gguf_available():
        raise ImportError("`gguf_file` needs the package gguf: pip install 'evabyte[gguf]'.")
    folder = Path(source)
    if folder.is_dir():
        if gguf_file is not None and not (folder / gguf_file).is_file():
            raise FileNotFoundError(f"`gguf_file` {gguf_file} is not in {source}.")
        if gguf_file is None and not (folder / "config.json").is_file():
            found = sorted(path.name for path in folder.glob("*.gguf"))
            way_out = f": name a GGUF file as gguf_file, such as {found[0]}" if found else ""
            raise FileNotFoundError(f"{source} has no config.json{way_out}.")
    elif folder.exists():
        raise NotADirectoryError(f"{source} is a file: name the folder it is in, and a GGUF file as gguf_file.")
    try:
        return PreTrainedConfig.get_config_dict(source, gguf_file=gguf_file, revision=revision)[0]
    except OSError as error:
        if folder.is_dir():
            raise
        raise OSError(f"There is no folder {source} here, and on the Hugging Face Hub: {error}") from error


def _choose_classes(source: str, config: dict[str, Any]) -> tuple[type[PreTrainedModel], type[PreTrainedModel]]:
    """The subword model's class, and the byte-level one it becomes."""
    architecture = (config.get("architectures") or [None])[0]
    classes = CONVERTIBLE.get(str(config.get("model_type")))
    if classes is None or architecture not in (None, classes[0].__name__):
        works = " and ".join(subword_class.__name__ for subword_class, _ in CONVERTIBLE.values())
        found = architecture or f"a model of type {config.get('model_type')!r}"
        raise ValueError(f"{source} is {found}, which has no byte-level form here: convert takes {works}.")
    if config.get("quantization_config") is not None:
        raise ValueError(f"{source} is quantised: convert takes its original, or a GGUF file.")
    return classes


def _repair_tokenizer(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """Correct what transformers may get wrong of a tokenizer in a GGUF file.

    Its bos, eos and pad tokens are those that the file names, and if it is byte-level its decoder is nothing else.
    """
    for role in _ROLES:
        index = getattr(config, f"{role}_id")
        if index is not None:
            setattr(tokenizer, role, tokenizer.convert_ids_to_tokens(index))
    backend = tokenizer.backend_tokenizer
    if backend.pre_tokenizer is not None and b'"ByteLevel"' in backend.pre_tokenizer.__getstate__():
        backend.decoder = decoders.ByteLevel()


def _byte_tokenizer(
    tokenizer: PreTrainedTokenizerBase, template_words: Iterable[str], pad_token: str | None
) -> ByteLlamaTokenizer:
    if pad_token is None:
        return byte_tokenizer_from(tokenizer, template_words=template_words)
    if pad_token not in tokenizer.get_vocab():
        raise ValueError(f"`pad_token` {pad_token!r} is not a token of the subword tokenizer.")
    return byte_tokenizer_from(tokenizer, template_words=template_words, pad_token=pad_token)


def _load(
    subword_class: type[PreTrainedModel],
    source: str,
    gguf_file: str | None,
    revision: str | None,
    dtype: torch.dtype | str,
) -> PreTrainedModel:
    """The subword model, complete.

    Raises:
        ValueError: weights are missing, so that transformers would have made them up.
    """
    arguments: dict[str, Any] = {} if revision is None else {"revision": revision}
    if gguf_file is not None:
        arguments |= {"gguf_file": gguf_file, "quantization_config": GgufConfig(dequantize=True)}
    model, loading = subword_class.from_pretrained(source, dtype=dtype, output_loading_info=True, **arguments)
    missing = sorted(loading["missing_keys"])
    if missing:
        raise ValueError(f"{source} lacks {len(missing)} weights, such as {missing[0]}: get its files again.")
    return model


def _with_bytes(
    subword_model: PreTrainedModel,
    byte_class: type[PreTrainedModel],
    counterparts: Counterparts,
    tokenizer: ByteLlamaTokenizer,
    num_layers: int | None,
    dtype: torch.dtype | str,
    eva: Mapping[str, Any],
) -> PreTrainedModel:
    """The byte-level model. It shares the weights of the trunk with `subword_model`, unless `dtype` is another."""
    weights = dict(subword_model.state_dict())
    inputs = weights.pop("model.embed_tokens.weight")
    outputs = weights.pop("lm_head.weight")
    if num_layers is not None:
        cut = tuple(f"model.layers.{layer}." for layer in range(num_layers, subword_model.config.num_hidden_layers))
        weights = {name: weight for name, weight in weights.items() if not name.startswith(cut)}
    weights["model.expand_embed_tokens.weight"] = inputs
    weights["model.embed_tokens.weight"] = _rows(inputs, counterparts.sources)
    weights["lm_head.weight"] = _rows(outputs, counterparts.sources)

    generation = _generation_config(subword_model, counterparts, tokenizer)
    config = byte_class.config_class(
        **_trunk_config(subword_model.config, num_layers),
        **eva,
        vocab_size=len(tokenizer),
        tie_word_embeddings=False,
        expand_input_ids=True,
        expand_input_ids_maxlen=MAX_SUBWORD_LENGTH,
        expand_input_ids_vocab_size=len(inputs),
        expand_input_ids_dict=counterparts.expansion_dictionary(MAX_SUBWORD_LENGTH),
        **{f"{role}_id": getattr(generation, f"{role}_id") for role in _ROLES},
    )
    for number in getattr(config, "eva_layer_numbers", ()):  # zero is where the summaries' vectors begin
        shape = (config.num_key_value_heads, config.head_dim)
        for name in ("adaptive_mu_k", "adaptive_phi"):
            weights[f"model.layers.{number}.self_attn.summary.{name}"] = inputs.new_zeros(shape)
    dtype = inputs.dtype if dtype == "auto" else dtype
    model = byte_class.from_pretrained(None, config=config, state_dict=weights, dtype=dtype)
    model.generation_config = generation
    return model


def _trunk_config(config: PreTrainedConfig, num_layers: int | None) -> dict[str, Any]:
    """What the architecture's own configuration says of the decoder's layers."""
    general = {field.name for field in fields(PreTrainedConfig)}
    outer = {"vocab_size", "tie_word_embeddings", *(f"{role}_id" for role in _ROLES)}
    own = {field.name for field in fields(config)} - general - outer
    values = {name: value for name, value in config.to_dict().items() if name in own}
    if num_layers is not None:
        values["num_hidden_layers"] = num_layers
        if values.get("layer_types") is not None:
            values["layer_types"] = values["layer_types"][:num_layers]
    return values


@torch.no_grad()
def _rows(table: Tensor, sources: Sequence[Sequence[int]]) -> Tensor:
    """Means of rows of `table`, [len(sources), hidden]; the mean of all where a source is empty."""
    rows = []
    for source in sources:
        chosen = table[list(source)] if source else table
        rows.append(chosen[0] if len(chosen) == 1 else chosen.float().mean(0).to(table.dtype))
    return torch.stack(rows)


def _generation_config(
    model: PreTrainedModel, counterparts: Counterparts, tokenizer: ByteLlamaTokenizer
) -> GenerationConfig:
    """How the subword model is sampled from, with byte-vocabulary ids; ends that this vocabulary lacks are left out."""
    given = model.generation_config
    ends = given.eos_token_id if given.eos_token_id is not None else model.config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    known = [counterparts.specials[end] for end in ends if end in counterparts.specials]
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in known:
        known.append(tokenizer.eos_token_id)
    sampling: dict[str, Any] = {}
    if given.do_sample:
        sampling = {"do_sample": True, **{name: getattr(given, name) for name in _KEPT_SAMPLING}}
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=known[0] if len(known) == 1 else known or None,
        pad_token_id=tokenizer.pad_token_id,
        **sampling,
    )


__all__ = ["CONVERTIBLE", "convert"]
