"""What becomes of a layer's result where results are made again in the backward pass: the report's words.

A layer whose own gradient needs its input keeps that anyway, and what it made of it is made again.  One that keeps
bits, a seed or its result asks for its input where somebody else keeps it.  A product is kept.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..twin import Layer

__all__ = ["ANYWAY", "KEPT", "OF_PRODUCT", "WHERE_KEPT", "result_of", "result_of_chain"]

ANYWAY = "made again of its input"
OF_PRODUCT = "made again of the product"
WHERE_KEPT = "made again where its input is kept or made again"
KEPT = "kept"

#: Of PyTorch's own operators, where no kernel takes their place.
_STOCK_ANYWAY = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.GELU, nn.Hardswish, nn.Mish, nn.SiLU)
_ANYWAY = (
    *(*_STOCK_ANYWAY, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.PReLU, nn.GLU),
    *(nn.ELU, nn.SELU, nn.CELU, nn.Softplus, nn.Softsign, nn.LogSigmoid),
)
_POOLINGS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
_WHERE_KEPT = (
    *_POOLINGS,
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.Threshold, nn.Hardtanh, nn.Hardsigmoid, nn.RReLU),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout),
    *(nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.Softmax2d),
)
_OF_RESULT = (nn.Sigmoid, nn.Tanh)
_PRODUCTS = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.Embedding)


def result_of(layer: nn.Module) -> str | None:
    """What becomes of the result of a layer by itself; None of what isn't known here, or is but a view."""
    ours = isinstance(layer, Layer)
    if isinstance(layer, _ANYWAY if ours else _STOCK_ANYWAY):
        return ANYWAY
    if ours and isinstance(layer, _WHERE_KEPT):
        return WHERE_KEPT
    return KEPT if isinstance(layer, (*_PRODUCTS, *_OF_RESULT)) else None


def result_of_chain(layers: Sequence[nn.Module]) -> str | None:
    """Likewise of neighbours that are computed in one, of which nothing in between is kept."""
    results = [result_of(layer) for layer in layers]
    # Of what is pooled no activation keeps the result: users may change that in place.
    pooled = any(isinstance(layer, _POOLINGS) for layer in layers)
    if ANYWAY not in results and not (pooled and any(isinstance(layer, _OF_RESULT) for layer in layers)):
        return results[0]
    return OF_PRODUCT if isinstance(layers[0], _PRODUCTS) else ANYWAY
