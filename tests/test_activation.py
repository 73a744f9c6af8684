"""The activation functions against PyTorch's: values, gradients, layouts, extremes, in-place, second derivatives."""

import inspect
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.device import FLOAT_DTYPES
from support.samples import CASES, Case
from torch import Tensor

from fusednn import autograd, kernels
from fusednn.autograd.onednn import without_onednn
from fusednn.testing import (
    EXTREMES,
    FAR,
    LAYOUTS,
    assert_accurate,
    assert_same_bits,
    leaf,
    random_tensor,
    value_and_gradients,
)

pytestmark = pytest.mark.kernels

every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_dtype = pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@every_case
@every_dtype
@pytest.mark.smoke
def test_values_and_gradients(case: Case, dtype: torch.dtype, device: str) -> None:
    x = random_tensor((3, 5, 16, 17), dtype, device)
    case.check(case.operands(x), random_tensor((3, 5, 16, 17), dtype, device, seed=1))


@every_case
@pytest.mark.parametrize("input_layout", LAYOUTS)
@pytest.mark.parametrize(
    "gradient_layout", [pytest.param("channels_last", marks=pytest.mark.thorough), "strided", "scalar"]
)
def test_layouts(case: Case, input_layout: str, gradient_layout: str, device: str) -> None:
    x = LAYOUTS[input_layout](random_tensor((2, 3, 4, 5), torch.float32, device))
    gradient = LAYOUTS[gradient_layout](random_tensor((2, 3, 4, 5), torch.float32, device, seed=1))
    case.check(case.operands(x), gradient)


@every_case
@pytest.mark.parametrize("shape", [(1, 1), (7, 1), (1, 5), (2048,), (2047,), (2049,), (3, 4097), (), (1, 3, 1, 1)])
def test_shapes(case: Case, shape: tuple[int, ...], device: str) -> None:
    if case.slopes and len(shape) < 2:
        pytest.skip("slopes per channel need a channel dimension")
    x = random_tensor(shape, torch.float32, device)
    case.check(case.operands(x), random_tensor(shape, torch.float32, device, seed=1))


@every_case
def test_empty_tensors(case: Case, device: str) -> None:
    x = torch.empty((0, 5, 3), device=device)
    y, gradients = value_and_gradients(case.ours, case.operands(x), torch.empty_like(x))
    assert y.shape == x.shape
    assert gradients[0].shape == x.shape
    assert not any(gradient.any() for gradient in gradients)


@every_case
@every_dtype
def test_extremes(case: Case, dtype: torch.dtype, device: str) -> None:
    x = torch.tensor(EXTREMES + FAR, dtype=torch.float64).to(device, dtype).repeat(1, 3, 1)
    case.check(case.operands(x), torch.ones_like(x))


# Of zeros at a bound of zero the sign is the maximum's: PyTorch's CPU code keeps -0, its CUDA code doesn't.
CLAMPED_AT_ZERO = ("relu", "relu6")


@pytest.mark.parametrize("case", [*CASES, Case("rrelu", {"lower": 0.25, "upper": 0.25, "training": True})], ids=str)
@every_dtype
def test_special_values(case: Case, dtype: torch.dtype, device: str) -> None:
    """NaN, infinities, zeros of both signs, and subnormals, which the accuracy rule doesn't see beside 1."""
    if case.arguments.get("training") and dtype is torch.float16 and device == "cpu":
        pytest.skip("stock has none")
    infinity, tiny = float("inf"), torch.finfo(dtype).smallest_normal
    for values in ([float("nan"), infinity, -infinity, 1.0], [0.0, -0.0], [tiny / 2, -tiny / 2, tiny / 8]):
        if values[0] == tiny / 2 and dtype is torch.bfloat16 and not kernels.INTERPRETING:
            continue  # compiled, the device library flushes them, in fewer instructions
        x = torch.tensor(values, dtype=torch.float64).to(device, dtype).repeat(1, 1, 1)
        operands = [x, torch.tensor([0.25], dtype=dtype, device=device)] if case.slopes else [x]
        with without_onednn():  # whose GELU flushes subnormals, and gives NaN for infinity
            case.check(operands, torch.full_like(x, 0.5))
            y, (dx, *_) = value_and_gradients(case.ours, operands, torch.ones_like(x))
            y_stock, (dx_stock, *_) = value_and_gradients(case.stock, operands, torch.ones_like(x))
        torch.testing.assert_close(dx, dx_stock, rtol=0.01, atol=tiny / 64, equal_nan=True)
        torch.testing.assert_close(y, y_stock, rtol=0.01, atol=tiny / 64, equal_nan=True)
        if case.name not in CLAMPED_AT_ZERO:
            assert torch.equal(y[y == 0].signbit(), y_stock[y == 0].signbit()), "signs of zeros"


