"""Small networks from their papers' descriptions, with neighbours that images' classifiers don't have."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["PAPERS"]

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


#: By name: how a network is made, and the shape of its input.
PAPERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "M5": (m5, (2, 1, 1200)),
    "3-D U-Net": (UNet3d, (2, 1, 4, 6, 6)),
    "DCGAN's generator": (generator, (2, 6, 1, 1)),
    "DCGAN's discriminator": (discriminator, (2, 3, 32, 32)),
    "SRResNet": (SRResNet, (2, 3, 14, 14)),
    "IResNet": (IResNet, (4, 3, 16, 16)),
    "PointNet": (PointNet, (2, 3, 400)),
}
