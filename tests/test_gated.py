"""Gates: values, gradients and bytes of activation(gate) * other, of two tensors and of the halves of one; highways."""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from support.activations import STOCK
from support.device import FLOAT_DTYPES, KERNELS_RUN
from support.fusion import Halves, Highway
from torch import Tensor, nn

import fusednn
from fusednn import autograd, kernels
from fusednn.autograd.dispatch import observe_choices
from fusednn.instruments.saved_tensors import saved_tensors
from fusednn.kernels.gated import GATES
from fusednn.kernels.gated_highway import HIGHWAY_GATES
from fusednn.testing import LAYOUTS, check_against_stock, leaf, random_tensor

if kernels.INTERPRETING:
    from fusednn.instruments.traffic import measure_traffic


def stock_gate(activation: str) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda gate, other: STOCK[activation](gate) * other


def stock_halves(activation: str, dim: int, gate_first: bool) -> Callable[[Tensor], Tensor]:
    def halves(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim)
        return STOCK[activation](first) * second if gate_first else first * STOCK[activation](second)

    return halves


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("activation", GATES)
def test_two_tensors(activation: str, dtype: torch.dtype, device: str) -> None:
    gate, other, gradient = (random_tensor((3, 701), dtype, device, seed) for seed in range(3))
    ours = partial(autograd.gated, activation=activation)
    # Stock rounds the hard sigmoid's 1/6 to float32 even in float64.
    options = {"float32_constants": activation == "hardsigmoid"}
    check_against_stock(ours, stock_gate(activation), [gate, other], gradient, **options)


@pytest.mark.kernels
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, device: str) -> None:
    gate, other, gradient = (random_tensor((3, 6, 5, 4), torch.float32, device, seed) for seed in range(3))
    change = LAYOUTS[layout]
    for operands in ([change(gate), other, gradient], [change(gate), change(other), change(gradient)]):
        check_against_stock(autograd.gated, stock_gate("silu"), operands[:2], operands[2])


#: Shapes and dimensions: rows of few and of many columns, ragged, and one half that lies together.
HALVES = [((5, 14), -1), ((70, 1026), 1), ((2, 6, 5, 4), 1), ((4, 3), 0), ((2, 1, 8), -2 + 1)]


