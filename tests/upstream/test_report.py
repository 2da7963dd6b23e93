"""How the runner beside this file judges outcomes; the tests that it runs are not collected here."""

from types import SimpleNamespace

import run
from run import Report


def report_of(monkeypatch, listed, *outcomes):
    """A `Report` that has seen (name, phase, outcome) of a model `llama` with these listed failures."""
    monkeypatch.setattr(run, "EXPECTED_FAILURES", {"llama": dict.fromkeys(listed, "a reason")})
    report = Report()
    for name, when, outcome in outcomes:
        nodeid = f"tests/upstream/llama_upstream.py::LlamaModelTest::{name}"
        report.pytest_runtest_logreport(SimpleNamespace(nodeid=nodeid, when=when, outcome=outcome))
    return report


def test_a_failure_is_listed_or_a_fault(monkeypatch):
    seen = [("test_a", "call", "failed"), ("test_b", "call", "failed"), ("test_c", "call", "passed")]
    report = report_of(monkeypatch, ["test_a"], *seen, ("test_d", "setup", "skipped"))
    assert report.unlisted("llama") == ["test_b"] and report.outdated("llama") == []
    assert report.counts("llama") == {"passed": 1, "skipped": 1, "listed": ["test_a"], "failed": ["test_b"]}


def test_what_is_listed_must_not_pass(monkeypatch):
    seen = [("test_a", "call", "passed"), ("test_b", "call", "skipped"), ("test_c", "call", "failed")]
    report = report_of(monkeypatch, ["test_a", "test_b", "test_c", "test_of_another_release"], *seen)
    assert report.outdated("llama") == ["test_a"]


def test_one_failed_subtest_is_enough(monkeypatch):
    subtest_then_test = [("test_a", "call", "failed"), ("test_a", "call", "passed"), ("test_a", "teardown", "passed")]
    assert report_of(monkeypatch, [], *subtest_then_test).unlisted("llama") == ["test_a"]
    assert report_of(monkeypatch, [], ("test_b", "teardown", "failed")).unlisted("llama") == ["test_b"]
