"""Dropout: masks that come back in the backward pass, and which take no memory."""

import inspect
import math
import warnings
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from support.device import FLOAT_DTYPES
from support.dropout import FUNCTIONS, SHAPES, P, compiled_and_eager, every_function, sample, seeded
from support.gpu import capture, no_recompilation, no_synchronisation
from torch import Tensor, nn

import fusednn
from fusednn import autograd, kernels, layers
from fusednn.autograd.dispatch import Choice, observe_choices
from fusednn.catalogue import row_of
from fusednn.instruments.saved_tensors import saved_tensors
from fusednn.kernels.base.random import draw_seed
from fusednn.kernels.dropout import dropout_backward, dropout_forward
from fusednn.testing import LAYOUTS, assert_same_bits, leaf, poisoned_memory, random_tensor, value_and_gradients

pytestmark = pytest.mark.kernels

if kernels.INTERPRETING:
    from fusednn.instruments.traffic import measure_traffic


def thorough(*values: object) -> list[object]:
    """Values that are left for where there is time: they take code that others take, too."""
    return [pytest.param(value, marks=pytest.mark.thorough) for value in values]


every_dtype = pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def by_channel(name: str) -> bool:
    return name not in ("dropout", "alpha_dropout")


def reference(name: str, x: Tensor, keep: Tensor, p: float = P) -> Tensor:
    """Stock's formula, with a given mask: its source, in float64."""
    x, noise = x.double(), keep.double()
    if "alpha" not in name:
        return x * (noise / (1 - p))
    alpha = 1.7580993408473766
    a = 1 / math.sqrt((alpha**2 * p + 1) * (1 - p))
    return x * (noise * a) + ((noise - 1) * alpha * a + alpha * a * p)


def mask_of(name: str, x: Tensor) -> Tensor:
    """The mask that `seeded` draws for tensors like ``x``: where ones aren't sent to what dropped elements become."""
    y = seeded(name)(torch.ones_like(x))
    return y > 0


@every_function
@every_dtype
@pytest.mark.smoke
def test_values_and_gradients(name: str, dtype: torch.dtype, device: str) -> None:
    x, g = sample(name, dtype, device), sample(name, dtype, device, seed=1)
    before = x.clone()
    with poisoned_memory(0xA5):
        y, (dx,) = value_and_gradients(seeded(name), [x], g)
    with poisoned_memory(0x5A):
        again, (dx_again,) = value_and_gradients(seeded(name), [x], g)
    assert_same_bits(y, again)
    assert_same_bits(dx, dx_again)
    assert_same_bits(x, before)
    keep = mask_of(name, x)
    if by_channel(name):
        assert torch.equal(keep, keep.flatten(2)[:, :, :1].view(*x.shape[:2], *[1] * (x.dim() - 2)).expand(x.shape))
    tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
    torch.testing.assert_close(y.double(), reference(name, x, keep), **tolerance)
    slope = reference(name, torch.ones_like(x), keep) - reference(name, torch.zeros_like(x), keep)
    torch.testing.assert_close(dx.double(), g.double() * slope, **tolerance)
    assert torch.equal(dx == 0, ~keep | (g == 0)), "the gradient is 0 exactly where the output was dropped"


