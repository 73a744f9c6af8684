"""Maxout's functions against PyTorch compositions: alone, of a convolution, and what is common to all."""

import copy
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from support.device import FLOAT_DTYPES, KERNELS_RUN
from support.gpu import capture, no_recompilation, no_synchronisation
from support.launches import assert_shipped, note_launches
from support.maxout import check, linear_operands, stock_conv2d, stock_linear, stock_maxout
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fusednn import kernels
from fusednn.autograd import maxout, maxout_conv2d, maxout_linear
from fusednn.autograd.dispatch import Choice, observe_choices
from fusednn.testing import LAYOUTS, leaf, random_tensor, value_and_gradients

every_dtype = pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
_ops = torch.ops.fusednn


@pytest.fixture
def tf32() -> Iterator[None]:
    """Products in TF32 are allowed."""
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = "none"


# --- Of features ------------------------------------------------------------------------------------------------------


@pytest.mark.kernels
@every_dtype
@pytest.mark.parametrize(
    ("shape", "pieces", "dim"),
    [
        ((3000, 4), 2, -1),  # pieces adjacent in memory, and loaded together
        ((7, 12), 4, -1),
        ((5, 4, 21), 3, -1),
        ((2, 12, 7, 9), 3, 1),  # pieces apart
        ((1, 2, 46, 46), 2, 1),  # rows wider than a tile
        ((6,), 6, 0),
        ((10, 1, 3), 5, 0),
    ],
    ids=str,
)
def test_maxout(shape: tuple[int, ...], pieces: int, dim: int, dtype: torch.dtype, device: str) -> None:
    x = random_tensor(shape, dtype, device)
    check(partial(maxout, pieces=pieces, dim=dim), partial(stock_maxout, pieces=pieces, dim=dim), [x])


@pytest.mark.kernels
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gradient_layout", ["contiguous", "channels_last", "strided", "scalar"])
@pytest.mark.parametrize("dim", [1, 2, -1])
def test_maxout_layouts(layout: str, gradient_layout: str, dim: int, device: str) -> None:
    shape = [4, 6, 8, 10]
    x = LAYOUTS[layout](random_tensor(tuple(shape), torch.float32, device))
    shape[dim] //= 2
    gradient = LAYOUTS[gradient_layout](random_tensor(tuple(shape), torch.float32, device, seed=1))
    check(partial(maxout, pieces=2, dim=dim), partial(stock_maxout, pieces=2, dim=dim), [x], gradient)


@pytest.mark.kernels
def test_maxout_keeps_the_memory_format(device: str) -> None:
    x = random_tensor((2, 6, 5, 7), torch.float32, device)
    assert maxout(x, 3, 1).is_contiguous()
    x = leaf(x.contiguous(memory_format=torch.channels_last))
    y = maxout(x, 3, 1)
    assert y.is_contiguous(memory_format=torch.channels_last)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert gradient.is_contiguous(memory_format=torch.channels_last)
    permuted = x.permute(2, 0, 3, 1)
    assert maxout(permuted, 2, 3).stride() == maxout(x, 2, 1).permute(2, 0, 3, 1).stride()


