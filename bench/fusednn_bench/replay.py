"""Hands device times to pytest-benchmark, which times with a clock: this clock shows the device's time.

pytest-benchmark runs a function between two readings of its clock.  The function here only moves the clock forward, by
the next sample; so its tables, ``--benchmark-json`` and ``--benchmark-compare`` work with the samples as measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from fusednn.benchmark.cases import Case
from fusednn.benchmark.protocol import DIRECTIONS, Direction

__all__ = ["device_clock", "replay", "test_device_time"]

_now = 0.0


def device_clock() -> float:
    """Seconds that the replayed samples add up to."""
    return _now


def replay(benchmark: Any, samples_us: Sequence[float]) -> None:
    """Give ``samples_us`` to a ``benchmark`` fixture whose timer is `device_clock`, a round each."""
    remaining = iter(samples_us)

    def advance() -> None:
        global _now
        _now += next(remaining, 0.0) / 1e6

    benchmark.pedantic(advance, rounds=len(samples_us))


@pytest.mark.benchmark(timer=device_clock)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_device_time(
    case: Case, direction: Direction, contestant: str, device_samples: dict[str, list[float]], benchmark: Any
) -> None:
    """The test that every family of operations has."""
    benchmark.group = f"{case.id} {direction}"
    benchmark.extra_info["budget_bytes"] = case.budget(direction)
    replay(benchmark, device_samples[direction])
