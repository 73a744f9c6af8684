"""The maximum and the mean over all places behind batch norm or a bias, and an activation, in one pass."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.device import FLOAT_DTYPES
from support.draws import check_over_draws
from torch import Tensor

from fusednn import kernels
from fusednn.autograd.batch_norm_pool import activation_pool, batch_norm_pool
from fusednn.autograd.dispatch import Choice, observe_choices
from fusednn.instruments.saved_tensors import saved_tensors
from fusednn.testing import LAYOUTS, check_against_stock, leaf, random_tensor

if kernels.INTERPRETING:
    from fusednn.instruments.traffic import measure_traffic

pytestmark = pytest.mark.kernels

EPS = 1e-3
SHAPES = [(5, 3, 7), (3, 70, 5, 4), (1, 1, 3, 3), (2, 3, 2, 3, 4), (2, 2, 700), (4, 1, 5), (4, 5, 1)]
both = pytest.mark.parametrize("maximum", [True, False], ids=["maximum", "mean"])


def reduced(y: Tensor, maximum: bool) -> Tensor:
    return y.flatten(2).max(2).values if maximum else y.flatten(2).mean(2)


def normed(training: bool, maximum: bool, channels: int, name: str = "relu") -> tuple[Callable[..., Tensor], ...]:
    """Ours and stock's, of the input, weight, bias and slopes, as many as there are; PReLU's where there are slopes."""

    def running(x: Tensor) -> tuple[Tensor, Tensor]:
        dtype = x.dtype if x.dtype.itemsize > 2 else torch.float32
        return torch.linspace(-1, 1, channels).to(x.device, dtype), torch.linspace(0.5, 2, channels).to(x.device, dtype)

    def ours(x: Tensor, weight: Tensor, bias: Tensor, *slopes: Tensor) -> Tensor:
        activation = {"slopes": slopes[0]} if slopes else {"activation": name}
        return batch_norm_pool(x, *running(x), weight, bias, training, 0.1, EPS, maximum=maximum, **activation)

    def stock(x: Tensor, weight: Tensor, bias: Tensor, *slopes: Tensor) -> Tensor:
        y = F.batch_norm(x, *running(x), weight, bias, training, 0.1, EPS)
        return reduced(F.prelu(y, *slopes) if slopes else getattr(F, name)(y), maximum)

    return ours, stock


def biased(maximum: bool, name: str = "relu") -> tuple[Callable[..., Tensor], ...]:
    """Ours and stock's, of what a convolution left, and its bias."""

    def added(z: Tensor, bias: Tensor | None) -> Tensor:
        return z if bias is None else z + bias.view(-1, *[1] * (z.dim() - 2))

    def ours(z: Tensor, bias: Tensor, *slopes: Tensor) -> Tensor:
        options = {"maximum": maximum, "slopes": slopes[0] if slopes else None}
        return activation_pool(lambda given: added(z, given), bias, name, (), **options)

    def stock(z: Tensor, bias: Tensor, *slopes: Tensor) -> Tensor:
        y = added(z, bias)
        return reduced(F.prelu(y, *slopes) if slopes else getattr(F, name)(y), maximum)

    return ours, stock


def operands(shape: tuple[int, ...], dtype: torch.dtype, device: str, slopes: int = 0) -> tuple[list[Tensor], Tensor]:
    x, gradient = random_tensor(shape, dtype, device), random_tensor(shape[:2], dtype, device, 1)
    parameter = dtype if dtype.itemsize > 2 else torch.float32
    weight, bias = (random_tensor(shape[1:2], parameter, device, seed) for seed in (2, 3))
    rest = [torch.linspace(-0.5, 0.9, slopes, dtype=dtype, device=device)] if slopes else []
    return [x, weight, bias, *rest], gradient


@both
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape: tuple[int, ...], maximum: bool, device: str) -> None:
    (x, weight, bias), gradient = operands(shape, torch.float32, device)
    check_against_stock(*normed(True, maximum, shape[1]), [x, weight, bias], gradient)
    check_against_stock(*biased(maximum), [x, bias], gradient)


