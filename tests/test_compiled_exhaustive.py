"""Compiled kernels on all inputs there are, and on tensors beyond 2^31 elements."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.accuracy import one_rounding
from torch import Tensor
from vgpu import VirtualGpuError, machine_options

from fusednn import autograd

pytestmark = [pytest.mark.compiled, pytest.mark.thorough]

Function = Callable[..., Any]

# --- All bit patterns -------------------------------------------------------------------------------------------------

#: Softsign is missing: stock's gradient is a difference that cancels, in float64 too.
ACTIVATIONS = (
    "relu relu6 leaky_relu hardsigmoid hardswish elu selu celu gelu silu mish softplus sigmoid logsigmoid tanh"
    " hardtanh".split()
)
#: Whose gradients come from the saved output, and have its rounding.
READ_OFF_THE_OUTPUT = ("elu", "selu", "celu", "sigmoid", "tanh")
#: Exponentials of compiled kernels flush results below the smallest normal float32 to 0, which SELU then scales.
FLUSHED = 2.0**-125
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def every_input(dtype: torch.dtype) -> Tensor:
    """All bit patterns of 16 bits; of float32 random ones, usual numbers, and a dense line where functions bend."""
    if dtype.itemsize == 2:
        return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    bits = torch.randint(-(2**31), 2**31, (40000,), dtype=torch.int64).to(torch.int32).view(dtype)
    return torch.cat([bits, 4 * torch.randn(20000), torch.linspace(-120, 120, 20001)])


def value_and_gradient(function: Function, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    y = function(x)
    return y.detach(), torch.autograd.grad(y, x, torch.ones_like(y))[0]


def roundings(result: Tensor, reference: Tensor, inherent: Tensor) -> Tensor:
    """How far each element is off beyond ``inherent``, in roundings of the reference."""
    smallest = torch.finfo(result.dtype).smallest_normal
    error = ((result.double() - reference).abs() - inherent).clamp_min(0)
    return error / one_rounding(reference.abs().clamp_min(smallest), result.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_input_of_an_activation(name: str, dtype: torch.dtype) -> None:
    x, stock_function = every_input(dtype), getattr(F, name)
    results = value_and_gradient(getattr(autograd, name), x), value_and_gradient(stock_function, x)
    references = value_and_gradient(stock_function, x.double())
    saved = one_rounding(results[0][0].double().abs().nan_to_num().clamp_max(1), dtype) * (name in READ_OFF_THE_OUTPUT)
    for what, ours, stock, reference in zip(("value", "gradient"), *results, references, strict=True):
        inherent = FLUSHED + (saved if what == "gradient" else torch.zeros(len(x)))
        # Of NaN stock's gradients differ between its scalar and its vectorised loops.
        judged = ~x.isnan() if what == "gradient" else torch.ones(len(x), dtype=torch.bool)
        finite = judged & ours.isfinite() & reference.to(dtype).isfinite()
        agrees = (ours == stock) | (ours == reference.to(dtype)) | (ours.isnan() & stock.isnan())
        assert (finite | agrees | ~judged).all(), f"{what} at {x[judged & ~finite & ~agrees][:3].tolist()}"
        off, stock_off = (roundings(each, reference, inherent) for each in (ours, stock))
        allowed = 2 * stock_off[finite & stock.isfinite()].max() + 1
        worst = torch.where(finite, off, -1).argmax()
        assert off[worst] <= allowed, f"{what}: {off[worst]:.3g} roundings off at {x[worst]}, {allowed:.3g} allowed"


# --- Beyond 2^31 elements: memory that is never touched, but for the first and last programs --------------------------

LARGE = 2**31


def large(*shape: int, **layout: Any) -> Tensor:
    """Memory that nobody wrote; its end is random."""
    x = torch.empty(shape, dtype=torch.float16, **layout)
    flat = x.as_strided((x.numel(),), (1,))
    flat[-3000:] = torch.randn(3000).half()
    return x


def flat_end(x: Tensor) -> Tensor:
    return x.flatten()[-2000:]


def last_rows(x: Tensor) -> Tensor:
    return x[-2:]


LARGE_OPERANDS: dict[str, tuple[Function, Function, Callable[[], Tensor], Function]] = {
    "relu": (autograd.relu, F.relu, lambda: large(LARGE + 5000), flat_end),
    "gelu": (autograd.gelu, F.gelu, lambda: large(LARGE + 5000), flat_end),
    "softmax": (
        lambda x: autograd.softmax(x, -1),
        lambda x: F.softmax(x, -1),
        lambda: large(LARGE // 1024 + 7, 1024),
        last_rows,
    ),
    "max_pool2d": (
        lambda x: autograd.max_pool2d(x, 2),
        lambda x: F.max_pool2d(x, 2),
        lambda: large(1, 2, 32768 + 64, 32768),
        lambda x: x[:, -1:, -2:, -100:],
    ),
    "maxout": (
        lambda x: autograd.maxout(x, 2),
        lambda x: x.unflatten(-1, (-1, 2)).amax(-1),
        lambda: large(LARGE // 64 + 3, 64),
        last_rows,
    ),
}


@pytest.mark.parametrize("name", LARGE_OPERANDS)
def test_beyond_32_bits(name: str) -> None:
    ours, stock, make, end = LARGE_OPERANDS[name]
    x = make().requires_grad_()
    with machine_options(window=(2, 100)):
        y = ours(x)
        upstream = torch.empty_like(y)
        upstream.as_strided((y.numel(),), (1,))[-4000:] = 1
        (gradient,) = torch.autograd.grad(y, x, upstream)
    piece = end(x).detach().float().requires_grad_()
    expected = stock(piece)
    (expected_gradient,) = torch.autograd.grad(expected, piece, torch.ones_like(expected))
    result = end(y) if y.shape == x.shape else y.flatten()[-expected.numel() :].view(expected.shape)
    torch.testing.assert_close(result.float(), expected, rtol=2e-3, atol=1e-3)
    if y.shape == x.shape:
        torch.testing.assert_close(end(gradient).float(), expected_gradient, rtol=4e-3, atol=2e-3)


def test_an_offset_of_32_bits_is_caught() -> None:
    """The check that the tests above rely on."""
    import triton
    import triton.language as tl

    @triton.jit
    def copy(x, y, numel: tl.int64, BLOCK: tl.constexpr):
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # 32 bits
        tl.store(y + i, tl.load(x + i, mask=i < numel), mask=i < numel)

    x, y = torch.empty(LARGE + 5000, dtype=torch.float16), torch.empty(LARGE + 5000, dtype=torch.float16)
    with machine_options(window=(1, 1)), pytest.raises(VirtualGpuError, match="outside every tensor"):
        copy[(triton.cdiv(x.numel(), 1024),)](x, y, x.numel(), BLOCK=1024)
