"""Small networks from their papers' descriptions, each with what becomes one in it."""

from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from . import baseline  # noqa: F401 (makes the benchmarks importable)

from fusednn_bench.papers import PAPERS  # isort: skip

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


def _twice_of(name: str) -> dict[str, str]:
    return {f"{name}.0": f"{name}.1, {name}.2", f"{name}.3": f"{name}.4, {name}.5"}


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
    "M5": Network(*PAPERS["M5"], {"0": "1, 2, 3", "4": "5, 6, 7", "8": "9, 10, 11"}),
    "3-D U-Net": Network(
        *PAPERS["3-D U-Net"], {**_twice_of("down"), **_twice_of("bottom"), "up": "act", **_twice_of("joined")}
    ),
    "DCGAN's generator": Network(*PAPERS["DCGAN's generator"], {"0": "1, 2", "3": "4, 5", "6": "7"}),
    "DCGAN's discriminator": Network(*PAPERS["DCGAN's discriminator"], {"0": "1", "2": "3, 4", "5": "6"}),
    "SRResNet": Network(
        *PAPERS["SRResNet"],
        {
            "conv_in": "prelu",
            "block.conv1": "block.bn1, block.prelu",
            "block.conv2": "block.bn2",
            "conv_mid": "bn_mid",
        },
        ("block.conv2", "conv_mid"),
    ),
    "IResNet": Network(
        *PAPERS["IResNet"],
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
        *PAPERS["PointNet"],
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
