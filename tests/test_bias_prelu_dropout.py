"""PReLU and dropout of whole channels in the pass of bias, dropout and residual, against stock's chain."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.device import FLOAT_DTYPES
from torch import Tensor

from fusednn import kernels
from fusednn.autograd import bias_activation_dropout, dropout2d
from fusednn.instruments.saved_tensors import saved_tensors
from fusednn.testing import LAYOUTS, check_against_stock, leaf, random_tensor

if kernels.INTERPRETING:
    from fusednn.instruments.traffic import measure_traffic

pytestmark = pytest.mark.kernels

P = 0.3
SHAPES = [
    (40, 7),  # channels are columns
    (70, 40),
    (3, 16, 5),  # rows narrower than a tile
    (2, 4, 70),
    (1, 2, 2500),  # rows wider than a tile
    (2, 3, 7, 7),
    (2, 3, 3, 4, 2),
]


def along(bias: Tensor, x: Tensor) -> Tensor:
    return x + bias.view(-1, *[1] * (x.dim() - 2))


def seeded(*args: object, **options: object) -> Tensor:
    torch.manual_seed(11)
    return bias_activation_dropout(*args, dim=1, **options)


def prelu_chain(like: Tensor, p: float) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Ours, with one mask at every call, and stock's chain given that mask."""
    kept = seeded(torch.ones_like(like), p=p) != 0

    def stock(x: Tensor, bias: Tensor, residual: Tensor, slopes: Tensor) -> Tensor:
        return F.prelu(along(bias, x), slopes) * (kept.to(x.dtype) / (1 - p)) + residual

    return lambda x, bias, residual, slopes: seeded(x, bias, residual, p, slopes=slopes), stock


def operands(shape: tuple[int, ...], dtype: torch.dtype, slopes: int, device: str) -> tuple[list[Tensor], Tensor]:
    """Input, bias, residual and slopes, and a gradient."""
    x, gradient, residual = (random_tensor(shape, dtype, device, seed) for seed in (0, 1, 2))
    bias = random_tensor(shape[1:2], dtype, device, 3)
    return [x, bias, residual, torch.linspace(-0.5, 0.9, slopes, dtype=dtype, device=device)], gradient


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("slopes", ["per channel", pytest.param("one", marks=pytest.mark.thorough)])
def test_prelu(shape: tuple[int, ...], slopes: str, device: str) -> None:
    tensors, gradient = operands(shape, torch.float32, 1 if slopes == "one" else shape[1], device)
    check_against_stock(*prelu_chain(tensors[0], P), tensors, gradient)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.smoke
def test_prelu_in_every_dtype(dtype: torch.dtype, device: str) -> None:
    tensors, gradient = operands((3, 6, 40), dtype, 6, device)
    check_against_stock(*prelu_chain(tensors[0], 0.0), tensors, gradient)


@pytest.mark.parametrize(
    "layout", ["channels_last", *(pytest.param(name, marks=pytest.mark.thorough) for name in LAYOUTS)]
)
def test_prelu_in_every_layout(layout: str, device: str) -> None:
    (x, *others), gradient = operands((3, 6, 5, 4), torch.float32, 6, device)
    x = LAYOUTS[layout](x)
    check_against_stock(*prelu_chain(x, P), [x, *others], gradient)


def test_second_derivatives_of_prelu(device: str) -> None:
    tensors, gradient = operands((1, 2, 2), torch.float64, 2, device)
    leaves = [leaf(tensor) for tensor in (*tensors, gradient)]
    torch.autograd.gradgradcheck(
        lambda x, bias, slopes: seeded(x, bias, None, P, slopes=slopes), leaves[:2] + leaves[3:4], fast_mode=True
    )


