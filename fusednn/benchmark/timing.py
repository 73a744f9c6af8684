"""Device and host time of calls, on a GPU.

A call takes tens of microseconds, and Python needs about as long to enqueue it: events around a call on an idle device
would time Python.  So the device is first held up by a spinning kernel, while everything that is to be timed, events
included, is enqueued behind it.  Where the spinning ended too early the samples are thrown away, and the next try holds
longer.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, TypeVar

import torch

from .quantiles import median

__all__ = ["DEVICE", "DeviceTimer", "HostBoundError", "host_times", "interleave", "wall_times"]

DEVICE = torch.device("cuda")

cuda: Any = torch.cuda  # PyTorch leaves its events untyped

Calls = Sequence[Callable[[], Any]]
_Contestant = TypeVar("_Contestant")

_SHORTEST_HOLD, _LONGEST_HOLD = 500.0, 100_000.0  # microseconds


class HostBoundError(RuntimeError):
    """The host can't enqueue the calls in any reasonable time."""


class DeviceTimer:
    """Times calls on the current CUDA device with events."""

    def __init__(self) -> None:
        self._hold = _SHORTEST_HOLD  # follows what the contestants need
        self._enqueuing = 0.0  # microseconds that it took last
        self._cycles = self._cycles_per_microsecond()

    def sample(self, make_calls: Callable[[], Calls], group: int = 1) -> list[float]:
        """Device microseconds of each call, or the mean over each ``group`` of successive calls.

        ``make_calls`` prepares what isn't timed (the graphs of a backward pass), once for each try.
        """
        while True:
            samples = self._try(make_calls(), group)
            if samples:
                self._hold = max(_SHORTEST_HOLD, 0.9 * self._hold, 2 * self._enqueuing)
                return samples
            if self._hold >= _LONGEST_HOLD:
                raise HostBoundError(f"enqueuing takes longer than {_LONGEST_HOLD / 1000:.0f} ms")
            self._hold *= 2

    def _try(self, calls: Calls, group: int) -> list[float]:
        starts = range(0, len(calls), group)
        events = [cuda.Event(enable_timing=True) for _ in range(len(starts) + 1)]
        released = cuda.Event()
        results = []  # kept until the end: each call writes memory of its own, not its forerunner's, still in the cache
        cuda.synchronize()
        with _no_collection():
            self._spin(self._hold)
            started = time.perf_counter()
            released.record()
            events[0].record()
            for start, event in zip(starts, events[1:], strict=True):
                results += [call() for call in calls[start : start + group]]
                event.record()
            too_early = released.query()
            self._enqueuing = (time.perf_counter() - started) * 1e6
        cuda.synchronize()
        del results
        if too_early:
            return []
        sizes = [min(group, len(calls) - start) for start in starts]
        return [
            before.elapsed_time(after) * 1000 / n for (before, after), n in zip(pairwise(events), sizes, strict=True)
        ]

    def _spin(self, microseconds: float) -> None:
        cuda._sleep(int(microseconds * self._cycles))

    def _cycles_per_microsecond(self) -> float:
        cycles = 5_000_000
        times = []
        for _ in range(5):
            before, after = (cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            cuda._sleep(cycles)
            after.record()
            cuda.synchronize()
            times.append(before.elapsed_time(after) * 1000)
        return cycles / median(times)


def host_times(make_calls: Callable[[], Calls], synchronize: Callable[[], None]) -> list[float]:
    """Microseconds until the calls return, without waiting for the device: one sample, the mean over the calls."""
    return [_clocked(make_calls(), synchronize, lambda: None)]


def wall_times(make_calls: Callable[[], Calls], synchronize: Callable[[], None]) -> list[float]:
    """Microseconds until the device has done the calls, one after another: one sample, the mean over the calls."""
    return [_clocked(make_calls(), synchronize, synchronize)]


def _clocked(calls: Calls, synchronize: Callable[[], None], wait: Callable[[], None]) -> float:
    synchronize()
    with _no_collection():
        start = time.perf_counter()
        results = [call() for call in calls]
        wait()
        end = time.perf_counter()
    synchronize()
    del results
    return (end - start) * 1e6 / len(calls)


def interleave(
    contestants: Mapping[str, _Contestant], rounds: int, sample: Callable[[_Contestant], list[float]]
) -> dict[str, list[float]]:
    """Samples of each contestant, taken in turns, in a rotating order: drifts of clock and heat hit all alike."""
    names = list(contestants)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            samples[name] += sample(contestants[name])
    return samples


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python's garbage collector out of the timings."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
