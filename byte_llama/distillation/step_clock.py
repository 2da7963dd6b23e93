"""Where the time of training steps goes, without holding up a device to find out."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch


class StepClock:
    """Adds up the time of named parts. On a GPU events are recorded, and looked at only in `shares`.

    Args:
        device: where the parts run.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._since = time.perf_counter()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what runs inside as time of this part; parts must not overlap."""
        if self.on_gpu:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((name, begin, end))
        else:
            began = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - began

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, counted as this part."""

        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return run

    def pause(self, seconds: float) -> None:
        """Leave so much of the time since the last `shares` out."""
        self._since += seconds

    def shares(self) -> tuple[float, dict[str, float]]:
        """Seconds since the last call, and the share of each part in them, that of none of them as "other"."""
        if self._events:
            self._events[-1][2].synchronize()
        for name, begin, end in self._events:
            self._seconds[name] += begin.elapsed_time(end) / 1000
        now = time.perf_counter()
        elapsed = now - self._since
        shares = {name: seconds / elapsed for name, seconds in self._seconds.items()}
        shares["other"] = 1 - sum(shares.values())
        self._since = now
        self._seconds.clear()
        self._events.clear()
        return elapsed, shares


__all__ = ["StepClock"]