@pytest.mark.parametrize("name", ["dropout", "dropout2d"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(name: str, layout: str, device: str) -> None:
    x = LAYOUTS[layout](random_tensor((3, 5, 4, 6), torch.float32, device))
    ones = torch.ones_like(x)  # dense, in the memory order of the result
    keep = mask_of(name, x)
    for gradient_layout in LAYOUTS if layout == "channels_last" else ("contiguous", "scalar"):
        g = LAYOUTS[gradient_layout](random_tensor((3, 5, 4, 6), torch.float32, device, seed=1))
        y, (dx,) = value_and_gradients(seeded(name), [x], g)
        assert y.stride() == ones.stride()
        assert torch.equal(y != 0, keep & (x != 0))
        assert torch.equal(dx != 0, keep & (g != 0))


@pytest.mark.parametrize("name", ["dropout", "dropout2d"])
@pytest.mark.parametrize("layout", ["channels_last", "transposed"])
@every_dtype
def test_masks_of_value_and_gradient_are_one(name: str, layout: str, dtype: torch.dtype, device: str) -> None:
    x = LAYOUTS[layout](torch.ones((2, 16, 8, 8), dtype=dtype, device=device))
    for g in (torch.ones_like(x), torch.ones((), dtype=dtype, device=device).expand(x.shape)):
        y, (dx,) = value_and_gradients(seeded(name), [x], g)
        assert torch.equal(y, dx)
    assert 0 < y.count_nonzero() < y.numel()


@pytest.mark.parametrize(
    ("shape", "permutation"),
    [((6, 5, 4, 3), (1, 0, 2, 3)), ((6, 5, 4, 3), (2, 3, 0, 1)), ((4, 3, 5, 6), (3, 2, 1, 0)), ((2, 40, 7, 9), None)],
)
def test_a_channels_fate_is_the_same_in_every_memory_order(
    shape: tuple[int, ...], permutation: tuple[int, ...] | None, device: str
) -> None:
    ones = torch.ones(shape, device=device)
    if permutation:
        ones = ones.permute(permutation)
    expected = mask_of("dropout2d", ones.contiguous())
    assert 0 < expected.double().mean() < 1
    for other in (ones, ones.contiguous(memory_format=torch.channels_last)):
        y, (dx,) = value_and_gradients(seeded("dropout2d"), [other], other)
        assert torch.equal(y > 0, expected)
        assert torch.equal(dx > 0, expected)


@pytest.mark.parametrize("shape", [(), (1,), (2047,), (2048,), (2049,), (3, 4097)])
def test_shapes(shape: tuple[int, ...], device: str) -> None:
    x = torch.ones(shape, device=device)
    y, (dx,) = value_and_gradients(seeded("dropout"), [x], torch.ones_like(x))
    assert torch.equal(y, dx)
    assert all(value in (0.0, torch.tensor(1 / (1 - P)).item()) for value in y.unique().tolist())


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (1, 1, 5, 5), (7, 1, 3, 3), (1, 9, 3, 3), (5, 6, 1, 1), (2, 3, 50, 50), (2, 300, 3, 3)]
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_channel_shapes(shape: tuple[int, ...], memory_format: torch.memory_format, device: str) -> None:
    x = torch.ones(shape, device=device).contiguous(memory_format=memory_format)
    y, (dx,) = value_and_gradients(seeded("dropout2d"), [x], torch.ones(shape, device=device))
    assert torch.equal(y, dx)
    assert torch.equal(y, y[:, :, :1, :1].expand(shape))


@pytest.mark.parametrize(("name", "shape"), [("dropout1d", (5, 70)), ("dropout3d", (5, 2, 4, 6))])
@pytest.mark.parametrize("inplace", [False, True])
def test_single_samples(name: str, shape: tuple[int, ...], inplace: bool, device: str) -> None:
    x = torch.ones(shape, device=device)
    y = getattr(autograd, name)(x, 0.5, inplace=inplace)
    assert (y is x) == inplace
    assert torch.equal(y, y.flatten(1)[:, :1].view(-1, *[1] * (len(shape) - 1)).expand(shape))


# --- Stock's edges ----------------------------------------------------------------------------------------------------


@every_function
def test_signatures_are_stocks(name: str) -> None:
    assert inspect.signature(getattr(autograd, name)) == inspect.signature(getattr(F, name))


@every_function
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("p", [0, 1.0])
def test_never_and_always(name: str, p: float, dtype: torch.dtype, device: str) -> None:
    """Bit for bit stock's, for NaN, infinities and the sign of zeros, too."""
    x = sample(name, dtype, device)
    x.view(-1)[:4] = torch.tensor([float("nan"), float("inf"), -float("inf"), -1.0])
    for ours, stock in zip(
        *(
            value_and_gradients(lambda x, module=module: getattr(module, name)(x, p, training=True) * 1, [x], x)
            for module in (autograd, F)
        ),
        strict=True,
    ):
        for mine, theirs in zip(*(t if isinstance(t, tuple) else (t,) for t in (ours, stock)), strict=True):
            assert_same_bits(mine, theirs)
            assert torch.equal(mine.signbit() | mine.isnan(), theirs.signbit() | theirs.isnan())


@every_function
def test_not_finite_inputs(name: str, device: str) -> None:
    """As x * mask: a dropped NaN or infinity gives NaN, on CUDA and on CPUs, and so in the gradient."""
    x = torch.ones_like(sample(name, torch.float32, device))
    keep = mask_of(name, x)
    y, (dx,) = value_and_gradients(seeded(name), [x * float("inf")], x * float("inf"))
    assert torch.equal(y == float("inf"), keep)
    assert torch.equal(y.isnan(), ~keep)
    assert torch.equal(dx.isnan(), ~keep)


@every_function
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_evaluation_gives_back_the_input(name: str, p: float, device: str) -> None:
    x = sample(name, torch.float32, device)
    ours, stock = (getattr(module, name)(x, p, training=False) for module in (autograd, F))
    assert (ours is x) == (stock is x)
    assert ours.data_ptr() == x.data_ptr()


@every_function
@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan"), None, "a"])
def test_errors_are_stocks(name: str, p: object, device: str) -> None:
    x = sample(name, torch.float32, device)
    errors = []
    for module in (autograd, F):
        with pytest.raises((ValueError, TypeError, RuntimeError)) as caught:
            getattr(module, name)(x, p, training=True)
        errors.append((caught.type, str(caught.value)))
    assert errors[0] == errors[1]


@pytest.mark.parametrize("training", [1, "a", None, torch.tensor(True)], ids=str)
@every_function
def test_training_is_a_boolean_as_for_stock(name: str, training: object, device: str) -> None:
    x = sample(name, torch.float32, device)
    outcomes = []
    for module in (autograd, F):
        try:
            outcomes.append(torch.equal(getattr(module, name)(x, training=training), x))
        except TypeError as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool])
