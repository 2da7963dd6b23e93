"""What the commands of `evabyte` do, one module each; their options are in `evabyte_cli.evabyte`."""

from evabyte_cli.evabyte import build_parser, main

__all__ = ["build_parser", "main"]
