"""Fused neighbours, and what people change afterwards: whatever it is, the module does what its code says now."""

import copy
import sys
import types
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.fusion import IMAGES, PATTERNS, ROWS, assert_same, batch, make, reasons
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

import fusednn

FACTOR = 2.0


def scaled(x: Tensor) -> Tensor:
    return x * FACTOR


class Base(nn.Module):
    SLOPE = 1.5

    def finish(self, x: Tensor, times: float = 1.0) -> Tensor:
        return scaled(x) * times

    @staticmethod
    def shifted(x: Tensor) -> Tensor:
        return torch.add(x, 1.0)


class Patched(Base):
    """Code that looks at everything that code looks at."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU()
        self.tail = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.others = nn.ModuleList([nn.Tanh(), nn.Sigmoid()])
        self.function = F.elu
        self.gain = 3.0

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.norm(self.conv(x)))
        y = self.function(y) * self.SLOPE * self.gain
        y = self.shifted(self.finish(y))
        y = F.silu(self.tail(y))
        for other in self.others:
            y = other(y)
        return y


def other_forward(self: Any, x: Tensor) -> Tensor:
    return self.conv(x) - self.norm(x)


def other_helper(x: Tensor) -> Tensor:
    return x - 5.0


class Loud(nn.ReLU):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


def _assign(place: str, name: str, value: object) -> Callable[[nn.Module, pytest.MonkeyPatch], None]:
    def change(model: nn.Module, _: pytest.MonkeyPatch) -> None:
        setattr(model.get_submodule(place), name, value)

    return change


def _delete_and_assign(name: str, value: object) -> Callable[[nn.Module, pytest.MonkeyPatch], None]:
    def change(model: nn.Module, _: pytest.MonkeyPatch) -> None:
        delattr(model, name)
        setattr(model, name, value)

    return change


def _patch(place: object, name: str, value: object) -> Callable[[nn.Module, pytest.MonkeyPatch], None]:
    return lambda _, patch: patch.setattr(place, name, value)


def _bind(name: str, function: Callable[..., Tensor]) -> Callable[[nn.Module, pytest.MonkeyPatch], None]:
    return lambda model, _: setattr(model, name, types.MethodType(function, model))


def _hook(place: str, method: str) -> Callable[[nn.Module, pytest.MonkeyPatch], None]:
    def change(model: nn.Module, _: pytest.MonkeyPatch) -> None:
        getattr(model.get_submodule(place), method)(
            lambda *given: given[-1] * 2 if method.endswith("forward_hook") else None
        )

    return change


HERE = sys.modules[__name__]
CHANGES: dict[str, Callable[[nn.Module, pytest.MonkeyPatch], None]] = {
    "forward of the class": _patch(Patched, "forward", other_forward),
    "its code": _patch(Patched.forward, "__code__", other_forward.__code__),
    "helper of a base class": _patch(Base, "finish", lambda self, x: x - 2),
    "helper put before that of a base class": lambda _, patch: patch.setattr(
        Patched, "finish", lambda self, x: x - 2, raising=False
    ),
    "code of a helper": _patch(Base.finish, "__code__", (lambda self, x, times=1.0: x - 2).__code__),
    "default of a helper": _patch(Base.finish, "__defaults__", (4.0,)),
    "static helper": _patch(Base, "shifted", staticmethod(lambda x: x - 2)),
    "constant of the class": _patch(Base, "SLOPE", -1.0),
    "forward of the instance": _bind("forward", other_forward),
    "helper of the instance": _bind("finish", lambda self, x: x - 2),
    "plain helper of the instance": _assign("", "finish", other_helper),
    "constant of the instance": _assign("", "gain", -1.0),
    "function of the instance": _assign("", "function", F.gelu),
    "global function": _patch(HERE, "scaled", other_helper),
    "code of a global function": _patch(scaled, "__code__", other_helper.__code__),
    "global constant": _patch(HERE, "FACTOR", 7.0),
    "global module": _patch(HERE, "F", types.SimpleNamespace(silu=torch.cos, elu=F.elu)),
    "function of PyTorch": _patch(F, "silu", torch.cos),
    "another function of PyTorch": _patch(torch, "add", torch.sub),
    "builtin function": lambda _, patch: patch.setattr(HERE, "sorted", None, raising=False),
    "function for a layer": _delete_and_assign("relu", F.hardtanh),
    "lambda for a layer": _delete_and_assign("relu", lambda x: x - 1),
    "function for a layer between": _delete_and_assign("norm", torch.cos),
    "another layer": _assign("", "relu", nn.Tanh()),
    "layer of the user's": _assign("", "relu", Loud()),
    "forward of a layer": _assign("relu", "forward", torch.cos),
    "forward of a layer's class": _patch(fusednn.layers.ReLU, "forward", lambda self, x: torch.cos(x)),
    "stride": _assign("conv", "stride", (2, 2)),
    "convolution by hand": lambda model, _: setattr(
        model.conv, "_conv_forward", lambda x, weight, bias: F.conv2d(x, weight * 2, bias)
    ),
    "entry of a container": lambda model, _: model.tail.__setitem__(1, nn.Identity()),
    "appended to a container": lambda model, _: model.tail.append(nn.Tanh()),
    "forward of a container": _assign("tail", "forward", torch.cos),
    "hook of a container": _hook("tail", "register_forward_hook"),
    "entry of a list": lambda model, _: model.others.__setitem__(0, nn.Hardtanh()),
    "appended to a list": lambda model, _: model.others.append(nn.Softplus()),
    "hook of the module": _hook("", "register_forward_hook"),
    "hook of a layer": _hook("norm", "register_forward_hook"),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("copied", [False, pytest.param(True, marks=pytest.mark.thorough)])
def test_changed_after_it_was_fused(name: str, copied: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = make(Patched(), device).eval()
    model = copy.deepcopy(stock)
    found = reasons(model)
    assert found["conv"] == "fused with norm, relu"
    assert found["tail.0"] == "fused with tail.1"
    if copied:
        model = copy.deepcopy(model)
    x = batch(*IMAGES, device=device)
    before = stock(x)
    torch.testing.assert_close(model(x), before)
    if name == "forward of a layer's class":  # which stock doesn't have
        stock = copy.deepcopy(stock)
        stock.relu.__class__ = fusednn.layers.ReLU
    for one in (stock, model):
        CHANGES[name](one, monkeypatch)
    expected = stock(x)
    if name != "builtin function":
        assert expected.shape != before.shape or not torch.allclose(expected, before)
    torch.testing.assert_close(model(x), expected)


def test_changes_before_it_is_compiled(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(Patched(), device).eval()
    stock = copy.deepcopy(model)
    fusednn.replace_layers(model, fuse=True)
    monkeypatch.setattr(Base, "finish", lambda self, x: torch.cos(x))
    torch._dynamo.reset()
    x = batch(*IMAGES, device=device)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), stock(x))


class Concatenates(nn.Module):
    """As DenseNet's layers: it is given a tensor, or a list of any length."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU()
        self.remembers = False

    def forward(self, x: Tensor | list[Tensor]) -> Tensor:
        if self.remembers:
            print("kept")
        if isinstance(x, (int, float)):
            return torch.zeros(())
        parts = [x] if isinstance(x, Tensor) else x
        return self.relu(self.norm(torch.cat(parts, 1)))


