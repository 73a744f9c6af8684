"""PyTorch's functions in code that can't be traced: ours in their place there, and nowhere else."""

import copy
import functools
import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from support.device import KERNELS_RUN
from torch import Tensor, fx, nn
from torch.nn.functional import softmax

import fusednn
from fusednn.autograd.dispatch import observe_choices

HERE = sys.modules[__name__]
SCALE = 2.0


def decorated(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return method(self, *args, **kwargs)

    return call


def attend(x: Tensor, dropping: bool) -> Tensor:
    """A helper that others call, too."""
    return F.dropout(softmax(x * SCALE, dim=-1), p=0.25, training=dropping)


class Untraceable(nn.Module):
    """Its code asks for a shape, which no graph tells of."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > 1:
            x = self.called(x)
        return x


class Names(Untraceable):
    """By a namespace within one, and a function of ``torch``."""

    def called(self, x: Tensor) -> Tensor:
        return nn.functional.gelu(x) + torch.sigmoid(x) + torch.softmax(x, -1) + torch.cos(x)


class Helper(Untraceable):
    def called(self, x: Tensor) -> Tensor:
        return attend(x, False)


class Closures(Untraceable):
    @decorated
    def called(self, x: Tensor) -> Tensor:
        return next(F.silu(one) for one in (lambda y: (F.mish(y), y))(x))


class Layers(Untraceable):
    """Layers that it makes to call them once."""

    def called(self, x: Tensor) -> Tensor:
        return nn.LogSoftmax(dim=-1)(nn.ReLU()(x))


class Asks(Untraceable):
    """Code that looks for PyTorch's class."""

    def called(self, x: Tensor) -> Tensor:
        act: Any = nn.ReLU()
        return F.silu(x) if type(act) is nn.ReLU else x


class Inherited(Names):
    """What it inherits is called as it is."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


class WithNeighbours(nn.Module):
    """Code that is a graph: a chain, and functions that are none of it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.act = nn.Linear(5, 5), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return F.softmax(self.act(self.linear(F.hardtanh(x))), -1)


CLASSES: list[tuple[type[nn.Module], str, list[str]]] = [
    (Names, "gelu, sigmoid, softmax", ["gelu", "sigmoid", "softmax"]),
    (Helper, "softmax, dropout", ["softmax"]),
    (Closures, "silu, mish", ["mish", "silu"]),
    (Layers, "LogSoftmax, ReLU", ["log_softmax", "relu"]),
    (Asks, "silu", ["silu"]),
    (Inherited, "relu", ["relu"]),
    (WithNeighbours, "softmax, hardtanh", ["bias_activation", "hardtanh", "softmax"]),
]


def replaced(stock: nn.Module) -> nn.Module:
    model = copy.deepcopy(stock)
    fusednn.replace_layers(model, fuse=True)
    return model


def kernels_of(model: nn.Module, x: Tensor) -> list[str]:
    """The operations that kernels took, in alphabetical order; dropout of nothing is none."""
    found: list[str] = []
    with observe_choices(lambda choice: found.append(choice.operation) if choice.kernel else None):
        model(x)
    return sorted(one for one in found if one != "dropout")


@pytest.fixture
def x(device: str) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(3, 5, device=device, requires_grad=True)


@pytest.mark.parametrize(("cls", "named", "operations"), CLASSES, ids=lambda one: getattr(one, "__name__", ""))
def test_functions_are_ours(cls: type[nn.Module], named: str, operations: list[str], x: Tensor, device: str) -> None:
    """Values and gradients, also of copies; restored, the code is what it was."""
    stock = cls().to(device)
    model = copy.deepcopy(stock)
    report = fusednn.replace_layers(model, fuse=True)
    assert {*report.functions[0].reason.split(", ")} == {*named.split(", ")}
    assert f"functions replaced in (model) ({cls.__name__}): {report.functions[0].reason}" in str(report)
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        if KERNELS_RUN:
            assert kernels_of(one, x) == operations
        results = [(y, torch.autograd.grad(y.cos().sum(), x)) for y in (one(x), stock(x))]
        torch.testing.assert_close(*results)
        assert type(one).__name__ == cls.__name__
        fusednn.restore_layers(one)
        assert type(one) is cls
        assert one.__dict__.keys() == stock.__dict__.keys()
        assert kernels_of(one, x) == []


def test_only_there(x: Tensor) -> None:
    """Code that calls the same helper, and the same class elsewhere."""
    model, other = replaced(Helper()), Helper()
    assert kernels_of(model, x) == ["softmax"] * KERNELS_RUN
    assert kernels_of(other, x) == []
    assert attend.__globals__["softmax"] is F.softmax is softmax
    found: list[str] = []
    with observe_choices(lambda choice: found.append(choice.operation)):
        attend(x, True)
    assert not found


def test_not_where_it_is_excluded(x: Tensor) -> None:
    model = nn.Sequential(Helper(), Names())
    report = fusednn.replace_layers(model, fuse=True, exclude=[Names])
    assert [row.names for row in report.functions] == [("0",)]
    assert type(model[1]) is Names
    model = nn.Sequential(Helper())
    assert fusednn.replace_layers(model).functions == []
    assert type(model[0]) is Helper


@contextmanager
def with_code(function: Any, code: CodeType) -> Iterator[None]:
    before, function.__code__ = function.__code__, code
    yield
    function.__code__ = before


def test_what_is_patched_is_called(x: Tensor) -> None:
    """Functions, helpers, globals and methods, until they are put back."""
    ours, names, inherited = replaced(Helper()), replaced(Names()), replaced(Inherited())
    stock = Helper()
    patches: list[Any] = [
        (mock.patch.object(HERE, "softmax", lambda y, dim: y), ours, stock),
        (mock.patch.object(HERE, "attend", lambda y, _: y + 1), ours, stock),
        (mock.patch.object(HERE, "SCALE", 5.0), ours, stock),
        (mock.patch.object(F, "gelu", torch.neg), names, Names()),
        (mock.patch.object(F, "relu", torch.neg), inherited, Inherited()),
        (mock.patch.object(Names, "called", lambda _, y: y + 2), names, Names()),
        (mock.patch.object(Untraceable, "forward", lambda _, y: y + 3), names, Names()),
        (with_code(attend, (lambda y, _: y + 4).__code__), ours, stock),
    ]
    for patch, model, as_it_is in patches:
        before = model(x)
        with patch:
            torch.testing.assert_close(model(x), as_it_is(x))
            assert not torch.equal(model(x), before)
        assert torch.equal(model(x), before)


def test_within_replaced_functions(x: Tensor) -> None:
    """Both may be replaced, in either order."""
    expected = Names()(x)
    with fusednn.replace_functions():
        model = replaced(Names())
        torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(model(x), expected)
    assert kernels_of(model, x) == ["gelu", "sigmoid", "softmax"] * KERNELS_RUN


class Counting(nn.Module):
    """Code that writes to names of its module's."""

    def forward(self, x: Tensor) -> Tensor:
        global SCALE
        SCALE = 2.0
        return F.relu(x) if x.shape[0] else x


def test_code_that_writes_to_globals_is_left() -> None:
    assert fusednn.replace_layers(Counting(), fuse=True).functions == []


def test_tracers_see_the_code_as_it_is() -> None:
    """`torch.fx` finds what it would have found."""
    stock = WithNeighbours()
    model = replaced(stock)

    def targets(one: nn.Module) -> list[Any]:
        return [node.target for node in fx.symbolic_trace(one).graph.nodes]

    assert targets(model) == targets(stock)


def test_compiled(x: Tensor) -> None:
    """The compiler gets PyTorch's functions, which it fuses."""
    stock = Names()
    compiled = torch.compile(replaced(stock), backend="eager", fullgraph=True)
    assert kernels_of(compiled, x) == []
    torch.testing.assert_close(compiled(x), stock(x))


def test_dropout_is_drawn_by_ours(x: Tensor) -> None:
    class Drops(nn.Module):
        def forward(self, y: Tensor) -> Tensor:
            return attend(y, self.training) if y.shape[0] else y

    model = replaced(Drops())
    y = model(x.detach().expand(400, 3, 5))
    kept = y != 0
    assert 0.7 < kept.float().mean() < 0.8
    torch.testing.assert_close(y[kept], (F.softmax(x * SCALE, -1) / 0.75).expand_as(y)[kept])
    torch.testing.assert_close(model.eval()(x), F.softmax(x * SCALE, -1))
