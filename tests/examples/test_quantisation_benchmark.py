"""The quantisation benchmark runs, and its numbers are what they are called."""

import importlib
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "benchmarks"))


@pytest.mark.slow
def test_quantisation_benchmark():
    pytest.importorskip("torchao")
    benchmark = importlib.import_module("quantisation")
    result = benchmark.main(["--bytes", "1500", "--new-bytes", "12", "--repeats", "1"])
    plain, int8, int4 = result["results"].values()
    assert plain["changed_bytes"] == {"prose": 0.0, "code": 0.0}
    assert int8["megabytes"] < 0.5 * plain["megabytes"]
    for text, bits in plain["bits_per_byte"].items():
        assert abs(int8["bits_per_byte"][text] - bits) < 0.02
        assert int8["changed_bytes"][text] < int4["changed_bytes"][text] < 0.2
