"""Negative log likelihood against PyTorch's: shapes, layouts, weights, ignored targets, errors, bytes."""

import copy
import pickle
import warnings
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from support.device import FLOAT_DTYPES, KERNELS_RUN, ON_GPU
from torch import Tensor, nn

import fusednn
from fusednn import autograd, kernels, layers
from fusednn.autograd.dispatch import Choice, observe_choices
from fusednn.instruments.saved_tensors import saved_tensors
from fusednn.testing import LAYOUTS, check_against_stock, leaf, random_tensor

if kernels.INTERPRETING:
    from fusednn.instruments.traffic import measure_traffic

needs_kernels = pytest.mark.kernels
counts_traffic = pytest.mark.interpreter
every_dtype = pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
every_reduction = pytest.mark.parametrize("reduction", ["none", "mean", "sum"])

SHAPES = [(5,), (1, 1), (4, 5), (3, 7, 2), (2, 4, 3, 5), (2, 3, 2, 1, 4), (2, 3, 1, 1)]
IGNORED = 2


def targets(shape: tuple[int, ...], device: str) -> Tensor:
    """Class indices of an input of this shape; some are `IGNORED` where there are so many classes."""
    classes, places = (shape[0], ()) if len(shape) == 1 else (shape[1], (shape[0], *shape[2:]))
    generator = torch.Generator().manual_seed(5)
    return torch.randint(classes, places, generator=generator).to(device)


def functions(target: Tensor, weight: Tensor | None = None, **options: object) -> list[Callable[[Tensor], Tensor]]:
    """Ours and stock's, of the input alone; stock's of contiguous inputs, as its gradient has it in four dimensions."""

    def call(function: Callable[..., Tensor], x: Tensor) -> Tensor:
        weights = None if weight is None else weight.to(x.device, x.dtype)
        x = x.contiguous() if function is F.nll_loss else x
        return function(x, target, weights, **options)

    return [partial(call, function) for function in (autograd.nll_loss, F.nll_loss)]


def check(x: Tensor, target: Tensor, weight: Tensor | None = None, **options: object) -> None:
    ours, stock = functions(target, weight, **options)
    check_against_stock(ours, stock, [x], torch.full_like(stock(x), 0.75))


@needs_kernels
@every_dtype
@every_reduction
@pytest.mark.smoke
def test_values_and_gradients(dtype: torch.dtype, reduction: str, device: str) -> None:
    for shape in SHAPES if dtype is torch.float32 else SHAPES[2:5]:
        x, target = random_tensor(shape, dtype, device), targets(shape, device)
        weight = torch.linspace(0.0, 2.0, 1 + max(shape))[1:][: shape[0] if len(shape) == 1 else shape[1]]
        check(x, target, weight, reduction=reduction, ignore_index=IGNORED)
        check(x, target, reduction=reduction)


@needs_kernels
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, device: str) -> None:
    x = LAYOUTS[layout](random_tensor((2, 3, 4, 5), torch.float32, device))
    target = targets((2, 3, 5, 4), device).transpose(1, 2)
    for reduction in ("none", "mean"):
        check(x, target, torch.rand(6)[::2], reduction=reduction)


@needs_kernels
def test_differentiable_gradients_of_channels_last(device: str) -> None:
    """Stock's own operator refuses the layout there: its gradient must be contiguous."""
    ours, _ = functions(targets((2, 3, 4, 5), device))
    x = leaf(LAYOUTS["channels_last"](random_tensor((2, 3, 4, 5), torch.float32, device)))
    (dx,) = torch.autograd.grad(ours(x), x)
    (differentiable,) = torch.autograd.grad(ours(x), x, create_graph=True)
    torch.testing.assert_close(differentiable, dx)


@needs_kernels
def test_places_at_irregular_distances(device: str) -> None:
    x = random_tensor((4, 3, 5, 2), torch.float32, device).permute(3, 1, 0, 2)[:, :, :, :3]
    check(x, targets((2, 3, 4, 3), device), reduction="mean")
    check(
        random_tensor((2, 3, 6), torch.float32, device).view(2, 3, 3, 2).transpose(2, 3), targets((2, 3, 2, 3), device)
    )


@needs_kernels
@pytest.mark.parametrize("positions", [1023, 1024, 4096, 4097, 6000])
def test_sizes_about_blocks_and_stages(positions: int, device: str) -> None:
    x = random_tensor((positions, 3), torch.float32, device)
    for reduction in ("none", "mean"):
        check(x, targets((positions, 3), device), torch.tensor([0.5, 1.0, 2.0]), reduction=reduction)


@needs_kernels
def test_programs_stride_over_blocks(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.nll_loss, "sum_programs", lambda blocks: 3)
    check(random_tensor((7000, 3), torch.float32, device), targets((7000, 3), device))


