"""Batch norm with PReLU or another activation, and dropout behind it, in batch norm's own passes."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.device import FLOAT_DTYPES
from support.draws import check_over_draws
from torch import Tensor

from fusednn import kernels
from fusednn.autograd.batch_norm_chain import batch_norm_chain
from fusednn.autograd.dispatch import Choice, always_kernels, observe_choices
from fusednn.autograd.dropout import dropout1d, dropout2d, dropout3d
from fusednn.instruments.saved_tensors import saved_tensors
from fusednn.kernels.functions.activation import PRELU
from fusednn.testing import LAYOUTS, check_against_stock, leaf, random_tensor

if kernels.INTERPRETING:
    from fusednn.instruments.traffic import measure_traffic

pytestmark = pytest.mark.kernels

EPS = 1e-3
SHAPES = [(40, 7), (3, 16, 5), (2, 3, 7, 7), (2, 3, 3, 4, 2), (4, 2, 700)]


def functions(training: bool, channels: int) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Ours and stock's, of the input, weight, bias and slopes; the running statistics are their own."""

    def running(x: Tensor) -> tuple[Tensor, Tensor]:
        dtype = x.dtype if x.dtype.itemsize > 2 else torch.float32
        return torch.linspace(-1, 1, channels).to(x.device, dtype), torch.linspace(0.5, 2, channels).to(x.device, dtype)

    def ours(x: Tensor, weight: Tensor, bias: Tensor, slopes: Tensor) -> Tensor:
        return batch_norm_chain(x, *running(x), weight, bias, training, 0.1, EPS, slopes=slopes)

    def stock(x: Tensor, weight: Tensor, bias: Tensor, slopes: Tensor) -> Tensor:
        return F.prelu(F.batch_norm(x, *running(x), weight, bias, training, 0.1, EPS), slopes)

    return ours, stock


def operands(shape: tuple[int, ...], dtype: torch.dtype, slopes: int, device: str) -> tuple[list[Tensor], Tensor]:
    x, gradient = (random_tensor(shape, dtype, device, seed) for seed in (0, 1))
    parameter = dtype if dtype.itemsize > 2 else torch.float32
    weight, bias = (random_tensor(shape[1:2], parameter, device, seed) for seed in (2, 3))
    return [x, weight, bias, torch.linspace(-0.5, 0.9, slopes, dtype=dtype, device=device)], gradient


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("training", [True, pytest.param(False, marks=pytest.mark.thorough)])
def test_shapes(shape: tuple[int, ...], training: bool, device: str) -> None:
    tensors, gradient = operands(shape, torch.float32, shape[1], device)
    check_against_stock(*functions(training, shape[1]), tensors, gradient)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.smoke
def test_one_slope_in_every_dtype(dtype: torch.dtype, training: bool, device: str) -> None:
    tensors, gradient = operands((5, 6, 30), dtype, 1, device)
    check_against_stock(*functions(training, 6), tensors, gradient)


@pytest.mark.parametrize(
    "layout", ["channels_last", *(pytest.param(name, marks=pytest.mark.thorough) for name in LAYOUTS)]
)
def test_layouts(layout: str, device: str) -> None:
    (x, *others), gradient = operands((3, 6, 5, 4), torch.float32, 6, device)
    check_against_stock(*functions(True, 6), [LAYOUTS[layout](x), *others], gradient)


@pytest.mark.parametrize("training", [True, False])
def test_second_derivatives(training: bool, device: str) -> None:
    tensors, _ = operands((3, 2, 2), torch.float64, 2, device)
    torch.autograd.gradgradcheck(functions(training, 2)[0], [leaf(tensor) for tensor in tensors], fast_mode=True)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,)], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_gradients_only_where_needed(wanted: tuple[int, ...], training: bool, device: str) -> None:
    tensors, gradient = operands((4, 6, 9), torch.float32, 1, device)
    results = []
    for function in functions(training, 6):
        given = [leaf(tensor) if place in wanted else tensor for place, tensor in enumerate(tensors)]
        results.append(torch.autograd.grad(function(*given), [given[place] for place in wanted], gradient))
    torch.testing.assert_close(*results)


