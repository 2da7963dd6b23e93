"""`evabyte export`: a published folder with its first code, made into one that brings today's."""

import importlib
import time
from argparse import Namespace
from pathlib import Path

from ..exporting import export_folder
from .info import size
from .model import LOADING_ERRORS, CommandError, find_model, first_line


def run(options: Namespace) -> int:
    """Export, and say what was written."""
    importlib.import_module("byte_llama")  # makes byte-level Llama and Gemma 2 known, which the command is for, too
    began = time.perf_counter()
    try:
        output = export_folder(find_model(options.model), options.output, copy=options.copy, revision=options.revision)
    except LOADING_ERRORS as error:
        raise CommandError(first_line(error)) from error
    written = sum(path.stat().st_size for path in Path(output).glob("*.safetensors"))
    print(f"{output}: {size(written)} of weights in {time.perf_counter() - began:.0f} s")
    return 0
