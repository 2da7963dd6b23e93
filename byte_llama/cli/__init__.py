"""What the commands of `byte-llama` do, one module each; their options are in `evabyte_cli.byte_llama`."""

from evabyte_cli.byte_llama import build_parser, main

__all__ = ["build_parser", "main"]
