"""Configuration of EvaByte models."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

ROPE_TYPES_OF_TRANSFORMERS = ("yarn", "llama3")  # computed by transformers, whatever the length
SUPPORTED_ROPE_TYPES = ("default", "linear", "dynamic", *ROPE_TYPES_OF_TRANSFORMERS)


@strict
class EvaByteConfig(PreTrainedConfig):
    r"""
    Configuration of an [`EvaByteModel`]. The defaults are those of the published 6.5B model, and the published
    `config.json` is taken as it is.

    Args:
        vocab_size (`int`, *optional*, defaults to 320): 64 special ids followed by the 256 bytes.
        hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, hidden_act, rms_norm_eps:
            As in Llama.
        num_key_value_heads (`int`, *optional*): Must equal `num_attention_heads`; EVA has no grouped heads.
        window_size (`int`, *optional*, defaults to 2048):
            Number of positions whose keys a query sees exactly: those of its own window.
        chunk_size (`int`, *optional*, defaults to 16):
            Number of positions that one summary stands for; divides `window_size`.
        num_pred_heads (`int`, *optional*, defaults to 8):
            Number of prediction heads; head `h` at position `t` predicts the byte at `t + 1 + h`.
        rope_parameters (`dict`, *optional*):
            `rope_type` "default", "linear" or "dynamic" (as published), "yarn" or "llama3"; `rope_theta`, and `factor`
            for all but the first, with transformers' further keys for the last two. The older keys `rope_theta` and
            `rope_scaling` (`{"type": ..., "factor": ...}` or null) are converted.
        mixedp_attn (`bool`, *optional*, defaults to `True`):
            Take attention logits and softmaxes in float32 whatever the model's dtype.
        norm_add_unit_offset (`bool`, *optional*, defaults to `True`):
            Scale normalised activations by `1 + weight` instead of `weight`.
        fp32_logits (`bool`, *optional*, defaults to `True`): Return logits in float32.
        fp32_ln, fp32_skip_add (`bool`, *optional*):
            Kept because published configurations have them. Norms are always computed in float32, and adding two
            numbers rounds once whether or not the sum is taken in float32, so neither changes a value.
        attention_class, init_fn, init_std, init_cutoff_factor, lazy_init, max_seq_length, num_chunks:
            Kept when a published configuration carries them; only `attention_class` is looked at.
        return_dict:
            Published configurations say `false` although their models return output classes; the value is ignored.
            Pass `return_dict=False` to a call for a tuple.

    Raises:
        ValueError: for a combination that EVA cannot compute; the message names the field.
    """

    model_type = "evabyte"
    _auto_class = "AutoConfig"
    keys_to_ignore_at_inference = ["past_key_values"]
    default_theta = 100000.0
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 320
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 32768
    initializer_range: float = 0.01275
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    rope_parameters: dict | None = None
    attention_bias: bool = False
    attention_dropout: int | float | None = 0.0
    attention_class: str = "eva"
    window_size: int = 2048
    chunk_size: int = 16
    num_pred_heads: int = 8
    mixedp_attn: bool = True
    norm_add_unit_offset: bool = True
    fp32_ln: bool = False
    fp32_logits: bool = True
    fp32_skip_add: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        super().__post_init__(**kwargs)
        self.return_dict = True

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def layer_types(self) -> list[str]:
        """The cache layer each decoder layer needs, as `DynamicCache(config=...)` reads it."""
        return ["eva_attention"] * self.num_hidden_layers

    def validate_layer_type(self) -> None:
        """`layer_types` is derived, and EVA is not among transformers' own layer types: nothing to check."""

    def validate_architecture(self) -> None:
        """Refuse sizes EVA cannot compute with; called by `strict` after construction.

        Raises:
            ValueError: naming the field and the value it must have.
        """
        for field in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "window_size"):
            if getattr(self, field) < 1:
                raise ValueError(f"`{field}` must be at least 1, got {getattr(self, field)}.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`hidden_size` ({self.hidden_size}) must be a multiple of `num_attention_heads` "
                f"({self.num_attention_heads})."
            )
        if self.head_dim % 2:
            raise ValueError(
                f"`hidden_size` / `num_attention_heads` must be even for rotary embeddings, got {self.head_dim}."
            )
        if self.num_key_value_heads != self.num_attention_heads:
            raise ValueError(
                f"`num_key_value_heads` ({self.num_key_value_heads}) must equal `num_attention_heads` "
                f"({self.num_attention_heads}): EVA has no grouped key/value heads."
            )
        if self.chunk_size < 1 or self.window_size % self.chunk_size:
            raise ValueError(
                f"`chunk_size` ({self.chunk_size}) must divide `window_size` ({self.window_size}) without remainder."
            )
        if self.num_pred_heads < 1:
            raise ValueError(f"`num_pred_heads` must be at least 1, got {self.num_pred_heads}.")
        if self.tie_word_embeddings and self.num_pred_heads > 1:
            raise ValueError(
                "`tie_word_embeddings` must be False when `num_pred_heads` > 1: the output layer has "
                f"{self.num_pred_heads} * {self.vocab_size} rows, the embedding {self.vocab_size}."
            )
        if self.attention_class != "eva":
            raise ValueError(f"`attention_class` must be 'eva', got {self.attention_class!r}.")
        if self.attention_dropout:
            raise ValueError(f"`attention_dropout` must be 0, got {self.attention_dropout}: EVA attention has none.")
        rope_type = (self.rope_parameters or {}).get("rope_type", "default")
        if rope_type not in SUPPORTED_ROPE_TYPES:
            raise ValueError(
                f"`rope_parameters['rope_type']` must be one of {', '.join(SUPPORTED_ROPE_TYPES)}; got {rope_type!r}."
            )


__all__ = ["EvaByteConfig"]
