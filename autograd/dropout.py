"""Dropout with the signatures of ``torch.nn.functional``: six functions, one operation.

Nothing is saved but a seed of 8 bytes: the backward pass draws the same mask again.  The numbers obey
``torch.manual_seed``, but are others than stock draws.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..kernels import dropout as kernels
from ..kernels.base.layout import is_dense
from ..kernels.base.random import with_seed
from . import stock as F
from .decisions import decided_once
from .dispatch import or_stock, takes_kernel
from .gradients import LinearGradient
from .operators import operator
from .recompute import needs

__all__ = ["alpha_dropout", "dropout", "dropout1d", "dropout2d", "dropout3d", "feature_alpha_dropout"]

# Elements that share the indices of the first ``shared_dims`` dimensions have one random number; 0: each its own.


_forward = operator(
    "dropout(Tensor x, Tensor seed, float p, bool alpha, int shared_dims) -> Tensor",
    fake=lambda x, *_: torch.empty_like(x),
)(kernels.dropout_forward)


@operator(
    "dropout_(Tensor(a!) x, Tensor seed, float p, bool alpha, int shared_dims) -> ()",
    fake=lambda x, seed, p, alpha, shared_dims: None,
)
def _forward_inplace(x: Tensor, seed: Tensor, p: float, alpha: bool, shared_dims: int) -> None:
    kernels.dropout_forward(x, seed, p, alpha, shared_dims, inplace=True)


_backward = operator(
    "dropout_backward(Tensor g, Tensor seed, SymInt[] strides, float p, bool alpha, int shared_dims) -> Tensor",
    fake=lambda g, seed, strides, *_: g.new_empty_strided(g.shape, strides),
)(kernels.dropout_backward)


def dropout_gradient(g: Tensor, seed: Tensor, *arguments: Any) -> Tensor:
    """``arguments``: strides, p, alpha and shared_dims."""
    dx: Tensor
    if torch.is_grad_enabled():
        dx = LinearGradient.apply(g, None, seed, lambda g, _, *rest: _backward(g, *rest), arguments)
    else:
        dx = _backward(g, seed, *arguments)
    return dx


class Dropout(Function):
    """Saves the seed alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seed: Tensor, p: float, alpha: bool, shared_dims: int, inplace: bool) -> Tensor:
        if inplace:
            _forward_inplace(x, seed, p, alpha, shared_dims)
            ctx.mark_dirty(x)
            y = x
        else:
            y = _forward(x, seed, p, alpha, shared_dims)
            needs(ctx, x)
        ctx.save_for_backward(seed)
        ctx.arguments = (y.stride(), p, alpha, shared_dims)
        return y

    @staticmethod
    def recipe(ctx: Any) -> Callable[..., Tensor]:
        _, *options = ctx.arguments
        return lambda seed, x: _forward(x, seed, *options)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (seed,) = ctx.saved_tensors
        return dropout_gradient(g, seed, *ctx.arguments), None, None, None, None, None


def probability_refusal(p: object, training: object) -> str | None:
    """Why no kernel drops with probability ``p``, or None: without dropout, stock returns its input."""
    if training is not True:
        return "the identity in evaluation" if training is False else "training is not a boolean"
    if not isinstance(p, float | int):
        return "p is not a Python number"
    return None if 0 < p <= 1 else "the identity, as p is 0" if p == 0 else "p is not a probability"


def apply_dropout(
    input: Tensor, p: float, inplace: bool, alpha: bool = False, shared_dims: int = 0, seed: Tensor | None = None
) -> Tensor:
    """Apply the kernel with a fresh seed, or a given one, differentiably where the input requires gradients."""
    if inplace and (torch.compiler.is_compiling() or input._is_view() or not is_dense(input)):
        # Tracers fold copies away; a view's base needs PyTorch's own bookkeeping; strided memory needs the copy.
        return input.copy_(apply_dropout(input, p, False, alpha, shared_dims, seed))
    if seed is None:
        return with_seed(input.device, lambda seed: apply_dropout(input, p, inplace, alpha, shared_dims, seed))
    p = float(p)
    if inplace or (torch.is_grad_enabled() and input.requires_grad):
        y: Tensor = Dropout.apply(input, seed, p, alpha, shared_dims, inplace)
    else:
        y = _forward(input, seed, p, alpha, shared_dims)
    return input if inplace else y  # without gradients a function returns another tensor


@or_stock
def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """x / (1 - p) where an element is kept, 0 where it is dropped, with probability ``p``; x itself in evaluation.

    As `torch.nn.functional.dropout`, with a mask of other random numbers.  Any shape; saves a seed.  Source: Srivastava
    et al., "Dropout: A Simple Way to Prevent Neural Networks from Overfitting" (JMLR 2014).
    """
    if not _takes("dropout", input, p, training, inplace):
        return F.dropout(input, p, training, inplace)
    return apply_dropout(input, p, inplace)


