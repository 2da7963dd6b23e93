"""The model card of a saved folder: what Hub pages read about it, and how to load it."""

import json
import re
from pathlib import Path
from string import Template
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from transformers.utils import cached_file

CARD = "README.md"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_KEPT = ("license", "license_name", "license_link", "language")

_TEXT = Template("""\
# $title

A byte-level language model ($architecture): it reads and writes the bytes of UTF-8 text, without a subword tokenizer.
$layers layers of width $width; $heads.

The folder holds the code that runs it, so `trust_remote_code=True` is all it needs besides transformers and PyTorch:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

source = "$name"
model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=True)

inputs = tokenizer("Once upon a time", return_tensors="pt")
output = model.multi_byte_generate(**inputs, max_new_tokens=200)  # the same bytes as `generate`, in fewer forwards
print(tokenizer.decode(output[0], skip_special_tokens=True))
```

`tokenizer.encode_chat(messages, add_generation_prompt=True)` gives the ids of a chat, for models trained on chats.
""")


def is_hub_id(source: str) -> bool:
    """Whether `source` names a repository on the Hub, rather than a folder here."""
    return bool(_HUB_ID.fullmatch(source)) and not Path(source).exists()


def facts_of_card(source: str, **options: Any) -> dict[str, Any]:
    """Licence and languages that the card of a model folder or Hub id states; nothing if it has no readable card.

    Args:
        options: passed on to `cached_file`: `revision`, `local_files_only`, `token`.
    """
    try:
        stated = ModelCard.load(cached_file(source, CARD, **options)).data.to_dict()
    except Exception:  # no card, no network, or one that does not parse: nothing fails for want of a card
        return {}
    return {key: stated[key] for key in _KEPT if stated.get(key)}


def write_card(folder: str | Path, name: str, source: str = "", tags: list[str] | None = None) -> None:
    """Write README.md beside a saved model.

    Args:
        folder: where the model was saved; its config.json is read.
        name: what to load the folder by: its path or its id on the Hub.
        source: folder or Hub id the model was loaded from; its licence applies, and a Hub id is named as `base_model`.
        tags: further tags.
    """
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    heads = config.get("num_pred_heads", 1)
    base_model = source if is_hub_id(source) and source != name else None
    data = ModelCardData(
        base_model=base_model,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys(["byte-level", config["model_type"], *(tags or [])])),
        **(facts_of_card(source, local_files_only=True) if source else {}),
    )
    text = _TEXT.substitute(
        title=Path(name).name,
        architecture=(config.get("architectures") or [config["model_type"]])[0],
        layers=config["num_hidden_layers"],
        width=config["hidden_size"],
        heads="one byte per forward" if heads == 1 else f"it predicts up to {heads} bytes per forward",
        name=name,
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}").save(Path(folder) / CARD)


__all__ = ["CARD", "facts_of_card", "is_hub_id", "write_card"]