@every_function
def test_other_dtypes_are_stocks(name: str, dtype: torch.dtype, device: str) -> None:
    x = torch.ones(SHAPES.get(name, (2, 3, 4, 5)), dtype=dtype, device=device)
    results = []
    for module in (autograd, F):
        try:
            results.append(getattr(module, name)(x, 0.5, training=True).dtype)
        except Exception as error:  # the exception is what is compared
            results.append(type(error))
    assert results[0] == results[1]


@pytest.mark.parametrize("name", FUNCTIONS[1:])
@pytest.mark.parametrize("dimensions", range(7))
def test_ranks_warn_and_raise_as_stock(name: str, dimensions: int, device: str) -> None:
    x = torch.ones([2] * dimensions, device=device)
    outcomes = []
    for module in (autograd, F):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                result = getattr(module, name)(x, 0.5, training=True).shape
            except Exception as error:  # the exception is what is compared
                result = type(error)
        outcomes.append((result, [str(warning.message) for warning in caught]))
    assert outcomes[0] == outcomes[1]


def test_reasons(device: str) -> None:
    choices: list[Choice] = []
    x = torch.ones(2, 3, 4, device=device)
    with observe_choices(choices.append), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        autograd.dropout(x, 0.5, False)
        autograd.dropout(x, 0.0)
        autograd.dropout(x, torch.tensor(0.5))
        autograd.dropout2d(x)
    assert [choice.reason for choice in choices] == [
        "the identity in evaluation",
        "the identity, as p is 0",
        "p is not a Python number",
        "3 dimensions",
    ]


@every_function
@pytest.mark.parametrize("view", ["dense", "slice"])
def test_inplace(name: str, view: str, device: str) -> None:
    x = sample(name, torch.float32, device).requires_grad_()
    base = x * 1
    target = base[..., 1:] if view == "slice" else base
    torch.manual_seed(4)
    y = getattr(autograd, name)(target, 0.5, training=True, inplace=True)
    assert y is target
    torch.manual_seed(4)
    source = x[..., 1:] if view == "slice" else x
    expected = getattr(autograd, name)(source, 0.5, training=True)
    assert torch.equal(y, expected)
    for result in (y, expected):
        (gradient,) = torch.autograd.grad(result.sum(), x, retain_graph=True)
        if result is y:
            first = gradient
    assert torch.equal(first, gradient)


