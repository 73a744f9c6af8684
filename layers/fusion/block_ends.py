"""Layers at the ends of blocks: those that scale (LayerScale), and those that drop samples (DropPath)."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .members import class_of, know

__all__ = ["BLOCK_ENDS", "DROP_PATHS", "SCALES", "drop_options", "drops", "join_drop_paths", "join_scales", "scale_of"]

#: What layers of a class multiply by, in a shape that broadcasts.  Registered ones join, as all of these are.
SCALES: dict[type[nn.Module], Callable[[Any], Tensor]] = {}
#: The probability that layers of a class drop a sample with, and whether by itself or all (``"row"``, ``"batch"``).
DROP_PATHS: dict[type[nn.Module], Callable[[Any], tuple[Any, str]]] = {}
#: Both.
BLOCK_ENDS: ChainMap[type[nn.Module], Callable[[Any], Any]] = ChainMap(SCALES, DROP_PATHS)


def join_scales(cls: type[nn.Module], scale_of: Callable[[Any], Tensor]) -> None:
    """Let layers of a class be the scale in a chain."""
    SCALES[cls] = scale_of
    know((cls,))


def join_drop_paths(cls: type[nn.Module], options_of: Callable[[Any], tuple[Any, str]]) -> None:
    """Let layers of a class be what drops in a chain."""
    DROP_PATHS[cls] = options_of
    know((cls,))


def scale_of(layer: nn.Module) -> Tensor:
    """What a layer of `SCALES` multiplies by."""
    return SCALES[class_of(layer)](layer)


def drop_options(layer: nn.Module) -> tuple[Any, str]:
    """Probability and mode of a layer of `DROP_PATHS`."""
    return DROP_PATHS[class_of(layer)](layer)


def drops(p: object, mode: object, training: object) -> bool:
    """Whether some samples are dropped; where all are, what is left is up to the class."""
    return training is True and isinstance(p, float | int) and 0 < p < 1 and mode in ("row", "batch")
