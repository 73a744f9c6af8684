"""Each reason for which layers that were fused are called one by one: given where it holds, with stock's results.

The chain's layers are changed after fusing, or it is given what its kernels don't take.
"""

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from support.fusion import Highway, SqueezeExcitation
from support.stand_ins import Activated, DropPath, Frozen, Scale, stand_in
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

import fusednn
from fusednn.layers.fusion.members import observe_chains
from fusednn.testing import random_tensor

pytestmark = pytest.mark.kernels


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    with stand_in():
        yield


class Gated(nn.Module):
    """One number for each row, which broadcasts."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x) * x.mean(1, keepdim=True)


class Mixed(Highway):
    def forward(self, x: Tensor) -> Tensor:
        t = self.act(self.gate(x))
        return t * self.transform(x).mean(1, keepdim=True) + (1 - t) * x


class Swish(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.act = nn.Linear(6, 6), nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x) * self.linear(x)


class Mish(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tanh, self.softplus = nn.Tanh(), nn.Softplus()

    def forward(self, x: Tensor) -> Tensor:
        x = 2 * x
        return x * self.tanh(self.softplus(x))


class End(nn.Module):
    def __init__(self, scale: nn.Module, drop_path: nn.Module) -> None:
        super().__init__()
        self.linear, self.scale, self.drop_path = nn.Linear(6, 6), scale, drop_path

    def forward(self, x: Tensor) -> Tensor:
        return self.drop_path(self.scale(self.linear(x))) + x


class Counted(End):
    def forward(self, x: Tensor) -> Tensor:
        return self.drop_path(self.scale(self.linear(x))) + x.shape[0]


class Loud(nn.ReLU):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


def conv_act(act: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(6, 6, 1), act)


def conv_norm(norm: nn.Module, *others: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(6, 6, 1, bias=False), norm, *others)


def relu() -> nn.Module:
    return conv_act(nn.ReLU())


class Pieces(nn.Module):
    """Maxima over pieces of two: of a view, or of windows."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.other, self.pool = nn.Linear(6, 8), nn.Linear(6, 8), nn.MaxPool1d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.linear(x)) + self.other(x).unflatten(-1, (4, 2)).max(-1).values


#: What happens after fusing, to the model and to stock's; what is returned holds during the call.
Change = Callable[[Any], Any]


def nothing(_: Any) -> None:
    """The reason is there from the beginning."""


class Case(NamedTuple):
    build: Callable[[], nn.Module]
    change: Change
    shape: tuple[int, ...] = (4, 6)


IMAGES = (4, 6, 3, 3)


@contextmanager
def patched_calls() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "__call__", lambda self, *args: self._call_impl(*args))
        yield


def bias_in_16_bits(model: Any) -> AbstractContextManager[Any]:
    model[0].bias = nn.Parameter(model[0].bias.bfloat16())
    return torch.autocast("cpu", torch.bfloat16)  # which makes bias and weight alike


