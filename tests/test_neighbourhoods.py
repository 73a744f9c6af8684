"""Networks as people write them: all neighbours in them are fused, right, and in their byte budget."""

import copy

import pytest
import torch
from support.fusion import fused_groups
from support.neighbourhoods import NETWORKS, Network
from torch import Tensor, nn

import fusednn
from fusednn import kernels
from fusednn.testing import assert_accurate, random_tensor

if kernels.INTERPRETING:
    from fusednn.instruments.traffic import Traffic, measure_traffic

every_network = pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
#: Over the budget: what channels have one of, and the ends of rows.
SLACK = 1.1
#: What PyTorch's own kernels of batch norm launch in training: statistics, running statistics, and the normalisation.
#: The meter counts operators.
LAUNCHES_OF_A_NORM = 3
#: And backward: one for images that aren't channels-last, with a block for each channel; ours are two in any format.
LAUNCHES_OF_ITS_GRADIENT = 1
#: The gradient of max pooling is filled with zeros before it is scattered.
LAUNCHES_OF_POOLINGS_GRADIENT = 2


def pair(network: Network, device: str) -> tuple[nn.Module, nn.Module]:
    """The network, fused; and as it was."""
    torch.manual_seed(0)
    stock = network.build().to(device)
    model = copy.deepcopy(stock)
    report = fusednn.replace_layers(model, fuse=True)
    assert fused_groups(report) == network.chains
    return model, stock


