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
    residuals: tuple[str, ...] = ()  # the chains that add one
    reduced: tuple[str, ...] = ()  # those that end with a function that leaves one place


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


# --- SRResNet: Ledig et al., "Photo-Realistic Single Image Super-Resolution Using a GAN" (CVPR 2017) ------------------


class Recovering(nn.Module):
    """A residual block: two convolutions with batch norm, PReLU between them, and the sum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.prelu = nn.PReLU()
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.prelu(self.bn1(self.conv1(x)))
        return x + self.bn2(self.conv2(y))


class SRResNet(nn.Module):
    """One block and one doubling of the size.  PReLU behind the shuffled pixels stays by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in, self.prelu = nn.Conv2d(3, 4, 9, padding=4), nn.PReLU()
        self.block = Recovering(4)
        self.conv_mid, self.bn_mid = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv_up, self.shuffle, self.prelu_up = nn.Conv2d(4, 16, 3, padding=1), nn.PixelShuffle(2), nn.PReLU()
        self.conv_out = nn.Conv2d(4, 3, 9, padding=4)

    def forward(self, x: Tensor) -> Tensor:
        head = self.prelu(self.conv_in(x))
        y = head + self.bn_mid(self.conv_mid(self.block(head)))
        result: Tensor = self.conv_out(self.prelu_up(self.shuffle(self.conv_up(y))))
        return result


# --- IResNet: Duta et al., "Improved Residual Networks for Image and Video Recognition" (ICPR 2020), as ArcFace has it


class IBasicBlock(nn.Module):
    """Batch norm first; PReLU with a slope for each channel between two convolutions; the second has the stride."""

    def __init__(self, channels: int, filters: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, filters, 3, padding=1, bias=False)
        self.bn2, self.prelu = nn.BatchNorm2d(filters), nn.PReLU(filters)
        self.conv2, self.bn3 = nn.Conv2d(filters, filters, 3, 2, 1, bias=False), nn.BatchNorm2d(filters)
        self.downsample = nn.Sequential(nn.Conv2d(channels, filters, 1, 2, bias=False), nn.BatchNorm2d(filters))

    def forward(self, x: Tensor) -> Tensor:
        y = self.prelu(self.bn2(self.conv1(self.bn1(x))))
        y = self.bn3(self.conv2(y))
        y += self.downsample(x)
        return y


class IResNet(nn.Module):
    """One block between stem and embedding.  Dropout drops nothing here, so that results can be compared."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.prelu, self.layer1 = nn.PReLU(4), IBasicBlock(4, 6)
        self.bn2, self.dropout = nn.BatchNorm2d(6), nn.Dropout(0.0)
        self.fc, self.features = nn.Linear(6 * 64, 8), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer1(self.prelu(self.bn1(self.conv1(x))))
        x = torch.flatten(self.dropout(self.bn2(x)), 1)
        result: Tensor = self.features(self.fc(x))
        return result


# --- PointNet: Qi et al., "PointNet: Deep Learning on Point Sets for 3D Classification" (CVPR 2017) -------------------


class PointNet(nn.Module):
    """Layers shared by all points, the maximum over these, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Sequential(
            *(nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4), nn.ReLU()),
            *(nn.Conv1d(4, 8, 1), nn.BatchNorm1d(8), nn.ReLU()),
        )
        self.classifier = nn.Sequential(
            *(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.0)),
            nn.Linear(6, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.classifier(torch.max(self.shared(x), 2)[0])
        return result


def table() -> nn.Module:
    """Of numbers in a table: linear layers with batch norm, activation and dropout, in one with PReLU."""
    return nn.Sequential(
        *(nn.Linear(10, 8), nn.BatchNorm1d(8), nn.SiLU(), nn.Dropout(0.0)),
        *(nn.Linear(8, 6), nn.PReLU(6), nn.Dropout(0.0)),
        nn.Linear(6, 3),
    )


def older() -> nn.Module:
    """Activations before the norms, as many older networks and tabular models have them."""
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)),
        *(nn.Conv2d(4, 4, 3, bias=False), nn.ELU(0.5), nn.BatchNorm2d(4), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(64, 8), nn.LeakyReLU(0.2), nn.BatchNorm1d(8), nn.Dropout(0.0)),
        nn.Linear(8, 3),
    )


def small() -> nn.Module:
    """Of small images: channels are dropped behind an activation, elements and channels behind norm and activation."""
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Dropout2d(0.0)),
        *(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ELU(0.5), nn.Dropout(0.0)),
        *(nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout2d(0.0)),
        nn.Conv2d(4, 2, 1),
    )


def heads() -> nn.Module:
    """A mean over all places as classifiers have it, and behind it a maximum, of what is left of one place each."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU6(), nn.AdaptiveAvgPool2d(1)),
        *(nn.ConvTranspose2d(8, 4, 3), nn.SiLU(), nn.AdaptiveMaxPool2d(1)),
        *(nn.Flatten(), nn.Linear(4, 3)),
    )


NETWORKS: dict[str, Network] = {
    "M5": Network(m5, (2, 1, 1200), {"0": "1, 2, 3", "4": "5, 6, 7", "8": "9, 10, 11"}),
    "3-D U-Net": Network(
        UNet3d, (2, 1, 4, 6, 6), {**_twice_of("down"), **_twice_of("bottom"), "up": "act", **_twice_of("joined")}
    ),
    "DCGAN's generator": Network(generator, (2, 6, 1, 1), {"0": "1, 2", "3": "4, 5", "6": "7"}),
    "DCGAN's discriminator": Network(discriminator, (2, 3, 32, 32), {"0": "1", "2": "3, 4", "5": "6"}),
    "SRResNet": Network(
        SRResNet,
        (2, 3, 14, 14),
        {
            "conv_in": "prelu",
            "block.conv1": "block.bn1, block.prelu",
            "block.conv2": "block.bn2",
            "conv_mid": "bn_mid",
        },
        ("block.conv2", "conv_mid"),
    ),
    "IResNet": Network(
        IResNet,
        (4, 3, 16, 16),
        {
            "conv1": "bn1, prelu",
            "layer1.conv1": "layer1.bn2, layer1.prelu",
            "layer1.conv2": "layer1.bn3",
            "layer1.downsample.0": "layer1.downsample.1",
            "bn2": "dropout",
        },
        ("layer1.conv2",),
    ),
    "PointNet": Network(
        PointNet,
        (2, 3, 400),
        {
            "shared.0": "shared.1, shared.2",
            "shared.3": "shared.4, shared.5",  # and the maximum
            "classifier.0": "classifier.1, classifier.2, classifier.3",
        },
        reduced=("shared.3",),
    ),
    "heads": Network(heads, (2, 3, 12, 12), {"0": "1, 2, 3", "4": "5, 6"}),
    "a table's": Network(table, (300, 10), {"0": "1, 2, 3", "4": "5, 6"}),
    "older": Network(older, (5, 3, 12, 12), {"0": "1, 2", "3": "4, 5", "8": "9, 10, 11"}),
    "small images'": Network(small, (2, 3, 20, 20), {"0": "1, 2", "3": "4, 5, 6", "7": "8, 9, 10"}),
}
