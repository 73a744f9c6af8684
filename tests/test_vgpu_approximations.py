"""Approximate instructions on the virtual GPU: as good as NVIDIA documents, and where asked for as bad."""

import math

import numpy as np
import pytest
import torch
from support.ptx import execute
from vgpu import machine_options

pytestmark = pytest.mark.compiled

#: The exact function, and the bounds of the error: in parts of the result, and absolute.
APPROXIMATE = {
    **dict.fromkeys(("ex2.approx.f32", "ex2.approx.ftz.f32"), (np.exp2, 2**-22, 0)),
    "lg2.approx.f32": (np.log2, 2**-22, 2**-22),
    **dict.fromkeys(("rcp.approx.f32", "rcp.approx.ftz.f32"), (np.reciprocal, 2**-23, 0)),
    "rsqrt.approx.f32": (lambda x: 1 / np.sqrt(x), 2**-22.9, 0),
    "sqrt.approx.f32": (np.sqrt, 2**-23, 0),
    "tanh.approx.f32": (np.tanh, 2**-11, 0),
    "sin.approx.f32": (np.sin, 0, 2**-20.5),
    "cos.approx.f32": (np.cos, 0, 2**-20.5),
}


@pytest.mark.parametrize("nudge", [False, True], ids=["rounded", "nudged"])
@pytest.mark.parametrize("instruction", APPROXIMATE)
def test_is_within_the_documented_bound(instruction: str, nudge: bool) -> None:
    function, relative, absolute = APPROXIMATE[instruction]
    x = torch.rand(4096) * 3 + 0.01
    with machine_options(nudge=nudge):
        (y,) = execute(f"{instruction} %r0, %a0;", x, results=[torch.float32])
    exact = function(x.double().numpy())
    error = np.abs(y.double().numpy() - exact)
    rounding = np.abs(exact) * 2**-24 * 1.01
    assert (error <= np.maximum(relative * np.abs(exact) + absolute, rounding)).all()
    assert (error > rounding).any() == nudge  # nudged results are off; others are rounded once


def test_quotients() -> None:
    a, b = torch.randn(4096), torch.randn(4096)
    (full,) = execute("div.full.f32 %r0, %a0, %a1;", a, b, results=[torch.float32])
    assert torch.equal(full, a / b)
    (flushing,) = execute("div.approx.ftz.f32 %r0, %a0, %a1;", a, b, results=[torch.float32])
    torch.testing.assert_close(flushing, a / b, rtol=2**-22, atol=0)
    huge = torch.full((32,), 2.0**127)
    (flushed,) = execute("div.approx.f32 %r0, %a0, %a1;", huge, huge, results=[torch.float32])
    assert not flushed.any()  # the documented result for divisors beyond 2^126


@pytest.mark.parametrize(
    ("instruction", "x", "y", "flushed"),
    [("ex2", -130.0, 2.0**-130, 0.0), ("rcp", 2.0**-127, 2.0**127, math.inf), ("rsqrt", 2.0**-128, 2.0**64, math.inf)],
)
def test_subnormals_are_flushed_where_the_instruction_says(
    instruction: str, x: float, y: float, flushed: float
) -> None:
    for modifier, expected in (("", y), (".ftz", flushed)):
        (result,) = execute(
            f"{instruction}.approx{modifier}.f32 %r0, %a0;", torch.full((32,), x), results=[torch.float32]
        )
        assert (result == expected).all()


def test_a_coarse_reciprocal_of_doubles() -> None:
    """Where quotients of float64 start from."""
    x = torch.rand(4096, dtype=torch.float64) * 3 + 0.01
    (y,) = execute("rcp.approx.ftz.f64 %r0, %a0;", x, results=[torch.float64])
    torch.testing.assert_close(y, 1 / x, rtol=2**-20, atol=0)
