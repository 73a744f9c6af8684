"""Tables of results, for the terminal and for Markdown alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fusednn.benchmark.quantiles import median, quiet, spread

__all__ = [
    "MOST_ISSUE",
    "by_contestant",
    "compiled_table",
    "copy_rate",
    "counted_tables",
    "host_table",
    "inductor_table",
    "instructions_table",
    "markdown_table",
    "network_table",
    "predicted_table",
    "product_rate",
    "slower",
    "timed_tables",
]

Cell = str | float | int | None
_Key = tuple[Any, ...]
_Record = Mapping[str, Any]

#: The share of its bytes' time that a kernel's instructions may take, if memory is to bind it: no kernel issues one in
#: every cycle.
MOST_ISSUE = 0.7

_SAVING = ("forward", "training_step")  # the directions in which autograd saves what it needs later


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


def by_contestant(cases: Iterable[_Record]) -> dict[_Key, dict[str, _Record]]:
    """The records of each (operation, dtype, size, shape, direction), by contestant."""
    groups: dict[_Key, dict[str, _Record]] = {}
    for case in cases:
        key = (case["operation"], case["dtype"], case.get("size"), tuple(case["shape"]), case["direction"])
        groups.setdefault(key, {})[case["contestant"]] = case
    return groups


def _name(key: _Key) -> str:
    operation, dtype, size, shape, direction = key
    return f"{operation} {direction} {dtype} {size} {'x'.join(map(str, shape))}"


# --- Counted ----------------------------------------------------------------------------------------------------------


def counted_tables(cases: Iterable[_Record]) -> str:
    """Per operation and dtype: bytes per element and launches in each direction, ours / eager's, and their ratios.

    Operations with other directions (an optimizer has only steps) have a table of their own.
    """
    rows: dict[_Key, list[Cell]] = {}
    directions: dict[_Key, tuple[str, ...]] = {}
    for (operation, dtype, size, _, direction), records in by_contestant(cases).items():
        if not {"fusednn", "eager"} <= records.keys():  # the run was interrupted between them
            continue
        ours, eager = records["fusednn"], records["eager"]
        key = (operation, dtype, size)
        directions[key] = (*directions.get(key, ()), direction)
        row = rows.setdefault(key, [operation, dtype])
        row += [
            ours["bytes"] / ours["elements"],
            eager["bytes"] / eager["elements"],
            _ratio(eager["bytes"] / ours["bytes"]),
            ours["launches"],
            eager["launches"],
        ]
        if direction in _SAVING:
            row += [ours["saved_bytes"] / ours["elements"], eager["saved_bytes"] / eager["elements"]]
    tables = []
    for kind in dict.fromkeys(directions.values()):
        head = ["operation", "dtype"]
        for direction in kind:
            head += [f"{direction} bytes/element", "eager", "ratio", "launches", "eager"]
            if direction in _SAVING:
                head += ["saved bytes/element", "eager"]
        tables.append(markdown_table(head, [row for key, row in rows.items() if directions[key] == kind]))
    return "\n\n".join(tables)


# --- Predicted and compiled -------------------------------------------------------------------------------------------


def predicted_table(cases: Iterable[_Record]) -> str:
    """Predicted device times, and how many times shorter than eager's ours is."""
    rows = []
    for key, records in by_contestant(cases).items():
        ours, eager = records["fusednn"], records["eager"]
        by_instructions = ours["predicted_us"] == ours.get("instructions_us")
        bound = "instructions" if by_instructions else "products" if ours["operations_bound"] else "memory"
        megabytes = [record["bytes"] / 1e6 for record in (ours, eager)]
        times = [record["predicted_us"] for record in (ours, eager)]
        rows.append((_name(key), *megabytes, ours["operations"] / 1e9, *times, _ratio(times[1] / times[0]), bound))
    head = ("case", "fusednn MB", "eager MB", "Gop", "fusednn us", "eager us", "ratio", "bound by")
    return markdown_table(head, rows)