@every_case
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.thorough
def test_every_half_precision_number(case: Case, dtype: torch.dtype, device: str) -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    x = bits.view(dtype).to(device)
    x = x[x.isfinite()].view(1, 1, -1)
    case.check(case.operands(x), torch.ones_like(x))


@every_case
def test_gradcheck_and_gradgradcheck(case: Case, device: str) -> None:
    operands = [leaf(t) for t in case.operands(random_tensor((2, 3, 2), torch.float64, device, seed=3))]
    assert torch.autograd.gradcheck(case.ours, operands)
    assert torch.autograd.gradgradcheck(case.ours, operands, fast_mode=True)


@every_case
def test_second_derivative_of_a_plain_sum(case: Case, device: str) -> None:
    # No operand of the gradient requires gradients but the input itself; for ReLU the answer is zero, not an error.
    x = leaf(random_tensor((2, 3, 4), torch.float64, device, seed=3))
    operands = case.operands(x)
    results = []
    for function in (case.ours, case.stock):
        if case.name == "hardsigmoid" and function is not case.ours:
            results.append(torch.zeros_like(x))  # stock has no second derivative of hardsigmoid; it is zero
            continue
        (gradient,) = torch.autograd.grad(function(*operands).sum(), x, create_graph=True)
        results.append(torch.autograd.grad(gradient.sum(), x)[0])
    torch.testing.assert_close(*results)


INPLACE_CASES = [case for case in CASES if case.inplace]
# Stock refuses the gradient of an in-place leaky ReLU with a negative slope; that has a test of its own.
DIFFERENTIABLE_INPLACE_CASES = [case for case in INPLACE_CASES if case.arguments.get("negative_slope", 0) >= 0]


@pytest.mark.parametrize("case", DIFFERENTIABLE_INPLACE_CASES, ids=str)
@pytest.mark.parametrize("view", ["whole", "sliced", "transposed"])
def test_inplace(case: Case, view: str, device: str) -> None:
    views = {
        "whole": lambda t: t,
        "sliced": lambda t: t[:, 1:3],
        "transposed": lambda t: t.transpose(0, 2),
    }
    results = []
    for function in (case.ours, case.stock):
        x = leaf(random_tensor((4, 5, 6), torch.float64, device))
        base = x * 1
        target = views[view](base)
        version = base._version
        y = function(target, inplace=True)
        assert y is target
        assert base._version > version
        results.append((base.detach(), *torch.autograd.grad((base * base).sum(), x)))
    for ours, stock in zip(*results, strict=True):
        torch.testing.assert_close(ours, stock)


@pytest.mark.parametrize("case", INPLACE_CASES, ids=str)
def test_inplace_without_gradients(case: Case, device: str) -> None:
    x = random_tensor((4, 5, 6), torch.float32, device)
    expected = case.ours(x)
    version = x._version
    assert case.ours(x, inplace=True) is x
    assert x._version > version
    assert_same_bits(x, expected)
    with torch.inference_mode():
        inference = random_tensor((4, 5, 6), torch.float32, device)
        assert_same_bits(case.ours(inference, inplace=True), expected)


