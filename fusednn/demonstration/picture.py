"""The loss curves, and on a GPU time and memory of a step."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .report import difference
from .training import Comparison

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["FUSED_COLOUR", "STOCK_COLOUR", "draw"]

STOCK_COLOUR = "#f8c48a"
FUSED_COLOUR = "#1f3a5f"


def draw(comparison: Comparison, path: Path) -> None:
    """Write a PNG."""
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state

    bars = _bars(comparison)
    figure = Figure(figsize=(8 + 2 * len(bars), 4.8), dpi=150, layout="constrained")
    losses, *others = figure.subplots(1, 1 + len(bars), width_ratios=[4] + [1] * len(bars), squeeze=False)[0]
    _draw_losses(losses, comparison)
    for axes, (title, values) in zip(others, bars, strict=True):
        axes.bar(["stock", "fusednn"], values, color=[STOCK_COLOUR, FUSED_COLOUR])
        axes.bar_label(axes.containers[0], fmt="{:.3g}", padding=2)
        axes.set_title(title, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def _draw_losses(axes: Axes, comparison: Comparison) -> None:
    """Both curves, a broad pale one under a thin dark one: both show where they coincide."""
    from matplotlib.ticker import LogLocator, NullLocator

    steps = range(1, len(comparison.stock.losses) + 1)
    axes.plot(steps, comparison.stock.losses, color=STOCK_COLOUR, linewidth=4.5, label="stock: torch.nn, torch.optim")
    axes.plot(steps, comparison.fused.losses, color=FUSED_COLOUR, linewidth=1.1, label="fusednn")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("training step")
    axes.set_ylabel("cross-entropy loss (log scale)")
    axes.set_title("A CNN on handwritten digits, trained twice", loc="left", fontweight="bold", pad=22)
    subtitle = f"{difference(comparison)}  ·  {comparison.device}"
    axes.text(0, 1.02, subtitle, transform=axes.transAxes, fontsize=9, color="#555555")
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def _bars(comparison: Comparison) -> list[tuple[str, list[float]]]:
    """Of a GPU, where they mean something: a title and both networks' figures."""
    both = comparison.stock, comparison.fused
    peaks = [training.peak_bytes for training in both if training.peak_bytes is not None]
    if len(peaks) < len(both):
        return []
    return [
        ("time a step, ms", [1e3 * training.wall_seconds for training in both]),
        ("peak memory of a step, KiB", [peak / 2**10 for peak in peaks]),
    ]
