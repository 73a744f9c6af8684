"""A comparison as data, as tables that a person reads, and as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from ..layers import Explanation, ReplacementReport
from ..layers.table import format_table
from .clock import PHASES, Times
from .memory import Memory, Traffic
from .proof import Proof

__all__ = ["Comparison"]

_LARGEST = 5  # layers by kept bytes


@dataclass(frozen=True)
class Comparison:
    """What `fusednn.compare` found, by copy: stock, replaced, fused (and compiled ones); prints as tables.

    ``right`` is False where a copy isn't as near to float64 as stock is, and None where nothing could be compared.
    """

    device: str
    proof: Proof
    times: Mapping[str, Times]
    memory: Mapping[str, Memory]
    traffic: Mapping[str, Traffic]
    report: ReplacementReport
    explanation: Explanation
    advice: tuple[str, ...]

    @property
    def right(self) -> bool | None:
        return self.proof.right

    def to_dict(self) -> dict[str, Any]:
        """For JSON.  What holds figures is an object by copy."""
        return {
            "device": self.device,
            "right": self.right,
            "reference": self.proof.reference,
            "findings": [{**asdict(finding), "right": finding.right} for finding in self.proof.findings],
            "blame": dict(self.proof.blame),
            "times_ms": {name: asdict(times) for name, times in self.times.items()},
            "memory": {name: {"kept": one.kept, **asdict(one)} for name, one in self.memory.items()},
            "traffic": {name: asdict(one) for name, one in self.traffic.items()},
            "layers": [asdict(row) for row in self.report.rows],
            "untraced": [asdict(row) for row in self.report.untraced],
            "paths": [asdict(row) for row in self.explanation],
            "advice": list(self.advice),
        }

    def __str__(self) -> str:
        parts = [self._right(), self._times(), self._memory(), self._layers()]
        if self.advice:
            parts.append("\n".join(["To gain more:", *(f"- {one}" for one in self.advice)]))
        return "\n\n".join(parts)

    def draw(self, path: str | Path) -> None:
        """Bars of wall time and kept memory, stock's being 1.  Needs matplotlib."""
        from matplotlib.figure import Figure  # without pyplot: no window system, no global state

        names = list(self.memory)
        stock = self.memory["stock"].kept or 1
        bars = {"kept for the backward pass": {name: self.memory[name].kept / stock for name in names}}
        if self.times:
            medians = {name: self.times[name].middle("wall", "step") for name in names if name in self.times}
            first = (medians["stock"] or (1.0,))[0]
            bars["wall time a step"] = {name: middle[0] / first for name, middle in medians.items() if middle}
        figure = Figure(figsize=(8, 1.2 + 0.45 * len(names)), dpi=120, layout="constrained")
        for axes, (title, values) in zip(figure.subplots(1, len(bars), squeeze=False)[0], bars.items(), strict=True):
            axes.barh(list(values), list(values.values()), color="#1f3a5f")
            axes.axvline(1.0, color="#f8c48a")
            axes.set_title(f"{title}, of stock's")
            axes.invert_yaxis()
        figure.savefig(path)

    def _right(self) -> str:
        proof = self.proof
        if proof.right is None:
            return f"Right? Compared with {proof.reference}."
        rows = []
        for name in dict.fromkeys(finding.contestant for finding in proof.findings):
            worst = proof.worst(name)
            assert worst is not None
            blame = proof.blame.get(name, "")
            figures = (f"{worst.error:.2e}", f"{worst.stock_error:.2e}", f"{worst.allowed:.2e}")
            rows.append((name, "right" if worst.right else "WRONG", worst.what, *figures, blame))
        head = ("copy", "is", "nearest to its limit", "relative error", "stock's", "allowed", "first to differ")
        return f"Right? Compared with {proof.reference}.\n{format_table(head, rows)}"

    def _times(self) -> str:
        if not self.times:
            return "Time: not measured."
        on_gpu = self.device.startswith("cuda")
        note = "" if on_gpu else "; without a GPU these are the CPU's operators, and say nothing about kernels"
        rows = []
        for name, times in self.times.items():
            kinds = ("device", "host") if on_gpu else ("host",)
            for kind in kinds:
                cells = [_milliseconds(times.middle(kind, phase)) for phase in PHASES]
                rows.append((name, kind, *cells, *(self._whole(name) if kind == kinds[0] else ("", "", ""))))
        head = ("copy", "time", *PHASES, "wall, a step", "x stock", "host, most above stock")
        return f"Time on {self.device}, ms: median (10 % to 90 %){note}.\n{format_table(head, rows)}"

    def _whole(self, name: str) -> tuple[str, str, str]:
        """Wall time, how many times as fast as stock, and the layer that keeps the host longest, beside stock's."""
        stock, times = self.times["stock"].layers, self.times[name]
        above = {layer: spent - stock.get(layer, 0.0) for layer, spent in times.layers.items()}
        layer = max(above, key=above.__getitem__, default=None)
        slowest = f"{layer} +{above[layer]:.2f}" if layer is not None and above[layer] > 0 else ""
        return _milliseconds(times.middle("wall", "step")), f"{median(times.ratios):.2f}", slowest

    def _memory(self) -> str:
        stock = self.memory["stock"].kept
        rows = []
        for name, memory in self.memory.items():
            largest = sorted(memory.by_layer.items(), key=lambda item: -item[1])[:_LARGEST]
            most = ", ".join(f"{layer} {_size(size)}" for layer, size in largest)
            moved = self.traffic.get(name)
            counted = (_size(moved.bytes), str(moved.launches)) if moved else ("", "")
            ratio = f"{memory.kept / stock:.2f}" if stock else ""
            peak = _size(memory.peak) if memory.peak is not None else ""
            rows.append((name, _size(memory.kept), ratio, peak, *counted, most))
        head = ("copy", "kept", "of stock's", "peak", "bytes a step", "launches", "most kept by")
        note = " Bytes and launches of a step are a GPU's: each operand of a launch once." if self.traffic else ""
        return f"Memory kept for the backward pass, beside parameters and batch.{note}\n{format_table(head, rows)}"

    def _layers(self) -> str:
        left = [row for row in self.report.rows if not row.replaced]
        lines = [f"Layers: {len(self.report.replaced)} of {len(self.report.rows)} replaced."]
        if left:
            alike: dict[tuple[str, str], list[str]] = {}
            for row in left:
                alike.setdefault((row.layer, row.reason), []).append(row.names[0] or "(model)")
            rows = [
                (names[0] + (f" and {len(names) - 1} alike" if len(names) > 1 else ""), layer, reason)
                for (layer, reason), names in alike.items()
            ]
            lines.append(format_table(("left", "class", "reason"), rows))
        return "\n".join(lines)


def _milliseconds(middle: tuple[float, float, float] | None) -> str:
    return "" if middle is None else f"{middle[0]:.2f} ({middle[1]:.2f} to {middle[2]:.2f})"


def _size(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
