"""PReLU in chains: by its layer or its function, behind a residual; and what is said where it ends one."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.fusion import assert_same, batch, fused_groups, make, pair, reasons
from torch import Tensor, nn

import fusednn
from fusednn.layers.fusion.members import observe_chains

pytestmark = pytest.mark.kernels

IMAGES = (2, 4, 5, 6)


class Sloped(nn.Module):
    """Layers, and PReLU of what they return, with slopes of the module itself."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.slopes = nn.Parameter(torch.linspace(-0.5, 0.9, 4))
        self.drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return F.prelu(self.layers(x), self.slopes)


class ByName(Sloped):
    def forward(self, x: Tensor) -> Tensor:
        return self.drop(torch.prelu(self.layers(x), weight=self.slopes))


class ByMethod(Sloped):
    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).prelu(self.slopes)


class Pooled(Sloped):
    def forward(self, x: Tensor) -> Tensor:
        return F.prelu(self.layers(x), self.slopes).amax((2, 3)) + F.prelu(self.layers(x), self.slopes).mean((2, 3))


class Made(Sloped):
    """The slopes are made in the code: not the module's."""

    def forward(self, x: Tensor) -> Tensor:
        return F.prelu(self.layers(x), self.slopes.abs())


def conv() -> nn.Module:
    return nn.Conv2d(4, 4, 3, padding=1)


FUNCTIONS = {
    "convolution": (lambda: Sloped(conv()), IMAGES),
    "convolution and norm": (lambda: Sloped(conv(), nn.BatchNorm2d(4)), IMAGES),
    "norm": (lambda: Sloped(nn.BatchNorm1d(4)), (6, 4)),
    "linear": (lambda: Sloped(nn.Linear(3, 4)), (6, 3)),
    "by name, dropout": (lambda: ByName(conv()), IMAGES),
    "method": (lambda: ByMethod(nn.ConvTranspose1d(4, 4, 3)), (2, 4, 7)),
    "all places": (lambda: Pooled(conv(), nn.BatchNorm2d(4)), IMAGES),
}


def chains_run(model: nn.Module, x: Tensor) -> list[list[str]]:
    """The classes of the layers of each chain that is computed in one."""
    found: list[list[str]] = []
    with observe_chains(lambda layers, why: found.append([type(one).__name__ for one in layers]) if not why else None):
        copy.deepcopy(model)(x)  # statistics stay as they are
    return [one for one in found if one]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_its_function(name: str, device: str) -> None:
    build, shape = FUNCTIONS[name]
    stock, model = pair(build, device)
    x = batch(*shape, device=device)
    calls: list[Tensor] = []
    with pytest.MonkeyPatch.context() as patch:  # where it is called apart, it is by this
        patch.setattr("fusednn.layers.fusion.activations.F.prelu", lambda *_: calls.append(x))
        assert chains_run(model, x)
    assert not calls
    assert_same(model, stock, x)


def test_slopes_that_are_made_stay_apart(device: str) -> None:
    stock = make(Made(conv()), device)
    model = copy.deepcopy(stock)
    assert fused_groups(fusednn.replace_layers(model, fuse=True)) == {}
    assert_same(model, stock, batch(*IMAGES, device=device))


def test_layers_are_called_apart_with_the_function(device: str) -> None:
    stock, model = pair(lambda: Sloped(conv(), nn.BatchNorm2d(4)), device)
    for one in (model, stock):
        one.layers[1].register_forward_hook(lambda *results: results[-1] * 2)
    assert_same(model, stock, batch(*IMAGES, device=device))


# --- A residual before it ---------------------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self, product: nn.Module, *norm: nn.Module) -> None:
        super().__init__()
        self.layers, self.act = nn.Sequential(product, *norm), nn.PReLU(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.layers(x) + x)


class InPlace(Residual):
    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        y += x
        return self.act(y)


