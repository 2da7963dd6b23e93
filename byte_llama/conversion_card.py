"""The model card of a converted checkpoint: what it is, where it comes from, and that it still has to be trained."""

from pathlib import Path
from string import Template
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedModel
from transformers.utils import cached_file

from evabyte.model_card import CARD, facts_of_card, is_hub_id

from .tokenization_byte_llama import ByteLlamaTokenizer

_TEXT = Template("""\
# $name, byte-level, untrained

The weights of $origin
with a byte vocabulary around them, made by `byte_llama.conversion`. **It has not been trained on bytes since, and
predicts them badly:** it is where training starts.

- Trunk ($layers) and subword embeddings (`model.expand_embed_tokens`): those of $name.
- Byte embeddings and output layer: rows copied from the tokens that correspond to the $entries entries of the byte
  vocabulary, which are 256 bytes and $others.
- The input at a byte is the embedding of that byte plus that of the longest of $subwords subwords that ends there.
- $parameters parameters, $dtype. Positions, up to $positions, count bytes.
- Padding token: $padding.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

import byte_llama  # makes the architecture known to the Auto classes; or pass trust_remote_code=True

model = AutoModelForCausalLM.from_pretrained("$folder")
tokenizer = AutoTokenizer.from_pretrained("$folder")
```

## What to do next

Train all weights but the subword embeddings (`model.model.expand_embed_tokens.requires_grad_(False)`), by next-byte
prediction, or by distillation from
$name.

The licence of $name applies$unnamed.
""")


def write_card(
    folder: Path,
    source: str,
    num_layers: int,
    model: PreTrainedModel,
    tokenizer: ByteLlamaTokenizer,
    gguf_file: str | None = None,
    revision: str | None = None,
) -> None:
    """Write README.md beside a converted checkpoint; the licence is that of the subword model, as far as it tells.

    Args:
        source: folder or Hub id of the subword model, or an empty string.
        num_layers: number of layers of the subword model.
        gguf_file, revision: as in `convert`.
    """
    on_hub = is_hub_id(source)
    # A path would tell strangers about this machine, and nothing about the model.
    name = source if on_hub else (gguf_file or (Path(source).resolve().name if source else "a subword model"))
    facts = _source_facts(source, gguf_file, revision) if source else {}
    config, kept = model.config, model.config.num_hidden_layers
    added = tokenizer.added_tokens_decoder
    further = [
        added[entry].content if entry in added else repr(tokenizer.decode_bytes([entry]).decode())
        for entry in range(256, len(tokenizer))
    ]
    data = ModelCardData(
        base_model=source if on_hub else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["byte-level", "untrained", config.model_type],
        **facts,
    )
    text = _TEXT.substitute(
        name=name,
        origin=f"{name}, revision {revision}," if revision else name,
        layers=f"{kept} layers" if kept == num_layers else f"the first {kept} of {num_layers} layers",
        entries=len(tokenizer),
        others=", ".join(f"`{entry}`" for entry in further),
        subwords=f"{config.expand_input_ids_vocab_size:,}",
        parameters=f"{model.num_parameters():,}",
        dtype=str(model.dtype).removeprefix("torch."),
        positions=f"{config.max_position_embeddings:,}",
        padding=f"`{tokenizer.pad_token}`" if tokenizer.pad_token else "none; batches need one, so name it",
        folder=folder.resolve().name,
        unnamed="" if "license" in facts else "; its files do not name it",
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}").save(folder / CARD)


def _source_facts(source: str, gguf_file: str | None, revision: str | None) -> dict[str, Any]:
    """Licence and language of the subword model, from its card or the header of its GGUF file."""
    facts = facts_of_card(source, revision=revision)
    if gguf_file is not None and "license" not in facts:
        from gguf import GGUFReader

        field = GGUFReader(cached_file(source, gguf_file, revision=revision)).get_field("general.license")
        facts |= {"license": field.contents()} if field is not None else {}
    return facts


__all__ = ["write_card"]
