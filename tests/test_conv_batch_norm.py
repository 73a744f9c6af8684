"""Convolution, batch norm, activation and max pooling in one, against PyTorch's layers one after another."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.activations import STOCK
from support.device import KERNELS_RUN, ON_GPU
from support.training import assert_same_step
from torch import Tensor, nn

from fusednn import kernels, layers
from fusednn.autograd.dispatch import Choice, observe_choices
from fusednn.instruments.saved_tensors import saved_tensors
from fusednn.testing import LAYOUTS, assert_accurate, leaf, poisoned_memory, random_tensor

if kernels.INTERPRETING:
    from fusednn.instruments.traffic import measure_traffic

needs_kernels = pytest.mark.kernels
counts_bytes = pytest.mark.interpreter

Options = dict[str, Any]
POOLS: list[Options] = [{}, {"pool_size": 2}, {"pool_size": 3, "pool_stride": 2, "pool_padding": 1}]


class Chain(nn.Module):
    """Stock layers, with the same parameters' names."""

    def __init__(self, layer: layers.ConvBatchNormAct2d) -> None:
        super().__init__()
        conv, bn = layer.conv, layer.bn
        self.conv = nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding)
        self.bn = nn.BatchNorm2d(bn.num_features, bn.eps, bn.momentum, bn.affine, bn.track_running_stats)
        self.layer = [layer]

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        (layer,) = self.layer
        y = self.bn(self.conv(x))
        if residual is not None:
            y = y + residual
        if layer.activation is not None:
            y = STOCK[layer.activation](y, *layer.activation_parameters)
        if layer.pool_size is None:
            return y
        return F.max_pool2d(y, layer.pool_size, layer.pool_stride, layer.pool_padding)


def pair(
    dtype: torch.dtype, device: str, *, channels: int = 3, filters: int = 5, **options: Any
) -> tuple[layers.ConvBatchNormAct2d, Chain]:
    """Our layer and stock's, equal, with statistics that aren't the first ones."""
    torch.manual_seed(0)
    ours = layers.ConvBatchNormAct2d(channels, filters, 3, **options)
    with torch.no_grad():
        for parameter in ours.bn.parameters():
            parameter.uniform_(0.5, 1.5)
        if ours.bn.track_running_stats:
            ours.bn.running_mean.uniform_(-0.5, 0.5)
            ours.bn.running_var.uniform_(0.5, 2)
    stock = Chain(ours)
    stock.load_state_dict(ours.state_dict())
    return ours.to(device, dtype), stock.to(device, dtype)


def run(module: nn.Module, x: Tensor, residual: Tensor | None, dtype: torch.dtype) -> list[Tensor]:
    """Value, gradients of operands and parameters, and buffers."""
    module = copy.deepcopy(module).to(dtype)
    operands = [leaf(t.to(dtype)) for t in (x, residual) if t is not None]
    y = module(*operands)
    gradient = random_tensor(tuple(y.shape), torch.float64, x.device.type, seed=5).to(dtype)
    gradients = torch.autograd.grad(y, [*operands, *module.parameters()], gradient)
    return [y.detach(), *gradients, *module.buffers()]


def check(modules: tuple[nn.Module, nn.Module], x: Tensor, residual: Tensor | None) -> None:
    ours, stock = modules
    with poisoned_memory(0xA5):
        mine = run(ours, x, residual, x.dtype)
    theirs, exact = run(stock, x, residual, x.dtype), run(stock, x, residual, torch.float64)
    for index, (a, b, c) in enumerate(zip(mine, theirs, exact, strict=True)):
        if a.is_floating_point():
            # A bias before batch norm has a gradient of 0, of which only rounding is left.
            assert_accurate(a, b, c, f"result {index}", inherent=64 * torch.finfo(a.dtype).eps)
        else:
            assert torch.equal(a, b)


