#!/usr/bin/env python3
"""Run transformers' own model tests on the models of this package.

python3 run.py python tests/upstream/run.py                      all models, on the installed transformers
python3 run.py python tests/upstream/run.py --only evabyte -k beam  one model; other arguments go to pytest
python3 run.py python tests/upstream/run.py --reference llama    the in-tree Llama, to compare with

Every failure must be listed with its reason in `expected_failures.py`, and nothing that is listed there may pass.
"""

import argparse
import json
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from expected_failures import EXPECTED_FAILURES
from sources import provenance, tests_of

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULTS = ROOT / "examples/benchmarks/results/upstream-tests.json"
MODELS = ("evabyte", "byte_llama", "byte_gemma2")
REFERENCES = ("llama", "gemma2")
RELEASE = version("transformers")


class Report:
    """Collects the outcome of every test, by model; a test fails when one of its subtests does."""

    def __init__(self) -> None:
        self.outcomes: dict[str, dict[str, str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        model, name = model_and_test(report.nodeid)
        outcomes = self.outcomes.setdefault(model, {})
        if outcomes.get(name) != "failed" and (report.when == "call" or report.outcome != "passed"):
            outcomes[name] = report.outcome

    def named(self, model: str, outcome: str) -> set[str]:
        return {name for name, seen in self.outcomes.get(model, {}).items() if seen == outcome}

    def unlisted(self, model: str) -> list[str]:
        """Tests that fail and should not."""
        return sorted(self.named(model, "failed") - EXPECTED_FAILURES.get(model, {}).keys())

    def outdated(self, model: str) -> list[str]:
        """Listed tests that pass; a release may lack or skip some of them."""
        return sorted(EXPECTED_FAILURES.get(model, {}).keys() & self.named(model, "passed"))

    def counts(self, model: str) -> dict[str, object]:
        listed = sorted(self.named(model, "failed") & EXPECTED_FAILURES.get(model, {}).keys())
        numbers = {outcome: len(self.named(model, outcome)) for outcome in ("passed", "skipped")}
        return {**numbers, "listed": listed, "failed": self.unlisted(model)}


def model_and_test(nodeid: str) -> tuple[str, str]:
    """`tests/upstream/evabyte_upstream.py::EvaByteModelTest::test_x` is the model `evabyte` and `test_x`."""
    path, *_, name = nodeid.split("::")
    return Path(path).stem.removesuffix("_upstream"), name


def keep(report: Report, models: list[str], source: str) -> None:
    """Write the counts of these models on this release into the results."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    release = results.setdefault(RELEASE, {})
    release["tests"] = source
    release["versions"] = {"python": platform.python_version(), "torch": version("torch")}
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

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sources = tests_of(RELEASE, arguments.checkout)
    sys.path[:0] = [str(sources), str(ROOT)]
    report = Report()
    files = [str(HERE / f"{model}_upstream.py") for model in models]
    # Their markers are none of ours, and all of their tests are wanted.
    options = ["--rootdir", str(ROOT), "-o", "addopts=", "-p", "no:cacheprovider", "-q", *pytest_arguments]
    if arguments.save and pytest_arguments:
        sys.exit("--save keeps the counts of a whole run only: leave out the arguments for pytest")
    status = pytest.main([*files, *options], plugins=[report])
    faults = [f"{model} fails {name}" for model in models for name in report.unlisted(model)]
    faults += [f"{model} passes the listed {name}" for model in models for name in report.outdated(model)]
    for model in models:
        counts = {kind: n if isinstance(n, int) else len(n) for kind, n in report.counts(model).items()}
        print(f"{model} on transformers {RELEASE}:", counts)
    print(*faults, sep="\n")
    complete = status in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
    if arguments.save and complete:
        keep(report, models, provenance(sources))
    return int(bool(faults) or not complete)


if __name__ == "__main__":
    sys.exit(main())
