"""The networks whose compiled training steps are counted, small blocks of larger ones, as users write them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

import fusednn
from fusednn.benchmark.protocol import DTYPE_NAMES

from .inductor import Counts, count_step
from .networks import FirstResult
from .papers import PAPERS

__all__ = ["CONTESTANTS", "CompiledStep", "compiled_steps"]

#: What is compiled: the stock network, the same with its layers replaced, and with their neighbours fused.
CONTESTANTS: dict[str, Callable[[nn.Module], object]] = {
    "stock": lambda model: model,
    "replaced": fusednn.replace_layers,
    "fused": lambda model: fusednn.replace_layers(model, fuse=True),
}


@dataclass(frozen=True)
class CompiledStep:
    """A network, built on the meta device, on an input of a shape (with class indices where there are ``classes``).

    ``bf16`` is autocast's, with float32 parameters.
    """

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    dtype: torch.dtype
    classes: int = 0

    @property
    def size(self) -> str:
        return "x".join(map(str, self.shape))

    @property
    def id(self) -> str:
        return f"{self.name} {DTYPE_NAMES[self.dtype]} {self.size}"

    def count(self, contestant: str, mode: str = "default") -> Counts:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler's, about caches and precisions that don't matter here
            model = self.build()
            inputs = [torch.empty(self.shape, dtype=self.dtype, requires_grad=True)]
            if self.classes:
                inputs.append(torch.empty(self.shape[0], dtype=torch.int64))
            CONTESTANTS[contestant](model)
        with torch.autocast("cpu", self.dtype, enabled=self.dtype is torch.bfloat16):
            return count_step(model, inputs, mode)

    def record(self, contestant: str, counts: Counts) -> dict[str, Any]:
        return {
            "family": "compiled step",
            "operation": self.name,
            "contestant": contestant,
            "direction": "training_step",
            "dtype": DTYPE_NAMES[self.dtype],
            "size": self.size,
            "shape": list(self.shape),
            **counts.record(),
        }


def compiled_steps() -> Iterator[CompiledStep]:
    """Every network in every size and dtype; those of torchvision and transformers where they are installed."""
    for name, (build, shapes, classes) in _networks().items():
        for shape in shapes:
            for dtype in (torch.bfloat16, torch.float32):
                yield CompiledStep(name, build, shape, dtype, classes)


_Row = tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...], int]
_IMAGES = ((8, 64, 16, 16), (8, 64, 56, 56))


def _networks() -> dict[str, _Row]:
    """By name: the network, shapes, and the number of classes where it ends in a loss."""
    rows: dict[str, _Row] = {
        "VGG block": (_vgg, _IMAGES, 0),
        "VGG block of 128": (lambda: _vgg(128), ((8, 128, 28, 28),), 0),
        "conv, batch norm, ReLU, pool": (_conv_norm_pool, _IMAGES, 0),
        "ResNet block": (ResNetBlock, _IMAGES, 0),
        "MLP with dropout": (_mlp, ((512, 512),), 0),
        "transformer block": (TransformerBlock, ((4, 64, 256),), 0),
        "head with cross-entropy": (_Head, ((256, 64, 8, 8),), _CLASSES),
        "autoencoder with MSE": (_Autoencoder, ((1024, 512),), 0),
        "highway": (_Highway, ((1024, 256),), 0),
        "scaled block": (_ScaledBlock, ((4, 64, 192),), 0),
        "maximum over points": (_PointMaximum, ((8, 64, 1024), (8, 64, 2048)), 0),
    }
    rows |= {name: (build, (shape,), 0) for name, (build, shape) in PAPERS.items()}
    for package, found in (("torchvision", _of_torchvision), ("transformers", _of_transformers)):
        if find_spec(package):
            rows |= found()
    return rows


def _vgg(channels: int = 64) -> nn.Module:
    first, second = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.MaxPool2d(2))


def _conv_norm_pool() -> nn.Module:
    return nn.Sequential(nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2))


def _mlp() -> nn.Module:
    hidden = [layer for _ in range(2) for layer in (nn.Linear(512, 512), nn.ReLU(), nn.Dropout(0.5))]
    return nn.Sequential(*hidden, nn.Linear(512, 512))


class ResNetBlock(nn.Module):
    """Two 3 x 3 convolutions with batch norm, and the input added before the last activation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(64, 64, 3, padding=1, bias=False) for _ in range(2))
        self.norm1, self.norm2, self.relu = nn.BatchNorm2d(64), nn.BatchNorm2d(64), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.norm1(self.conv1(x)))
        return self.relu(self.norm2(self.conv2(y)) + x)


