"""The attention benchmark counts what it divides by rightly, runs, and times nothing that is wrong."""

import importlib
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evabyte import eva_attention
from evabyte.eva_math import summarize_chunks

BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load(name: str) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        return importlib.import_module(name)


attention, peers = load("attention"), load("attention_peers")


def case(length=64, window=16, chunk=4, batch=2, heads=2, head_dim=16, dtype=torch.float32, device="cpu"):
    return peers.Case(batch, heads, length, head_dim, window, chunk, dtype, torch.device(device))


def brute_force_mask(length: int, window: int, chunk: int) -> torch.Tensor:
    """bool [N, S + N]: which summaries and keys each position sees, pair by pair; S summaries of closed windows."""
    summaries = (length - 1) // window * (window // chunk)
    visible = torch.zeros(length, summaries + length, dtype=torch.bool)
    for i in range(length):
        for s in range(summaries):
            visible[i, s] = (s * chunk) // window < i // window
        for j in range(length):
            visible[i, summaries + j] = j <= i and j // window == i // window
    return visible


lengths_and_windows = given(length=st.integers(1, 70), chunk=st.integers(1, 5), chunks_per_window=st.integers(1, 5))


@lengths_and_windows
def test_visible_pairs_and_what_they_cost(length, chunk, chunks_per_window):
    sizes = case(length, chunk * chunks_per_window, chunk, batch=3, heads=5, head_dim=8)
    visible = brute_force_mask(length, sizes.window, chunk)
    assert sizes.visible_pairs == visible.sum()
    assert sizes.useful_flops == visible.sum() * 3 * 5 * (2 * 8 + 2 * 8)
    assert sizes.decode_columns == visible[-1].sum()


@lengths_and_windows
def test_flex_attention_sees_what_eva_attention_sees(length, chunk, chunks_per_window):
    sizes = case(length, chunk * chunks_per_window, chunk)
    summaries = sizes.closed // chunk
    visible = peers.eva_mask_mod(sizes, summaries)
    place = torch.arange(length)[:, None], torch.arange(summaries + length)[None]
    assert torch.equal(visible(None, None, *place), brute_force_mask(length, sizes.window, chunk))


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_attention_over_summaries_is_eva_attention():
    sizes = case(length=150, window=32, chunk=8)
    query, key, value, mu, phi = (tensor.detach() for tensor in sizes.tensors()[0])
    summaries = summarize_chunks(key[:, :, : sizes.closed], value[:, :, : sizes.closed], mu, phi, sizes.chunk)
    keys, values = (torch.cat(pair, dim=2) for pair in zip(summaries, (key, value), strict=True))
    output = peers.flex_windowed(sizes)(query, keys, values)
    torch.testing.assert_close(output, peers.eva_operator(sizes, "naive")(query, key, value, mu, phi))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_the_tensors(dtype):
    sizes = case(length=83, dtype=dtype)
    (_, key, value, mu, phi), _ = sizes.tensors()
    closed = key[:, :, : sizes.closed], value[:, :, : sizes.closed]
    summaries = summarize_chunks(*closed, mu, phi, sizes.chunk)
    assert sizes.summary_bytes == sum(tensor.nbytes for tensor in (*closed, *summaries))

    pytest.importorskip("triton")
    step, inputs = attention.decode_step(replace(sizes, dtype=torch.float16, device=DEVICE), layers=3)
    moved = sum(tensor.nbytes for tensor in (*inputs, *step()))
    assert 3 * replace(sizes, dtype=torch.float16).decode_bytes == moved


def test_full_attention_is_eva_attention_in_one_window():
    full = peers.as_full_attention(case(length=40, window=20))
    run = peers.full_attention(torch.nn.attention.SDPBackend.MATH, full)
    assert peers.require_exact("full attention", run, full, peers.exact_results(full)).keys() == {
        "output", "query", "key", "value",
    }  # fmt: skip


def test_exact_results_do_not_depend_on_the_heads_being_computed_apart():
    sizes = case(length=40)
    inputs, upstream = sizes.tensors()
    leaves = [tensor.detach().double().requires_grad_() for tensor in inputs]
    output = eva_attention(*leaves, window_size=sizes.window, chunk_size=sizes.chunk, backend="naive")
    gradients = torch.autograd.grad(output, leaves, upstream.double())
    exact = peers.exact_results(sizes)
    for name, expected in zip(("output", *peers.INPUTS), (output, *gradients), strict=True):
        torch.testing.assert_close(exact[name], expected)


def test_shares_and_aims():
    share = peers.bandwidth_share(moved=50, seconds=[1.0, 2.0], copied=100, copy_seconds=[1.0, 1.0])
    assert (share["max"], share["min"]) == (50.0, 25.0)
    assert peers.row("x", case(), {"median": 2.5}, "<= 2.5")["met"] is True
    assert peers.row("x", case(), {"median": 1.9}, ">= 2")["met"] is False
    assert "met" not in peers.row("x", case(), {"median": 1.9})