class Broadcast(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(x[:1] + self.layers(x))


class ByFunction(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return F.prelu(x + self.layers(x), self.act.weight)


RESIDUALS = {
    "convolution": (lambda: Residual(conv(), nn.BatchNorm2d(4)), IMAGES),
    "in place": (lambda: InPlace(conv(), nn.BatchNorm2d(4)), IMAGES),
    "linear": (lambda: Residual(nn.Linear(4, 4), nn.BatchNorm1d(4)), (6, 4)),
    "norm": (lambda: Residual(nn.BatchNorm3d(4)), (2, 4, 2, 3, 2)),
    "by function": (lambda: ByFunction(conv(), nn.BatchNorm2d(4)), IMAGES),
}


@pytest.mark.parametrize("name", RESIDUALS)
def test_a_residual(name: str, device: str) -> None:
    build, shape = RESIDUALS[name]
    stock, model = pair(build, device)
    x = batch(*shape, device=device)
    layers = [type(one).__name__ for one in (*model.layers, model.act)]
    assert chains_run(model, x) == [layers[: -1 if name == "by function" else None]]
    assert_same(model, stock, x)


def test_a_residual_unlike_the_norm(device: str) -> None:
    stock, model = pair(lambda: Broadcast(conv(), nn.BatchNorm2d(4)), device)
    x = batch(*IMAGES, device=device)
    reasons_given = {row.reason for row in fusednn.explain(model, x) if row.path == "apart"}
    assert reasons_given == {"the residual is unlike what is normalised"}
    assert_same(model, stock, x)


# --- Where it ends a chain --------------------------------------------------------------------------------------------


class Reduced(Residual):
    """The end of a residual network: a sum, and the mean of all places."""

    def __init__(self) -> None:
        super().__init__(conv(), nn.BatchNorm2d(4))
        self.relu, self.pool = nn.ReLU(), nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.relu(self.layers(x) + x))


class Summed(Reduced):
    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.layers[1](x) + x)


POOLING = "the kernels of max pooling would have to read PReLU's slopes"
REDUCTION = "the reduction over all places would have to read a residual"
#: By what is built: the layer that stays apart, and what would have to change.
ENDS = {
    "pooling": (lambda: nn.Sequential(conv(), nn.PReLU(4), nn.MaxPool2d(2)), "2", POOLING),
    "norm and pooling": (lambda: nn.Sequential(conv(), nn.BatchNorm2d(4), nn.PReLU(), nn.MaxPool2d(2)), "3", POOLING),
    "norm behind it": (
        lambda: nn.Sequential(conv(), nn.PReLU(4), nn.BatchNorm2d(4)),
        "2",
        "the norm's passes would have to sum the gradient of PReLU's slopes",
    ),
    "norm of all ranks": (
        lambda: nn.Sequential(conv(), nn.SyncBatchNorm(4), nn.PReLU(4)),
        "2",
        "sums over all ranks would have to hold those of PReLU's slopes",
    ),
    "residual without a norm": (
        lambda: Residual(conv()),
        "act",
        "the pass behind a product would have to add a residual before PReLU",
    ),
    "residual before all places": (Reduced, "pool", REDUCTION),
    "norm, residual, all places": (Summed, "pool", REDUCTION),
}


@pytest.mark.parametrize("name", ENDS)
def test_what_would_have_to_change(name: str, device: str) -> None:
    build, layer, reason = ENDS[name]
    stock = make(build(), device)
    model = copy.deepcopy(stock)
    assert reasons(model)[layer].endswith(f"not fused: {reason}")
    explained = {row.name: row.reason for row in fusednn.explain(model, batch(*IMAGES, device=device))}
    assert explained[layer].endswith(f"not fused: {reason}")
    assert_same(model, stock, batch(*IMAGES, device=device))


@pytest.mark.parametrize("name", RESIDUALS)
def test_slopes_that_are_taken_away(name: str, device: str) -> None:
    build, shape = RESIDUALS[name]
    _, model = pair(build, device)
    for layer in model.modules():
        if isinstance(layer, nn.PReLU):
            layer.weight = None
    with pytest.raises((TypeError, AttributeError)):  # AttributeError: of code that reads the slopes itself
        model(batch(*shape, device=device))
