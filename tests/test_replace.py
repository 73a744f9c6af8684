"""`replace_layers`, `restore_layers` and `explain` on models of every awkward kind."""

import copy
import importlib
import itertools
import pickle
from contextlib import suppress
from typing import Any

import pytest
import torch
from support.device import KERNELS_RUN
from torch import Tensor, nn
from torch.nn.utils import parametrize

import fusednn
from fusednn import layers
from fusednn.layers.twin import Layer

# Functions have their names.
replacement = importlib.import_module("fusednn.layers.replacement.replace")
restoring = importlib.import_module("fusednn.layers.replacement.restore")


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class LoudReLU(nn.ReLU):
    """A subclass that overrides behaviour."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        # The first and the last have no twin.
        shrink = nn.Linear(8, 6)  # of the rows
        self.features = nn.Sequential(shrink, nn.BatchNorm2d(1), nn.PReLU(1), nn.AvgPool2d(2))
        self.shared = nn.ReLU()
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.GELU("tanh"), nn.Linear(8, 3))
        self.loud = LoudReLU()
        self.alias = self.shared

    def forward(self, x: Tensor) -> Tensor:
        return self.loud(self.head(self.alias(self.shared(self.features(x)))))


@pytest.fixture
def network(device: str) -> nn.Module:
    return Network().to(device)


@pytest.fixture
def batch(device: str) -> Tensor:
    return torch.randn(5, 1, 8, 8, device=device)


def classes(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules(remove_duplicate=False)}


def test_replaces_by_exact_type_in_place(network: nn.Module, batch: Tensor) -> None:
    before = classes(network)
    parameters = dict(network.named_parameters())
    modules = dict(network.named_modules())
    keys = list(network.state_dict())
    network.eval()
    expected = network(batch)

    report = fusednn.replace_layers(network)

    assert {name: (cls, type(network.get_submodule(name))) for name, cls in before.items() if cls in CHANGED} == {
        "features.1": (nn.BatchNorm2d, fusednn.layers.BatchNorm2d),
        "features.2": (nn.PReLU, fusednn.layers.PReLU),
        "shared": (nn.ReLU, fusednn.layers.ReLU),
        "alias": (nn.ReLU, fusednn.layers.ReLU),
        "head.2": (nn.GELU, fusednn.layers.GELU),
    }
    assert all(network.get_parameter(name) is parameter for name, parameter in parameters.items())
    assert all(network.get_submodule(name) is module for name, module in modules.items())
    assert list(network.state_dict()) == keys
    assert not any(module.training for module in network.modules())
    torch.testing.assert_close(network(batch), expected)

    replaced = {row.names: row for row in report.replaced}
    assert set(replaced) == {("features.1",), ("features.2",), ("shared", "alias"), ("head.2",)}
    left = {row.names[0]: row.reason for row in report.left}
    assert left["loud"] == "subclass of ReLU, may override it"
    assert left["features.0"] == "no fusednn twin"
    assert "4 of 10 layers replaced" in str(report)

    fusednn.restore_layers(network)
    assert classes(network) == before


CHANGED = (nn.BatchNorm2d, nn.PReLU, nn.ReLU, nn.GELU)


def test_restore_is_exact(network: nn.Module) -> None:
    before = {name: dict(vars(module)) for name, module in network.named_modules()}
    fusednn.replace_layers(network)
    report = fusednn.restore_layers(network)
    assert {name: dict(vars(module)) for name, module in network.named_modules()} == before
    assert len(report.replaced) == 4
    assert not fusednn.restore_layers(network).rows


def test_restore_leaves_layers_that_the_user_built() -> None:
    model = nn.Sequential(fusednn.layers.ReLU(), nn.ReLU())
    fusednn.replace_layers(model)
    fusednn.restore_layers(model)
    assert [type(module) for module in model] == [fusednn.layers.ReLU, nn.ReLU]


def test_replacing_twice_changes_nothing(network: nn.Module) -> None:
    fusednn.replace_layers(network)
    before = classes(network)
    assert not fusednn.replace_layers(network).replaced
    assert classes(network) == before
    fusednn.restore_layers(network)
    assert type(network.shared) is nn.ReLU


def test_a_replaced_model_survives_copy_and_pickle(network: nn.Module) -> None:
    fusednn.replace_layers(network)
    for duplicate in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert classes(duplicate) == classes(network)
        fusednn.restore_layers(duplicate)
        assert type(duplicate.shared) is nn.ReLU


def test_the_model_itself_may_be_a_layer(device: str) -> None:
    model = nn.ReLU()
    report = fusednn.replace_layers(model)
    assert type(model) is fusednn.layers.ReLU
    assert "(model)" in str(report)


def test_hooks_stay(network: nn.Module, batch: Tensor) -> None:
    calls = []
    network.shared.register_forward_hook(lambda *_: calls.append("forward"))
    network.shared.register_full_backward_hook(lambda *_: calls.append("backward"))
    fusednn.replace_layers(network)
    network.shared(batch.requires_grad_()).sum().backward()
    assert calls == ["forward", "backward"]


def test_parametrized_layers(device: str) -> None:
    x = torch.randn(2, 4, 3, device=device)
    layer = nn.PReLU(4).to(device)
    parametrize.register_parametrization(layer, "weight", Doubled())
    parametrized_class = type(layer)
    expected = layer(x)
    keys = list(layer.state_dict())

    fusednn.replace_layers(layer)
    assert isinstance(layer, fusednn.layers.PReLU)
    assert type(layer).__name__ == "ParametrizedPReLU"
    assert list(layer.state_dict()) == keys
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(copy.deepcopy(layer)(x), expected)

    fusednn.restore_layers(layer)
    assert type(layer).__bases__ == parametrized_class.__bases__ == (nn.PReLU,)
    assert parametrize.is_parametrized(layer, "weight")
    torch.testing.assert_close(layer(x), expected)

    fusednn.replace_layers(layer)
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is fusednn.layers.PReLU
    fusednn.restore_layers(layer)
    assert type(layer) is nn.PReLU
    torch.testing.assert_close(layer(x), expected)


def test_spectral_and_weight_norm_like_parametrization_of_a_neighbour(batch: Tensor, network: nn.Module) -> None:
    torch.nn.utils.parametrizations.weight_norm(network.features[0])
    network.eval()
    expected = network(batch)
    fusednn.replace_layers(network)
    torch.testing.assert_close(network(batch), expected)


def test_an_instance_with_its_own_forward_is_left() -> None:
    layer = nn.ReLU()
    layer.forward = lambda input: input
    report = fusednn.replace_layers(layer)
    assert type(layer) is nn.ReLU
    assert report.left[0].reason == "forward is overridden on the instance"


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (None, None, {"features.1", "features.2", "shared", "head.2"}),
        ("features.*", None, {"features.1", "features.2"}),
        ([nn.ReLU, "head.2"], None, {"shared", "head.2"}),
        (nn.ReLU, None, {"shared"}),
        (None, ["alias"], {"features.1", "features.2", "head.2"}),
        (["head.*"], nn.GELU, set()),
        (lambda name, module: isinstance(module, nn.PReLU), None, {"features.2"}),
    ],
)
def test_selection(network: nn.Module, include: object, exclude: object, expected: set[str]) -> None:
    report = fusednn.replace_layers(network, include=include, exclude=exclude)
    assert {row.names[0] for row in report.replaced} == expected


def test_explain_names_every_path(network: nn.Module, batch: Tensor) -> None:
    before = copy.deepcopy(network.state_dict())
    rows = {row.name: row for row in fusednn.explain(network, batch)}
    assert rows["features.2"].reason == "has a twin: call fusednn.replace_layers"

    fusednn.replace_layers(network)
    random_state = torch.get_rng_state()
    explanation = fusednn.explain(network, batch)
    assert torch.equal(torch.get_rng_state(), random_state)
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), f"explain changed {name}"
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())

    rows = {row.name: row for row in explanation}
    path = "kernel" if KERNELS_RUN else "stock"
    assert [(rows[name].operation, rows[name].path) for name in ("features.1", "features.2", "shared", "head.2")] == [
        ("batch_norm", path),
        ("prelu", path),
        ("relu", path),
        ("gelu_tanh", path),
    ]
    assert rows["features.0"].reason == "no fusednn twin"
    assert str(explanation).endswith(f"{4 if KERNELS_RUN else 0} of {len(explanation)} on kernels")


class Stop(BaseException):
    """As a user's Ctrl-C: nobody catches it."""


