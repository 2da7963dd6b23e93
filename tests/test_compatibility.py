"""docs/compatibility.md says what the recorded tests said, and every test that claims a cell is recorded."""

import subprocess
import sys

import pytest
from compatibility import PAGE, ROOT, cell_of, recorded, render


def test_the_page_is_what_was_recorded():
    assert PAGE.read_text(encoding="utf-8") == render(recorded())


def test_every_release_ran_without_a_failure():
    assert {record["versions"]["transformers"][:5] for record in recorded()} >= {"5.17."}
    assert not [cell for record in recorded() for cell in record["cells"] if cell["outcome"] == "failed"]


@pytest.mark.slow
def test_every_claim_is_recorded():
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-m", "compatibility", "tests"]
    listed = subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout
    claims = {line for line in listed.splitlines() if "::" in line}
    for record in recorded():
        assert claims <= {cell["test"] for cell in record["cells"]}


def test_cells_of_several_releases():
    def record(release, *outcomes):
        cells = [{"feature": f, "model": m, "outcome": o, "test": ""} for f, m, o in outcomes]
        return {"versions": {"transformers": release}, "cells": cells}

    page = render(
        [
            record("5.17.0", ("A", "EvaByte", "works"), ("B", "byte Llama", "works"), ("C", "byte Llama", "works")),
            record(
                "5.23.0",
                ("A", "EvaByte", "works"),
                ("B", "byte Llama", "refused: no"),
                ("C", "byte Llama", "works"),
                ("C", "byte Llama", "failed"),
            ),
        ]
    )
    assert "| A | works (both) |  |  |" in page
    assert "| B |  | 5.17.0: works; 5.23.0: refused: no |  |" in page
    assert "| C |  | 5.17.0: works; 5.23.0: failed |  |" in page


def test_what_a_mark_says():
    assert cell_of(pytest.mark.compatibility("A", "EvaByte").mark)["expected"] == "works"
    assert cell_of(pytest.mark.compatibility("A", "EvaByte", refused="no").mark)["expected"] == "refused: no"
    assert cell_of(pytest.mark.compatibility("A", "EvaByte", impossible="so").mark)["expected"] == "not possible: so"
    with pytest.raises(pytest.UsageError, match="EvaByte"):
        cell_of(pytest.mark.compatibility("A", "Llama").mark)
