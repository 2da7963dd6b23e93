"""EvaByte: a Llama-like decoder over bytes with EVA attention and several prediction heads."""

from dataclasses import dataclass
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_evabyte import ROPE_TYPES_OF_TRANSFORMERS, EvaByteConfig
from .eva_attention import backend_for, cached_attention, default_backend, layout_attention, summarizer
from .eva_cache import eva_layers
from .eva_layout import DraftTree, EvaLayout
from .hub import SelfContainedMixin
from .multibyte_generation import MultibyteGenerationMixin
from .multibyte_loss import multibyte_loss, shift_for_heads
from .stacked_heads import StackedHeadsMixin
from .static_generation import StaticGenerationMixin
from .strict_loading import StrictLoadingMixin

logger = logging.get_logger(__name__)


class EvaByteRMSNorm(nn.Module):
    """Root-mean-square norm in float32, scaled by `1 + weight` (taken in the weight's own dtype) or by `weight`."""

    def __init__(self, config: EvaByteConfig) -> None:
        super().__init__()
        self.add_unit_offset = config.norm_add_unit_offset
        self.eps = config.rms_norm_eps
        self.weight = nn.Parameter(torch.empty(config.hidden_size))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., hidden_size] to the same shape and dtype."""
        precise = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        normed = nn.functional.rms_norm(precise, self.weight.shape, eps=self.eps)
        scale = 1 + self.weight if self.add_unit_offset else self.weight
        return (normed * scale).to(hidden_states.dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}, add_unit_offset={self.add_unit_offset}"


class EvaByteRotaryEmbedding(nn.Module):
    """Cosines and sines of the rotary embedding, without scaling, with linear, dynamic (NTK), yarn or llama3 scaling.

    The table is a function of its input alone and built in float32, as trained: there is no buffer that a cast to
    bfloat16 could round or that a longer earlier input could have changed.
    """

    def __init__(self, config: EvaByteConfig) -> None:
        super().__init__()
        self.dim = config.head_dim
        rope = config.rope_parameters or {}
        self.base = float(rope["rope_theta"])
        self.rope_type = rope["rope_type"]
        self.factor = float(rope.get("factor") or 1.0)
        self.max_position_embeddings = config.max_position_embeddings
        self.config = config

    def forward(self, hidden_states: Tensor, position_ids: Tensor, layout: EvaLayout) -> tuple[Tensor, Tensor]:
        """Cosines and sines, each [B or 1, N, head_dim], in the dtype and on the device of `hidden_states`.

        Args:
            position_ids: int64 [B or 1, N].
            layout: knows the length of each token's document in this call, which dynamic scaling goes by.
        """
        device = hidden_states.device
        positions = position_ids.to(device)[..., None].float()
        amplitude = 1.0
        if self.rope_type in ROPE_TYPES_OF_TRANSFORMERS:
            inverse, amplitude = ROPE_INIT_FUNCTIONS[self.rope_type](self.config, device)
        else:
            base: float | Tensor = self.base
            if self.rope_type == "linear":
                positions = positions / self.factor
            elif self.rope_type == "dynamic" and max(layout.new_lengths) > self.max_position_embeddings:
                stretch = self.factor * layout.totals(device).float() / self.max_position_embeddings - (self.factor - 1)
                base = (self.base * stretch.clamp(min=1.0) ** (self.dim / (self.dim - 2)))[..., None]
            inverse = 1.0 / base ** (torch.arange(0, self.dim, 2, device=device).float() / self.dim)
        frequencies = positions * inverse
        angles = torch.cat((frequencies, frequencies), dim=-1)
        cos, sin = angles.cos() * amplitude, angles.sin() * amplitude
        return cos.to(hidden_states.dtype), sin.to(hidden_states.dtype)


def apply_rotary(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate [B, H, N, D] by tables [B or 1, N, D]; channel d pairs with channel d + D / 2."""
    first, second = states.chunk(2, dim=-1)
    return states * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]


