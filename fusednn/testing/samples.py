"""Calls to check, and numbers that hurt."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["EXTREMES", "FAR", "Sample", "as_samples", "random_tensor"]

#: About the knees of activations, where series take over from functions, and the zeros.
EXTREMES = [0.0, -0.0, 1e-6, -1e-6, 1e-4, -1e-4, 0.5, -0.5, 1.0, -1.0, 3.0, -3.0, 6.0, 20.0, -20.0, 30.0, -30.0]
#: Where exponentials overflow in float32, and beyond.
FAR = [88.0, -88.0, 100.0, -100.0, 1000.0, -1000.0]


@dataclass(frozen=True)
class Sample:
    """A call's arguments; of a module also its constructor's.

    Differentiated are the tensors that require gradients, or, where none does, the first one.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    init_args: tuple[Any, ...] = ()
    init_kwargs: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""

    def __str__(self) -> str:
        words = [_words(value) for value in self.args]
        words += [f"{key}={_words(value)}" for key, value in self.kwargs.items()]
        made = [_words(value) for value in self.init_args]
        made += [f"{key}={_words(value)}" for key, value in self.init_kwargs.items()]
        call = f"({', '.join(words)})"
        return self.name or (f"({', '.join(made)}){call}" if made else call)


def _words(value: Any) -> str:
    return f"{'x'.join(map(str, value.shape)) or 'scalar'}" if isinstance(value, Tensor) else repr(value)


def as_samples(given: Iterable[Sample | Tensor | tuple[Any, ...]]) -> Iterator[Sample]:
    """A tensor is a call's only argument, and a tuple are all of them."""
    for one in given:
        yield one if isinstance(one, Sample) else Sample(one if isinstance(one, tuple) else (one,))


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, device: str | torch.device, seed: int = 0) -> Tensor:
    """Normal values with a deviation of 3: both branches of every activation, and its knees."""
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(device, dtype)
