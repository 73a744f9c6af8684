"""Kernels that instructions bind although memory should, with the reason: what is known, and what would help."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from .tables import MOST_ISSUE, markdown_table

__all__ = ["BOUND_BY_PRODUCTS", "EXCEPTIONS", "exceptions_table", "worst_ratios"]

#: Kernels of matrix products, which mean to be bound otherwise.
BOUND_BY_PRODUCTS = frozenset(
    {
        *("conv_pool_kernel", "linear_maxout_forward_kernel"),
        *("linear_maxout_data_gradient_kernel", "linear_maxout_weight_gradient_kernel"),
    }
)

_RANDOM = "random numbers, seven rounds of wide multiplications for each four or eight elements, beside the arithmetic"

#: By the kernel's name.
EXCEPTIONS: Mapping[str, str] = MappingProxyType(
    {
        "batch_norm_reduce_kernel": "lines of 196 places leave a quarter of a tile's lanes idle",
        "batch_norm_statistics_kernel": "the mean of each lane moves with each element, so that nothing cancels, and "
        "what rounding took from distances is added again; sums and sums of squares would take half, and cancel",
        "bias_activation_dropout_backward_kernel": "random numbers are drawn again, and the activation's gradient",
        "bias_activation_dropout_forward_kernel": f"{_RANDOM}; of ReLU the packing of a bit for each element",
        "cross_entropy_backward_kernel": "lengths that 8 doesn't divide: narrow accesses, each with its own mask",
        "pointwise_loss_backward_kernel": "an accurate sigmoid of each element, near 1 in 16 bits, too: the difference "
        "from the target has its error",
        "pointwise_loss_sum_kernel": "an exponential and a logarithm of each element, in 16 bits coarse ones, and what "
        "weights of positive targets make of them",
        "pool_backward_cells_kernel": "3 x 3 windows of contiguous images: each cell reads four windows, whose "
        "neighbours aren't aligned with it",
        "pool_forward_kernel": "3 x 3 windows of contiguous images are read in strides, nine narrow loads for each; of "
        "2 x 2 in 16 bits, comparisons and selections for the winner's position, and lines of 7 or 14 windows, of "
        "which a thread holds one or two",
        "prelu_backward_kernel": "lines of 196 places leave a quarter of a tile's lanes idle",
        "row_dropout_kernel": "lines of 196 places leave a quarter of a tile's lanes idle",
        "rrelu_forward_kernel": _RANDOM,
        "softmax_forward_kernel": "odd lengths, and lines of 100: accesses of one element or four, each with its mask",
        "standout_kernel": f"{_RANDOM}, and an accurate sigmoid to compare them with",
    }
)


def worst_ratios(cases: Iterable[Mapping[str, Any]]) -> dict[str, tuple[float, Mapping[str, Any]]]:
    """Of each kernel that memory should bind and doesn't, the largest issue / bytes, and where."""
    worst: dict[str, tuple[float, Mapping[str, Any]]] = {}
    for case in cases:
        ratio, name = case["issue_over_bytes"], case["kernel"]
        bound = ratio > MOST_ISSUE and name not in BOUND_BY_PRODUCTS
        if bound and ratio > worst.get(name, (0.0, case))[0]:
            worst[name] = ratio, case
    return worst


def exceptions_table(cases: Iterable[Mapping[str, Any]]) -> str:
    """The kernels that instructions bind, and why."""
    rows = []
    for name, (ratio, case) in sorted(worst_ratios(cases).items()):
        launch = f"{case['operation']} {case['direction']} {case['dtype']} {'x'.join(map(str, case['shape']))}"
        rows.append((name, f"{ratio:.2f}", launch, EXCEPTIONS.get(name, "")))
    return markdown_table(("kernel", "most issue/bytes", "launch", "reason"), rows)
