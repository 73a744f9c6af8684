"""Models whose layers `replace_layers(fuse=True)` fuses, and how their results are held against stock's."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusednn
from fusednn import layers


def make(model: nn.Module, device: str, seed: int = 0) -> nn.Module:
    """The model in float64, with parameters and statistics of batch norms unlike those of a new one."""
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for parameter in module.parameters():
                nn.init.uniform_(parameter, 0.5, 2)
            if module.running_mean is not None:
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.5, 2)
    return model.to(device, torch.float64)


def batch(*shape: int, device: str, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device)


def outcome(model: nn.Module, x: Tensor, **kwargs: object) -> dict[str, Tensor]:
    """The output of a call, all gradients, and all buffers after it."""
    x = x.clone().requires_grad_()
    y = model(x * 1, **kwargs)  # a leaf can't be changed in place
    model.zero_grad()
    (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype, device=y.device).view_as(y)).sum().backward()
    found = {"output": y.detach(), "input": x.grad}
    found |= {f"gradient of {name}": one.grad for name, one in model.named_parameters() if one.grad is not None}
    return found | {name: buffer.clone() for name, buffer in model.named_buffers()}


def assert_same(model: nn.Module, stock: nn.Module, x: Tensor, **kwargs: object) -> None:
    """A call in each mode; in evaluation with what training left in the statistics."""
    for training in (True, False):
        model.train(training)
        stock.train(training)
        torch.testing.assert_close(outcome(model, x, **kwargs), outcome(stock, x, **kwargs), rtol=1e-9, atol=1e-9)


def pair(build: Callable[[], nn.Module], device: str) -> tuple[nn.Module, nn.Module]:
    """What is built, and a copy whose neighbours are fused."""
    stock = make(build(), device)
    model = copy.deepcopy(stock)
    layers.replace_layers(model, fuse=True)
    return stock, model


def fused_groups(report: layers.ReplacementReport) -> dict[str, str]:
    """What each first layer was fused with."""
    start = "fused with "
    return {row.names[0]: row.reason[len(start) :] for row in report.rows if row.reason.startswith(start)}


def conv_norm_act() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())


def reasons(model: nn.Module, **kwargs: object) -> dict[str, str]:
    report = fusednn.replace_layers(model, fuse=True, **kwargs)
    return {row.names[0]: row.reason for row in report.rows + report.untraced}


class UsedTwice(nn.Module):
    """The convolution's result is needed beside the activation's, so that one can't be computed without the other."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.act(y) - y


class Options(UsedTwice):
    def forward(self, x: Tensor, scale: Tensor | None = None, twice: bool = False) -> Tensor:
        y = self.act(self.conv(x))
        if scale is not None:
            y = y * scale
        return y + y if twice else y


class Residual(nn.Module):
    """As torchvision writes it: one ReLU for all, in place, and ``out += identity``."""

    def __init__(self, downsample: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(4)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Beside(nn.Module):
    """A first layer, and another one beside it that is called before their sum."""

    def __init__(self, first: nn.Module, other: nn.Module) -> None:
        super().__init__()
        self.first, self.other, self.act = first, other, nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        z = self.other(x)
        return self.act(y + z)


class Functional(nn.Module):
    """Functions instead of layers, as in PyTorch's examples; and mode read by the code."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 3)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.fc1 = nn.Linear(16, 8)
        self.fc2 = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = F.leaky_relu(torch.add(self.norm(self.conv2(x)), x), 0.2)
        x = F.gelu(self.fc1(torch.flatten(x, 1)), approximate="tanh")
        x = F.dropout(F.hardtanh(self.fc2(x), -0.25, max_val=0.5), 0.0, training=self.training)
        return F.log_softmax(x, 1)


class GatedLinear(nn.Module):
    """As Llama's feed-forward layer is written."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(4, 3)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))


class ActivatedPool(nn.Module):
    """Pooling by a function, of what no convolution gave; not of what the code goes on with itself."""

    def __init__(self) -> None:
        super().__init__()
        self.act, self.other = nn.SiLU(), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = F.max_pool1d(self.act(x), 3, 2, 1)
        z = y * 1
        return F.max_pool1d(self.other(z), 2, 1) + z[..., 1:]


class Highway(nn.Module):
    """As Srivastava et al. have it; its gate is a layer, and comes after what it mixes."""

    def __init__(self) -> None:
        super().__init__()
        self.transform, self.gate, self.act = nn.Linear(6, 6), nn.Linear(6, 6), nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.transform(x))
        t = self.act(self.gate(x))
        return t * h + (1 - t) * x


