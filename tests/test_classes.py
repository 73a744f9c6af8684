"""Classes that users, and PyTorch's tools, derive from ours and from stock's: replaced, restored, scripted."""

import copy
import pickle
from collections.abc import Callable, Iterator
from types import MethodType

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from support.device import ON_GPU
from torch import Tensor, nn
from torch.distributed._composable.replicate import replicate
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

import fusednn
from fusednn import layers


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 4), nn.PReLU(4))


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# --- What PyTorch's tools derive --------------------------------------------------------------------------------------

Tool = Callable[[nn.Module], object]


def doubled(model: nn.Module) -> None:
    parametrize.register_parametrization(model[5], "weight", Doubled())
    parametrize.register_parametrization(model[1], "bias", Doubled())


TOOLS: dict[str, Tool] = {
    "parametrize": doubled,
    "parametrizations.spectral_norm": lambda model: parametrizations.spectral_norm(model[0]),
    "parametrizations.weight_norm": lambda model: parametrizations.weight_norm(model[0]),
    "spectral_norm": lambda model: spectral_norm(model[0]),
    "weight_norm": lambda model: weight_norm(model[0]),
    "prune": lambda model: prune.l1_unstructured(model[0], "weight", 0.5),
    "fully_shard": lambda model: [fully_shard(module) for module in (model[1], model[5], model)],
    "replicate": lambda model: replicate(model[5]),
}


def bases(model: nn.Module) -> list[tuple[str, ...]]:
    return [tuple(cls.__qualname__ for cls in type(module).__mro__) for module in model.modules()]


@pytest.mark.skipif(ON_GPU, reason="gloo on the CPU")
@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_tools_before_and_after(tool: str, fuse: bool, process_group: None) -> None:
    x = torch.randn(3, 1, 4, 4)
    stock = network()
    TOOLS[tool](stock)
    model, classes = copy.deepcopy(network()), bases(stock)
    TOOLS[tool](model)
    before = [type(module) for module in model.modules()]
    replaced = {
        name for row in fusednn.replace_layers(model, fuse=fuse).replaced for name in row.names
    }  # the tool first
    assert replaced - {"4"} == {"0", "1", "2", "5"}  # the linear layer is only replaced where it is fused
    expected = stock(x)
    torch.testing.assert_close(model(x), expected)
    fusednn.restore_layers(model)
    assert [type(module) for module in model.modules()] == before

    model = network()
    fusednn.replace_layers(model, fuse=fuse)
    TOOLS[tool](model)
    torch.testing.assert_close(model(x), expected)
    with layers.restored(model):
        assert bases(model) == classes
    assert bases(model) != classes
    torch.testing.assert_close(model.eval()(x), stock.eval()(x), rtol=1e-3, atol=1e-4)
    assert len(fusednn.restore_layers(model).rows) >= 4
    assert bases(model) == classes
    assert isinstance(model, FSDPModule) is (tool == "fully_shard")
    torch.testing.assert_close(model(x), stock(x), rtol=1e-3, atol=1e-4)


def test_a_parametrized_layer_gets_its_class_back() -> None:
    model = network()
    doubled(model)
    before = [type(module) for module in model.modules()]
    for _ in range(2):
        fusednn.replace_layers(model)
        fusednn.restore_layers(model)
        assert [type(module) for module in model.modules()] == before


def test_a_parametrization_that_came_later_stays() -> None:
    layer, plain = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
    for one in (layer, plain):
        nn.init.uniform_(one.bias)
        nn.init.uniform_(one.weight)
    plain.load_state_dict(layer.state_dict())
    parametrize.register_parametrization(layer, "weight", Doubled())
    fusednn.replace_layers(layer)
    parametrize.register_parametrization(layer, "bias", Doubled())
    fusednn.restore_layers(layer)
    x = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(layer(x), 2 * plain(x))
    parametrize.remove_parametrizations(layer, "weight")
    parametrize.remove_parametrizations(layer, "bias")
    assert type(layer) is nn.BatchNorm2d


def test_copies_are_apart() -> None:
    """A parametrized layer shares its class with its copies: theirs stays."""
    model = network()
    doubled(model)
    copied = copy.deepcopy(model)
    fusednn.replace_layers(model)
    assert not any(isinstance(module, layers.PReLU) for module in copied.modules())


def test_lazy_layers_wait_for_their_first_batch() -> None:
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d())
    report = fusednn.replace_layers(model)
    assert {row.reason for row in report.rows} == {"not initialised: replace it after its first batch"}
    model(torch.randn(2, 1, 5, 5))
    assert len(fusednn.replace_layers(model).replaced) == 2


def test_other_tools_see_a_layer(device: str) -> None:
    """Those that exchange tensors, make layers without memory, or copy layers without calling them."""
    model = network().to(device)
    stock = copy.deepcopy(model)
    fusednn.replace_layers(model)
    x = torch.randn(3, 1, 4, 4, device=device)
    weights = {name: 2 * weight for name, weight in stock.named_parameters()}
    expected = torch.func.functional_call(stock, weights, (x,))
    torch.testing.assert_close(torch.func.functional_call(model, weights, (x,)), expected)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        torch.testing.assert_close(model.double()(x.double()), stock.double()(x.double()))
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert nn.utils.skip_init(layers.Conv2d, 1, 4, 3).weight.shape == (4, 1, 3, 3)
    replica = model[1]._replicate_for_data_parallel()
    assert type(replica) is layers.BatchNorm2d