@every_function
def test_inplace_on_a_leaf_raises_as_stock(name: str, device: str) -> None:
    for module in (autograd, F):
        x = sample(name, torch.float32, device).requires_grad_()
        with pytest.raises(RuntimeError, match="leaf"):
            getattr(module, name)(x, 0.5, training=True, inplace=True)


@pytest.mark.parametrize("name", ["dropout2d", *thorough("dropout", "alpha_dropout")])
def test_derivatives(name: str, device: str) -> None:
    x = random_tensor((1, 3, 1, 2), torch.float64, device).requires_grad_()
    torch.autograd.gradcheck(seeded(name), x)
    torch.autograd.gradgradcheck(seeded(name), x)


# --- Memory -----------------------------------------------------------------------------------------------------------

BUDGETED = (4, 16, 32, 16)  # 16 whole tiles


@pytest.mark.interpreter
@pytest.mark.parametrize("name", ["dropout", "dropout2d", *thorough("alpha_dropout", "feature_alpha_dropout")])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_budget(name: str, memory_format: torch.memory_format, dtype: torch.dtype, device: str) -> None:
    x = leaf(random_tensor(BUDGETED, dtype, device).contiguous(memory_format=memory_format))
    g = random_tensor(BUDGETED, dtype, device, seed=1).contiguous(memory_format=memory_format)
    with measure_traffic() as forward, saved_tensors() as saved:
        y = getattr(autograd, name)(x, training=True)
    with measure_traffic() as backward:
        torch.autograd.grad(y, x, g)
    for traffic, budget in zip((forward, backward), row_of(name).budget(x.shape, dtype), strict=True):
        assert budget < traffic.bytes <= 1.025 * budget
        assert traffic.launches == 1
    assert [operation.name for operation in forward.operations] == ["randint"]
    assert not backward.operations
    assert saved.bytes == 8, "a seed and no mask"


def test_launched_configurations_ship(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    launched = []
    for module in (kernels.base.tiles, kernels.dropout):
        monkeypatch.setattr(module, "launch", lambda configuration, *_: launched.append(configuration))
    for dtype in FLOAT_DTYPES:
        for shape in ((5,), (2, 16, 4, 4), (2, 64, 4, 4), (2, 256, 16, 16), (2, 3, 64, 64)):
            x = torch.ones(shape, dtype=dtype, device=device)
            seed = draw_seed(x.device)
            dropout_forward(x, seed, 0.5)
            if len(shape) == 4:
                dropout_forward(x, seed, 0.5, shared_dims=2)
                x = x.contiguous(memory_format=torch.channels_last)
                dropout_backward(x, seed, x.stride(), 0.5, shared_dims=2)
    assert {configuration.label for configuration in launched} == {
        configuration.label for configuration in kernels.shipped("dropout")
    }


# --- Layers -----------------------------------------------------------------------------------------------------------


def test_alpha_layers_ignore_inplace_as_stocks_do(device: str) -> None:
    x = torch.randn(4, 5, device=device)
    for ours in (layers.AlphaDropout(0.5, inplace=True), layers.FeatureAlphaDropout(0.5, inplace=True)):
        before = x.clone()
        assert ours(x) is not x
        assert torch.equal(x, before)


# --- torch.compile ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("keeps_kernels")
@pytest.mark.parametrize("name", ["dropout", "feature_alpha_dropout", *thorough("dropout2d", "alpha_dropout")])
def test_compiled_results_equal_eager(name: str, device: str) -> None:
    x = leaf(sample(name, torch.float32, device))
    for ours, eager in compiled_and_eager(partial(getattr(autograd, name), training=True), [x]):
        assert torch.equal(ours, eager)


@pytest.mark.parametrize("leading", [0, 2])
def test_opcheck(leading: int, device: str) -> None:
    seed = draw_seed(torch.device(device))
    for x in (torch.randn(3, 5, 7, device=device), torch.randn(4, 6, 5, device=device)[:, ::2]):
        strides = x.clone().stride()
        torch.library.opcheck(torch.ops.fusednn.dropout.default, (x, seed, 0.5, False, leading))
        torch.library.opcheck(torch.ops.fusednn.dropout_backward.default, (x, seed, strides, 0.5, True, leading))
    torch.library.opcheck(torch.ops.fusednn.dropout_.default, (torch.ones(5, 6, device=device), seed, 0.5, False, 0))


# --- What only a GPU can show -----------------------------------------------------------------------------------------


def drop_connect(x: Tensor) -> Tensor:
    """The weights are ones, and so is x: what a row of results counts is the weights kept."""
    return autograd.drop_connect_linear(torch.ones_like(x), x)


#: Each gives a result whose gradient shows the same mask, for operands of ones.
STEPS: dict[str, Callable[[Tensor], Tensor]] = {
    **{name: partial(getattr(autograd, name), training=True) for name in ("dropout", "dropout2d")},
    "dropout2d_channels_last": lambda x: autograd.dropout2d(x.contiguous(memory_format=torch.channels_last)),
    "relu_chain": lambda x: autograd.bias_activation_dropout(x, x[0, :, 0, 0] * 0, dim=1),
    "leaky_relu_chain": lambda x: autograd.bias_activation_dropout(x, activation="leaky_relu"),
    "softsign_chain": lambda x: autograd.bias_activation_dropout(x, x[0, 0, 0] * 0, activation="softsign"),
    "drop_connect": lambda x: drop_connect(x.flatten(1)),
    "standout": lambda x: autograd.standout(x, torch.zeros_like(x)),
}
every_step = pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)