#: What is behind a comma tells one place that gives a reason from another.
CASES: dict[str, Case] = {
    "calls of modules are patched": Case(relu, lambda _: patched_calls(), IMAGES),
    "a hook listens to all modules": Case(relu, lambda _: register_module_forward_hook(lambda *_: None), IMAGES),
    "a layer is of another class than it was": Case(relu, lambda one: setattr(one[1], "__class__", Loud), IMAGES),
    "a parameter isn't a number": Case(
        lambda: conv_act(nn.LeakyReLU()), lambda one: setattr(one[1], "negative_slope", torch.tensor(0.25)), IMAGES
    ),
    "a frozen norm's buffers have another dtype": Case(
        lambda: conv_norm(Frozen(6), nn.ReLU()), lambda one: one[1].double(), IMAGES
    ),
    "the norm drops": Case(
        lambda: conv_norm(Activated(6, nn.ReLU())), lambda one: setattr(one[1], "drop", nn.Dropout(0.0)), IMAGES
    ),
    "the norm has got an activation": Case(
        lambda: conv_norm(Activated(6, nn.Identity()), nn.ReLU()), lambda one: setattr(one[1], "act", nn.Tanh()), IMAGES
    ),
    "the windows are no pieces of the features": Case(Pieces, lambda one: setattr(one.pool, "ceil_mode", True)),
    "the layer that scales writes over its input": Case(
        lambda: End(Scale(6), nn.Identity()), lambda one: setattr(one.scale, "inplace", True)
    ),
    "nothing is dropped, or by other rules": Case(lambda: End(Scale(6), DropPath(0.0)), nothing),
    "nothing is dropped in evaluation": Case(
        lambda: End(nn.Identity(), DropPath(0.5)), lambda one: one.eval() and None
    ),
    "the residual is no tensor beside the input": Case(lambda: Counted(Scale(6), nn.Identity()), nothing),
    "computed as the code has it in float64": Case(Mish, lambda one: setattr(one, "wide", True)),
    "autocast computes a part of the formula in float32": Case(Mish, lambda _: torch.autocast("cpu", torch.bfloat16)),
    "a layer of the formula has got options": Case(Mish, lambda one: setattr(one.softplus, "beta", 2)),
    "what is gated is unlike the gate": Case(Gated, nothing),
    "no kernel gates with the activation": Case(Swish, lambda one: setattr(one.act, "__class__", nn.Tanh)),
    "no kernel gates channels with the activation": Case(
        lambda: SqueezeExcitation(nn.Sigmoid()), lambda one: setattr(one.gate, "__class__", nn.Tanh), (4, 4, 3, 3)
    ),
    "no kernel has highways with the activation": Case(Highway, lambda one: setattr(one.act, "__class__", nn.Tanh)),
    "what is carried or transformed is unlike the gate": Case(Mixed, nothing),
    "the activation writes over its input": Case(
        lambda: nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)), lambda one: setattr(one[0], "inplace", True), IMAGES
    ),
    "the pooling has options that aren't fused": Case(
        lambda: conv_act(nn.ReLU()).append(nn.MaxPool2d(2)), lambda one: setattr(one[2], "ceil_mode", True), IMAGES
    ),
    "the pooling has options that aren't fused, behind an activation": Case(
        lambda: nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)), lambda one: setattr(one[1], "dilation", 2), IMAGES
    ),
    "the slopes are no features'": Case(lambda: nn.Sequential(nn.Linear(6, 6), nn.PReLU(5)), nothing, (4, 5, 6)),
    "bias and weight differ in dtype": Case(lambda: nn.Sequential(nn.Linear(6, 6), nn.ReLU()), bias_in_16_bits),
    "bias and weight differ in dtype, before dropout": Case(
        lambda: conv_act(nn.ReLU()).append(nn.Dropout(0.0)), bias_in_16_bits, IMAGES
    ),
    "bias and weight differ in dtype, before a norm": Case(
        lambda: conv_act(nn.ReLU()).append(nn.BatchNorm2d(6)), bias_in_16_bits, IMAGES
    ),
    "bias and weight differ in dtype, before a reduction": Case(
        lambda: conv_act(nn.ReLU()).append(nn.AdaptiveAvgPool2d(1)), bias_in_16_bits, IMAGES
    ),
    "not a batch of channels": Case(lambda: nn.Sequential(nn.BatchNorm1d(6), nn.Dropout1d(0.0)), nothing),
    "not a batch of channels, before a norm": Case(
        lambda: nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.BatchNorm1d(5)), nothing, (4, 5, 6)
    ),
    "not a batch of channels with places": Case(
        lambda: conv_act(nn.ReLU()).append(nn.AdaptiveAvgPool2d(1)), nothing, IMAGES[1:]
    ),
    "not a batch of channels with places, behind a norm": Case(
        lambda: nn.Sequential(nn.BatchNorm1d(6), nn.AdaptiveAvgPool1d(1)), nothing
    ),
    "more is left than one place, or channels are reduced, too": Case(
        lambda: conv_act(nn.ReLU()).append(nn.AdaptiveAvgPool2d(1)),
        lambda one: setattr(one[2], "output_size", 2),
        IMAGES,
    ),
}


