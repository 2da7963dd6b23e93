"""The table of what works with what: docs/compatibility.md, written from tests that ran.

A test marked `compatibility(feature, model)` is the proof of one cell. It "works" if the test passes; with
`refused=MESSAGE` the test shows that the feature is refused with this message, with `impossible=REASON` that it cannot
be. Both releases of transformers are run, then the table is written:

    python3 run.py test -m compatibility --compatibility=docs/compatibility
    python3 run.py test -m compatibility --compatibility=docs/compatibility --transformers 5.17.0
    python3 run.py python tests/compatibility.py
"""

import json
import platform
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

import pytest

MARKER = (
    "compatibility(feature, model, refused=None, impossible=None): this test proves one cell of docs/compatibility.md"
)
MODELS = ("EvaByte", "byte Llama", "byte Gemma 2")
ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "compatibility"
PAGE = ROOT / "docs" / "compatibility.md"
HEAD = """# What works with what

Every cell is a test that ran: "works" is a test that passed, "refused" one that shows the message, "not possible" one
that shows why. The releases are those of transformers; "both" stands for the same outcome on each. Cells without
a test say nothing. Written by `tests/compatibility.py`, which has the commands; do not edit.
"""


class Recorder:
    """A pytest plugin that writes the outcome of every marked test to `<folder>/<transformers release>.json`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cells: list[dict[str, str]] = []

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item):
        outcome = yield
        marks = [list(cell_of(mark).items()) for mark in item.iter_markers("compatibility")]
        outcome.get_result().user_properties.extend(("compatibility", mark) for mark in marks)  # for xdist's controller

    def pytest_runtest_logreport(self, report):
        if report.passed and report.when != "call":
            return
        said = "works" if report.passed else "failed"
        if report.skipped:
            said = f"not run: {report.longrepr[2].removeprefix('Skipped: ')}"
        for name, cell in report.user_properties:
            if name == "compatibility":
                cell = dict(cell)
                expected = cell.pop("expected")
                self.cells.append({**cell, "outcome": expected if said == "works" else said, "test": report.nodeid})

    def pytest_sessionfinish(self, session):
        if hasattr(session.config, "workerinput"):
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        packages = {name: version(name) for name in ("transformers", "torch", "accelerate", "tokenizers")}
        record = {
            "versions": {**packages, "python": platform.python_version()},
            "cells": sorted(self.cells, key=lambda cell: (cell["feature"], cell["model"], cell["test"])),
        }
        text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
        (self.folder / f"{packages['transformers']}.json").write_text(text, encoding="utf-8")


def cell_of(mark: pytest.Mark) -> dict[str, str]:
    """What a marker says: feature, model, and the outcome that a passing test stands for."""

    def read(feature: str, model: str, refused: str | None = None, impossible: str | None = None) -> dict[str, str]:
        if model not in MODELS:
            raise pytest.UsageError(f"compatibility: the model must be one of {MODELS}, not {model!r}")
        expected = f"refused: {refused}" if refused else f"not possible: {impossible}" if impossible else "works"
        return {"feature": feature, "model": model, "expected": expected}

    return read(*mark.args, **mark.kwargs)


def render(records: list[dict]) -> str:
    """The page for the records of several releases."""
    outcomes: dict[str, dict[str, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
    releases = [record["versions"]["transformers"] for record in records]
    for release, record in zip(releases, records, strict=True):
        for cell in record["cells"]:
            here = outcomes[cell["feature"]][cell["model"]]
            if here.get(release) in (None, "works"):  # of several tests the one that does not work counts
                here[release] = cell["outcome"]
    lines = [HEAD, f"| feature | {' | '.join(MODELS)} |", "|---" * (len(MODELS) + 1) + "|"]
    for feature in sorted(outcomes, key=str.casefold):
        cells = [_in_words(outcomes[feature].get(model, {}), releases) for model in MODELS]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in (feature, *cells)) + " |")
    tests = sum(len(record["cells"]) for record in records)
    lines += ["", f"{tests} outcomes of tests, with:", ""]
    lines += ["- " + ", ".join(f"{name} {number}" for name, number in record["versions"].items()) for record in records]
    return "\n".join(lines) + "\n"


def _in_words(by_release: dict[str, str], releases: list[str]) -> str:
    if not by_release:
        return ""
    if len(set(by_release.values())) == 1 and len(by_release) == len(releases):
        return f"{next(iter(by_release.values()))} (both)"
    return "; ".join(f"{release}: {outcome}" for release, outcome in by_release.items())


def recorded() -> list[dict]:
    """The records in docs/compatibility, the oldest release first."""
    files = sorted(RESULTS.glob("*.json"), key=lambda file: [int(part) for part in file.stem.split(".")])
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


if __name__ == "__main__":
    PAGE.write_text(render(recorded()), encoding="utf-8")
    print(f"{PAGE.relative_to(ROOT)} written")