class EvaByteMLP(nn.Module):
    def __init__(self, config: EvaByteConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class EvaByteAttention(nn.Module):
    """EVA attention with its two learned summary vectors per head; see `eva_attention.py`."""

    def __init__(self, config: EvaByteConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        width = config.num_attention_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, width, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, width, bias=config.attention_bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=config.attention_bias)
        self.adaptive_phi = nn.Parameter(torch.empty(1, config.num_attention_heads, 1, 1, config.head_dim))
        self.adaptive_mu_k = nn.Parameter(torch.empty(1, config.num_attention_heads, 1, 1, config.head_dim))

    def forward(
        self,
        hidden_states: Tensor,
        layout: EvaLayout,
        position_embeddings: tuple[Tensor, Tensor],
        past_key_values: Cache | None = None,
    ) -> Tensor:
        """[B, N, hidden_size] to the same shape."""
        batch, length = hidden_states.shape[:2]
        query, key, value = (
            projection(hidden_states).view(batch, length, -1, self.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        cos, sin = position_embeddings
        query, key = apply_rotary(query, cos, sin), apply_rotary(key, cos, sin)
        learned = self._learned_vectors(query.shape[1])
        backend, fp32_softmax = backend_for(self.config._attn_implementation, query), self.config.mixedp_attn
        if past_key_values is None:
            output = layout_attention(query, key, value, *learned, layout, backend, fp32_softmax)
        else:
            if layout.tree is not None and dist.is_available() and dist.is_initialized():
                # A window may fill up when a path is committed, and by then FSDP has taken the weights away.
                learned = (learned[0].clone(), learned[1].clone())
            summarize = summarizer(*learned, layout.chunk_size, backend, fp32_softmax)
            states, _ = past_key_values.update(key, value, self.layer_idx, layout, summarize)
            output = cached_attention(query, states, summarize, layout, backend, fp32_softmax)
        return self.o_proj(output.transpose(1, 2).reshape(batch, length, -1))

    def _learned_vectors(self, heads: int) -> tuple[Tensor, Tensor]:
        """`adaptive_mu_k` and `adaptive_phi`, each [1, H, 1, 1, D]; of this process's heads in tensor parallelism."""
        learned = (self.adaptive_mu_k, self.adaptive_phi)
        if learned[0].shape[1] == heads:
            return learned
        # Every process has the vectors of all heads and takes its own, in a way that brings their gradients together.
        mesh = cast(DTensor, self.q_proj.weight).device_mesh
        whole = (DTensor.from_local(vectors, mesh, [Replicate()], run_check=False) for vectors in learned)
        mu, phi = (vectors.redistribute(placements=[Shard(1)]).to_local() for vectors in whole)
        return mu, phi


class EvaByteDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: EvaByteConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = EvaByteAttention(config, layer_idx)
        self.mlp = EvaByteMLP(config)
        self.input_layernorm = EvaByteRMSNorm(config)
        self.post_attention_layernorm = EvaByteRMSNorm(config)

    def forward(
        self,
        hidden_states: Tensor,
        layout: EvaLayout,
        position_embeddings: tuple[Tensor, Tensor],
        past_key_values: Cache | None = None,
    ) -> Tensor:
        hidden_states = hidden_states + self.self_attn(
            self.input_layernorm(hidden_states), layout, position_embeddings, past_key_values
        )
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class EvaBytePreTrainedModel(StrictLoadingMixin, SelfContainedMixin, PreTrainedModel):
    config: EvaByteConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["EvaByteDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _can_record_outputs = {"hidden_states": EvaByteDecoderLayer}

    def get_correct_attn_implementation(self, requested_attention: str | None, *args: Any, **kwargs: Any) -> str:
        """As in transformers, but unless another is asked for, the kernels where there is a GPU to run them."""
        if requested_attention is None and torch.cuda.is_available():
            requested_attention = default_backend("cuda")
        return super().get_correct_attn_implementation(requested_attention, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, EvaByteRMSNorm):
            (init.zeros_ if module.add_unit_offset else init.ones_)(module.weight)
        elif isinstance(module, EvaByteAttention):
            init.normal_(module.adaptive_phi, std=std)
            init.normal_(module.adaptive_mu_k, std=std)
        else:
            super()._init_weights(module)


class EvaByteModel(EvaBytePreTrainedModel):
    """The decoder without prediction heads."""

    _auto_class = "AutoModel"

    def __init__(self, config: EvaByteConfig) -> None:
        config.validate_architecture()  # its fields may have been set since it was made
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(EvaByteDecoderLayer(config, idx) for idx in range(config.num_hidden_layers))
        self.norm = EvaByteRMSNorm(config)
        self.rotary_emb = EvaByteRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        draft_tree: Tensor | DraftTree | None = None,
        layout: EvaLayout | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the decoder over N new tokens per row.

        Args:
            input_ids: int64 [B, N]; or `inputs_embeds`, [B, N, hidden_size].
            attention_mask: None, or [B, N] or [B, cached slots + N], zero at padding, which may stand anywhere. Every
                row gives what its real tokens alone would give.
            position_ids: None, or int64 [B or 1, N]: rotary positions. A document starts wherever they are 0, so rows
                may pack several. By default each row's real tokens are counted on from what the cache holds of it.
            past_key_values: None, or a `DynamicCache(config=model.config)`.
            draft_tree: None, or bool [B or 1, N, N] (or a `DraftTree`): the new tokens are nodes of draft trees, row i
                marking node i and its ancestors; every row is one tree whose root continues the cache. The cache does
                not count the nodes until a path of them is committed (see `multibyte_generation.py`).
            layout: for callers that have built it already.

        Returns:
            `last_hidden_state` [B, N, hidden_size], after the final norm, and the cache.

        Raises:
            ValueError: for missing, empty or out-of-range input, and masks, positions or caches that do not fit it.
        """
        if kwargs.get("output_attentions"):
            raise ValueError("`output_attentions`: EVA attention does not return its weights; leave it out.")
        hidden_states = self._embed(input_ids, inputs_embeds)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if layout is None:
            layout = self.build_layout(hidden_states.shape, attention_mask, position_ids, past_key_values, draft_tree)
        positions = layout.positions(hidden_states.device)
        if isinstance(layout, EvaLayout) and max(layout.new_lengths) > self.config.max_position_embeddings:
            logger.warning_once(
                f"A sequence is {max(layout.new_lengths)} long, more than `max_position_embeddings` "
                f"({self.config.max_position_embeddings}): the model was not trained there and may write nonsense."
            )
        rotary_positions = position_ids if position_ids is not None and draft_tree is None else positions
        position_embeddings = self.rotary_emb(hidden_states, rotary_positions, layout)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states, layout=layout, position_embeddings=position_embeddings, past_key_values=past_key_values
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """The input as embeddings [B, N, hidden_size], whichever way it came."""
        if input_ids is not None and inputs_embeds is None:
            self._check_ids(input_ids)
            return self.embed_tokens(input_ids)
        if inputs_embeds is not None and input_ids is None:
            return inputs_embeds
        raise ValueError("Pass exactly one of `input_ids` and `inputs_embeds`.")

    def _check_ids(self, input_ids: Tensor) -> None:
        if torch.compiler.is_compiling() or input_ids.device.type != "cpu" or input_ids.numel() == 0:
            return  # on an accelerator looking at the ids would stall it at every step
        low, high = input_ids.aminmax()
        if low < 0 or high >= self.config.vocab_size:
            raise ValueError(
                f"`input_ids` must lie in 0..{self.config.vocab_size - 1}, got {int(low)}..{int(high)}: encode text "
                "with `EvaByteTokenizer`, where byte b is id b + 64."
            )

    def build_layout(
        self,
        shape: torch.Size,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        draft_tree: Tensor | DraftTree | None = None,
    ) -> EvaLayout:
        """Check that the arguments of `forward` fit each other and an input of `shape` [B, N, ...], and say where each
        new token stands."""
        batch, length = shape[:2]
        if batch == 0 or length == 0:
            raise ValueError("The input is empty: pass at least one id per row (an empty prompt is the bos id alone).")
        past, slots = None, 0
        if past_key_values is not None:
            layers = eva_layers(past_key_values, self.config.num_hidden_layers)
            # A stage of a pipeline fills the layers that it runs.
            filled = next((layer for layer in layers if layer.lengths), layers[0])
            past, slots = filled.lengths or None, filled.slots
            if past is not None and len(past) != batch:
                raise ValueError(f"`past_key_values` holds {len(past)} rows, the input has {batch}.")
        if position_ids is not None and tuple(position_ids.shape) not in ((batch, length), (1, length)):
            raise ValueError(f"`position_ids` must have shape {(batch, length)}, got {tuple(position_ids.shape)}.")
        sizes = {"window_size": self.config.window_size, "chunk_size": self.config.chunk_size}
        if draft_tree is not None:
            tree = draft_tree if isinstance(draft_tree, DraftTree) else DraftTree.from_mask(draft_tree)
            if past is None or tuple(tree.mask.shape) not in ((batch, length, length), (1, length, length)):
                raise ValueError(
                    f"`draft_tree` must have shape {(batch, length, length)} and continue a cache, got "
                    f"{tuple(tree.mask.shape)}{'' if past else ' without one'}."
                )
            return EvaLayout.for_tree(tree, past=past, **sizes)
        if attention_mask is not None and tuple(attention_mask.shape) not in ((batch, length), (batch, slots + length)):
            raise ValueError(
                f"`attention_mask` must be 2D, of shape {(batch, slots + length)} (cached and new tokens), got "
                f"{tuple(attention_mask.shape)}."
            )
        return EvaLayout.build(
            batch, length, past=past, attention_mask=attention_mask, position_ids=position_ids, **sizes
        )


@dataclass
class EvaByteCausalLMOutput(CausalLMOutputWithPast):
    """Output of [`EvaByteForCausalLM`].

    Attributes:
        loss: scalar, in nats, when labels were given.
        logits: [B, N, vocab_size] of the next-byte head, or [B, N, num_pred_heads, vocab_size] of all heads.
        head_losses: float32 [num_pred_heads], each head's own mean loss, when labels were given.
    """

    head_losses: Tensor | None = None


class EvaByteForCausalLM(
    StaticGenerationMixin, StackedHeadsMixin, MultibyteGenerationMixin, EvaBytePreTrainedModel, GenerationMixin
):
    """EvaByte with its prediction heads: head h at position t predicts the byte at t + 1 + h."""

    _auto_class = "AutoModelForCausalLM"
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}

    def __init__(self, config: EvaByteConfig) -> None:
        super().__init__(config)
        self.model = EvaByteModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.num_pred_heads * config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_all_pred_logits: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        draft_tree: Tensor | DraftTree | None = None,
        **kwargs: Any,
    ) -> EvaByteCausalLMOutput:
        """Run the model; see [`EvaByteModel.forward`] for the arguments not listed here.

        Args:
            labels: int64 [B, N] like `input_ids`, -100 ignored, shifted inside: every head learns its own byte, the
                loss is the mean over heads of each head's mean. No head learns across documents or from padding. Or
                [B, N, num_pred_heads], where labels[b, t, h] is the target of head h at position t itself (the
                published layout): the loss is the mean over all labelled pairs.
            shift_labels: int64 [B, N], `labels` already shifted by one (as context parallelism passes them); by name.
            logits_to_keep: keep the logits of the last so many positions (0: all), or of the positions in a tensor.
            return_all_pred_logits: return the logits of all heads, [B, N, num_pred_heads, vocab_size].
            num_items_in_batch: number of labels of the whole batch that this call is a part of (see `multibyte_loss`).

        Raises:
            ValueError: as `EvaByteModel.forward`, and for labels whose shape does not fit.
        """
        shift_labels = kwargs.pop("shift_labels", None)  # in the signature, the Trainer would ask every batch for it
        learned = labels if shift_labels is None else shift_labels
        inputs, layout = input_ids if input_ids is not None else inputs_embeds, None
        if learned is not None and inputs is not None:
            use_cache = False if use_cache is None else use_cache
            self._check_labels(labels, shift_labels, inputs.shape)
            layout = self.model.build_layout(inputs.shape, attention_mask, position_ids, past_key_values, draft_tree)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            draft_tree=draft_tree,
            layout=layout,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        loss = head_losses = None
        if learned is not None:
            logits = self.predict(hidden_states)
            published_layout = learned.ndim == 3
            if not published_layout:
                document = None if layout is None or layout.uniform else layout.documents()
                first = 1 if shift_labels is None else 0
                learned = shift_for_heads(learned, self.config.num_pred_heads, first, document)
            average = "pairs" if published_layout else "heads"
            loss, head_losses = multibyte_loss(logits, learned, num_items_in_batch, average)
            logits = logits[:, _kept(logits_to_keep)]
            logits = logits if return_all_pred_logits else logits[:, :, 0]
        else:
            logits = self.predict(hidden_states[:, _kept(logits_to_keep)], all_heads=return_all_pred_logits)
        return EvaByteCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            head_losses=head_losses,
        )

    def predict(self, hidden_states: Tensor, all_heads: bool = True) -> Tensor:
        """Logits [..., num_pred_heads, vocab_size] of hidden states [..., hidden_size]; of head 0 [..., vocab_size]."""
        weight = self.lm_head.weight
        hooked = hasattr(self.lm_head, "_hf_hook")  # accelerate's, of a layer on another device or offloaded
        if not all_heads and type(self.lm_head) is nn.Linear and type(weight) is nn.Parameter and not hooked:
            logits = nn.functional.linear(hidden_states, weight[: self.vocab_size])
        else:  # wrapped (LoRA), sharded, quantised or elsewhere: only the module knows how
            logits = self.lm_head(hidden_states).unflatten(-1, (-1, self.vocab_size))
            logits = logits if all_heads else logits[..., 0, :]
        return logits.to(torch.promote_types(logits.dtype, torch.float32)) if self.config.fp32_logits else logits

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not for EVA attention.

        Raises:
            NotImplementedError: always, before any work.
        """
        raise NotImplementedError(
            "Continuous batching (`generate_batch`): its paged cache holds full and sliding attention only, and EVA "
            "attention keeps summaries of chunks. Use `generate` or `multi_byte_generate` with a padded batch and an "
            "`attention_mask`, or `evabyte.engine.ByteEngine`, in which requests join and leave."
        )

    def _check_labels(self, labels: Tensor | None, shift_labels: Tensor | None, input_shape: torch.Size) -> None:
        shape = tuple(input_shape[:2])
        heads = self.config.num_pred_heads
        if labels is not None and tuple(labels.shape) not in (shape, (*shape, heads)):
            raise ValueError(f"`labels` must have shape {shape} or {(*shape, heads)}, got {tuple(labels.shape)}.")
        if shift_labels is not None and tuple(shift_labels.shape) != shape:
            raise ValueError(f"`shift_labels` must have shape {shape}, got {tuple(shift_labels.shape)}.")


def _kept(logits_to_keep: int | Tensor) -> slice | Tensor:
    """The positions whose logits are wanted, as an index."""
    return (
        slice(-logits_to_keep, None)
        if isinstance(logits_to_keep, int) and logits_to_keep
        else (slice(None) if isinstance(logits_to_keep, int) else logits_to_keep)
    )


__all__ = ["EvaByteForCausalLM", "EvaByteModel", "EvaBytePreTrainedModel"]
