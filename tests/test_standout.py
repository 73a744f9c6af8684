"""Standout: units are kept with the probability that their belief says, and one bit tells of it."""

import math
from collections.abc import Callable

import pytest
import torch
from support.device import DEVICE, FLOAT_DTYPES, KERNELS_RUN
from support.dropout import compiled_and_eager
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fusednn
from fusednn import kernels
from fusednn.autograd import standout
from fusednn.catalogue import row_of
from fusednn.instruments.saved_tensors import saved_tensors
from fusednn.layers import Standout
from fusednn.testing import LAYOUTS, check_against_stock, leaf, random_tensor

if kernels.INTERPRETING:
    from fusednn.instruments.traffic import measure_traffic

needs_kernels = pytest.mark.kernels
every_dtype = pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def with_one_mask(like: Tensor, belief: Tensor) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Ours, with one mask at every call, and plain PyTorch given that mask."""

    def ours(x: Tensor) -> Tensor:
        torch.manual_seed(11)
        return standout(x, belief, 1.5, -0.25)

    keep = ours(torch.ones_like(like)) != 0
    return ours, lambda x: x * keep.to(x.dtype)


@needs_kernels
@every_dtype
@pytest.mark.smoke
def test_values_and_gradients(dtype: torch.dtype, device: str) -> None:
    x, belief, gradient = (random_tensor((3, 5, 16, 17), dtype, device, seed) for seed in range(3))
    x[0, 0, 0, :2] = torch.tensor([float("nan"), float("inf")])
    ours, stock = with_one_mask(x, belief)
    check_against_stock(ours, stock, [x], gradient)


@needs_kernels
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, device: str) -> None:
    x, belief, gradient = (random_tensor((3, 5, 4, 6), torch.float32, device, seed) for seed in range(3))
    place = LAYOUTS[layout]
    for tensors in ((place(x), belief, gradient), (x, place(belief), place(gradient))):
        ours, stock = with_one_mask(tensors[0], tensors[1])
        check_against_stock(ours, stock, [tensors[0]], tensors[2])


@every_dtype
def test_keep_rates_follow_the_belief(dtype: torch.dtype, device: str) -> None:
    """Six deviations: each of these is passed by chance with probability 2e-9.  Also on the stock path."""
    count = 2**14
    belief = torch.tensor([-40.0, -2.0, 0.0, 1.0, 3.0, 40.0], dtype=dtype, device=device)
    y = standout(torch.ones((count, 6), dtype=dtype, device=device), belief.expand(count, 6), alpha=0.5, beta=0.25)
    probability = torch.sigmoid(0.5 * belief.double() + 0.25)
    deviation = (probability * (1 - probability) / count).sqrt()
    rate = (y != 0).double().mean(0)
    assert ((rate - probability).abs() <= 6 * deviation + 2**-24).all()
    z = (y != 0)[:, 2].double() * 2 - 2 * probability[2]
    assert (z[1:] * z[:-1]).mean().abs() < 6 / math.sqrt(count), "neighbours"


@needs_kernels
def test_the_mask_of_the_gradient_is_the_values(device: str) -> None:
    x = torch.ones(5000, device=device, requires_grad=True)
    belief = random_tensor((5000,), torch.float32, device).requires_grad_()
    y = standout(x, belief)
    dx, dbelief = torch.autograd.grad(y.sum(), (x, belief), allow_unused=True)
    assert torch.equal(dx, y)
    assert dbelief is None, "sampling has no gradient"


def test_evaluation_takes_the_mean(device: str) -> None:
    x, belief = (random_tensor((4, 5), torch.float64, device, seed).requires_grad_() for seed in (0, 1))
    layer = Standout(2.0, -0.5).eval()
    torch.testing.assert_close(layer(x, belief), x * torch.sigmoid(2.0 * belief - 0.5))
    torch.autograd.gradcheck(layer, (x, belief))


@needs_kernels
def test_derivatives(device: str) -> None:
    x, belief = (random_tensor((2, 3), torch.float64, device, seed) for seed in (0, 1))
    ours, _ = with_one_mask(x, belief)
    torch.autograd.gradcheck(ours, leaf(x))
    torch.autograd.gradgradcheck(ours, leaf(x))


def test_seeding_and_checkpoints(device: str) -> None:
    x, belief = (random_tensor((30, 40), torch.float32, device, seed).requires_grad_() for seed in (0, 1))
    layer = Standout()
    outcomes = []
    for wrap in (False, True):
        torch.manual_seed(5)
        y = checkpoint(layer, x, belief, use_reentrant=False) if wrap else layer(x, belief)
        outcomes.append((y, *torch.autograd.grad(y.square().sum(), x)))
    for plain, wrapped in zip(*outcomes, strict=True):
        assert torch.equal(plain, wrapped)
    assert not torch.equal(layer(x, belief), y)


@needs_kernels
@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_budget(dtype: torch.dtype, device: str) -> None:
    x = leaf(random_tensor((16, 2048), dtype, device))
    belief, g = (random_tensor((16, 2048), dtype, device, seed) for seed in (1, 2))
    with measure_traffic() as forward, saved_tensors() as saved:
        y = standout(x, belief)
    with measure_traffic() as backward:
        torch.autograd.grad(y, x, g)
    ahead, back = row_of("standout").budget(x.shape, dtype)
    assert saved.bytes == x.numel() / 8
    assert ahead < forward.bytes <= 1.05 * ahead
    assert back <= backward.bytes <= 1.05 * back
    assert (forward.launches, backward.launches) == (1, 1)
    assert [operation.name for operation in forward.operations] == ["randint"]


def test_what_the_kernel_refuses_goes_to_stock_operators(device: str) -> None:
    x = torch.ones(4, 5, device=device)
    assert standout(x, torch.full((5,), 40.0, device=device)).equal(x), "a belief that broadcasts"
    assert standout(x, torch.full((4, 5), 40.0, dtype=torch.float64, device=device)).dtype == torch.float64
    with pytest.raises(RuntimeError):
        standout(x, torch.ones(3, device=device))
    (row,) = fusednn.explain(Standout(), x, x)
    assert (row.operation, row.path) == ("standout", "kernel" if KERNELS_RUN else "stock")


def test_layer() -> None:
    layer = Standout(2.0, 0.5)
    assert str(layer) == "Standout(alpha=2.0, beta=0.5)"
    assert not layer.state_dict()


@needs_kernels
def test_compiled_results_equal_eager(device: str) -> None:
    x, belief = (leaf(random_tensor((6, 40), torch.float32, device, seed)) for seed in (0, 1))
    for ours, eager in compiled_and_eager(standout, [x, belief], [x]):
        assert torch.equal(ours, eager)


@needs_kernels
def test_opcheck() -> None:
    x, belief = (random_tensor((6, 4), torch.float32, DEVICE, seed) for seed in (0, 1))
    seed = torch.tensor([7], device=DEVICE)
    torch.library.opcheck(torch.ops.fusednn.standout.default, (x[:, ::2], belief[:, ::2], seed, 1.0, 0.5))
