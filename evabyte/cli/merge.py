"""`evabyte merge`: average checkpoints."""

import time
from argparse import Namespace
from pathlib import Path

from ..merging import merge_checkpoints
from .info import size
from .model import LOADING_ERRORS, CommandError, first_line


def run(options: Namespace) -> int:
    """Merge, and say what was written."""
    began = time.perf_counter()
    try:
        merge_checkpoints(options.models, options.output, options.weights, normalize=options.normalize)
    except LOADING_ERRORS as error:
        raise CommandError(first_line(error)) from error
    written = sum(path.stat().st_size for path in Path(options.output).glob("*.safetensors"))
    print(f"{options.output}: {size(written)} in {time.perf_counter() - began:.0f} s")
    return 0
