"""Batch norm's operands as values: by what is normalised, what stands around that, and the running statistics."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .base.channels import Plan
from .base.launch import ACCUMULATOR
from .base.random import keep_threshold
from .functions.activation import IDENTITY, Activated, Activation

__all__ = [
    "VECTORS",
    "Around",
    "Before",
    "Norm",
    "Running",
    "as_type",
    "plan_behind",
    "spatial_of",
    "takes_halves",
]

#: Pointers to the statistics and parameters of `Norm`, as kernels take them.
VECTORS = ("mean", "variance", "weight", "bias")


class Norm(NamedTuple):
    """(x - mean) / sqrt(variance + eps) * weight + bias for each channel; without statistics x + bias."""

    mean: Tensor | None
    variance: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def parameter_type(self, dtype: torch.dtype, *others: Tensor | None) -> torch.dtype:
        """The type in which kernels for ``dtype`` take the parameters and ``others``: their own, where all share one
        that kernels are made for.
        """
        types = {vector.dtype for vector in (self.weight, self.bias, *others) if vector is not None}
        return dtype if types == {dtype} else ACCUMULATOR[dtype]

    def vectors(self, dtype: torch.dtype, parameters: torch.dtype) -> dict[str, Tensor | None]:
        """What kernels for ``dtype`` are given as `VECTORS`: the parameters in their type.

        Weight and bias are both there, or neither, but where there are no statistics.
        """
        weight, bias = self.weight, self.bias
        if self.mean is not None and weight is None and bias is not None:
            weight = torch.ones_like(bias)
        elif self.mean is not None and bias is None and weight is not None:
            bias = torch.zeros_like(weight)
        given = *as_type(ACCUMULATOR[dtype], self.mean, self.variance), *as_type(parameters, weight, bias)
        return dict(zip(VECTORS, given, strict=True))


class Running(NamedTuple):
    """Running statistics, or None; updated by ``momentum``, or with the number of ``batches`` to averages over them."""

    mean: Tensor | None
    variance: Tensor | None
    batches: Tensor | None
    momentum: float


class Before(NamedTuple):
    """What is normalised, where that isn't the input: activation(x + shift), with a shift for each channel, or none."""

    activation: Activated
    shift: Tensor | None


class Around(NamedTuple):
    """What stands around a norm: what comes ``before``, the activation behind it, and dropout behind that.

    PReLU has ``slopes``, in the type of the input.  With a ``seed``, elements are dropped with probability ``p`` < 1,
    or samples' channels as a whole, ``of_channels``, where the input is as of `fusednn.kernels.base.layout.placed`.
    """

    activation: Activated
    slopes: Tensor | None = None
    seed: Tensor | None = None
    p: float = 0.0
    of_channels: bool = False
    before: Before | None = None

    @property
    def pointers(self) -> dict[str, Tensor | None]:
        """What kernels are given of it that lies in memory."""
        return {
            "slope": None if self.slopes is None else self.slopes.contiguous(),
            "seed": self.seed,
            "shift": None if self.before is None else self.before.shift,
        }

    @property
    def row_before(self) -> Activation | None:
        """The activation before the norm, for which kernels are made."""
        return None if self.before is None else self.before.activation.row

    def spatial(self, x: Tensor) -> int | None:
        """As `spatial_of` says."""
        return spatial_of(x, self.of_channels)

    def scalars(self, x: Tensor, places: int | None = None) -> tuple[float, ...]:
        """The kernels' parameters from ``a`` to ``before_b``, those that are there."""
        first = IDENTITY if self.before is None else self.before.activation
        optional = (
            None if self.slopes is None else self.slopes.numel(),
            None if self.seed is None else keep_threshold(self.p),
            self.spatial(x),
            places,
        )
        return (
            *(self.activation.a, self.activation.b),
            *(one for one in optional if one is not None),
            *(first.a, first.b),
        )


def spatial_of(x: Tensor, of_channels: bool) -> int | None:
    """The elements of a sample's channel, if dropout drops them together."""
    return x.numel() // (x.shape[0] * x.shape[1]) if of_channels else None


def as_type(dtype: torch.dtype, *vectors: Tensor | None) -> tuple[Any, ...]:
    """These, contiguous and of this type; None stays."""
    return tuple(
        v if v is None or (v.dtype is dtype and v.is_contiguous()) else v.to(dtype).contiguous() for v in vectors
    )


def takes_halves(dtype: torch.dtype, row: Activation | None) -> bool:
    """Whether passes over what was normalised behind that activation take their tiles in halves: registers hold two
    values of each element, and of some what the activation's gradient is computed from.
    """
    return row is not None and (row.saves == "input" or dtype.itemsize > 2)


def plan_behind(dtype: torch.dtype, plan: Plan, before: Before | None) -> Plan:
    """The programs of these passes: those of ``plan``."""
    return plan.halved if before is not None and takes_halves(dtype, before.activation.row) else plan
