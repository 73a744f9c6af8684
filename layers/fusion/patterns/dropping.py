"""Dropout at the end of a chain: its layers and functions, what they are told, and how they are called apart."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from ....autograd import stock as F
from ... import dropout as _dropout  # noqa: F401 (for its twins)
from .pattern import Finder

__all__ = ["CHANNELS", "Dropping", "dropped", "dropping", "drops_channels", "options_of"]

#: A layer, or the arguments of `torch.nn.functional.dropout`: the probability, and whether to drop at all.
Dropping = nn.Module | tuple[float, bool] | None

#: Dropout of whole channels, by the number of the directions in which these extend.
CHANNELS: dict[int, type[nn.Module]] = {1: nn.Dropout1d, 2: nn.Dropout2d, 3: nn.Dropout3d}


def dropping(search: Finder, node: fx.Node, *channels: type[nn.Module]) -> Dropping:
    """The dropout that a call is, of elements or by layers of ``channels``."""
    layer = search.layer(node, nn.Dropout, *channels)
    if layer is not None or node.target is not F.dropout:
        return layer
    p, training = node.kwargs["p"], node.kwargs["training"]
    return (p, training) if isinstance(p, float | int) and isinstance(training, bool) else None


def drops_channels(drop: Dropping) -> bool:
    """Whether whole channels are dropped."""
    return isinstance(drop, tuple(CHANNELS.values()))


def options_of(drop: Dropping) -> tuple[float, bool]:
    """The probability, and whether to drop at all."""
    if not isinstance(drop, nn.Module):
        return drop or (0.0, False)
    p: Any = drop.p
    return p, drop.training


def dropped(y: Tensor, drop: Dropping) -> Tensor:
    """dropout(y) as the code calls it, apart."""
    if isinstance(drop, nn.Module):
        result: Tensor = drop(y)
        return result
    return y if drop is None else F.dropout(y, *drop)
