"""The command `byte-llama`: `convert` and `byte-llama distill`.

This file knows the options; what a command does is in the module `byte_llama.cli.<command>`, imported when it runs.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

from .parsing import INTERRUPTED, OneLineParser, positive


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; parsing gives a namespace with `command` and that command's options."""
    parser = OneLineParser(prog="byte-llama", description="Byte-level Llama and Gemma 2.")
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    convert = commands.add_parser(
        "convert",
        help="subword checkpoint to byte-level checkpoint",
        description="Put a byte vocabulary around a Llama or Gemma 2 subword model. The result is where training on "
        "bytes starts; it predicts next to nothing before.",
    )
    convert.add_argument("model", metavar="SUBWORD_MODEL", help="folder or Hub id")
    convert.add_argument("output", metavar="OUT", help="folder to write")
    convert.add_argument("--gguf-file", metavar="NAME", help="a GGUF file in the folder or Hub repository to read")
    convert.add_argument("--revision", metavar="NAME", help="branch, tag or commit on the Hub")
    convert.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="number format of the weights; auto keeps the checkpoint's, float32 for GGUF (default: %(default)s)",
    )
    convert.add_argument("--num-layers", metavar="N", type=positive, help="keep the first N layers only")
    convert.add_argument(
        "--template-word",
        dest="template_words",
        metavar="TEXT",
        action="append",
        default=[],
        help="a piece of text that is one id wherever it occurs; may be given repeatedly (default: none)",
    )
    convert.add_argument(
        "--pad-token", metavar="TOKEN", help="special token to pad with (default: the subword model's)"
    )
    convert.add_argument(
        "--eva-layers",
        metavar="LAYERS",
        type=_layers,
        help="'all', or numbers as in 0,1,4: EVA attention in these layers of a Llama (default: none)",
    )
    convert.add_argument(
        "--eva-window",
        dest="eva_window_size",
        metavar="N",
        type=positive,
        help="bytes that see each other exactly in EVA layers (default: 2048)",
    )
    convert.add_argument(
        "--eva-chunk",
        dest="eva_chunk_size",
        metavar="N",
        type=positive,
        help="bytes per summary in EVA layers; divides the window (default: 16)",
    )
    convert.add_argument(
        "--max-shard-size", metavar="SIZE", default="5GB", help="largest weight file (default: %(default)s)"
    )
    convert.add_argument("--overwrite", action="store_true", help="write into a folder that is not empty")

    distill = commands.add_parser(
        "distill",
        help="train a converted model on what its subword parent says",
        description="Cross-tokenizer distillation as a recipe file describes it; the trained model is in OUTPUT/final.",
    )
    distill.add_argument("--config", metavar="FILE", required=True, help="the recipe, see docs/byteification.md")
    distill.add_argument(
        "--set",
        dest="overrides",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="replace a field of the recipe (VALUE is YAML), or training.NAME of its training arguments",
    )
    distill.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    return parser


def _layers(text: str) -> str | list[int]:
    """ "all", or numbers separated by commas."""
    try:
        return text if text == "all" else [int(number) for number in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is neither 'all' nor numbers as in 0,1,4") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the words after the program's name; by default the process's own.

    Returns:
        the exit status: 0, 2 after an error (one line on standard error tells it), 130 after Ctrl-C.
    """
    parser = build_parser()
    options = parser.parse_args(arguments)
    if options.version:
        from evabyte import __version__

        print(f"byte-llama {__version__}")
        return 0
    if options.command is None:
        parser.print_help()
        return 2

    from evabyte.cli.model import CommandError

    try:
        return importlib.import_module(f"byte_llama.cli.{options.command}").run(options)
    except CommandError as error:
        print(f"byte-llama {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED


__all__ = ["build_parser", "main"]
