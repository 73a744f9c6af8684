"""`replace_layers(fuse=True)`: chains of layers computed in one, with the same results."""

import copy
import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.fusion import (
    IMAGES,
    PATTERNS,
    SHORT_AND_LONG,
    Options,
    Residual,
    UsedTwice,
    assert_same,
    batch,
    conv_norm_act,
    fused_groups,
    make,
    outcome,
    reasons,
)
from torch import Tensor, nn

import fusednn

needs_kernels = pytest.mark.kernels


@pytest.mark.parametrize("name", SHORT_AND_LONG)
def test_same_results_and_state(name: str, device: str) -> None:
    build, shape, expected = PATTERNS[name]
    stock = make(build(), device)
    model = copy.deepcopy(stock)
    keys, parameters = list(model.state_dict()), dict(model.named_parameters())
    modules = dict(model.named_modules())
    x = batch(*shape, device=device)

    report = fusednn.replace_layers(model, fuse=True)

    groups = fused_groups(report)
    assert {first: groups[first] for first in expected} == expected
    assert list(model.state_dict()) == keys
    assert [name for name, _ in model.named_parameters()] == list(parameters)
    assert all(model.get_parameter(name) is one for name, one in parameters.items())
    assert all(model.get_submodule(name) is one for name, one in modules.items())
    assert_same(model, stock, x)

    other = make(build(), device, seed=5)
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(model.eval()(x), other.eval()(x), rtol=1e-9, atol=1e-9)
    stock.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(x), stock.eval()(x), rtol=1e-9, atol=1e-9)


class Broadcast(nn.Module):
    """A norm whose residual, of another norm behind it, has one value for each channel, and is added in place."""

    def __init__(self, convolved: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1) if convolved else nn.Identity()
        self.norm, self.other, self.act = nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        y += self.other(x.mean((2, 3), keepdim=True))
        return self.act(y)


@pytest.mark.parametrize("convolved", [True, False])
def test_a_residual_that_is_broadcast_in_place(convolved: bool, device: str) -> None:
    stock = make(Broadcast(convolved), device)
    model = copy.deepcopy(stock)
    groups = fused_groups(fusednn.replace_layers(model, fuse=True))
    assert groups == ({"conv": "norm, act"} if convolved else {"norm": "act"})
    assert_same(model, stock, batch(*IMAGES, device=device))


@needs_kernels
@pytest.mark.parametrize(
    ("name", "operations"),
    [
        ("conv, act, pool", {"conv_act_pool2d"}),
        ("conv, pool, act", {"conv_act_pool2d"}),
        ("norm, act", {"batch_norm_act", "batch_norm"}),
        ("linear, act, dropout", {"bias_activation"}),
        ("linear, pool of pieces", {"maxout_linear", "linear"}),  # whose product is cuBLAS's
        ("maximum over pieces", {"maxout_linear", "linear"}),
        ("residual", {"batch_norm_act", "conv2d"}),
    ],
)
def test_kernels_of_the_chains_run(name: str, operations: set[str], device: str) -> None:
    build, shape, _ = PATTERNS[name]
    model = make(build(), device)
    fusednn.replace_layers(model, fuse=True)
    explanation = fusednn.explain(model, batch(*shape, device=device))
    assert {row.operation for row in explanation if row.path != "fused"} - {"-"} == operations


@needs_kernels
def test_explain_tells_who_computes_what(device: str) -> None:
    model = make(Residual(), device).eval()
    fusednn.replace_layers(model, fuse=True)
    explanation = fusednn.explain(model, batch(*IMAGES, device=device))
    assert [(row.name, row.path, row.reason) for row in explanation if row.path == "fused"] == [
        ("bn1", "fused", "computed by conv1"),
        ("relu", "fused", "computed by conv1"),
        ("bn2", "fused", "computed by conv2"),
        ("relu", "fused", "computed by conv2"),
    ]
    assert [(row.name, row.operation, row.path) for row in explanation if row.path != "fused"] == [
        ("conv1", "conv_act2d", "kernel"),
        ("conv2", "conv_act2d", "kernel"),
    ]
    assert str(explanation).endswith("2 of 2 on kernels, 4 fused")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@needs_kernels