def test_running_statistics_are_stocks(device: str) -> None:
    x, weight, bias, slopes = operands((4, 6, 9), torch.float32, 6, device)[0]
    batches = torch.tensor(3, device=device)
    for momentum, counted in ((0.25, None), (None, batches)):
        ours, stock = ([torch.zeros(6, device=device), torch.ones(6, device=device)] for _ in range(2))
        batch_norm_chain(x, *ours, weight, bias, True, momentum or 0.0, EPS, counted, slopes=slopes)
        F.batch_norm(x, *stock, weight, bias, True, momentum or 1 / 3, EPS)
        torch.testing.assert_close(ours, stock)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"slopes": torch.ones(2)}, "the slopes are neither one nor one per channel"),
        ({"slopes": torch.ones(6).double()}, "operands differ in dtype, device or layout"),
        ({"input": torch.ones(1, 6)}, "one value per channel"),
        ({"running_mean": None, "running_var": None, "training": False}, "running statistics are missing"),
    ],
)
def test_what_goes_to_stock(change: dict[str, object], reason: str, device: str) -> None:
    given = {"input": torch.ones(3, 6), "running_mean": torch.zeros(6), "running_var": torch.ones(6)}
    given |= {"weight": None, "bias": None, "training": True, "momentum": 0.1, "eps": EPS, "slopes": torch.ones(6)}
    given = {name: one.to(device) if isinstance(one, Tensor) else one for name, one in (given | change).items()}
    slopes = given.pop("slopes")
    choices: list[Choice] = []
    with observe_choices(choices.append), pytest.raises((RuntimeError, ValueError)):
        batch_norm_chain(*given.values(), slopes=slopes)
    assert [choice.reason for choice in choices] == [reason]


@pytest.mark.parametrize(("slopes", "added"), [(1, False), (6, True)])
def test_operators_describe_themselves(slopes: int, added: bool, device: str) -> None:
    (x, weight, bias, weights), _ = operands((3, 6, 5), torch.float32, slopes, device)
    ops, mean, variance = torch.ops.fusednn, torch.zeros(6, device=device), torch.ones(6, device=device)
    operands_of = (weight, bias, x.flip(0) if added else None, weights, None, None)
    vectors = (mean, variance, *operands_of, EPS, *PRELU.arguments, 0.0, False, "", 0.0, 0.0)
    training = (x, mean.clone(), variance.clone(), None, 0.1, *vectors[2:])
    utilities = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.batch_norm_chain_training.default, training, test_utils=utilities)
    torch.library.opcheck(ops.batch_norm_chain.default, (x, *vectors), test_utils=utilities)
    torch.library.opcheck(ops.batch_norm_chain_reduce.default, (x, x, *vectors), test_utils=utilities)
    partial, _ = ops.batch_norm_chain_reduce(x, x, *vectors)
    torch.library.opcheck(ops.batch_norm_chain_backward.default, (x, x, partial, *vectors, True), test_utils=utilities)


@pytest.mark.interpreter
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.whole
@pytest.mark.parametrize(("name", "options"), [("slopes", {}), ("shift", {"before": "relu"})], ids=str)
def test_as_many_bytes_as_batch_norm_alone(
    name: str, options: dict[str, Any], memory_format: torch.memory_format, device: str
) -> None:
    """Twice read and once written; backward read twice with the gradient, and written.  The input is kept.

    An activation before the norm moves no more: sums and normalisation make it again from the input.
    """
    tensors, gradient = operands((8, 16, 16, 16), torch.float32, 16, device)
    x, weight, bias, last = map(leaf, (tensors[0].to(memory_format=memory_format), *tensors[1:]))
    gradient = gradient.to(memory_format=memory_format)
    size = x.numel() * x.itemsize
    with measure_traffic() as forward, saved_tensors() as saved:
        y = batch_norm_chain(x, None, None, weight, bias, True, 0.1, EPS, **{name: last}, **options)
    with measure_traffic() as backward:
        torch.autograd.grad(y, (x, weight, bias, last), gradient)
    statistics = sum(launch.stored_bytes for launch in forward.kernel_launches) - size
    assert 3 * size <= forward.bytes <= 3.1 * size + 4 * statistics
    assert 5 * size <= backward.bytes <= 5.3 * size
    assert (forward.launches, backward.launches) == (2, 2)
    if name == "shift":
        assert [operation.name for operation in backward.operations] == ["sum"]  # of the shift's gradient
    assert saved.bytes_beside(x, weight, bias, last) <= 2 * 16 * 4


# --- A residual before PReLU ------------------------------------------------------------------------------------------