class TransformerBlock(nn.Module):
    """Attention written out, and an MLP, each with dropout and behind a layer norm."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.gelu, self.down = nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        self.softmax = nn.Softmax(-1)
        self.dropout1, self.dropout2, self.dropout3 = (nn.Dropout(0.1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, 4, width // 4).permute(2, 0, 3, 1, 4).unbind(0)
        attention = self.dropout1(self.softmax(q @ k.transpose(-1, -2) / 8.0)) @ v
        x = x + self.dropout2(self.out(attention.transpose(1, 2).reshape(x.shape)))
        return x + self.dropout3(self.down(self.gelu(self.up(self.norm2(x)))))


_CLASSES = 8192


class _Head(nn.Module):
    """From features to a loss over many classes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64 * 16, 256), nn.ReLU())
        self.output, self.loss = nn.Linear(256, _CLASSES), nn.CrossEntropyLoss()

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        loss: Tensor = self.loss(self.output(self.body(x)), target)
        return loss


class _Autoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(512, 128), nn.PReLU())
        self.decoder = nn.Sequential(nn.Linear(128, 512), nn.Sigmoid())
        self.loss = nn.MSELoss()

    def forward(self, x: Tensor) -> Tensor:
        loss: Tensor = self.loss(self.decoder(self.encoder(x)), x)
        return loss


class _Highway(nn.Module):
    """As Srivastava et al. have it: t h + (1 - t) x."""

    def __init__(self) -> None:
        super().__init__()
        self.transform, self.gate = nn.Linear(256, 256), nn.Linear(256, 256)
        self.relu, self.sigmoid = nn.ReLU(), nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        h, t = self.relu(self.transform(x)), self.sigmoid(self.gate(x))
        return t * h + (1 - t) * x


class _ScaledBlock(nn.Module):
    """A vision transformer's MLP, with a scale by channel before the residual."""

    def __init__(self, width: int = 192) -> None:
        super().__init__()
        self.norm, self.scale = nn.LayerNorm(width), nn.Parameter(torch.empty(width))
        self.up, self.gelu, self.down = nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.down(self.gelu(self.up(self.norm(x))))


class _PointMaximum(nn.Module):
    """As in PointNet: a layer of each point, and the maximum over all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv1d(64, 64, 1), nn.BatchNorm1d(64), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.norm(self.conv(x))).max(2).values


def _of_torchvision() -> dict[str, _Row]:
    try:
        from torchvision.models import resnet, vgg11_bn
    except RuntimeError:  # built for another torch
        return {}
    return {
        "ResNet block of torchvision": (lambda: resnet.BasicBlock(64, 64), ((8, 64, 56, 56),), 0),
        "VGG-11, first layers": (lambda: vgg11_bn().features[:8], ((8, 3, 64, 64),), 0),
    }


def _of_transformers() -> dict[str, _Row]:
    import transformers
    from transformers.models.bert.modeling_bert import BertLayer
    from transformers.models.convnext.modeling_convnext import ConvNextLayer
    from transformers.models.mobilenet_v2.modeling_mobilenet_v2 import MobileNetV2InvertedResidual
    from transformers.models.resnet.modeling_resnet import ResNetBottleNeckLayer

    bert = transformers.BertConfig(hidden_size=256, num_attention_heads=4, intermediate_size=1024)
    bert._attn_implementation = "eager"
    convnext, mobilenet = transformers.ConvNextConfig(), transformers.MobileNetV2Config()
    return {
        "BERT layer": (lambda: FirstResult(BertLayer(bert)), ((4, 64, 256),), 0),
        "ConvNeXt layer": (lambda: ConvNextLayer(convnext, 96), ((8, 96, 28, 28),), 0),
        "ResNet bottleneck": (lambda: ResNetBottleNeckLayer(256, 256), ((8, 256, 14, 14), (8, 256, 56, 56)), 0),
        "MobileNetV2 inverted residual": (
            lambda: MobileNetV2InvertedResidual(mobilenet, 32, 32, 1),
            ((8, 32, 14, 14), (8, 32, 56, 56)),
            0,
        ),
    }