@needs_kernels
@every_reduction
def test_all_ignored_and_all_of_weight_zero(reduction: str, device: str) -> None:
    x = random_tensor((3, 4), torch.float32, device)
    check(x, torch.full((3,), -100, device=device), reduction=reduction)
    check(x, torch.full((3,), 9, device=device), ignore_index=9, reduction=reduction)
    check(x, torch.zeros(3, dtype=torch.int64, device=device), torch.zeros(4), reduction=reduction)


@needs_kernels
def test_infinities_and_nan(device: str) -> None:
    x = torch.tensor([[float("inf"), -float("inf"), float("nan"), 1.0]], device=device).repeat(4, 1)
    for weight in (None, torch.tensor([0.0, 1.0, 1.0, 1.0])):
        check(x, torch.arange(4, device=device), weight, reduction="none")


@needs_kernels
@every_reduction
def test_gradcheck_and_gradgradcheck(reduction: str, device: str) -> None:
    ours, _ = functions(targets((2, 3, 4), device), torch.tensor([0.5, 1.0, 2.0]), reduction=reduction)
    x = leaf(random_tensor((2, 3, 4), torch.float64, device))
    assert torch.autograd.gradcheck(ours, x, fast_mode=True)
    assert torch.autograd.gradgradcheck(ours, x, fast_mode=True)


@pytest.mark.parametrize("size_average", [None, True, False])
@pytest.mark.parametrize("reduce", [None, True, False])
def test_deprecated_arguments(size_average: bool | None, reduce: bool | None, device: str) -> None:
    outcomes = []
    for function in (autograd.nll_loss, F.nll_loss):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            x = random_tensor((4, 5), torch.float32, device)
            y = function(x, targets((4, 5), device), size_average=size_average, reduce=reduce)
        outcomes.append((y, [str(warning.message) for warning in caught if warning.category is UserWarning]))
    assert outcomes[0][1] == outcomes[1][1]
    torch.testing.assert_close(outcomes[0][0], outcomes[1][0])


def outcome(function: Callable[..., Tensor], *arguments: object, **options: object) -> object:
    try:
        return function(*arguments, **options)
    except Exception as error:  # the exception is what is compared
        return type(error), str(error)


@pytest.mark.skipif(ON_GPU, reason="a device assertion there, which ends the process")
@every_reduction
@pytest.mark.parametrize("shape", [(5,), (2000, 5), (2, 5, 3), (2, 5, 3, 4)], ids=str)
@pytest.mark.parametrize("wrong", [5, -1, 2**40])
def test_targets_out_of_bounds_raise_stocks_error(wrong: int, shape: tuple[int, ...], reduction: str) -> None:
    target = targets(shape, "cpu")
    target.view(-1)[-1] = wrong
    mine, theirs = (outcome(m.nll_loss, torch.randn(shape), target, reduction=reduction) for m in (autograd, F))
    assert isinstance(theirs, tuple)
    assert theirs[0] is IndexError
    assert mine == theirs


WRONG_CALLS = [
    (torch.ones(4, 3), torch.zeros(3, dtype=torch.int64), {}),
    (torch.ones(4, 3), torch.zeros(4, 3), {}),
    (torch.ones(4, 3), torch.zeros(4, dtype=torch.int32), {}),
    (torch.ones(4, 3), torch.zeros(4, dtype=torch.uint8), {}),
    (torch.ones(4, 3), None, {}),
    (torch.ones(3), torch.zeros(1, dtype=torch.int64), {}),
    (torch.ones(()), torch.zeros((), dtype=torch.int64), {}),
    (torch.ones(4, 3), torch.zeros(4, dtype=torch.int64), {"weight": torch.ones(4)}),
    (torch.ones(4, 3), torch.zeros(4, dtype=torch.int64), {"weight": torch.ones(3, requires_grad=True)}),
    (torch.ones(4, 3), torch.zeros(4, dtype=torch.int64), {"weight": torch.ones(3).double()}),
    (torch.ones(4, 3), torch.zeros(4, dtype=torch.int64), {"reduction": "median"}),
    (torch.ones(4, 3), torch.zeros(4, dtype=torch.int64), {"ignore_index": 0.5}),
    (torch.ones(0, 3), torch.zeros(0, dtype=torch.int64), {}),
    (torch.ones(2, 3, 0), torch.zeros(2, 0, dtype=torch.int64), {"reduction": "none"}),
]


@pytest.mark.parametrize(("x", "target", "options"), WRONG_CALLS)
def test_what_the_kernels_refuse_is_stocks(x: Tensor, target: Tensor, options: dict, device: str) -> None:
    def move(value: object) -> object:
        return value.detach().to(device).requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value

    options = {key: move(value) for key, value in options.items()}
    choices: list[Choice] = []
    with observe_choices(choices.append):
        mine, theirs = (outcome(m.nll_loss, move(x), move(target), **options) for m in (autograd, F))
    assert [choice.path for choice in choices] == ["stock"]
    if isinstance(theirs, Tensor):
        torch.testing.assert_close(mine, theirs, equal_nan=True)
    else:
        assert mine == theirs