@pytest.mark.kernels
@pytest.mark.smoke
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("pieces", [2, 3, 4])
def test_ties_and_values_that_are_not_finite(pieces: int, memory_format: torch.memory_format, device: str) -> None:
    """NaN wins, the first of several; of equal values the first wins."""
    values = torch.tensor([0.0, -0.0, 1.0, float("nan"), float("inf"), -float("inf")], device=device)
    x = values[torch.cartesian_prod(*[torch.arange(6)] * pieces).to(device)].t()[None, :, :, None]
    x = x.contiguous(memory_format=memory_format)
    ours, stock = partial(maxout, pieces=pieces, dim=1), partial(stock_maxout, pieces=pieces, dim=1)
    gradient = torch.arange(1.0, x.shape[2] + 1, device=device)[None, None, :, None]
    for mine, theirs in zip(*(value_and_gradients(f, [x], gradient) for f in (ours, stock)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(ours(x), x.amax(1, keepdim=True), rtol=0, atol=0, equal_nan=True)


@pytest.mark.kernels
def test_many_pieces(device: str) -> None:
    x = random_tensor((3, 255), torch.float32, device)
    torch.testing.assert_close(maxout(x, 255), x.amax(1, keepdim=True), rtol=0, atol=0)
    y = maxout(torch.cat([x, x[:, :1]], 1), 256)  # a winner would not fit a byte
    torch.testing.assert_close(y, x.amax(1, keepdim=True))


@pytest.mark.parametrize(
    ("shape", "pieces", "dim", "message"),
    [
        ((4, 7), 2, -1, "2 pieces don't divide the 7 features of dimension -1"),
        ((4, 6), 0, -1, "pieces must be a positive integer, not 0"),
        ((4, 6), -2, -1, "pieces must be a positive integer, not -2"),
        ((4, 6), 2.0, -1, "pieces must be a positive integer, not 2.0"),
    ],
)
def test_maxout_errors(shape: tuple[int, ...], pieces: object, dim: int, message: str, device: str) -> None:
    with pytest.raises(ValueError, match=message):
        maxout(torch.ones(shape, device=device), pieces, dim)
    with pytest.raises(IndexError, match="Dimension out of range"):
        maxout(torch.ones(shape, device=device), 2, 5)
    with pytest.raises(IndexError):
        maxout(torch.ones((), device=device), 1)


def test_maxout_of_what_kernels_refuse(device: str) -> None:
    integers = torch.arange(12, device=device).view(2, 6)
    assert torch.equal(maxout(integers, 3), stock_maxout(integers, 3))
    assert maxout(torch.ones(0, 6, device=device), 3).shape == (0, 2)
    assert maxout(torch.ones(2, 0, device=device), 3).shape == (2, 0)
    x = random_tensor((4, 6), torch.float64, device)
    assert torch.equal(maxout(x, 1), x)
    torch.testing.assert_close(torch.vmap(partial(maxout, pieces=2))(x), stock_maxout(x, 2))
    _, tangent = torch.func.jvp(partial(maxout, pieces=2), (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, torch.ones(4, 3, dtype=x.dtype, device=device))


# --- Of a convolution -------------------------------------------------------------------------------------------------


@pytest.mark.kernels
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("pieces", [2, 3])
@pytest.mark.parametrize(
    "options",
    [{}, {"padding": "same", "dilation": 2}, {"stride": (2, 1), "padding": (0, 2)}, {"groups": 2, "padding": 1}],
    ids=str,
)
def test_conv2d(options: dict, pieces: int, memory_format: torch.memory_format, device: str) -> None:
    ours, stock = partial(maxout_conv2d, **options), partial(stock_conv2d, **options)
    x = random_tensor((2, 4, 9, 8), torch.float32, device).contiguous(memory_format=memory_format)
    weight = random_tensor((pieces, 6, 4 // options.get("groups", 1), 3, 3), torch.float32, device, seed=1)
    bias = random_tensor((pieces, 6), torch.float32, device, seed=2)
    for operands in ([x, weight, bias], [x, weight], [x[0], weight, bias]):
        check(ours, stock, operands)
    assert ours(x, weight, bias).is_contiguous(memory_format=memory_format)


@pytest.mark.kernels
@every_dtype
def test_conv2d_dtypes(dtype: torch.dtype, device: str) -> None:
    operands = [
        random_tensor(shape, dtype, device, i) for i, shape in enumerate([(2, 3, 6, 7), (2, 5, 3, 3, 3), (2, 5)])
    ]
    check(maxout_conv2d, stock_conv2d, operands)


@pytest.mark.kernels
def test_bias_gradient_over_many_tiles(device: str) -> None:
    x = random_tensor((1, 2, 46, 46), torch.float32, device)
    operands = [
        x,
        random_tensor((2, 3, 2, 1, 1), torch.float32, device, 1),
        random_tensor((2, 3), torch.float32, device, 2),
    ]
    check(maxout_conv2d, stock_conv2d, operands)
    operands[0] = x.contiguous(memory_format=torch.channels_last)
    check(maxout_conv2d, stock_conv2d, operands)


@pytest.mark.parametrize("bad", [{"weight": (6, 4, 3, 3)}, {"bias": (6,)}, {"x": (2, 5, 9, 8)}, {"x": (4,)}], ids=str)
def test_conv2d_errors(bad: dict, device: str) -> None:
    shapes = {"x": (2, 4, 9, 8), "weight": (2, 6, 4, 3, 3), "bias": (2, 6), **bad}
    with pytest.raises(RuntimeError if "x" in bad else ValueError):
        maxout_conv2d(*(torch.ones(shape, device=device) for shape in shapes.values()))


# --- Of all three -----------------------------------------------------------------------------------------------------

X = (3, 4, 6, 6)
FUNCTIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "maxout": (partial(maxout, pieces=2, dim=1), partial(stock_maxout, pieces=2, dim=1), [X]),
    "adjacent": (partial(maxout, pieces=3), partial(stock_maxout, pieces=3), [X]),
    "linear": (maxout_linear, stock_linear, [(5, 16), (3, 4, 16), (3, 4)]),
    "apart": (maxout_linear, stock_linear, [(5, 3), (3, 4, 3), (3, 4)]),
    "conv2d": (maxout_conv2d, stock_conv2d, [X, (2, 3, 4, 3, 3), (2, 3)]),
}
every_function = pytest.mark.parametrize("name", FUNCTIONS)

# Operands for difference quotients: few numbers, as a kernel runs several times for each.  In float64 a linear layer's
# product and maximum are always apart.
SMALL = {
    "maxout": [(1, 4, 1, 3)],
    "adjacent": [(1, 6)],
    "apart": [(2, 3), (2, 2, 3), (2, 2)],
    "conv2d": [(1, 1, 3, 3), (2, 2, 1, 2, 2), (2, 2)],
}


def tensors(name: str, dtype: torch.dtype, device: str) -> list[Tensor]:
    return [random_tensor(shape, dtype, device, seed) for seed, shape in enumerate(FUNCTIONS[name][2])]


@pytest.mark.kernels
@pytest.mark.parametrize("name", SMALL)
def test_first_and_second_derivatives(name: str, device: str) -> None:
    function = FUNCTIONS[name][0]
    operands = [leaf(random_tensor(shape, torch.float64, device, seed)) for seed, shape in enumerate(SMALL[name])]
    torch.autograd.gradcheck(function, operands)
    torch.autograd.gradgradcheck(function, operands)


@pytest.mark.kernels
@every_function
def test_second_derivatives_are_stocks(name: str, device: str) -> None:
    ours, stock, _ = FUNCTIONS[name]
    results = []
    for function in (ours, stock):
        operands = [leaf(t) for t in tensors(name, torch.float64, device)]
        gradients = torch.autograd.grad(function(*operands).square().sum(), operands, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in gradients), operands))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)


@every_function
def test_explains_its_choice(name: str, device: str) -> None:
    choices: list[Choice] = []
    with observe_choices(choices.append):
        FUNCTIONS[name][0](*tensors(name, torch.float32, device))
    choice, *product = choices
    assert choice.operation.startswith("maxout")
    assert [one.reason for one in product] == ["cuBLAS: the features are no multiple of 16"] * (
        name == "apart" and KERNELS_RUN
    )
    assert choice.path == ("kernel" if KERNELS_RUN else "stock")


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["linear", "apart", "conv2d"])
def test_autocast_is_stocks(name: str, dtype: torch.dtype, device: str) -> None:
    ours, stock, _ = FUNCTIONS[name]
    results = []
    for function in (ours, stock):
        operands = [leaf(t) for t in tensors(name, torch.float32, device)]
        with torch.autocast(device, dtype=dtype):
            y = function(*operands)
        assert y.dtype == dtype
        results.append((y, *torch.autograd.grad(y.float().sum(), operands)))
        assert all(g.dtype == torch.float32 for g in results[-1][1:])
    torch.testing.assert_close(results[0][0], results[1][0], rtol=2e-2, atol=2e-2)
    low = [t.to(dtype).float() for t in tensors(name, torch.float32, device)]
    _, exact = value_and_gradients(stock, low, torch.ones_like(results[0][0], dtype=torch.float32))
    for gradient, reference in zip(results[0][1:], exact, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=2e-2, atol=0.3)


