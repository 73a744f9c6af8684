"""Plots of results, as PNG files.  Each carries the digest of its result in its metadata, so that a stale one shows."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fusednn.benchmark.quantiles import median

from .memory_table import MEMORY_COLUMNS, kept_shares
from .tables import MOST_ISSUE, by_contestant, copy_rate, product_rate

__all__ = ["digest_of_plot", "draw_plots", "plot_digest", "plot_names"]

OURS, EAGER, COMPILE = "#1f3a5f", "#f8c48a", "#7aa6a1"
_METADATA = "Result-SHA256"
_ITEM_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}

_Result = Mapping[str, Any]
_Points = dict[str, list[tuple[float, float]]]  # by family


def draw_plots(result: _Result, name: str, folder: Path) -> list[Path]:
    """Write what there is to draw of a result into ``folder``, as ``<name>-<plot>.png``."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for plot, draw in _plots(result):
        path = folder / f"{Path(name).stem}-{plot}.png"
        figure = _figure()
        draw(result, figure)
        figure.savefig(path, metadata={_METADATA: plot_digest(result), "Software": None})
        drawn.append(path)
    return drawn


def plot_names(result: _Result, name: str) -> list[str]:
    """The files that `draw_plots` writes."""
    return [f"{Path(name).stem}-{plot}.png" for plot, _ in _plots(result)]


def plot_digest(result: _Result) -> str:
    return hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()


def digest_of_plot(path: Path) -> str | None:
    """That of the result which a plot shows."""
    from PIL import Image

    with Image.open(path) as image:
        image.load()
        digest: str | None = image.text.get(_METADATA)  # type: ignore[attr-defined]
        return digest


def _plots(result: _Result) -> Iterator[tuple[str, Callable[[_Result, Any], None]]]:
    kind = result["kind"]
    if kind == "timed":
        yield "speed-up-by-size", _speed_up
        yield "percent-of-copy-rate-by-size", _percent_of_copy
        yield "roofline", _roofline
        yield "saved-activation-memory", _saved_memory
    elif kind == "counted":
        yield "bytes-against-eager", _byte_ratios
        yield "saved-activation-memory", _saved_memory
    elif kind == "predicted":
        yield "ratio-by-size", _predicted_ratio
    elif kind == "instructions":
        yield "issue-against-bytes", _issue_ratios
    elif kind == "memory":
        yield "kept-activations", _kept


def _figure() -> Any:
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state

    return Figure(figsize=(8, 4.8), dpi=120, layout="constrained")


def _axes(figure: Any, title: str, x: str, y: str) -> Any:
    axes = figure.subplots()
    axes.set_title(title, loc="left", fontweight="bold")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _scatter(axes: Any, points: _Points, marker: str = "o", named: bool = True) -> None:
    from matplotlib import colormaps

    colours = colormaps["tab20"].colors
    for i, (family, places) in enumerate(sorted(points.items())):
        label = family if named else None
        axes.scatter(*zip(*places, strict=True), s=16, marker=marker, color=colours[i % len(colours)], label=label)
    if points and named:
        axes.legend(frameon=False, fontsize=7, ncols=2)


# --- By size ----------------------------------------------------------------------------------------------------------


def _bytes_of(record: Mapping[str, Any]) -> float:
    """Of the tensor that a case is about; of all parameters, for a step."""
    numel = record["shape"][1] if record["direction"] == "step" else math.prod(record["shape"])
    return float(numel * _ITEM_BYTES[record["dtype"]])


def _by_family(result: _Result, value: Callable[[Mapping[str, Any]], float | None]) -> _Points:
    """Size and ``value`` of each group of contestants' records."""
    points: _Points = {}
    for records in by_contestant(result["cases"]).values():
        ours = records.get("fusednn")
        if ours is not None and (found := value(records)) is not None:
            points.setdefault(ours["family"], []).append((_bytes_of(ours) / 1e6, found))
    return points


