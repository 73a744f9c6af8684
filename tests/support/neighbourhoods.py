"""Small networks from their papers' descriptions, each with what becomes one in it."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["NETWORKS", "Network"]


class Network(NamedTuple):
    """How a network is made, the shape of its input, and what `replace_layers(fuse=True)` makes one: the first layer of
    each chain, with the others.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    chains: dict[str, str]


# --- M5: Dai et al., "Very Deep Convolutional Neural Networks for Raw Waveforms" (ICASSP 2017) -----------------------


def m5() -> nn.Module:
    """Four convolutions of the raw wave, the first of 80 samples, each with batch norm, ReLU and pooling by 4."""
    layers: list[nn.Module] = []
    channels = 1
    for filters, kernel, stride in ((4, 80, 4), (4, 3, 1), (8, 3, 1)):
        convolution = nn.Conv1d(channels, filters, kernel, stride, bias=False)
        layers += [convolution, nn.BatchNorm1d(filters), nn.ReLU(), nn.MaxPool1d(4)]
        channels = filters
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(channels, 5))


# --- 3-D U-Net: Çiçek et al., "3D U-Net: Learning Dense Volumetric Segmentation" (MICCAI 2016) -----------------------


def _twice(channels: int, between: int, filters: int) -> list[nn.Module]:
    """Two convolutions, each with batch norm before ReLU."""
    return [
        layer
        for before, after in ((channels, between), (between, filters))
        for layer in (nn.Conv3d(before, after, 3, padding=1, bias=False), nn.BatchNorm3d(after), nn.ReLU())
    ]


class UNet3d(nn.Module):
    """One level down, and up again by a transposed convolution; what was on the way down is joined on the way up."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(*_twice(1, 2, 4))
        self.pool = nn.MaxPool3d(2)
        self.bottom = nn.Sequential(*_twice(4, 4, 8))
        self.up = nn.ConvTranspose3d(8, 8, 2, 2)
        self.act = nn.ReLU()
        self.joined = nn.Sequential(*_twice(12, 4, 4), nn.Conv3d(4, 3, 1))

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(x)
        y = self.act(self.up(self.bottom(self.pool(skip))))
        result: Tensor = self.joined(torch.cat((skip, y), 1))
        return result


def _twice_of(name: str) -> dict[str, str]:
    return {f"{name}.0": f"{name}.1, {name}.2", f"{name}.3": f"{name}.4, {name}.5"}


# --- DCGAN: Radford et al., "Unsupervised Representation Learning with Deep Convolutional ..." (ICLR 2016) -----------


def generator() -> nn.Module:
    """Transposed convolutions with batch norm and ReLU, the last with tanh."""
    return nn.Sequential(
        *(nn.ConvTranspose2d(6, 8, 4, 1, 0, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.ConvTranspose2d(8, 4, 4, 2, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.ConvTranspose2d(4, 3, 4, 2, 1), nn.Tanh()),
    )


def discriminator() -> nn.Module:
    """Strided convolutions with LeakyReLU of slope 0.2; the first without batch norm."""
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 4, 2, 1), nn.LeakyReLU(0.2)),
        *(nn.Conv2d(4, 8, 4, 2, 1, bias=False), nn.BatchNorm2d(8), nn.LeakyReLU(0.2)),
        *(nn.Conv2d(8, 1, 4), nn.Sigmoid()),
    )


NETWORKS: dict[str, Network] = {
    "M5": Network(m5, (2, 1, 1200), {"0": "1, 2, 3", "4": "5, 6, 7", "8": "9, 10, 11"}),
    "3-D U-Net": Network(
        UNet3d, (2, 1, 4, 6, 6), {**_twice_of("down"), **_twice_of("bottom"), "up": "act", **_twice_of("joined")}
    ),
    "DCGAN's generator": Network(generator, (2, 6, 1, 1), {"0": "1, 2", "3": "4, 5", "6": "7"}),
    "DCGAN's discriminator": Network(discriminator, (2, 3, 32, 32), {"0": "1", "2": "3, 4", "5": "6"}),
}
