"""What `one` measured: as data, as a table that a person reads, and as a picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..layers.table import format_table
from .cases import Case
from .quantiles import Spread, median, spread

__all__ = ["Measurement", "Sweep", "of_record"]

#: Where the last tenth of samples is so much above their median, something else ran.
_WIDE = 1.5


@dataclass(frozen=True)
class Measurement:
    """A contestant in one direction of one case: microseconds a call, and bytes a call where they are known.

    ``refused`` says why there are no times.
    """

    operation: str
    dtype: str
    shape: tuple[int, ...]
    memory_format: str
    contestant: str
    direction: str
    device_us: tuple[float, ...] = ()
    host_us: tuple[float, ...] = ()
    wall_us: tuple[float, ...] = ()
    bytes: float | None = None
    operations: int = 0
    launches: int | None = None
    path: str = ""
    note: str = ""
    refused: str = ""

    @classmethod
    def refusal(cls, case: Case, contestant: str, reason: str) -> Measurement:
        return cls(*_what(case), contestant, "", refused=reason)

    @property
    def samples(self) -> tuple[float, ...]:
        """The device's time, or the clock's on a CPU."""
        return self.device_us or self.wall_us

    @property
    def case(self) -> tuple[Any, ...]:
        return self.operation, self.dtype, self.shape, self.memory_format

    @property
    def rate(self) -> float | None:
        """Bytes a second."""
        return self.bytes / median(self.device_us) * 1e6 if self.bytes and self.device_us else None


def _what(case: Case) -> tuple[str, str, tuple[int, ...], str]:
    last = case.operation.memory_format is torch.channels_last
    return case.operation.name, case.dtype_name, case.shape, "channels_last" if last else "contiguous"


def of_record(case: Case, record: Mapping[str, Any], eager_bytes: float | None = None, note: str = "") -> Measurement:
    """From a contest's record, or a count's.  Ours moves its budget, where nothing was counted."""
    budget = case.budget(record["direction"])
    known = record.get("bytes", budget if record["contestant"] == "fusednn" else eager_bytes)
    found = Measurement(
        *_what(case),
        record["contestant"],
        record["direction"],
        device_us=tuple(record.get("device_us", ())),
        host_us=tuple(record.get("host_us", ())),
        wall_us=tuple(record.get("wall_us", ())),
        bytes=None if known is None or math.isnan(known) else float(known),
        operations=record.get("operations", 0),
        launches=record.get("launches"),
        path=record.get("path", ""),
        note=note,
    )
    if found.samples and not note and spread(found.samples).p90 > _WIDE * median(found.samples):
        return Measurement(**{**vars(found), "note": "spread is wide: something else ran"})
    return found


@dataclass(frozen=True)
class Sweep:
    """Measurements, what the device gives at best (bytes and operations a second), and what to know of the machine."""

    measurements: tuple[Measurement, ...]
    copy_rate: float | None
    product_rate: float | None
    notes: tuple[str, ...]

    def __iter__(self) -> Iterator[Measurement]:
        return iter(self.measurements)

    def __len__(self) -> int:
        return len(self.measurements)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        rates = {"copy_bytes_a_second": self.copy_rate, "operations_a_second": self.product_rate}
        return {**rates, "notes": list(self.notes), "measurements": [asdict(one) for one in self.measurements]}

    def roofline(self, one: Measurement) -> float | None:
        """The share of what the device gives at best: of a copy's bytes or of a product's operations a second."""
        if not (one.device_us and one.bytes and self.copy_rate and self.product_rate):
            return None
        return max(one.bytes / self.copy_rate, one.operations / self.product_rate) * 1e6 / median(one.device_us)

    def __str__(self) -> str:
        eager = {(one.case, one.direction): one for one in self if one.contestant == "eager"}
        columns: dict[str, Callable[[Measurement], str]] = {
            "operation": lambda one: f"{one.operation} {one.dtype} {'x'.join(map(str, one.shape))}{_format(one)}",
            "direction": lambda one: one.direction.replace("_", " + "),
            "contestant": lambda one: one.contestant,
            "device us": lambda one: _spread(one.device_us),
            "host us": lambda one: _spread(one.host_us),
            "CPU us": lambda one: _spread(one.wall_us) if not one.device_us else "",
            "x eager": lambda one: _ratio(eager.get((one.case, one.direction)), one),
            "bytes": lambda one: "" if one.bytes is None else f"{one.bytes:,.0f}",
            "launches": lambda one: "" if one.launches is None else str(one.launches),
            "GB/s": lambda one: "" if one.rate is None else f"{one.rate / 1e9:.0f}",
            "of a copy's": lambda one: _share(one.rate, self.copy_rate),
            "of the roofline": lambda one: _share(self.roofline(one), 1.0),
            "note": lambda one: f"refused: {one.refused}" if one.refused else one.note,
        }
        cells = {name: [cell(one) for one in self] for name, cell in columns.items()}
        shown = {name: column for name, column in cells.items() if any(column)}
        table = format_table(tuple(shown), list(zip(*shown.values(), strict=True)))
        if self.copy_rate:
            table += f"\nA copy moves {self.copy_rate / 1e9:.0f} GB/s."
        return "\n".join([table, *self.notes])

    def draw(self, path: str | Path) -> None:
        """Time over the number of elements, a line a contestant, a panel a direction.  Needs matplotlib."""
        try:
            from matplotlib.figure import Figure  # without pyplot: no window system, no global state
        except ImportError:
            raise ImportError("drawing needs matplotlib: pip install matplotlib") from None
        timed = [one for one in self if one.samples]
        directions = list(dict.fromkeys(one.direction for one in timed))
        if not directions:
            raise ValueError("nothing was timed: there is nothing to draw")
        figure = Figure(figsize=(4.5 * len(directions), 4), dpi=120, layout="constrained")
        for axes, direction in zip(figure.subplots(1, len(directions), squeeze=False)[0], directions, strict=True):
            lines: dict[str, list[Measurement]] = {}
            for one in timed:
                if one.direction == direction:
                    lines.setdefault(f"{one.contestant}, {one.operation} {one.dtype}{_format(one)}", []).append(one)
            for label, line in lines.items():
                line.sort(key=lambda one: math.prod(one.shape))
                sizes, middle = [math.prod(one.shape) for one in line], [median(one.samples) for one in line]
                axes.plot(sizes, middle, marker="o", label=label)
                axes.fill_between(sizes, *zip(*(spread(one.samples)[::2] for one in line), strict=True), alpha=0.2)
            axes.set(title=direction.replace("_", " + "), xlabel="elements", ylabel="us a call", xscale="log")
            axes.set_yscale("log")
        figure.axes[0].legend(fontsize=7)
        figure.savefig(path)


def _format(one: Measurement) -> str:
    return "" if one.memory_format == "contiguous" else f" {one.memory_format}"


def _spread(samples: tuple[float, ...]) -> str:
    if not samples:
        return ""
    middle: Spread = spread(samples)
    return f"{middle.median:.1f} ({middle.p10:.1f} to {middle.p90:.1f})"


def _ratio(eager: Measurement | None, one: Measurement) -> str:
    if eager is None or not (eager.samples and one.samples):
        return ""
    return f"{median(eager.samples) / median(one.samples):.2f}"


def _share(value: float | None, whole: float | None) -> str:
    return "" if value is None or not whole else f"{100 * value / whole:.0f} %"
