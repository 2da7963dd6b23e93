"""`byte-llama convert`: subword checkpoint to byte-level checkpoint."""

import time
from argparse import Namespace
from pathlib import Path

from evabyte.cli.info import size
from evabyte.cli.model import LOADING_ERRORS, CommandError, first_line

from ..conversion import convert


def run(options: Namespace) -> int:
    """Convert, and say what was written."""
    began = time.perf_counter()
    arguments = {name: value for name, value in vars(options).items() if name not in ("command", "version")}
    try:
        convert(**arguments)
    except (*LOADING_ERRORS, TypeError, ImportError) as error:
        raise CommandError(first_line(error)) from error
    written = sum(path.stat().st_size for path in Path(options.output).iterdir() if path.is_file())
    print(f"{options.output}: {size(written)} in {time.perf_counter() - began:.0f} s; train it next, see its README.md")
    return 0
