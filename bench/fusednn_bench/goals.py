"""Goals as data (``bench/goals.json``), and which of them a result meets."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .quantiles import median
from .tables import by_contestant, copy_rate

__all__ = ["GOALS_FILE", "Goal", "Verdict", "judge", "load_goals"]

GOALS_FILE = Path(__file__).resolve().parents[1] / "goals.json"

_Records = Mapping[str, Mapping[str, Any]]

MEASURES = ("speedup", "percent_of_copy", "host_slowdown")


@dataclass(frozen=True)
class Goal:
    """A bound on one measure of fusednn, over operations (``*``: all), a direction, sizes, and dtypes (none: all).

    ``speedup``: device time of ``against`` over ours; ``percent_of_copy``: the budget's rate, in percent of the device
    copy's; ``host_slowdown``: our host time over that of ``against``.
    """

    name: str
    operations: tuple[str, ...]
    direction: str
    sizes: tuple[str, ...]
    measure: str
    against: str | None = None
    at_least: float | None = None
    at_most: float | None = None
    dtypes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.measure not in MEASURES:
            raise ValueError(f"{self.name}: unknown measure {self.measure}")
        if (self.against is None) != (self.measure == "percent_of_copy"):
            raise ValueError(f"{self.name}: {self.measure} with against={self.against}")
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError(f"{self.name}: one of at_least and at_most")

    def covers(self, operation: str, dtype: str, size: str | None, direction: str) -> bool:
        named = operation in self.operations or "*" in self.operations
        return named and size in self.sizes and direction == self.direction and dtype in (self.dtypes or (dtype,))

    def met(self, value: float) -> bool:
        if self.at_least is not None:
            return value >= self.at_least
        return self.at_most is not None and value <= self.at_most

    @property
    def wanted(self) -> str:
        return f">= {self.at_least:g}" if self.at_least is not None else f"<= {self.at_most:g}"


@dataclass(frozen=True)
class Verdict:
    """One goal on one case.  ``value`` is None, and the goal open, where a contestant has no timing."""

    goal: Goal
    operation: str
    dtype: str
    size: str
    value: float | None

    @property
    def outcome(self) -> str:
        if self.value is None:
            return "open"
        return "met" if self.goal.met(self.value) else "missed"


def load_goals(path: Path = GOALS_FILE) -> list[Goal]:
    listed = json.loads(path.read_text(encoding="utf-8"))["goals"]
    return [
        Goal(**{key: tuple(value) if isinstance(value, list) else value for key, value in goal.items()})
        for goal in listed
    ]


def judge(result: Mapping[str, Any], goals: list[Goal]) -> Iterator[Verdict]:
    """Every goal on every case of a timed result that it covers."""
    groups = by_contestant(result["cases"])
    rate = copy_rate(result)
    for goal in goals:
        for (operation, dtype, size, _, direction), records in groups.items():
            if goal.covers(operation, dtype, size, direction):
                yield Verdict(goal, operation, dtype, size, _value(goal, records, rate))


def _value(goal: Goal, records: _Records, rate: float) -> float | None:
    field = "host_us" if goal.measure == "host_slowdown" else "device_us"
    ours = _median(records, "fusednn", field)
    if ours is None:
        return None
    if goal.against is None:
        return 100 * float(records["fusednn"]["budget_bytes"]) / ours / rate
    other = _median(records, goal.against, field)
    if other is None:
        return None
    return ours / other if goal.measure == "host_slowdown" else other / ours


def _median(records: _Records, contestant: str, field: str) -> float | None:
    samples = records.get(contestant, {}).get(field)
    return median(samples) if samples else None
