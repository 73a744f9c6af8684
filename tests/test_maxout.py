"""Maxout's functions against PyTorch compositions: alone, of a linear layer, of a convolution."""

import copy
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from support.device import FLOAT_DTYPES, KERNELS_RUN, ON_GPU
from support.gpu import capture, compiled_kernels, no_synchronisation
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fusednn import kernels
from fusednn.autograd import maxout, maxout_conv2d, maxout_linear
from fusednn.autograd.dispatch import Choice, observe_choices
from fusednn.instruments.saved_tensors import saved_tensors
from fusednn.kernels.base.device import Device
from fusednn.kernels.linear_maxout import fused_refusal, takes_fused_backward
from fusednn.testing import LAYOUTS, check_against_stock, leaf, random_tensor, value_and_gradients

if kernels.INTERPRETING:
    from fusednn.instruments.traffic import measure_traffic

H100, RTX = Device("sm_90", 32, 227 * 1024), Device("sm_120", 32, 99 * 1024)
counts_bytes = pytest.mark.interpreter
every_dtype = pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
_ops = torch.ops.fusednn


@pytest.fixture
def tf32() -> Iterator[None]:
    """Products in TF32 are allowed."""
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = "none"


@pytest.fixture
def always_fused_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows are enough for gradients to be expanded on the fly, and for a partial sum."""
    monkeypatch.setattr(kernels.linear_maxout, "takes_fused_backward", lambda *_: True)
    monkeypatch.setattr(kernels.linear_maxout, "_FEWEST_ROWS", 64)


# --- What PyTorch makes of it -----------------------------------------------------------------------------------------


def stock_maxout(x: Tensor, pieces: int, dim: int = -1) -> Tensor:
    dim %= x.dim()
    return x.unflatten(dim, (-1, pieces)).max(dim + 1).values


def stock_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    products = F.linear(x, weight.flatten(0, 1), None if bias is None else bias.flatten())
    return products.unflatten(-1, weight.shape[:2]).max(-2).values


def stock_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, **options: object) -> Tensor:
    each = [F.conv2d(x, w, None if bias is None else bias[p], **options) for p, w in enumerate(weight)]
    return torch.stack(each).max(0).values


def linear_operands(
    rows: tuple[int, ...], units: int, features: int, pieces: int, dtype: torch.dtype, device: str
) -> list[Tensor]:
    x = random_tensor((*rows, features), dtype, device)
    weight = random_tensor((pieces, units, features), dtype, device, seed=1)
    return [x, weight, random_tensor((pieces, units), dtype, device, seed=2)]


def integers(operands: list[Tensor]) -> list[Tensor]:
    """Small enough for sums of products in 16 bits: no rounding makes another piece the winner, and ties are many."""
    return [operand.clamp(-1, 1).round() for operand in operands]


def check_exact(ours: Callable[..., Tensor], stock: Callable[..., Tensor], operands: list[Tensor]) -> None:
    """`check`, and the bits of stock: for `integers`."""
    gradient = torch.ones_like(stock(*operands))
    check(ours, stock, operands, gradient)
    (y, gradients), (y_stock, gradients_stock) = (value_and_gradients(f, operands, gradient) for f in (ours, stock))
    assert torch.equal(y, y_stock)
    for mine, theirs in zip(gradients, gradients_stock, strict=True):
        assert torch.equal(mine, theirs)


def check(
    ours: Callable[..., Tensor], stock: Callable[..., Tensor], tensors: list[Tensor], gradient: Tensor | None = None
) -> None:
    if gradient is None:
        like = stock(*tensors)
        gradient = random_tensor(tuple(like.shape), like.dtype, str(like.device), seed=9)
    check_against_stock(ours, stock, tensors, gradient)


# --- Of features ------------------------------------------------------------------------------------------------------


@pytest.mark.kernels
@every_dtype
@pytest.mark.parametrize(
    ("shape", "pieces", "dim"),
    [
        ((3000, 4), 2, -1),  # pieces adjacent in memory, and loaded together
        ((7, 12), 4, -1),
        ((5, 4, 21), 3, -1),
        ((2, 12, 7, 9), 3, 1),  # pieces apart
        ((1, 2, 46, 46), 2, 1),  # rows wider than a tile
        ((6,), 6, 0),
        ((10, 1, 3), 5, 0),
    ],
    ids=str,
)
def test_maxout(shape: tuple[int, ...], pieces: int, dim: int, dtype: torch.dtype, device: str) -> None:
    x = random_tensor(shape, dtype, device)
    check(partial(maxout, pieces=pieces, dim=dim), partial(stock_maxout, pieces=pieces, dim=dim), [x])


@pytest.mark.kernels
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gradient_layout", ["contiguous", "channels_last", "strided", "scalar"])
@pytest.mark.parametrize("dim", [1, 2, -1])
def test_maxout_layouts(layout: str, gradient_layout: str, dim: int, device: str) -> None:
    shape = [4, 6, 8, 10]
    x = LAYOUTS[layout](random_tensor(tuple(shape), torch.float32, device))
    shape[dim] //= 2
    gradient = LAYOUTS[gradient_layout](random_tensor(tuple(shape), torch.float32, device, seed=1))
    check(partial(maxout, pieces=2, dim=dim), partial(stock_maxout, pieces=2, dim=dim), [x], gradient)


@pytest.mark.kernels
def test_maxout_keeps_the_memory_format(device: str) -> None:
    x = random_tensor((2, 6, 5, 7), torch.float32, device)
    assert maxout(x, 3, 1).is_contiguous()
    x = leaf(x.contiguous(memory_format=torch.channels_last))
    y = maxout(x, 3, 1)
    assert y.is_contiguous(memory_format=torch.channels_last)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert gradient.is_contiguous(memory_format=torch.channels_last)
    permuted = x.permute(2, 0, 3, 1)
    assert maxout(permuted, 2, 3).stride() == maxout(x, 2, 1).permute(2, 0, 3, 1).stride()


@pytest.mark.kernels
@pytest.mark.smoke
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("pieces", [2, 3, 4])
def test_ties_and_values_that_are_not_finite(pieces: int, memory_format: torch.memory_format, device: str) -> None:
    """NaN wins, the first of several; of equal values the first wins."""
    values = torch.tensor([0.0, -0.0, 1.0, float("nan"), float("inf"), -float("inf")], device=device)
    x = values[torch.cartesian_prod(*[torch.arange(6)] * pieces).to(device)].t()[None, :, :, None]
    x = x.contiguous(memory_format=memory_format)
    ours, stock = partial(maxout, pieces=pieces, dim=1), partial(stock_maxout, pieces=pieces, dim=1)
    gradient = torch.arange(1.0, x.shape[2] + 1, device=device)[None, None, :, None]
    for mine, theirs in zip(*(value_and_gradients(f, [x], gradient) for f in (ours, stock)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(ours(x), x.amax(1, keepdim=True), rtol=0, atol=0, equal_nan=True)


@pytest.mark.kernels
def test_many_pieces(device: str) -> None:
    x = random_tensor((3, 255), torch.float32, device)
    torch.testing.assert_close(maxout(x, 255), x.amax(1, keepdim=True), rtol=0, atol=0)
    y = maxout(torch.cat([x, x[:, :1]], 1), 256)  # a winner would not fit a byte
    torch.testing.assert_close(y, x.amax(1, keepdim=True))


@pytest.mark.parametrize(
    ("shape", "pieces", "dim", "message"),
    [
        ((4, 7), 2, -1, "2 pieces don't divide the 7 features of dimension -1"),
        ((4, 6), 0, -1, "pieces must be a positive integer, not 0"),
        ((4, 6), -2, -1, "pieces must be a positive integer, not -2"),
        ((4, 6), 2.0, -1, "pieces must be a positive integer, not 2.0"),
    ],
)
def test_maxout_errors(shape: tuple[int, ...], pieces: object, dim: int, message: str, device: str) -> None:
    with pytest.raises(ValueError, match=message):
        maxout(torch.ones(shape, device=device), pieces, dim)
    with pytest.raises(IndexError, match="Dimension out of range"):
        maxout(torch.ones(shape, device=device), 2, 5)
    with pytest.raises(IndexError):
        maxout(torch.ones((), device=device), 1)


def test_maxout_of_what_kernels_refuse(device: str) -> None:
    integers = torch.arange(12, device=device).view(2, 6)
    assert torch.equal(maxout(integers, 3), stock_maxout(integers, 3))
    assert maxout(torch.ones(0, 6, device=device), 3).shape == (0, 2)
    assert maxout(torch.ones(2, 0, device=device), 3).shape == (2, 0)
    x = random_tensor((4, 6), torch.float64, device)
    assert torch.equal(maxout(x, 1), x)
    torch.testing.assert_close(torch.vmap(partial(maxout, pieces=2))(x), stock_maxout(x, 2))
    _, tangent = torch.func.jvp(partial(maxout, pieces=2), (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, torch.ones(4, 3, dtype=x.dtype, device=device))


# --- Of a linear layer ------------------------------------------------------------------------------------------------


@pytest.mark.kernels
@every_dtype
@pytest.mark.parametrize(
    ("rows", "units", "features", "pieces"),
    [
        ((32,), 48, 64, 2),  # fused
        ((70,), 33, 80, 3),  # fused, ragged
        ((9,), 1, 16, 2),  # fused, one unit
        ((2, 3), 5, 16, 8),
        ((5,), 7, 9, 2),  # apart: rows aren't aligned
        ((4,), 3, 16, 9),  # apart: many pieces
        ((), 6, 16, 4),  # one row
        ((1,), 1, 1, 2),
    ],
    ids=str,
)
def test_linear(rows: tuple[int, ...], units: int, features: int, pieces: int, dtype: torch.dtype, device: str) -> None:
    operands = linear_operands(rows, units, features, pieces, dtype, device)
    if dtype.itemsize > 2:
        check(maxout_linear, stock_linear, operands)
        check(maxout_linear, stock_linear, operands[:2])
    check_exact(maxout_linear, stock_linear, integers(operands))


@pytest.mark.kernels
@pytest.mark.parametrize("layout", LAYOUTS)
def test_linear_layouts(layout: str, device: str) -> None:
    for features in (32, 9):
        x, weight, bias = linear_operands((2, 3, 5), 4, features, 2, torch.float32, device)
        gradient = LAYOUTS[layout](random_tensor((2, 3, 5, 4), torch.float32, device, seed=3))
        check(maxout_linear, stock_linear, [LAYOUTS[layout](x), weight, bias], gradient)
        transposed = weight.transpose(0, 2).contiguous().transpose(0, 2)
        check(maxout_linear, stock_linear, [x, transposed, bias.t().contiguous().t()], gradient)


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.thorough)], ids=str)
@pytest.mark.usefixtures("tf32")
def test_large_tiles(dtype: torch.dtype, device: str) -> None:
    """Many rows and units: every program finds its own tiles."""
    x, weight, bias = linear_operands((1100,), 900, 16, 2, dtype, device)
    with torch.no_grad():
        y = maxout_linear(x, weight, bias)
        reference = stock_linear(x.double(), weight.double(), bias.double())
    torch.testing.assert_close(y.double(), reference, rtol=2e-2 if ON_GPU else 1e-2, atol=0.2 if ON_GPU else 1e-3)


@pytest.mark.kernels
@pytest.mark.parametrize("features", [16, 9])
def test_linear_ties_and_values_that_are_not_finite(features: int, device: str) -> None:
    x, weight, bias = linear_operands((8,), 6, features, 3, torch.float32, device)
    weight, bias = weight[:1].expand(3, -1, -1), bias[:1].expand(3, -1)  # all pieces equal
    _, (_, dw, db) = value_and_gradients(maxout_linear, [x, weight, bias], torch.ones(8, 6, device=device))
    assert not dw[1:].any()
    assert not db[1:].any()
    assert dw[0].any()
    assert db[0].eq(8).all()

    weight, bias = weight.clone(), bias.clone()
    bias[1, 0], bias[2, 0], bias[0, 1], bias[2, 2], bias[:, 3] = (
        float("nan"),
        float("nan"),
        float("nan"),
        1e38,
        -torch.inf,
    )
    bias[2, 4] = torch.inf
    results = [
        value_and_gradients(f, [x, weight, bias], torch.ones(8, 6, device=device))
        for f in (maxout_linear, stock_linear)
    ]
    (y, (dx, _, db)), (y_stock, (dx_stock, _, db_stock)) = results
    for ours, stock in ((y, y_stock), (dx, dx_stock), (db, db_stock)):
        torch.testing.assert_close(ours, stock, equal_nan=True)


@pytest.mark.kernels
@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False, False, True)])
def test_linear_gradients_only_where_required(needed: tuple[bool, ...], device: str) -> None:
    operands = linear_operands((4,), 5, 16, 2, torch.float32, device)
    for operand, need in zip(operands, needed, strict=True):
        operand.requires_grad_(need)
    with saved_tensors() as saved:
        y = maxout_linear(*operands)
    kept = {tensor.data_ptr() for tensor in saved.tensors}
    assert (operands[0].data_ptr() in kept) == needed[1]
    assert (operands[1].data_ptr() in kept) == needed[0]
    y.sum().backward()
    assert tuple(operand.grad is not None for operand in operands) == needed
    (wanted,) = (i for i, need in enumerate(needed) if need)
    _, gradients = value_and_gradients(stock_linear, operands, torch.ones_like(y))
    torch.testing.assert_close(operands[wanted].grad, gradients[wanted])


@pytest.mark.parametrize(
    ("x", "weight", "bias", "error", "message"),
    [
        ((2, 3), (3, 4), None, ValueError, "the weight must have 3 dimensions"),
        ((2, 3), (2, 4, 3), (4,), ValueError, r"the bias must be \(2, 4\), not \(4,\)"),
        ((2, 5), (2, 4, 3), None, RuntimeError, "shapes cannot be multiplied"),
        ((), (2, 4, 3), None, RuntimeError, "."),
    ],
)
def test_linear_errors(
    x: tuple, weight: tuple, bias: tuple | None, error: type[Exception], message: str, device: str
) -> None:
    with pytest.raises(error, match=message):
        maxout_linear(*(None if shape is None else torch.ones(shape, device=device) for shape in (x, weight, bias)))


def test_linear_of_what_kernels_refuse(device: str) -> None:
    weight = torch.ones(2, 4, 3, device=device)
    assert maxout_linear(torch.ones(0, 3, device=device), weight).shape == (0, 4)
    assert maxout_linear(torch.ones(2, 3, device=device), weight[:, :0]).shape == (2, 0)
    with pytest.raises(RuntimeError):
        maxout_linear(torch.ones(2, 3, device=device, dtype=torch.float64), weight)
    x = random_tensor((5, 3), torch.float32, device)
    torch.testing.assert_close(torch.vmap(lambda row: maxout_linear(row, weight))(x), stock_linear(x, weight))
    with pytest.raises(ValueError, match="dropout must be a probability"):
        maxout_linear(x, weight, dropout=1.5)


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.thorough)], ids=str)
@pytest.mark.parametrize(
    ("rows", "units", "features", "pieces"), [((150,), 80, 48, 2), ((7, 10), 16, 16, 3), ((9,), 1, 16, 4)], ids=str
)
def test_gradients_that_are_expanded_on_the_fly(
    rows: tuple[int, ...],
    units: int,
    features: int,
    pieces: int,
    dtype: torch.dtype,
    device: str,
    always_fused_backward: None,
) -> None:
    operands = integers(linear_operands(rows, units, features, pieces, dtype, device))
    check_exact(maxout_linear, stock_linear, operands)
    check_exact(maxout_linear, stock_linear, operands[:2])


@pytest.mark.kernels
@pytest.mark.smoke
@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False, False, True)])
def test_gradients_on_the_fly_only_where_required(
    needed: tuple[bool, ...], device: str, always_fused_backward: None
) -> None:
    operands = linear_operands((40,), 16, 32, 2, torch.float16, device)
    _, expected = value_and_gradients(stock_linear, operands, torch.ones(40, 16, dtype=torch.float16, device=device))
    for operand, need in zip(operands, needed, strict=True):
        operand.requires_grad_(need)
    maxout_linear(*operands).sum().backward()
    for operand, gradient, need in zip(operands, expected, needed, strict=True):
        assert (operand.grad is not None) == need
        if need:
            torch.testing.assert_close(operand.grad, gradient, rtol=2e-3, atol=2e-3)


@pytest.mark.kernels
@counts_bytes
def test_gradients_on_the_fly_keep_their_budget(device: str, always_fused_backward: None) -> None:
    """The expansion, ``pieces`` times as large as the maxima, is never in memory."""
    rows, units, features, pieces, e = 128, 64, 64, 4, 2
    operands = [leaf(t) for t in linear_operands((rows,), units, features, pieces, torch.bfloat16, device)]
    y = maxout_linear(*operands)
    with measure_traffic() as traffic:
        torch.autograd.grad(y, operands, torch.ones_like(y))
    assert traffic.launches == 2
    maxima, weights, data = rows * units, pieces * units * features, rows * features
    sums = rows // 64 * 4 * (weights + pieces * units)
    assert traffic.bytes == 2 * maxima * (e + 1) + weights * e + 2 * data * e + sums
    assert {operation.name for operation in traffic.operations} <= {"sum", "_to_copy", "ones_like", "fill_"}


@pytest.mark.kernels
def test_the_choice_of_the_backward_pass() -> None:
    assert takes_fused_backward(8192, 1024, 256, 2, torch.bfloat16, H100)
    assert not takes_fused_backward(8192, 1024, 1024, 2, torch.bfloat16, H100)
    assert not takes_fused_backward(128, 1024, 256, 2, torch.bfloat16, H100)
    assert not takes_fused_backward(8192, 1024, 256, 5, torch.bfloat16, H100)
    assert not takes_fused_backward(8192, 1000, 256, 2, torch.bfloat16, H100)
    assert not takes_fused_backward(8192, 1024, 256, 2, torch.float32, H100)
    assert [takes_fused_backward(8192, 1024, 256, 4, torch.bfloat16, device) for device in (H100, RTX)] == [True, False]


@pytest.mark.kernels
def test_the_choice_between_fused_and_apart(request: pytest.FixtureRequest) -> None:
    assert fused_refusal(2048, 2, torch.bfloat16, H100) is None
    assert fused_refusal(4096, 2, torch.bfloat16, H100) is not None
    assert fused_refusal(256, 2, torch.float32, H100) is None
    assert fused_refusal(512, 2, torch.float32, H100) is not None
    assert fused_refusal(16, 2, torch.float64, H100) is not None
    assert fused_refusal(24, 2, torch.float16, H100) is not None
    assert fused_refusal(16, 9, torch.float16, H100) is not None
    assert fused_refusal(16, 8, torch.float16, H100) is None
    assert fused_refusal(16, 5, torch.float32, H100) is not None
    request.getfixturevalue("tf32")
    assert fused_refusal(512, 2, torch.float32, H100) is None
    assert fused_refusal(512, 2, torch.float32, H100._replace(architecture="gfx90a")) is not None  # has no TF32


# --- Of a convolution -------------------------------------------------------------------------------------------------


@pytest.mark.kernels
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("pieces", [2, 3])
@pytest.mark.parametrize(
    "options",
    [{}, {"padding": "same", "dilation": 2}, {"stride": (2, 1), "padding": (0, 2)}, {"groups": 2, "padding": 1}],
    ids=str,
)
def test_conv2d(options: dict, pieces: int, memory_format: torch.memory_format, device: str) -> None:
    ours, stock = partial(maxout_conv2d, **options), partial(stock_conv2d, **options)
    x = random_tensor((2, 4, 9, 8), torch.float32, device).contiguous(memory_format=memory_format)
    weight = random_tensor((pieces, 6, 4 // options.get("groups", 1), 3, 3), torch.float32, device, seed=1)
    bias = random_tensor((pieces, 6), torch.float32, device, seed=2)
    for operands in ([x, weight, bias], [x, weight], [x[0], weight, bias]):
        check(ours, stock, operands)
    assert ours(x, weight, bias).is_contiguous(memory_format=memory_format)


@pytest.mark.kernels
@every_dtype
def test_conv2d_dtypes(dtype: torch.dtype, device: str) -> None:
    operands = [
        random_tensor(shape, dtype, device, i) for i, shape in enumerate([(2, 3, 6, 7), (2, 5, 3, 3, 3), (2, 5)])
    ]
    check(maxout_conv2d, stock_conv2d, operands)


@pytest.mark.kernels
def test_bias_gradient_over_many_tiles(device: str) -> None:
    x = random_tensor((1, 2, 46, 46), torch.float32, device)
    operands = [
        x,
        random_tensor((2, 3, 2, 1, 1), torch.float32, device, 1),
        random_tensor((2, 3), torch.float32, device, 2),
    ]
    check(maxout_conv2d, stock_conv2d, operands)
    operands[0] = x.contiguous(memory_format=torch.channels_last)
    check(maxout_conv2d, stock_conv2d, operands)


@pytest.mark.parametrize("bad", [{"weight": (6, 4, 3, 3)}, {"bias": (6,)}, {"x": (2, 5, 9, 8)}, {"x": (4,)}], ids=str)
def test_conv2d_errors(bad: dict, device: str) -> None:
    shapes = {"x": (2, 4, 9, 8), "weight": (2, 6, 4, 3, 3), "bias": (2, 6), **bad}
    with pytest.raises(RuntimeError if "x" in bad else ValueError):
        maxout_conv2d(*(torch.ones(shape, device=device) for shape in shapes.values()))


# --- Of all three -----------------------------------------------------------------------------------------------------

X = (3, 4, 6, 6)
FUNCTIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "maxout": (partial(maxout, pieces=2, dim=1), partial(stock_maxout, pieces=2, dim=1), [X]),
    "adjacent": (partial(maxout, pieces=3), partial(stock_maxout, pieces=3), [X]),
    "linear": (maxout_linear, stock_linear, [(5, 16), (3, 4, 16), (3, 4)]),
    "apart": (maxout_linear, stock_linear, [(5, 3), (3, 4, 3), (3, 4)]),
    "conv2d": (maxout_conv2d, stock_conv2d, [X, (2, 3, 4, 3, 3), (2, 3)]),
}
every_function = pytest.mark.parametrize("name", FUNCTIONS)

# Operands for difference quotients: few numbers, as a kernel runs several times for each.  In float64 a linear layer's
# product and maximum are always apart.
SMALL = {
    "maxout": [(1, 4, 1, 3)],
    "adjacent": [(1, 6)],
    "apart": [(2, 3), (2, 2, 3), (2, 2)],
    "conv2d": [(1, 1, 3, 3), (2, 2, 1, 2, 2), (2, 2)],
}


def tensors(name: str, dtype: torch.dtype, device: str) -> list[Tensor]:
    return [random_tensor(shape, dtype, device, seed) for seed, shape in enumerate(FUNCTIONS[name][2])]


@pytest.mark.kernels
@pytest.mark.parametrize("name", SMALL)
def test_first_and_second_derivatives(name: str, device: str) -> None:
    function = FUNCTIONS[name][0]
    operands = [leaf(random_tensor(shape, torch.float64, device, seed)) for seed, shape in enumerate(SMALL[name])]
    torch.autograd.gradcheck(function, operands)
    torch.autograd.gradgradcheck(function, operands)


@pytest.mark.kernels
@every_function
def test_second_derivatives_are_stocks(name: str, device: str) -> None:
    ours, stock, _ = FUNCTIONS[name]
    results = []
    for function in (ours, stock):
        operands = [leaf(t) for t in tensors(name, torch.float64, device)]
        gradients = torch.autograd.grad(function(*operands).square().sum(), operands, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in gradients), operands))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)


@every_function
def test_explains_its_choice(name: str, device: str) -> None:
    choices: list[Choice] = []
    with observe_choices(choices.append):
        FUNCTIONS[name][0](*tensors(name, torch.float32, device))
    choice, *product = choices
    assert choice.operation.startswith("maxout")
    assert [one.reason for one in product] == ["cuBLAS: the features are no multiple of 16"] * (
        name == "apart" and KERNELS_RUN
    )
    assert choice.path == ("kernel" if KERNELS_RUN else "stock")


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["linear", "apart", "conv2d"])
def test_autocast_is_stocks(name: str, dtype: torch.dtype, device: str) -> None:
    ours, stock, _ = FUNCTIONS[name]
    results = []
    for function in (ours, stock):
        operands = [leaf(t) for t in tensors(name, torch.float32, device)]
        with torch.autocast(device, dtype=dtype):
            y = function(*operands)
        assert y.dtype == dtype
        results.append((y, *torch.autograd.grad(y.float().sum(), operands)))
        assert all(g.dtype == torch.float32 for g in results[-1][1:])
    torch.testing.assert_close(results[0][0], results[1][0], rtol=2e-2, atol=2e-2)
    low = [t.to(dtype).float() for t in tensors(name, torch.float32, device)]
    _, exact = value_and_gradients(stock, low, torch.ones_like(results[0][0], dtype=torch.float32))
    for gradient, reference in zip(results[0][1:], exact, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=2e-2, atol=0.3)


@pytest.mark.kernels
@every_function
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(name: str, use_reentrant: bool, device: str) -> None:
    results = []
    for wrap in (True, False):
        operands = [leaf(t) for t in tensors(name, torch.float32, device)]
        function = FUNCTIONS[name][0]
        y = checkpoint(function, *operands, use_reentrant=use_reentrant) if wrap else function(*operands)
        y.square().sum().backward()
        results.append([operand.grad for operand in operands])
    for mine, theirs in zip(*results, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.kernels
@every_function
def test_compiled_results_equal_eager(name: str, device: str) -> None:
    torch._dynamo.reset()
    function = FUNCTIONS[name][0]
    compiled = torch.compile(lambda *operands: function(*operands) * 2, fullgraph=True, backend="aot_eager")
    results = []
    for run in (compiled, lambda *operands: function(*operands) * 2):
        operands = [leaf(t) for t in tensors(name, torch.float32, device)]
        y = run(*operands)
        results.append((y, *torch.autograd.grad(y.square().sum(), operands)))
    for mine, eager in zip(*results, strict=True):
        torch.testing.assert_close(mine, eager, rtol=0, atol=0)


@pytest.mark.kernels
def test_compiled_with_dynamic_batches(device: str) -> None:
    torch._dynamo.reset()
    weight, bias = (random_tensor(shape, torch.float32, device, 1) for shape in ((2, 6, 16), (2, 6)))

    def network(x: Tensor) -> Tensor:
        return maxout(maxout_linear(x, weight, bias, dropout=0.0), 3)

    compiled = torch.compile(network, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (8, 6, 7):
        x = random_tensor((batch, 16), torch.float32, device)
        torch.testing.assert_close(compiled(x), network(x), rtol=0, atol=0)


def _operator_calls() -> list[tuple[object, tuple]]:
    def tensor(*shape: int) -> Tensor:
        return random_tensor(shape, torch.float32, "cpu")

    calls = []
    channels_last = tensor(2, 6, 3, 5).contiguous(memory_format=torch.channels_last)
    for x in (tensor(2, 6, 3, 5), channels_last, tensor(2, 6, 3, 10)[..., ::2]):
        for adjacent in (True, False):
            bias = None if adjacent else tensor(3, 2)
            calls.append((_ops.maxout, (x, bias, 3, 1, adjacent, True)))
            y = x[:, :2].clone()
            winner = torch.zeros_like(y, dtype=torch.uint8)
            calls.append((_ops.maxout_backward, (y, winner, x.clone().stride(), 3, 1, adjacent, not adjacent)))
    for features in (16, 3):
        weight = tensor(3, 4, features)
        g, winner, x = tensor(2, 5, 4), torch.zeros(2, 5, 4, dtype=torch.uint8), tensor(2, 5, features)
        calls.append((_ops.maxout_linear_backward, (g, winner, x, weight, 3, 0.0, True)))
        calls.append((_ops.maxout_linear_backward, (g, winner, None, weight, 3, 0.5, False)))
        calls.append((_ops.maxout_linear, (tensor(5, features), weight, tensor(3, 4), None, 0.0, True)))
        calls.append((_ops.maxout_linear, (tensor(2, 5, features), weight, None, torch.tensor([3]), 0.5, False)))
    return calls


@pytest.mark.kernels
@pytest.mark.parametrize(("operator", "arguments"), _operator_calls(), ids=lambda value: getattr(value, "__name__", ""))
def test_opcheck(operator: object, arguments: tuple, device: str) -> None:
    moved = tuple(argument.to(device) if isinstance(argument, Tensor) else argument for argument in arguments)
    torch.library.opcheck(operator.default, moved)


# --- Dropout of the maxima --------------------------------------------------------------------------------------------


@pytest.mark.kernels
@pytest.mark.parametrize("features", [16, 9], ids=["fused", "apart"])
@pytest.mark.parametrize("p", [0.25, 1.0])
def test_dropout(features: int, p: float, device: str) -> None:
    operands = [leaf(t) for t in linear_operands((300,), 40, features, 2, torch.float32, device)]
    whole = maxout_linear(*operands)
    torch.manual_seed(3)
    y = maxout_linear(*operands, dropout=p)
    torch.manual_seed(3)
    assert torch.equal(maxout_linear(*operands, dropout=p), y)
    if p < 1:
        assert not torch.equal(maxout_linear(*operands, dropout=p), y)
    kept = y != 0
    assert abs(kept.float().mean().item() - (1 - p)) < 6 * (p * (1 - p) / y.numel()) ** 0.5 + 1e-9
    scale = 1 / (1 - p) if p < 1 else 0.0
    torch.testing.assert_close(y, torch.where(kept, whole * scale, 0))
    gradient = random_tensor(tuple(y.shape), torch.float32, device, seed=5)
    ours = torch.autograd.grad(y, operands, gradient)
    expected = torch.autograd.grad(whole, operands, torch.where(kept, gradient * scale, 0))
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.kernels
@pytest.mark.parametrize("features", [16, 9], ids=["fused", "apart"])
def test_dropout_keeps_what_is_not_a_number(features: int, device: str) -> None:
    """As PyTorch, which multiplies by 0."""
    x, weight, bias = linear_operands((8,), 3, features, 2, torch.float32, device)
    bias[0, 0], bias[1, 1] = torch.nan, torch.inf
    y = maxout_linear(x, weight, bias, dropout=0.9)
    assert y[:, 0].isnan().all()
    assert (y[:, 1].isnan() | y[:, 1].isposinf()).all()
    assert y[:, 1].isnan().any()
    assert y[:, 2].isfinite().all()


@pytest.mark.kernels
@pytest.mark.parametrize("features", [16, 9], ids=["fused", "apart"])
def test_dropout_is_independent_of_its_neighbours(features: int, device: str) -> None:
    x, weight, bias = linear_operands((512,), 128, features, 2, torch.float32, device)
    kept = (maxout_linear(x, weight, bias, dropout=0.5) != 0).double() * 2 - 1
    limit = 6 / kept.numel() ** 0.5
    for rows, columns in ((0, 1), (0, 2), (0, 32), (1, 0), (32, 0), (64, 0)):
        shifted = kept[rows:, columns:] * kept[: len(kept) - rows, : kept.shape[1] - columns]
        assert shifted.mean().abs() < limit * 1.5, (rows, columns)


@pytest.mark.kernels
def test_second_derivatives_with_dropout(device: str) -> None:
    operands = [leaf(t) for t in linear_operands((2,), 2, 3, 2, torch.float64, device)]

    def function(*operands: Tensor) -> Tensor:
        torch.manual_seed(3)
        return maxout_linear(*operands, dropout=0.5)

    torch.autograd.gradcheck(function, operands)
    torch.autograd.gradgradcheck(function, operands)


# --- Bytes ------------------------------------------------------------------------------------------------------------


@pytest.mark.kernels
@counts_bytes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("pieces", [2, 3])
def test_linear_keeps_its_budget(pieces: int, dtype: torch.dtype, device: str) -> None:
    """Product and maximum: each operand read once, the maxima and their winners written; nothing in between."""
    rows, units, features = 64, 32, 64  # one tile
    operands = [leaf(t) for t in linear_operands((rows,), units, features, pieces, dtype, device)]
    e = dtype.itemsize
    operand_bytes = sum(operand.numel() * e for operand in operands)
    maxima = rows * units
    with measure_traffic() as forward, saved_tensors() as saved:
        y = maxout_linear(*operands)
    assert forward.launches == 1
    assert not forward.operations
    assert forward.bytes == operand_bytes + maxima * (e + 1)
    assert saved.bytes_beside(*operands) == maxima
    gradient = random_tensor((rows, units), dtype, device)
    with measure_traffic() as backward:
        torch.autograd.grad(y, operands, gradient)
    partial_sums = pieces * units * 4
    assert backward.launches == 1
    assert backward.bytes == maxima * (e + 1 + pieces * e) + partial_sums
    assert {operation.name for operation in backward.operations} <= {"matmul", "sum"}
    with measure_traffic() as inference, torch.no_grad():
        maxout_linear(*operands)
    assert inference.bytes == operand_bytes + maxima * e


@pytest.mark.kernels
@counts_bytes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("dim", "pieces"), [(-1, 2), (-1, 3), (-1, 4), (1, 2), (1, 3)])
def test_maxout_keeps_its_budget(dim: int, pieces: int, dtype: torch.dtype, device: str) -> None:
    x = leaf(random_tensor((8, 12, 16, 12), dtype, device))
    maxima, e = x.numel() // pieces, dtype.itemsize
    with measure_traffic() as forward, saved_tensors() as saved:
        y = maxout(x, pieces, dim)
    gradient = random_tensor(tuple(y.shape), dtype, device)
    with measure_traffic() as backward:
        torch.autograd.grad(y, x, gradient)
    for traffic in (forward, backward):
        assert traffic.bytes == x.numel() * e + maxima * (e + 1)
        assert traffic.launches == 1
        assert not traffic.operations
    assert saved.bytes == maxima


@pytest.mark.kernels
@counts_bytes
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_conv2d_keeps_its_budget(memory_format: torch.memory_format, device: str) -> None:
    x, weight, bias = (
        random_tensor(s, torch.float32, device, i) for i, s in enumerate([(8, 3, 18, 18), (2, 8, 3, 3, 3), (2, 8)])
    )
    operands = [leaf(t) for t in (x.contiguous(memory_format=memory_format), weight, bias)]
    with measure_traffic() as forward, saved_tensors() as saved:
        y = maxout_conv2d(*operands)
    assert y.is_contiguous(memory_format=memory_format)
    assert forward.launches == 1
    assert [operation.name for operation in forward.operations] == ["convolution"]
    tensor = y.numel() * 4
    assert 3.25 * tensor <= forward.bytes <= 1.05 * 3.25 * tensor  # two pieces read, maxima and winners written
    assert saved.bytes_beside(*operands) == y.numel()
    with measure_traffic() as backward:
        torch.autograd.grad(y, operands, torch.ones_like(y))
    assert backward.launches == 1
    assert 3.25 * tensor <= backward.bytes <= 1.05 * 3.25 * tensor
    assert {operation.name for operation in backward.operations} - {"ones_like", "fill_"} == {
        "convolution_backward",
        "sum",
    }


@pytest.mark.kernels
def test_every_launch_is_a_shipped_configuration(
    device: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    launched = []
    original = kernels.maxout.launch

    def record(configuration: kernels.Configuration, programs: int, *arguments: object) -> None:
        launched.append((configuration, arguments))
        original(configuration, programs, *arguments)

    for module in (kernels.maxout, kernels.linear_maxout):
        monkeypatch.setattr(module, "launch", record)
    for dtype in (torch.float16, torch.float32, torch.float64):
        for name in FUNCTIONS:
            operands = [leaf(t) for t in tensors(name, dtype, device)]
            FUNCTIONS[name][0](*operands).sum().backward()
            FUNCTIONS[name][0](*(operand.detach() for operand in operands))
    request.getfixturevalue("tf32")
    maxout_linear(*tensors("linear", torch.float32, device))
    assert "tf32" in launched[-1][0].label
    shipped = set(kernels.shipped("maxout"))
    for configuration, arguments in launched:
        assert configuration in shipped
        for (name, kind), argument in zip(configuration.signature, arguments, strict=True):
            expected = kernels.base.launch.TRITON_TYPE[argument.dtype] if isinstance(argument, Tensor) else None
            assert expected is None or kind == f"*{expected}", f"{configuration.label}: {name} is {expected}"


# --- On a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@every_function
def test_no_host_synchronisation(name: str, device: str) -> None:
    function = FUNCTIONS[name][0]
    operands = [leaf(t) for t in tensors(name, torch.float32, device)]
    gradient = torch.ones_like(function(*operands))
    torch.autograd.grad(function(*operands), operands, gradient)  # compiles
    with no_synchronisation():
        torch.autograd.grad(function(*operands), operands, gradient)


@pytest.mark.gpu
@every_function
def test_cuda_graph(name: str, device: str) -> None:
    function = FUNCTIONS[name][0]
    operands = [leaf(t) for t in tensors(name, torch.float32, device)]
    gradient = torch.ones_like(function(*operands))

    def step() -> tuple[Tensor, ...]:
        y = function(*operands)
        return (y, *torch.autograd.grad(y, operands, gradient))

    graph, captured = capture(step)
    with torch.no_grad():
        operands[0].mul_(-1)
    graph.replay()
    for replayed, eager in zip(copy.deepcopy([t.detach() for t in captured]), step(), strict=True):
        torch.testing.assert_close(replayed, eager)


@pytest.mark.gpu
def test_no_recompilation_over_fifty_steps(device: str) -> None:
    _, weight, bias = (leaf(t) for t in linear_operands((4,), 48, 64, 2, torch.float32, device))

    def step(batch: int) -> None:
        x = torch.randn(batch, 64, device=device, requires_grad=True)
        maxout(maxout_linear(x, weight, bias, dropout=0.1), 2).sum().backward()

    for batch in (32, 17):
        step(batch)
    before = compiled_kernels("maxout")
    for index in range(50):
        step(17 if index % 10 == 9 else 32)
    assert compiled_kernels("maxout") == before
