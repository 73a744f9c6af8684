"""Layers as libraries that aren't installed write them, with the twins of theirs: for tests of what these compute."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fusednn.layers.fusion.activations import ACTIVATIONS
from fusednn.layers.fusion.block_ends import DROP_PATHS, SCALES
from fusednn.layers.fusion.norms import IMAGE_NORMS, NORMS
from fusednn.layers.replacement import register
from fusednn.layers.twin import OTHER_TWINS

__all__ = ["Activated", "DropPath", "Frozen", "FrozenActivated", "Scale", "stand_in"]

#: Where the twins of these classes are registered, and what is registered with them.
_THEIRS = {
    "Activated": "timm.layers.norm_act.BatchNormAct2d",
    "DropPath": "timm.layers.drop.DropPath",
    "Frozen": "torchvision.ops.misc.FrozenBatchNorm2d",
    "FrozenActivated": "timm.layers.norm_act.FrozenBatchNormAct2d",
    "Scale": "timm.layers.layer_scale.LayerScale",
}


@contextmanager
def stand_in() -> Iterator[None]:
    """These classes have the twins of the libraries' own."""
    tables = (register._registered, OTHER_TWINS, ACTIVATIONS, IMAGE_NORMS, NORMS, SCALES, DROP_PATHS)
    known = [dict(table) for table in tables]
    for name, theirs in _THEIRS.items():
        register._registered[f"{__name__}.{name}"] = register._registered[theirs]._replace(fingerprints=())
    try:
        yield
    finally:
        for table, before in zip(tables, known, strict=True):
            table.clear()
            table.update(before)


class Frozen(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.eps = 1e-5
        for name, first, last in (("weight", -1, 2), ("bias", 1, -1), ("running_mean", 0, 1), ("running_var", 1, 3)):
            self.register_buffer(name, torch.linspace(first, last, features))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, mean, variance = (one.view(1, -1, 1, 1) for one in self.buffers())
        scale = weight * (variance + self.eps).rsqrt()
        return x * scale + (bias - mean * scale)


class _Activating(nn.Module):
    """First among the bases of a norm, behind which it drops and activates."""

    def __init__(self, features: int, act: nn.Module) -> None:
        super().__init__(features)
        self.drop, self.act = nn.Identity(), act

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.act(self.drop(super().forward(x)))
        return result


class FrozenActivated(_Activating, Frozen):
    """A frozen norm."""


class Activated(_Activating, nn.BatchNorm2d):
    """A batch norm."""


class Scale(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.gamma, self.inplace = nn.Parameter(torch.linspace(-1, 1, features)), False

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(self.gamma) if self.inplace else x * self.gamma


class DropPath(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.drop_prob, self.scale_by_keep = p, True

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and self.drop_prob):
            return x
        keep = 1 - self.drop_prob
        kept = x.new_empty([len(x), *[1] * (x.dim() - 1)]).bernoulli_(keep)
        return x * (kept / keep if keep and self.scale_by_keep else kept)