def added_functions(training: bool, before: str | None = None) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Ours and stock's, of the input, weight, bias, residual and slopes."""

    def running(x: Tensor) -> tuple[Tensor, Tensor]:
        dtype = x.dtype if x.dtype.itemsize > 2 else torch.float32
        return tuple(torch.linspace(low, 2, x.shape[1]).to(x.device, dtype) for low in (-1, 0.5))

    def ours(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, slopes: Tensor) -> Tensor:
        options = {"residual": residual, "slopes": slopes, "before": before}
        return batch_norm_chain(x, *running(x), weight, bias, training, 0.1, EPS, **options)

    def stock(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, slopes: Tensor) -> Tensor:
        x = x if before is None else getattr(F, before)(x)
        return F.prelu(F.batch_norm(x, *running(x), weight, bias, training, 0.1, EPS) + residual, slopes)

    return ours, stock


def added_operands(shape: tuple[int, ...], dtype: torch.dtype, slopes: int, device: str) -> tuple[list[Tensor], Tensor]:
    (x, weight, bias, weights), gradient = operands(shape, dtype, slopes, device)
    return [x, weight, bias, random_tensor(shape, dtype, device, 4), weights], gradient


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("training", [True, pytest.param(False, marks=pytest.mark.thorough)])
def test_a_residual_before_prelu(shape: tuple[int, ...], training: bool, device: str) -> None:
    tensors, gradient = added_operands(shape, torch.float32, shape[1], device)
    check_against_stock(*added_functions(training), tensors, gradient)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_a_residual_of_another_layout_in_every_dtype(dtype: torch.dtype, device: str) -> None:
    (x, *others), gradient = added_operands((3, 6, 5, 4), dtype, 1, device)
    x = x.to(memory_format=torch.channels_last)
    check_against_stock(*added_functions(True), [x, *others], gradient)
    check_against_stock(*added_functions(False), [x, *others], gradient)


def test_a_residual_behind_a_norm_of_an_activation(device: str) -> None:
    tensors, gradient = added_operands((5, 6, 9), torch.float32, 6, device)
    check_against_stock(*added_functions(True, "tanh"), tensors, gradient)