@pytest.mark.parametrize("shape", [(4, 5), (2, 5, 3, 4)], ids=str)
def test_autocast_is_stocks(shape: tuple[int, ...], device: str) -> None:
    results = []
    for function in functions(targets(shape, device), torch.linspace(0.5, 1.5, 5)):
        x = leaf(random_tensor(shape, torch.bfloat16, device))
        with torch.autocast(device, dtype=torch.bfloat16):
            y = function(x)
        results.append((y, *torch.autograd.grad(y, x)))
    torch.testing.assert_close(*results)


def test_func_transforms(device: str) -> None:
    x, target = random_tensor((4, 5), torch.float64, device), targets((4, 5), device)
    batched = torch.vmap(autograd.nll_loss)(x, target)
    torch.testing.assert_close(batched, F.nll_loss(x, target, reduction="none"))
    operand = leaf(x)
    expected = torch.autograd.grad(F.nll_loss(operand, target), operand)
    torch.testing.assert_close(torch.func.grad(autograd.nll_loss)(x, target), *expected)


@needs_kernels
@counts_traffic
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_bytes_and_launches(layout: str, device: str) -> None:
    x = leaf(LAYOUTS[layout](random_tensor((2, 16, 64, 64), torch.float32, device)))
    target = targets((2, 16, 64, 64), device)
    with measure_traffic() as forward, saved_tensors() as saved:
        y = autograd.nll_loss(x, target)
    gradient = torch.ones_like(y)
    with measure_traffic() as backward:
        torch.autograd.grad(y, x, gradient)
    picked = target.numel() * (8 + 4)  # a target, and the element that it picks
    assert picked <= forward.bytes <= picked * 1.05
    assert not forward.operations
    assert picked <= backward.bytes <= picked * 1.05
    assert [(operation.name, operation.written_bytes) for operation in backward.operations] == [
        ("zeros_like", x.numel() * 4)
    ]
    assert (forward.launches, backward.launches) == (2, 1)
    assert saved.bytes_beside(x, target) == 8


@pytest.mark.usefixtures("keeps_kernels")
@needs_kernels
@pytest.mark.parametrize("layout", ["contiguous", "strided"])
def test_compiled_results_equal_eager(layout: str, device: str) -> None:
    torch._dynamo.reset()
    ours, _ = functions(targets((2, 3, 4, 5), device), torch.tensor([0.5, 1.0, 2.0]))
    results = []
    for function in (ours, torch.compile(ours, fullgraph=True, backend="aot_eager")):
        x = leaf(LAYOUTS[layout](random_tensor((2, 3, 4, 5), torch.float32, device)))
        y = function(x)
        results.append((y, *torch.autograd.grad(y, x)))
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


@needs_kernels
def test_opcheck(device: str) -> None:
    operators = torch.ops.fusednn
    weight = torch.rand(3, device=device)
    total = torch.ones((), dtype=torch.float64, device=device)
    target = targets((2, 3, 4, 5), device)
    for layout in ("contiguous", "transposed"):
        x = LAYOUTS[layout](random_tensor((2, 3, 4, 5), torch.float32, device))
        torch.library.opcheck(operators.nll_loss.default, (x, target, weight, -100))
        torch.library.opcheck(operators.nll_loss_reduced.default, (x, target, None, 1, "mean"))
        torch.library.opcheck(operators.nll_loss_backward.default, (x[:, 0], x, target, weight, None, 1, "none"))
        torch.library.opcheck(operators.nll_loss_backward.default, (x.sum(), x, target, None, total, 1, "mean"))


def test_the_layer_is_a_twin(device: str) -> None:
    options = {"weight": torch.tensor([0.5, 1.0, 2.0]), "ignore_index": 1, "reduction": "sum"}
    stock = nn.NLLLoss(**options).to(device)
    model = nn.Sequential(nn.LogSoftmax(1), copy.deepcopy(stock))
    fusednn.replace_layers(model)
    ours = model[1]
    assert type(ours) is layers.NLLLoss
    assert type(ours).__init__ is nn.NLLLoss.__init__
    assert repr(ours) == repr(stock)
    ours.load_state_dict(stock.state_dict())
    stock.load_state_dict(ours.state_dict())
    x, target = random_tensor((4, 3), torch.float32, device), targets((4, 3), device)
    for layer in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        torch.testing.assert_close(layer(x, target), stock(x, target))
    (row,) = fusednn.explain(layers.NLLLoss(), x, target)
    assert (row.operation, row.path) == ("nll_loss", "kernel" if KERNELS_RUN else "stock")