# --- What users derive ------------------------------------------------------------------------------------------------


class Plain(layers.ReLU):
    """Nothing of its own."""


class Loud(layers.ReLU):
    def forward(self, input: Tensor) -> Tensor:
        return F.relu(input) + 1


class Convolution(layers.Conv2d):
    """Whose stock class calls a method that the twin has, too."""


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_users_convolution_is_scripted() -> None:
    layer, x = Convolution(1, 2, 3), torch.randn(1, 1, 5, 5)
    torch.testing.assert_close(torch.jit.script(layer)(x), layer(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize(("cls", "added"), [(Plain, 0), (Loud, 1)])
def test_a_users_class_is_scripted(cls: type[nn.Module], added: int) -> None:
    forward = nn.ReLU.forward
    x = torch.randn(5)
    model = nn.Sequential(cls())
    torch.testing.assert_close(torch.jit.script(model)(x), x.relu() + added)
    assert isinstance(model[0], cls)  # PyTorch leaves what it compiled in the model
    torch.testing.assert_close(model(x), x.relu() + added)
    assert nn.ReLU.forward is forward


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_layers_without_a_twin_say_that_they_cannot_be_scripted() -> None:
    for layer in (layers.Maxout(2, 3), layers.ConvAct2d(1, 1, 1), layers.BatchNormAct1d(3), layers.InputNorm(3)):
        with pytest.raises(NotImplementedError, match=f"{type(layer).__name__} has no torch.nn class"):
            torch.jit.script(nn.Sequential(layer))


def test_users_classes_stay_as_they_are() -> None:
    model = nn.Sequential(Plain(), Loud())
    report = fusednn.replace_layers(model)
    assert [row.reason for row in report.rows] == ["already a fusednn layer"] * 2
    assert not fusednn.restore_layers(model).rows
    assert [type(layer) for layer in model] == [Plain, Loud]


# --- All or nothing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fuse", [False, True])
def test_what_cannot_be_restored_is_named_and_nothing_changes(fuse: bool) -> None:
    model = nn.Sequential(network(), nn.ReLU())
    fusednn.replace_layers(model, fuse=fuse)
    model[1].__class__ = Loud
    before = [(type(module), dict(vars(module))) for module in model.modules()]
    with pytest.raises(TypeError, match=r"can't restore 1 \(Loud\).*Nothing was changed"):
        fusednn.restore_layers(model)
    with pytest.raises(TypeError, match="can't restore 1"), layers.restored(model):
        pass
    assert [(type(module), dict(vars(module))) for module in model.modules()] == before
    model[1].__class__ = layers.ReLU
    fusednn.restore_layers(model)
    assert bases(model) == bases(nn.Sequential(network(), nn.ReLU()))


@pytest.mark.parametrize("fuse", [False, True])
def test_a_replacement_that_raises_changes_nothing(fuse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def selects(name: str, module: nn.Module) -> bool:
        if name == "5":
            raise KeyError(name)
        return True

    model = network()
    before = [(type(module), dict(vars(module))) for module in model.modules()]
    with pytest.raises(KeyError):
        fusednn.replace_layers(model, include=selects, fuse=fuse)
    assert [(type(module), dict(vars(module))) for module in model.modules()] == before


# --- For a while ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fuse", [False, True])
def test_restored_for_a_while(fuse: bool, device: str) -> None:
    model = nn.Sequential(network(), layers.ReLU()).to(device)
    expected = bases(model)
    fusednn.replace_layers(model, fuse=fuse)
    replaced = [(type(module), dict(vars(module))) for module in model.modules()]
    x = torch.randn(3, 1, 4, 4, device=device)
    rows = fusednn.explain(model, x).rows

    def tool() -> None:
        with layers.restored(model) as same:
            assert same is model
            assert bases(model) == expected
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        tool()
    assert [(type(module), dict(vars(module))) for module in model.modules()] == replaced
    assert fusednn.explain(model, x).rows == rows


def test_what_changes_while_restored_stays() -> None:
    model = network()
    fusednn.replace_layers(model, fuse=True)
    with layers.restored(model):
        model[2] = nn.Tanh()
        model[1].__class__ = nn.SyncBatchNorm
        parametrize.register_parametrization(model[5], "weight", Doubled())
    assert type(model[2]) is nn.Tanh
    assert type(model[1]) is nn.SyncBatchNorm
    assert isinstance(model[5], layers.PReLU)
    assert parametrize.is_parametrized(model[5], "weight")
    assert model.eval()(torch.randn(3, 1, 4, 4)).shape == (3, 4)


# --- Instead of a class, an instance's forward ------------------------------------------------------------------------


def test_what_an_instances_forward_would_cost() -> None:
    """Why ``replace_layers`` changes classes: a bound method travels with a module's state, and not as one should."""
    layer = nn.PReLU()
    layer.forward = MethodType(layers.PReLU.forward, layer)
    assert copy.deepcopy(layer).forward.__func__ is layers.PReLU.forward
    assert pickle.loads(pickle.dumps(layer)).forward.__func__ is nn.PReLU.forward  # stock's again
    assert copy.copy(layer).forward.__self__ is layer
    assert layer._replicate_for_data_parallel().forward.__self__ is layer
