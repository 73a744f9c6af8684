"""Training steps of whole networks: CNNs in the style of VGG and of ResNet, a maxout network with dropout, LeNet.

VGG: Simonyan, Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition" (ICLR 2015), with fewer
layers and batch norm nowhere.  ResNet: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition" (CVPR 2016),
ResNet-18's.  Maxout: Goodfellow, Warde-Farley, Mirza, Courville, Bengio, "Maxout Networks" (ICML 2013).  LeNet: LeCun,
Bottou, Bengio, Haffner, "Gradient-Based Learning Applied to Document Recognition" (1998), with ReLU and max pooling.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from fusednn_bench.networks import Network, NetworkCase, StockMaxout
from fusednn_bench.replay import device_clock, replay
from torch import Tensor, nn


def vgg(width: int) -> nn.Module:
    """Five stages of 3 x 3 convolutions, each ending in a pooling; the last three have two."""
    layers: list[nn.Module] = []
    channels = 3
    for stage, convolutions in enumerate((1, 1, 2, 2, 2)):
        filters = width * min(2**stage, 8)
        for _ in range(convolutions):
            layers += [nn.Conv2d(channels, filters, 3, padding=1), nn.ReLU(inplace=True)]
            channels = filters
        layers.append(nn.MaxPool2d(2, ceil_mode=True))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


class Block(nn.Module):
    """Two 3 x 3 convolutions with batch norm, and the input added before the last activation."""

    def __init__(self, channels: int, filters: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, filters, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(filters)
        self.conv2 = nn.Conv2d(filters, filters, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(filters)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != filters:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, filters, 1, stride, bias=False), nn.BatchNorm2d(filters))
        self.relu1, self.relu2 = nn.ReLU(inplace=True), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.norm1(self.conv1(x)))
        return self.relu2(self.norm2(self.conv2(y)) + self.shortcut(x))


def resnet(width: int) -> nn.Module:
    stem = (nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
    blocks: list[nn.Module] = []
    channels = width
    for stage in range(4):
        for stride in (1 if stage == 0 else 2, 1):
            blocks.append(Block(channels, width * 2**stage, stride))
            channels = width * 2**stage
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))
    return nn.Sequential(*stem, nn.MaxPool2d(3, 2, 1), *blocks, *head)


def maxout_mlp(width: int) -> nn.Module:
    """Two hidden layers of maxima over two pieces, with dropout before each layer."""
    hidden = (nn.Dropout(0.2), StockMaxout(784, width, 2), nn.Dropout(0.5), StockMaxout(width, width, 2))
    return nn.Sequential(nn.Flatten(), *hidden, nn.Dropout(0.5), nn.Linear(width, 10))


def lenet(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, width, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 16 * width // 6, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.LazyLinear(120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, 10),
    )


def lenet_of_32(width: int) -> nn.Module:
    """`lenet` for images of 32 x 32: the first product's size follows."""
    model = lenet(width)
    model(torch.zeros(1, 1, 32, 32))
    return model


def _photographs(batch: int, size: int) -> Tensor:
    return _random(batch, 3, size, size)


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def _digits(batch: int, size: int) -> Tensor:
    """scikit-learn's digits of 8 x 8, enlarged; random numbers of that shape where it isn't installed."""
    if find_spec("sklearn") is None:
        return _random(batch, 1, size, size)
    from sklearn.datasets import load_digits

    images = torch.tensor(load_digits().images[:batch], dtype=torch.float32)[:, None] / 16
    return nn.functional.interpolate(images, size=size)


def _letters(batch: int, size: int) -> Tensor:
    return _random(batch, 1, size, size)


OPERATIONS = {
    network.name: network
    for network in (
        Network("vgg", vgg, _photographs),
        Network("resnet", resnet, _photographs),
        Network("maxout_mlp", maxout_mlp, _letters),
        Network("lenet_digits", lenet_of_32, _digits),
    )
}
#: Width, batch and size of the images.
TIMED = {"vgg": (64, 64, 224), "resnet": (64, 64, 224), "maxout_mlp": (1024, 1024, 28), "lenet_digits": (6, 64, 32)}
COUNTED = {"vgg": (4, 2, 16), "resnet": (4, 8, 16), "maxout_mlp": (32, 4, 28), "lenet_digits": (6, 2, 32)}
SIZES = {"network": TIMED, "small": TIMED, "counted": COUNTED}
SMALL = ("lenet_digits",)


def timed_cases(full: bool) -> list[NetworkCase]:
    """The most important first: a time limit cuts the end."""
    return [
        NetworkCase(network, dtype, "small" if name in SMALL else "network", *TIMED[name])
        for dtype in ((torch.bfloat16, torch.float32) if full else (torch.bfloat16,))
        for name, network in OPERATIONS.items()
    ]


def counted_cases() -> list[NetworkCase]:
    return [NetworkCase(network, torch.float32, "counted", *COUNTED[name]) for name, network in OPERATIONS.items()]


@pytest.mark.benchmark(timer=device_clock)
def test_device_time(
    case: NetworkCase, contestant: str, device_samples: dict[str, list[float]], benchmark: Any
) -> None:
    benchmark.group = case.id
    replay(benchmark, device_samples["training_step"])


def test_traffic(case: NetworkCase, counts: list[dict[str, Any]]) -> None:
    """No network keeps more activations than eager's."""
    saved = {record["contestant"]: record["saved_bytes"] for record in counts}
    assert saved["fusednn"] <= saved["eager"]
