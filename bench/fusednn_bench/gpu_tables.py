"""What a GPU says about the figures that were made without one, and what follows from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fusednn.benchmark.quantiles import median

from .goals import Goal, judge
from .tables import by_contestant, markdown_table, slower

__all__ = ["counters_table", "next_steps", "predictions_table", "thresholds_table"]

_Record = Mapping[str, Any]
_Results = Mapping[str, Mapping[str, Any]]


def thresholds_table(cases: Iterable[_Record]) -> str:
    """Both ways of each case, and how many times as long the one that the library doesn't take is."""
    rows = []
    for key, ways in by_contestant(cases).items():
        operation, dtype, size, shape, direction = key
        names = list(ways)
        if len(names) == 2:
            first, second = (ways[name]["device_us"] + ways[name]["host_us"] for name in names)
            place = f"{operation} {dtype} {size} {'x'.join(map(str, shape))}"
            rows.append((place, direction, names[0], first, names[1], second, second / first))
    return markdown_table(("case", "direction", "one", "us", "the other", "us", "ratio"), rows)


def counters_table(cases: Iterable[_Record]) -> str:
    """A row a case: DRAM bytes beside those that it must move, and the launch that issued the largest share of its
    cycles, which is bound by instructions where that is near 100 %.
    """
    launches: dict[tuple[Any, ...], list[_Record]] = {}
    for case in cases:
        launches.setdefault((case["operation"], case["dtype"], tuple(case["shape"])), []).append(case)
    rows = []
    for (operation, dtype, shape), own in launches.items():
        moved, needed = sum(record["dram_bytes"] for record in own), own[0]["budget_bytes"]
        busiest = max(own, key=lambda record: float(record["issue_percent"]))
        microseconds = sum(record["duration_us"] for record in own)
        conflicts = sum(record["bank_conflicts"] for record in own)
        rows.append(
            (
                f"{operation} {dtype} {'x'.join(map(str, shape))}",
                len(own),
                moved / 1e6,
                needed / 1e6,
                moved / needed if needed else None,
                microseconds,
                busiest["issue_percent"],
                busiest["kernel"].split(" ", 1)[-1],
                round(conflicts),
            )
        )
    head = ("case", "launches", "DRAM MB", "budget MB", "ratio", "us", "issued %", "by", "bank conflicts")
    return markdown_table(head, rows)


def predictions_table(results: _Results) -> str:
    """By family: measured over predicted device time, ours and eager's.  Empty where nothing was measured.

    Where a family's figure is far from the others', its prediction leaves out what limits it.
    """
    predicted = {_key(case): case["predicted_us"] for case in _cases(results, "predicted")}
    ratios: dict[str, dict[str, list[float]]] = {}
    for case in _cases(results, "timed"):
        if _key(case) in predicted:
            ratio = median(case["device_us"]) / predicted[_key(case)]
            ratios.setdefault(case["family"], {}).setdefault(case["contestant"], []).append(ratio)
    rows = [
        (
            family,
            *(
                f"{median(own):.2f} ({min(own):.2f} to {max(own):.2f})" if own else None
                for own in _pair(ratios[family])
            ),
        )
        for family in sorted(ratios)
    ]
    return markdown_table(("family", "fusednn", "eager"), rows) if rows else ""


def _pair(ratios: Mapping[str, list[float]]) -> tuple[list[float], list[float]]:
    return ratios.get("fusednn", []), ratios.get("eager", [])


def next_steps(results: _Results, goals: Sequence[Goal]) -> list[str]:
    """What to do, the worst first: goals that are missed, by how much, and cases where another is faster."""
    found: list[tuple[float, str]] = []
    for verdict in judge(results.values(), goals):
        if verdict.outcome == "missed" and verdict.value is not None:
            goal = verdict.goal
            bound = goal.at_least if goal.at_least is not None else goal.at_most
            assert bound is not None
            short = verdict.value / bound if goal.at_least is not None else bound / verdict.value
            where = f"{verdict.operation} {verdict.dtype} {verdict.size}"
            found.append((short, f"{goal.name}: {where} has {verdict.value:.2f}, wanted {goal.wanted}"))
    for result in results.values():
        if result["kind"] == "timed":
            found += [(ratio, f"{case}: {name} is faster ({ratio:.2f})") for case, name, ratio in slower(result)]
    return [text for _, text in sorted(found)]


def _cases(results: _Results, kind: str) -> list[_Record]:
    return [case for result in results.values() if result["kind"] == kind for case in result["cases"]]


def _key(case: _Record) -> tuple[Any, ...]:
    return (*(case[name] for name in ("operation", "contestant", "direction", "dtype")), tuple(case["shape"]))