def _ratios(result: _Result, figure: Any, title: str, figure_of: Callable[[Mapping[str, Any]], float]) -> None:
    """Circles against eager, triangles against torch.compile."""
    axes = _axes(figure, title, "size of the tensor, MB", "the other's time / fusednn's")
    axes.axhline(1, color="#999999", linewidth=1)
    axes.set_xscale("log")
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:g}")
    for other, marker in (("compile", "^"), ("eager", "o")):

        def ratio(records: Mapping[str, Any], other: str = other) -> float | None:
            return figure_of(records[other]) / figure_of(records["fusednn"]) if other in records else None

        _scatter(axes, _by_family(result, ratio), marker, named=other == "eager")


def _speed_up(result: _Result, figure: Any) -> None:
    title = f"Speed-up over eager (circles) and torch.compile (triangles), {result['environment']['device']}"
    _ratios(result, figure, title, lambda record: median(record["device_us"]))


def _predicted_ratio(result: _Result, figure: Any) -> None:
    title = f"Prediction, not a measurement: times on {result['settings']['machine']['name']}"
    _ratios(result, figure, title, lambda record: float(record["predicted_us"]))


def _percent_of_copy(result: _Result, figure: Any) -> None:
    rate = copy_rate(result)

    def percent(records: Mapping[str, Any]) -> float | None:
        ours = records["fusednn"]
        return 100 * float(ours["budget_bytes"]) / median(ours["device_us"]) / rate if ours["budget_bytes"] else None

    title = f"Rate of the budget's bytes, {result['environment']['device']}"
    axes = _axes(figure, title, "size of the tensor, MB", "% of the copy's rate")
    axes.axhline(100, color="#999999", linewidth=1)
    axes.set_xscale("log")
    _scatter(axes, _by_family(result, percent))


# --- Roofline ---------------------------------------------------------------------------------------------------------


