"""What importing costs, and what it leaves alone."""

import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What models and tokenizers need of transformers in any case.
TRANSFORMERS = """
import torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationMixin, PreTrainedModel, PreTrainedTokenizerFast
"""
OPTIONAL = ("triton", "PIL", "rich", "torchao", "peft", "lm_eval", "matplotlib", "datasets")


def run(code):
    """What code prints in a fresh interpreter that finds the packages."""
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_optional_packages_are_left_alone():
    """Those that transformers itself imports, where they are installed, are not counted."""
    loaded = f"import sys; print(*[name for name in {OPTIONAL} if name in sys.modules], sep='|')"
    already = set(run(f"{TRANSFORMERS}\nfrom transformers import AutoProcessor\n{loaded}").strip().split("|"))
    after = set(run(f"import evabyte, byte_llama\n{loaded}").strip().split("|"))
    assert after <= already | {""}


def test_help_imports_nothing_heavy():
    for module in ("evabyte", "byte_llama"):
        code = f"import sys; from evabyte_cli.{module} import build_parser; build_parser().format_help()"
        assert (
            run(f"{code}; print({{'torch', 'transformers', 'evabyte', 'byte_llama'}} & sys.modules.keys())")
            == "set()\n"
        )


@pytest.mark.slow
def test_import_takes_little_beyond_transformers():
    # Seconds of the processor, which other work on the machine leaves as they are; files are read before.
    clock = "time.process_time()"
    code = f"import time{TRANSFORMERS}began = {clock}\nimport evabyte\nprint({clock} - began)"
    assert statistics.median(float(run(code)) for _ in range(3)) < 0.3


@pytest.mark.slow
def test_help_is_quick():
    def seconds():
        began = time.perf_counter()
        run("from evabyte_cli.evabyte import build_parser; build_parser().format_help()")
        return time.perf_counter() - began

    assert statistics.median(seconds() for _ in range(5)) < 0.5
