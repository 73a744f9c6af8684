"""The cases of a family of operations: each operation in each dtype, at each size."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from fusednn.benchmark.cases import Case, Operation

__all__ = ["counted", "each_size"]

_Shape = tuple[int, ...]


def each_size(
    sizes: Mapping[str, _Shape], dtypes: Iterable[torch.dtype], operations: Iterable[Operation]
) -> list[Case]:
    """Size by size, and within each dtype by dtype."""
    dtypes, operations = list(dtypes), list(operations)
    return [
        Case(operation, dtype, size, shape)
        for size, shape in sizes.items()
        for dtype in dtypes
        for operation in operations
    ]


def counted(
    operations: Iterable[Operation], dtypes: Iterable[torch.dtype], usual: _Shape, shapes: Mapping[str, _Shape] = {}
) -> list[Case]:
    """Cases whose work is counted: of the ``usual`` shape, but for the operations whose names have another."""
    dtypes = list(dtypes)
    return [
        Case(operation, dtype, "counted", shapes.get(operation.name, usual))
        for operation in operations
        for dtype in dtypes
    ]
