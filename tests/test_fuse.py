"""`replace_layers(fuse=True)`: chains of layers computed in one, the same results, and a way back."""

import copy
import inspect
import io
import pickle
import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.device import KERNELS_RUN
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fusednn
from fusednn import layers

needs_kernels = pytest.mark.skipif(not KERNELS_RUN, reason="only kernels are fused")


def make(model: nn.Module, device: str, seed: int = 0) -> nn.Module:
    """The model in float64, with parameters and statistics of batch norms unlike those of a new one."""
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for parameter in module.parameters():
                nn.init.uniform_(parameter, 0.5, 2)
            if module.running_mean is not None:
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.5, 2)
    return model.to(device, torch.float64)


def batch(*shape: int, device: str, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device)


def outcome(model: nn.Module, x: Tensor, **kwargs: object) -> dict[str, Tensor]:
    """The output of a call, all gradients, and all buffers after it."""
    x = x.clone().requires_grad_()
    y = model(x * 1, **kwargs)  # a leaf can't be changed in place
    model.zero_grad()
    (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype, device=y.device).view_as(y)).sum().backward()
    found = {"output": y.detach(), "input": x.grad}
    found |= {f"gradient of {name}": one.grad for name, one in model.named_parameters() if one.grad is not None}
    return found | {name: buffer.clone() for name, buffer in model.named_buffers()}


def assert_same(model: nn.Module, stock: nn.Module, x: Tensor, **kwargs: object) -> None:
    """A call in each mode; in evaluation with what training left in the statistics."""
    for training in (True, False):
        model.train(training)
        stock.train(training)
        torch.testing.assert_close(outcome(model, x, **kwargs), outcome(stock, x, **kwargs), rtol=1e-9, atol=1e-9)


def fused_groups(report: layers.ReplacementReport) -> dict[str, str]:
    """What each first layer was fused with."""
    start = "fused with "
    return {row.names[0]: row.reason[len(start) :] for row in report.rows if row.reason.startswith(start)}


# --- Patterns ---------------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """As torchvision writes it: one ReLU for all, in place, and ``out += identity``."""

    def __init__(self, downsample: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(4)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Functional(nn.Module):
    """Functions instead of layers, as in PyTorch's examples; and mode read by the code."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 3)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.fc1 = nn.Linear(16, 8)
        self.fc2 = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = torch.add(self.norm(self.conv2(x)), x).relu()
        x = F.gelu(self.fc1(torch.flatten(x, 1)), approximate="tanh")
        x = F.dropout(F.relu(self.fc2(x)), 0.0, training=self.training)
        return F.log_softmax(x, 1)


class PreActivation(nn.Module):
    """Batch norm first, and a residual that isn't activated."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4)
        self.act = nn.SiLU()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(self.act(self.norm(x)))


class Pieces(nn.Module):
    """Maxout as people write it, by views."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(4, 6, bias=False)
        self.third = nn.Linear(2, 6)
        self.fourth = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).view(-1, 4, 2).max(-1)[0]
        x = torch.max(self.second(x).view(x.size(0), 3, 2), dim=1).values
        x = self.third(x).unflatten(-1, (-1, 3)).max(-2).values
        return self.fourth(x).unflatten(1, (2, 2)).max(2)[0]


class Branches(nn.Module):
    """Both summands are chains; concatenated branches, as in SqueezeNet."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(4, 4, 1)
        self.right = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.act = nn.LeakyReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm(self.left(x)) + self.right(x))
        return torch.cat([self.act(self.left(y)), self.act(self.right(y))], 1)


