"""The command `evabyte`: `generate`, `chat`, `info`, `demo`, `merge`, `export`, `bpb`, `eval` and `serve`.

This file knows the options; what a command does is in the module `evabyte.cli.<command>`, imported when it runs.
"""

import importlib
import io
import os
import sys
from collections.abc import Sequence
from typing import Any

from .parsing import INTERRUPTED, PIPE_CLOSED, OneLineParser, any_seed, positive, probability, temperature, whole


def _model_options(dtype: str = "auto", name: bool = True) -> OneLineParser:
    options = OneLineParser(add_help=False)
    if name:
        options.add_argument("--model", metavar="MODEL", help="model folder or Hub id (default: the bundled model)")
    options.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    options.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default=dtype,
        help="number format to compute in; auto is bfloat16 on CUDA and float32 elsewhere (default: %(default)s)",
    )
    return options


def _draft_options() -> OneLineParser:
    options = OneLineParser(add_help=False)
    options.add_argument(
        "--draft",
        choices=["dynamic", "chain", "tree31", "tree95", "lookup", "dynamic+lookup"],
        default="dynamic",
        help="what is tried ahead of each forward; changes the speed only (default: %(default)s)",
    )
    return options


def _sampling_options(max_new_tokens: int) -> OneLineParser:
    options = OneLineParser(add_help=False)
    options.add_argument(
        "-n",
        "--max-new-tokens",
        metavar="BYTES",
        type=positive,
        default=max_new_tokens,
        help="bytes to write at most (default: %(default)s)",
    )
    options.add_argument(
        "--temperature",
        metavar="T",
        type=temperature,
        default=0.7,
        help="0 takes the most probable byte each time, which small models repeat themselves with (default: 0.7)",
    )
    options.add_argument(
        "--top-p", metavar="P", type=probability, help="sample from the most probable bytes, up to probability P"
    )
    options.add_argument("--top-k", metavar="K", type=positive, help="sample from the K most probable bytes")
    options.add_argument("--seed", metavar="N", type=any_seed, help="the same number samples the same text")
    options.add_argument("--stop", metavar="TEXT", action="append", help="end after this text; may be given repeatedly")
    options.add_argument(
        "--byte-by-byte", action="store_true", help="one byte per forward, as `generate` does, for comparison"
    )
    return options


def build_parser() -> OneLineParser:
    """The parser of the whole command line; parsing gives a namespace with `command` and that command's options."""
    parser = OneLineParser(prog="evabyte", description="Byte-level language models with multibyte decoding.")
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    generate = commands.add_parser(
        "generate",
        parents=[_model_options(), _draft_options(), _sampling_options(max_new_tokens=256)],
        help="continue a text",
        description="Continue a text. Only the continuation goes to standard output, without a newline of its own when "
        "that is not a terminal. On a terminal the colour changes with each forward of the model.",
    )
    generate.add_argument(
        "--trace", action="store_true", help="afterwards, what each forward drafted and brought, on standard error"
    )
    generate.add_argument(
        "prompt", nargs="?", help="the text; by default, or for -, standard input as it is, newline at the end included"
    )
    chat = commands.add_parser(
        "chat",
        parents=[_model_options(), _draft_options(), _sampling_options(max_new_tokens=1024)],
        help="talk with a chat model",
        description="Talk with a chat model. /reset starts anew, /exit or Ctrl-D ends, Ctrl-C stops an answer. When "
        "standard input is not a terminal, each of its lines is a turn.",
    )
    chat.add_argument("--system", metavar="TEXT", help="system message")
    info = commands.add_parser(
        "info",
        help="describe a model without loading it",
        description="Describe a model from its configuration and the headers of its weight files.",
    )
    info.add_argument("model", nargs="?", metavar="MODEL", help="model folder or Hub id (default: the bundled model)")
    info.add_argument(
        "--context",
        metavar="BYTES",
        type=positive,
        action="append",
        help="text length to give the size of the cache at; may be given repeatedly (default: 2048, 8192, 32768)",
    )
    demo = commands.add_parser(
        "demo",
        parents=[_model_options(dtype="float32"), _draft_options()],
        help="the same text byte by byte and by multibyte decoding",
        description="Write the same text byte by byte and by multibyte decoding, and compare.",
    )
    demo.add_argument("prompt", nargs="?", help="the text to continue")
    demo.add_argument(
        "-n",
        "--max-new-tokens",
        metavar="BYTES",
        type=positive,
        default=240,
        help="bytes to write at most (default: %(default)s)",
    )
    export = commands.add_parser(
        "export",
        help="a published folder with today's code in it",
        description="Write a folder with the weights of a published one, and code, configuration and tokenizer that "
        "transformers 5 loads. Weight files are hard links where the file system can.",
    )
    export.add_argument("model", metavar="SOURCE", help="model folder or Hub id")
    export.add_argument("output", metavar="OUT", help="folder to write, empty or not there")
    export.add_argument("--copy", action="store_true", help="copy the weight files")
    export.add_argument("--revision", metavar="NAME", help="branch, tag or commit on the Hub")
    merge = commands.add_parser(
        "merge",
        help="average checkpoints of one architecture",
        description="Write the weighted average of checkpoints (a model soup), in little memory. Configuration, "
        "tokenizer, code and card are those of the first.",
    )
    merge.add_argument("models", nargs="+", metavar="MODEL", help="model folders, at least two")
    merge.add_argument("--output", required=True, metavar="DIR", help="folder to write, empty or not there")
    merge.add_argument(
        "--weights", nargs="+", type=float, metavar="W", help="one per model, summing to 1 (default: all the same)"
    )
    merge.add_argument("--normalize", action="store_true", help="divide the weights by their sum")
    _add_evaluation(commands)
    serve = commands.add_parser(
        "serve",
        usage="evabyte serve [MODEL] [--byte-by-byte] [OPTION ...]",
        help="a server with OpenAI's interface",
        description="Run `transformers serve` for one of our models: a folder or Hub id, named first (default: the "
        "bundled model). All other options are those of `transformers serve`, such as --port.",
        allow_abbrev=False,
    )
    serve.add_argument("--byte-by-byte", action="store_true", help="one byte per forward, not multibyte decoding")
    return parser


