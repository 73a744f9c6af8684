"""An argument that all losses share: the reduction, also under its deprecated names."""

import torch
from torch.nn import _reduction

__all__ = ["reduction_name", "warn_of_deprecated"]


def reduction_name(size_average: bool | None, reduce: bool | None, reduction: str) -> str:
    """``reduction``, or what the deprecated arguments say in its place; without the warning."""
    if size_average is None and reduce is None:
        return reduction
    if reduce is not None and not reduce:
        return "none"
    return "mean" if size_average is None or size_average else "sum"


def warn_of_deprecated(size_average: bool | None, reduce: bool | None) -> None:
    """Stock's warning where the deprecated arguments are used.  A compiled graph never warns."""
    if (size_average is not None or reduce is not None) and not torch.compiler.is_compiling():
        _reduction.legacy_get_string(size_average, reduce)
