"""What was done to the layers of a model, as rows and as a table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from ..table import format_table

__all__ = ["ReplacementReport", "ReplacementRow"]


@dataclass(frozen=True)
class ReplacementRow:
    """One layer: all its names in the model, its ``torch.nn`` class, and what happened to it.

    ``computed`` is what becomes of what it computes, or the neighbours do that it is the first of, where results are
    made again in the backward pass: kept for whoever consumes it, or made again.
    """

    names: tuple[str, ...]
    layer: str
    replaced: bool
    reason: str
    computed: str | None = None


@dataclass
class ReplacementReport:
    """What `replace_layers` or `restore_layers` did, a row per layer; prints as a table.

    ``untraced`` has a row for each module in whose code no neighbours could be looked for, to fuse them, and why.
    ``recompute`` says whether results are made again in the backward pass; None where that wasn't asked for.
    ``functions`` has a row for each module in whose code ours took the place of PyTorch's functions, and of which.
    """

    rows: list[ReplacementRow] = field(default_factory=list)
    untraced: list[ReplacementRow] = field(default_factory=list)
    recompute: str | None = None
    functions: list[ReplacementRow] = field(default_factory=list)

    @property
    def replaced(self) -> list[ReplacementRow]:
        return [row for row in self.rows if row.replaced]

    @property
    def left(self) -> list[ReplacementRow]:
        return [row for row in self.rows if not row.replaced]

    def __str__(self) -> str:
        head: tuple[str, ...] = ("layer", "class", "result", "reason")
        body: list[tuple[str, ...]] = [
            (_readable(row.names), row.layer, "replaced" if row.replaced else "left", row.reason) for row in self.rows
        ]
        if any(row.computed is not None for row in self.rows):
            head = (*head, "what it computes")
            body = [(*cells, row.computed or "-") for cells, row in zip(body, self.rows, strict=True)]
        table = format_table(head, body)
        lines = [table, f"{len(self.replaced)} of {len(self.rows)} layers replaced"]
        lines += [f"no neighbours fused in {line}" for line in _alike(self.untraced)]
        lines += [f"functions replaced in {line}" for line in _alike(self.functions)]
        if self.recompute is not None:
            lines.append(f"results made again in the backward pass: {self.recompute}")
            if not self.recompute.startswith("no"):
                lines.append("bytes that each layer keeps, and that are made again: fusednn.explain(model, batch)")
        return "\n".join(lines)


def _alike(rows: list[ReplacementRow]) -> Iterator[str]:
    """A line for rows that say the same of modules of the same class."""
    alike: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        alike.setdefault((row.layer, row.reason), []).append(_readable(row.names))
    for (layer, reason), names in alike.items():
        which = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} alike"
        yield f"{which} ({layer}): {reason}"


def _readable(names: tuple[str, ...]) -> str:
    return ", ".join(name or "(model)" for name in names)
