"""The output layer and its cross-entropy in one, which never holds all logits.

The batch is worked through in chunks: logits by a matrix product, their losses and gradient by the kernels of
`cross_entropy` (whose gradient overwrites the logits), and from it the gradients of the layer's input, weight and bias.
Beside these, memory holds the logits of one chunk, which are no more than the larger of the layer's operands.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.base.launch import ACCUMULATOR
from ..kernels.cross_entropy import Reduction, cross_entropy_backward, cross_entropy_forward
from . import stock as F

__all__ = ["LossAndGradients", "Options", "chunk_rows", "chunked_cross_entropy"]

# Rows that keep a matrix product busy.
_ENOUGH_ROWS = 1024


class Options(NamedTuple):
    """What the loss is: class weights, reduction, the ignored index, label smoothing."""

    weight: Tensor | None
    reduction: Reduction
    ignore_index: int
    smoothing: float


class LossAndGradients(NamedTuple):
    """The loss; and the gradients of input, weight and bias, None where they weren't asked for."""

    loss: Tensor
    input_gradient: Tensor | None
    weight_gradient: Tensor | None
    bias_gradient: Tensor | None


# Of a chunk: the losses, or their sum, in the accumulator's dtype; and for ``g``, their gradient, or that of their sum,
# the gradient of the logits, which may overwrite them.


def _kernel_losses(logits: Tensor, target: Tensor, g: Tensor | None, options: Options) -> tuple[Tensor, Tensor | None]:
    weight, reduction, ignore_index, smoothing = options
    accumulator = ACCUMULATOR[logits.dtype]
    loss, statistics, total = cross_entropy_forward(
        logits, target, weight, reduction, ignore_index, smoothing, accumulator
    )
    if g is None:
        return loss, None
    dlogits, _ = cross_entropy_backward(
        *(g, logits, target, weight, statistics, total, reduction, ignore_index, smoothing),
        (True, False),
        overwrite=True,
    )
    return loss, dlogits


def _stock_losses(logits: Tensor, target: Tensor, g: Tensor | None, options: Options) -> tuple[Tensor, Tensor | None]:
    weight, reduction, ignore_index, smoothing = options
    with torch.enable_grad():
        logits = logits.detach().requires_grad_(g is not None)
        loss = F.cross_entropy(
            logits.to(ACCUMULATOR[logits.dtype]),
            target if not target.is_floating_point() else target.to(ACCUMULATOR[logits.dtype]),
            None if weight is None else weight.to(ACCUMULATOR[logits.dtype]),
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=smoothing,
        )
    return loss.detach(), None if g is None else torch.autograd.grad(loss, logits, g)[0]


def chunk_rows(rows: int, features: int, outputs: int) -> int:
    """Rows of a chunk: as many as have logits the size of the input; at least a good matrix product's, or ``features``.

    The logits of so many rows are no more than the input (rows x features) or the weight (outputs x features).
    """
    return min(rows, max(rows * features // outputs, min(features, _ENOUGH_ROWS), 1))


def chunked_cross_entropy(
    x: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    g: Tensor | None,
    options: Options,
    dtype: torch.dtype,
    needed: Sequence[bool],
    *,
    by_kernels: bool,
) -> LossAndGradients:
    """Cross-entropy of ``linear(x, linear_weight, linear_bias)`` in ``dtype``, and its gradients.

    Args:
        x: (N, features).
        linear_weight: (C, d1, ..., features).
        linear_bias: (C, d1, ...), or None.
        target: class indices (N, d1, ...), or probabilities (N, C, d1, ...).
        g: the gradient of the loss; None for 1.
        options: of the loss.
        dtype: of the loss.
        needed: whether input, weight and bias want gradients.
        by_kernels: losses by our kernels, or by PyTorch's operators.
    """
    features = x.shape[1]
    matrix = linear_weight.reshape(-1, features)
    vector = None if linear_bias is None else linear_bias.reshape(-1)
    accumulator = ACCUMULATOR[x.dtype]
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if needed[0] else None
    dmatrix = torch.zeros(matrix.shape, dtype=accumulator, device=x.device) if needed[1] else None
    dvector = torch.zeros(matrix.shape[0], dtype=accumulator, device=x.device) if needed[2] else None

    divisor = None
    if options.reduction == "mean":
        divisor = _sum_of_weights(x, linear_weight, target, options)
        options = options._replace(reduction="sum")
    if any(needed):
        g = torch.ones((), dtype=accumulator, device=x.device) if g is None else g.to(accumulator)
        g = g if divisor is None else g / divisor
    else:
        g = None

    losses = _kernel_losses if by_kernels else _stock_losses
    results = []
    rows = chunk_rows(x.shape[0], features, matrix.shape[0])
    for first in range(0, x.shape[0], rows):
        chunk = slice(first, first + rows)
        logits = F.linear(x[chunk], matrix, vector).view(-1, *linear_weight.shape[:-1])
        g_chunk = g[chunk] if g is not None and g.dim() else g
        loss, dlogits = losses(logits, target[chunk], g_chunk, options)
        results.append(loss)
        if dlogits is None:
            continue
        dlogits = dlogits.view(-1, matrix.shape[0])
        if dx is not None:
            torch.mm(dlogits, matrix, out=dx[chunk])
        if dmatrix is not None:
            _add_product(dmatrix, dlogits.t(), x[chunk])
        if dvector is not None:
            dvector += dlogits.sum(0, dtype=accumulator)
        del logits, dlogits  # before the next chunk's are made
    if options.reduction == "none":
        loss = torch.cat(results)
    else:
        loss = torch.stack(results).sum()
        loss = loss if divisor is None else loss / divisor
    return LossAndGradients(
        loss.to(dtype),
        dx,
        None if dmatrix is None else dmatrix.to(x.dtype).view(linear_weight.shape),
        None if dvector is None else dvector.to(x.dtype).view(linear_weight.shape[:-1]),
    )


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b``; chunks are added in the accumulator's type, which may be wider than the product's."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def _sum_of_weights(x: Tensor, linear_weight: Tensor, target: Tensor, options: Options) -> Tensor:
    """What "mean" divides by: the weights of the targets that count, or the number of distributions."""
    accumulator = ACCUMULATOR[x.dtype]
    if target.is_floating_point():
        return torch.full((), target.numel() // linear_weight.shape[0], dtype=accumulator, device=x.device)
    counts = target != options.ignore_index
    if options.weight is None:
        return counts.sum(dtype=accumulator)
    # Out of bounds is the loss's to report.
    classes = target.clamp(0, linear_weight.shape[0] - 1)
    return torch.where(counts, options.weight.to(accumulator)[classes], 0).sum()