@both
@pytest.mark.parametrize(
    "layout", ["channels_last", *(pytest.param(name, marks=pytest.mark.thorough) for name in LAYOUTS)]
)
def test_layouts(layout: str, maximum: bool, device: str) -> None:
    (x, weight, bias), gradient = operands((3, 6, 5, 4), torch.float32, device)
    check_against_stock(*normed(True, maximum, 6), [LAYOUTS[layout](x), weight, bias], gradient)
    check_against_stock(*biased(maximum), [LAYOUTS[layout](x), bias], gradient)


@both
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.smoke
def test_dtypes_and_slopes(dtype: torch.dtype, training: bool, maximum: bool, device: str) -> None:
    tensors, gradient = operands((4, 5, 30), dtype, device, 5 if training else 1)
    check_against_stock(*normed(training, maximum, 5), tensors, gradient)


@both
@pytest.mark.parametrize("name", ["gelu", "hardswish"])
def test_activations_that_fall(name: str, maximum: bool, device: str) -> None:
    (x, weight, bias), gradient = operands((3, 4, 25), torch.float32, device)
    check_against_stock(*normed(True, maximum, 4, name), [x, weight, bias], gradient)
    check_against_stock(*biased(maximum, name), [x, bias], gradient)


@both
@pytest.mark.parametrize("name", ["relu", "elu", "tanh", pytest.param("selu", marks=pytest.mark.thorough)])
def test_as_accurate_as_stock(name: str, maximum: bool, device: str) -> None:
    def draw(seed: int) -> tuple[list[Tensor], Tensor]:
        shapes = ((2, 3, 2, 3, 4), (3,), (3,), (2, 3))
        *tensors, gradient = (random_tensor(one, torch.float32, device, 4 * seed + i) for i, one in enumerate(shapes))
        return tensors, gradient

    draws = [draw(seed) for seed in range(9)]
    check_over_draws(*normed(True, maximum, 3, name), draws)
    check_over_draws(*biased(maximum, name), [([x, bias], gradient) for (x, _, bias), gradient in draws])


def test_a_bias_and_slopes(device: str) -> None:
    (x, _, bias, slopes), gradient = operands((3, 4, 25), torch.float32, device, 4)
    for maximum in (True, False):
        check_against_stock(*biased(maximum), [x, bias, slopes], gradient)


@pytest.mark.parametrize("channels_last", [True, False])
def test_extremes(channels_last: bool, device: str) -> None:
    """The first of equal ones gets the gradient; what isn't a number is the maximum; so is what is below all others."""
    z = torch.zeros(4, 3, 2, 40, device=device)
    z[0, 0, 1, 3] = z[0, 0, 1, 9] = 2
    z[1, 1, 0, 30] = float("nan")
    z[2] = float("-inf")
    z[3, 2, 1, 39] = float("inf")
    z = leaf(z.to(memory_format=torch.channels_last) if channels_last else z)
    for ours, stock in (biased(True, "tanh"), biased(True, "leaky_relu")):
        y, expected = (one(z, torch.zeros(3, device=device)) for one in (ours, stock))
        torch.testing.assert_close(y, expected, equal_nan=True)
        g = torch.arange(1.0, 13.0, device=device).view(4, 3)
        found = (torch.autograd.grad(one, z, g)[0] for one in (y, expected))
        torch.testing.assert_close(*found, equal_nan=True)


@both
@pytest.mark.parametrize("training", [True, False])
def test_second_derivatives(training: bool, maximum: bool, device: str) -> None:
    tensors, _ = operands((3, 2, 2), torch.float64, device)
    function = normed(training, maximum, 2, "tanh")[0]
    torch.autograd.gradgradcheck(function, [leaf(tensor) for tensor in tensors], fast_mode=True)


@both
def test_second_derivatives_behind_a_bias(maximum: bool, device: str) -> None:
    """Stock's, of a penalty on gradients whose graph is kept: `gradgradcheck` compares ours with themselves."""
    (x, _, bias), _ = operands((3, 2, 4), torch.float64, device)
    found = []
    for function in biased(maximum, "tanh"):
        leaves = [leaf(x), leaf(bias)]
        first = torch.autograd.grad(function(*leaves).square().sum(), leaves, create_graph=True)
        penalty = sum(gradient.square().sum() for gradient in first)
        found.append([*first, *torch.autograd.grad(penalty, leaves)])
    torch.testing.assert_close(*found)