@pytest.mark.parametrize("wanted", [(0,), (1,), (3,), (2, 3)], ids=str)
def test_gradients_only_where_needed(wanted: tuple[int, ...], device: str) -> None:
    tensors, gradient = operands((4, 6, 9), torch.float32, 1, device)
    results = []
    for function in prelu_chain(tensors[0], P):
        given = [leaf(tensor) if place in wanted else tensor for place, tensor in enumerate(tensors)]
        results.append(torch.autograd.grad(function(*given), [given[place] for place in wanted], gradient))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("slopes", [1, 16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.interpreter
def test_prelu_keeps_its_budget(slopes: int, memory_format: torch.memory_format, device: str) -> None:
    """Read once, written once; backward the same and the gradient, with both sums on the way."""
    tensors, gradient = operands((8, 16, 32, 32), torch.bfloat16, slopes, device)
    x, bias, _, weight = (
        leaf(tensor.to(memory_format=memory_format)) if tensor.dim() == 4 else leaf(tensor) for tensor in tensors
    )
    gradient = gradient.to(memory_format=memory_format)
    size = x.numel() * x.itemsize
    with measure_traffic() as forward, saved_tensors() as saved:
        y = bias_activation_dropout(x, bias, p=0.0, dim=1, slopes=weight)
    with measure_traffic() as backward:
        torch.autograd.grad(y, (x, bias, weight), gradient)
    assert (forward.launches, backward.launches) == (1, 1)
    assert 2 * size <= forward.bytes <= 2.05 * size
    assert not forward.operations
    sums = sum(operation.read_bytes for operation in backward.operations)
    assert 3 * size <= backward.bytes - sums <= 3.1 * size
    assert sums <= 0.05 * size
    assert saved.bytes_beside(x, bias, weight) == 0


# --- Dropout of channels ----------------------------------------------------------------------------------------------


def channel_chain(like: Tensor, name: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Ours, and stock's chain with its mask, which drops channels as a whole."""
    kept = seeded(torch.ones_like(like), p=P, of_channels=True) != 0
    assert torch.equal(kept, kept.flatten(2).any(2).view(*kept.shape[:2], *[1] * (kept.dim() - 2)).expand_as(kept))

    def stock(x: Tensor, bias: Tensor) -> Tensor:
        return getattr(F, name)(along(bias, x)) * (kept.to(x.dtype) / (1 - P))

    return lambda x, bias: seeded(x, bias, None, P, name, of_channels=True), stock


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if len(shape) > 2], ids=str)
@pytest.mark.parametrize("name", ["relu", "gelu", pytest.param("leaky_relu", marks=pytest.mark.thorough)])
def test_dropout_of_channels(shape: tuple[int, ...], name: str, device: str) -> None:
    (x, bias, *_), gradient = operands(shape, torch.float32, 1, device)
    check_against_stock(*channel_chain(x, name), [x, bias], gradient)


@pytest.mark.parametrize("shape", [(3, 6, 5, 4), (2, 20, 13, 13)], ids=str)
@pytest.mark.parametrize("name", ["relu", pytest.param("silu", marks=pytest.mark.thorough)])
def test_channels_share_a_number_in_every_layout(shape: tuple[int, ...], name: str, device: str) -> None:
    """Where they are last, a tile holds rows of one sample, or of several."""
    (x, bias, *_), gradient = operands(shape, torch.float32, 1, device)
    for layout in (torch.contiguous_format, torch.channels_last):
        placed = x.to(memory_format=layout)
        check_against_stock(*channel_chain(placed, name), [placed, bias], gradient)
    results = [
        seeded(x.to(memory_format=layout), bias, None, P, of_channels=True)
        for layout in (torch.contiguous_format, torch.channels_last)
    ]
    assert torch.equal(*results)


def test_channels_are_those_of_dropout2d(device: str) -> None:
    """One number from the same seed for the same channel."""
    x = torch.ones(16, 40, 3, 3, device=device)
    torch.manual_seed(11)
    assert torch.equal(dropout2d(x, P) != 0, seeded(x, p=P, of_channels=True) != 0)


@pytest.mark.parametrize("kind", ["permuted", "one channel", "two dimensions"])
def test_other_channels_go_to_stock(kind: str, device: str) -> None:
    shape = {"permuted": (3, 4, 5, 6), "one channel": (5, 1, 3, 3), "two dimensions": (5, 4)}[kind]
    x = random_tensor(shape, torch.float32, device)
    x = x.permute(1, 0, 2, 3) if kind == "permuted" else x
    with pytest.warns(UserWarning, match="2-D input") if kind == "two dimensions" else torch.no_grad():
        y = seeded(x, p=P, activation="gelu", of_channels=True)
        torch.manual_seed(11)
        torch.testing.assert_close(y, F.dropout2d(F.gelu(x), P))