def fail_at(patch: pytest.MonkeyPatch, module: object, name: str, call: int) -> None:
    """Let a function raise after it has been called so often, when it has done its work."""
    function, calls = getattr(module, name), itertools.count(1)

    def failing(*arguments: Any, **options: Any) -> Any:
        result = function(*arguments, **options)
        if next(calls) == call:
            raise Stop
        return result

    patch.setattr(module, name, failing)


def state(model: nn.Module) -> list[tuple[type, dict[str, Any]]]:
    """Classes and attributes of all modules."""
    return [(type(module), dict(vars(module))) for module in model.modules()]


@pytest.mark.parametrize(
    ("name", "call"),
    [("exchange", 1), ("exchange", 3), ("serve_functions", 1), ("fuse_neighbours", 1), ("recompute_in", 1)],
)
def test_replacing_is_all_or_nothing(name: str, call: int, network: nn.Module, batch: Tensor) -> None:
    expected, before = network(batch), state(network)
    with pytest.MonkeyPatch.context() as patch:
        fail_at(patch, replacement, name, call)
        with pytest.raises(Stop):
            fusednn.replace_layers(network, fuse=True, recompute=True)
    assert state(network) == before
    torch.testing.assert_close(network(batch), expected, rtol=0, atol=0)
    assert fusednn.replace_layers(network, fuse=True, recompute=True).replaced


