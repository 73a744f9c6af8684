"""Fused neighbours that fail: nothing that a later layer changes happens before an earlier one has succeeded."""

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support.fusion import IMAGES, PATTERNS, ROWS, Beside, batch, fused_groups, make, outcome
from torch import Tensor, nn

import fusednn
from fusednn.autograd import convolution
from fusednn.autograd import stock as stock_functions

needs_kernels = pytest.mark.kernels


def state(model: nn.Module) -> list[Tensor]:
    """All that a call may change: buffers, and the generator of the CPU, which the interpreter's seeds come from."""
    return [*(buffer.clone() for buffer in model.buffers()), torch.get_rng_state()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.allclose(a.double(), b.double(), rtol=1e-9, atol=1e-9) for a, b in zip(one, other, strict=True))


@contextmanager
def memory_ends_at(event: int) -> Iterator[list[str]]:
    """Raise out of memory at this launch or product, of all that are made; yields what was made until then."""
    made: list[str] = []

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if len(made) == event:
                raise torch.OutOfMemoryError("as if")
            made.append(name)
            return function(*args, **kwargs)

        return call

    places: list[tuple[Any, str]] = [(stock_functions, "conv2d"), (stock_functions, "linear")]
    places.append((convolution.Convolution, "product"))
    homes = (("fusednn.kernels.", "launch"), ("fusednn.autograd.", "stock_convolution"), ("fusednn.layers.", "conv2d"))
    for home, function in homes:
        modules = [module for name, module in sys.modules.items() if name.startswith(home)]
        places += [(module, function) for module in modules if callable(getattr(module, function, None))]
    with pytest.MonkeyPatch.context() as patch:
        for place, name in places:
            patch.setattr(place, name, counted(name, getattr(place, name)))
        yield made


def states_on_the_way(model: nn.Module, x: Tensor) -> list[list[Tensor]]:
    """The states that there are before each of stock's layers, and where a batch norm has counted and no more."""
    found = []

    def look(layer: nn.Module, _: Any) -> None:
        found.append(state(model))
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.num_batches_tracked is not None:
            layer.num_batches_tracked += 1
            found.append(state(model))
            layer.num_batches_tracked -= 1

    handles = [layer.register_forward_pre_hook(look) for layer in model.modules() if not list(layer.children())]
    model(x)
    for handle in handles:
        handle.remove()
    return [*found, state(model)]


LONG = (
    *("functions", "branches", "nested", "conv, norm", "norm without statistics", "maximum over pieces", "conv, act"),
    "residual of a convolution",
)
NAMES = [pytest.param(name, marks=pytest.mark.thorough) if name in LONG else name for name in PATTERNS]


@needs_kernels
@pytest.mark.parametrize("name", NAMES)
def test_out_of_memory(name: str, device: str) -> None:
    build, shape, _ = PATTERNS[name]
    original = make(build(), device)
    x = batch(*shape, device=device)
    stock = copy.deepcopy(original)
    torch.manual_seed(0)
    allowed = states_on_the_way(stock, x)
    event, failed = 0, True
    while failed:
        model = copy.deepcopy(original)
        fusednn.replace_layers(model, fuse=True)
        torch.manual_seed(0)
        failed = False
        with memory_ends_at(event):
            try:
                model(x)
            except torch.OutOfMemoryError:
                failed = True
        reached = state(model)
        assert any(same(reached, one) for one in allowed), f"after {event} launches and products"
        first = next(layer for layer in stock.modules() if not list(layer.children()))
        if event == 0 and isinstance(first, nn.Conv2d):
            assert same(reached, allowed[0])
        event += 1
    assert event > 2 or "norm" not in name


@needs_kernels
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("build", [lambda: nn.Conv2d(4, 4, 1), lambda: nn.BatchNorm2d(4)])
def test_a_first_layer_that_has_no_statistics_to_begin_with(
    build: Callable[[], nn.Module], frozen: bool, device: str
) -> None:
    stock = make(Beside(build(), nn.BatchNorm2d(4)), device)
    stock.first.train(not frozen)
    model = copy.deepcopy(stock)
    assert fused_groups(fusednn.replace_layers(model, fuse=True)) == {"first": "act"}
    x = batch(*IMAGES, device=device)
    wrong = batch(2, 3, 6, 6, device=device)
    for one in (stock, model):
        with pytest.raises(RuntimeError):
            one(wrong)
    assert same(state(model), state(stock))
    torch.testing.assert_close(outcome(model, x), outcome(stock, x))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", [name for name in PATTERNS if "norm" in name or "residual" in name])
