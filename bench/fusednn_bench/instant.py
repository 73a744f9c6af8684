"""One run of a case for its side effects: kernels that are compiled, launches that a profiler sees."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fusednn.benchmark.protocol import CaseRecord, Effort, Measured
from fusednn.benchmark.timing import Calls, DeviceTimer

from .measure import count, hold
from .where import TIMED

__all__ = ["run_once"]


class _NoTimer(DeviceTimer):
    """Makes the calls of a contest, and measures nothing."""

    def __init__(self) -> None:
        pass

    def sample(self, make_calls: Callable[[], Calls], group: int = 1) -> list[float]:
        for call in make_calls()[:1]:
            call()
        torch.cuda.synchronize()
        return [1.0]


def run_once(case: Measured, contestants: tuple[str, ...]) -> list[CaseRecord]:
    """Check the contestants, and call each of them in every direction; counts without a GPU."""
    if not TIMED:
        return count(case)
    return hold(case, _NoTimer(), contestants, Effort(0, 1, 1, 1)).records