Block = nn.Sequential
IMAGES, ROWS = (2, 4, 6, 6), (5, 6)
PATTERNS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, str]]] = {
    "conv, act": (lambda: Block(nn.Conv2d(4, 3, 3), nn.GELU()), IMAGES, {"0": "1"}),
    "conv, act, pool": (lambda: Block(nn.Conv2d(4, 3, 3), nn.ReLU(), nn.MaxPool2d(2)), IMAGES, {"0": "1, 2"}),
    "conv, pool, act": (
        lambda: Block(nn.Conv2d(4, 3, 3), nn.MaxPool2d(3, 2, 1), nn.ReLU(inplace=True)),
        IMAGES,
        {"0": "1, 2"},
    ),
    "conv, norm, act, pool": (
        lambda: Block(nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.MaxPool2d(2), nn.Conv2d(3, 2, 1)),
        IMAGES,
        {"0": "1, 2, 3"},
    ),
    "conv, norm": (
        lambda: Block(nn.Conv2d(4, 4, 3, padding="same", groups=2), nn.BatchNorm2d(4, momentum=None)),
        IMAGES,
        {"0": "1"},
    ),
    "norm without statistics": (
        lambda: Block(
            nn.Conv2d(4, 3, 3, padding=2, padding_mode="circular"), nn.BatchNorm2d(3, 1e-3, 0.1, False, False)
        ),
        IMAGES,
        {"0": "1"},
    ),
    "norm, act": (lambda: Block(nn.BatchNorm1d(6), nn.Sigmoid(), nn.BatchNorm1d(6)), ROWS, {"0": "1"}),
    "synchronised norm, act": (lambda: Block(nn.SyncBatchNorm(6), nn.ReLU()), ROWS, {"0": "1"}),
    "linear, act, dropout": (
        lambda: Block(nn.Linear(6, 4), nn.LeakyReLU(0.3), nn.Dropout(0.0), nn.Linear(4, 3), nn.Hardtanh(-0.5, 0.25)),
        ROWS,
        {"0": "1, 2", "3": "4"},
    ),
    "linear, norm": (lambda: Block(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.ReLU()), ROWS, {"1": "2"}),
    "linear, pool of pieces": (lambda: Block(nn.Linear(6, 8), nn.MaxPool1d(2)), ROWS, {"0": "1"}),
    "nested": (
        lambda: Block(Block(nn.Conv2d(4, 3, 3), nn.ReLU()), Block(Block(nn.BatchNorm2d(3), nn.ELU()), nn.Flatten())),
        IMAGES,
        {"0.0": "0.1", "1.0.0": "1.0.1"},
    ),
    "residual": (Residual, IMAGES, {"conv1": "bn1, relu", "conv2": "bn2, relu"}),
    "residual of a convolution": (
        lambda: Residual(Block(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4))),
        IMAGES,
        {"conv1": "bn1, relu", "conv2": "bn2, relu", "downsample.0": "downsample.1"},
    ),
    "functions": (
        Functional,
        IMAGES,
        {
            "conv1": "the functions behind it",
            "conv2": "norm",
            "fc1": "the functions behind it",
            "fc2": "the functions behind it",
        },
    ),
    "norm first": (PreActivation, IMAGES, {"norm": "act", "conv": "the functions behind it"}),
    "maximum over pieces": (
        Pieces,
        ROWS,
        dict.fromkeys(("first", "second", "third", "fourth"), "the functions behind it"),
    ),
    "branches": (Branches, IMAGES, {"left": "act", "right": "act"}),
}


#: Those that the quick suite leaves out.
LONG = ("residual of a convolution", "branches", "norm without statistics", "linear, norm", "conv, norm", "norm first")
MARKS = {**dict.fromkeys(LONG, pytest.mark.thorough), "conv, act, pool": pytest.mark.smoke}
SHORT_AND_LONG = [pytest.param(name, marks=MARKS.get(name, ())) for name in PATTERNS]


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


@needs_kernels
@pytest.mark.parametrize(
    ("name", "operations"),
    [
        ("conv, act, pool", {"conv_act_pool2d"}),
        ("conv, pool, act", {"conv_act_pool2d"}),
        ("norm, act", {"batch_norm_act", "batch_norm"}),
        ("linear, act, dropout", {"bias_activation_dropout"}),
        ("linear, pool of pieces", {"maxout_linear"}),
        ("maximum over pieces", {"maxout_linear"}),
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
        ("conv1", "conv_act_pool2d", "kernel"),
        ("conv2", "conv_act_pool2d", "kernel"),
    ]
    assert str(explanation).endswith("2 of 2 on kernels, 4 fused")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


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


# --- What prevents fusion ---------------------------------------------------------------------------------------------


def conv_norm_act() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())


def reasons(model: nn.Module, **kwargs: object) -> dict[str, str]:
    report = fusednn.replace_layers(model, fuse=True, **kwargs)
    return {row.names[0]: row.reason for row in report.rows + report.untraced}


HOOKS = ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]


@pytest.mark.parametrize("hook", [*HOOKS, "register_full_backward_pre_hook"])
def test_hooks_on_a_layer_prevent_its_fusion(hook: str, device: str) -> None:
    stock = make(conv_norm_act(), device)
    model = copy.deepcopy(stock)
    calls: list[int] = []
    getattr(model[2], hook)(lambda *_: calls.append(1))
    found = reasons(model)
    assert found["0"] == "fused with 1"
    assert found["2"] == "swapped for its twin; not fused: has hooks"
    assert_same(model, stock, batch(*IMAGES, device=device))
    assert len(calls) == 2


