# Shorthands for `python3 run.py`, which installs into .venv on first use.
PYTHON ?= python3
BENCH ?= $(wildcard examples/benchmarks/*.py)

.PHONY: install test test-slow test-gpu lint type format bench

install:
	$(PYTHON) run.py install

test:
	$(PYTHON) run.py test

test-slow:
	$(PYTHON) run.py test -m "slow and not gpu"

test-gpu:
	$(PYTHON) run.py test -m gpu

lint:
	$(PYTHON) run.py lint

type:
	$(PYTHON) run.py python -m mypy

format:
	$(PYTHON) run.py python -m ruff check --fix
	$(PYTHON) run.py python -m ruff format

bench:
	@set -e; for script in $(BENCH); do echo "== $$script"; $(PYTHON) run.py python $$script; done
