"""What is measured on the host: a layer of every family, networks and optimizers, stock's beside ours; tiny tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fusednn
from fusednn import kernels, layers, optim
from fusednn.demonstration.digits import build_network
from fusednn.kernels.base.launch import launch

__all__ = ["KERNELS", "HostCase", "host_cases"]

Call = Callable[[], object]

#: The contestant of ours that takes kernels for small tensors, too; ``fusednn`` is what users run.
KERNELS = "always_kernels"


class HostCase(NamedTuple):
    """Calls of two or more contestants, by name, which do the same.  ``launches`` of ours are counted.

    ``refused``: on CPU tensors, which no kernel takes, whatever stands in for a GPU.
    """

    family: str
    operation: str
    direction: str
    shape: tuple[int, ...]
    calls: dict[str, Call]
    refused: bool = False


def host_cases() -> Iterator[HostCase]:
    torch.manual_seed(0)
    for family, name, stock, ours, inputs in _layers():
        shape = tuple(inputs[0].shape)
        modules = {"eager": stock, "fusednn": ours, KERNELS: ours}
        yield HostCase(family, name, "forward", shape, {k: _forward(module, inputs) for k, module in modules.items()})
        g = torch.rand_like(stock(*inputs))
        both = {k: _both(module, inputs, g) for k, module in modules.items()}
        yield HostCase(family, name, "forward_backward", shape, both)
    for name, build, shape in (
        ("lenet", _lenet, (1, 1, 24, 24)),
        ("resnet", _resnet, (1, 1, 8, 8)),
        ("vgg_block", _vgg_block, (1, 3, 8, 8)),
    ):
        for suffix, fuse in (("", False), ("_fused", True)):
            yield HostCase("network", name + suffix, "training_step", shape, _networks(build, shape, fuse))
    yield from _refused()
    for name, options in (("Adam", {}), ("RMSprop", {}), ("SGD", {"momentum": 0.9})):
        for number in (60, 200):
            yield HostCase("optimizer", name, "step", (number, 16), dict(_optimizers(name, number, options)))
    yield from _launches()


def _forward(module: nn.Module, inputs: tuple[Tensor, ...]) -> Call:
    return lambda: module(*inputs)


def _both(module: nn.Module, inputs: tuple[Tensor, ...], g: Tensor) -> Call:
    leaves = [*module.parameters(), inputs[0]]

    def call() -> None:
        for leaf in leaves:
            leaf.grad = None
        module(*inputs).backward(g)

    return call


class _Stock(nn.Module):
    """Stock operators in a row, as users write them, with the parameters of a layer."""

    def __init__(self, function: Callable[..., Tensor], layer: nn.Module) -> None:
        super().__init__()
        self.function, self.layer = function, layer

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layer, x)


def _layers() -> Iterator[tuple[str, str, nn.Module, nn.Module, tuple[Tensor, ...]]]:
    """Family, name, stock's module, ours, inputs."""

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, requires_grad=True)

    def bias_activation_dropout(layer: Any, x: Tensor) -> Tensor:
        return nn.functional.dropout(nn.functional.relu(x + layer.bias), 0.5, True)

    def maxout(layer: Any, x: Tensor) -> Tensor:
        return layer(x).unflatten(-1, (2, 64)).amax(-2)

    for name in ("ReLU", "GELU", "PReLU", "Dropout"):
        family = {"PReLU": "prelu", "Dropout": "dropout"}.get(name, "activation")
        yield family, name, getattr(nn, name)(), getattr(layers, name)(), (leaf(8, 64),)
    yield "softmax", "Softmax", nn.Softmax(-1), layers.Softmax(-1), (leaf(8, 10),)
    classes = torch.randint(0, 10, (8,))
    yield "loss", "CrossEntropyLoss", nn.CrossEntropyLoss(), layers.CrossEntropyLoss(), (leaf(8, 10), classes)
    yield "loss", "MSELoss", nn.MSELoss(), layers.MSELoss(), (leaf(8, 64), torch.randn(8, 64))
    yield "pool", "MaxPool2d", nn.MaxPool2d(2), layers.MaxPool2d(2), (leaf(2, 8, 8, 8),)
    yield "batch_norm", "BatchNorm2d", nn.BatchNorm2d(8), layers.BatchNorm2d(8), (leaf(2, 8, 8, 8),)
    norm = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU())
    yield "batch_norm", "BatchNormAct2d", norm, layers.BatchNormAct2d(8), (leaf(2, 8, 8, 8),)
    stock: nn.Module = _Stock(bias_activation_dropout, nn.Linear(64, 64))
    ours: nn.Module = layers.BiasActivationDropout(64)
    yield "bias_activation_dropout", "BiasActivationDropout", stock, ours, (leaf(8, 64),)
    yield "maxout", "Maxout", _Stock(maxout, nn.Linear(64, 128)), layers.Maxout(64, 64, 2), (leaf(8, 64),)
    stock = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    yield "conv", "ConvMaxPool2d", stock, layers.ConvMaxPool2d(4, 8, 3, padding=1), (leaf(2, 4, 8, 8),)
    stock = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    ours = layers.ConvBatchNormAct2d(4, 8, 3, padding=1, bias=False)
    yield "conv", "ConvBatchNormAct2d", stock, ours, (leaf(2, 4, 8, 8),)


