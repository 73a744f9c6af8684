"""Fused neighbours: the way back, copies, and the company of PyTorch's other features."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from support.fusion import (
    IMAGES,
    PATTERNS,
    SHORT_AND_LONG,
    Options,
    Residual,
    assert_same,
    batch,
    conv_norm_act,
    fused_groups,
    make,
    reasons,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fusednn
from fusednn import layers
from fusednn.layers.fusion.members import observe_chains


@pytest.mark.parametrize("name", SHORT_AND_LONG)
def test_restore_is_exact(name: str, device: str) -> None:
    build, shape, _ = PATTERNS[name]
    model = make(build(), device).eval()
    x = batch(*shape, device=device)
    expected = model(x)
    before = [(name, module, type(module), dict(vars(module))) for name, module in model.named_modules()]
    replaced = fusednn.replace_layers(model, fuse=True).replaced
    restored = fusednn.restore_layers(model).replaced
    assert [(name, module, type(module), dict(vars(module))) for name, module in model.named_modules()] == before
    assert [row.names for row in restored] == [row.names for row in replaced]
    assert torch.equal(model(x), expected)


@pytest.mark.thorough
def test_twice_and_in_either_order(device: str) -> None:
    x = batch(*IMAGES, device=device)
    stock = make(nn.Sequential(*conv_norm_act(), nn.Flatten(), nn.Linear(64, 4), nn.ReLU()), device)
    for calls in ([True, True], [False, True], [True, False]):
        model = copy.deepcopy(stock)
        reports = [fusednn.replace_layers(model, fuse=fuse) for fuse in calls]
        assert len(fused_groups(reports[calls.index(True)])) == 2
        if calls[0]:
            assert not reports[1].replaced
        assert_same(model, stock, x)
        fusednn.restore_layers(model)
        assert [type(layer) for layer in model] == [type(layer) for layer in stock]
        assert type(model) is nn.Sequential


def test_layers_built_as_ours_are_fused_and_stay_ours(device: str) -> None:
    stock = make(conv_norm_act(), device)
    ours = nn.Sequential(layers.Conv2d(4, 4, 3), nn.BatchNorm2d(4), layers.ReLU())
    ours = make(ours, device)
    ours.load_state_dict(stock.state_dict())
    assert reasons(ours)["0"] == "fused with 1, 2"
    assert_same(ours, stock, batch(*IMAGES, device=device))
    fusednn.restore_layers(ours)
    assert [type(layer) for layer in ours] == [layers.Conv2d, nn.BatchNorm2d, layers.ReLU]


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "copy": copy.copy, "pickle": lambda m: pickle.loads(pickle.dumps(m))}


@pytest.mark.parametrize("way", [*COPIES, pytest.param("torch.save", marks=pytest.mark.thorough)])
@pytest.mark.parametrize("name", [pytest.param("functions", marks=pytest.mark.thorough), "nested"])
def test_copies_are_fused_too(name: str, way: str, device: str) -> None:
    build, shape, _ = PATTERNS[name]
    stock = make(build(), device)
    model = copy.deepcopy(stock)
    fusednn.replace_layers(model, fuse=True)
    duplicate = COPIES.get(way, saved_and_loaded)(model)
    assert not fusednn.replace_layers(duplicate, fuse=True).replaced
    if way != "copy":  # which shares its parameters
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
    assert_same(duplicate, stock, batch(*shape, device=device))
    fusednn.restore_layers(duplicate)
    assert {type(module) for module in duplicate.modules()} == {type(module) for module in stock.modules()}


def doubled(layer: nn.Module, arguments: tuple[Tensor, ...], y: Tensor) -> Tensor:
    return 2 * y


@pytest.mark.kernels
@pytest.mark.parametrize("way", COPIES)
def test_copies_keep_apart_what_was_kept_apart(way: str, device: str) -> None:
    """A layer that was left out, and one that has got a hook since."""
    model = make(nn.Sequential(*conv_norm_act(), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Tanh()), device)
    fusednn.replace_layers(model, fuse=True, exclude="4")
    model[6].register_forward_hook(doubled)
    x, results = batch(*IMAGES, device=device), []
    for one in (model, COPIES[way](model)):
        together: list[list[nn.Module]] = []
        with observe_chains(
            lambda members, why, seen=together: seen.append([*members]) if members and not why else None
        ):
            results.append(one(x))
        assert together == [list(one[:3])]
    torch.testing.assert_close(*results)


def test_moving_and_assigning(device: str) -> None:
    model = make(conv_norm_act(), device)
    fusednn.replace_layers(model, fuse=True)
    model.float().eval()
    x = batch(*IMAGES, device=device).float()
    state = {name: value.clone() for name, value in make(conv_norm_act(), device, seed=3).float().state_dict().items()}
    model.load_state_dict(state, assign=True)
    stock = conv_norm_act().to(device).eval()
    stock.load_state_dict(state)
    torch.testing.assert_close(model(x), stock(x), rtol=1e-4, atol=1e-5)
    replica = model._replicate_for_data_parallel()
    assert torch.equal(replica(x), model(x))


def test_functional_call_and_transforms(device: str) -> None:
    model = make(Residual(), device).eval()
    other = make(Residual(), device, seed=3).eval()
    fusednn.replace_layers(model, fuse=True)
    x = batch(*IMAGES, device=device)
    state = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    torch.testing.assert_close(torch.func.functional_call(model, state, x), other(x))
    each = torch.func.vmap(lambda one: model(one[None])[0])(x)
    torch.testing.assert_close(each, model(x))


@pytest.mark.parametrize("reentrant", [pytest.param(True, marks=pytest.mark.thorough), False])
def test_checkpointing(reentrant: bool, device: str) -> None:
    stock = make(Residual(), device)
    model = copy.deepcopy(stock)
    fusednn.replace_layers(model, fuse=True)
    gradients = []
    for one in (stock, model):
        x = batch(*IMAGES, device=device).requires_grad_()
        checkpoint(one, x, use_reentrant=reentrant).square().sum().backward()
        gradients.append([x.grad, *(parameter.grad for parameter in one.parameters())])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    "name",
    [
        "maximum over pieces",
        *(
            pytest.param(name, marks=pytest.mark.thorough)
            for name in ("residual", "functions", "conv, norm, act, pool")
        ),
    ],
)
def test_compiles_without_breaks(name: str, device: str) -> None:
    build, shape, _ = PATTERNS[name]
    stock = make(build(), device)
    model = copy.deepcopy(stock)
    fusednn.replace_layers(model, fuse=True)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = batch(*shape, device=device)
    for training in (True, False):
        stock.train(training)
        model.train(training)
        torch.testing.assert_close(compiled(x), stock(x), rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_exported_and_scripted(device: str) -> None:
    stock = make(Residual(), device).eval()
    model = copy.deepcopy(stock)
    fusednn.replace_layers(model, fuse=True)
    x = batch(*IMAGES, device=device)
    expected = stock(x)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)
    torch.testing.assert_close(torch.jit.trace(model, (x,))(x), expected)
    torch.testing.assert_close(torch.jit.script(model)(x), expected)
    assert reasons(model)["conv1"] == "already a fusednn layer"


def test_autocast(device: str) -> None:
    stock = make(Residual(), device).float()
    model = copy.deepcopy(stock)
    fusednn.replace_layers(model, fuse=True)
    x = batch(*IMAGES, device=device).float()
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        mine, theirs = model(x), stock(x)
    assert mine.dtype is theirs.dtype
    torch.testing.assert_close(mine, theirs, rtol=0.05, atol=0.05)


def test_a_class_made_of_a_fused_one(device: str) -> None:
    """As sharding makes one."""
    stock = make(conv_norm_act(), device)
    model = copy.deepcopy(stock)
    fusednn.replace_layers(model, fuse=True)
    model.__class__ = type("Sharded", (type(model),), {})
    x = batch(*IMAGES, device=device)
    assert_same(model, stock, x)
    assert fusednn.replace_layers(model, fuse=True).untraced[0].reason == "its class was changed after it was fused"
    fusednn.restore_layers(model)
    assert type(model).__name__ == "Sharded"
    assert_same(model, stock, x)


def test_folding_after_fusion(device: str) -> None:
    stock = make(Residual(), device).eval()
    model = copy.deepcopy(stock)
    fusednn.replace_layers(model, fuse=True)
    assert len(layers.fold_batch_norm(model).replaced) == 2
    x = batch(*IMAGES, device=device)
    torch.testing.assert_close(model(x), stock(x))


def test_a_fused_module_looks_like_itself() -> None:
    model = Options()
    shown, signature = repr(Residual()), inspect.signature(model.forward)
    fusednn.replace_layers(model, fuse=True)
    assert isinstance(model, Options)
    assert type(model) is not Options
    assert inspect.signature(model.forward) == signature
    residual = Residual()
    fusednn.replace_layers(residual, fuse=True)
    assert repr(residual) == shown
