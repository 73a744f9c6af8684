"""Maxout of a linear layer: products and maxima in one kernel, and apart."""

from collections.abc import Iterator

import pytest
import torch
from support.device import FLOAT_DTYPES, ON_GPU
from support.maxout import check, check_exact, integers, linear_operands, stock_linear

from fusednn import kernels
from fusednn.autograd import maxout_linear
from fusednn.instruments.saved_tensors import saved_tensors
from fusednn.kernels.base.device import Device
from fusednn.kernels.linear_maxout import fused_refusal, takes_fused_backward
from fusednn.testing import LAYOUTS, leaf, random_tensor, value_and_gradients

if kernels.INTERPRETING:
    from fusednn.instruments.traffic import measure_traffic

H100, RTX = Device("sm_90", 32, 227 * 1024), Device("sm_120", 32, 99 * 1024)
counts_bytes = pytest.mark.interpreter
every_dtype = pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)


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
    assert takes_fused_backward(16384, 1024, 64, 2, torch.bfloat16, H100)
    assert not takes_fused_backward(16384, 1024, 128, 2, torch.bfloat16, H100)
    assert not takes_fused_backward(128, 1024, 64, 2, torch.bfloat16, H100)
    assert not takes_fused_backward(16384, 1024, 64, 5, torch.bfloat16, H100)
    assert not takes_fused_backward(16384, 1000, 64, 2, torch.bfloat16, H100)
    assert not takes_fused_backward(16384, 1024, 64, 2, torch.float32, H100)
    assert [takes_fused_backward(16384, 1024, 64, 4, torch.bfloat16, device) for device in (H100, RTX)] == [True, False]


@pytest.mark.kernels
def test_the_choice_between_fused_and_apart(request: pytest.FixtureRequest) -> None:
    assert fused_refusal(512, 2, torch.bfloat16, H100) is None
    assert fused_refusal(1024, 2, torch.bfloat16, H100) == "cuBLAS: more than 512 features"
    assert fused_refusal(256, 2, torch.float32, H100) is None
    assert fused_refusal(512, 2, torch.float32, H100) is not None
    assert fused_refusal(16, 2, torch.float64, H100) == "cuBLAS: no kernel multiplies 2 pieces in fp64"
    assert fused_refusal(24, 2, torch.float16, H100) == "cuBLAS: the features are no multiple of 16"
    assert fused_refusal(16, 9, torch.float16, H100) is not None
    assert fused_refusal(16, 8, torch.float16, H100) is None
    assert fused_refusal(16, 5, torch.float32, H100) is not None
    request.getfixturevalue("tf32")
    assert fused_refusal(512, 2, torch.float32, H100) is None
    assert fused_refusal(512, 2, torch.float32, H100._replace(architecture="gfx90a")) is not None  # has no TF32
