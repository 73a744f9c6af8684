"""Tables of results, for the terminal and for Markdown alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .quantiles import median, spread

__all__ = ["counted_table", "markdown_table", "timed_tables"]

Cell = str | float | int | None
_Key = tuple[Any, ...]


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[Cell]]) -> str:
    """An aligned Markdown table: text to the left, numbers to the right, nothing for None."""
    body = [[_text(cell) for cell in row] for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(head, *body, strict=True)]
    lines = [[cell.ljust(width) for cell, width in zip(head, widths, strict=True)], ["-" * width for width in widths]]
    for row in body:
        lines.append(
            [cell.ljust(w) if i < 1 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _text(cell: Cell) -> str:
    if cell is None:
        return ""
    return f"{cell:.2f}" if isinstance(cell, float) else str(cell)


def by_contestant(cases: Iterable[Mapping[str, Any]]) -> dict[_Key, dict[str, Mapping[str, Any]]]:
    """The records of each (operation, dtype, size, shape, direction), by contestant."""
    groups: dict[_Key, dict[str, Mapping[str, Any]]] = {}
    for case in cases:
        key = (case["operation"], case["dtype"], case.get("size"), tuple(case["shape"]), case["direction"])
        groups.setdefault(key, {})[case["contestant"]] = case
    return groups


def counted_table(cases: Iterable[Mapping[str, Any]]) -> str:
    """Per operation and dtype: bytes per element and launches in each direction, ours / eager's, and their ratios.

    Operations with other directions (an optimizer has only steps) have a table of their own.
    """
    groups = by_contestant(cases)
    rows: dict[_Key, list[Cell]] = {}
    directions: dict[_Key, tuple[str, ...]] = {}
    for (operation, dtype, size, _, direction), records in groups.items():
        ours, eager = records["fusednn"], records["eager"]
        key = (operation, dtype, size)
        directions[key] = (*directions.get(key, ()), direction)
        row = rows.setdefault(key, [operation, dtype])
        row += [
            ours["bytes"] / ours["elements"],
            eager["bytes"] / eager["elements"],
            eager["bytes"] / ours["bytes"],
            ours["launches"],
            eager["launches"],
        ]
    tables = []
    for kind in dict.fromkeys(directions.values()):
        head = ["operation", "dtype"]
        for direction in kind:
            head += [f"{direction} bytes/element", "eager", "ratio", "launches", "eager"]
        tables.append(markdown_table(head, [row for key, row in rows.items() if directions[key] == kind]))
    return "\n\n".join(tables)


def timed_tables(result: Mapping[str, Any]) -> str:
    """The device times, and the host's of the small sizes."""
    groups = by_contestant(result["cases"])
    rate = copy_rate(result)
    device = [_device_row(key, records, rate) for key, records in groups.items()]
    host = [_host_row(key, records) for key, records in groups.items() if records.get("fusednn", {}).get("host_us")]
    parts = [
        f"Device copy: {rate / 1e3:.0f} GB/s, read plus written",
        markdown_table(
            (
                "case",
                "fusednn us",
                "p10-p90",
                "eager us",
                "compile us",
                "vs eager",
                "vs compile",
                "GB/s",
                "% copy",
                "peak MB",
                "eager MB",
            ),
            device,
        ),
    ]
    if host:
        head = ("case, host time", "fusednn us", "p10-p90", "eager us", "compile us", "vs eager", "vs compile")
        parts.append(markdown_table(head, host))
    return "\n\n".join(parts)


def copy_rate(result: Mapping[str, Any]) -> float:
    """Bytes per microsecond (MB/s) of the run's device copy."""
    copy = result["copy"]
    return float(copy["bytes"] / median(copy["samples_us"]))


def _name(key: _Key) -> str:
    operation, dtype, size, shape, direction = key
    return f"{operation} {direction} {dtype} {size} {'x'.join(map(str, shape))}"


def _times(records: Mapping[str, Mapping[str, Any]], field: str) -> list[Cell]:
    """Ours with its spread, the others', and how many times faster than they we are."""
    medians = {name: median(record[field]) for name, record in records.items() if record.get(field)}
    ours, eager, compiled = (medians.get(name) for name in ("fusednn", "eager", "compile"))
    low, _, high = spread(records["fusednn"][field]) if ours else (0.0, 0.0, 0.0)
    return [
        ours,
        f"{low:.1f}-{high:.1f}" if ours else None,
        eager,
        compiled,
        eager / ours if ours and eager else None,
        compiled / ours if ours and compiled else None,
    ]


def _device_row(key: _Key, records: Mapping[str, Mapping[str, Any]], rate: float) -> list[Cell]:
    times = _times(records, "device_us")
    row = [_name(key), *times]
    ours = records.get("fusednn")
    if ours is None or times[0] is None:
        return [*row, None, None, None, None]
    achieved = ours["budget_bytes"] / float(times[0])
    peaks = [records[name]["peak_bytes"] / 1e6 if name in records else None for name in ("fusednn", "eager")]
    return [*row, achieved / 1e3, 100 * achieved / rate, *peaks]


def _host_row(key: _Key, records: Mapping[str, Mapping[str, Any]]) -> list[Cell]:
    return [_name(key), *_times(records, "host_us")]