@or_stock
def alpha_dropout(input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False) -> Tensor:
    """a x' + b, where x' is x where an element is kept, SELU's negative saturation -1.758... where it is dropped.

    a = ((1 + 1.758...^2 p) (1 - p))^(-1/2) and b = 1.758... a p keep mean 0 and variance 1; p = 1 gives 0.  As
    `torch.nn.functional.alpha_dropout`, with a mask of other random numbers.  Any shape; saves a seed.  Source:
    Klambauer, Unterthiner, Mayr, Hochreiter, "Self-Normalizing Neural Networks" (NeurIPS 2017).
    """
    if not _takes("alpha_dropout", input, p, training, inplace):
        return F.alpha_dropout(input, p, training, inplace)
    return apply_dropout(input, p, inplace, alpha=True)


@or_stock
def dropout1d(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """`dropout` of whole channels: (N, C, L) or (C, L), with one random number for each of the N C channels.

    As `torch.nn.functional.dropout1d`, with a mask of other random numbers.  Saves a seed.  Source: Tompson et al.,
    "Efficient Object Localization Using Convolutional Networks" (CVPR 2015).
    """
    if not _takes("dropout1d", input, p, training, inplace, (2, 3)):
        return F.dropout1d(input, p, training, inplace)
    return apply_dropout(input, p, inplace, shared_dims=input.dim() - 1)


@or_stock
def dropout2d(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """`dropout` of whole channels: (N, C, H, W), with one random number for each of the N C channels.

    As `torch.nn.functional.dropout2d`, with a mask of other random numbers; other shapes go to stock, which warns of
    them.  Saves a seed.  Source: Tompson et al., "Efficient Object Localization Using Convolutional Networks" (CVPR
    2015).
    """
    if not _takes("dropout2d", input, p, training, inplace, (4,)):
        return F.dropout2d(input, p, training, inplace)
    return apply_dropout(input, p, inplace, shared_dims=2)


@or_stock
def dropout3d(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """`dropout` of whole channels: (N, C, D, H, W) or (C, D, H, W), with one random number for each of the channels.

    As `torch.nn.functional.dropout3d`, with a mask of other random numbers; other shapes go to stock, which warns of
    them.  Saves a seed.  Source: Tompson et al., "Efficient Object Localization Using Convolutional Networks" (CVPR
    2015).
    """
    if not _takes("dropout3d", input, p, training, inplace, (4, 5)):
        return F.dropout3d(input, p, training, inplace)
    return apply_dropout(input, p, inplace, shared_dims=input.dim() - 3)


@or_stock
def feature_alpha_dropout(input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False) -> Tensor:
    """`alpha_dropout` of whole channels: (N, C, *), with one random number for each of the N C channels.

    As `torch.nn.functional.feature_alpha_dropout`, with a mask of other random numbers.  Saves a seed.  Source:
    Klambauer, Unterthiner, Mayr, Hochreiter, "Self-Normalizing Neural Networks" (NeurIPS 2017).
    """
    if not _takes("feature_alpha_dropout", input, p, training, inplace, (), 2):
        return F.feature_alpha_dropout(input, p, training, inplace)
    return apply_dropout(input, p, inplace, alpha=True, shared_dims=2)


def _takes(
    name: str,
    input: Tensor,
    p: float,
    training: bool,
    inplace: bool,
    dimensions: tuple[int, ...] = (),
    least: int = 0,
) -> bool:
    """Whether a kernel takes the input, which has one of these numbers of dimensions; (): ``least`` or more."""
    takes: bool
    if inplace:
        takes = takes_kernel(name, input, inplace=True, refusal=lambda: _refusal(input, p, training, dimensions, least))
    else:
        takes = _takes_apart(name, input, p, training, dimensions, least)
    return takes


@decided_once
def _takes_apart(
    name: str, input: Tensor, p: float, training: bool, dimensions: tuple[int, ...], least: int
) -> Callable[..., bool]:
    """`_takes`, as a function, of a result that is a new tensor."""
    takes = takes_kernel(name, input, refusal=lambda: _refusal(input, p, training, dimensions, least))
    return lambda *_: takes


def _refusal(input: Tensor, p: object, training: object, dimensions: tuple[int, ...], least: int) -> str | None:
    if refusal := probability_refusal(p, training):
        return refusal
    fits = input.dim() in dimensions if dimensions else input.dim() >= least
    return None if fits else f"{input.dim()} dimensions"
