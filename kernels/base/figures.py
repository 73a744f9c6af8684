"""Figures of machines that decisions are made with, each with its source, and the thresholds that follow from them.

Where one kernel of ours is the quicker way, and where PyTorch's product or convolution followed by a pass, depends on
what a GPU multiplies and moves; where a tensor is small, on what a call costs the host.  A figure that a GPU corrects
is corrected here, and the thresholds follow; ``bench/thresholds.py`` times both ways on each side of them.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = [
    "COPY_RATE",
    "DRIVER_LAUNCH",
    "HOST_TIMES",
    "MATRIX_RATES",
    "RELATIVE_RATES",
    "SMALL_CALLS",
    "Figure",
    "SmallCall",
    "most_convolution_depth",
    "most_maxout_features",
    "most_maxout_features_backward",
    "most_small_bytes",
]


class Figure(NamedTuple):
    """A number, its unit, and where it is from."""

    number: float
    unit: str
    source: str


_H200 = "one H200, torch 2.11, measured outside this repository"

#: What a device copies, read plus written.
COPY_RATE = Figure(4.3e12, "bytes/s", f"a copy on {_H200}; the data sheet says 4.8e12")

#: What PyTorch's products reach, by the precision of their operands.
MATRIX_RATES = {
    "bf16": Figure(7.9e14, "operations/s", f"cuBLAS on {_H200}"),
    "fp16": Figure(7.9e14, "operations/s", "taken to be bfloat16's, as on the data sheet"),
    "tf32": Figure(3.95e14, "operations/s", "taken to be half of bfloat16's, as on the data sheet"),
    "fp32": Figure(5.0e13, "operations/s", "taken to be three quarters of the data sheet's 6.7e13; no tensor cores"),
}

#: Shares of those rates.  None of them is measured; what is counted, is in the machine code for an H100.
RELATIVE_RATES = {
    "convolution in one kernel": Figure(1 / 2, "of the rate", "assumed: operands are gathered"),
    "convolution in cuDNN": Figure(4 / 5, "of the rate", "assumed"),
    "maxout in one kernel": Figure(5 / 8, "of the rate", "counted: each piece reads the tile of x in shared memory"),
    "maxout in one kernel, without tensor cores": Figure(7 / 8, "of the rate", "assumed"),
    "maxout's gradient in one kernel": Figure(1 / 4, "of the rate", "counted: instructions that make the operands"),
}
_BYTES = {"bf16": 2, "fp16": 2, "tf32": 4, "fp32": 4}


def _operations_a_byte(precision: str) -> float:
    return MATRIX_RATES[precision].number / COPY_RATE.number


def most_convolution_depth(window: int) -> int:
    """The depth (taps times channels) up to which convolution and pooling are quicker in one kernel, in 16 bits.

    That saves the convolution's result being written and read again, about 1.7e bytes for each of its elements, but its
    2 depth operations an element, 9/4 as many where windows of 3 x 3 overlap, are done at a lower rate.
    """
    again = 9 / 4 if window == 3 else 1.0
    ours, theirs = (RELATIVE_RATES[f"convolution in {who}"].number for who in ("one kernel", "cuDNN"))
    return int(1.7 * _BYTES["bf16"] * _operations_a_byte("bf16") / (2 * (again / ours - 1 / theirs)))


def most_maxout_features(precision: str) -> int:
    """The features up to which a linear layer and its maxout are quicker in one kernel; a power of 2.

    Each sum isn't written and read again, 2e bytes; but its 2 features operations are done at a lower rate.
    """
    kernel = "maxout in one kernel" + ", without tensor cores" * (precision == "fp32")
    longer = 1 / RELATIVE_RATES[kernel].number - 1
    return _power_of_2(_BYTES[precision] * _operations_a_byte(precision) / longer)


def most_maxout_features_backward() -> int:
    """The same for the gradient, in 16 bits; a power of 2.

    The scattered gradient isn't written and read twice, 3 pieces e bytes for each maximum, but the gradient and the
    winner are read once more, e + 1; two products of 2 pieces features operations are done at a lower rate.  Two pieces
    save the least.
    """
    pieces, size = 2, _BYTES["bf16"]
    longer = 1 / RELATIVE_RATES["maxout's gradient in one kernel"].number - 1
    saved = 3 * pieces * size - (size + 1)
    return _power_of_2(saved * _operations_a_byte("bf16") / (2 * 2 * pieces * longer))


def _power_of_2(number: float) -> int:
    """The largest that isn't larger."""
    return int(1 << int(number).bit_length() - 1)


# --- Small tensors ----------------------------------------------------------------------------------------------------


class SmallCall(NamedTuple):
    """What a call costs the host, by a kernel of ours and by PyTorch, in us; how often PyTorch's moves the input."""

    ours: float
    stock: float
    passes: float


#: What a driver takes to launch a kernel, which the host times below, over one that does nothing, don't have in them.
DRIVER_LAUNCH = Figure(3.0, "us", "assumed: 2 to 4 us, ours and PyTorch's alike")

#: The source of the host times below.
HOST_TIMES = "bench/results/host.json: the 5th percentile, of ours by its kernels; PyTorch's is its CPU path's"

_POINTWISE = (SmallCall(12, 2.5, 2), SmallCall(28, 13, 5))
_DROPOUT = (SmallCall(12.5, 10.5, 2.25), SmallCall(30, 21, 4.5))
_SOFTMAX = (SmallCall(9.1, 3.3, 2), SmallCall(25, 14, 5))
_POINTWISE_LOSS = (SmallCall(13, 6.9, 4), SmallCall(32, 18, 7))

#: Operations that PyTorch has an operator for, whose host time is below ours: of a call without gradients, and of one
#: with them and its backward pass.  What isn't here, above all what is fused of several, takes its kernel at any size.
SMALL_CALLS: dict[str, tuple[SmallCall, SmallCall]] = {
    **dict.fromkeys(
        (
            *("celu", "elu", "gelu", "gelu_tanh", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "logsigmoid"),
            *("mish", "relu", "relu6", "selu", "sigmoid", "silu", "softplus", "softsign", "tanh", "threshold"),
        ),
        _POINTWISE,
    ),
    "prelu": (SmallCall(9.2, 3.9, 2), SmallCall(34, 20, 7)),
    "dropout": _DROPOUT,
    **dict.fromkeys(("softmax", "log_softmax"), _SOFTMAX),
    "cross_entropy": (SmallCall(12.5, 5.4, 2), SmallCall(31, 18, 6)),
    **dict.fromkeys(("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss"), _POINTWISE_LOSS),
    **dict.fromkeys(("max_pool1d", "max_pool2d", "max_pool3d"), (SmallCall(15, 4.8, 2), SmallCall(35, 16, 5))),
    "batch_norm": (SmallCall(19, 12, 3), SmallCall(51, 28, 8)),
}


def most_small_bytes(operation: str, *, differentiable: bool) -> int:
    """The bytes of an input up to which PyTorch's operator is the quicker way, or 0.

    A call takes as long as the host or the device, whichever is longer.  As long as PyTorch's passes over memory take
    less than its host does, and ours move fewer bytes, both wait for the host: for ours the longer.
    """
    calls = SMALL_CALLS.get(operation)
    if calls is None or (call := calls[differentiable]).ours <= call.stock:
        return 0
    launches = 2 if differentiable else 1
    seconds = (call.stock + launches * DRIVER_LAUNCH.number) * 1e-6
    return int(seconds * COPY_RATE.number / call.passes)
