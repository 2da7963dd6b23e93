"""Models with classes of their own in transformers' server, `transformers serve`.

The server looks for a model's class by its name in transformers alone. It asks neither the Auto classes nor, with
`--trust-remote-code`, the folder, so that it cannot start with models like ours. Here it finds the Auto class behind
every name that transformers does not have.
"""

from collections.abc import Sequence
from typing import Any

from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils.import_utils import is_serve_available

from .modeling_evabyte import EvaByteForCausalLM


class ServedArchitectures:
    """Stands for the module `transformers` where the server looks up a model's class.

    Args:
        transformers: the module.
        multibyte: serve models that can by multibyte decoding, unless their generation config says `multibyte=False`.
    """

    def __init__(self, transformers: Any, multibyte: bool = True) -> None:
        self._transformers = transformers
        self._multibyte = multibyte

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transformers, name, self)

    def from_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """`AutoModelForCausalLM.from_pretrained`."""
        model = AutoModelForCausalLM.from_pretrained(*args, **kwargs)
        if hasattr(model, "multi_byte_generate"):
            config = model.generation_config
            config.multibyte = self._multibyte and getattr(config, "multibyte", True)
        return model


def serve(arguments: Sequence[str], multibyte: bool = True) -> None:
    """Run `transformers serve`, for models of ours too, until it is interrupted.

    Args:
        arguments: the words after `transformers serve`.
        multibyte: serve by multibyte decoding, unless a model's generation config says `multibyte=False`.

    Raises:
        ImportError: what the server needs is not installed.
        SystemExit: the arguments are not the server's.
    """
    if not is_serve_available():
        raise ImportError("the server needs further packages: pip install 'transformers[serving]'")
    from transformers.cli.serving import model_manager
    from transformers.cli.transformers import app

    if not isinstance(model_manager.transformers, ServedArchitectures):
        model_manager.transformers = ServedArchitectures(model_manager.transformers, multibyte)
    # Asked of models that come with a processor: whether pictures in messages reach it.
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["evabyte"] = EvaByteForCausalLM.__name__
    app(["serve", *arguments], prog_name="evabyte")


__all__ = ["ServedArchitectures", "serve"]
