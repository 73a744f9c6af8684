"""Batch norm: statistics, normalisation, gradients and running buffers against stock, in every layout."""

import copy
import inspect
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from support.batch_norm import check, mostly_thorough, vectors
from support.device import FLOAT_DTYPES
from support.gpu import capture, no_recompilation, no_synchronisation
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fusednn
from fusednn import autograd, layers
from fusednn.autograd.dispatch import observe_choices
from fusednn.testing import LAYOUTS, assert_accurate, check_against_stock, leaf, random_tensor

modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
needs_kernels = pytest.mark.kernels


SHAPES = [
    (4, 3),
    (2, 1),  # one channel, two values
    (2100, 5),  # a batch beyond 2048
    (300, 20),
    (1, 3, 7),  # batch 1
    (3, 16, 5),
    (2, 3, 7, 9),  # ragged
    (3, 1, 11, 5),
    (1, 2, 5000),  # a channel is many tiles
    (2, 3, 2, 3, 5),
]


# --- Against stock ----------------------------------------------------------------------------------------------------


@needs_kernels
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "training"),
    mostly_thorough(
        product(FLOAT_DTYPES, (True, False)),
        {(torch.float32, True), (torch.float32, False), (torch.bfloat16, True)},
    ),
    ids=str,
)
def test_values_and_gradients(shape: tuple[int, ...], dtype: torch.dtype, training: bool, device: str) -> None:
    check(random_tensor(shape, dtype, device), random_tensor(shape, dtype, device, seed=1), training)


@needs_kernels
@pytest.mark.parametrize("layout", LAYOUTS)
@modes
def test_layouts(layout: str, training: bool, device: str) -> None:
    x = LAYOUTS[layout](random_tensor((3, 6, 5, 4), torch.float32, device))
    gradient = LAYOUTS[layout](random_tensor((3, 6, 5, 4), torch.float32, device, seed=1))
    if training and layout in ("scalar", "expanded"):
        gradient = random_tensor((3, 6, 5, 4), torch.float32, device, seed=1)
        x = x + random_tensor((3, 6, 1, 4), torch.float32, device, seed=2).expand(3, 6, 5, 4)
    check(x, gradient, training)