def results(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The output, all gradients, and all buffers after the step."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = model(x)
    y.backward(torch.linspace(-1, 2, y.numel(), dtype=torch.float64, device=y.device).view_as(y).to(y))
    gradients = {f"gradient of {name}": one.grad for name, one in (("x", x), *model.named_parameters())}
    buffers = {name: one.clone() for name, one in model.named_buffers() if one.is_floating_point()}
    return {"output": y.detach(), **gradients, **buffers}


@pytest.mark.kernels
@every_network
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_chains_are_computed_in_one_and_right(network: Network, training: bool, device: str) -> None:
    model, stock = (one.train(training) for one in pair(network, device))
    x = random_tensor(network.shape, torch.float32, device)
    explanation = fusednn.explain(copy.deepcopy(model), x)
    assert [row.name for row in explanation if row.path == "apart"] == []
    together = {name for names in network.chains.values() for name in names.split(", ")}
    assert together <= {row.name for row in explanation if row.path == "fused"} | {"the functions behind it"}
    mine, theirs = (results(one, x) for one in (model, stock))
    exact = results(copy.deepcopy(stock).double(), x.double())
    if training:  # the running statistics have been updated once more for the exact results
        exact = results(pair(network, device)[1].train().double(), x.double())
    for name in theirs:
        # Gradients of a bias before batch norm are 0, of which only rounding is left; others pass many layers.
        assert_accurate(mine[name], theirs[name], exact[name], name, inherent=1e-5, chosen=False)


def penalised(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Gradients of which a graph is kept, and those of a penalty on them."""
    x = x.clone().requires_grad_()
    operands = [x, *model.parameters()]
    gradients = torch.autograd.grad(model(x).square().sum(), operands, create_graph=True)
    penalty = sum(gradient.square().sum() for gradient in gradients)
    return [*gradients, *torch.autograd.grad(penalty, operands, materialize_grads=True)]


@pytest.mark.kernels
@pytest.mark.thorough
@every_network
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_second_derivatives(network: Network, training: bool, device: str) -> None:
    """Of stock operators, but begun at what the kernels kept: in float64, since a penalty magnifies what is rounded."""
    x = random_tensor(network.shape, torch.float64, device)
    mine, theirs = (penalised(one.train(training).double(), x) for one in pair(network, device))
    torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-9)


@pytest.mark.kernels
@every_network
def test_compiled(network: Network, keeps_kernels: None, device: str) -> None:
    torch._dynamo.reset()
    model, _ = pair(network, device)
    x = random_tensor(network.shape, torch.float32, device)
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), eager(x))


def budget_of(network: Network, stock: nn.Module, x: Tensor) -> float:
    """Bytes that our kernels move in a training step's forward pass: a chain reads what its product wrote, where it has
    a batch norm twice, and writes its result, and a bit an element, or half a byte a window, of what it keeps.
    """
    sizes: dict[str, tuple[int, int]] = {}
    handles = [
        module.register_forward_hook(
            lambda _, inputs, y, name=name: sizes.__setitem__(name, (inputs[0].numel(), y.numel()))
        )
        for name, module in stock.named_modules()
    ]
    stock(x)
    for handle in handles:
        handle.remove()
    chained = {name for first, names in network.chains.items() for name in (first, *names.split(", "))}
    total = 0.0
    for first, names in network.chains.items():
        layers = [name for name in names.split(", ") if name in sizes]
        product, result = sizes[first][1], sizes[layers[-1] if layers else first][1]
        if first in network.reduced:
            result = x.shape[0] * stock.get_submodule(first).out_channels
        normalised = any(isinstance(stock.get_submodule(name), nn.modules.batchnorm._BatchNorm) for name in layers)
        normalised |= isinstance(stock.get_submodule(first), nn.modules.batchnorm._BatchNorm)
        total += (product * (1 + normalised) + result) * x.itemsize + result / (8 if product == result else 2)
        total += result * x.itemsize * (first in network.residuals)
    for name, (read, written) in sizes.items():
        alone = None if name in chained else stock.get_submodule(name)
        if isinstance(alone, nn.modules.pooling._MaxPoolNd):
            total += (read + written) * x.itemsize + written / 2
        elif isinstance(alone, nn.PReLU | nn.modules.batchnorm._BatchNorm):
            total += (read * (1 + (not isinstance(alone, nn.PReLU))) + written) * x.itemsize
    return total


def adds_its_bias(network: Network, stock: nn.Module, first: str) -> bool:
    """Whether a chain adds its convolution's bias, whose gradient PyTorch sums in a launch that isn't counted."""
    conv, second = (stock.get_submodule(name) for name in (first, network.chains[first].split(", ")[0]))
    biased = isinstance(conv, nn.modules.conv._ConvNd) and conv.bias is not None
    return biased and not isinstance(second, nn.modules.batchnorm._BatchNorm)


@pytest.mark.kernels
@pytest.mark.interpreter
@every_network
def test_bytes_and_launches(network: Network, device: str) -> None:
    model, stock = pair(network, device)
    x = random_tensor(network.shape, torch.float32, device)
    found: list[Traffic] = []
    for one in (model, stock):
        with measure_traffic() as forward:
            y = one(x)
        with measure_traffic() as backward:
            y.backward(torch.ones_like(y))
        found += [forward, backward]
    ahead, back, stock_ahead, stock_back = found
    assert ahead.bytes <= SLACK * budget_of(network, stock, x)
    modules = list(stock.modules())
    norms, pools = (
        sum(isinstance(one, kind) for one in modules)
        for kind in (nn.modules.batchnorm._BatchNorm, nn.modules.pooling._MaxPoolNd)
    )
    launched, stock_launched = (one.launches + one.aten_operations for one in (ahead, stock_ahead))
    stock_launched += (LAUNCHES_OF_A_NORM - 1) * norms
    assert launched < stock_launched
    launched_back, stock_launched_back = (one.launches + one.aten_operations for one in (back, stock_back))
    stock_launched_back += (LAUNCHES_OF_ITS_GRADIENT - 1) * norms + (LAUNCHES_OF_POOLINGS_GRADIENT - 1) * pools
    stock_launched_back += sum(adds_its_bias(network, stock, first) for first in network.chains)
    # A norm's gradient takes us a launch more; what is fused with it makes up for that, where something is.
    assert launched_back <= stock_launched_back + norms
    assert launched + launched_back < stock_launched + stock_launched_back
    if pools:
        assert launched_back < stock_launched_back
    for ours, theirs in ((ahead, stock_ahead), (back, stock_back)):
        assert ours.bytes + ours.aten_bytes < theirs.aten_bytes