class Halves(nn.Module):
    """Gate and value from one product, as diffusers and Phi write it: ``gate_first`` in the second."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(4, 8)
        self.act = nn.GELU(approximate="tanh")

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.first(x).chunk(2, dim=-1)
        x = x * self.act(gate)
        gate, x = torch.chunk(self.second(x), 2, dim=1)
        return torch.mul(F.silu(gate), x)


class PreActivation(nn.Module):
    """Batch norm first, and a residual that isn't activated."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4)
        self.act = nn.SiLU()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(self.act(self.norm(x)))


class Pieces(nn.Module):
    """Maxout as people write it, by views."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(4, 6, bias=False)
        self.third = nn.Linear(2, 6)
        self.fourth = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).view(-1, 4, 2).max(-1)[0]
        x = torch.max(self.second(x).view(x.size(0), 3, 2), dim=1).values
        x = self.third(x).unflatten(-1, (-1, 3)).max(-2).values
        return self.fourth(x).unflatten(1, (2, 2)).max(2)[0]


class Branches(nn.Module):
    """Both summands are chains; concatenated branches, as in SqueezeNet."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(4, 4, 1)
        self.right = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.act = nn.LeakyReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm(self.left(x)) + self.right(x))
        return torch.cat([self.act(self.left(y)), self.act(self.right(y))], 1)


class SqueezeExcitation(nn.Module):
    """As torchvision and timm have it."""

    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.pool, self.squeeze, self.act = nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 2, 1), nn.ReLU()
        self.excite, self.gate = nn.Conv2d(2, 4, 1), gate

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.excite(self.act(self.squeeze(self.pool(x)))))