def compiled_table(cases: Iterable[_Record]) -> str:
    """What the compiler says of each kernel, a row for each target."""
    head = ("kernel", "configuration", "target", "threads", "registers", "spills", "shared bytes", "occupancy %")
    return markdown_table(
        (*head, "widest access, bits", "tensor cores"),
        [
            (
                case["kernel"],
                case["configuration"],
                case["target"],
                case["threads"],
                case["registers"],
                case["spills"],
                case["shared_bytes"],
                round(100 * case["occupancy"]) or "**0: doesn't fit**",
                case["access_bits"],
                "yes" if case["tensor_cores"] else "",
            )
            for case in cases
        ],
    )


def instructions_table(cases: Iterable[_Record]) -> str:
    """What each launch executes for what it moves.  Bold: too much for a kernel that is bound by memory."""
    head = ("launch", "kernel", "programs", "instructions/element", "ALU", "issue/bytes", "busiest pipe", "its/bytes")
    rows = []
    for case in cases:
        key = (case["operation"], case["dtype"], "", tuple(case["shape"]), case["direction"])
        name = " ".join(_name(key).split())
        ratios = [
            f"**{r:.2f}**" if r > MOST_ISSUE else f"{r:.2f}"
            for r in (case["issue_over_bytes"], case["busiest_over_bytes"])
        ]
        steps = f"{case['each']} x {case['trips']}" if case["trips"] else ""
        spills = f"**{case['spills']}**" if case["spills"] else "0"
        rows.append(
            (
                *(name, case["configuration"], case["programs"], case["instructions"]),
                case["instructions_by_pipe"].get("ALU", 0.0),
                *(ratios[0], case["busiest_pipe"], ratios[1], case["once"], steps, case["registers"], spills),
                *(case["programs_at_once"], case["bytes_in_flight"] / 1024),
            )
        )
    more = ("once", "each tile", "registers", "spills", "programs an SM", "KB in flight an SM")
    return markdown_table((*head, *more), rows)


def inductor_table(cases: Iterable[_Record]) -> str:
    """Launches and bytes of compiled training steps, and the bytes of stock's that ours are."""
    head = ("network", "launches", "replaced", "fused", "stock MB", "replaced MB", "fused MB", "replaced/stock")
    rows = []
    for key, records in by_contestant(cases).items():
        launches = [record["launches"] for record in records.values()]
        moved = [record["bytes"] for record in records.values()]
        marked = [f"**{count}**" if count > launches[0] else count for count in launches[1:]]
        ratios = [f"**{b / moved[0]:.3f}**" if b > moved[0] else f"{b / moved[0]:.3f}" for b in moved[1:]]
        rows.append((_name(key), launches[0], *marked, *(b / 1e6 for b in moved), *ratios))
    return markdown_table((*head, "fused/stock"), rows)


# --- On the host ------------------------------------------------------------------------------------------------------


def host_table(cases: Iterable[_Record]) -> str:
    """CPU time of a call: as on a quiet machine, the median, and ours over the others'; and what is counted of ours,
    by its kernels.
    """
    head = ("operation", "direction", "shape", "fusednn us", "median", "eager us", "median", "ratio", "others")
    rows: list[list[Cell]] = []
    for (operation, _, _, shape, direction), records in by_contestant(cases).items():
        times = {name: quiet(record["cpu_us"]) for name, record in records.items()}
        row: list[Cell] = [operation, direction.replace("_", " + "), "x".join(map(str, shape))]
        for name in ("fusednn", "eager"):
            row += [times[name], median(records[name]["cpu_us"])] if name in times else [None, None]
        row.append(times["fusednn"] / times["eager"] if "eager" in times else None)
        others = {name: time for name, time in times.items() if name not in ("fusednn", "eager")}
        row.append(", ".join(f"{name} {time:.2f}: {times['fusednn'] / time:.2f}" for name, time in others.items()))
        counted = records.get("always_kernels", records["fusednn"])
        rows.append(row + [counted[name] for name in ("launches", "prepared", "dispatched")])
    return markdown_table((*head, "launches", "prepared by Triton", "dispatched"), rows)


# --- Timed ------------------------------------------------------------------------------------------------------------


