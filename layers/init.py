"""Initialisers for weights whose first dimension is the pieces of a maxout layer.

Each piece is an ordinary layer and is initialised as one: ``torch.nn.init`` on the whole weight would take the pieces
for features, and get the fans wrong.  With kernel elements the number of weights in a convolution's kernel (1 in a
linear layer), fan_in = in_features * kernel elements and fan_out = out_features * kernel elements.

All work in place, on (pieces, out_features, in_features, *kernel), and return the weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["glorot_normal_", "glorot_uniform_", "he_normal_", "he_uniform_"]


def glorot_uniform_(weight: Tensor, gain: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
    """Uniform in [-a, a] with a = gain sqrt(6 / (fan_in + fan_out)).

    Raises ValueError where the weight has fewer than three dimensions.  Source: Glorot and Bengio, "Understanding the
    Difficulty of Training Deep Feedforward Neural Networks" (AISTATS 2010).
    """
    return _each_piece(nn.init.xavier_uniform_, weight, gain=gain, generator=generator)


def glorot_normal_(weight: Tensor, gain: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
    """Normal with mean 0 and deviation gain sqrt(2 / (fan_in + fan_out)).

    Raises ValueError where the weight has fewer than three dimensions.  Source: Glorot and Bengio, "Understanding the
    Difficulty of Training Deep Feedforward Neural Networks" (AISTATS 2010).
    """
    return _each_piece(nn.init.xavier_normal_, weight, gain=gain, generator=generator)


def he_uniform_(
    weight: Tensor,
    a: float = 0,
    mode: str = "fan_in",
    nonlinearity: str = "leaky_relu",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Uniform in [-b, b] with b = gain sqrt(3 / fan), the fan that ``mode`` names and the gain of ``nonlinearity``.

    Arguments as `torch.nn.init.kaiming_uniform_`'s.  Raises ValueError where the weight has fewer than three
    dimensions.  Source: He, Zhang, Ren, Sun, "Delving Deep into Rectifiers" (ICCV 2015).
    """
    return _each_piece(nn.init.kaiming_uniform_, weight, a=a, mode=mode, nonlinearity=nonlinearity, generator=generator)


def he_normal_(
    weight: Tensor,
    a: float = 0,
    mode: str = "fan_in",
    nonlinearity: str = "leaky_relu",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Normal with mean 0 and deviation gain / sqrt(fan), the fan that ``mode`` names and the gain of ``nonlinearity``.

    Arguments as `torch.nn.init.kaiming_normal_`'s.  Raises ValueError where the weight has fewer than three
    dimensions.  Source: He, Zhang, Ren, Sun, "Delving Deep into Rectifiers" (ICCV 2015).
    """
    return _each_piece(nn.init.kaiming_normal_, weight, a=a, mode=mode, nonlinearity=nonlinearity, generator=generator)


def _each_piece(initialise: Callable[..., Tensor], weight: Tensor, **options: Any) -> Tensor:
    if weight.dim() < 3:
        raise ValueError(f"a maxout weight is (pieces, out_features, in_features, *), not {tuple(weight.shape)}")
    with torch.no_grad():
        for piece in weight:
            initialise(piece, **options)
    return weight
