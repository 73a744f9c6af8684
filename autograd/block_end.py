"""What stands at the end of a residual network's block: a scale, a sample's chance to be dropped, and the residual.

Touvron et al., "Going Deeper with Image Transformers" (ICCV 2021), which names LayerScale; Huang et al., "Deep Networks
with Stochastic Depth" (ECCV 2016), also known as drop path.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..kernels import block_end as kernels
from ..kernels.base.launch import ACCUMULATOR
from ..kernels.base.layout import is_dense
from ..kernels.base.random import with_seed
from .decisions import decided_once
from .dispatch import or_stock, takes_kernel
from .function import Function
from .operators import operator
from .recompute import needs

__all__ = ["block_end", "by_kernels"]


def _fake_forward(x: Tensor, residual: Tensor | None, scale: Tensor | None, *_: Any) -> Tensor:
    result = next((one.dtype for one in (residual, scale) if one is not None), x.dtype)
    return torch.empty_like(x, dtype=result)


_forward = operator(
    "block_end(Tensor x, Tensor? residual, Tensor? scale, Tensor? seed, float p, int dim, SymInt samples) -> Tensor",
    fake=_fake_forward,
)(kernels.block_end_forward)


@operator(
    "block_end_backward(Tensor g, Tensor? x, Tensor? scale, Tensor? seed, SymInt[] strides, ScalarType dtype, float p,"
    " int dim, SymInt samples) -> (Tensor, Tensor)",
    fake=lambda g, x, scale, seed, strides, dtype, p, dim, samples: (
        g.new_empty_strided(g.shape, strides, dtype=dtype),
        g.new_empty(0 if x is None else kernels.sums_shape(g.shape, strides, dim), dtype=ACCUMULATOR[dtype]),
    ),
)
def _backward(g: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    dx, partial = kernels.block_end_backward(g, *arguments)
    return dx, dx.new_empty(0, dtype=ACCUMULATOR[dx.dtype]) if partial is None else partial


class BlockEnd(Function):
    """Saves the scale and the seed, and the input where the scale learns; one pass gives both gradients."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, scale: Tensor | None, seed: Tensor | None, *options: Any
    ) -> Tensor:
        y: Tensor = _forward(x, residual, None if scale is None else scale.view(-1), seed, *options)
        learns = ctx.needs_input_grad[2]
        ctx.save_for_backward(x if learns else None, scale, seed)
        needs(ctx, residual, None if learns else x)
        ctx.strides, ctx.dtype = y.stride(), x.dtype
        ctx.options = options  # probability, dimension and samples
        return y

    @staticmethod
    def recipe(ctx: Any) -> Callable[..., Tensor]:
        options = ctx.options

        def again(
            x: Tensor | None, scale: Tensor | None, seed: Tensor | None, residual: Tensor | None, input: Tensor | None
        ) -> Tensor:
            flat = None if scale is None else scale.view(-1)
            y: Tensor = _forward(input if x is None else x, residual, flat, seed, *options)
            return y

        return again

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, seed = ctx.saved_tensors
        needs_dx, needs_dr, needs_dscale = ctx.needs_input_grad[:3]
        dx: Tensor | None = None
        dscale: Tensor | None = None
        if torch.is_grad_enabled():  # in operators that can be differentiated again
            noisy = g if seed is None else g * _noise(g, seed, *ctx.options)
            dx = (noisy if scale is None else noisy * scale).to(ctx.dtype)
            dscale = (noisy * x).sum_to_size(scale.shape) if needs_dscale else None
        elif needs_dx or needs_dscale:
            flat = None if scale is None else scale.view(-1)
            dx, partial = _backward(g, x, flat, seed, ctx.strides, ctx.dtype, *ctx.options)
            dscale = partial.sum((-3, -1)).to(scale.dtype).view(scale.shape) if needs_dscale else None
        return dx if needs_dx else None, g if needs_dr else None, dscale, None, None, None, None


def _noise(g: Tensor, seed: Tensor, p: float, dim: int, samples: int) -> Tensor:
    """What each sample was multiplied by, broadcastable to the gradient."""
    noise: Tensor = _forward(g.new_ones(samples, *[1] * (g.dim() - 1)), None, None, seed, p, 0, samples)
    return noise