def value_and_gradient(step: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    y = step(x)
    return y.detach(), torch.autograd.grad(y.sum(), x)[0]


@pytest.mark.gpu
@every_step
def test_no_host_synchronisation_and_graph_capture(step: Callable[[Tensor], Tensor], device: str) -> None:
    """Successive replays draw other masks, in both directions the same."""
    x = leaf(torch.ones(8, 64, 16, 16, device=device))
    value_and_gradient(step, x)  # compiles
    with no_synchronisation():
        value_and_gradient(step, x)
    graph, (y, gradient) = capture(lambda: value_and_gradient(step, x))
    replays = []
    for _ in range(3):
        graph.replay()
        if y.shape == gradient.shape:
            assert torch.equal(y != 0, gradient != 0)
        replays.append(gradient != 0)
    assert not torch.equal(replays[0], replays[1])
    assert not torch.equal(replays[1], replays[2])
    assert 0.3 < replays[0].double().mean() < 0.7


@pytest.mark.gpu
def test_no_recompilation_while_annealing(device: str) -> None:
    model = nn.Sequential(
        *(nn.Linear(32, 64, bias=False), layers.BiasActivationDropout(64, 0.5, activation="silu")),
        *(layers.DropConnect(64, 64), nn.ReLU(), nn.Dropout(0.5), nn.Unflatten(1, (16, 2, 2)), nn.Dropout2d(0.5)),
    ).to(device)
    fusednn.replace_layers(model)
    schedule = layers.AnnealedDropout(model, 60)

    def train(batch: int) -> None:
        model(torch.randn(batch, 32, device=device)).square().mean().backward()
        schedule.step()

    for batch in (320, 17):
        train(batch)
    with no_recompilation("dropout", "bias_activation_dropout"):
        for index in range(50):
            train(17 if index % 10 == 9 else 320)


@pytest.mark.usefixtures("keeps_kernels")
@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@every_step
def test_compiled_masks_agree_in_both_directions(step: Callable[[Tensor], Tensor], mode: str, device: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, mode=mode)
    masks = []
    for _ in range(4):
        y, gradient = value_and_gradient(compiled, leaf(torch.ones(8, 64, 16, 16, device=device)))
        if y.shape == gradient.shape:
            assert torch.equal(y != 0, gradient != 0)
        masks.append((gradient != 0).clone())
    assert not torch.equal(masks[2], masks[3])