@pytest.mark.parametrize("case", INPLACE_CASES, ids=str)
def test_inplace_errors_are_stocks(case: Case, device: str) -> None:
    for function in (case.ours, case.stock):
        with pytest.raises(RuntimeError, match="leaf"):
            function(torch.ones(3, device=device, requires_grad=True), inplace=True)
    overlapping = [torch.ones(1, device=device).expand(4) for _ in range(2)]
    outcomes = [_outcome(function, x) for function, x in zip((case.ours, case.stock), overlapping, strict=True)]
    assert outcomes[0] == outcomes[1]


def _outcome(function: Callable[..., Tensor], x: Tensor) -> list[float] | str:
    try:
        return function(x, inplace=True).tolist()
    except RuntimeError as error:
        return str(error)


def test_inplace_leaky_relu_with_a_negative_slope_is_rejected_as_by_stock(device: str) -> None:
    x = torch.ones(3, device=device, requires_grad=True)
    for function in (autograd.leaky_relu, F.leaky_relu):
        y = function(x * 1, negative_slope=-0.5, inplace=True)
        with pytest.raises(RuntimeError, match="negative slope"):
            y.sum().backward()


@every_case
def test_signature_is_stocks(case: Case) -> None:
    try:
        theirs = inspect.signature(case.stock.func)
    except ValueError:  # a builtin
        theirs = _BUILTIN_SIGNATURES[case.name]
    ours = inspect.signature(getattr(autograd, case.name))
    assert [(p.name, p.default, p.kind) for p in ours.parameters.values()] == [
        (p.name, p.default, p.kind) for p in theirs.parameters.values()
    ]


def _gelu(input, *, approximate="none", out=None): ...
def _logsigmoid(input, *, out=None): ...
def _prelu(input, weight): ...
def _softplus(input, beta=1.0, threshold=20.0, *, out=None): ...


_BUILTIN_SIGNATURES = {
    "gelu": inspect.signature(_gelu),
    "logsigmoid": inspect.signature(_logsigmoid),
    "prelu": inspect.signature(_prelu),
    "softplus": inspect.signature(_softplus),
}


@pytest.mark.parametrize(
    ("case", "x"),
    [
        (Case("logsigmoid"), -100.0),
        (Case("softplus"), 100.0),
        (Case("softplus"), -80.0),
        (Case("mish"), 30.0),
        (Case("elu"), -1e-6),
        (Case("tanh"), 1e-4),
        (Case("sigmoid"), -88.0),
        (Case("softplus"), -88.0),
        (Case("logsigmoid"), 88.0),
    ],
    ids=str,
)
def test_stable_forms(case: Case, x: float, device: str) -> None:
    """To a few units in the last place, not only in the absolute terms of the accuracy rule."""
    y, (gradient,) = value_and_gradients(case.ours, [torch.tensor(x, device=device)], torch.tensor(1.0, device=device))
    y64, (gradient64,) = value_and_gradients(
        case.stock, [torch.tensor(x, device=device).double()], torch.tensor(1.0, device=device).double()
    )
    torch.testing.assert_close(y.double(), y64, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient.double(), gradient64, rtol=1e-6, atol=0)


def test_softplus_stays_finite_beyond_a_large_threshold(device: str) -> None:
    y, (gradient,) = value_and_gradients(
        lambda x: autograd.softplus(x, 1.0, 1000.0),
        [torch.tensor([500.0], device=device)],
        torch.ones(1, device=device),
    )
    assert y.item() == 500
    assert gradient.item() == 1


def test_parameters_are_exact_in_float64(device: str) -> None:
    x = torch.tensor([-1.0], dtype=torch.float64, device=device)
    assert autograd.leaky_relu(x, 0.1).item() == -0.1
    assert autograd.hardtanh(x, -0.1, 0.1).item() == -0.1


def test_accuracy_helper_sees_what_it_should() -> None:
    reference = torch.tensor([1.0, 2.0], dtype=torch.float64)
    stock = reference.float()
    assert_accurate(stock + 1e-7, stock, reference)
    with pytest.raises(AssertionError, match="error"):
        assert_accurate(stock + 1e-6, stock, reference)
    with pytest.raises(AssertionError, match="not finite"):
        assert_accurate(torch.tensor([1.0, float("nan")]), stock, reference)
