"""What the benchmarks share: provenance, timing side by side, and results kept as JSON."""

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers

import evabyte

HERE = Path(__file__).parent
HELDOUT = HERE / "heldout"
RESULTS = HERE / "results"

Name = TypeVar("Name")


def provenance(script: str, arguments: Sequence[str], device: torch.device) -> dict[str, Any]:
    """What is needed to run a benchmark again and to judge its numbers: machine, versions, commit, command, date."""
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:  # git is not installed
        commit = ""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": ["python", f"examples/benchmarks/{script}", *arguments],
        "git_commit": commit or "unknown",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu": cpu_model(),
        "cpu_cores": os.cpu_count(),
        "cpu_load_at_start": load,  # runnable processes over the last minute: other work disturbs timings
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
            "evabyte": evabyte.__version__,
            "cuda": torch.version.cuda if device.type == "cuda" else None,
        },
    }


def cpu_model() -> str:
    """The processor's name, as far as the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def interleave(
    alternatives: Mapping[Name, Callable[[int], Any]], repeats: int, device: torch.device
) -> dict[Name, list[float]]:
    """Time alternatives in turn, A B C A B C ..., so that whatever else the machine does hits all of them alike.

    Args:
        alternatives: by name, functions of the round's number 0, 1, ...; warm them up beforehand.
        repeats: number of rounds.

    Returns:
        seconds of every round; equal indices belong to the same round.
    """
    seconds: dict[Name, list[float]] = {name: [] for name in alternatives}
    for repeat in range(repeats):
        for name, run in alternatives.items():
            synchronize(device)
            began = time.perf_counter()
            run(repeat)
            synchronize(device)
            seconds[name].append(time.perf_counter() - began)
    return seconds


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given; on CPU it always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, mean, min and max, to four significant digits."""
    statistic = {"median": statistics.median, "mean": statistics.fmean, "min": min, "max": max}
    return {name: float(f"{function(values):.4g}") for name, function in statistic.items()}


def speedup(baseline: Sequence[float], seconds: Sequence[float]) -> dict[str, float]:
    """`spread` of baseline / seconds, round by round: above 1 where the baseline was slower."""
    return spread([slow / fast for slow, fast in zip(baseline, seconds, strict=True)])


def between(values: Mapping[str, float]) -> str:
    """What `spread` gives, as text."""
    return f"{values['median']:.2f} ({values['min']:.2f} to {values['max']:.2f})"


def finish(result: Mapping[str, Any], save: str | None) -> None:
    """Print the result as one JSON object, the last line of a benchmark; with `save`, keep it as results/SAVE.json."""
    if save is not None:
        RESULTS.mkdir(exist_ok=True)
        text = json.dumps(result, indent=1, default=str)  # str: paths and devices among the settings
        (RESULTS / f"{save}.json").write_text(text + "\n", encoding="utf-8")
    print(json.dumps(result, default=str), flush=True)