@pytest.mark.parametrize("wanted", [(0,), (3,), (4,), (1, 3)], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_gradients_with_a_residual_only_where_needed(wanted: tuple[int, ...], training: bool, device: str) -> None:
    tensors, gradient = added_operands((4, 6, 9), torch.float32, 1, device)
    results = []
    for function in added_functions(training):
        given = [leaf(tensor) if place in wanted else tensor for place, tensor in enumerate(tensors)]
        results.append(torch.autograd.grad(function(*given), [given[place] for place in wanted], gradient))
    torch.testing.assert_close(*results)


def test_second_derivatives_with_a_residual(device: str) -> None:
    tensors, _ = added_operands((3, 2, 2), torch.float64, 2, device)
    torch.autograd.gradgradcheck(added_functions(True)[0], [leaf(tensor) for tensor in tensors], fast_mode=True)


def test_a_residual_that_broadcasts_goes_to_stock(device: str) -> None:
    (x, weight, bias, residual, slopes), gradient = added_operands((4, 6, 9), torch.float32, 6, device)
    check_against_stock(*added_functions(True), [x, weight, bias, residual[:1].clone(), slopes], gradient)


@pytest.mark.interpreter
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_bytes_with_a_residual(memory_format: torch.memory_format, device: str) -> None:
    """The residual is read once forward, and once backward, where its gradient is written and read on the way."""
    tensors, gradient = added_operands((8, 16, 16, 16), torch.float32, 16, device)
    x, weight, bias, residual, slopes = (
        leaf(one.to(memory_format=memory_format)) if one.dim() == 4 else leaf(one) for one in tensors
    )
    gradient = gradient.to(memory_format=memory_format)
    size = x.numel() * x.itemsize
    with measure_traffic() as forward, saved_tensors() as saved:
        y = batch_norm_chain(x, None, None, weight, bias, True, 0.1, EPS, residual=residual, slopes=slopes)
    with measure_traffic() as backward:
        torch.autograd.grad(y, (x, weight, bias, residual, slopes), gradient)
    statistics = sum(launch.stored_bytes for launch in forward.kernel_launches) - size
    assert 4 * size <= forward.bytes <= 4.1 * size + 4 * statistics
    assert 7 * size <= backward.bytes <= 7.3 * size
    assert (forward.launches, backward.launches) == (2, 2)
    assert saved.bytes_beside(x, weight, bias, residual, slopes) <= 2 * 16 * 4


# --- An activation before the norm ------------------------------------------------------------------------------------


def behind(name: str, training: bool = True, p: float = 0.0) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Ours and stock's, of what a product left, weight, bias, and the product's bias, if it has one."""

    def added(z: Tensor, shift: Tensor | None) -> Tensor:
        return z if shift is None else z + shift.view(-1, *[1] * (z.dim() - 2))

    def running(x: Tensor) -> tuple[Tensor, Tensor]:
        dtype = x.dtype if x.dtype.itemsize > 2 else torch.float32
        return tuple(torch.linspace(low, 2, x.shape[1]).to(x.device, dtype) for low in (-1, 0.5))

    def ours(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None = None) -> Tensor:
        options = {"before": name, "product": lambda shift: added(x, shift), "shift": shift, "p": p}
        return batch_norm_chain(x, *running(x), weight, bias, training, 0.1, EPS, activation="relu", **options)

    def stock(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None = None) -> Tensor:
        y = getattr(F, name)(added(x, shift))
        return F.relu(F.batch_norm(y, *running(x), weight, bias, training, 0.1, EPS))

    return ours, stock


@pytest.mark.parametrize("shape", [(40, 7), (3, 16, 5), (2, 3, 7, 7)], ids=str)
@pytest.mark.parametrize("name", ["hardtanh", "gelu", "tanh"])
def test_an_activation_before_the_norm(shape: tuple[int, ...], name: str, device: str) -> None:
    (x, weight, bias, shift), gradient = operands(shape, torch.float32, shape[1], device)
    check_against_stock(*behind(name), [x, weight, bias, shift], gradient)


@pytest.mark.parametrize("name", ["relu", "tanh", pytest.param("softsign", marks=pytest.mark.thorough)])
@pytest.mark.parametrize("shape", [(40, 7), (2, 3, 7, 7)], ids=str)
def test_an_activation_before_the_norm_is_as_accurate_as_stocks(shape: tuple[int, ...], name: str, device: str) -> None:
    def draw(seed: int) -> tuple[list[Tensor], Tensor]:
        shapes = (shape, *[shape[1:2]] * 3, shape)
        *tensors, gradient = (random_tensor(one, torch.float32, device, 5 * seed + i) for i, one in enumerate(shapes))
        return tensors, gradient

    check_over_draws(*behind(name), [draw(seed) for seed in range(9)])


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_an_activation_before_the_norm_without_a_bias(dtype: torch.dtype, device: str) -> None:
    (x, weight, bias, _), gradient = operands((3, 6, 5, 4), dtype, 1, device)
    x = x.to(memory_format=torch.channels_last)
    check_against_stock(*behind("silu"), [x, weight, bias], gradient)


def test_an_activation_before_the_norm_in_evaluation(device: str) -> None:
    tensors, gradient = operands((5, 6, 9), torch.float32, 6, device)
    check_against_stock(*behind("softsign", False), tensors, gradient)


@pytest.mark.parametrize("training", [True, False])
def test_second_derivatives_behind_an_activation(training: bool, device: str) -> None:
    tensors, _ = operands((4, 2, 2), torch.float64, 2, device)
    function = behind("sigmoid", training)[0]
    torch.autograd.gradgradcheck(function, [leaf(tensor) for tensor in tensors], fast_mode=True)


# --- Dropout ----------------------------------------------------------------------------------------------------------

P = 0.3


def dropping_functions(
    name: str, like: Tensor, of_channels: bool = False
) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Ours, with one mask at every call, and stock's chain given that mask."""
    options: dict[str, Any] = {"p": P, "of_channels": of_channels}

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        torch.manual_seed(11)
        return batch_norm_chain(x, None, None, weight, bias, True, 0.1, EPS, activation=name, **options)

    ones = torch.ones(like.shape[1], device=like.device)
    torch.manual_seed(11)
    kept = batch_norm_chain(torch.ones_like(like), ones, ones, None, ones, False, 0.1, EPS, **options) != 0

    def stock(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = F.batch_norm(x, None, None, weight, bias, True, 0.1, EPS)
        return getattr(F, name)(y) * (kept.to(x.dtype) / (1 - P))

    return ours, stock


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["relu", pytest.param("gelu", marks=pytest.mark.thorough)])
def test_dropout_behind_norm_and_activation(shape: tuple[int, ...], name: str, device: str) -> None:
    (x, weight, bias, _), gradient = operands(shape, torch.float32, 1, device)
    check_against_stock(*dropping_functions(name, x), [x, weight, bias], gradient)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_dropout_in_16_bits(dtype: torch.dtype, device: str) -> None:
    (x, weight, bias, _), gradient = operands((6, 8, 5, 5), dtype, 1, device)
    x, gradient = (one.to(memory_format=torch.channels_last) for one in (x, gradient))
    check_against_stock(*dropping_functions("silu", x), [x, weight, bias], gradient)


@pytest.mark.parametrize("shape", [(3, 16, 5), (2, 5, 7, 7), (2, 3, 3, 4, 2), (3, 1, 9, 2), (5, 4, 1, 1)], ids=str)
@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
def test_dropout_of_channels(shape: tuple[int, ...], memory_format: str, device: str) -> None:
    """A sample's channel is dropped as a whole, the same ones in every memory format as by dropout alone."""
    (x, weight, bias, _), gradient = operands(shape, torch.float32, 1, device)
    if memory_format == "channels_last":
        x = x.transpose(1, -1).contiguous().transpose(1, -1)
    check_against_stock(*dropping_functions("relu", x, of_channels=True), [x, weight, bias], gradient)
    ones = torch.ones(shape[1], device=device)
    whole = torch.empty_like(x).fill_(1)
    torch.manual_seed(11)
    y = batch_norm_chain(whole, ones, ones, None, ones, False, 0.1, EPS, p=P, of_channels=True)
    torch.manual_seed(11)
    with always_kernels():
        assert torch.equal(y, {3: dropout1d, 4: dropout2d, 5: dropout3d}[x.dim()](whole, P))


def test_dropout_of_channels_in_16_bits_and_twice_differentiable(device: str) -> None:
    (x, weight, bias, _), gradient = operands((3, 8, 5, 5), torch.bfloat16, 1, device)
    check_against_stock(*dropping_functions("silu", x, of_channels=True), [x, weight, bias], gradient)
    check_second_derivatives_with_dropout((3, 4, 5), device, of_channels=True)


def test_dropout_drops_as_many_as_it_should(device: str) -> None:
    x = random_tensor((64, 256), torch.float32, device)
    y = batch_norm_chain(x, None, None, None, None, True, 0.1, EPS, activation="sigmoid", p=P)
    assert abs((y == 0).float().mean().item() - P) < 0.02
    whole = F.batch_norm(x, None, None, training=True, eps=EPS).sigmoid() / (1 - P)
    torch.testing.assert_close(y, torch.where(y == 0, y, whole))


def check_second_derivatives_with_dropout(shape: tuple[int, ...], device: str, *, of_channels: bool) -> None:
    (x, weight, bias, _), gradient = operands(shape, torch.float32, 1, device)
    results = []
    for function in dropping_functions("silu", x, of_channels):
        leaves = [leaf(one) for one in (x, weight, bias)]
        (first,) = torch.autograd.grad(function(*leaves), leaves[:1], gradient, create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), leaves))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)