def _roofline(result: _Result, figure: Any) -> None:
    """Operations of matrix products a second over operations a byte, under what the device can do at best."""
    copy, matrix = copy_rate(result), product_rate(result)
    title = f"Roofline, {result['environment']['device']}"
    axes = _axes(figure, title, "operations of matrix products a byte", "TFLOP/s")
    points: _Points = {}
    for record in result["cases"]:
        if record["contestant"] == "fusednn" and record["operations"]:
            place = (
                record["operations"] / record["budget_bytes"],
                record["operations"] / median(record["device_us"]) / 1e6,
            )
            points.setdefault(record["family"], []).append(place)
    intensities = [2.0**-2, matrix / copy, 2.0**14]
    axes.plot(intensities, [min(copy * x, matrix) / 1e6 for x in intensities], color="#999999", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    _scatter(axes, points)


# --- Bars: an operation each ------------------------------------------------------------------------------------------


def _pairs(result: _Result, direction: Iterable[str], field: str) -> dict[str, tuple[float, float]]:
    """Bytes an element of each operation's first case in these directions, ours and eager's."""
    found: dict[str, tuple[float, float]] = {}
    for (operation, _, _, _, towards), records in by_contestant(result["cases"]).items():
        sides = [records.get(name, {}) for name in ("fusednn", "eager")]
        if towards in direction and all(field in side for side in sides) and operation not in found:
            elements = math.prod(sides[0]["shape"])
            found[operation] = (sides[0][field] / elements, sides[1][field] / elements)
    return dict(sorted(found.items()))


def _bars(figure: Any, pairs: dict[str, tuple[float, float]], title: str, y: str) -> None:
    axes = _axes(figure, title, "", y)
    for offset, side, colour, label in ((0.2, 1, EAGER, "eager PyTorch"), (-0.2, 0, OURS, "fusednn")):
        axes.bar(
            [i + offset for i in range(len(pairs))],
            [pair[side] for pair in pairs.values()],
            0.4,
            color=colour,
            label=label,
        )
    axes.set_yscale("symlog", linthresh=0.125)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xticks(range(len(pairs)), list(pairs), rotation=90, fontsize=5)
    axes.margins(x=0.01)
    axes.legend(frameon=False)


def _saved_memory(result: _Result, figure: Any) -> None:
    field = "kept_bytes" if result["kind"] == "timed" else "saved_bytes"
    what = "Kept until the backward pass, the output included" if result["kind"] == "timed" else "Saved by autograd"
    pairs = _pairs(result, ("forward", "training_step"), field)
    _bars(figure, pairs, f"{what}: activation memory", "bytes an element of the input")


def _kept(result: _Result, figure: Any) -> None:
    axes = _axes(figure, "Kept for the backward pass, of eager PyTorch's", "", "")
    shares = kept_shares(result)
    colours = {"compile": COMPILE, "fusednn": EAGER, "fusednn-recompute": OURS}
    for i, (name, colour) in enumerate(colours.items()):
        places = [place + 0.27 * (i - 1) for place in range(len(shares))]
        label = "torch.compile" if name == "compile" else f"fusednn, {MEMORY_COLUMNS[name]}"
        axes.bar(places, [share[name] for share in shares.values()], 0.27, color=colour, label=label)
    axes.axhline(1, color="#999999", linewidth=1)
    axes.set_xticks(range(len(shares)), list(shares), rotation=45, ha="right", fontsize=7)
    axes.legend(frameon=False, fontsize=7, ncols=3)


def _byte_ratios(result: _Result, figure: Any) -> None:
    ratios = {
        operation: sum(eager) / sum(ours)
        for operation, directions in _both_directions(result).items()
        for ours, eager in [tuple(zip(*directions, strict=True))]
    }
    title = "Bytes that eager PyTorch moves, over fusednn's: both directions together, counted"
    _sorted_bars(figure, ratios, title, 1, lambda ratio: ratio >= 1)


def _issue_ratios(result: _Result, figure: Any) -> None:
    """In 16 bits, where instructions weigh the most; of a call's launches the one that they bind the most."""
    ratios: dict[str, float] = {}
    for case in result["cases"]:
        if case["dtype"] == "bf16":
            name = f"{case['operation']} {case['direction']} {'x'.join(map(str, case['shape']))}"
            ratios[name] = max(case["issue_over_bytes"], ratios.get(name, 0.0))
    machine = result["settings"]["machine"]["name"]
    title = f"Time of the instructions over that of the bytes, bf16, {machine}: memory binds below {MOST_ISSUE}"
    _sorted_bars(figure, ratios, title, MOST_ISSUE, lambda ratio: ratio <= MOST_ISSUE)


def _sorted_bars(
    figure: Any, values: Mapping[str, float], title: str, limit: float, good: Callable[[float], bool]
) -> None:
    """A horizontal bar for each, the longest on top, on both sides of a ``limit``."""
    figure.set_size_inches(8, 1 + 0.14 * len(values))
    axes = _axes(figure, title, "", "")
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color="#e6e6e6", linewidth=0.8)
    ordered = sorted(values.items(), key=lambda item: item[1])
    colours = [OURS if good(value) else EAGER for _, value in ordered]
    bars = axes.barh(range(len(ordered)), [value for _, value in ordered], 0.8, color=colours)
    axes.bar_label(bars, fmt="{:.2f}", padding=2, fontsize=6)
    axes.axvline(limit, color="#999999", linewidth=1)
    axes.set_yticks(range(len(ordered)), [name for name, _ in ordered], fontsize=6)
    axes.margins(y=0.005)


def _both_directions(result: _Result) -> dict[str, list[tuple[float, float]]]:
    """Bytes, ours and eager's, in each direction of each operation's first case."""
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for (operation, _, _, _, direction), records in by_contestant(result["cases"]).items():
        if "fusednn" in records and "eager" in records:
            pair = (records["fusednn"]["bytes"], records["eager"]["bytes"])
            found.setdefault(operation, {}).setdefault(direction, pair)
    return {operation: list(pairs.values()) for operation, pairs in sorted(found.items())}