@pytest.mark.parametrize("hook", [HOOKS[0], *(pytest.param(hook, marks=pytest.mark.thorough) for hook in HOOKS[1:])])
def test_hooks_that_come_later_are_called(hook: str, device: str) -> None:
    stock = make(conv_norm_act(), device)
    model = copy.deepcopy(stock)
    fusednn.replace_layers(model, fuse=True)
    calls: list[int] = []
    handles = [getattr(layer, hook)(lambda *_: calls.append(1)) for layer in model]
    assert_same(model, stock, batch(*IMAGES, device=device))
    assert len(calls) == 6
    for handle in handles:
        handle.remove()
    assert_same(model, stock, batch(*IMAGES, device=device))
    assert len(calls) == 6


def test_the_hook_of_an_activation_sees_what_comes_before_it(device: str) -> None:
    model = make(conv_norm_act(), device)
    seen = []
    model[2].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].min()))
    fusednn.replace_layers(model, fuse=True)
    model(batch(*IMAGES, device=device))
    assert seen[0] < 0


def test_hooks_of_the_module_around_stay(device: str) -> None:
    model = make(conv_norm_act(), device)
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    assert reasons(model)["0"] == "fused with 1, 2"
    model(batch(*IMAGES, device=device))
    assert calls == [1]


class UsedTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.act(y) - y


class Returned(UsedTwice):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return torch.stack([y, self.act(y)])


class Captured(UsedTwice):
    """The identity is changed in place: by another name, ``x += y``."""

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        identity = x
        x += self.act(self.conv(2 * x))
        return x + identity


class ChangedBetween(UsedTwice):
    """The input of the convolution is changed before its output is activated."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach() * 1
        y = self.conv(x)
        x.relu_()
        return self.act(y + x)


class IntoTheOther(UsedTwice):
    """``identity += y`` changes the identity."""

    def forward(self, x: Tensor) -> Tensor:
        identity = x * 1
        other = identity
        identity += self.conv(x)
        return self.act(identity) * other


class Counting(UsedTwice):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.act(self.conv(x)) * self.calls


class Chance(UsedTwice):
    def forward(self, x: Tensor) -> Tensor:
        if random.random() < 0.5:
            return self.act(self.conv(x))
        return self.conv(x)


class Noisy(UsedTwice):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x)) + torch.rand(1)


class NoGradient(UsedTwice):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.act(self.conv(x))
        return x * y


class Decorated(UsedTwice):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x))


class AsksGlobally(UsedTwice):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.act(y) if torch.is_grad_enabled() else y


class AsksTheType(UsedTwice):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y if isinstance(x, Tensor) else self.act(y)


class AsksTheShape(UsedTwice):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x)) if x.shape[0] > 1 else self.conv(x)


def scaled(x: Tensor) -> Tensor:
    return x * FACTOR


FACTOR = 2.0


class CallsAHelper(UsedTwice):
    def forward(self, x: Tensor) -> Tensor:
        return scaled(self.act(self.conv(x)))


class Keeping(UsedTwice):
    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.kept.append(x)
        return self.act(self.conv(x))


class Printing(UsedTwice):
    def forward(self, x: Tensor) -> Tensor:
        print("called")
        return self.act(self.conv(x))


class Clamp(nn.Module):
    """Changes its input."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp_(min=0)


class ChangesItsInput(UsedTwice):
    def __init__(self) -> None:
        super().__init__()
        self.other = Clamp()

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach() * 1
        y = self.conv(x)
        z = self.other(x)
        y += z
        return self.act(y)


APART = {
    UsedTwice: "its output is used more than once",
    Returned: "its output is used more than once",
    ChangedBetween: "something else happens in between",
    ChangesItsInput: "something else happens in between",
    IntoTheOther: None,
    Counting: "its code does more than compute",
    Chance: "its code uses 'random'",
    Noisy: "its code makes tensors",
    NoGradient: "its code handles exceptions or contexts",
    Decorated: "'forward' is not a plain method",
    AsksGlobally: "its code uses 'is_grad_enabled'",
    AsksTheType: "its code uses 'isinstance'",
    AsksTheShape: "its code can't be traced (TraceError)",
    CallsAHelper: "its code uses 'scaled'",
    Keeping: "its code reads the attribute 'kept'",
    Printing: "its code uses 'print'",
}


