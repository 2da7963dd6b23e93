"""`python -m byte_llama`: the command line."""

from .cli import main

raise SystemExit(main())
