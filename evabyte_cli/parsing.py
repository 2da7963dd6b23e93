"""What the commands share: arguments refused in one line, numbers within bounds, exit statuses."""

import argparse
from collections.abc import Callable
from typing import NoReturn

INTERRUPTED = 130  # as a shell reports a program ended by Ctrl-C
PIPE_CLOSED = 141  # as a shell reports a program whose reader has gone


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _number(kind: type, condition: Callable[[float], bool], meaning: str) -> Callable[[str], float]:
    """An argparse type: a `kind` for which `condition` holds; `meaning` says so in words."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not condition(value):
            raise argparse.ArgumentTypeError(f"must be {meaning}, not {text!r}")
        return value

    return parse


positive = _number(int, lambda value: value >= 1, "a whole number, at least 1")
whole = _number(int, lambda value: value >= 0, "a whole number, at least 0")
any_seed = _number(int, lambda value: 0 <= value < 2**63, "a whole number, at least 0")
temperature = _number(float, lambda value: 0 <= value < float("inf"), "a number, at least 0")
probability = _number(float, lambda value: 0 < value <= 1, "a number above 0, at most 1")


__all__ = ["INTERRUPTED", "PIPE_CLOSED", "OneLineParser", "any_seed", "positive", "probability", "temperature", "whole"]
