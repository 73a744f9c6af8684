"""Decisions that are kept: whatever changes between two calls, the second does what it would if it were the first."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import fusednn
from fusednn import autograd
from fusednn.autograd import decisions, plans
from fusednn.autograd.dispatch import Choice, judged_as_compiled, observe_choices
from fusednn.kernels.base.device import LaunchError
from fusednn.testing import assert_same_bits

pytestmark = pytest.mark.kernels


KEPT_CALL = decisions._KEPT_CALL


@pytest.fixture(autouse=True)
def _kept_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decisions, "_KEPT_CALL", 1)


@pytest.fixture
def followed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The functions whose decision was found; plans' are others."""
    found = []
    find = decisions.Calls.find

    def noted(self: plans.Calls, arguments: tuple[Any, ...]) -> Any:
        kept = find(self, arguments)
        if kept is not None and self in decisions._DECISIONS:
            found.append(self)
        return kept

    monkeypatch.setattr(plans.Calls, "find", noted)
    return found  # type: ignore[return-value]


def images(*shape: int, **options: Any) -> Tensor:
    return torch.linspace(-2, 2, torch.Size(shape).numel(), **options).view(shape)


def norm(x: Tensor, **options: Any) -> Tensor:
    channels = x.shape[1]
    vectors = [torch.linspace(0.5, 1.5, channels, dtype=x.dtype, device=x.device) for _ in range(4)]
    given = {"training": True, "activation": "leaky_relu", **options}
    return autograd.batch_norm_act(x, *vectors, **given)


def conv(x: Tensor, **options: Any) -> Tensor:
    weight = images(4, x.shape[-3], 3, 3, dtype=x.dtype).to(x.device)
    given = {"activation": "leaky_relu", "pool_size": 2, **options}
    return autograd.conv_act_pool2d(x, weight, **given)


def conv_norm(x: Tensor, **options: Any) -> Tensor:
    weight = images(4, x.shape[1], 3, 3, dtype=x.dtype).to(x.device)
    vectors = [torch.linspace(0.5, 1.5, 4, dtype=x.dtype, device=x.device) for _ in range(4)]
    given = {"training": True, "pool_size": 2, **options}
    return autograd.conv_batch_norm_act2d(x, weight, None, *vectors, **given)


def pool(x: Tensor, kernel_size: Any = 2, **options: Any) -> Tensor:
    y: Any = autograd.max_pool2d(x, kernel_size, **options)
    return y if isinstance(y, Tensor) else y[0] + y[1]


def dropped(x: Tensor, **options: Any) -> Tensor:
    torch.manual_seed(1)
    return autograd.bias_activation_dropout(x, **options)


def loss(x: Tensor, **options: Any) -> Tensor:
    classes = torch.arange(x.shape[2] * x.shape[3], device=x.device).view(1, *x.shape[2:]) % x.shape[1]
    given = {"target": classes.expand(x.shape[0], -1, -1), "weight": None, **options}
    return autograd.cross_entropy(x, **given)


def soft(x: Tensor, **options: Any) -> Tensor:
    return autograd.softmax(x, **{"dim": 1, **options})


def sloped(x: Tensor, **options: Any) -> Tensor:
    return autograd.prelu(x, **{"weight": torch.full((1,), 0.5, dtype=x.dtype, device=x.device), **options})


def elements(x: Tensor, function: str = "dropout", **options: Any) -> Tensor:
    torch.manual_seed(1)
    return getattr(autograd, function)(x, **{"training": True, **options})  # type: ignore[no-any-return]


def distance(x: Tensor, function: str = "huber_loss", **options: Any) -> Tensor:
    return getattr(autograd, function)(x, **{"target": torch.ones_like(x), **options})  # type: ignore[no-any-return]


def likelihood(x: Tensor, **options: Any) -> Tensor:
    classes = torch.arange(x.shape[2] * x.shape[3], device=x.device).view(1, *x.shape[2:]) % x.shape[1]
    return autograd.nll_loss(x, **{"target": classes.expand(x.shape[0], -1, -1), **options})


