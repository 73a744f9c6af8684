"""Figures of machines that decisions are made with, each with its source, and the thresholds that follow from them.

Where one kernel of ours is the quicker way, and where PyTorch's product or convolution followed by a pass, depends on
what a GPU multiplies and moves.  A figure that a GPU corrects is corrected here, and the thresholds follow;
``bench/thresholds.py`` times both ways on each side of them.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = [
    "COPY_RATE",
    "MATRIX_RATES",
    "RELATIVE_RATES",
    "Figure",
    "most_convolution_depth",
    "most_maxout_features",
    "most_maxout_features_backward",
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

#: Shares of those rates.  None of them is measured.
RELATIVE_RATES = {
    "convolution in one kernel": Figure(1 / 2, "of the rate", "assumed: operands are gathered"),
    "convolution in cuDNN": Figure(4 / 5, "of the rate", "assumed"),
    "maxout in one kernel": Figure(7 / 8, "of the rate", "assumed"),
    "maxout's gradient in one kernel": Figure(3 / 4, "of the rate", "assumed: operands are made in registers"),
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
    longer = 1 / RELATIVE_RATES["maxout in one kernel"].number - 1
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
