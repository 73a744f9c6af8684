"""How each kind of case is measured: timed in a contest on a GPU, counted without one."""

from __future__ import annotations

from functools import singledispatch
from typing import Any

from fusednn.benchmark.cases import Case
from fusednn.benchmark.contest import run_contest
from fusednn.benchmark.counting import count_case
from fusednn.benchmark.protocol import Contest, Effort, Measured
from fusednn.benchmark.timing import DeviceTimer

from .networks import NetworkCase, count_network_case, run_network_contest
from .steps import StepCase, count_step_case, run_step_contest

__all__ = ["count", "hold"]


@singledispatch
def hold(case: Measured, timer: DeviceTimer, contestants: tuple[str, ...], effort: Effort) -> Contest:
    """Check the contestants of a case and time those that are right."""
    raise TypeError(f"{type(case).__name__} is not a case that can be timed")


@singledispatch
def count(case: Measured, *, checked: bool = True) -> list[dict[str, Any]]:
    """Bytes and launches of a case, ours and eager's; unless told otherwise, our results are checked first."""
    raise TypeError(f"{type(case).__name__} is not a case that can be counted")


hold.register(Case)(run_contest)
hold.register(StepCase)(run_step_contest)
hold.register(NetworkCase)(run_network_contest)
count.register(Case)(count_case)
count.register(StepCase)(count_step_case)
count.register(NetworkCase)(count_network_case)