@needs_kernels
@pytest.mark.smoke
@pytest.mark.parametrize("gradient_layout", ["contiguous", "channels_last", "scalar"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_in_another_layout(gradient_layout: str, dtype: torch.dtype, device: str) -> None:
    x = random_tensor((3, 6, 5, 4), dtype, device).contiguous(memory_format=torch.channels_last)
    check(x, LAYOUTS[gradient_layout](random_tensor((3, 6, 5, 4), dtype, device, seed=1)), True)


@needs_kernels
def test_channels_last_3d_and_permuted_memory(device: str) -> None:
    x, gradient = (random_tensor((2, 20, 3, 4, 5), torch.float32, device, seed) for seed in (0, 1))
    check(x.contiguous(memory_format=torch.channels_last_3d), gradient, True)
    for order in ((1, 0, 2, 3, 4), (4, 1, 0, 2, 3)):
        inverse = [order.index(dim) for dim in range(5)]
        check(x.permute(order).contiguous().permute(inverse), gradient, True)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@modes
def test_float32_parameters_beside_16_bits(dtype: torch.dtype, training: bool, device: str) -> None:
    results = []
    for function, kind, wide in (
        (autograd.batch_norm, dtype, torch.float32),
        (F.batch_norm, dtype, torch.float32),
        (F.batch_norm, torch.float64, torch.float64),
    ):
        mean, variance, *parameters = vectors(6, wide, device)
        x, weight, bias = leaf(random_tensor((3, 6, 5, 4), dtype, device).to(kind)), *map(leaf, parameters)
        y = function(x, mean, variance, weight, bias, training)
        gradient = random_tensor((3, 6, 5, 4), dtype, device, seed=1).to(kind)
        results.append((y, *torch.autograd.grad(y, (x, weight, bias), gradient), mean, variance))
    for triple in zip(*results, strict=True):
        assert_accurate(*triple)


@needs_kernels
@pytest.mark.parametrize("affine", ["neither", "weight", "bias"])
@modes
def test_missing_parameters(affine: str, training: bool, device: str) -> None:
    x, gradient = (random_tensor((3, 4, 5), torch.float32, device, seed) for seed in (0, 1))
    mean, variance, weight, bias = vectors(4, torch.float32, device)
    parameters = {name: value for name, value in (("weight", weight), ("bias", bias)) if name == affine}

    def call(function: Callable[..., Tensor], x: Tensor, *values: Tensor) -> Tensor:
        options = dict(zip(parameters, values, strict=True))
        return function(x, mean.to(x.dtype, copy=True), variance.to(x.dtype, copy=True), training=training, **options)

    ours, stock = (partial(call, function) for function in (autograd.batch_norm, F.batch_norm))
    check_against_stock(ours, stock, [x, *parameters.values()], gradient)


@needs_kernels
@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False, False, True)])
@modes
def test_gradients_only_where_required(needed: tuple[bool, ...], training: bool, device: str) -> None:
    results = []
    for function in (autograd.batch_norm, F.batch_norm):
        x = random_tensor((4, 3, 5), torch.float32, device).requires_grad_(needed[0])
        mean, variance, weight, bias = vectors(3, torch.float32, device)
        weight.requires_grad_(needed[1])
        bias.requires_grad_(needed[2])
        function(x, mean, variance, weight, bias, training).square().sum().backward()
        grads = [operand.grad for operand in (x, weight, bias)]
        assert tuple(grad is not None for grad in grads) == needed
        results.append(next(grad for grad in grads if grad is not None))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


# --- Inputs that hurt -------------------------------------------------------------------------------------------------


@needs_kernels
@pytest.mark.parametrize(
    ("mean", "memory_format"), [(1024.0, torch.contiguous_format), (-1024.0, torch.channels_last)], ids=str
)
def test_large_means(mean: float, memory_format: torch.memory_format, device: str) -> None:
    """Which float32 holds, as it does every value: so it is the arithmetic alone that could lose the variance."""
    x, gradient = (random_tensor((20, 3, 9, 9), torch.float32, device, seed) for seed in (0, 1))
    x = (64 * x[:10]).round() / 64
    check((torch.cat([x, -x]) + mean).contiguous(memory_format=memory_format), gradient, True)


@needs_kernels
@pytest.mark.parametrize("value", [0.1, -3e4])
@pytest.mark.parametrize("shape", [(300, 5), (3, 5, 50, 7), (2, 1, 4097)], ids=str)
def test_constant_channels_have_no_variance(value: float, shape: tuple[int, ...], device: str) -> None:
    x = torch.full(shape, value, device=device)
    mean, variance = autograd.channel_statistics(x)
    assert (variance == 0).all()
    assert (mean == x.flatten()[0]).all()
    y = autograd.batch_norm(x, None, None, training=True)
    assert (y == 0).all()


@needs_kernels
def test_one_far_value_does_not_spoil_the_variance(device: str) -> None:
    x = random_tensor((1, 2, 6000), torch.float32, device)
    x[0, 0, 0] = 1e6
    _, variance = autograd.channel_statistics(x)
    exact = x.double().var((0, 2), correction=0)
    torch.testing.assert_close(variance.double(), exact, rtol=1e-6, atol=0)


@needs_kernels
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_nan_stays_in_its_channel(memory_format: torch.memory_format, device: str) -> None:
    x = random_tensor((2, 4, 5, 6), torch.float32, device)
    x[0, 1, 2, 3] = float("nan")
    x[0, 2, 0, 0] = float("inf")
    x = x.contiguous(memory_format=memory_format)
    outcomes = []
    for function in (autograd.batch_norm, F.batch_norm):
        running = torch.zeros(4, device=device), torch.ones(4, device=device)
        outcomes.append((function(x, *running, training=True), running[1]))
    for ours, stock in zip(*outcomes, strict=True):
        torch.testing.assert_close(ours, stock, equal_nan=True)