TINY = "--device cpu --lengths 64 96 --window 32 --chunk 4 --heads 2 --head-dim 8 --repeats 2 --naive-up-to 64".split()


def test_cpu_rows_and_provenance(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("measure.RESULTS", tmp_path)
    attention.main([*TINY, "--parts", "time", "--save", "tiny"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.loads((tmp_path / "tiny.json").read_text()) == result
    assert result["provenance"]["command"][2:] == [*TINY, "--parts", "time", "--save", "tiny"]
    assert result["checks"]["sdpa, window 32"].keys() == {"output", *peers.INPUTS}
    assert result["skipped"].keys() == {"published", "naive, length 96"}
    assert [row["length"] for row in result["rows"]] == [64, 64]
    for row in result["rows"]:
        median = {name: times["median"] for name, times in row["milliseconds"].items()}
        assert row["value"]["min"] <= row["value"]["median"] <= row["value"]["max"]
        assert row["value"]["min"] * 0.5 < median["naive"] / median["sdpa"] < row["value"]["max"] * 2


needs_proc = pytest.mark.skipif(not attention.CLEAR_REFS.exists(), reason="peak memory is read from Linux's /proc")


@needs_proc
def test_peak_memory_of_a_fresh_process(monkeypatch):
    """The specification holds logits over [keys, summaries], N x 2N for each head: a few of them at once."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    sizes = case(length=1024, window=32, batch=1, heads=2)
    logits = 2 * 1024 * 2048 * 4
    assert 2 * logits < attention.in_fresh_process(attention.peak_bytes, sizes, "naive", "forward", None) < 10 * logits


STAND_IN = """
import torch

class EvaCache: ...

class EvaAttention(torch.nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.q_proj = self.k_proj = self.v_proj = self.o_proj = None

    def forward(self, states, **how):
        {forward}
"""


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        ("return (self.q_proj(states),)", "WrongResult: published is wrong in output"),
        ("raise TypeError('not on this release')", "TypeError: not on this release"),
    ],
)
def test_published_code_that_fails_costs_only_its_rows(forward, reason, tmp_path, capsys):
    for name in peers.PUBLISHED_FILES:
        (tmp_path / name).write_text(STAND_IN.format(forward=forward))
    attention.main([*TINY, "--parts", "time", "--published", str(tmp_path)])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["skipped"]["published, window 32"].startswith(reason)
    assert result["provenance"]["command"][-2:] == ["--published", "FOLDER"]
    assert str(tmp_path) not in json.dumps(result)
    assert [row["measure"] for row in result["rows"]] == [
        "forward: naive / sdpa, time",
        "forward and backward: naive / sdpa, time",
    ]


def test_nothing_is_measured_when_ours_is_wrong(monkeypatch, capsys):
    monkeypatch.setattr(attention, "eva_operator", lambda sizes, backend: lambda query, *others: query * 1.001)
    with pytest.raises(SystemExit, match="No speed is measured: sdpa is wrong in output"):
        attention.main(TINY)
    assert "time" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths", "100"], "must divide every --window"),
        (["--chunk", "5"], "must divide every --window"),
        (["--published", "nowhere"], "lacks eva_pt_ref.py"),
    ],
)
def test_arguments_that_do_not_fit(arguments, message, capsys):
    with pytest.raises(SystemExit):
        attention.main([*TINY, *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_kernel_rows():
    """All that runs on a GPU, in Triton's interpreter where there is none."""
    pytest.importorskip("triton")
    arguments = "--lengths 64 --window 32 --chunk 4 --repeats 1 --context 60 --decode-batch 1 2 --copy-mib 0.02"
    options = attention.parse_arguments(arguments.split())
    checks, skipped = {}, {}
    sizes = case(window=32, batch=1, dtype=torch.float16, device=DEVICE)
    rows = list(attention.measure_kernels(sizes, options, checks, skipped))
    assert {"eva_triton, window 32", "FlashAttention, window 32"} <= checks.keys()
    assert all(row["value"]["min"] > 0 or row["measure"] == "forward: useful TFLOP/s" for row in rows)
    measured = {row["measure"] for row in rows}
    assert {
        "gradient error: ours / FlashAttention, worst",
        "forward: useful TFLOP/s",
        "backward / forward, time",
        "forward: FlashAttention / ours, time",
        "summaries: % of copy bandwidth",
        "decoding step: % of copy bandwidth",
    } <= measured
    if DEVICE.type == "cpu":
        assert skipped.keys() == {"cuDNN attention, window 32", "FlexAttention, length 64, window 32"}


@needs_proc
@pytest.mark.slow
def test_memory_rows(monkeypatch, capsys):
    monkeypatch.syspath_prepend(BENCHMARKS)
    attention.main([*TINY, "--parts", "memory"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(result["rows"]) == 2
    assert all(mib > 0 for row in result["rows"] for mib in row["peak_mib"].values())
