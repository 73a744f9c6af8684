"""Deliberately broken kernels: each must make an instrument, or a check, fail.

`faulty_relu` is a right kernel and a launcher, with one fault at a time switched on by a constant.
"""

from typing import Any

import torch
from torch import Tensor

from ..kernels.base._triton import tl, triton
from ..kernels.base.launch import Configuration, launch
from ..kernels.base.layout import dense

__all__ = [
    "FAULTS",
    "faulty_relu",
    "relu_configuration",
    "scalar_access_configuration",
    "spilling_configuration",
]

#: Of `faulty_relu`.
FAULTS = (
    "a missing mask",
    "a modified input",
    "a wrong value",
    "an extra pass",
    "an unwritten tail",
    "random gradient",
    "wrong gradient",
)
BLOCK = 256


@triton.jit
def faulty_relu_kernel(
    x_pointer,
    y_pointer,
    numel: tl.int64,
    BLOCK: tl.constexpr,
    LOSES_TAIL: tl.constexpr,
    WRITES_INPUT: tl.constexpr,
    READS_TWICE: tl.constexpr,
    READS_BEYOND: tl.constexpr,
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < numel
    x = tl.load(x_pointer + offsets, mask=inside, other=0)
    if READS_BEYOND:
        x = tl.load(x_pointer + offsets)
    if READS_TWICE:
        x = (x + tl.load(x_pointer + offsets, mask=inside, other=0)) / 2
    if WRITES_INPUT:
        tl.store(x_pointer + offsets, tl.where(x <= 0, 0.0, x), mask=inside)
    if LOSES_TAIL:
        inside = offsets < numel - 1
    tl.store(y_pointer + offsets, tl.where(x <= 0, 0.0, x), mask=inside)


@triton.jit
def spilling_kernel(x_pointer, y_pointer, BLOCK: tl.constexpr):
    """A tile far too large for its threads' registers, all of it alive at once."""
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_pointer + offsets)
    y = tl.load(x_pointer + BLOCK + offsets)
    total = tl.sum(x * y, axis=0)
    tl.store(y_pointer + offsets, x * total + y)


@triton.jit
def scalar_access_kernel(x_pointer, y_pointer, stride, BLOCK: tl.constexpr):
    """Accesses that the compiler can't widen: the stride is only known at run time."""
    offsets = tl.arange(0, BLOCK) * stride
    tl.store(y_pointer + offsets, tl.load(x_pointer + offsets) * 2)


def faulty_relu(x: Tensor, fault: str = "") -> Tensor:
    """ReLU in float32, with one of `FAULTS` or none."""
    if not isinstance(x, Tensor) or x.dtype is not torch.float32:
        return x.relu()
    y: Tensor = _FaultyReLU.apply(x, fault)
    return y


class _FaultyReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, fault: str) -> Tensor:
        x = dense(x)
        y = torch.empty_like(x)
        numel = x.numel()
        programs = triton.cdiv(numel, BLOCK)
        launch(relu_configuration(fault), programs, x.detach(), y, numel)
        if fault == "a wrong value":
            y *= 1.00001
        ctx.save_for_backward(y)
        ctx.fault = fault
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (g,) = gradients
        (y,) = ctx.saved_tensors
        slope = 1.001 if ctx.fault == "wrong gradient" else 1.0
        if ctx.fault == "random gradient":
            slope = 1.0 + torch.rand(()).item()
        return torch.where(y <= 0, 0, g * slope), None


def relu_configuration(fault: str) -> Configuration:
    """Of the kernel of `faulty_relu`."""
    return Configuration(
        label=f"relu with {fault}",
        kernel=faulty_relu_kernel,
        signature=(("x_pointer", "*fp32"), ("y_pointer", "*fp32"), ("numel", "i64")),
        constants=(
            ("BLOCK", BLOCK),
            ("LOSES_TAIL", fault == "an unwritten tail"),
            ("WRITES_INPUT", fault == "a modified input"),
            ("READS_TWICE", fault == "an extra pass"),
            ("READS_BEYOND", fault == "a missing mask"),
        ),
        threads=128,
    )


def spilling_configuration() -> Configuration:
    """A kernel whose registers spill."""
    return Configuration(
        label="a spilling tile",
        kernel=spilling_kernel,
        signature=(("x_pointer", "*fp32"), ("y_pointer", "*fp32")),
        constants=(("BLOCK", 16384),),
        threads=32,
    )


def scalar_access_configuration() -> Configuration:
    """A kernel that loads and stores one element at a time."""
    return Configuration(
        label="narrow accesses",
        kernel=scalar_access_kernel,
        signature=(("x_pointer", "*fp32"), ("y_pointer", "*fp32"), ("stride", "i32")),
        constants=(("BLOCK", 512),),
        threads=128,
        wide_loads=1,
        wide_stores=1,
    )