def test_wrong_shapes(name: str, training: bool, device: str) -> None:
    build, shape, _ = PATTERNS[name]
    stock = make(build(), device).train(training)
    model = copy.deepcopy(stock)
    fusednn.replace_layers(model, fuse=True)
    wrong = [(shape[0], shape[1] + 1, *shape[2:]), (1, *shape[1:], 1, 1), (3,)]
    for x in (batch(*sizes, device=device) for sizes in wrong):
        found = []
        for one in (stock, model):
            torch.manual_seed(0)
            error = None
            try:
                one(x)
            except (RuntimeError, ValueError, IndexError) as raised:
                error = (type(raised), str(raised))
            found.append((error, state(one)))
        (theirs, before), (mine, after) = found
        assert mine == theirs
        assert same(before, after)


class TiedStandout(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return fusednn.autograd.standout(x, x)


def generator_of(device: str) -> torch.Generator:
    return torch.cuda.default_generators[torch.cuda.current_device()] if device == "cuda" else torch.default_generator


@needs_kernels
@pytest.mark.parametrize("event", [0, 1])
@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Dropout(0.5)),
        lambda: fusednn.layers.Maxout(6, 4, 2, dropout=0.5, dropout_on="output"),
        lambda: nn.Dropout(0.5),
        lambda: nn.Dropout(0.5, inplace=True),
        lambda: nn.RReLU(),
        TiedStandout,
    ],
)
def test_a_seed_that_was_of_no_use_was_not_drawn(build: Callable[[], nn.Module], event: int, device: str) -> None:
    model = make(build(), device)
    fusednn.replace_layers(model, fuse=True)
    x = batch(*ROWS, device=device)
    generator = generator_of(device)
    torch.manual_seed(0)
    expected, after = model(x.clone()), generator.get_state()
    torch.manual_seed(0)
    before = generator.get_state()
    with memory_ends_at(event) as made:
        try:
            model(x.clone())
        except torch.OutOfMemoryError:
            assert torch.equal(generator.get_state(), before)
        else:
            assert len(made) <= event
            return
    assert torch.equal(model(x), expected)
    assert torch.equal(generator.get_state(), after)


@needs_kernels
@pytest.mark.parametrize(("event", "drawn"), [(0, False), (1, True)])
def test_weights_are_dropped_before_their_product(event: int, drawn: bool, device: str) -> None:
    layer = make(fusednn.layers.DropConnect(6, 4), device)
    before = generator_of(device).get_state()
    with memory_ends_at(event), pytest.raises(torch.OutOfMemoryError):
        layer(batch(*ROWS, device=device))
    assert torch.equal(generator_of(device).get_state(), before) is not drawn


#: Functions that draw, and what stock raises for: some of it after it has drawn.
FAILING: dict[str, Callable[[Any, str], Tensor]] = {
    "integers": lambda F, device: F.dropout(torch.ones(4, dtype=torch.int64, device=device)),
    "a leaf in place": lambda F, device: F.dropout(torch.ones(4, device=device, requires_grad=True), inplace=True),
    "expanded in place": lambda F, device: F.dropout(torch.ones(1, device=device).expand(4), inplace=True),
    "no probability": lambda F, device: F.dropout(torch.ones(4, device=device), 2.0),
    "no channels": lambda F, device: F.feature_alpha_dropout(torch.ones(4, device=device), 0.5, True),
    "integers, alpha": lambda F, device: F.alpha_dropout(torch.ones(4, dtype=torch.int64, device=device), 0.5, True),
    "integers, RReLU": lambda F, device: F.rrelu(-torch.ones(4, dtype=torch.int64, device=device), training=True),
    "a leaf in place, RReLU": lambda F, device: F.rrelu(
        torch.full((4,), -1.0, device=device, requires_grad=True), training=True, inplace=True
    ),
    "bounds, RReLU": lambda F, device: F.rrelu(torch.ones(4, device=device), 2.0, 1.0, training=True),
}


@pytest.mark.whole
@pytest.mark.parametrize("name", FAILING)
def test_a_function_that_raises_has_drawn_where_stock_has(name: str, device: str) -> None:
    found = []
    for functions in (stock_functions, fusednn.autograd):
        before = generator_of(device).get_state()
        with pytest.raises((RuntimeError, ValueError, NotImplementedError)) as raised:
            FAILING[name](functions, device)
        found.append((str(raised.value), torch.equal(generator_of(device).get_state(), before)))
    assert found[0] == found[1]


@needs_kernels
def test_the_layer_of_all_in_one(device: str) -> None:
    layer = make(fusednn.layers.ConvBatchNormAct2d(4, 3, 3, pool_size=2), device)
    x = batch(*IMAGES, device=device)
    before = state(layer)
    with memory_ends_at(0), pytest.raises(torch.OutOfMemoryError):
        layer(x)
    assert same(state(layer), before)
    with pytest.raises(RuntimeError):
        layer(batch(2, 5, 6, 6, device=device))
    assert same(state(layer), before)