def stock_and_fused(build: Callable[[], nn.Module], device: str) -> tuple[nn.Module, nn.Module]:
    """A model, and its copy whose neighbours are fused."""
    torch.manual_seed(0)
    stock = build().to(device)
    model = copy.deepcopy(stock)
    fusednn.replace_layers(model, fuse=True)
    return stock, model


@contextmanager
def observed_reasons() -> Iterator[list[str | None]]:
    """Of the chains within that are called one by one; None of those that aren't."""
    found: list[str | None] = []
    with observe_chains(lambda _, why: found.append(why)):
        yield found


@pytest.mark.whole
@pytest.mark.parametrize("case", CASES)
def test_layers_are_called_one_by_one(case: str, device: str) -> None:
    reason, (build, change, shape) = case.partition(", be")[0], CASES[case]
    stock, model = stock_and_fused(build, device)
    x = random_tensor(shape, torch.float32, device)
    with observed_reasons() as found:
        model(x * 1)
        assert (reason in found) == (change is nothing)
        results = []
        for one in (model, stock):
            within = change(one)
            with within if isinstance(within, AbstractContextManager) else nullcontext():
                results.append(one(x.double() if hasattr(one, "wide") else x * 1))
    assert reason in found, found
    torch.testing.assert_close(*results)


def test_layers_that_drop_without_dividing_are_left() -> None:
    model = nn.Sequential(DropPath(0.5))
    model[0].scale_by_keep = False
    assert fusednn.replace_layers(model).left[0].reason == "what is kept isn't divided by the chance to be"


class Apart(nn.Module):
    """A norm behind what may be a convolution, and the residual: a layer that is called after the norm."""

    def __init__(self, first: nn.Module) -> None:
        super().__init__()
        self.first, self.norm, self.drop = first, nn.BatchNorm2d(6), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.first(x))
        return torch.relu(y + self.drop(x))


@pytest.mark.whole
@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Sequential(Activated(6, nn.SiLU()), nn.Identity()),
        lambda: conv_norm(Activated(6, nn.SiLU()), nn.Identity()),
        lambda: Apart(nn.Conv2d(6, 6, 1)).eval(),
        lambda: Apart(nn.Tanh()).eval(),
        lambda: conv_act(nn.ReLU()).append(nn.MaxPool2d(2, dilation=1)),
        lambda: conv_act(nn.ReLU()).append(nn.MaxPool2d((2, 3), dilation=(1, 1))),
    ],
    ids=["norm", "conv and norm", "conv, norm and residual", "norm and residual", "pooling", "pooling of pairs"],
)
def test_layers_are_computed_together(build: Callable[[], nn.Module], device: str) -> None:
    stock, model = stock_and_fused(build, device)
    x = random_tensor(IMAGES, torch.float32, device)
    with observed_reasons() as found:
        y = model(x)
    assert found
    assert not any(found)
    torch.testing.assert_close(y, stock(x))


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (relu, (6, 3)),
        (relu, (1, 4, 6, 3, 3)),
        (lambda: conv_norm(nn.BatchNorm2d(6), nn.ReLU()), IMAGES[1:]),
        (lambda: conv_norm(nn.BatchNorm2d(6), nn.ReLU()), (1, *IMAGES)),
    ],
    ids=["two dimensions", "five dimensions", "no batch of a norm", "five dimensions of a norm"],
)
def test_images_of_other_dimensions_are_stocks_to_refuse(
    build: Callable[[], nn.Module], shape: tuple[int, ...], device: str
) -> None:
    stock, model = stock_and_fused(build, device)
    x = random_tensor(shape, torch.float32, device)
    with observed_reasons() as found, pytest.raises((RuntimeError, ValueError)) as ours:
        model(x)
    with pytest.raises(ours.type, match=re.escape(str(ours.value))):
        stock(x)
    assert found == ["not a batch of images"]