# --- Networks ---------------------------------------------------------------------------------------------------------


def _networks(build: Callable[[], nn.Module], shape: tuple[int, ...], fuse: bool) -> dict[str, Call]:
    x, target = torch.randn(shape), torch.tensor([3])
    stock, ours = build(), build()
    fusednn.replace_layers(ours, fuse=fuse)
    step = _step(ours, layers.CrossEntropyLoss(), x, target)
    return {"eager": _step(stock, nn.CrossEntropyLoss(), x, target), "fusednn": step, KERNELS: step}


def _refused() -> Iterator[HostCase]:
    """The demo's network and batch where no kernel runs, and it is to cost no more for being replaced."""
    images, labels = torch.randn(64, 1, 8, 8, device="cpu"), torch.arange(64, device="cpu") % 10
    for suffix, fuse in (("", False), ("_fused", True)):
        stock, ours = (build_network(0).to("cpu") for _ in range(2))
        fusednn.replace_layers(ours, fuse=fuse)
        calls = {k: _step(one.layers, one.loss, images, labels) for k, one in (("eager", stock), ("fusednn", ours))}
        yield HostCase("network", "demo_on_a_cpu" + suffix, "training_step", tuple(images.shape), calls, refused=True)


def _step(network: nn.Module, loss: nn.Module, x: Tensor, target: Tensor) -> Call:
    parameters = list(network.parameters())

    def call() -> None:
        for parameter in parameters:
            parameter.grad = None
        loss(network(x), target).backward()

    return call


def _lenet() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(256, 120), nn.ReLU(), nn.Dropout(0.5), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)),
    )


def _vgg_block() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(128, 10)),
    )


class _Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Any:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + x)


def _resnet() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()),
        *(_Block(4), _Block(4), nn.MaxPool2d(4), _Block(4), _Block(4)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)),
    )


# --- Optimizers -------------------------------------------------------------------------------------------------------


def _optimizers(name: str, number: int, options: dict[str, Any]) -> Iterator[tuple[str, Call]]:
    variants: dict[str, tuple[Any, dict[str, bool]]] = {
        "eager": (torch.optim, {"foreach": True}),
        "fusednn": (optim, {}),
        **({} if name == "RMSprop" else {"eager, fused": (torch.optim, {"fused": True})}),
    }
    for contestant, (module, path) in variants.items():
        parameters = [nn.Parameter(torch.randn(16)) for _ in range(number)]
        for parameter in parameters:
            parameter.grad = torch.randn(16)
        yield contestant, getattr(module, name)(parameters, lr=1e-3, **options, **path).step


# --- Launches ---------------------------------------------------------------------------------------------------------


def _launches() -> Iterator[HostCase]:
    """One launch of a kernel with few and of one with many run-time arguments, by `launch` and as Triton does it."""
    few = next(kernels.shipped("activation"))
    many = max(kernels.shipped("pool"), key=lambda configuration: len(configuration.names))
    for number, configuration in (("few", few), ("many", many)):
        memory = torch.empty(4096, dtype=torch.float64)
        arguments = [memory if kind[0] == "*" else 16 for _, kind in configuration.signature]
        calls = {
            "Triton": lambda c=configuration, a=arguments: c.kernel[(1,)](
                **dict(zip(c.names, a, strict=True)), **c.keywords_for(a)
            ),
            "fusednn": lambda c=configuration, a=arguments: launch(c, 1, *a),
        }
        yield HostCase("launch", f"launch of {number} arguments", "forward", (len(arguments),), calls)