X = images(2, 3, 6, 6)
CHANGES: list[tuple[Callable[..., Tensor], Tensor, dict[str, Any]]] = [
    *((function, images(*shape), {}) for function in (norm, conv, conv_norm) for shape in ((2, 3, 8, 6), (1, 3, 6, 6))),
    *((function, X.double(), {}) for function in (norm, conv, conv_norm)),
    *((function, X.to(memory_format=torch.channels_last), {}) for function in (norm, conv, conv_norm)),
    *((function, X.clone().requires_grad_(), {}) for function in (norm, conv, conv_norm)),
    *((function, X.to(torch.int64), {}) for function in (norm,)),  # stock's, which raises
    *((norm, X, {"activation_parameters": (slope,)}) for slope in (0.5, 0.0, -0.0, 1, True, float("nan"))),
    *((norm, X, change) for change in ({"activation": "relu"}, {"activation": None}, {"training": False})),
    *((norm, X, change) for change in ({"eps": 1.0}, {"eps": -1.0}, {"momentum": 1}, {"momentum": 1.0})),
    *((norm, X, change) for change in ({"residual": X}, {"residual": X[:1]}, {"batches": torch.tensor(3)})),
    *((conv, X, {"pool_size": size}) for size in (None, 3, (2, 3), [2, 2], 1, 0)),
    *((conv, X, change) for change in ({"padding": 1}, {"padding": "same"}, {"stride": 2}, {"groups": 2})),
    *((conv, X, change) for change in ({"pool_stride": 1}, {"pool_padding": 1}, {"residual": images(2, 4, 4, 4)})),
    (conv, X[0], {}),
    *((function, x, {}) for function in (pool, dropped, loss) for x in (X.double(), X[:1], X.clone().requires_grad_())),
    *((pool, X, change) for change in ({"kernel_size": 3}, {"kernel_size": [2, 2]}, {"kernel_size": 0}, {"stride": 1})),
    *((pool, X, change) for change in ({"return_indices": True}, {"ceil_mode": True}, {"ceil_mode": 1})),
    *((dropped, X, change) for change in ({"p": 0.25}, {"p": 0}, {"p": 2.0}, {"training": False}, {"dim": 1})),
    *((dropped, X, change) for change in ({"activation": None}, {"activation": "gelu"}, {"activation": "none"})),
    *((dropped, X, change) for change in ({"bias": X[0, 0, 0]}, {"residual": X}, {"slopes": X[0, 0, 0, :1]})),
    *((loss, X, change) for change in ({"reduction": "none"}, {"reduction": "sum"}, {"reduction": "product"})),
    *((loss, X, change) for change in ({"label_smoothing": 0.5}, {"ignore_index": 1}, {"weight": X[0, 0, 0, 3:]})),
    *((loss, X, change) for change in ({"size_average": False}, {"target": X.softmax(1)}, {"target": X[:, 0]})),
    *(
        (function, x, {})
        for function in (autograd.gelu, soft, sloped, elements, distance, likelihood)
        for x in (X.double(), X[:1], X.mT, X.clone().requires_grad_())
    ),
    *((autograd.gelu, X, change) for change in ({"approximate": "tanh"}, {"approximate": "fast"})),
    *((soft, X, change) for change in ({"dim": -1}, {"dim": 4}, {"dim": True}, {"dtype": torch.float64})),
    *((sloped, X, {"weight": weight}) for weight in (X[0, 0, 0, :3], X[0, 0, 0, :2], X[0, 0, 0, 0])),
    *((elements, X, change) for change in ({"p": 0.25}, {"p": 0}, {"p": 1}, {"p": -1.0}, {"training": False})),
    *((elements, X, {"function": name}) for name in ("dropout1d", "dropout2d", "feature_alpha_dropout")),
    *((elements, X[0], {"function": name}) for name in ("dropout1d", "dropout3d")),
    *((distance, X, change) for change in ({"delta": 0.5}, {"delta": 0}, {"reduction": "sum"}, {"weight": X.abs()})),
    *((distance, X, {"function": name}) for name in ("l1_loss", "mse_loss", "smooth_l1_loss", "kl_div")),
    *((distance, X, change) for change in ({"target": X[:1]}, {"weight": X[:1].abs()}, {"reduction": "product"})),
    *((likelihood, X, change) for change in ({"reduction": "none"}, {"ignore_index": 1}, {"weight": X[0, 0, 0, 3:]})),
    *((conv_norm, X, change) for change in ({"pool_size": None}, {"pool_size": 3}, {"momentum": 0.5}, {"eps": 1.0})),
]


def outcome(function: Callable[..., Tensor], x: Tensor, options: dict[str, Any]) -> Any:
    """Value, and gradient if there is one, or the error."""
    try:
        y = function(x, **options)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        return str(error)
    gradient = torch.autograd.grad(y.sum(), x)[0] if y.requires_grad else None
    return y.detach(), gradient