def test_running_statistics_are_stocks(device: str) -> None:
    x, weight, bias = operands((4, 6, 9), torch.float32, device)[0]
    for momentum, counted in ((0.25, None), (None, torch.tensor(3, device=device))):
        ours, stock = ([torch.zeros(6, device=device), torch.ones(6, device=device)] for _ in range(2))
        batch_norm_pool(x, *ours, weight, bias, True, momentum or 0.0, EPS, counted, maximum=True)
        F.batch_norm(x, *stock, weight, bias, True, momentum or 1 / 3, EPS)
        torch.testing.assert_close(ours, stock)


def test_what_goes_to_stock(device: str) -> None:
    choices: list[Choice] = []
    flat, one = torch.ones(3, 4, device=device), torch.ones(1, 4, 1, device=device)
    with observe_choices(choices.append):
        with pytest.raises(IndexError):
            batch_norm_pool(flat, None, None, None, None, True, 0.1, EPS, maximum=True)
        with pytest.raises(ValueError, match="more than 1 value"):
            batch_norm_pool(one, None, None, None, None, True, 0.1, EPS, maximum=True)
    assert [choice.reason for choice in choices] == ["there are no places to reduce over", "one value per channel"]


@both
@pytest.mark.parametrize("of_a_norm", [True, False], ids=["norm", "bias"])
def test_operators_describe_themselves(of_a_norm: bool, maximum: bool, device: str) -> None:
    (x, weight, bias), gradient = operands((3, 6, 5), torch.float32, device)
    zero, one = torch.zeros(6, device=device), torch.ones(6, device=device)
    vectors = (zero, one, weight, bias, None) if of_a_norm else (None, None, None, bias, None)
    rest = (*vectors, EPS, "relu", 0.0, 0.0)
    ops, utilities = torch.ops.fusednn, ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.batch_norm_pool.default, (x, *rest, maximum, True), test_utils=utilities)
    kept = ops.batch_norm_pool(x, *rest, maximum, True)[1:] if maximum else (None, None)
    backward = (gradient, x, *kept, *rest, of_a_norm)
    torch.library.opcheck(ops.batch_norm_pool_backward.default, backward, test_utils=utilities)


@both
@pytest.mark.interpreter
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_nothing_of_the_inputs_size_is_written_but_its_gradient(
    memory_format: torch.memory_format, maximum: bool, device: str
) -> None:
    """Behind a norm: twice read; backward read once, of a mean twice, and written.  Behind a bias: read once, of a
    maximum not at all, and written.
    """
    (x, weight, bias), gradient = operands((8, 16, 16, 16), torch.float32, device)
    x, weight, bias = leaf(x.to(memory_format=memory_format)), leaf(weight), leaf(bias)
    size, small = x.numel() * x.itemsize, 0.1 * x.numel() * x.itemsize
    reads = {True: (2, 2 if maximum else 3), False: (1, 1 if maximum else 2)}
    for of_a_norm, (ahead, back) in reads.items():
        function, leaves = (normed(True, maximum, 16), [x, weight, bias]) if of_a_norm else (biased(maximum), [x, bias])
        if not of_a_norm:  # the sum of product and bias is the test's
            function = (lambda z, b: activation_pool(lambda _: z, b, "relu", (), maximum=maximum),)
        with measure_traffic() as forward, saved_tensors() as saved:
            y = function[0](*leaves)
        with measure_traffic() as backward:
            torch.autograd.grad(y, leaves, gradient)
        assert ahead * size <= forward.bytes <= ahead * size + small
        assert back * size <= backward.bytes <= back * size + small
        assert forward.launches == (3 if of_a_norm else 1)
        assert backward.launches == (2 if maximum or of_a_norm else 1)
        assert saved.bytes_beside(x, weight, bias) <= small