def test_tensors_and_lists(device: str) -> None:
    stock = make(Concatenates(), device).eval()
    model = copy.deepcopy(stock)
    assert reasons(model)["norm"] == "fused with relu"
    x = batch(*IMAGES, device=device)
    parts = [x[:, :1], x[:, 1:2], x[:, 2:]]
    for given in (x, [x], parts, tuple(parts)):
        torch.testing.assert_close(model(given), stock(given))
    assert model(1.5) == stock(1.5)
    with pytest.raises(TypeError):
        model(None)


class Border(nn.Module):
    """As RegNet's blocks: the last convolution lies in a container in a container, its activation outside."""

    def __init__(self) -> None:
        super().__init__()
        inner = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.body = nn.Sequential(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()), inner)
        self.proj = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.proj(x) + self.body(x))


def test_borders_of_containers_are_crossed(device: str) -> None:
    stock = make(Border(), device)
    model = copy.deepcopy(stock)
    found = reasons(model)
    assert found["body.1.0"] == "fused with body.1.1, act"
    assert found["act"] == "fused into body.1.0"
    assert found["proj.0"] == "fused with proj.1"
    x = batch(*IMAGES, device=device)
    assert_same(model, stock, x)
    fusednn.restore_layers(model)
    assert [type(module) for module in model.modules()] == [type(module) for module in stock.modules()]


class Spelled(nn.Module):
    """Options by position and by name, and left out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(F.relu(self.first(x), True), 0.0, self.training)
        x = F.dropout(F.leaky_relu(self.second(x), 0.2), p=0.0, training=False)
        return F.dropout(F.softplus(self.third(x), 2), 0.0)


def test_options_of_functions_by_position_and_by_name(device: str) -> None:
    stock = make(Spelled(), device)
    model = copy.deepcopy(stock)
    found = reasons(model)
    assert [found[name].startswith("fused") for name in ("first", "second", "third")] == [True, True, False]
    for variant in vars(model)["_fusednn_plan"].variants:
        assert sum("dropout" in name for name in variant.run.__code__.co_names) == 1
    assert_same(model, stock, batch(*ROWS, device=device))


class ChangesInPlaceBetween(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(4, 4, 1), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach() * 1
        y = self.conv(x)
        z = F.relu(x, True)
        return self.act(y + z)


def test_a_function_in_place_by_position(device: str) -> None:
    stock = make(ChangesInPlaceBetween(), device)
    model = copy.deepcopy(stock)
    assert reasons(model)["conv"].endswith("something else happens in between")
    x = batch(*IMAGES, device=device)
    torch.testing.assert_close(model(x), stock(x))


class Adapter(nn.Module):
    """A layer in another's place, as adapters are put in, with nothing of the other's attributes."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base(*args, **kwargs) * 2