@pytest.mark.parametrize(("function", "x", "options"), CHANGES)
def test_whatever_changes(function: Callable[..., Tensor], x: Tensor, options: dict[str, Any], device: str) -> None:
    """There and back: shape, dtype, memory format, gradients, options, values that are equal and mean another thing."""
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in options.items()}
    calls = [(X.to(device), {}), (x.detach().to(device).requires_grad_(x.requires_grad), moved)]
    for operand, given in calls * 2:
        found = outcome(function, operand, given)
        with observe_choices(lambda choice: None):
            expected = outcome(function, operand, given)
        if isinstance(expected, str):
            assert found == expected
            continue
        for one, other in zip(found, expected, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                assert_same_bits(one, other)
                assert one.stride() == other.stride()


@pytest.mark.parametrize("function", [norm, conv, conv_norm, pool, dropped, loss])
def test_found_where_nothing_changed(function: Callable[..., Tensor], device: str, followed: list[str]) -> None:
    x = X.to(device)
    function(x)
    followed.clear()
    function(-x)
    assert followed


def test_the_third_call_is_kept(device: str, followed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes that come once or twice aren't worth it."""
    monkeypatch.setattr(decisions, "_KEPT_CALL", KEPT_CALL)
    x, found = X.to(device), []
    for _ in range(5):
        norm(x)
        found.append(bool(followed))
    assert found == [False, False, False, True, True]


@pytest.mark.parametrize("first", [True, False])
def test_modes_of_gradients(first: bool, device: str) -> None:
    """A decision for gradients is none without them, and the other way round, whichever comes first."""
    x = X.to(device).clone().requires_grad_()
    for enabled in (first, not first) * 2:
        with torch.set_grad_enabled(enabled):
            for function in (norm, conv, conv_norm, pool, dropped, loss, soft, sloped, elements, distance):
                assert function(x).requires_grad == enabled
        with torch.inference_mode(not enabled):
            assert norm(X.to(device)).is_inference() != enabled


def test_autocast_has_its_say(device: str) -> None:
    """Each dtype of autocast, one after the other."""
    x = X.to(device)
    kind = torch.device(device).type
    for dtype in (None, torch.bfloat16, torch.float16) * 2:
        with torch.autocast(kind, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            assert conv(x).dtype == (dtype or torch.float32)
            assert norm(x).dtype == torch.float32


@pytest.mark.parametrize("function", [norm, conv, conv_norm, pool, dropped, loss])
def test_observers_hear_of_kept_decisions(function: Callable[..., Tensor], device: str) -> None:
    x = X.to(device)
    heard: list[list[Choice]] = []
    for _ in range(3):
        function(x)
        heard.append([])
        with observe_choices(heard[-1].append):
            function(x)
    assert heard[0] == heard[1] == heard[2]
    assert heard[0]


def test_the_compilers_choices_are_others(device: str) -> None:
    x = X.to(device)
    norm(x)
    heard: list[Choice] = []
    with judged_as_compiled(nn.Identity()):
        norm(x)
        with observe_choices(heard.append):
            norm(x)
    assert not heard[0].kernel
    heard.clear()
    norm(x)
    with observe_choices(heard.append):
        norm(x)
    assert heard[0].kernel


@pytest.mark.parametrize("function", [norm, conv, conv_norm, pool, dropped, loss])
def test_no_operand_is_kept(function: Callable[..., Tensor], device: str) -> None:
    x = X.to(device).clone().requires_grad_()
    function(x)
    gone = weakref.ref(x)
    del x
    gc.collect()
    assert gone() is None


def test_tensors_that_took_a_parameters_place(device: str) -> None:
    """A parameter is read anew in each call, wherever it is."""
    layer = fusednn.layers.BatchNormAct2d(3).to(device)
    x = X.to(device)
    y = layer(x).detach()
    with torch.no_grad():
        layer.bn.weight.mul_(2)
    assert_same_bits(layer(x).detach(), 2 * y)
    layer.bn.weight = nn.Parameter(torch.ones(3, device=device))
    assert_same_bits(layer(x).detach(), y)
    del layer.bn.weight
    layer.bn.weight = torch.full((3,), 2.0, device=device)
    assert_same_bits(layer(x), 2 * y)
    called = torch.func.functional_call(layer.bn, {"bias": torch.ones(3, device=device)}, (x,))
    assert called.min() < 0


def test_memory_is_bounded(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "_MOST", 4)
    own = plans.Calls()
    for n in range(30):
        arguments = (torch.ones(n, device=device),)
        own.count(arguments)
        own.keep(arguments, plans.guards(arguments), n)
        assert own.find(arguments) == n
        (form,) = own._forms.values()
        assert len(form.kept) <= len(form.counts) <= 5


def test_a_launch_that_fails_is_decided_again(device: str) -> None:
    """In the first call, and in one whose decision is kept."""
    x, fails = X.to(device), False

    def launched(x: Tensor) -> str:
        if fails:
            raise LaunchError
        return "kernel"

    decided = decisions.decided_once(lambda x: (lambda x: "stock") if fails else launched)  # type: ignore[arg-type,return-value]
    assert [decided(x), decided(x)] == ["kernel"] * 2
    fails = True
    assert decided(x) == "stock"

    refused: list[None] = []

    def fail(x: Tensor) -> str:
        refused.append(None)
        raise LaunchError

    first = decisions.decided_once(lambda x: (lambda x: "stock") if refused else fail)  # type: ignore[arg-type,return-value]
    assert first(x) == "stock"


class Sizes(NamedTuple):
    height: int
    width: int


def test_what_is_fixed(device: str) -> None:
    """Values that are equal to others that say something else aren't, nor operands that PyTorch does some work on."""
    x = torch.ones(3, device=device)
    for value in (True, 1, 0.5, "same", None, torch.float32, (1, 2), torch.Size([1]), x):
        assert decisions._is_fixed((value,)), value
    for value in ((0.0, 1), (True, 1), ((1, 2), 3), [1, 2], Sizes(1, 2), torch._neg_view(x), {1}):
        assert not decisions._is_fixed((x, value)), value
    torch.func.vmap(lambda row: row.add_(not decisions._is_fixed((1,))))(x)
    assert x.tolist() == [2, 2, 2]
