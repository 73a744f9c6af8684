"""Compiled kernels on all inputs there are, and on tensors beyond 2^31 elements."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vgpu import VirtualGpuError, machine_options

from fusednn import autograd, optim
from fusednn.testing import one_rounding

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
    cancels = x.double().abs().nan_to_num() * 2.0**-52 * (name == "gelu")  # in stock's 1 + erf(x), in float64, too
    for what, ours, stock, reference in zip(("value", "gradient"), *results, references, strict=True):
        inherent = FLUSHED + cancels + (saved if what == "gradient" else torch.zeros(len(x)))
        # Of NaN stock's gradients differ between its scalar and its vectorised loops.
        judged = ~x.isnan() if what == "gradient" else torch.ones(len(x), dtype=torch.bool)
        finite = judged & ours.isfinite() & reference.to(dtype).isfinite()
        agrees = (ours == stock) | (ours == reference.to(dtype)) | (ours.isnan() & stock.isnan())
        assert (finite | agrees | ~judged).all(), f"{what} at {x[judged & ~finite & ~agrees][:3].tolist()}"
        off, stock_off = (roundings(each, reference, inherent) for each in (ours, stock))
        allowed = 2 * stock_off[finite & stock.isfinite()].max() + 1
        worst = torch.where(finite, off, -1).argmax()
        assert off[worst] <= allowed, f"{what}: {off[worst]:.3g} roundings off at {x[worst]}, {allowed:.3g} allowed"


#: What coarse functions may be off by before they are rounded, in parts of the result.
COARSENESS = 2.0**-16


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_result_is_rounded_once_to_nearest(name: str, dtype: torch.dtype) -> None:
    """In 16 bits it is float32's result, or one that is hardly another, converted; in float32 alone subnormals aren't
    flushed.
    """
    function, x = getattr(autograd, name), every_input(dtype)
    y, exact = function(x), function(x.float())
    lowest, highest = ((exact * (1 + off)).to(dtype) for off in (-COARSENESS, COARSENESS))
    near = (torch.minimum(lowest, highest) <= y) & (y <= torch.maximum(lowest, highest))
    if name == "gelu":  # far below 0 float32's own result is a difference that cancels
        near |= x < -2
    flushed = (y.double().abs() <= FLUSHED) & (exact.double().abs() <= 2 * FLUSHED)
    assert (near | (y.isnan() & exact.isnan()) | flushed).all()


# --- Beyond 2^31 elements: memory that is never touched, but for the first and last programs --------------------------

LARGE = 2**31


def large(*shape: int, **layout: Any) -> Tensor:
    """Memory that nobody wrote; its end is random."""
    x = torch.empty(shape, dtype=torch.float16, **layout)
    flat = x.as_strided((x.numel(),), (1,))
    flat[-3000:] = torch.randn(3000).half()
    return x


def large_images(channels: int = 64, size: int = 32, *, like: torch.memory_format = torch.contiguous_format) -> Tensor:
    """Of ``size`` x ``size`` pixels; the last one is random."""
    count = LARGE // (channels * size**2) + 2
    x = torch.empty((count, channels, size, size), dtype=torch.float16, memory_format=like)
    x[-1] = torch.randn(x.shape[1:]).half()
    return x


class Large(NamedTuple):
    """An operator on more than 2^31 elements; ``end`` is the part of the operand, and of its gradient, that stock is
    given, and ``result`` the part of the result that stock then gives.  Of the programs the last ``programs`` make it.
    """

    ours: Function
    stock: Function
    make: Callable[[], Tensor]
    end: Function
    result: Function
    has_gradient: bool = True
    programs: int = 100


def elementwise(ours: Function, stock: Function) -> Large:
    return Large(ours, stock, lambda: large(LARGE + 5000), lambda x: x[-2000:], lambda y: y[-2000:])


def of_rows(ours: Function, stock: Function, columns: int, rows: int = 2) -> Large:
    def end(x: Tensor) -> Tensor:
        return x[-rows:]

    return Large(ours, stock, lambda: large(LARGE // columns + 7, columns), end, end)


CHANNELS_LAST = {"like": torch.channels_last}
_WEIGHT, _SLOPES = torch.randn(2, 40, 64).half() / 8, torch.full((64,), 0.25).half()
_MEAN, _VARIANCE = torch.zeros(64), torch.ones(64)
_FILTERS = (torch.randn(64, 16, 3, 3) / 12).half().contiguous(memory_format=torch.channels_last)


def bias_relu(x: Tensor) -> Tensor:
    return autograd.bias_activation_dropout(x, torch.ones(1024).half(), activation="relu", p=0.0, training=True)


def convolution(x: Tensor) -> Tensor:
    return autograd.conv_act_pool2d(x, _FILTERS, None, 1, 1, activation="relu", pool_size=2)


def stock_convolution(x: Tensor) -> Tensor:
    return F.max_pool2d(F.relu(F.conv2d(x, _FILTERS.float(), None, 1, 1)), 2)


def last_channels(x: Tensor) -> Tensor:
    """Of the last line of pixels."""
    return x[-1:, -2:, -1:]


def normed(size: int, norm: Function = F.batch_norm) -> Function:
    """Batch norm in evaluation, of ``size`` channels."""
    mean, variance = _MEAN[:size], _VARIANCE[:size]
    return lambda x, **options: norm(x, mean + 0.5, 2 * variance, variance, mean, **options)


#: Of 64 channels, and on the last two of them.
OF_CHANNELS: dict[str, tuple[Function, Function]] = {
    "batch_norm in evaluation": (normed(64, autograd.batch_norm), normed(2)),
    "batch_norm_act in evaluation": (
        lambda x: normed(64, autograd.batch_norm_act)(x, residual=x.detach(), activation="relu"),
        lambda x: F.relu(normed(2)(x) + x.detach()),
    ),
    "dropout2d": (lambda x: autograd.dropout2d(x, 1.0), lambda x: F.dropout2d(x, 1.0)),
    "gated_channels": (
        lambda x: autograd.gated_channels(x, torch.ones(len(x), 64, 1, 1).half()),
        lambda x: x * torch.ones(1).sigmoid(),
    ),
    "prelu": (lambda x: autograd.prelu(x, _SLOPES), lambda x: F.leaky_relu(x, 0.25)),
}

LARGE_OPERANDS = {
    "relu": elementwise(autograd.relu, F.relu),
    "gelu": elementwise(autograd.gelu, F.gelu),
    "mse_loss": elementwise(
        lambda x: autograd.mse_loss(x, x.detach(), reduction="none"),
        lambda x: F.mse_loss(x, x.detach(), reduction="none"),
    ),
    "rrelu": elementwise(
        lambda x: autograd.rrelu(x, 0.25, 0.25, training=True), lambda x: F.rrelu(x, 0.25, 0.25, training=True)
    ),
    "gated": elementwise(lambda x: autograd.gated(x, x.detach(), "silu"), lambda x: F.silu(x) * x.detach()),
    "highway": elementwise(lambda x: autograd.highway(x, x.detach(), x.detach()), lambda x: 0 * x + x.detach()),
    "standout": elementwise(lambda x: autograd.standout(x, x.detach(), 0.0, 100.0), lambda x: 1 * x),
    "dropout": elementwise(lambda x: autograd.dropout(x, 1.0, True), lambda x: F.dropout(x, 1.0, True)),
    "softmax": of_rows(lambda x: autograd.softmax(x, -1), lambda x: F.softmax(x, -1), 1024),
    "softmax of columns": Large(
        lambda x: autograd.softmax(x, 0),
        lambda x: F.softmax(x, 0),
        lambda: large(33, LARGE // 32 + 16),
        lambda x: x[:, -16:],
        lambda y: y[:, -16:],
    ),
    "gated_halves": of_rows(autograd.gated_halves, F.glu, 2048),
    "cross_entropy": of_rows(
        lambda x: autograd.cross_entropy(x, torch.full((len(x),), 32767), reduction="none"),
        lambda x: F.cross_entropy(x, torch.full((len(x),), 32767), reduction="none"),
        32768,
    ),
    "nll_loss": of_rows(
        lambda x: autograd.nll_loss(x, torch.full((len(x),), 1023), reduction="none"),
        lambda x: F.nll_loss(x, torch.full((len(x),), 1023), reduction="none"),
        1024,
    )._replace(has_gradient=False),  # zeros, which would be written
    **{
        f"{name}{order}": Large(
            ours, stock, partial(large_images, like=layout), last_channels, last_channels, programs=2
        )
        for order, layout in {"": torch.contiguous_format, " in channels_last": torch.channels_last}.items()
        for name, (ours, stock) in OF_CHANNELS.items()
    },
    "block_end": of_rows(
        lambda x: autograd.block_end(x, x.detach(), torch.full((1024,), 0.5).half()), lambda x: x / 2 + x.detach(), 1024
    ),
    "maxout": of_rows(lambda x: autograd.maxout(x, 2), lambda x: x.unflatten(-1, (-1, 2)).amax(-1), 64),
    "maxout of channels": Large(
        lambda x: autograd.maxout(x, 2, 1),
        lambda x: x.unflatten(1, (-1, 2)).amax(2),
        large_images,
        lambda x: x[-1:, -2:, -2:],
        lambda y: y[-1:, -1:, -2:],
    ),
    "maxout_linear": of_rows(
        lambda x: autograd.maxout_linear(x, _WEIGHT), lambda x: (x @ _WEIGHT.float().mT).amax(0), 64
    )._replace(has_gradient=False),  # cuBLAS's
    "bias_activation_dropout": of_rows(bias_relu, lambda x: F.relu(x + 1), 1024),
    "max_pool2d of one image": Large(
        lambda x: autograd.max_pool2d(x, 2),
        lambda x: F.max_pool2d(x, 2),
        lambda: large(1, 2, 32768 + 64, 32768),
        lambda x: x[:, -1:, -2:, -100:],
        lambda y: y[:, -1:, -1:, -50:],
    ),
    "max_pool2d in channels_last": Large(
        lambda x: autograd.max_pool2d(x, 2),
        lambda x: F.max_pool2d(x, 2),
        partial(large_images, **CHANNELS_LAST),
        lambda x: x[-1:, :, -4:],
        lambda y: y[-1:, :, -2:],
    ),
    "conv_act_pool2d": Large(
        convolution,
        stock_convolution,
        partial(large_images, 16, 64, **CHANNELS_LAST),
        lambda x: x[-1:],
        lambda y: y[-1:],
        has_gradient=False,  # cuDNN's
    ),
}


@pytest.mark.parametrize("name", LARGE_OPERANDS)
def test_beyond_32_bits(name: str) -> None:
    case = LARGE_OPERANDS[name]
    x = case.make().requires_grad_(case.has_gradient)
    piece = case.end(x).detach().float().requires_grad_()
    expected = case.stock(piece)
    (expected_gradient,) = torch.autograd.grad(expected, piece, torch.ones_like(expected))
    with machine_options(window=(2, case.programs)):
        y = case.ours(x)
        torch.testing.assert_close(case.result(y).float(), expected.detach(), rtol=2e-3, atol=2e-3)
        if case.has_gradient:
            upstream = torch.empty_like(y)
            case.result(upstream).fill_(1)
            (gradient,) = torch.autograd.grad(y, x, upstream)
            torch.testing.assert_close(case.end(gradient).float(), expected_gradient, rtol=4e-3, atol=4e-3)


def test_a_parameter_beyond_32_bits() -> None:
    """And its state."""
    parameter = nn.Parameter(large(LARGE + 5000))
    parameter.grad, state = large(LARGE + 5000), large(LARGE + 5000)
    gradient, momentum, before = (each[-2000:].clone() for each in (parameter.grad, state, parameter.detach()))
    optimizer = optim.SGD([parameter], lr=0.5, momentum=0.5)
    optimizer.state[parameter]["momentum_buffer"] = state
    with machine_options(window=(2, 100)):
        optimizer.step()
    momentum = 0.5 * momentum + gradient
    torch.testing.assert_close(state[-2000:], momentum, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(parameter.detach()[-2000:], before - 0.5 * momentum, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("like", [torch.contiguous_format, torch.channels_last], ids=str)
def test_sums_beyond_32_bits(like: torch.memory_format) -> None:
    """Programs that don't run leave no sums: nothing but the accesses is checked."""
    x = large_images(like=like).requires_grad_()
    with machine_options(window=(2, 3)):
        y = autograd.batch_norm(x, _MEAN.clone(), _VARIANCE.clone(), _VARIANCE, _MEAN, True)
        torch.autograd.grad(y, x, torch.empty_like(y))
        loss = autograd.mse_loss(x, x.detach())
        torch.autograd.grad(loss, x)


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