@or_stock
def block_end(
    input: Tensor,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    p: float = 0.0,
    training: bool = True,
    mode: str = "row",
) -> Tensor:
    """drop(scale * input) + residual in one kernel each way: LayerScale, stochastic depth, and the sum behind them.

    What is kept is divided by 1 - p; what is dropped leaves the residual.  The sums are not rounded in between.

    Args:
        input: at least one dimension, the first that of samples; float16, bfloat16, float32 or float64.
        residual: of the input's shape, or None.
        scale: one number for each element of one of the other dimensions, in a shape that broadcasts to the input's:
            (C,) for (N, L, C), (C, 1, 1) for (N, C, H, W); or None.
        p: probability to drop.
        training: whether to drop at all.
        mode: ``"row"``, where each sample is dropped by itself, or ``"batch"``, all or none: as of torchvision's
            ``stochastic_depth``, which draws other random numbers.

    Beside 16-bit inputs, scale and residual may be float32, as where autocast computed the input, and then
    the result is.
    Saves the scale and a seed, and the input where the scale requires gradients.  Raises ValueError for other modes and
    where p is no probability.
    """
    if mode not in ("row", "batch"):
        raise ValueError(f"mode has to be either 'row' or 'batch', not {mode!r}")
    if not 0 <= p <= 1:
        raise ValueError(f"p has to be a probability, not {p}")
    y: Tensor | None = by_kernels(input, residual, scale, p, training, mode)
    return _by_stock(input, residual, scale, p, training, mode) if y is None else y


@decided_once
def by_kernels(
    input: Tensor, residual: Tensor | None, scale: Tensor | None, p: float, training: bool, mode: str
) -> Callable[..., Tensor | None]:
    """`block_end` by its kernels, or None where these don't take it."""
    others = [one for one in (residual, scale) if one is not None]
    if not takes_kernel(
        "block_end", input, parameters=others, refusal=lambda: _refusal(input, residual, scale, p, training)
    ):
        return lambda *_: None
    drops = training and p > 0
    options = (float(p), 0 if scale is None else _dim(scale, input), len(input) if mode == "row" else 1)
    differentiable = torch.is_grad_enabled() and any(one.requires_grad for one in (input, *others))

    def compute(seed: Tensor | None, input: Tensor, residual: Tensor | None, scale: Tensor | None) -> Tensor:
        y: Tensor
        if differentiable:
            y = BlockEnd.apply(input, residual, scale, seed, *options)
        else:
            y = _forward(input, residual, None if scale is None else scale.view(-1), seed, *options)
        return y

    def apply(input: Tensor, residual: Tensor | None, scale: Tensor | None, *_: object) -> Tensor:
        if not drops:
            return compute(None, input, residual, scale)
        return with_seed(input.device, lambda seed: compute(seed, input, residual, scale))

    return apply


def _refusal(input: Tensor, residual: Tensor | None, scale: Tensor | None, p: object, training: object) -> str | None:
    if type(training) is not bool or not isinstance(p, float | int):
        return "p or training is not a Python value"
    drops = training and p > 0
    if scale is None and not drops:
        return "nothing but a sum"
    if not input.dim() or not input.numel():
        return "no elements, or no samples"
    if residual is not None and residual.shape != input.shape:
        return "the residual is of another shape"
    if scale is not None and not _dim(scale, input):
        return "the scale is not one number for each element of a dimension behind the first"
    if drops and is_dense(input) and not kernels.has_samples(input):
        return "samples don't lie one after another"
    return None


def _dim(scale: Tensor, input: Tensor) -> int:
    """The dimension of the input that the scale lies along; 0 where it lies along none, or several."""
    sizes = [1] * (input.dim() - scale.dim()) + list(scale.shape)
    along = [dim for dim, size in enumerate(sizes) if size > 1]
    return along[0] if len(along) == 1 and len(sizes) == input.dim() and sizes[along[0]] == input.shape[along[0]] else 0


def _by_stock(
    input: Tensor, residual: Tensor | None, scale: Tensor | None, p: float, training: bool, mode: str
) -> Tensor:
    y = input if scale is None else input * scale
    if training and p > 0:
        samples = len(y) if mode == "row" else 1
        noise = y.new_empty(samples, *[1] * (y.dim() - 1)).bernoulli_(1 - p)
        y = y * (noise.div_(1 - p) if p < 1 else noise)
    return y if residual is None else y + residual
