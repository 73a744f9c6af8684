"""What `replace_layers(fuse=True)` leaves apart, and what it says of it."""

import copy
import random

import pytest
import torch
from support.fusion import IMAGES, UsedTwice, assert_same, batch, conv_norm_act, make, reasons
from torch import Tensor, nn

import fusednn

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
        return self.act(identity) - other


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
    """Of a result, which a graph can't tell."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.act(y) if isinstance(y, Tensor) else y


class AsksItsChildren(UsedTwice):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.act(y) if isinstance(self.act, nn.ReLU) else y


class AsksTheShape(UsedTwice):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x)) if x.shape[0] > 1 else self.conv(x)


SEEN: list[Tensor] = []


def remembered(x: Tensor) -> Tensor:
    SEEN.append(x)
    return x


class CallsAHelper(UsedTwice):
    def forward(self, x: Tensor) -> Tensor:
        return remembered(self.act(self.conv(x)))


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


class CountsBetween(UsedTwice):
    """A batch norm counts before the activation: the chain may run neither before it nor after it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        z = self.norm(x)
        return self.act(y) - z


class DrawsBetween(UsedTwice):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        z = torch.dropout(x, 0.0, True)
        return self.act(y) + z


APART = {
    CountsBetween: "something else happens in between",
    DrawsBetween: "something else happens in between",
    UsedTwice: "its output is used more than once",
    Returned: "its output is used more than once",
    ChangedBetween: "something else happens in between",
    ChangesItsInput: "something else happens in between",
    IntoTheOther: None,
    Counting: "its code does more than compute",
    Chance: "its code uses 'random'",
    Noisy: "its code uses 'rand'",
    NoGradient: "its code handles exceptions or contexts",
    Decorated: "'forward' is not a plain function",
    AsksGlobally: "its code uses 'is_grad_enabled'",
    AsksTheType: "its code uses 'isinstance'",
    AsksItsChildren: "its code uses 'ReLU'",
    AsksTheShape: "its code can't be traced (TraceError)",
    CallsAHelper: "its code uses 'SEEN'",
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
        (nn.Softplus(), "swapped for its twin"),  # float32 under autocast
        (nn.MaxPool2d(2, ceil_mode=True), "swapped for its twin; not fused: has options that aren't fused"),
        (nn.MaxPool2d(2, dilation=2), "swapped for its twin; not fused: has options that aren't fused"),
        (nn.MaxPool2d(2, return_indices=True), "swapped for its twin; not fused: has options that aren't fused"),
    ],
)
def test_layers_that_are_not_fused(last: nn.Module, reason: str, device: str) -> None:
    stock = make(nn.Sequential(nn.Conv2d(4, 4, 1), last), device)
    model = copy.deepcopy(stock)
    assert reasons(model)["1"] == reason
    x = batch(*IMAGES, device=device)
    torch.testing.assert_close(model(x), stock(x))


def test_maxima_may_be_changed(device: str) -> None:
    """Stock allows to change what pooling returns, whatever the activation before it saved."""
    stock = make(nn.Sequential(nn.Conv2d(4, 4, 1), nn.Tanh(), nn.MaxPool2d(2), nn.Dropout(0.0, inplace=True)), device)
    model = copy.deepcopy(stock)
    assert reasons(model)["0"] == "fused with 1, 2"
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
    assert reasons(conv_norm_act(), include=["0", "1"]) == {
        "0": "fused with 1",
        "1": "fused into 0",
        "2": "not included",
    }
    assert (
        reasons(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), exclude=nn.Linear)["0"]
        == "no fusednn twin; not fused: excluded"
    )


class Amax(nn.Module):
    """Its gradient is shared among equal elements, unlike max's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv1d(4, 4, 1), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x)).amax(2) + self.act(x).mean(2)


def test_what_stays_apart_behind_a_chain() -> None:
    shared = make(Amax(), "cpu")
    stock = copy.deepcopy(shared)
    assert reasons(shared)["conv"] == "fused with act"
    assert_same(shared, stock, torch.zeros(2, 4, 3, dtype=torch.float64))  # all are equal
