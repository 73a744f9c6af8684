"""DropConnect: the mask over the weights comes back in the backward pass, and is never stored."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.device import DEVICE, FLOAT_DTYPES
from support.dropout import compiled_and_eager
from support.training import losses
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fusednn
from fusednn import kernels
from fusednn.autograd import drop_connect_linear
from fusednn.instruments.saved_tensors import saved_tensors
from fusednn.layers import DropConnect
from fusednn.testing import check_against_stock, leaf, random_tensor

if kernels.INTERPRETING:
    from fusednn.instruments.traffic import measure_traffic

needs_kernels = pytest.mark.kernels
P = 0.3


def with_one_mask(weight: Tensor) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Ours, with one mask at every call, and plain PyTorch given that mask."""

    def ours(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        torch.manual_seed(11)
        return drop_connect_linear(x, weight, bias, P)

    torch.manual_seed(11)
    keep = fusednn.autograd.dropout(torch.ones_like(weight), P) != 0

    def stock(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, weight * (keep.to(weight.dtype) / (1 - P)), bias)

    return ours, stock


def operands(*leading: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    shapes = ((*leading, 12), (12, 12), (12,))  # square: the standing checks compare the strides of input and result
    return [random_tensor(shape, dtype, DEVICE, seed) for seed, shape in enumerate(shapes)]


@needs_kernels
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("leading", [(), (5,), (2, 3)], ids=str)
@pytest.mark.smoke
def test_values_and_gradients(leading: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    x, weight, bias = operands(*leading, dtype=dtype)
    gradient = random_tensor((*leading, 12), dtype, device, seed=4)
    check_against_stock(*with_one_mask(weight), [x, weight, bias], gradient)


@needs_kernels
@pytest.mark.parametrize(
    "place", [lambda w: w.t().contiguous().t(), lambda w: w.repeat(2, 1)[::2], lambda w: w[:1].expand_as(w)]
)
def test_weights_of_any_layout(place: Callable[[Tensor], Tensor], device: str) -> None:
    x, weight, _ = operands(5)
    weight = place(weight)
    check_against_stock(*with_one_mask(weight), [x, weight], torch.ones((), device=device).expand(5, 12))


@needs_kernels
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,)], ids=str)
def test_gradients_only_where_needed(wanted: tuple[int, ...], device: str) -> None:
    tensors = operands(5)
    results = []
    for function in with_one_mask(tensors[1]):
        leaves = [leaf(t) if index in wanted else t for index, t in enumerate(tensors)]
        results.append(torch.autograd.grad(function(*leaves).square().sum(), [leaves[index] for index in wanted]))
    torch.testing.assert_close(*results)


@needs_kernels
def test_derivatives(device: str) -> None:
    x, weight, bias = operands(1, dtype=torch.float64)
    tensors = [leaf(x[:, :2]), leaf(weight[:2, :2]), leaf(bias[:2])]
    ours, _ = with_one_mask(tensors[1])
    torch.autograd.gradcheck(ours, tensors)
    torch.autograd.gradgradcheck(ours, tensors)


def test_evaluation_is_linear(device: str) -> None:
    layer, linear = DropConnect(12, 7).to(device).eval(), nn.Linear(12, 7).to(device)
    linear.load_state_dict(layer.linear.state_dict())
    x = random_tensor((5, 12), torch.float32, device)
    assert torch.equal(layer(x), linear(x))
    assert torch.equal(drop_connect_linear(x, layer.weight, layer.bias, 0.0), linear(x))


def test_each_step_and_seed_draws_its_mask(device: str) -> None:
    layer = DropConnect(12, 7, p=0.5).to(device)
    x = random_tensor((5, 12), torch.float32, device)
    torch.manual_seed(3)
    first, second = layer(x), layer(x)
    torch.manual_seed(3)
    assert torch.equal(layer(x), first)
    assert not torch.equal(first, second)


def test_one_mask_serves_the_batch(device: str) -> None:
    """Equal samples have equal results, of weights that are 0 or doubled."""
    y = drop_connect_linear(torch.eye(12, device=device).repeat(2, 1), torch.ones(7, 12, device=device))
    assert torch.equal(y[:12], y[12:])
    assert set(y.unique().tolist()) == {0.0, 2.0}


