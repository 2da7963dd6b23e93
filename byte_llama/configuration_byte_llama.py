"""Configurations of byte-level Llama and Gemma 2 models."""

from copy import copy
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.gemma2.configuration_gemma2 import Gemma2Config
from transformers.models.llama.configuration_llama import LlamaConfig


class _Shared(list):
    """A list that copies of a configuration share: copying a dictionary of 100,000 entries takes long."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Shared":
        return self


@strict
class SubwordExpansionConfig(PreTrainedConfig):
    r"""
    What byte-level models have beyond their in-tree parents.

    Args:
        expand_input_ids (`bool`, *optional*, defaults to `False`):
            Whether the embedding of the longest subword that ends at a byte is added to the byte's own.
        expand_input_ids_maxlen (`int`, *optional*, defaults to 16): Longest match, in ids of the byte vocabulary.
        expand_input_ids_vocab_size (`int`, *optional*): Number of subwords.
        expand_input_ids_dict (`list`, *optional*):
            The subwords, `[{"comma-joined byte ids + 1, newest first": subword id + 1}, [special ids]]`, as published
            configurations carry it. A saved model does without: it has the table made from it among its weights.
        expand_table_sizes (`dict`, *optional*): Sizes of that table; written by the model.
        num_pred_heads (`int`, *optional*, defaults to 1): Bytes predicted at each position, the next one included.
        pred_head_kind (`str`, *optional*, defaults to `"residual"`):
            Kind of the heads beyond the first: `"linear"`, or `"residual"` with a block before the output layer.
    """

    expand_input_ids: bool = False
    expand_input_ids_maxlen: int | None = 16
    expand_input_ids_vocab_size: int | None = None
    expand_input_ids_dict: list | tuple | None = None
    expand_table_sizes: dict | None = None
    num_pred_heads: int = 1
    pred_head_kind: str = "residual"

    def __post_init__(self, **kwargs: Any) -> None:
        if self.expand_input_ids_dict is not None:
            self.expand_input_ids_dict = _Shared(self.expand_input_ids_dict)
        super().__post_init__(**kwargs)

    def validate_expansion(self) -> None:
        """Refuse an expansion without what it needs; called by `strict` after construction.

        Raises:
            ValueError: naming the field that is missing.
        """
        if not self.expand_input_ids:
            return
        for field in ("expand_input_ids_vocab_size", "expand_input_ids_maxlen"):
            if not getattr(self, field):
                raise ValueError(f"`expand_input_ids` needs `{field}`, which is {getattr(self, field)}.")
        if self.expand_input_ids_dict is None and self.expand_table_sizes is None:
            raise ValueError(
                "`expand_input_ids` needs `expand_input_ids_dict`: take it from a published config.json, or make one "
                "with `byte_llama.subword_table.entries_from_tokens` and `to_dictionary`."
            )

    def to_dict(self) -> dict[str, Any]:
        """As in transformers, without the dictionary once a model has it among its weights."""
        output = super().to_dict()
        if self.expand_table_sizes is not None:
            output.pop("expand_input_ids_dict", None)
        return output

    def __repr__(self) -> str:
        if self.expand_input_ids_dict is None:
            return super().__repr__()
        shown = copy(self)
        shown.expand_input_ids_dict = None  # too long to print
        return repr(shown)

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        config_dict, kwargs = super().get_config_dict(*args, **kwargs)
        return _without_reference(config_dict), kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        return super().from_dict(_without_reference(config_dict), **kwargs)


def _without_reference(config_dict: dict[str, Any]) -> dict[str, Any]:
    """A published configuration with our names in place of the reference's classes and files."""
    if not str(config_dict.get("model_type")).startswith("tpu_"):
        return config_dict
    names = [name.replace("TPU", "Byte") for name in config_dict.get("architectures") or ()]
    ours = {key: value for key, value in config_dict.items() if key != "auto_map"}
    return {**ours, "model_type": ours["model_type"].replace("tpu_", "byte_"), "architectures": names}


