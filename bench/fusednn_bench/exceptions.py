"""Kernels that instructions bind although memory should, with the reason: what is known, and what would help."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

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
_FEWER_BITS = "eight random bits an element instead of sixteen: half of the multiplications, probabilities in 1/256"
_LINES_OF_196 = "lines of 196 places leave a quarter of a tile's lanes idle"
_TILES_OF_LINES = "tiles of several lines' places side by side, for which each place has to look for its channel"
_FROM_BEFORE = "lines read from the multiple of 16 bytes before them on, and what isn't theirs left out"


class Reason(NamedTuple):
    """Why instructions bind a kernel, and what would have to be tried next."""

    reason: str
    next_step: str


#: By the kernel's name.
EXCEPTIONS: Mapping[str, Reason] = MappingProxyType(
    {
        "batch_norm_reduce_kernel": Reason(_LINES_OF_196, _TILES_OF_LINES),
        "batch_norm_statistics_kernel": Reason(
            "the mean of each lane moves with each element, so that nothing cancels, and what rounding took from "
            "distances is added again; lines of 196 places, as above",
            "sums and sums of squares of distances from a channel's first element: half of the instructions, and "
            "digits lost where that lies far from the mean",
        ),
        "bias_activation_dropout_backward_kernel": Reason(
            "random numbers are drawn again, and the activation's gradient",
            "a bit an element kept, as ReLU's is: a fiftieth more bytes, a third of the instructions fewer",
        ),
        "bias_activation_dropout_forward_kernel": Reason(
            f"{_RANDOM}; of ReLU the packing of a bit for each element", _FEWER_BITS
        ),
        "cross_entropy_backward_kernel": Reason(
            "lengths that 8 doesn't divide: narrow accesses, each with its own mask", _FROM_BEFORE
        ),
        "pointwise_loss_backward_kernel": Reason(
            "an accurate sigmoid of each element, near 1 in 16 bits, too: the difference from the target has its error",
            "the sigmoid of -|x|, coarse, and the difference taken from the side that is near the target",
        ),
        "pointwise_loss_sum_kernel": Reason(
            "an exponential and a logarithm of each element, in 16 bits coarse ones, and what weights of positive "
            "targets make of them",
            "a polynomial for log(1 + exp(-|x|)), and a kernel without weights",
        ),
        "pool_backward_cells_kernel": Reason(
            "3 x 3 windows without padding of contiguous images: each cell reads four windows, whose neighbours aren't "
            "aligned with it; with padding, where cells cover the images, codes of a byte, unpacked one by one",
            "codes of windows read as words of four, and their bytes compared at once",
        ),
        "pool_forward_kernel": Reason(
            "3 x 3 windows of contiguous images are read in strides, nine narrow loads for each, and compared eight "
            "times, by four instructions; wide loads, parted, took as many (a thread 1035 and not 1026); of 2 x 2 in "
            "16 bits, comparisons and selections for the winner's position, and lines of 7 or 14 windows, of which a "
            "thread holds one or two",
            "comparisons of two 16-bit values in one instruction, which Triton doesn't make",
        ),
        "prelu_backward_kernel": Reason(_LINES_OF_196, _TILES_OF_LINES),
        "row_dropout_kernel": Reason(_LINES_OF_196, _TILES_OF_LINES),
        "rrelu_forward_kernel": Reason(_RANDOM, _FEWER_BITS),
        "softmax_forward_kernel": Reason(
            "odd lengths, and lines of 100: accesses of one element or four, each with its mask", _FROM_BEFORE
        ),
        "standout_kernel": Reason(
            f"{_RANDOM}, and an accurate sigmoid to compare them with",
            "a random number's product with 1 + exp(-x) compared with 1: no quotient",
        ),
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
    """The kernels that instructions bind, why, and what would have to be tried next."""
    rows = []
    for name, (ratio, case) in sorted(worst_ratios(cases).items()):
        launch = f"{case['operation']} {case['direction']} {case['dtype']} {'x'.join(map(str, case['shape']))}"
        rows.append((name, f"{ratio:.2f}", launch, *EXCEPTIONS.get(name, Reason("", ""))))
    return markdown_table(("kernel", "most issue/bytes", "launch", "reason", "next step"), rows)
