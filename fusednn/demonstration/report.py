"""What the demo prints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby

from .. import kernels
from ..layers import Explanation, ExplanationRow
from ..layers.table import format_table
from .training import LEARNING_RATE, MOMENTUM, Comparison, Training

__all__ = ["details", "difference", "introduction", "summary"]


def introduction() -> str:
    """What is trained, and what the two lines are that differ."""
    return (
        "A CNN learns scikit-learn's handwritten digits, twice and in turns: as it is, and after\n\n"
        "    fusednn.replace_layers(model, fuse=True)\n"
        f"    optimizer = fusednn.optim.SGD(model.parameters(), lr={LEARNING_RATE}, momentum={MOMENTUM})\n"
    )


def summary(comparison: Comparison) -> str:
    """Device, what was fused where kernels ran, figures and verdict."""
    scale = comparison.scale
    parts = [f"{scale.steps} steps of {scale.batch_size} images on {comparison.device}", _figures(comparison)]
    if comparison.runs_kernels:
        parts.insert(1, _computed(comparison.explanation))
    else:
        reasons = {row.reason for row in comparison.explanation if row.operation != "-"}
        parts.insert(1, f"PyTorch's own operators for every layer: {', '.join(sorted(reasons))}")
    return "\n\n".join([*parts, difference(comparison)])


def details(comparison: Comparison) -> str:
    """What was done to each layer, the path of each, and each step's losses."""
    losses = zip(comparison.stock.losses, comparison.fused.losses, strict=True)
    rows = [(str(step), f"{a:.7f}", f"{b:.7f}", f"{abs(a - b) / abs(a):.1e}") for step, (a, b) in enumerate(losses, 1)]
    return "\n".join(
        [
            f"fusednn.replace_layers(model, fuse=True)\n{comparison.replacement}",
            f"\nfusednn.explain(model, images, labels)\n{comparison.explanation}",
            f"\n{format_table(('step', 'stock loss', 'fusednn loss', 'relative difference'), rows)}",
        ]
    )


def difference(comparison: Comparison) -> str:
    """The largest difference between the two curves, in a sentence."""
    largest, step = comparison.largest_difference
    if largest == 0:
        return "The losses are identical, bit for bit"
    return f"The losses differ by at most {largest:.2g}, in step {step}"


def _computed(explanation: Explanation) -> str:
    """A row for each layer, or layers that are computed together: by which kernel, or why by none."""
    rows = []
    for chain in _chains(explanation):
        layers = " + ".join(name for name, _ in groupby(row.layer for row in chain))
        operations = ", ".join(row.operation for row in chain if row.path == "kernel")
        reasons = ", ".join(row.reason for row in chain if row.path in ("stock", "apart"))
        rows.append((layers, operations or "-", reasons))
    return format_table(("layers", "kernel", "what is PyTorch's, and why"), rows)


def _chains(explanation: Explanation) -> Iterator[list[ExplanationRow]]:
    chain: list[ExplanationRow] = []
    for row in explanation:
        if chain and row.path != "fused" and row.name != chain[0].name:
            yield chain
            chain = []
        chain.append(row)
    yield chain


def _figures(comparison: Comparison) -> str:
    def row(name: str, figure: Callable[[Training], str]) -> tuple[str, str, str]:
        return name, figure(comparison.stock), figure(comparison.fused)

    rows = [
        row("last loss", lambda training: f"{training.losses[-1]:.6f}"),
        row("test accuracy", lambda training: f"{training.accuracy:.1%}"),
    ]
    if not (comparison.runs_kernels and kernels.ON_CPU):  # the time of what stands in for a GPU means nothing
        rows += [
            row("CPU time a step", lambda training: f"{training.cpu_seconds * 1e3:.2f} ms"),
            row("wall time a step", lambda training: f"{training.wall_seconds * 1e3:.2f} ms"),
        ]
    rows.append(row("kept for the backward pass", lambda training: f"{training.kept_bytes / 2**10:.0f} KiB"))
    if comparison.stock.peak_bytes is not None:
        rows.append(row("peak memory of a step", lambda training: f"{(training.peak_bytes or 0) / 2**10:.0f} KiB"))
    return format_table(("", "stock", "fusednn"), rows)