@strict
class ByteLlamaConfig(SubwordExpansionConfig, LlamaConfig):
    r"""
    Configuration of a [`ByteLlamaModel`]: that of Llama, the fields of [`SubwordExpansionConfig`], and

    Args:
        add_qk_norm (`bool`, *optional*, defaults to `False`): RMS norm of each head's queries and keys before rotary.
        skip_out_norm (`bool`, *optional*, defaults to `False`): Leave out the norm behind the last layer.
        eva_layers (`str` or `list[int]`, *optional*):
            `"all"`, or the numbers of the layers whose attention is EVA's: exact within a window, by summaries of
            chunks before it (see `eva_layers.py`). Their caches grow with N / `eva_chunk_size` instead of N.
        eva_window_size (`int`, *optional*, defaults to 2048): Positions that see each other exactly in these layers.
        eva_chunk_size (`int`, *optional*, defaults to 16): Positions per summary; divides `eva_window_size`.

    Raises:
        ValueError: for an expansion without its dictionary or vocabulary size, and for EVA layers that are not there or
            cannot be; the message names the field.
    """

    model_type = "byte_llama"
    _auto_class = "AutoConfig"

    add_qk_norm: bool = False
    skip_out_norm: bool = False
    eva_layers: str | list[int] | tuple[int, ...] | None = None
    eva_window_size: int = 2048
    eva_chunk_size: int = 16

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.eva_layers, list | tuple):
            self.eva_layers = sorted(set(self.eva_layers)) or None
        super().__post_init__(**kwargs)
        if self.add_qk_norm:
            norms = ("layers.*.self_attn.q_norm", "layers.*.self_attn.k_norm")
            plan = dict.fromkeys(norms, "replicated_with_grad_allreduce")
            self.base_model_tp_plan = {**LlamaConfig.base_model_tp_plan, **plan}

    @property
    def eva_layer_numbers(self) -> list[int]:
        """Numbers of the layers with EVA attention, in ascending order."""
        if self.eva_layers == "all":
            return list(range(self.num_hidden_layers))
        return list(self.eva_layers) if isinstance(self.eva_layers, list | tuple) else []

    @property
    def layer_types(self) -> list[str]:
        """The cache layer each decoder layer needs, as `DynamicCache(config=...)` reads it.

        Raises:
            AttributeError: without EVA layers, as from Llama's configuration: for one that has `layer_types`
                transformers makes a mask of each type, which Llama's decoder does not take.
        """
        eva = set(self.eva_layer_numbers)
        if not eva:
            raise AttributeError("layer_types")
        return ["eva_attention" if layer in eva else "full_attention" for layer in range(self.num_hidden_layers)]

    def validate_layer_type(self) -> None:
        """`layer_types` is derived, and EVA is not among transformers' own layer types: nothing to check."""

    def validate_eva_layers(self) -> None:
        """Refuse EVA layers that are not there or cannot be computed; called by `strict` after construction.

        Raises:
            ValueError: naming the field and the value it must have.
        """
        if self.eva_layers is None:
            return
        known = range(self.num_hidden_layers)
        layers = self.eva_layer_numbers
        if not layers or any(layer not in known for layer in layers):
            raise ValueError(
                f"`eva_layers` must be 'all' or numbers in 0..{self.num_hidden_layers - 1}, got {self.eva_layers!r}."
            )
        if self.eva_chunk_size < 1 or self.eva_window_size < 1 or self.eva_window_size % self.eva_chunk_size:
            raise ValueError(
                f"`eva_chunk_size` ({self.eva_chunk_size}) must divide `eva_window_size` ({self.eva_window_size}) "
                "without remainder."
            )
        if self.attention_dropout:
            raise ValueError(f"`attention_dropout` must be 0 with `eva_layers`, got {self.attention_dropout}.")


@strict
class ByteGemma2Config(SubwordExpansionConfig, Gemma2Config):
    r"""
    Configuration of a [`ByteGemma2Model`]: that of Gemma 2 and the fields of [`SubwordExpansionConfig`].

    Raises:
        ValueError: for an expansion without its dictionary or vocabulary size, and for `eva_layers`; the message names
            the field.
    """

    model_type = "byte_gemma2"
    _auto_class = "AutoConfig"

    def __post_init__(self, **kwargs: Any) -> None:
        if kwargs.pop("eva_layers", None):
            raise ValueError(
                "`eva_layers`: Gemma 2 has none, since its attention caps its logits and slides in every other layer, "
                "which EVA attention does not. Convert a Llama instead, or leave `eva_layers` out."
            )
        super().__post_init__(**kwargs)


class TPULlamaConfig(ByteLlamaConfig):
    """Stands for the model type of published checkpoints; reading one gives a [`ByteLlamaConfig`]."""

    model_type = "tpu_llama"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        return ByteLlamaConfig.from_dict(config_dict, **kwargs)


class TPUGemma2Config(ByteGemma2Config):
    """Stands for the model type of published checkpoints; reading one gives a [`ByteGemma2Config`]."""

    model_type = "tpu_gemma2"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        return ByteGemma2Config.from_dict(config_dict, **kwargs)


__all__ = ["ByteGemma2Config", "ByteLlamaConfig", "SubwordExpansionConfig", "TPUGemma2Config", "TPULlamaConfig"]
