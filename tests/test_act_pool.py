"""An activation and max pooling in one pass against PyTorch's two: values, gradients, bytes, kept memory, refusals."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.device import KERNELS_RUN
from support.fusion import assert_same, batch, make, reasons
from torch import Tensor, nn

from fusednn import kernels
from fusednn.autograd.dispatch import Choice, observe_choices
from fusednn.autograd.pool import act_pool
from fusednn.instruments.saved_tensors import saved_tensors
from fusednn.testing import check_against_stock, leaf, random_tensor

if kernels.INTERPRETING:
    from fusednn.instruments.traffic import measure_traffic

needs_kernels = pytest.mark.kernels

# A bit of the code, the maxima before the activation, with a parameter, with overlapping windows.
CASES = [
    (2, "relu", (), (2, None, 0)),
    (2, "gelu", (), (3, 2, 1)),
    (1, "leaky_relu", (0.2,), (3, 1, 1)),
    (3, "tanh", (), ((1, 2, 2), None, 0)),
]
SHAPES = {1: (2, 3, 9), 2: (2, 3, 6, 8), 3: (2, 2, 3, 4, 4)}
POOLINGS = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


def pair(
    directions: int, name: str, parameters: tuple[float, ...], window: tuple
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Ours and stock's, as functions of the images."""
    activation = getattr(torch, name, None) or getattr(F, name)
    return (
        lambda x: act_pool(directions, x, *window, name, parameters),
        lambda x: POOLINGS[directions](activation(x, *parameters), *window),
    )


@needs_kernels
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_against_stock(case: tuple, layout: str, device: str) -> None:
    ours, stock = pair(*case)
    if case[0] == 1 and layout == "channels_last":
        return
    order = {2: torch.channels_last, 3: torch.channels_last_3d}.get(case[0])
    x = random_tensor(SHAPES[case[0]], torch.float32, device)
    x = x.contiguous(memory_format=order) if layout == "channels_last" else x
    theirs = stock(x)
    check_against_stock(ours, stock, [x], random_tensor(tuple(theirs.shape), x.dtype, device, seed=1))
    assert ours(x).stride() == theirs.stride()


@needs_kernels
@pytest.mark.parametrize("name", ["relu", "tanh"])
def test_second_derivatives(name: str, device: str) -> None:
    ours, _ = pair(2, name, (), (2, 1, 0))
    x = leaf(random_tensor((1, 1, 3, 4), torch.float64, device))
    assert torch.autograd.gradcheck(ours, x)
    assert torch.autograd.gradgradcheck(ours, x)


@pytest.mark.interpreter
def test_bytes_and_what_is_kept(device: str) -> None:
    x = leaf(random_tensor((2, 32, 16, 64), torch.float32, device))
    ours, _ = pair(*CASES[0])
    with measure_traffic() as forward, saved_tensors() as saved:
        y = ours(x)
    with measure_traffic() as backward:
        torch.autograd.grad(y, x, torch.ones_like(y))
    budget = 4 * x.numel() + 4.5 * y.numel()
    assert forward.launches == backward.launches == 1
    assert forward.bytes == backward.bytes == budget
    assert saved.bytes_beside(x) == y.numel() / 2  # four bits: the position, and ReLU's


@pytest.mark.parametrize(
    ("x", "arguments", "reason"),
    [
        (torch.ones(3, 4), (2, None, 0, "relu"), "not a batch of images"),
        (torch.ones(1, 2, 4, 4), (0, None, 0, "relu"), "a size of the window is not positive"),
        (torch.ones(1, 2, 4, 4), (2.0, None, 0, "relu"), "a size is not an integer for each direction"),
        (torch.ones(1, 2, 32, 32), (16, None, 0, "relu"), "the window has more positions than a byte can tell"),
    ],
)
@needs_kernels
def test_refusals(x: Tensor, arguments: tuple, reason: str, device: str) -> None:
    """What the kernels don't take is stock's, and its errors."""
    choices: list[Choice] = []
    with observe_choices(choices.append):
        try:
            act_pool(2, x.to(device), *arguments)
        except (TypeError, RuntimeError):
            assert not isinstance(arguments[0], int) or not arguments[0] or x.dim() < 3
    assert (choices[0].operation, choices[0].kernel, choices[0].reason) == ("act_pool2d", False, reason)


class Seen(nn.Module):
    """What a chain's first activation was given is used again."""

    def __init__(self, inplace: bool, function: bool, gates: bool) -> None:
        super().__init__()
        self.act, self.pool = nn.ReLU(inplace), nn.MaxPool2d(3, 1, 1)
        self.function, self.gates = function, gates

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        y = F.relu(x, self.act.inplace) if self.function else self.act(x)
        return (y * x if self.gates else self.pool(y)) + x


@pytest.mark.parametrize("function", [False, True])
@pytest.mark.parametrize("gates", [False, True])
def test_activations_in_place_begin_no_chain(function: bool, gates: bool, device: str) -> None:
    """Others see what they write; also where they do so only since the layers were fused."""
    x = batch(2, 4, 4, 4, device=device)
    stock, model = (make(Seen(True, function, gates), device) for _ in range(2))
    assert "fused" not in reasons(model).get("act", "")
    assert_same(model, stock, x)
    stock, model = (make(Seen(False, function, gates), device) for _ in range(2))
    found = reasons(model)
    assert function or found["act"] == ("fused with the functions behind it" if gates else "fused with pool")
    assert_same(model, stock, x)
    stock.act.inplace = model.act.inplace = True
    assert_same(model, stock, x)


def test_a_chain_of_both_takes_one_kernel(device: str) -> None:
    model = make(nn.Sequential(nn.GroupNorm(2, 4), nn.ReLU(), nn.MaxPool2d(2)), device)
    assert reasons(model)["1"] == "fused with 2"
    choices: list[Choice] = []
    with observe_choices(choices.append):
        model(batch(2, 4, 6, 6, device=device))
    assert any(choice.operation == "act_pool2d" and choice.kernel for choice in choices) == KERNELS_RUN
