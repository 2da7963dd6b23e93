#!/usr/bin/env python3
"""Run transformers' own model tests on the models of this package.

python3 run.py python tests/upstream/run.py                      all models, on the installed transformers
python3 run.py python tests/upstream/run.py --only evabyte -k beam  one model; other arguments go to pytest
python3 run.py python tests/upstream/run.py --reference llama    the in-tree Llama, to compare with

Every failure must be listed with its reason in `expected_failures.py`, and whatever is listed there must fail.
"""

import argparse
import json
import os
import platform
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULTS = ROOT / "examples/benchmarks/results/upstream-tests.json"
MODELS = ("evabyte", "byte_llama", "byte_gemma2")
REFERENCES = ("llama", "gemma2")

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path[:0] = [str(HERE), str(ROOT)]

import pytest
import torch
import transformers
from expected_failures import EXPECTED_FAILURES
from sources import provenance, tests_of


class Report:
    """Marks the listed tests as failing ones and counts the outcomes, by model."""

    def __init__(self) -> None:
        self.outcomes: dict[str, dict[str, str]] = {}
        self.collected: set[tuple[str, str]] = set()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            model, name = model_and_test(item.nodeid)
            self.collected.add((model, name))
            reason = EXPECTED_FAILURES.get(model, {}).get(name)
            if reason:
                item.add_marker(pytest.mark.xfail(reason=reason, strict=True))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        model, name = model_and_test(report.nodeid)
        outcome = "listed" if report.skipped and hasattr(report, "wasxfail") else report.outcome
        if report.when == "call" or outcome != "passed":
            self.outcomes.setdefault(model, {})[name] = outcome

    def unknown(self, models: list[str]) -> list[str]:
        """Listed tests that the suite does not have."""
        return [
            f"{model}: {name}"
            for model in models
            for name in EXPECTED_FAILURES.get(model, {})
            if (model, name) not in self.collected
        ]

    def counts(self, model: str) -> dict[str, object]:
        outcomes = self.outcomes.get(model, {})
        names = {kind: sorted(n for n, o in outcomes.items() if o == kind) for kind in ("failed", "listed")}
        numbers = {kind: list(outcomes.values()).count(kind) for kind in ("passed", "skipped")}
        return {**numbers, **names}


def model_and_test(nodeid: str) -> tuple[str, str]:
    """`tests/upstream/evabyte_upstream.py::EvaByteModelTest::test_x` is the model `evabyte` and `test_x`."""
    path, *_, name = nodeid.split("::")
    return Path(path).stem.removesuffix("_upstream"), name


def keep(report: Report, models: list[str], source: str) -> None:
    """Write the counts of these models on this release into the results."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    release = results.setdefault(transformers.__version__, {})
    release["tests"] = source
    release["versions"] = {"python": platform.python_version(), "torch": str(torch.__version__)}
    release.setdefault("models", {}).update({model: report.counts(model) for model in models})
    RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("--only", choices=MODELS, help="run one model (default: all three)")
    parser.add_argument("--reference", choices=REFERENCES, help="run an in-tree model instead")
    parser.add_argument("--checkout", type=Path, help="a clone of transformers, where GitHub cannot be reached")
    parser.add_argument("--save", action="store_true", help=f"keep the counts in {RESULTS.relative_to(ROOT)}")
    arguments, pytest_arguments = parser.parse_known_args()
    chosen = arguments.reference or arguments.only
    models = [chosen] if chosen else list(MODELS)

    sources = tests_of(transformers.__version__, arguments.checkout)
    sys.path.insert(0, str(sources))
    report = Report()
    files = [str(HERE / f"{model}_upstream.py") for model in models]
    # Their markers are none of ours, and all of their tests are wanted.
    options = ["--rootdir", str(ROOT), "-o", "addopts=", "-p", "no:cacheprovider", "-q", *pytest_arguments]
    status = int(pytest.main([*files, *options], plugins=[report]))
    for model in models:
        counts = {kind: n if isinstance(n, int) else len(n) for kind, n in report.counts(model).items()}
        print(f"{model} on transformers {transformers.__version__}:", counts)
    narrowed = bool(pytest_arguments)
    unknown = [] if narrowed else report.unknown(models)
    if unknown:
        print("listed in expected_failures.py but not in the suite:", *unknown, sep="\n  ")
    if arguments.save and narrowed:
        sys.exit("--save keeps the counts of a whole run only: leave out the arguments for pytest")
    if arguments.save:
        keep(report, models, provenance(sources))
    return status or int(bool(unknown))


if __name__ == "__main__":
    sys.exit(main())