@pytest.mark.parametrize(("name", "call"), [("unfuse", 1), ("exchange", 1), ("exchange", 3)])
def test_restoring_is_all_or_nothing(name: str, call: int, network: nn.Module, batch: Tensor) -> None:
    stock = copy.deepcopy(network)
    fusednn.replace_layers(network, fuse=True)
    expected, before = network(batch), state(network)
    with pytest.MonkeyPatch.context() as patch:
        fail_at(patch, restoring, name, call)
        with pytest.raises(Stop):
            fusednn.restore_layers(network)
    assert state(network) == before
    torch.testing.assert_close(network(batch), expected)
    fusednn.restore_layers(network)
    assert classes(network) == classes(stock)


def test_explain_gives_the_reason_of_a_refusal(device: str) -> None:
    (row,) = fusednn.explain(fusednn.layers.ReLU(), torch.ones(3, dtype=torch.int64, device=device))
    assert row.path == "stock"
    assert row.reason == ("no kernel for torch.int64" if KERNELS_RUN else "CPU tensor")


def test_explain_names_a_layer_that_called_no_operation(device: str) -> None:
    layer = fusednn.layers.ReLU()
    layer.forward = lambda x: x
    (row,) = fusednn.explain(layer, torch.ones(3, device=device))
    assert (row.operation, row.reason) == ("-", "called no operation")


def test_explain_cleans_up_after_an_error(network: nn.Module, device: str) -> None:
    with pytest.raises(RuntimeError):
        fusednn.explain(network, torch.ones(1, 7, device=device))
    assert not any(module._forward_hooks for module in network.modules())


def test_explain_knows_which_layer_runs_after_an_error_that_the_model_caught(device: str) -> None:
    class Tries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fails, self.works = nn.Linear(7, 2), fusednn.layers.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            with suppress(RuntimeError):
                self.fails(x)
            return self.works(fusednn.autograd.silu(x))

    rows = fusednn.explain(Tries().to(device), torch.ones(2, 3, device=device))
    assert {row.name: row.operation for row in rows if row.operation != "-"} == {"": "silu", "works": "relu"}


def test_training_a_replaced_model_gives_the_same_losses(device: str) -> None:
    def train(model: nn.Module) -> list[float]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        generator = torch.Generator().manual_seed(2)
        losses = []
        for _ in range(5):
            x = torch.randn(16, 1, 8, 8, generator=generator).to(device)
            loss = nn.functional.cross_entropy(model(x), torch.arange(16, device=device) % 3)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    stock = Network().to(device)
    replaced = copy.deepcopy(stock)
    fusednn.replace_layers(replaced)
    assert train(replaced) == pytest.approx(train(stock), rel=1e-5)


def test_every_layer_here_is_known_as_one() -> None:
    exported = [getattr(layers, name) for name in layers.__all__]
    modules = [one for one in exported if isinstance(one, type) and issubclass(one, nn.Module)]
    assert modules
    assert [cls for cls in modules if not issubclass(cls, Layer)] == []


@pytest.mark.parametrize("inner", [slice(0, 2), slice(1, 3)], ids=["begins it", "ends it"])
def test_a_chain_within_a_longer_one_is_told_once(inner: slice) -> None:
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()]
    members = [*layers[: inner.start], nn.Sequential(*layers[inner]), *layers[inner.stop :]]
    rows = fusednn.replace_layers(nn.Sequential(*members), fuse=True).rows
    assert [row.reason.partition(" ")[0] for row in rows] == ["fused"] * 3
    first = rows[0].names[0]
    assert [row.reason for row in rows[1:]] == [f"fused into {first}"] * 2
