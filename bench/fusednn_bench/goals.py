"""Goals as data (``bench/goals.json``), and which of them a result meets."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusednn.benchmark.quantiles import median, quiet

from .tables import by_contestant, copy_rate, product_rate

__all__ = ["GOALS_FILE", "Goal", "Verdict", "judge", "load_goals"]

GOALS_FILE = Path(__file__).resolve().parents[1] / "goals.json"

_Records = Mapping[str, Mapping[str, Any]]

#: What each measure is a ratio of.
MEASURES = {
    "speedup": "device_us",
    "percent_of_copy": "device_us",
    "percent_of_product": "device_us",
    "wall_slowdown": "wall_us",
    "host_slowdown": "cpu_us",
    "memory": "kept_bytes",
    "peak": "peak_bytes",
    "traffic": "bytes",
    "launches": "launches",
}

#: The kinds of results that goals are judged by.
KINDS = ("timed", "memory", "peak", "inductor", "host")

#: Those that compare with a ceiling, and not with a contestant.
_OF_CEILINGS = ("percent_of_copy", "percent_of_product")

OUTCOMES = ("missed", "met", "unmeasured")


@dataclass(frozen=True)
class Goal:
    """A bound on one measure of fusednn, over operations (``*``: all), a direction, sizes, and dtypes (none: all).

    ``speedup``: device time of ``against`` over ours; ``percent_of_copy``: the budget's rate, in percent of the device
    copy's; ``percent_of_product``: the operations' rate, in percent of the matrix product's; ``wall_slowdown``: our
    wall time over that of ``against``; ``host_slowdown``: likewise, the host's CPU time over a GPU that does nothing;
    ``memory``, ``peak``, ``traffic``, ``launches``: likewise, bytes kept for the backward pass, the most that a step
    holds, bytes moved, and launches.  Ours is ``of``.  ``reason``: why it is missed, where it is, and what it would
    take.
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
    of: str = "fusednn"
    reason: str | None = None

    def __post_init__(self) -> None:
        if self.measure not in MEASURES:
            raise ValueError(f"{self.name}: unknown measure {self.measure}")
        if (self.against is None) != (self.measure in _OF_CEILINGS):
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
    """One goal on one case.  ``value`` is None, and the goal unmeasured, where a contestant has no timing.

    A goal that no result has a case for is unmeasured as a whole: it names no operation.
    """

    goal: Goal
    operation: str | None = None
    dtype: str | None = None
    size: str | None = None
    value: float | None = None

    @property
    def outcome(self) -> str:
        if self.value is None:
            return "unmeasured"
        return "met" if self.goal.met(self.value) else "missed"


def load_goals(path: Path = GOALS_FILE) -> list[Goal]:
    listed = json.loads(path.read_text(encoding="utf-8"))["goals"]
    return [
        Goal(**{key: tuple(value) if isinstance(value, list) else value for key, value in goal.items()})
        for goal in listed
    ]


def judge(results: Iterable[Mapping[str, Any]], goals: Iterable[Goal]) -> Iterator[Verdict]:
    """Every goal, on every case of the results that it covers."""
    groups = [
        (key, records, result)
        for result in results
        if result["kind"] in KINDS
        for key, records in by_contestant(result["cases"]).items()
    ]
    for goal in goals:
        covered = [
            Verdict(goal, operation, dtype, size, _value(goal, records, result))
            for (operation, dtype, size, _, direction), records, result in groups
            if goal.covers(operation, dtype, size, direction)
        ]
        yield from covered or [Verdict(goal)]


def _value(goal: Goal, records: _Records, result: Mapping[str, Any]) -> float | None:
    ours = _figure(records, goal.of, goal.measure)
    if ours is None:
        return None
    if goal.measure == "percent_of_copy":
        return 100 * float(records[goal.of]["budget_bytes"]) / ours / copy_rate(result)
    if goal.against is None:
        return 100 * float(records[goal.of]["operations"]) / ours / product_rate(result)
    other = _figure(records, goal.against, goal.measure)
    if other is None:
        return None
    return other / ours if goal.measure == "speedup" else ours / other


def _figure(records: _Records, contestant: str, measure: str) -> float | None:
    """Bytes, or the median of the samples; None where there are none."""
    found = records.get(contestant, {}).get(MEASURES[measure])
    if isinstance(found, list):
        return (quiet if measure == "host_slowdown" else median)(found) if found else None
    return found or None