@needs_kernels
def test_one_value_per_channel_is_refused_as_by_stock(device: str) -> None:
    for function in (autograd.batch_norm, F.batch_norm):
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            function(torch.ones(1, 3, 1, device=device), None, None, training=True)
    y = autograd.batch_norm(torch.ones(1, 3, device=device), *vectors(3, torch.float32, device)[:2])
    assert y.shape == (1, 3)


WRONG = {
    "no running statistics": lambda f, x, v: f(x, None, None),
    "one running statistic": lambda f, x, v: f(x, v[0], None, training=True),
    "too few channels": lambda f, x, v: f(x, v[0][:2], v[1][:2]),
    "too many weights": lambda f, x, v: f(x, v[0], v[1], torch.ones(9, device=x.device)),
    "no channels": lambda f, x, v: f(x[0, 0], v[0], v[1]),
    "other dtype": lambda f, x, v: f(x.double(), v[0], v[1]),
    "integers": lambda f, x, v: f(x.long(), v[0], v[1]),
    "no momentum": lambda f, x, v: f(x, v[0], v[1], training=True, momentum=None),
    "negative eps": lambda f, x, v: f(x, v[0], v[1], training=True, eps=-1.0),
    "training is a number": lambda f, x, v: f(x, v[0], v[1], training=3),
    "not a tensor": lambda f, x, v: f(3.0, v[0], v[1]),
    "differentiable statistics": lambda f, x, v: f(x, v[0].requires_grad_(), v[1]),
}


@pytest.mark.whole
@pytest.mark.parametrize("wrong", WRONG)
def test_errors_are_stocks(wrong: str, device: str) -> None:
    x = torch.ones(2, 3, 4, device=device)
    raised = []
    for function in (F.batch_norm, autograd.batch_norm):
        with pytest.raises(Exception) as caught:  # noqa: PT011  # its type is what is compared
            WRONG[wrong](function, x, vectors(3, torch.float32, device))
        raised.append(caught.type)
    assert raised[0] is raised[1]


@pytest.mark.parametrize("training", [True, False])
def test_empty_batches(training: bool, device: str) -> None:
    x = torch.ones(0, 3, 4, device=device)
    assert autograd.batch_norm(x, *vectors(3, torch.float32, device), training).shape == x.shape


def test_signatures() -> None:
    theirs, ours = (inspect.signature(function) for function in (F.batch_norm, autograd.batch_norm))
    assert [(p.name, p.default, p.kind) for p in ours.parameters.values()] == [
        (p.name, p.default, p.kind) for p in theirs.parameters.values()
    ]
    names = list(inspect.signature(layers.BatchNormAct2d).parameters)
    assert names[:7] == list(inspect.signature(nn.BatchNorm2d).parameters)[:7]
    assert inspect.signature(layers.BatchNormAct2d).parameters["activation"].default == "relu"


# --- Running statistics -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("momentum", "dtype"),
    mostly_thorough(
        product((0.1, None, 1.0), (torch.float32, torch.float64, torch.bfloat16)),
        {(0.1, torch.float32), (None, torch.float32)},
    ),
    ids=str,
)
def test_running_buffers_after_fifty_steps(momentum: float | None, dtype: torch.dtype, device: str) -> None:
    kind = torch.float64 if dtype is torch.float64 else torch.float32
    stock = nn.BatchNorm2d(3, momentum=momentum).to(device, kind)
    ours = copy.deepcopy(stock)
    fusednn.replace_layers(ours)
    for step in range(50):
        x = 2 + random_tensor((2 + step % 3, 3, 2, 3), dtype, device, seed=step)
        torch.testing.assert_close(ours(x), stock(x), rtol=1e-2 if dtype is torch.bfloat16 else 1e-5, atol=1e-5)
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype is torch.float64 else {"rtol": 2e-6, "atol": 2e-6}
    torch.testing.assert_close(ours.running_mean, stock.running_mean, **tolerance)
    torch.testing.assert_close(ours.running_var, stock.running_var, **tolerance)
    assert ours.num_batches_tracked == stock.num_batches_tracked == 50