def stock_and_fused(name: str, device: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """Chains' model, the same fused, and a batch."""
    build, shape, _ = PATTERNS[name]
    stock = make(build(), device)
    fused = copy.deepcopy(stock)
    fusednn.replace_layers(fused, fuse=True)
    return stock, fused, batch(*shape, device=device)


def outcomes(change: Callable[[nn.Module], None], *models: nn.Module, x: Tensor) -> list[Any]:
    """What copies of the models return after a change, or the type of the error that they raise."""
    found: list[Any] = []
    for model in map(copy.deepcopy, models):
        change(model)
        torch.manual_seed(0)
        try:
            found.append(model(x * 1))
        except Exception as error:  # whatever stock raises
            found.append(type(error))
    return found


def a_few(names: Iterable[str]) -> list[Any]:
    """One chain of each kind of layers, thoroughly all."""
    few = (
        "conv, norm, act, pool",
        "conv, act, dropout",
        "linear, norm, act, dropout",
        "maximum over pieces",
        "residual",
    )
    return [pytest.param(name, marks=() if name in few else pytest.mark.thorough) for name in names]


def adapt(member: str, model: nn.Module) -> None:
    model.set_submodule(member, Adapter(model.get_submodule(member)))


@pytest.mark.whole
@pytest.mark.parametrize("name", a_few(PATTERNS))
def test_an_adapter_around_any_member(name: str, device: str) -> None:
    """Its layers are called one by one, each where it stood."""
    stock, fused, x = stock_and_fused(name, device)
    for member in [path for path, layer in stock.named_modules() if not list(layer.children())]:
        found = outcomes(partial(adapt, member), stock, fused, x=x)
        assert isinstance(found[0], Tensor)
        torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-9, msg=member)


def others_than(value: Any) -> list[Any]:
    """What people may set an option to, rightly or not."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, str):
        return ["same", "circular", "tanh"]
    if isinstance(value, tuple):
        return [(2,) * len(value), 1]
    return {int: [2, 1.0, None], float: [0.0, 2, -1.0]}.get(type(value), [])


def options() -> dict[str, list[tuple[str, str, Any]]]:
    """By chains, the options of their members, each of every class once: the member, the option, its value."""
    found: dict[str, list[tuple[str, str, Any]]] = {}
    seen = set()
    for name, (build, _, _) in PATTERNS.items():
        for path, layer in build().named_modules():
            for option in () if list(layer.children()) else sorted(getattr(layer, "__constants__", ())):
                value = getattr(layer, option, None)
                for other in others_than(value):
                    if (key := (type(layer), option, repr(other))) not in seen:
                        seen.add(key)
                        found.setdefault(name, []).append((path, option, other))
    return found


OPTIONS = options()


def set_option(member: str, option: str, value: Any, model: nn.Module) -> None:
    setattr(model.get_submodule(member), option, value)


@pytest.mark.whole
@pytest.mark.parametrize("name", a_few(OPTIONS))
def test_any_option_of_any_member(name: str, device: str) -> None:
    """The same values as of stock, or an error of the same type."""
    stock, fused, x = stock_and_fused(name, device)
    for member, option, value in OPTIONS[name]:
        found = outcomes(partial(set_option, member, option, value), stock, fused, x=x)
        changed = f"{member}.{option} = {value!r}"
        if found[0] is AssertionError:  # of types, which we may take
            continue
        raised = [one if isinstance(one, type) else None for one in found]
        assert raised[0] == raised[1], changed
        if raised[0] is None:
            torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-9, equal_nan=True, msg=changed)


def halve_filters(member: str, model: nn.Module) -> None:
    layer: Any = model.get_submodule(member)
    dim = 1 if getattr(layer, "transposed", False) else 0
    kept = torch.arange((layer.weight.shape[dim] + 1) // 2, device=layer.weight.device)
    layer.weight = nn.Parameter(layer.weight.index_select(dim, kept))
    layer.bias = None if layer.bias is None else nn.Parameter(layer.bias[kept])


@pytest.mark.whole
@pytest.mark.parametrize("name", a_few(PATTERNS))
def test_filters_that_are_taken_away(name: str, device: str) -> None:
    """As structured pruning does, which leaves the layer's options as they are."""
    stock, fused, x = stock_and_fused(name, device)
    for member in [path for path, layer in stock.named_modules() if isinstance(layer, (nn.Linear, _ConvNd))]:
        found = outcomes(partial(halve_filters, member), stock, fused, x=x)
        if isinstance(found[0], type):
            assert found[1] is found[0], member
        else:
            torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-9)
