"""Elementary functions in the interpreter: the same on every processor."""

import pytest
import torch
from support.device import KERNELS_RUN

from fusednn.kernels import INTERPRETING
from fusednn.kernels.base import numerics
from fusednn.kernels.base._triton import tl, triton


@triton.jit
def function_kernel(x_pointer, y_pointer, FUNCTION: tl.constexpr, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    tl.store(y_pointer + place, FUNCTION(tl.load(x_pointer + place)))


@pytest.mark.kernels
@pytest.mark.skipif(KERNELS_RUN and not INTERPRETING, reason="a GPU's device library is accurate to two units")
@pytest.mark.parametrize("name", ["exp", "fast_exp", "log", "expm1", "log1p", "tanh"])
def test_float32_is_float64_rounded(name: str, device: str) -> None:
    """NumPy's single precision is right to a unit or two, and which one depends on the processor."""
    x = torch.linspace(0.01, 20, 4096, device=device)
    y = torch.empty_like(x)
    function_kernel[(1,)](x, y, getattr(numerics, name), 4096)
    expected = getattr(torch, name.removeprefix("fast_"))(x.double()).float()
    assert (y != expected).sum() <= 2, "but for double rounding"
