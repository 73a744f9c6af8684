"""Activations that code writes out are found in it, and computed as the one activation that they are."""

import copy
import math
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.device import KERNELS_RUN
from torch import Tensor, nn

import fusednn
from fusednn.autograd.dispatch import observe_choices
from fusednn.testing import check_against_stock, random_tensor


class Formula(nn.Module):
    """Code between two layers; the formula's argument is what a layer returned."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)


class Alone(nn.Module):
    """A module of one's own, without layers."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


class Erf(Formula):
    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


class OpenAI(Formula):
    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3))))


class Megatron(Formula):
    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))


class Swish(Formula):
    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y.sigmoid() * y


class Mish(Formula):
    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return x.mul(F.softplus(x).tanh())


class Quick(Formula):
    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return x * torch.sigmoid(1.702 * x)


class Power(Formula):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.linear(x)) ** 2


class Square(Formula):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).relu().square()


class WithLayers(Formula):
    """Formulas whose parts are layers."""

    def __init__(self) -> None:
        super().__init__()
        self.relu, self.sigmoid, self.tanh, self.softplus = nn.ReLU(), nn.Sigmoid(), nn.Tanh(), nn.Softplus()


class PowerOfLayer(WithLayers):
    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.linear(x)) ** 2


class SwishOfLayer(WithLayers):
    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return self.sigmoid(x) * x


class QuickOfLayer(WithLayers):
    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return x * self.sigmoid(1.702 * x)


class MishOfLayers(WithLayers):
    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return x * self.tanh(self.softplus(x))


class OpenAIOfLayer(WithLayers):
    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return 0.5 * x * (1 + self.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


class OtherSoftplus(WithLayers):
    def __init__(self) -> None:
        super().__init__()
        self.softplus = nn.Softplus(beta=2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return x * self.tanh(self.softplus(x))


class InPlaceReLU(WithLayers):
    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.linear(x)) ** 2


class OtherConstant(Formula):
    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.044715 * x**3)))


class UsedTwice(Formula):
    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        s = torch.sigmoid(x)
        return x * s + s


class ChangedBetween(Formula):
    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        s = torch.sigmoid(x)
        x += 1
        return x * s


class OtherPower(Formula):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.linear(x)) ** 2.5


class OtherCube(Formula):
    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x).abs()
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3.5)))


class OtherDivisor(Formula):
    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return x * 0.5 * (1.0 + torch.erf(x / 1.5))


class DividedByATensor(Formula):
    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return x * torch.sigmoid(x / (x.abs() + 1))


FOUND = {
    Erf: "gelu",
    OpenAI: "gelu_tanh",
    Megatron: "gelu_tanh",
    Swish: "silu",
    Mish: "mish",
    Quick: "quick_gelu",
    **dict.fromkeys((Power, Square, PowerOfLayer), "relu_squared"),
    SwishOfLayer: "silu",
    QuickOfLayer: "quick_gelu",
    MishOfLayers: "mish",
    OpenAIOfLayer: "gelu_tanh",
}
NOT_FOUND = (
    *(OtherConstant, OtherCube, OtherDivisor, OtherPower, OtherSoftplus),
    *(ChangedBetween, DividedByATensor, InPlaceReLU, UsedTwice),
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("cls", [*FOUND, *NOT_FOUND])
def test_formulas(cls: type[Formula], dtype: torch.dtype, device: str) -> None:
    stock = cls()
    nn.init.eye_(stock.linear.weight)
    nn.init.zeros_(stock.linear.bias)
    stock = stock.to(device, dtype)
    model = copy.deepcopy(stock)
    fusednn.replace_layers(model, fuse=True)
    x, gradient = (random_tensor((5, 6), dtype, device, seed) for seed in range(2))
    chosen: list[str] = []
    with observe_choices(lambda choice: chosen.append(choice.operation)):
        y = model(x)
    served = KERNELS_RUN and dtype is not torch.float64
    if cls in FOUND and (served or not issubclass(cls, WithLayers)):
        assert chosen == [FOUND[cls]] * served
    else:  # but for layers, each by itself
        assert not set(chosen) & set(FOUND.values())
    if not (served or chosen):
        torch.testing.assert_close(y, stock(x), rtol=0, atol=0)
    assert torch.equal(copy.deepcopy(model)(x), y)

    def at(one: Formula) -> Callable[[Tensor], Tensor]:
        return lambda x: copy.deepcopy(one).to(x.dtype)(x)

    check_against_stock(at(model), at(stock), [x], gradient)


def test_a_module_of_a_formula_alone(device: str) -> None:
    model = nn.Sequential(Alone())
    fusednn.replace_layers(model, fuse=True)
    x = random_tensor((5, 6), torch.float32, device)
    chosen: list[str] = []
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with observe_choices(lambda choice: chosen.append(choice.operation)):
            torch.testing.assert_close(one(x), F.silu(x))
    assert chosen == ["silu"] * 3 * KERNELS_RUN
    fusednn.restore_layers(model)
    assert type(model[0]) is Alone


def test_layers_of_a_formula_are_heard(device: str) -> None:
    """One by one, where a layer has a hook, another class or other options since."""
    stock = SwishOfLayer().to(device)
    model = copy.deepcopy(stock)
    report = fusednn.replace_layers(model, fuse=True)
    assert next(row.reason for row in report.rows if row.names[0] == "sigmoid") == "fused with the functions behind it"
    x = random_tensor((5, 6), torch.float32, device)
    heard: list[Tensor] = []
    model.sigmoid.register_forward_hook(lambda *args: heard.append(args[-1].detach()))
    torch.testing.assert_close(model(x), stock(x))
    torch.testing.assert_close(heard, [stock.linear(x).sigmoid()])
    for one in (stock, model):
        one.sigmoid = nn.Tanh()
    torch.testing.assert_close(model(x), stock(x))


@pytest.mark.parametrize("cls", FOUND)
def test_under_autocast(cls: type[Formula], device: str) -> None:
    """The dtype of the result is that of the code; CUDA's autocast computes ``pow`` and ``softplus`` in float32."""
    stock = cls().to(device)
    model = copy.deepcopy(stock)
    fusednn.replace_layers(model, fuse=True)
    chosen: list[str] = []
    with torch.autocast(device, torch.bfloat16), observe_choices(lambda choice: chosen.append(choice.operation)):
        y, expected = (one(random_tensor((5, 6), torch.float32, device)) for one in (model, stock))
    assert y.dtype is expected.dtype
    in_float32 = (OpenAI, Mish, Power, OpenAIOfLayer, MishOfLayers, PowerOfLayer)
    assert chosen.count(FOUND[cls]) == (KERNELS_RUN and cls not in in_float32)
    torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02)