class Upsampled(nn.Module):
    """As a U-Net's way up: what is joined is the residual."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(4, 4, 2, 2)
        self.norm = nn.BatchNorm2d(4)
        self.skip = nn.ConvTranspose2d(4, 4, 2, 2, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.up(x)) + torch.tanh(self.skip(x)))


class Pooled(nn.Module):
    """A mean that isn't over all places."""

    def forward(self, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(x, (2, 1))


class Reductions(nn.Module):
    """As PointNet's and text classifiers' code writes them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act, self.norm = nn.Conv1d(4, 4, 1), nn.Tanh(), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        most = torch.max(self.act(self.conv(x)), 2, keepdim=True)[0]
        mean = F.hardswish(self.norm(x)).mean(dim=(-1,))
        return most.view(-1, 4) + mean


Block = nn.Sequential
IMAGES, ROWS, LINES, VOLUMES = (2, 4, 6, 6), (5, 6), (2, 4, 12), (2, 4, 5, 6, 6)
PATTERNS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, str]]] = {
    "conv, act": (lambda: Block(nn.Conv2d(4, 3, 3), nn.GELU()), IMAGES, {"0": "1"}),
    "conv, act, pool": (lambda: Block(nn.Conv2d(4, 3, 3), nn.ReLU(), nn.MaxPool2d(2)), IMAGES, {"0": "1, 2"}),
    "conv, pool, act": (
        lambda: Block(nn.Conv2d(4, 3, 3), nn.MaxPool2d(3, 2, 1), nn.ReLU(inplace=True)),
        IMAGES,
        {"0": "1, 2"},
    ),
    "conv, norm, act, pool": (
        lambda: Block(nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.MaxPool2d(2), nn.Conv2d(3, 2, 1)),
        IMAGES,
        {"0": "1, 2, 3"},
    ),
    "conv, norm": (
        lambda: Block(nn.Conv2d(4, 4, 3, padding="same", groups=2), nn.BatchNorm2d(4, momentum=None)),
        IMAGES,
        {"0": "1"},
    ),
    "norm without statistics": (
        lambda: Block(
            nn.Conv2d(4, 3, 3, padding=2, padding_mode="circular"), nn.BatchNorm2d(3, 1e-3, 0.1, False, False)
        ),
        IMAGES,
        {"0": "1"},
    ),
    "conv, norm, identity, act": (
        lambda: Block(
            nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3), nn.Identity(), nn.ReLU(), nn.BatchNorm2d(3), nn.Identity()
        ),
        IMAGES,
        {"0": "1, 2, 3"},
    ),
    "norm, act": (lambda: Block(nn.BatchNorm1d(6), nn.Sigmoid(), nn.BatchNorm1d(6)), ROWS, {"0": "1"}),
    "synchronised norm, act": (lambda: Block(nn.SyncBatchNorm(6), nn.ReLU()), ROWS, {"0": "1"}),
    "conv, norm, act, maximum": (
        lambda: Block(nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.AdaptiveMaxPool2d(1)),
        IMAGES,
        {"0": "1, 2, 3"},
    ),
    "norm, act, mean": (
        lambda: Block(nn.BatchNorm3d(4), nn.SiLU(), nn.AdaptiveAvgPool3d((1, 1, 1)), nn.Flatten(), nn.Linear(4, 2)),
        VOLUMES,
        {"0": "1, 2"},
    ),
    "lines: conv, PReLU, maximum": (
        lambda: Block(nn.Conv1d(4, 3, 3), nn.PReLU(3), nn.AdaptiveMaxPool1d(1)),
        LINES,
        {"0": "1, 2"},
    ),
    "transposed: PReLU, mean": (
        lambda: Block(nn.ConvTranspose2d(4, 3, 3), nn.PReLU(), nn.ConvTranspose2d(3, 2, 3), nn.Tanh(), Pooled()),
        IMAGES,
        {"0": "1", "2": "3"},
    ),
    "reductions by functions": (
        Reductions,
        LINES,
        {"conv": "act", "norm": "the functions behind it"},
    ),
    "conv, act, norm": (
        lambda: Block(
            nn.Conv2d(4, 3, 3),
            nn.ReLU(),
            nn.BatchNorm2d(3),
            nn.Conv2d(3, 2, 1, bias=False),
            nn.Tanh(),
            nn.BatchNorm2d(2),
            nn.PReLU(),
        ),
        IMAGES,
        {"0": "1, 2", "3": "4, 5, 6"},
    ),
    "linear, act, norm, dropout": (
        lambda: Block(nn.Linear(6, 4), nn.LeakyReLU(0.2), nn.BatchNorm1d(4), nn.Dropout(0.0)),
        ROWS,
        {"0": "1, 2, 3"},
    ),
    "linear, act, dropout": (
        lambda: Block(nn.Linear(6, 4), nn.LeakyReLU(0.3), nn.Dropout(0.0), nn.Linear(4, 3), nn.Hardtanh(-0.5, 0.25)),
        ROWS,
        {"0": "1, 2", "3": "4"},
    ),
    "linear, PReLU, dropout": (
        lambda: Block(nn.Linear(6, 4), nn.PReLU(4), nn.Dropout(0.0), nn.Linear(4, 3, bias=False), nn.PReLU()),
        ROWS,
        {"0": "1, 2", "3": "4"},
    ),
    "conv, PReLU": (
        lambda: Block(nn.Conv2d(4, 3, 3), nn.PReLU(3), nn.Conv2d(3, 2, 1, bias=False), nn.PReLU()),
        IMAGES,
        {"0": "1", "2": "3"},
    ),
    "conv, norm, PReLU": (
        lambda: Block(nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3), nn.PReLU(3), nn.BatchNorm2d(3, affine=False), nn.PReLU()),
        IMAGES,
        {"0": "1, 2", "3": "4"},
    ),
    "linear, norm, act, dropout": (
        lambda: Block(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0), nn.BatchNorm1d(4), nn.Dropout(0)),
        ROWS,
        {"0": "1, 2, 3", "4": "5"},
    ),
    "conv, act, dropout": (
        lambda: Block(nn.Conv2d(4, 3, 3), nn.ReLU(), nn.Dropout2d(0.0), nn.Conv2d(3, 2, 1), nn.SiLU(), nn.Dropout(0.0)),
        IMAGES,
        {"0": "1, 2", "3": "4, 5"},
    ),
    "act, pool": (
        lambda: Block(nn.GroupNorm(2, 4), nn.ReLU(), nn.MaxPool2d(2), nn.Tanh(), nn.MaxPool2d(2, 1)),
        IMAGES,
        {"1": "2", "3": "4"},
    ),
    "lines: act, pool": (ActivatedPool, LINES, {"act": "the functions behind it"}),
    "gate": (GatedLinear, ROWS, {"act": "the functions behind it"}),
    "gate of halves": (lambda: Halves(), ROWS, {"act": "the functions behind it"}),
    "highway": (Highway, ROWS, {"transform": "the functions behind it", "act": "the functions behind it"}),
    "gated channels": (
        lambda: SqueezeExcitation(nn.Sigmoid()),
        IMAGES,
        {"squeeze": "act", "gate": "the functions behind it"},
    ),
    "linear, norm": (lambda: Block(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.ReLU()), ROWS, {"1": "2"}),
    "linear, pool of pieces": (lambda: Block(nn.Linear(6, 8), nn.MaxPool1d(2)), ROWS, {"0": "1"}),
    "lines: conv, norm, act, pool": (
        lambda: Block(nn.Conv1d(4, 3, 3, padding="same"), nn.BatchNorm1d(3), nn.ReLU(), nn.MaxPool1d(4)),
        LINES,
        {"0": "1, 2, 3"},
    ),
    "lines: conv, pool, act": (
        lambda: Block(nn.Conv1d(4, 3, 3), nn.MaxPool1d(3, 2, 1), nn.ReLU(), nn.ConvTranspose1d(3, 2, 3), nn.SiLU()),
        LINES,
        {"0": "1, 2", "3": "4"},
    ),
    "volumes: conv, norm, act, pool": (
        lambda: Block(nn.Conv3d(4, 3, 2), nn.BatchNorm3d(3), nn.LeakyReLU(0.2), nn.MaxPool3d(2)),
        VOLUMES,
        {"0": "1, 2, 3"},
    ),
    "volumes: conv, act, pool": (
        lambda: Block(nn.Conv3d(4, 3, 2), nn.Tanh(), nn.MaxPool3d((1, 2, 2)), nn.Conv3d(3, 2, 1), nn.GELU()),
        VOLUMES,
        {"0": "1, 2", "3": "4"},
    ),
    "transposed: conv, norm, act": (
        lambda: Block(
            *(nn.ConvTranspose2d(4, 6, 4, 2, 1, groups=2), nn.BatchNorm2d(6), nn.ReLU()),
            *(nn.ConvTranspose2d(6, 2, 2, 2, output_padding=1), nn.Tanh()),
        ),
        IMAGES,
        {"0": "1, 2", "3": "4"},
    ),
    "transposed: volumes": (
        lambda: Block(nn.ConvTranspose3d(4, 3, 2, 2), nn.BatchNorm3d(3), nn.ReLU()),
        (2, 4, 2, 3, 3),
        {"0": "1, 2"},
    ),
    "transposed: sum": (Upsampled, IMAGES, {"up": "norm", "skip": "the functions behind it"}),
    "nested": (
        lambda: Block(Block(nn.Conv2d(4, 3, 3), nn.ReLU()), Block(Block(nn.BatchNorm2d(3), nn.ELU()), nn.Flatten())),
        IMAGES,
        {"0.0": "0.1, 1.0.0, 1.0.1"},
    ),
    "residual": (Residual, IMAGES, {"conv1": "bn1, relu", "conv2": "bn2, relu"}),
    "residual of a convolution": (
        lambda: Residual(Block(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4))),
        IMAGES,
        {"conv1": "bn1, relu", "conv2": "bn2, relu", "downsample.0": "downsample.1"},
    ),
    "residual of a norm": (
        lambda: Beside(nn.BatchNorm1d(6), nn.BatchNorm1d(6)),
        ROWS,
        {"first": "act"},
    ),
    "functions": (
        Functional,
        IMAGES,
        {
            "conv1": "the functions behind it",
            "conv2": "norm",
            "fc1": "the functions behind it",
            "fc2": "the functions behind it",
        },
    ),
    "norm first": (PreActivation, IMAGES, {"norm": "act", "conv": "the functions behind it"}),
    "maximum over pieces": (
        Pieces,
        ROWS,
        dict.fromkeys(("first", "second", "third", "fourth"), "the functions behind it"),
    ),
    "branches": (Branches, IMAGES, {"left": "act", "right": "act"}),
}


#: Those that the quick suite leaves out.
LONG = ("residual of a convolution", "branches", "norm without statistics", "linear, norm", "conv, norm", "norm first")
MARKS = {**dict.fromkeys(LONG, pytest.mark.thorough), "conv, act, pool": pytest.mark.smoke}
SHORT_AND_LONG = [pytest.param(name, marks=MARKS.get(name, ())) for name in PATTERNS]
