"""What byte-level models have before their in-tree parents: subword embeddings, and the byte ids these depend on."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.generic import merge_with_config_defaults

from .byte_history import add_byte_history, byte_history
from .configuration_byte_llama import SubwordExpansionConfig
from .request_history import ProcessorsAndHistories, request_windows
from .subword_expansion import SubwordExpansion, TableSizes
from .subword_table import build_table, entries_from_dictionary

SERVERS = {"vllm": "vLLM", "sglang": "SGLang"}  # by the attention implementation that they run in-tree models with


class ExpandedInputsMixin:
    """Embeds byte ids for an in-tree decoder, mixed in before its class.

    With `config.expand_input_ids` the input at byte i is E_byte[id_i] + E_subword[longest subword that ends at i].
    """

    config: SubwordExpansionConfig
    embed_tokens: nn.Embedding
    _keys_to_ignore_on_load_missing = [r"subword_expansion\."]  # made from the dictionary where a folder lacks them

    def add_expansion(self, make_embedding: Callable[[int, int], nn.Embedding]) -> None:
        """Add the table, made from the configuration's dictionary if it has one, and the subword embedding.

        Args:
            make_embedding: makes an embedding of so many rows and columns.

        Raises:
            ValueError: when the dictionary is malformed or names subwords that the embedding lacks.
            NotImplementedError: within a server that runs models with a cache of its own, which keeps no byte ids.
        """
        if (server := self.config._attn_implementation) in SERVERS:
            raise NotImplementedError(
                f"{SERVERS[server]} does not tell a model the bytes before each new one, which `expand_input_ids` "
                "needs. Serve it with transformers (`generate`, `generate_batch`, `transformers serve`)."
            )
        config, table = self.config, None
        subwords, maxlen = config.expand_input_ids_vocab_size or 0, config.expand_input_ids_maxlen or 0
        if config.expand_input_ids_dict is not None:
            entries = entries_from_dictionary(config.expand_input_ids_dict, maxlen)
            largest = int(entries.subwords.max(initial=0))
            if largest >= subwords:
                raise ValueError(
                    f"`expand_input_ids_dict` has subword id {largest}; `expand_input_ids_vocab_size` is {subwords}."
                )
            table = build_table(entries)
            config.expand_table_sizes = TableSizes.of(table).as_dict()
        self.expand_embed_tokens = make_embedding(subwords, config.hidden_size)
        self.subword_expansion = SubwordExpansion(TableSizes(**(config.expand_table_sizes or {})), table)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if not isinstance(module, SubwordExpansion):
            super()._init_weights(module)  # type: ignore[misc]
        elif module.table is not None:
            module.fill(module.table)
            module.table = None
        elif not all(tensor.is_meta or getattr(tensor, "_is_hf_initialized", False) for tensor in module.buffers()):
            raise ValueError(
                "There is no table for `expand_input_ids`: the checkpoint lacks `subword_expansion.*` and the "
                "configuration `expand_input_ids_dict`. Copy or download the folder again, or give the configuration "
                "a dictionary."
            )

    @merge_with_config_defaults
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        token_mask: Tensor | None = None,
        parents: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the decoder, as its parent class does, over N new tokens per row.

        Args:
            input_ids: int64 [B, N].
            attention_mask: as in the parent. Of a 2D mask the last N columns say which of the new ids are padding;
                matches pass over padding as if it were not there.
            position_ids: as in the parent. Where they are 0 a document starts, which no match reaches beyond.
            past_key_values: as in the parent; the byte ids are kept in it, too (see `byte_history.py`).
            inputs_embeds: [B, N, hidden_size] in place of ids, complete with any subword embeddings: nothing is added
                to them. Their ids are unknown, so that no later match reaches over them.
            token_mask: None, or [B, N], zero at padding: for attention masks that do not tell.
            parents: None, or int64 [B or 1, N]: the new ids are nodes of trees, with -1 as the parent of roots, and
                each is matched along its own ancestors. `attention_mask` and `position_ids` must say the same. The
                nodes are not added to the history: append those that are kept (`byte_history(cache).append`).
            **kwargs: as in the parent; with continuous batching's `logits_processor_args` the row is the new ids of
                several requests (see `request_history.py`).

        Raises:
            ValueError: unless exactly one of `input_ids` and `inputs_embeds` is given, and as `SubwordExpansion`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of `input_ids` and `inputs_embeds`.")
        rest = {"attention_mask": attention_mask, "position_ids": position_ids, "use_cache": use_cache, **kwargs}
        if not self.config.expand_input_ids:
            return super().forward(  # type: ignore[misc]
                input_ids=input_ids, inputs_embeds=inputs_embeds, past_key_values=past_key_values, **rest
            )
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        expansion = self.subword_expansion
        if inputs_embeds is not None:
            ids = torch.full(inputs_embeds.shape[:2], expansion.num_symbols, device=inputs_embeds.device)
        else:
            ids = cast(Tensor, input_ids)
        if token_mask is None and isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
            token_mask = attention_mask[:, -ids.shape[1] :]
        symbols, padded = expansion.as_symbols(ids, position_ids, token_mask), token_mask is not None
        history = byte_history(past_key_values)
        if "logits_processor_args" in kwargs:  # continuous batching
            histories = kwargs["logits_processor_args"][-expansion.maxlen :].clamp(max=expansion.num_symbols - 1)
            windows = request_windows(symbols, kwargs["cu_seq_lens_q"], histories)
            inputs_embeds = self.embed_tokens(ids) + self.expand_embed_tokens(expansion.lookup(windows))
        elif input_ids is not None:
            past = None if history is None else history.tail()
            subwords = expansion(symbols, past, parents=parents, padded=padded)
            inputs_embeds = self.embed_tokens(input_ids) + self.expand_embed_tokens(subwords)
        outputs = super().forward(inputs_embeds=inputs_embeds, past_key_values=past_key_values, **rest)  # type: ignore[misc]
        if past_key_values is not None and parents is None:
            if history is None:
                history = add_byte_history(past_key_values, expansion.maxlen)
            history.append(symbols, padded)
        return outputs


class BytesWithoutSubwords(nn.Module):
    """A byte embedding for those who would embed texts by themselves: it gives single rows and refuses texts.

    Args:
        embedding: the model's own.
    """

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.embedding, self.num_embeddings = embedding, embedding.num_embeddings

    @property
    def weight(self) -> Tensor:
        return self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        if ids.ndim > 1:
            raise NotImplementedError(
                "peft's prompt tuning and p-tuning embed the bytes themselves, without the subwords that "
                "`expand_input_ids` adds. Use prefix tuning (`PrefixTuningConfig`) or LoRA, which do not."
            )
        return self.embedding(ids)


class ExpandedGenerationMixin:
    """What `generate` and peft must know of models with [`ExpandedInputsMixin`], before the in-tree class."""

    config: SubwordExpansionConfig

    def get_submodule(self, target: str) -> nn.Module:
        if target == "embeddings.word_embeddings" and self.config.expand_input_ids:  # where peft looks first
            return BytesWithoutSubwords(self.get_input_embeddings())  # type: ignore[attr-defined]
        return super().get_submodule(target)  # type: ignore[misc]

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,  # `generate` takes them only where this signature names them
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As in transformers; keeps what the 2D mask says of the new ids, for caches that want a 4D one."""
        inputs = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs
        )
        if self.config.expand_input_ids and isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
            new = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
            # Copied, because the strides of a view grow with the mask, and compiled steps would never be the same.
            inputs["token_mask"] = attention_mask[:, -new.shape[1] :].clone(memory_format=torch.contiguous_format)
        return inputs

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; the manager sends the bytes before each request's new ones along.

        Raises:
            ValueError: with soft caps in the attention (Gemma 2's), where transformers would leave them out.
        """
        given = self.config._attn_implementation
        manager = super().init_continuous_batching(*args, **kwargs)  # type: ignore[misc]
        taken = self.config._attn_implementation
        if getattr(self.config, "attn_logit_softcapping", None) and "flash" not in taken:
            self.set_attn_implementation(given)  # type: ignore[attr-defined]
            raise ValueError(
                f"Continuous batching (`generate_batch`) with attn_implementation={taken!r} would leave out the "
                "attention's soft caps (`config.attn_logit_softcapping`). Load the model with "
                "attn_implementation='flash_attention_2' on a GPU, or use `generate` with a padded batch."
            )
        if self.config.expand_input_ids and not isinstance(manager.logit_processor, ProcessorsAndHistories):
            width = self.model.subword_expansion.maxlen  # type: ignore[attr-defined]
            manager.logit_processor = ProcessorsAndHistories(manager.logit_processor, width)
        return manager


__all__ = ["ExpandedGenerationMixin", "ExpandedInputsMixin"]