@pytest.mark.kernels
@pytest.mark.parametrize("gate_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "dim"), HALVES, ids=str)
def test_halves(shape: tuple[int, ...], dim: int, dtype: torch.dtype, gate_first: bool, device: str) -> None:
    x = random_tensor(shape, dtype, device)
    stock = stock_halves("gelu", dim, gate_first)
    ours = partial(autograd.gated_halves, dim=dim, activation="gelu", gate_first=gate_first)
    check_against_stock(ours, stock, [x], random_tensor(stock(x).shape, dtype, device, seed=1))


@pytest.mark.kernels
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_glu(dim: int, layout: str, device: str) -> None:
    x = LAYOUTS[layout](random_tensor((2, 6, 5, 4), torch.float32, device))
    gradient = random_tensor(F.glu(x, dim).shape, torch.float32, device, seed=1)
    check_against_stock(partial(autograd.glu, dim=dim), partial(F.glu, dim=dim), [x], gradient)
    assert autograd.glu(x, dim).stride() == F.glu(x, dim).stride() or "expanded" in layout


def stock_highway(activation: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def highway(gate: Tensor, h: Tensor, x: Tensor) -> Tensor:
        t = STOCK[activation](gate)
        return t * h + (1 - t) * x

    return highway


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("activation", HIGHWAY_GATES)
def test_highways(activation: str, dtype: torch.dtype, device: str) -> None:
    *operands, gradient = (random_tensor((3, 701), dtype, device, seed) for seed in range(4))
    ours = partial(autograd.highway, activation=activation)
    options = {"float32_constants": activation == "hardsigmoid"}
    check_against_stock(ours, stock_highway(activation), operands, gradient, **options)


@pytest.mark.kernels
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_highways(layout: str, device: str) -> None:
    gate, h, x, gradient = (random_tensor((3, 6, 5, 4), torch.float32, device, seed) for seed in range(4))
    change = LAYOUTS[layout]
    for operands in ([change(gate), h, x, gradient], [gate, change(h), change(x), change(gradient)]):
        check_against_stock(autograd.highway, stock_highway("sigmoid"), operands[:3], operands[3])


@pytest.mark.kernels
@pytest.mark.interpreter
def test_budget_of_highways(device: str) -> None:
    """4 elements forward, 7 backward; the operands are kept."""
    operands = tuple(leaf(random_tensor((64, 1024), torch.bfloat16, device, seed)) for seed in range(3))
    with measure_traffic() as forward, saved_tensors() as saved:
        y = autograd.highway(*operands)
    with measure_traffic() as backward:
        torch.autograd.grad(y, operands, torch.ones_like(y))
    tensor = y.numel() * y.itemsize
    assert (forward.bytes, backward.bytes, saved.bytes) == (4 * tensor, 7 * tensor, 3 * tensor)
    assert (forward.launches, backward.launches) == (1, 1)


#: Places that a narrow tile holds, that take several tiles, and several programs; in channels last, too.
CHANNELS = [(2, 3, 7, 7), (2, 70, 5), (1, 2, 50, 90), (3, 1, 4, 4)]


@pytest.mark.kernels
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", CHANNELS, ids=str)
def test_channels(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool, device: str) -> None:
    x, gradient = (random_tensor(shape, dtype, device, seed) for seed in range(2))
    if channels_last:
        x, gradient = (one.movedim(1, -1).contiguous().movedim(-1, 1) for one in (x, gradient))
    gate = random_tensor((*shape[:2], *(1 for _ in shape[2:])), dtype, device, seed=2)
    activation = "hardsigmoid" if shape[1] == 3 else "sigmoid"

    def stock(x: Tensor, gate: Tensor) -> Tensor:
        return x * STOCK[activation](gate)

    # Stock rounds 1/6 to float32 even in float64.
    check_against_stock(
        partial(autograd.gated_channels, activation=activation), stock, [x, gate], gradient, float32_constants=True
    )


@pytest.mark.kernels
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_channels(layout: str, device: str) -> None:
    x, gradient = (LAYOUTS[layout](random_tensor((2, 3, 5, 4), torch.float32, device, seed)) for seed in range(2))
    gate = random_tensor((2, 3, 1, 1), torch.float32, device, seed=2)
    check_against_stock(autograd.gated_channels, lambda x, gate: x * gate.sigmoid(), [x, gate], gradient)


@pytest.mark.kernels
@pytest.mark.interpreter
@pytest.mark.parametrize("channels_last", [False, True])
def test_budget_of_channels(channels_last: bool, device: str) -> None:
    """2 elements forward, 3 backward; the input and the gate are kept."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x = leaf(random_tensor((2, 64, 32, 32), torch.bfloat16, device).contiguous(memory_format=memory_format))
    gate = leaf(random_tensor((2, 64, 1, 1), torch.bfloat16, device))
    with measure_traffic() as forward, saved_tensors() as saved:
        y = autograd.gated_channels(x, gate)
    gradient = torch.ones_like(y)
    with measure_traffic() as backward:
        torch.autograd.grad(y, (x, gate), gradient)
    tensor = y.numel() * y.itemsize
    assert forward.bytes == pytest.approx(2 * tensor, rel=0.02)
    assert backward.bytes == pytest.approx(3 * tensor, rel=0.05)
    assert (forward.launches, backward.launches) == (1, 1)
    assert saved.bytes == tensor + gate.numel() * gate.itemsize


@pytest.mark.parametrize("gate_first", [False, True])
def test_second_derivatives(gate_first: bool, device: str) -> None:
    gate, other = (leaf(random_tensor((2, 4), torch.float64, device, seed)) for seed in range(2))
    assert torch.autograd.gradgradcheck(autograd.gated, (gate, other))
    halves = partial(autograd.gated_halves, activation="gelu_tanh", gate_first=gate_first)
    assert torch.autograd.gradgradcheck(halves, (gate,))
    assert torch.autograd.gradcheck(halves, (gate,))
    assert torch.autograd.gradgradcheck(autograd.highway, (gate, other, leaf(gate.detach().flip(0))))
    x, of_channels = (leaf(random_tensor(shape, torch.float64, device)) for shape in ((2, 3, 4), (2, 3, 1)))
    assert torch.autograd.gradcheck(autograd.gated_channels, (x, of_channels))
    assert torch.autograd.gradgradcheck(autograd.gated_channels, (x, of_channels))


@pytest.mark.kernels
@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("halves", [False, True])
def test_budget(halves: bool, dtype: torch.dtype, device: str) -> None:
    """3 elements forward, 5 backward; the gate and what it gates are kept, and nothing else."""
    x = leaf(random_tensor((64, 2048), dtype, device))
    operands = (x,) if halves else tuple(leaf(half.clone()) for half in x.detach().chunk(2, 1))
    function = autograd.gated_halves if halves else autograd.gated
    with measure_traffic() as forward, saved_tensors() as saved:
        y = function(*operands)
    gradient = random_tensor((64, 1024), dtype, device, seed=1)
    with measure_traffic() as backward:
        torch.autograd.grad(y, operands, gradient)
    tensor = y.numel() * y.itemsize
    assert (forward.bytes, backward.bytes) == (3 * tensor, 5 * tensor)
    assert (forward.launches, backward.launches) == (1, 1)
    assert not forward.operations
    assert not backward.operations
    assert saved.bytes == 2 * tensor


def test_what_stock_serves(device: str) -> None:
    """Other activations, shapes that broadcast, types that promote, numbers; and stock's errors."""
    x = random_tensor((2, 6), torch.float32, device)
    for activation, other in (("mish", x), ("silu", x[:1]), ("silu", x.double()), ("silu", 2.0)):
        expected = STOCK[activation](x) * other
        torch.testing.assert_close(autograd.gated(x, other, activation), expected)
    torch.testing.assert_close(autograd.gated(x, x), F.silu(x) * x)
    for h, activation in ((x, "tanh"), (x[:1], "sigmoid"), (x.double(), "sigmoid"), (2.0, "sigmoid")):
        t = STOCK[activation](x)
        torch.testing.assert_close(autograd.highway(x, h, x.flip(0), activation), t * h + (1 - t) * x.flip(0))
    with pytest.raises(ValueError, match="unknown activation"):
        autograd.gated(x, x, "swiglu")
    for bad in (x[:, :5], x[0, 0], x.long()):
        with pytest.raises((RuntimeError, IndexError)) as theirs:
            F.glu(bad)
        with pytest.raises(theirs.type) as ours:
            autograd.glu(bad)
        assert str(ours.value) == str(theirs.value)


def test_glu_is_replaced(device: str) -> None:
    model = nn.Sequential(nn.GLU(1))
    fusednn.replace_layers(model)
    assert type(model[0]) is fusednn.layers.GLU
    x = random_tensor((2, 6), torch.float32, device)
    torch.testing.assert_close(model(x), F.glu(x, 1))


class Gate(nn.Module):
    """A gate whose operand is what a test wants it to be."""

    def __init__(self, other: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.linear, self.act, self.other = nn.Linear(6, 6), nn.Sigmoid(), other

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.linear(x)) * self.other(x)


def times_two(x: Tensor) -> Tensor:
    return x + x


def one_row(x: Tensor) -> Tensor:
    return x[:1]


def in_double(x: Tensor) -> Tensor:
    return x.double()


@pytest.mark.parametrize("other", [times_two, one_row, in_double])
def test_code_with_a_gate(other: Callable[[Tensor], Tensor], device: str) -> None:
    """Shapes that broadcast and types that promote are computed apart, as the code has it."""
    stock = Gate(other).to(device)
    model = copy.deepcopy(stock)
    report = fusednn.replace_layers(model, fuse=True)
    assert {row.names[0]: row.reason for row in report.rows}["act"] == "fused with the functions behind it"
    x = random_tensor((3, 6), torch.float32, device)
    chosen: list[str] = []
    with observe_choices(lambda choice: chosen.append(f"{choice.operation} {choice.path}")):
        y = model(x)
    torch.testing.assert_close(y, stock(x))
    if KERNELS_RUN:
        assert chosen[-1] == ("gated kernel" if other is times_two else "sigmoid kernel")


def test_halves_write_one_gradient(device: str) -> None:
    model = Halves().to(device)
    fusednn.replace_layers(model, fuse=True)
    x = random_tensor((3, 6), torch.float32, device)
    chosen: list[str] = []
    with observe_choices(lambda choice: chosen.append(choice.operation)):
        model(x)
    assert chosen == ["gated_halves", "gated_halves"] or not KERNELS_RUN


class Recurrent(Highway):
    """A gated unit's next state: functions, the other way round, and the gate comes first."""

    def forward(self, x: Tensor) -> Tensor:
        z = torch.sigmoid(self.gate(x))
        n = torch.tanh(self.transform(x))
        return x * (1.0 - z) + n * z


class Lerp(Highway):
    def forward(self, x: Tensor) -> Tensor:
        return torch.lerp(x, self.transform(x), self.act(self.gate(x)))


class LerpMethod(Highway):
    def forward(self, x: Tensor) -> Tensor:
        return x.lerp(self.transform(x), torch.sigmoid(self.gate(x)))


class NoLerp(Highway):
    """A weight that is used once more, and one that is no weight."""

    def forward(self, x: Tensor) -> Tensor:
        t = self.act(self.gate(x))
        return torch.lerp(x, self.transform(x), t) * t + torch.lerp(self.act(x), x, self.transform(x))


class NoHighway(Highway):
    """2 - t, and t used once more."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.transform(x)
        t = self.act(self.gate(x))
        return (t * h + (2 - t) * x) * (t * x + (1 - t) * h + t)


class Broadcast(Highway):
    def forward(self, x: Tensor) -> Tensor:
        t = self.act(self.gate(x))
        return t * self.transform(x) + (1 - t) * x[:1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("cls", "found"),
    [(Highway, 1), (Recurrent, 1), (Lerp, 1), (LerpMethod, 1), (NoLerp, 0), (NoHighway, 0), (Broadcast, 0)],
)
def test_code_with_a_highway(cls: type[nn.Module], found: int, dtype: torch.dtype, device: str) -> None:
    stock = cls().to(device, dtype)
    model = copy.deepcopy(stock)
    fusednn.replace_layers(model, fuse=True)
    x, gradient = (random_tensor((3, 6), dtype, device, seed) for seed in range(2))
    chosen: list[str] = []
    with observe_choices(lambda choice: chosen.append(choice.operation)):
        model(x)
    assert chosen.count("highway") == found * KERNELS_RUN

    def of(one: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda x: copy.deepcopy(one).to(x.dtype)(x)

    check_against_stock(of(model), of(stock), [x], gradient)


def test_a_hook_hears_a_highways_gate(device: str) -> None:
    model = Highway().to(device)
    stock = copy.deepcopy(model)
    fusednn.replace_layers(model, fuse=True)
    heard: list[Tensor] = []
    model.act.register_forward_hook(lambda *args: heard.append(args[-1].detach()))
    x = random_tensor((3, 6), torch.float32, device)
    torch.testing.assert_close(model(x), stock(x))
    torch.testing.assert_close(heard, [stock.gate(x).sigmoid()])