def test_checkpoint_draws_the_same_mask(device: str) -> None:
    layer = DropConnect(12, 7).to(device)
    x = random_tensor((5, 12), torch.float32, device).requires_grad_()
    gradients = []
    for wrap in (True, False):
        torch.manual_seed(5)
        y = checkpoint(layer, x, use_reentrant=False) if wrap else layer(x)
        gradients.append(torch.autograd.grad(y.square().sum(), (x, layer.weight)))
    for wrapped, plain in zip(*gradients, strict=True):
        assert torch.equal(wrapped, plain)


@needs_kernels
@pytest.mark.interpreter
def test_no_mask_is_stored(device: str) -> None:
    x, weight, bias = (leaf(random_tensor(shape, torch.float32, device)) for shape in ((8, 128), (64, 128), (64,)))
    with measure_traffic() as forward, saved_tensors() as saved:
        y = drop_connect_linear(x, weight, bias)
    with measure_traffic() as backward:
        torch.autograd.grad(y.sum(), (x, weight, bias))
    assert saved.bytes_beside(x, weight, bias) == 8, "a seed"
    bytes_of_a_pass = 2 * weight.numel() * weight.itemsize
    assert forward.launches == 1
    assert bytes_of_a_pass < forward.bytes <= 1.05 * bytes_of_a_pass
    assert backward.launches == 2  # the weight again, and its gradient
    assert 2 * bytes_of_a_pass < backward.bytes <= 1.05 * 2 * bytes_of_a_pass


@needs_kernels
def test_autocast(device: str) -> None:
    layer = DropConnect(12, 7).to(device)
    x = random_tensor((5, 12), torch.float32, device)
    with torch.autocast(device, dtype=torch.bfloat16):
        y = layer(x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert layer.weight.grad.dtype == layer.bias.grad.dtype == torch.float32


@needs_kernels
def test_autocast_leaves_float64(device: str) -> None:
    """As it does in a linear layer."""
    layer = DropConnect(12, 7, dtype=torch.float64).to(device)
    x = random_tensor((5, 12), torch.float64, device)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert layer(x).dtype == F.linear(x, layer.weight, layer.bias).dtype == torch.float64


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_a_linear_layer_with_code_of_its_own_is_refused(device: str) -> None:
    """Of a subclass, or of a hook: it would never run."""
    x = random_tensor((5, 12), torch.float32, device)
    hooked, derived = (DropConnect(12, 7).to(device) for _ in range(2))
    hooked.linear.register_forward_hook(lambda *_: None)
    derived.linear = Scaled(12, 7).to(device)
    for layer in (hooked, derived):
        with pytest.raises(TypeError, match=r"isn't a plain torch\.nn\.Linear"):
            layer(x)
        layer.eval()(x)


def test_layer(device: str) -> None:
    layer = DropConnect(12, 7, p=0.2).to(device)
    assert "p=0.2\n  (linear): Linear(in_features=12, out_features=7, bias=True)" in str(layer)
    assert not isinstance(layer, nn.Linear)
    x = random_tensor((5, 12), torch.float32, device)
    for duplicate in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        results = []
        for module in (layer, duplicate):
            torch.manual_seed(3)
            results.append(module(x))
        assert torch.equal(*results)
    with pytest.raises(ValueError, match="between 0 and 1"):
        DropConnect(12, 7, p=1.5)
    for weight in (torch.ones(7, 11, device=device), torch.ones(7, 12, dtype=torch.float64, device=device)):
        with pytest.raises(RuntimeError):
            drop_connect_linear(x, weight)


@needs_kernels
def test_compiled_results_equal_eager(device: str) -> None:
    tensors = [leaf(tensor) for tensor in operands(5)]
    for ours, eager in compiled_and_eager(drop_connect_linear, tensors):
        torch.testing.assert_close(ours, eager)


def test_a_network_learns(device: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(DropConnect(12, 32, p=0.2), nn.ReLU(), nn.Linear(32, 3)).to(device)
    x, target = torch.randn(48, 12, device=device), torch.arange(48, device=device) % 3
    first, *_, last = losses(model, x, target, steps=15, lr=0.3)
    assert last < first