def test_explain_tells_why_a_chain_is_apart(device: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).to(device)
    fusednn.replace_layers(model, fuse=True)
    model[1].register_forward_hook(lambda *_: None)
    explanation = fusednn.explain(model, torch.ones(1, 3, 6, 6, device=device))
    (row,) = (row for row in explanation if row.path == "apart")
    assert (row.name, row.layer, row.reason) == ("0", "Conv2d", "a layer has hooks, or code of its own")
    assert str(explanation).endswith("1 of 2 on kernels")


class Gate(nn.Module):
    """A chain of functions alone, behind a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        gate, other = self.linear(x).chunk(2, -1)
        return F.silu(gate) * other


@needs_kernels
def test_explain_takes_chains_without_layers(device: str) -> None:
    model = nn.Sequential(Gate()).to(device)
    fusednn.replace_layers(model, fuse=True)
    _, row = fusednn.explain(model, torch.ones(2, 8, device=device))
    assert (row.layer, row.path) == ("Gate", "kernel")


def test_dropout_drops_in_training_alone(device: str) -> None:
    model = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Dropout(0.5)).to(device)
    nn.init.ones_(model[0].bias)
    fusednn.replace_layers(model, fuse=True)
    x = torch.zeros(32, 6, device=device)
    dropped = (model(x) == 0).float().mean()
    assert 0.4 < dropped < 0.6
    model[2].p = 0.0  # as a schedule does
    torch.testing.assert_close(model(x), torch.ones(32, 64, device=device))
    model[2].p = 0.5
    torch.testing.assert_close(model.eval()(x), torch.ones(32, 64, device=device))


def test_a_frozen_norm_keeps_its_mode(device: str) -> None:
    stock = make(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), device)
    model = copy.deepcopy(stock)
    fusednn.replace_layers(model, fuse=True)
    for one in (stock, model):
        one.train()[1].eval()
    x = batch(*IMAGES, device=device)
    before = model[1].running_mean.clone()
    torch.testing.assert_close(outcome(model, x), outcome(stock, x))
    assert torch.equal(model[1].running_mean, before)


def test_optimizer_state_stays_valid(device: str) -> None:
    stock = make(Residual(), device)
    model = copy.deepcopy(stock)
    x = batch(*IMAGES, device=device)

    def step(one: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        one(x).square().mean().backward()
        optimizer.step()

    mine, theirs = (torch.optim.Adam(one.parameters(), lr=1e-2) for one in (model, stock))
    step(model, mine)
    step(stock, theirs)
    fusednn.replace_layers(model, fuse=True)
    mine.load_state_dict(copy.deepcopy(theirs.state_dict()))
    step(model, mine)
    step(stock, theirs)
    fusednn.restore_layers(model)
    step(model, mine)
    step(stock, theirs)
    torch.testing.assert_close(model.state_dict(), stock.state_dict(), rtol=1e-6, atol=1e-8)


# --- Calls and changes that come later --------------------------------------------------------------------------------


def test_parts_of_a_sequence_called_by_hand(device: str) -> None:
    stock = make(conv_norm_act(), device)
    model = copy.deepcopy(stock)
    fusednn.replace_layers(model, fuse=True)
    x = batch(*IMAGES, device=device)
    torch.testing.assert_close(model[:2](x), stock[:2](x))
    torch.testing.assert_close(model[0](x), stock[0](x))
    torch.testing.assert_close(nn.Sequential(*model.children())(x), stock(x))


def test_changes_of_the_model_after_fusion(device: str) -> None:
    stock = make(conv_norm_act(), device)
    model = copy.deepcopy(stock)
    fusednn.replace_layers(model, fuse=True)
    x = batch(*IMAGES, device=device)

    def change(function: Callable[[nn.Module], object]) -> None:
        for one in (stock, model):
            function(one)
        assert_same(model, stock, x)

    change(lambda one: one.append(nn.Sigmoid()))
    change(lambda one: one.__setitem__(1, nn.Identity()))
    change(lambda one: one.__delitem__(1))
    change(lambda one: setattr(one[0], "stride", (2, 2)))
    change(lambda one: setattr(one[1], "forward", torch.cos))


def test_changes_that_traced_code_asks_for(device: str) -> None:
    stock = make(Residual(), device)
    model = copy.deepcopy(stock)
    fusednn.replace_layers(model, fuse=True)
    assert_same(model, stock, batch(*IMAGES, device=device))
    downsample = make(nn.Conv2d(4, 4, 1), device)
    for one in (stock, model):
        one.downsample = copy.deepcopy(downsample)
    assert_same(model, stock, batch(*IMAGES, device=device))


@pytest.mark.parametrize("options", [{}, {"twice": True}, {"scale": torch.tensor(3.0)}])
def test_optional_arguments(options: dict[str, object], device: str) -> None:
    stock = make(Options(), device)
    model = copy.deepcopy(stock)
    assert reasons(model)["conv"] == "fused with act"
    assert_same(model, stock, batch(*IMAGES, device=device), **options)
    with pytest.raises(TypeError):
        model()


class HoldsAFunction(UsedTwice):
    def __init__(self) -> None:
        super().__init__()
        self.function = F.relu

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.conv(x))


def test_a_function_that_the_module_holds(device: str) -> None:
    stock = make(HoldsAFunction(), device)
    model = copy.deepcopy(stock)
    assert reasons(model)["conv"] == "fused with the functions behind it"
    assert_same(model, stock, batch(*IMAGES, device=device))
    for one in (stock, model):
        one.function = torch.cos
    assert_same(model, stock, batch(*IMAGES, device=device))


class Modes(UsedTwice):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.training:
            y = y * 2
        return self.act(y)


def test_code_that_differs_in_training(device: str) -> None:
    stock = make(Modes(), device)
    model = copy.deepcopy(stock)
    assert reasons(model)["conv"] == "fused with act"
    assert_same(model, stock, batch(*IMAGES, device=device))


def test_errors_are_those_of_stock(device: str) -> None:
    model = make(conv_norm_act(), device)
    stock = copy.deepcopy(model)
    fusednn.replace_layers(model, fuse=True)
    for wrong in (batch(2, 3, 6, 6, device=device), batch(4, 6, 6, device=device), batch(2, 4, device=device), None):
        errors = []
        for one in (stock, model):
            with pytest.raises(Exception) as raised:  # noqa: PT011 (whatever stock raises)
                one(wrong)
            errors.append((type(raised.value), str(raised.value)))
        assert errors[0] == errors[1]


def test_residuals_of_other_shapes_and_types(device: str) -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x: Tensor, other: Tensor) -> Tensor:
            return torch.relu(self.norm(x) + other)

    class SumInPlace(Sum):
        def forward(self, x: Tensor, other: Tensor) -> Tensor:
            y = self.norm(x)
            y += other
            return torch.relu(y)

    x = batch(*IMAGES, device=device)
    for cls in (Sum, SumInPlace):
        stock = make(cls(), device).eval()
        model = copy.deepcopy(stock)
        assert reasons(model)["norm"] == "fused with the functions behind it"
        for other in (x, x[:, :, :1], x.float(), torch.tensor(1.5, dtype=torch.float64, device=device)):
            torch.testing.assert_close(model(x, other), stock(x, other))
        wide = batch(3, *IMAGES, device=device)
        if cls is SumInPlace:
            with pytest.raises(RuntimeError):
                model(x, wide)
        else:
            torch.testing.assert_close(model(x, wide), stock(x, wide))


# --- At random --------------------------------------------------------------------------------------------------------


def random_model(chance: random.Random) -> nn.Module:
    """A random nn.Sequential over images, some of it nested, then over rows."""
    channels, size = 3, 12
    modules: list[nn.Module] = []

    def activation() -> nn.Module:
        inplace = chance.random() < 0.5
        kinds = [nn.ReLU(inplace), nn.GELU(), nn.LeakyReLU(chance.choice([0.01, 0.2]), inplace), nn.Tanh()]
        return chance.choice([*kinds, nn.Hardtanh(), nn.SiLU(inplace), nn.PReLU(), nn.Softplus(), nn.ELU()])

    for _ in range(chance.randint(4, 7)):
        kind = chance.choice(["conv", "conv", "norm", "activation", "activation", "pool", "dropout"])
        if kind == "conv":
            wide = chance.choice([2, 3, 4])
            modules.append(nn.Conv2d(channels, wide, 3, padding=1, bias=chance.random() < 0.5))
            channels = wide
        elif kind == "norm":
            modules.append(nn.BatchNorm2d(channels, affine=chance.random() < 0.7))
        elif kind == "activation":
            modules.append(activation())
        elif kind == "pool" and size >= 6:
            modules.append(nn.MaxPool2d(2))
            size //= 2
        else:
            modules.append(nn.Dropout(0.0, inplace=chance.random() < 0.5))
    if chance.random() < 0.5:
        middle = chance.randint(1, len(modules))
        modules = [nn.Sequential(*modules[:middle]), *modules[middle:]]
    head = [nn.Linear(channels * size * size, 6), activation(), nn.Dropout(0.0)]
    return nn.Sequential(*modules, nn.Flatten(), *head, nn.Linear(6, 4), nn.MaxPool1d(2))


def check_random_model(seed: int, device: str) -> int:
    """Fused against stock, hooks sprinkled in; returns how many chains there were."""
    chance = random.Random(seed)
    stock = make(random_model(chance), device, seed)
    model = copy.deepcopy(stock)
    calls: dict[nn.Module, list[str]] = {stock: [], model: []}
    hooked = [name for name, module in model.named_modules() if name and chance.random() < 0.15]
    for one, called in calls.items():
        for name in hooked:
            one.get_submodule(name).register_forward_hook(lambda *_, c=called, n=name: c.append(n))
    before = [type(module) for module in model.modules()]
    chains = len(fused_groups(fusednn.replace_layers(model, fuse=True)))
    x = batch(2, 3, 12, 12, device=device, seed=seed)
    assert_same(model, stock, x)
    assert calls[model] == calls[stock]
    fusednn.restore_layers(model)
    assert [type(module) for module in model.modules()] == before
    assert_same(model, stock, x)
    return chains


def test_random_models(device: str) -> None:
    assert sum(check_random_model(seed, device) for seed in range(2)) > 0


@pytest.mark.thorough
def test_many_random_models(device: str) -> None:
    assert sum(check_random_model(seed, device) for seed in range(2, 40)) > 40


@pytest.mark.parametrize(
    "activation",
    [nn.LeakyReLU(0.2), nn.ELU(0.5), nn.CELU(0.5), nn.Hardtanh(0, 6), nn.ELU(-0.5)],
    ids=lambda layer: type(layer).__name__,
)
@pytest.mark.parametrize("before", ["conv", "norm", "conv, norm", "linear"])
def test_parameters_of_activations(before: str, activation: nn.Module, device: str) -> None:
    norm, conv = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
    first = {"conv": [conv], "norm": [norm], "conv, norm": [conv, norm], "linear": [nn.Linear(6, 4)]}[before]
    pool = [nn.MaxPool2d(2)] if conv in first else []
    stock = make(nn.Sequential(*first, copy.deepcopy(activation), *pool), device)
    model = copy.deepcopy(stock)
    groups = fused_groups(fusednn.replace_layers(model, fuse=True))
    assert groups == {"0": ", ".join(map(str, range(1, len(stock))))}
    x = batch(*((4, 6) if before == "linear" else IMAGES), device=device)
    assert_same(model, stock, x)
    activation = model[len(first)]  # its parameters are read at each call
    name = next(name for name in ("negative_slope", "alpha", "max_val") if hasattr(activation, name))
    for layer in (activation, stock[len(first)]):
        setattr(layer, name, 0.25)
    assert_same(model, stock, x)


class Named(nn.Module):
    """Takes anything by name, as transformers' modules do, and uses none of it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(4, 4, 1), nn.ReLU()

    def forward(self, x: Tensor, **kwargs: object) -> Tensor:
        y = self.act(self.conv(x))
        return y * 2 if kwargs else y


def test_arguments_that_anything_may_be_given_by(device: str) -> None:
    model, stock = make(Named(), device), make(Named(), device)
    assert fused_groups(fusednn.replace_layers(model, fuse=True)) == {"conv": "act"}
    x = batch(2, 4, 5, 5, device=device)
    assert_same(model, stock, x)
    assert_same(model, stock, x, twice=True)