def test_without_tracking(device: str) -> None:
    stock = nn.BatchNorm1d(4, track_running_stats=False).to(device)
    ours = layers.BatchNorm1d(4, track_running_stats=False).to(device)
    x = random_tensor((5, 4), torch.float32, device)
    for training in (True, False):
        torch.testing.assert_close(ours.train(training)(x), stock.train(training)(x))
    tracked = layers.BatchNorm1d(4).to(device)
    tracked.track_running_stats = False  # from now on: its buffers stay as they are
    tracked(x)
    assert tracked.num_batches_tracked == 0
    assert (tracked.running_mean == 0).all()


@needs_kernels
def test_running_statistics_may_change_before_the_backward_pass(device: str) -> None:
    x = random_tensor((5, 4), torch.float32, device).requires_grad_()
    layer = layers.BatchNorm1d(4).to(device).eval()
    y = layer(x)
    expected = torch.autograd.grad(y.sum(), x, retain_graph=True)
    layer.train()(x)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x), expected)


def test_half_precision_models(device: str) -> None:
    stock = nn.BatchNorm1d(4).to(device).half()
    ours = copy.deepcopy(stock)
    fusednn.replace_layers(ours)
    x = random_tensor((50, 4), torch.float16, device)
    torch.testing.assert_close(ours(x), stock(x), rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(ours.running_var, stock.running_var, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(ours.eval()(x), stock.eval()(x), rtol=2e-3, atol=2e-3)


# --- In company -------------------------------------------------------------------------------------------------------


@needs_kernels
@pytest.mark.usefixtures("keeps_kernels")
@pytest.mark.parametrize(("activation", "dynamic"), [("silu", False), ("relu", True)])
def test_compiled(activation: str, dynamic: bool, device: str) -> None:
    torch._dynamo.reset()
    eager = nn.ModuleList([layers.BatchNormAct2d(3, activation=activation), layers.BatchNorm2d(3, momentum=None)])
    eager.to(device)
    compiled_layers = copy.deepcopy(eager)

    def network(modules: nn.ModuleList, x: Tensor) -> Tensor:
        return modules[0](modules[1](x), x)

    compiled = torch.compile(partial(network, compiled_layers), fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch in (4, 6, 5):
        x = random_tensor((batch, 3, 4, 5), torch.float32, device).contiguous(memory_format=torch.channels_last)
        results = []
        for function in (compiled, partial(network, eager)):
            operand = leaf(x)
            y = function(operand)
            results.append((y, *torch.autograd.grad(y.square().sum(), operand)))
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    for ours, theirs in zip(compiled_layers.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def _operator_calls() -> list[object]:
    ops = torch.ops.fusednn
    x, g, residual = (random_tensor((3, 4, 6), torch.float32, "cpu", seed) for seed in range(3))
    mean, variance, weight, bias = vectors(4, torch.float32, "cpu")
    mask = torch.zeros(4096, dtype=torch.uint8)
    partial_ = torch.rand(5, 3, 4) + 1
    given = (mean, variance, weight, bias, 1e-5)
    identity, relu, silu = ((name, 0.0, 0.0) for name in ("identity", "relu", "silu"))
    running = (mean.clone(), variance.clone(), None, 0.1)
    sums = torch.rand(1, 2, 4)
    return [
        (ops.batch_norm_statistics, (x, mean.clone(), variance.clone(), None, 0.1)),
        (ops.batch_norm_statistics, (x[:, ::2], None, None, None, 0.1)),
        (ops.batch_norm_merge, (partial_, mean.clone(), variance.clone(), torch.tensor(3), 0.1)),
        (ops.batch_norm_training, (x, residual, *running, weight, bias, 1e-5, *relu, True)),
        (ops.batch_norm_training, (x, None, None, None, None, 0.1, None, None, 1e-5, *identity, False)),
        (ops.batch_norm_forward, (x, None, *given, *identity, False)),
        (ops.batch_norm_forward, (x, residual, *given, *relu, True)),
        (ops.batch_norm_reduce, (g, x, None, None, *given, *silu)),
        (ops.batch_norm_reduce, (g, x, None, mask, *given, *relu)),
        (ops.batch_norm_reduce, (g, x, residual, None, *given, *silu)),
        (ops.batch_norm_training_backward, (g, x, None, None, *given, *silu, True)),
        (ops.batch_norm_training_backward, (g, x, None, mask, *given, *relu, False)),
        (ops.batch_norm_backward, (g, x, sums, 0.1, *given, *relu, True)),
        (ops.batch_norm_backward, (g, x, None, 0.1, *given, *identity, False)),
    ]


@needs_kernels
@pytest.mark.parametrize(("operator", "arguments"), _operator_calls())
def test_opcheck(operator: object, arguments: tuple, device: str) -> None:
    moved = tuple(argument.to(device) if isinstance(argument, Tensor) else argument for argument in arguments)
    torch.library.opcheck(operator.default, moved)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(use_reentrant: bool, device: str) -> None:
    x = random_tensor((4, 3, 5), torch.float32, device)
    gradients = []
    for wrapped in (False, True):
        layer = layers.BatchNormAct1d(3).to(device)
        operand = leaf(x)
        y = checkpoint(layer, operand, use_reentrant=use_reentrant) if wrapped else layer(operand)
        y.square().sum().backward()
        gradients.append(operand.grad)
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_leaves_the_dtype(dtype: torch.dtype, device: str) -> None:
    for kind in (torch.float32, dtype):
        x = random_tensor((4, 3, 5), kind, device)
        with torch.autocast(device, dtype=dtype):
            assert layers.BatchNorm1d(3).to(device)(x).dtype == nn.BatchNorm1d(3).to(device)(x).dtype


def test_func_transforms(device: str) -> None:
    x = random_tensor((4, 3, 5), torch.float64, device)
    layer = layers.BatchNormAct1d(3).to(device).double().eval()
    batched = torch.vmap(lambda row: layer(row.unsqueeze(0)).squeeze(0))(x)
    torch.testing.assert_close(batched, layer(x))
    tangent = torch.func.jvp(layer, (x,), (torch.ones_like(x),))[1]
    torch.testing.assert_close(tangent, (layer(x) > 0).double() * layer.weight[:, None] / (1 + layer.bn.eps) ** 0.5)


def test_replacement_gives_the_same_training(device: str) -> None:
    def train(model: nn.Module) -> list[float]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses = []
        for step in range(3):
            x = random_tensor((8, 1, 6, 6), torch.float32, device, seed=step)
            loss = F.cross_entropy(model(x), torch.arange(8, device=device) % 3)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    stock = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    stock.append(nn.BatchNorm1d(3)).to(device)
    replaced = copy.deepcopy(stock)
    assert {"BatchNorm1d", "BatchNorm2d"} <= {row.layer for row in fusednn.replace_layers(replaced).replaced}
    assert train(replaced) == pytest.approx(train(stock), rel=1e-4)


@needs_kernels
def test_the_kernel_is_taken_and_refusals_have_reasons(device: str) -> None:
    choices = []
    with observe_choices(choices.append):
        x = torch.randn(2, 3, 4, device=device)
        layers.BatchNorm1d(3).to(device)(x)
        layers.BatchNormAct1d(3).to(device)(x, x)
        autograd.batch_norm_act(x, None, None, training=True, residual=x[:1])
        with suppress(ValueError):  # stock's in torch 2.11
            autograd.batch_norm(x, *vectors(3, torch.float32, device), eps=0.0)
        autograd.batch_norm_act(x, None, None, training=True, batches=torch.tensor(2.0, device=device))
    assert [choice.path for choice in choices] == ["kernel", "kernel", "stock", "stock", "stock"]
    assert [choice.operation for choice in choices[:2]] == ["batch_norm", "batch_norm_act"]
    assert [choice.reason for choice in choices[2:]] == [
        "the residual has another shape",
        "eps is not a positive number",
        "the number of batches is not one int64 beside the input",
    ]


# --- What only a GPU can show -----------------------------------------------------------------------------------------


def training_step(layer: nn.Module, x: Tensor, residual: Tensor, gradient: Tensor) -> tuple[Tensor, ...]:
    y = layer(x, residual)
    return (y, *torch.autograd.grad(y, (x, residual, *layer.parameters()), gradient))


@pytest.mark.gpu
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_no_host_synchronisation_and_graph_capture(
    momentum: float | None, memory_format: torch.memory_format, device: str
) -> None:
    x, residual, gradient = (
        random_tensor((8, 64, 14, 14), torch.bfloat16, device, seed).contiguous(memory_format=memory_format)
        for seed in range(3)
    )
    x, residual = leaf(x), leaf(residual)
    layer = layers.BatchNormAct2d(64, momentum=momentum).to(device)
    expected = training_step(layer, x, residual, gradient)
    layer.eval()(x, residual)  # compiles
    with no_synchronisation():
        layer(x, residual)
        training_step(layer.train(), x, residual, gradient)
    graph, captured = capture(lambda: training_step(layer, x, residual, gradient))
    before = layer.num_batches_tracked.item()
    graph.replay()
    assert layer.num_batches_tracked.item() == before + 1
    for ours, eager in zip(captured, expected, strict=True):
        assert torch.equal(ours, eager)


@pytest.mark.gpu
def test_no_recompilation_over_fifty_steps(device: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 24, 3), layers.BatchNormAct2d(24), nn.Conv2d(24, 32, 3), layers.BatchNorm2d(32))
    model.to(device)

    def train(batch: int) -> None:
        model(torch.randn(batch, 3, 20, 20, device=device)).square().mean().backward()

    for batch in (32, 17):  # a full batch and a last, partial one
        train(batch)
    with no_recompilation("batch_norm"):
        for index in range(50):
            model[1].bn.momentum = 1 / (index + 2)
            train(17 if index % 10 == 9 else 32)


@pytest.mark.usefixtures("keeps_kernels")
@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_by_inductor(mode: str, device: str) -> None:
    torch._dynamo.reset()
    eager = layers.BatchNormAct2d(16).to(device)
    module = copy.deepcopy(eager)
    compiled = torch.compile(module, fullgraph=True, mode=mode)
    for seed in range(3):
        x, residual = (leaf(random_tensor((8, 16, 32, 32), torch.float32, device, seed + i)) for i in (0, 7))
        gradient = torch.ones_like(x)
        results = []
        for layer in (compiled, eager):
            y = layer(x, residual)
            results.append((y.clone(), *(g.clone() for g in torch.autograd.grad(y, (x, residual), gradient))))
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(module.running_var, eager.running_var)


@pytest.mark.gpu
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_layer_of_resnet_50(memory_format: torch.memory_format, device: str) -> None:
    """Many steps in each program, in every pass."""
    x = 5 + random_tensor((64, 256, 56, 56), torch.float32, device).contiguous(memory_format=memory_format)
    check(x, random_tensor((64, 256, 56, 56), torch.float32, device, seed=1), True)