def _add_evaluation(commands: Any) -> None:
    """Commands that take any causal language model, byte-level or subword."""
    options = _model_options(name=False)
    options.add_argument("model", metavar="MODEL", help="model folder or Hub id, byte-level or subword")
    options.add_argument(
        "--trust-remote-code", action="store_true", help="run the code that comes with a model of another architecture"
    )
    options.add_argument(
        "--batch-size", metavar="N", type=positive, default=1, help="texts in one forward (default: %(default)s)"
    )
    options.add_argument("--json", action="store_true", help="print one JSON object instead")
    bpb = commands.add_parser(
        "bpb",
        parents=[options],
        help="bits per byte on text files",
        description="Bits that a model needs per byte of text files, each read by itself; comparable between models "
        "whatever their tokenizers.",
    )
    bpb.add_argument("files", nargs="+", metavar="FILE", help="a text; UTF-8 unless the model is byte-level")
    bpb.add_argument(
        "--context",
        metavar="IDS",
        type=positive,
        help="ids that the model reads at once (default: what it is made for, at most 4096)",
    )
    bpb.add_argument(
        "--stride",
        metavar="IDS",
        type=positive,
        help="ids from one window of text to the next, each scored once (default: half of --context)",
    )

    evaluation = commands.add_parser(
        "eval",
        parents=[options],
        help="scores on tasks of lm-evaluation-harness",
        description="Scores on tasks of lm-evaluation-harness, as a table for a model card. Lengths and spaces are as "
        "bytes need them.",
    )
    evaluation.add_argument(
        "--tasks",
        nargs="+",
        metavar="TASK",
        default=["card"],
        help="tasks or groups of the harness; card: mmlu boolq piqa ifeval arc_challenge (default: %(default)s)",
    )
    evaluation.add_argument(
        "--include-path", action="append", default=[], metavar="DIR", help="a folder with task files of your own"
    )
    evaluation.add_argument("--limit", metavar="N", type=positive, help="examples of each task, for a try")
    evaluation.add_argument(
        "--num-fewshot", metavar="N", type=whole, help="answered examples before each question (default: the task's)"
    )
    evaluation.add_argument("--chat", action="store_true", help="put the questions into the model's chat format")
    evaluation.add_argument(
        "--byte-by-byte", action="store_true", help="generate one byte per forward, for comparison of the time"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the words after the program's name; by default the process's own.

    Returns:
        the exit status: 0, 2 after an error (one line on standard error tells it), 130 after Ctrl-C, 141 when the
        reader of the output has gone.
    """
    parser = build_parser()
    options, others = parser.parse_known_args(arguments)
    if others and options.command != "serve":
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    options.others = others
    if options.version:
        from evabyte import __version__

        print(f"evabyte {__version__}")
        return 0
    if options.command is None:
        parser.print_help()
        return 2
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows a substitute

    from evabyte.cli.model import CommandError

    try:
        status = importlib.import_module(f"evabyte.cli.{options.command}").run(options)
        sys.stdout.flush()
    except CommandError as error:
        print(f"evabyte {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes at exit
        return PIPE_CLOSED
    return status


__all__ = ["build_parser", "main"]
