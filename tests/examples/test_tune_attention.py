"""The tuning script, in Triton's interpreter with two candidates a kernel."""

import importlib
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from evabyte import eva_triton
from evabyte.eva_tuning import tuning

if not eva_triton.INTERPRETED:
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"


@pytest.fixture
def tune_attention(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("tune_attention")


SMALL = "--device cpu --dtype float32 --head-dims 16 --heads 1 --length 40 --window 16 --chunk 4 --repeats 1"


def test_every_kernel_gets_a_row(tune_attention, capsys):
    sizes = "--rows 16 64 --columns 16 --warps 4 --stages 1"
    tune_attention.main([*SMALL.split(), *sizes.split()])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["kernel"] for row in result["rows"]] == ["forward", "query_grad", "key_grad", "decode"]
    assert [row["candidates"] for row in result["rows"]] == [2, 2, 2, 1]
    assert eva_triton.tuning is tuning  # the entries tried are not left behind


def test_a_candidate_that_differs_is_left_out(tune_attention):
    wrong = torch.ones(4)
    entry = tuning("sm_80", 4, 16)
    assert tune_attention.agrees(entry, lambda: [wrong], [wrong])
    assert not tune_attention.agrees(entry, lambda: [wrong + 0.1], [wrong])

    def refuse():
        raise RuntimeError("out of shared memory")

    assert not tune_attention.agrees(entry, refuse, [wrong])
