"""The tests of transformers that fail on a model, each with the reason why they must."""

EXPECTED_FAILURES: dict[str, dict[str, str]] = {}