def test_second_derivatives_with_dropout(device: str) -> None:
    check_second_derivatives_with_dropout((5, 3), device, of_channels=False)


def test_where_dropout_goes_to_stock(device: str) -> None:
    x = random_tensor((6, 4), torch.float32, device)
    reasons = []
    for one, p, of_channels in ((x, 1.0, False), (x.double(), P, False), (x, P, True)):
        choices: list[Choice] = []
        options: dict[str, Any] = {"activation": "relu", "p": p, "of_channels": of_channels}
        with observe_choices(choices.append), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # stock's, of dropout2d
            y = batch_norm_chain(one, None, None, None, None, True, 0.1, EPS, **options)
        assert (y == 0).all() == (p == 1)
        reasons += [choice.reason for choice in choices]
    last = "the channels that are dropped have no places"
    assert reasons == ["everything is dropped", "dropout behind a norm in float64", last]


@pytest.mark.interpreter
@pytest.mark.parametrize("of_channels", [False, True])
def test_dropout_moves_and_keeps_no_more(of_channels: bool, device: str) -> None:
    x, weight, bias, _ = map(leaf, operands((256, 64, 1), torch.float32, 1, device)[0])
    options: dict[str, Any] = {"activation": "relu", "p": P, "of_channels": of_channels}
    with measure_traffic() as forward, saved_tensors() as saved:
        y = batch_norm_chain(x, None, None, weight, bias, True, 0.1, EPS, **options)
    with measure_traffic() as backward:
        torch.autograd.grad(y, (x, weight, bias), torch.ones_like(x))
    size = x.numel() * x.itemsize
    assert 3 * size <= forward.bytes <= 3.3 * size
    assert 5 * size <= backward.bytes <= 5.5 * size
    assert [operation.name for operation in forward.operations] == ["randint"]
    assert saved.bytes_beside(x, weight, bias) <= 2 * 64 * 4 + 8
