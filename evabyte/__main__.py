"""`python -m evabyte`: the command line."""

from .cli import main

raise SystemExit(main())
