"""Modules whose calls change nothing, or nothing but themselves: others may be computed before or after them."""

from __future__ import annotations

from torch import nn

from ..twin import Layer, is_untouched
from .activations import ACTIVATIONS, SLOPED
from .members import is_one_of
from .trace import calls_in_order, stock_of

__all__ = ["STEADY", "is_known", "is_plain_container", "is_steady", "keeps_to_itself"]

#: Layers that change nothing, in training neither: no statistics, no random numbers.
STEADY: tuple[type[nn.Module], ...] = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.Linear, nn.LayerNorm, nn.GroupNorm, nn.Identity, nn.Flatten, nn.ZeroPad2d),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Upsample),
    *(*ACTIVATIONS, *SLOPED),
)
#: Those that change nothing in evaluation.
_STEADY_IN_EVALUATION = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd)


def is_known(module: nn.Module) -> bool:
    """Whether a module's code is PyTorch's or ours."""
    return type(module).__module__.startswith("torch.nn.") or isinstance(module, Layer)


def is_plain_container(module: nn.Module) -> bool:
    """Whether calling a module is calling its children one after another, and nothing else."""
    return isinstance(module, nn.Sequential) and calls_in_order(stock_of(module)) and is_untouched(module)


def keeps_to_itself(module: nn.Module) -> bool:
    """Whether calling a module changes nothing but the module, wherever it is called."""
    return all(
        (is_known(part) or is_plain_container(part)) and is_untouched(part) and not getattr(part, "inplace", False)
        for part in module.modules()
    )


def is_steady(module: nn.Module, *, ever: bool = True) -> bool:
    """Whether a call of a module that keeps to itself changes nothing at all: in no mode, or not in that it is in."""
    return all(
        is_plain_container(part)
        or is_one_of(part, STEADY)
        or (not (ever or part.training) and isinstance(part, _STEADY_IN_EVALUATION))
        for part in module.modules()
    )
