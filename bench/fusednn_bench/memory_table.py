"""What networks keep, as tables: all of it, and the few rows of the README."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .tables import by_contestant, markdown_table

__all__ = ["MEMORY_COLUMNS", "kept_shares", "memory_summary", "memory_table"]

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
    head = ("network", "input", "eager, MB", *MEMORY_COLUMNS.values(), "moved")
    shares = kept_shares(result)
    rows = [
        (
            key[0],
            "x".join(map(str, key[3])),
            records["eager"]["kept_bytes"] / 1e6,
            *shares[key[0]].values(),
            records["fusednn-recompute"]["bytes"] / records["fusednn"]["bytes"],
        )
        for key, records in by_contestant(result["cases"]).items()
    ]
    return markdown_table(head, rows)


def memory_summary(results: Sequence[_Result]) -> str:
    """The README's table, from the last result that counted memory; nothing where there is none."""
    if not results:
        return ""
    shares = kept_shares(results[-1])
    columns = {name: title for name, title in MEMORY_COLUMNS.items() if name != "checkpoint"}
    rows = [(network, *(shares[network][name] for name in columns)) for network in _SHOWN if network in shares]
    return markdown_table(("kept for the backward pass, of eager PyTorch's", *columns.values()), rows)
