"""What networks keep, as tables: all of it, and the few rows of the README."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fusednn.autograd.recompute import DEPTH

from .goals import Goal, judge
from .tables import by_contestant, markdown_table

__all__ = [
    "MEMORY_COLUMNS",
    "kept_shares",
    "layers_table",
    "memory_summary",
    "memory_table",
    "missed_goals",
    "peak_table",
]

#: Contestants beside eager PyTorch, as columns.
MEMORY_COLUMNS = {
    "compile": "compiled",
    "checkpoint": "checkpointed",
    "fusednn": "fused",
    "fusednn-recompute": "made again",
}

# In the README's table.
_SHOWN = (
    *("MLP, GELU and dropout", "VGG-11", "ResNet-50", "EfficientNet-B0", "DenseNet-121"),
    *("BERT block", "GPT-2 block", "ViT block"),
)

_Result = Mapping[str, Any]


def kept_shares(result: _Result) -> dict[str, dict[str, float]]:
    """Of each network what each contestant keeps of what eager PyTorch does."""
    return {
        key[0]: {name: records[name]["kept_bytes"] / records["eager"]["kept_bytes"] for name in MEMORY_COLUMNS}
        for key, records in by_contestant(result["cases"]).items()
    }


def memory_table(result: _Result) -> str:
    """What is kept beside what others keep; by depth; and what is kept still, the largest first."""
    head = ("network", "input", "eager, MB", *MEMORY_COLUMNS.values(), "moved", "peak")
    shares = kept_shares(result)
    groups = by_contestant(result["cases"])
    rows = []
    depths = []
    census = []
    for (network, _, _, shape, _), records in groups.items():
        eager, fused, again = (records[name] for name in ("eager", "fusednn", "fusednn-recompute"))
        rows.append(
            (
                *(network, "x".join(map(str, shape)), eager["kept_bytes"] / 1e6, *shares[network].values()),
                *(again["bytes"] / fused["bytes"], again["peak_bytes"] / eager["peak_bytes"]),
            )
        )
        for name, record in sorted(records.items()):
            if name.startswith("depth") and _differs(record, again):
                depths.append((network, name.removeprefix("depth "), *_of(record, eager, fused)))
        census += [(network, maker, size / again["kept_bytes"]) for maker, size in _largest(again)]
    parts = [
        markdown_table(head, rows),
        f"### By depth, where that makes a difference; the default is {DEPTH}",
        markdown_table(("network", "depth", "kept", "moved", "peak"), depths),
        "### What is kept still, the largest first, by what made it",
        markdown_table(("network", "made by", "of all that is kept"), census),
    ]
    return "\n\n".join(parts)


def _of(record: _Result, eager: _Result, fused: _Result) -> tuple[float, float, float]:
    """Kept and peak of eager's, and moved of what is moved where all is kept."""
    return (
        record["kept_bytes"] / eager["kept_bytes"],
        record["bytes"] / fused["bytes"],
        record["peak_bytes"] / eager["peak_bytes"],
    )


def _differs(record: _Result, other: _Result) -> bool:
    return bool(record["kept_bytes"] != other["kept_bytes"])


def _largest(record: _Result) -> list[tuple[str, int]]:
    """The makers of the most of what is kept, up to nine tenths of it."""
    found, rest = [], 0.1 * record["kept_bytes"]
    left = record["kept_bytes"]
    for maker, size in record["kept_bytes_by_maker"].items():
        if left <= rest:
            break
        found.append((maker, size))
        left -= size
    return found


def peak_table(result: _Result) -> str:
    """The peak of each contestant's step, and what it holds after the forward pass, of eager PyTorch's."""
    names = {name: title for name, title in MEMORY_COLUMNS.items() if name != "compile"}
    head = ("network", "input", "eager, MB", *names.values(), *(f"held, {title}" for title in names.values()))
    rows = []
    for (network, _, _, shape, _), records in by_contestant(result["cases"]).items():
        eager = records["eager"]
        shares = (records[name][field] / eager[field] for field in ("peak_bytes", "kept_bytes") for name in names)
        rows.append((network, "x".join(map(str, shape)), eager["peak_bytes"] / 1e6, *shares))
    return markdown_table(head, rows)


def layers_table(result: _Result, networks: Sequence[str] | None = None) -> str:
    """Of these networks, or all, the layers that still keep the most where results are made again."""
    rows = [
        (case["operation"], layer or "(model)", cls, maker, f"{size / case['kept_bytes']:.3f}")
        for case in result["cases"]
        if networks is None or case["operation"] in networks
        for layer, cls, maker, size in case["kept_bytes_by_layer"]
    ]
    return markdown_table(("network", "layer", "class", "made by", "of all that is kept"), rows)


def missed_goals(result: _Result, goals: Iterable[Goal]) -> str:
    """Goals of kept and moved bytes that are missed: by how much, why, and what comes next."""
    missed = [v for v in judge([result], goals) if v.outcome == "missed"]
    return "\n".join(f"- {v.operation}: {v.value:.3f}, wanted {v.goal.wanted}: {v.goal.reason}" for v in missed)


def memory_summary(results: Sequence[_Result]) -> str:
    """The README's table, from the last result that counted memory; nothing where there is none."""
    if not results:
        return ""
    shares = kept_shares(results[-1])
    columns = {name: title for name, title in MEMORY_COLUMNS.items() if name != "checkpoint"}
    rows = [(network, *(shares[network][name] for name in columns)) for network in _SHOWN if network in shares]
    return markdown_table(("kept for the backward pass, of eager PyTorch's", *columns.values()), rows)