@pytest.mark.kernels
@every_function
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(name: str, use_reentrant: bool, device: str) -> None:
    results = []
    for wrap in (True, False):
        operands = [leaf(t) for t in tensors(name, torch.float32, device)]
        function = FUNCTIONS[name][0]
        y = checkpoint(function, *operands, use_reentrant=use_reentrant) if wrap else function(*operands)
        y.square().sum().backward()
        results.append([operand.grad for operand in operands])
    for mine, theirs in zip(*results, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.kernels
@every_function
def test_compiled_results_equal_eager(name: str, device: str) -> None:
    torch._dynamo.reset()
    function = FUNCTIONS[name][0]
    compiled = torch.compile(lambda *operands: function(*operands) * 2, fullgraph=True, backend="aot_eager")
    results = []
    for run in (compiled, lambda *operands: function(*operands) * 2):
        operands = [leaf(t) for t in tensors(name, torch.float32, device)]
        y = run(*operands)
        results.append((y, *torch.autograd.grad(y.square().sum(), operands)))
    for mine, eager in zip(*results, strict=True):
        torch.testing.assert_close(mine, eager, rtol=0, atol=0)


@pytest.mark.kernels
def test_compiled_with_dynamic_batches(device: str) -> None:
    torch._dynamo.reset()
    weight, bias = (random_tensor(shape, torch.float32, device, 1) for shape in ((2, 6, 16), (2, 6)))

    def network(x: Tensor) -> Tensor:
        return maxout(maxout_linear(x, weight, bias, dropout=0.0), 3)

    compiled = torch.compile(network, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (8, 6, 7):
        x = random_tensor((batch, 16), torch.float32, device)
        torch.testing.assert_close(compiled(x), network(x), rtol=0, atol=0)


def _operator_calls() -> list[tuple[object, tuple]]:
    def tensor(*shape: int) -> Tensor:
        return random_tensor(shape, torch.float32, "cpu")

    calls = []
    channels_last = tensor(2, 6, 3, 5).contiguous(memory_format=torch.channels_last)
    for x in (tensor(2, 6, 3, 5), channels_last, tensor(2, 6, 3, 10)[..., ::2]):
        for adjacent in (True, False):
            bias = None if adjacent else tensor(3, 2)
            calls.append((_ops.maxout, (x, bias, 3, 1, adjacent, True)))
            y = x[:, :2].clone()
            winner = torch.zeros_like(y, dtype=torch.uint8)
            calls.append((_ops.maxout_backward, (y, winner, x.clone().stride(), 3, 1, adjacent, not adjacent)))
    for features in (16, 3):
        weight = tensor(3, 4, features)
        g, winner, x = tensor(2, 5, 4), torch.zeros(2, 5, 4, dtype=torch.uint8), tensor(2, 5, features)
        calls.append((_ops.maxout_linear_backward, (g, winner, x, weight, 3, 0.0, True)))
        calls.append((_ops.maxout_linear_backward, (g, winner, None, weight, 3, 0.5, False)))
        calls.append((_ops.maxout_linear, (tensor(5, features), weight, tensor(3, 4), None, 0.0, True)))
        calls.append((_ops.maxout_linear, (tensor(2, 5, features), weight, None, torch.tensor([3]), 0.5, False)))
    return calls


@pytest.mark.kernels
@pytest.mark.parametrize(("operator", "arguments"), _operator_calls())
def test_opcheck(operator: object, arguments: tuple, device: str) -> None:
    moved = tuple(argument.to(device) if isinstance(argument, Tensor) else argument for argument in arguments)
    torch.library.opcheck(operator.default, moved)


@pytest.mark.kernels
def test_every_launch_is_a_shipped_configuration(
    device: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    launched = note_launches(monkeypatch, kernels.base.tiles, kernels.maxout, kernels.linear_maxout)
    for dtype in (torch.float16, torch.float32, torch.float64):
        for name in FUNCTIONS:
            operands = [leaf(t) for t in tensors(name, dtype, device)]
            FUNCTIONS[name][0](*operands).sum().backward()
            FUNCTIONS[name][0](*(operand.detach() for operand in operands))
    request.getfixturevalue("tf32")
    maxout_linear(*tensors("linear", torch.float32, device))
    assert "tf32" in launched[-1][0].label
    assert_shipped(launched, "maxout")


# --- On a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@every_function
def test_no_host_synchronisation_and_cuda_graph(name: str, device: str) -> None:
    function = FUNCTIONS[name][0]
    operands = [leaf(t) for t in tensors(name, torch.float32, device)]
    gradient = torch.ones_like(function(*operands))

    def step() -> tuple[Tensor, ...]:
        y = function(*operands)
        return (y, *torch.autograd.grad(y, operands, gradient))

    step()  # compiles
    with no_synchronisation():
        step()
    graph, captured = capture(step)
    with torch.no_grad():
        operands[0].mul_(-1)
    graph.replay()
    for replayed, eager in zip(copy.deepcopy([t.detach() for t in captured]), step(), strict=True):
        torch.testing.assert_close(replayed, eager)


@pytest.mark.gpu
def test_no_recompilation_over_fifty_steps(device: str) -> None:
    _, weight, bias = (leaf(t) for t in linear_operands((4,), 48, 64, 2, torch.float32, device))

    def step(batch: int) -> None:
        x = torch.randn(batch, 64, device=device, requires_grad=True)
        maxout(maxout_linear(x, weight, bias, dropout=0.1), 2).sum().backward()

    for batch in (32, 17):
        step(batch)
    with no_recompilation("maxout"):
        for index in range(50):
            step(17 if index % 10 == 9 else 32)