@needs_kernels
@pytest.mark.parametrize("pool", POOLS, ids=str)
@pytest.mark.parametrize("joined", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_values_gradients_and_statistics(pool: Options, joined: bool, training: bool, device: str) -> None:
    modules = tuple(module.train(training) for module in pair(torch.float32, device, padding=1, **pool))
    x = LAYOUTS["channels_last"](random_tensor((2, 3, 8, 7), torch.float32, device))
    residual = LAYOUTS["channels_last"](random_tensor((2, 5, 8, 7), torch.float32, device, seed=4)) if joined else None
    check(modules, x, residual)


@needs_kernels
@pytest.mark.parametrize(
    ("activation", "parameters"), [("tanh", ()), ("silu", ()), (None, ()), ("hardtanh", (0, 6)), ("celu", (0.7,))]
)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_activations(activation: str | None, parameters: tuple[float, ...], training: bool, device: str) -> None:
    modules = pair(torch.float32, device, activation=activation, activation_parameters=parameters, pool_size=2)
    modules = tuple(module.train(training) for module in modules)
    check(modules, random_tensor((2, 3, 8, 8), torch.float32, device), None)
    residual = random_tensor((2, 5, 6, 6), torch.float32, device, seed=4)
    check(modules, random_tensor((2, 3, 8, 8), torch.float32, device), residual)


@needs_kernels
@pytest.mark.parametrize(
    "options",
    [{"affine": False}, {"track_running_stats": False}, {"momentum": None}, {"bias": False}, {"stride": 2, "eps": 0.1}],
    ids=str,
)
def test_options(options: Options, device: str) -> None:
    ours, stock = pair(torch.float64, device, pool_size=2, **{**options, "bias": True})
    for training in (True, False):
        check((ours.train(training), stock.train(training)), random_tensor((2, 3, 9, 8), torch.float64, device), None)


@needs_kernels
@pytest.mark.parametrize(
    "check", [torch.autograd.gradcheck, pytest.param(torch.autograd.gradgradcheck, marks=pytest.mark.thorough)]
)
def test_numerical_gradients(check: Callable[..., bool], device: str) -> None:
    ours, _ = pair(torch.float64, device, channels=1, filters=1, activation="tanh", pool_size=2, momentum=0.0)
    x, residual = random_tensor((1, 1, 4, 4), torch.float64, device) / 3, torch.zeros(1, 1, 2, 2).to(device).double()
    assert check(ours, (leaf(x), leaf(residual)))


@needs_kernels
@counts_bytes
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_passes_and_what_is_saved(layout: str, device: str) -> None:
    """In training one pass more over the convolution's result than its own, or two; in evaluation none."""
    ours, _ = pair(torch.float32, device, channels=16, pool_size=2, padding=1)
    x = LAYOUTS[layout](random_tensor((2, 16, 16, 32), torch.float32, device))
    dense = 4 * 2 * 5 * 16 * 32
    with measure_traffic() as traffic, saved_tensors() as saved:
        y = ours(leaf(x))
    launches = {launch.kernel: launch for launch in traffic.kernel_launches}
    single = layout == "channels_last"
    convolution = "conv_pool_kernel" if single else "batch_norm_statistics_kernel"
    assert list(launches) == [convolution, "batch_norm_merge_kernel", "pool_forward_kernel"]
    assert launches[convolution].stored_bytes == dense * single + 4 * 3 * 5 * (16 if single else 4)  # and statistics
    code = 2 * 8 * 16 * 3 if single else 2 * 5 * 8 * 8  # four bits, in rows of 5 channels or 16 places
    assert launches["pool_forward_kernel"].stored_bytes == 4 * y.numel() + code
    assert saved.bytes_beside(x, *ours.parameters()) <= dense + code + 256

    ours.eval()
    with measure_traffic() as traffic, torch.no_grad():
        ours(x)
    assert [launch.kernel for launch in traffic.kernel_launches] == [
        "conv_pool_kernel" if single else "pool_forward_kernel"
    ]


@needs_kernels
@pytest.mark.parametrize("shift", [0.0, 1000.0])
@pytest.mark.parametrize("shape", [(2, 3, 9, 8), (1, 3, 4, 4), (3, 3, 20, 11)], ids=str)
def test_statistics_of_the_convolution(shape: tuple[int, ...], shift: float, device: str) -> None:
    """Those that its kernel leaves merge to the mean and variance of what it stored, also far from 0."""
    x = LAYOUTS["channels_last"](random_tensor(shape, torch.float32, device))
    weight = random_tensor((5, 3, 3, 3), torch.float32, device, seed=1)
    bias = random_tensor((5,), torch.float32, device, seed=2) + shift
    z, partial = kernels.conv.conv_statistics(x, weight, bias, (1, 1), (0, 0))
    mean, variance = kernels.batch_norm_statistics.merge_statistics(partial, None, None, None, 0.0)
    exact = torch.var_mean(z.double(), (0, 2, 3), correction=0)
    theirs = torch.var_mean(z, (0, 2, 3), correction=0)
    assert_accurate(mean, theirs[1], exact[1], "mean")
    assert_accurate(variance, theirs[0], exact[0], "variance", inherent=1e-6 * exact[0])
    torch.testing.assert_close(z, F.conv2d(x, weight, bias))


@needs_kernels
def test_opcheck(device: str) -> None:
    x = LAYOUTS["channels_last"](random_tensor((2, 3, 6, 6), torch.float32, device))
    weight = random_tensor((5, 3, 3, 3), torch.float32, device, seed=1)
    torch.library.opcheck(torch.ops.fusednn.conv_statistics.default, (x, weight, None, [1, 1], [1, 1]))


@needs_kernels
def test_compiled(device: str) -> None:
    torch._dynamo.reset()
    x = random_tensor((2, 3, 8, 8), torch.float32, device)
    for training in (True, False):
        ours, _ = pair(torch.float32, device, pool_size=2)
        ours.train(training)
        compiled = torch.compile(copy.deepcopy(ours), fullgraph=True, backend="inductor" if ON_GPU else "aot_eager")
        assert_same_step(compiled, ours, x)


def test_state_copies_and_errors(device: str) -> None:
    ours, stock = pair(torch.float32, device)
    assert list(ours.state_dict()) == list(stock.state_dict())
    ours.load_state_dict(stock.state_dict())
    x = random_tensor((2, 3, 8, 8), torch.float32, device)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        torch.testing.assert_close(twin(x), stock(x))
        stock.load_state_dict(ours.state_dict())
    with pytest.raises(ValueError, match="expected 4D input"):
        ours(x[0])
    with pytest.raises(ValueError, match="unknown activation 'rule'"):
        layers.ConvBatchNormAct2d(3, 4, 3, activation="rule")


def test_the_choice_follows_the_machine(device: str) -> None:
    ours, _ = pair(torch.float32, device, pool_size=2)
    choices: list[Choice] = []
    with observe_choices(choices.append):
        ours(random_tensor((2, 3, 8, 8), torch.float32, device))
    chosen = {choice.operation: choice.kernel for choice in choices}
    assert chosen["batch_norm_act_pool2d"] == KERNELS_RUN
    assert not chosen["conv2d"]  # contiguous images
