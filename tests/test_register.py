"""Classes that users register: their layers get twins, are fused, copied, pickled and put back."""

import copy
import io
import pickle
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from support.device import KERNELS_RUN
from torch import Tensor, nn
from torch.nn.utils import parametrize

import fusednn
from fusednn import layers
from fusednn.layers.fusion import activations
from fusednn.layers.replacement import register
from fusednn.layers.twin import OTHER_TWINS


class Slanted(nn.Module):
    def __init__(self, slope: float = 0.2, writes_over: bool = False) -> None:
        super().__init__()
        self.slope, self.writes_over = slope, writes_over

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(x, self.slope, self.writes_over)


class Derived(Slanted):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class Doubled(nn.Module):
    """A layer that is registered by its name, with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([2.0]))

    def forward(self, x: Tensor) -> Tensor:
        return helper(x) * self.weight


def helper(x: Tensor) -> Tensor:
    return F.relu(x)


def other_helper(x: Tensor) -> Tensor:
    """Another version."""
    return F.relu(x) + 1


def doubled(layer: Doubled, x: Tensor) -> Tensor:
    return fusednn.autograd.relu(x) * layer.weight


@pytest.fixture(autouse=True)
def _registry() -> Iterator[None]:
    """What a test registers is forgotten after it."""
    known = [(one, dict(one)) for one in (register._registered, OTHER_TWINS, activations.ACTIVATIONS)]
    yield
    for one, before in known:
        one.clear()
        one.update(before)


def register_both() -> None:
    fusednn.register_activation(Slanted, "leaky_relu", ["slope"], inplace="writes_over")
    fusednn.register_twin(f"{__name__}.Doubled", doubled)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 4), Slanted(), Doubled(), Slanted(0.5, True), Derived())


def test_replaced_and_restored(device: str) -> None:
    stock = network().to(device)
    model = copy.deepcopy(stock)
    x = torch.randn(3, 5, device=device)
    assert len(fusednn.replace_layers(model).replaced) == 0
    register_both()
    report = fusednn.replace_layers(model)
    assert [row.names[0] for row in report.replaced] == ["1", "2", "3"]
    assert "4: subclass of Slanted, may override it" in [f"{row.names[0]}: {row.reason}" for row in report.left]
    assert isinstance(model[1], Slanted)
    assert repr(model) == repr(stock)
    torch.testing.assert_close(model(x), stock(x))
    if KERNELS_RUN:
        paths = {row.name: row.path for row in fusednn.explain(model, x)}
        assert [paths[name] for name in "123"] == ["kernel"] * 3
    assert list(model.state_dict()) == list(stock.state_dict())
    model.load_state_dict(stock.state_dict())
    fusednn.restore_layers(model)
    assert [type(module) for module in model.modules()] == [type(module) for module in stock.modules()]


def test_gradients(device: str) -> None:
    register_both()
    stock = network().to(device)
    model = copy.deepcopy(stock)
    fusednn.replace_layers(model, fuse=True)
    outcomes = []
    for one in (model, stock):
        x = torch.randn(3, 5, generator=torch.Generator().manual_seed(1)).to(device).requires_grad_()
        one(x).square().sum().backward()
        outcomes.append([x.grad, *(parameter.grad for parameter in one.parameters())])
    torch.testing.assert_close(*outcomes)


def test_other_arguments_are_theirs(device: str) -> None:
    register_both()
    layer = fusednn.replace_layers(model := nn.Sequential(Slanted())) and model[0]
    x = torch.arange(-3, 3, device=device)
    with pytest.raises(TypeError, match="positional"):
        layer(x, x)
    with pytest.raises((RuntimeError, NotImplementedError)) as ours:
        layer(x)
    with pytest.raises((RuntimeError, NotImplementedError)) as stocks:
        Slanted()(x)
    assert str(ours.value) == str(stocks.value)
    torch.testing.assert_close(layer(x=x.float()), Slanted()(x.float()))
    layer.writes_over = True
    assert layer(y := x.float()) is y


def test_copied_and_pickled(device: str) -> None:
    register_both()
    model = network().to(device)
    fusednn.replace_layers(model, fuse=True)
    x = torch.randn(3, 5, device=device)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=False)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), saved):
        assert [type(module) for module in copied.modules()] == [type(module) for module in model.modules()]
        torch.testing.assert_close(copied(x), model(x))
        fusednn.restore_layers(copied)
        assert type(copied[2]) is Doubled
    pickled = pickle.dumps(model[2])
    register._registered.clear()
    OTHER_TWINS.clear()
    assert type(pickle.loads(pickled)) is Doubled  # where nobody has registered it


def test_fused_with_the_layer_before() -> None:
    register_both()
    model = network()
    report = fusednn.replace_layers(model, fuse=True)
    assert {row.names[0]: row.reason for row in report.rows}["0"] == "fused with 1"


def test_what_a_layer_is_may_be_refused() -> None:
    fusednn.register_activation(
        Slanted, "leaky_relu", ["slope"], refuses=lambda layer: "writes over" if layer.writes_over else None
    )
    report = fusednn.replace_layers(network())
    assert [row.replaced for row in report.rows] == [False, True, False, False, False]
    assert report.rows[3].reason == "writes over"


def test_beneath_classes_that_pytorch_derives() -> None:
    register_both()
    model = network()
    parametrize.register_parametrization(model[2], "weight", nn.Identity())
    assert len(fusednn.replace_layers(model).replaced) == 3
    fusednn.restore_layers(model)
    assert type(model[2]).__bases__ == (Doubled,)


def test_other_versions_are_refused() -> None:
    known = fusednn.layers.fingerprint(Doubled)
    fusednn.register_twin(Doubled, doubled, fingerprints=["0123456789ab", known])
    assert fusednn.replace_layers(network()).rows[2].replaced
    OTHER_TWINS.clear()
    with mock.patch.dict(helper.__globals__, {"helper": other_helper}):
        assert fusednn.layers.fingerprint(Doubled) != known
        row = fusednn.replace_layers(network()).rows[2]
        assert not row.replaced
        assert row.reason.startswith("another version of test_register than its twin was written for (fingerprint ")


def test_fingerprints_tell_code_alone() -> None:
    def version(text: str) -> str:
        cls = type("Version", (nn.Module,), {"__module__": __name__})
        with mock.patch("inspect.getsource", return_value=text):
            return layers.fingerprint(cls)

    plain = version("def forward(self, x):\n    return x\n")
    assert plain == version(
        '    @dec\n    def forward(self, x: Tensor) -> Tensor:\n        "Of x."\n        return (x)  #'
    )
    assert plain != version("def forward(self, x):\n    return -x\n")
    with mock.patch("inspect.getsource", side_effect=OSError):
        assert layers.fingerprint(Doubled) == "unknown"


def test_what_cannot_be_registered() -> None:
    with pytest.raises(ValueError, match="unknown activation 'slanted'"):
        fusednn.register_activation(Slanted, "slanted")
    with pytest.raises(ValueError, match="leaky_relu has 1 parameter, but got 2"):
        fusednn.register_activation(Slanted, "leaky_relu", ["slope", "writes_over"])
    with pytest.raises(ValueError, match="has a twin"):
        fusednn.register_twin(nn.ReLU, doubled)
    for wrong in (doubled, "Doubled", Tensor, Doubled(), None):
        with pytest.raises(TypeError, match="expected a class of layers, or its qualified name"):
            fusednn.register_twin(wrong, doubled)
        with pytest.raises(TypeError, match="expected a class of layers, or its qualified name"):
            fusednn.register_activation(wrong, "relu")


def test_torch_script_compiles_theirs() -> None:
    register_both()
    model = network()
    fusednn.replace_layers(model)
    x = torch.randn(3, 5)
    torch.testing.assert_close(torch.jit.script(model[:3])(x), model[:3](x))