def timed_tables(result: _Record) -> str:
    """The device times, and the host's and wall times of the small sizes.  A ratio below 1, a loss, is bold."""
    groups = by_contestant(result["cases"])
    rate = copy_rate(result)
    others = list(dict.fromkeys(name for records in groups.values() for name in records if name != "fusednn"))
    ours = ("case", "fusednn us", "p10-p90", *(f"{name} us" for name in others), *(f"vs {name}" for name in others))
    parts = [
        f"Device copy: {rate / 1e3:.0f} GB/s, read plus written. "
        f"Matrix product: {product_rate(result) / 1e6:.0f} TFLOP/s in {result['matrix_product']['dtype']}.",
        markdown_table(
            (*ours, "GB/s", "% copy", "peak MB", "eager MB", "error, epsilons"),
            [_device_row(key, records, others, rate) for key, records in groups.items()],
        ),
    ]
    for title, field in (("host time, until the calls return", "host_us"), ("wall time", "wall_us")):
        timed = {key: records for key, records in groups.items() if records.get("fusednn", {}).get(field)}
        if timed:
            head = (f"case, {title}", *ours[1:])
            rows = [(_name(key), *_times(records, others, field)) for key, records in timed.items()]
            parts.append(markdown_table(head, rows))
    return "\n\n".join(parts)


def network_table(result: _Record) -> str:
    """Training steps: wall time, images a second, and memory, a row for each contestant."""
    head = ("network", "contestant", "ms a step", "images/s", "against eager", "peak MB", "activations MB")
    rows = []
    for key, records in by_contestant(result["cases"]).items():
        walls = {name: median(record["wall_us"]) for name, record in records.items() if "images" in record}
        for name, microseconds in walls.items():
            record = records[name]
            against = _ratio(walls["eager"] / microseconds) if "eager" in walls else None
            memory = (record["peak_bytes"] / 1e6, record["kept_bytes"] / 1e6)
            rows.append(
                (_name(key), name, microseconds / 1e3, round(record["images"] / microseconds * 1e6), against, *memory)
            )
    return markdown_table(head, rows) if rows else ""


def slower(result: _Record) -> list[tuple[str, str, float]]:
    """Where fusednn's device time is longer: the case, the contestant, and the ratio, the worst first."""
    found = []
    for key, records in by_contestant(result["cases"]).items():
        medians = {name: median(record["device_us"]) for name, record in records.items()}
        ours = medians.pop("fusednn", None)
        found += [(_name(key), name, other / ours) for name, other in medians.items() if ours and other < ours]
    return sorted(found, key=lambda loss: loss[2])


def copy_rate(result: _Record) -> float:
    """Bytes per microsecond (MB/s) of the run's device copy."""
    copy = result["copy"]
    return float(copy["bytes"] / median(copy["samples_us"]))


def product_rate(result: _Record) -> float:
    """Operations per microsecond of the run's matrix product."""
    product = result["matrix_product"]
    return float(product["operations"] / median(product["samples_us"]))


def _times(records: Mapping[str, _Record], others: Sequence[str], field: str) -> list[Cell]:
    """Ours with its spread, the others', and how many times faster than they we are."""
    medians = {name: median(record[field]) for name, record in records.items() if record.get(field)}
    ours = medians.get("fusednn")
    low, _, high = spread(records["fusednn"][field]) if ours else (0.0, 0.0, 0.0)
    theirs = [medians.get(name) for name in others]
    return [
        ours,
        f"{low:.1f}-{high:.1f}" if ours else None,
        *theirs,
        *(_ratio(other / ours) if ours and other else None for other in theirs),
    ]


def _ratio(value: float) -> str:
    return f"**{value:.2f}**" if value < 1 else f"{value:.2f}"


def _device_row(key: _Key, records: Mapping[str, _Record], others: Sequence[str], rate: float) -> list[Cell]:
    times = _times(records, others, "device_us")
    row = [_name(key), *times]
    ours = records.get("fusednn")
    if ours is None or times[0] is None:
        return [*row, None, None, None, None, None]
    achieved = ours["budget_bytes"] / float(times[0]) or None
    peaks = [records[name]["peak_bytes"] / 1e6 if name in records else None for name in ("fusednn", "eager")]
    rates = (achieved / 1e3, 100 * achieved / rate) if achieved else (None, None)
    return [*row, *rates, *peaks, ours["error_epsilons"]]
