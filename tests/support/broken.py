"""Deliberately broken kernels: each must make an instrument, or a standing check, fail.

`broken_relu` is a right kernel and a launcher, with one fault at a time switched on by a constant.
"""

import torch
from torch import Tensor

from fusednn.kernels.base._triton import tl, triton
from fusednn.kernels.base.launch import Configuration, launch

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
        tl.store(x_pointer + offsets, tl.where(x > 0, x, 0.0), mask=inside)
    if LOSES_TAIL:
        inside = offsets < numel - 1
    tl.store(y_pointer + offsets, tl.where(x > 0, x, 0.0), mask=inside)


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


class FaultyReLU(torch.autograd.Function):
    """ReLU with the named fault."""

    @staticmethod
    def forward(ctx, x: Tensor, fault: str) -> Tensor:
        y = torch.empty_like(x)
        numel = x.numel()
        programs = triton.cdiv(numel, BLOCK)
        launch(relu_configuration(fault), programs, x.detach(), y, numel)
        ctx.save_for_backward(y)
        ctx.fault = fault
        return y

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        slope = 1.001 if ctx.fault == "wrong gradient" else 1.0
        if ctx.fault == "random gradient":
            slope = 1.0 + torch.rand(()).item()
        return torch.where(y > 0, g * slope, 0), None


def relu_configuration(fault: str) -> Configuration:
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
    return Configuration(
        label="a spilling tile",
        kernel=spilling_kernel,
        signature=(("x_pointer", "*fp32"), ("y_pointer", "*fp32")),
        constants=(("BLOCK", 16384),),
        threads=32,
    )


def scalar_access_configuration() -> Configuration:
    return Configuration(
        label="narrow accesses",
        kernel=scalar_access_kernel,
        signature=(("x_pointer", "*fp32"), ("y_pointer", "*fp32"), ("stride", "i32")),
        constants=(("BLOCK", 512),),
        threads=128,
        wide_loads=1,
        wide_stores=1,
    )