@pytest.mark.parametrize("cls", APART)
def test_code_that_keeps_its_layers_apart(
    cls: type[nn.Module], device: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if cls is Noisy and device != "cpu":
        pytest.skip("the code makes tensors of the CPU")
    stock = make(cls(), device)
    model = copy.deepcopy(stock)
    found = reasons(model)
    assert not any(reason.startswith("fused") for reason in found.values())
    if APART[cls] is not None:
        assert any(reason.endswith(APART[cls]) for reason in found.values()), found
    assert type(model) is cls
    assert vars(model).keys() == vars(stock).keys()
    assert not getattr(model, "kept", ())
    assert not getattr(model, "calls", 0)
    assert not capsys.readouterr().out
    if cls not in (Chance, Noisy, Decorated, NoGradient):
        x = batch(*IMAGES, device=device)
        expected = stock(x)
        torch.testing.assert_close(model(x), expected)


def test_in_place_sums_reach_other_names(device: str) -> None:
    stock = make(Captured(), device)
    model = copy.deepcopy(stock)
    assert reasons(model)["conv"] == "fused with act"
    assert_same(model, stock, batch(*IMAGES, device=device))


def test_the_report_says_where_code_cannot_be_traced() -> None:
    report = fusednn.replace_layers(nn.Sequential(AsksTheShape(), conv_norm_act()), fuse=True)
    assert str(report).splitlines()[-2:] == [
        "5 of 5 layers replaced",
        "no neighbours fused in 0 (AsksTheShape): its code can't be traced (TraceError)",
    ]
    assert len(fusednn.replace_layers(AsksTheShape()).untraced) == 0


def test_the_report_counts_modules_alike() -> None:
    report = fusednn.replace_layers(nn.Sequential(AsksTheShape(), AsksTheShape(), AsksTheShape()), fuse=True)
    assert str(report).endswith(
        "no neighbours fused in 0 and 2 alike (AsksTheShape): its code can't be traced (TraceError)"
    )


class Final(UsedTwice):
    """No class can be derived from it."""

    def __init_subclass__(cls) -> None:
        raise ValueError("final")

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x))


def test_a_class_that_forbids_others_to_derive_from_it(device: str) -> None:
    model = make(Final(), device)
    assert reasons(model)[""] == "no class can be derived from its class (ValueError)"
    assert type(model) is Final
    model(batch(*IMAGES, device=device))


class LoudReLU(nn.ReLU):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


@pytest.mark.parametrize(
    ("last", "reason"),
    [
        (LoudReLU(), "subclass of ReLU, may override it"),
        (nn.LeakyReLU(0.5), "swapped for its twin; not fused: has other parameters than the defaults"),
        (nn.Softplus(), "swapped for its twin"),  # float32 under autocast
        (nn.PReLU(), "swapped for its twin"),
        (nn.MaxPool2d(2, ceil_mode=True), "swapped for its twin"),
        (nn.MaxPool2d(2, dilation=2), "swapped for its twin"),
        (nn.MaxPool2d(2, return_indices=True), "swapped for its twin"),
    ],
)
def test_layers_that_are_not_fused(last: nn.Module, reason: str, device: str) -> None:
    stock = make(nn.Sequential(nn.Conv2d(4, 4, 1), last), device)
    model = copy.deepcopy(stock)
    assert reasons(model)["1"] == reason
    x = batch(*IMAGES, device=device)
    torch.testing.assert_close(model(x), stock(x))


def test_saved_maxima_are_not_given_to_code_that_may_change_them(device: str) -> None:
    """Stock allows to change what pooling returns, whatever the activation before it saved."""
    stock = make(nn.Sequential(nn.Conv2d(4, 4, 1), nn.Tanh(), nn.MaxPool2d(2), nn.Dropout(0.0, inplace=True)), device)
    model = copy.deepcopy(stock)
    assert reasons(model)["0"] == "fused with 1"
    assert_same(model, stock, batch(*IMAGES, device=device))


def test_parametrized_layers_are_not_fused(device: str) -> None:
    stock = make(conv_norm_act(), device)
    nn.utils.parametrizations.weight_norm(stock[0])
    model = copy.deepcopy(stock)
    assert reasons(model)["1"] == "fused with 2"
    assert_same(model, stock, batch(*IMAGES, device=device))


def test_selection_applies_to_every_layer(device: str) -> None:
    assert reasons(conv_norm_act(), exclude="1") == {
        "0": "swapped for its twin",
        "1": "excluded",
        "2": "swapped for its twin",
    }
    assert reasons(conv_norm_act(), include=["0", "1"])["0"] == "fused with 1"
    assert (
        reasons(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), exclude=nn.Linear)["0"]
        == "no fusednn twin; not fused: excluded"
    )


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


class Options(UsedTwice):
    def forward(self, x: Tensor, scale: Tensor | None = None, twice: bool = False) -> Tensor:
        y = self.act(self.conv(x))
        if scale is not None:
            y = y * scale
        return y + y if twice else y


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


# --- Undoing, copying, company ----------------------------------------------------------------------------------------


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
