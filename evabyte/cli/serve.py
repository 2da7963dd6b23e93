"""`evabyte serve`: a server with OpenAI's interface."""

from argparse import Namespace
from contextlib import suppress
from importlib import import_module

from ..configuration_evabyte import EvaByteConfig
from ..serving import serve
from .model import CommandError, find_model, told_in_one_line


def run(options: Namespace) -> int:
    """Serve until interrupted."""
    others: list[str] = options.others
    given = others.pop(0) if others and not others[0].startswith("-") else None
    name, at, revision = (given or find_model(None)).partition("@")
    source = find_model(name)
    # The distribution's other package makes further architectures known; a command may use it, the library may not.
    with suppress(ImportError):
        import_module("byte_llama")
    if "--continuous-batching" in others:
        with told_in_one_line(f"cannot read the configuration of {source}"):
            values, _ = EvaByteConfig.get_config_dict(source, **({"revision": revision} if at else {}))
        if values.get("model_type") == EvaByteConfig.model_type:
            raise CommandError(
                "--continuous-batching pages keys and values, and EVA attention keeps summaries: leave it out"
            )
    try:
        serve([f"{source}{at}{revision}", *others], multibyte=not options.byte_by_byte)
    except ImportError as error:
        raise CommandError(str(error)) from error
    return 0


__all__ = ["run"]
