"""What pointwise losses take, what they refuse and why: as PyTorch's."""

import inspect
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.device import KERNELS_RUN, ON_GPU
from support.losses import LOSSES, REDUCTIONS, Loss
from torch import Tensor

from fusednn import autograd
from fusednn.autograd.dispatch import Choice, observe_choices
from fusednn.testing import leaf, random_tensor

needs_kernels = pytest.mark.kernels
every_loss = pytest.mark.parametrize("loss", LOSSES, ids=str)
every_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)

SHAPE = (3, 4, 5)
BY_NAME = {loss.name: loss for loss in reversed(LOSSES)}
FUNCTIONS = sorted(BY_NAME)


@pytest.mark.parametrize("name", [*FUNCTIONS, "nll_loss"])
def test_signature_is_stocks(name: str) -> None:
    ours, theirs = (inspect.signature(getattr(module, name)).parameters.values() for module in (autograd, F))
    assert [(p.name, p.default, p.kind) for p in ours] == [(p.name, p.default, p.kind) for p in theirs]


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "huber_loss"])
@pytest.mark.parametrize("size_average", [None, True, False])
@pytest.mark.parametrize("reduce", [None, True, False])
def test_deprecated_arguments(name: str, size_average: bool | None, reduce: bool | None, device: str) -> None:
    loss = BY_NAME[name]
    x, t = loss.operands(SHAPE, torch.float32, device)
    outcomes = []
    for function in (loss.ours(), loss.stock()):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            y = function(x, t, size_average=size_average, reduce=reduce)
        outcomes.append((y, [str(warning.message) for warning in caught if warning.category is UserWarning]))
    assert outcomes[0][1] == outcomes[1][1]
    torch.testing.assert_close(outcomes[0][0], outcomes[1][0])


@pytest.mark.parametrize("name", ["mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "kl_div"])
def test_broadcasting_is_stocks(name: str, device: str) -> None:
    x, t = (random_tensor(shape, torch.float32, device).abs() for shape in ((3, 1), (4,)))
    outcomes = []
    for function in (getattr(autograd, name), getattr(F, name)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            y = function(x, t, reduction="sum")
        outcomes.append((y, [str(warning.message) for warning in caught]))
    assert outcomes[0][1] == outcomes[1][1]
    torch.testing.assert_close(outcomes[0][0], outcomes[1][0])


@every_loss
@every_reduction
def test_empty_tensors(loss: Loss, reduction: str, device: str) -> None:
    x, t = loss.operands((0, 5), torch.float32, device)
    results = []
    for function in (loss.ours(reduction=reduction), loss.stock(reduction=reduction)):
        operand = leaf(x)
        y = function(operand, t)
        results.append((y, *torch.autograd.grad(y.sum(), operand)))
    torch.testing.assert_close(*results, equal_nan=True)


def outcome(function: Callable[..., Tensor], *arguments: object, **options: object) -> object:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function(*arguments, **options)
    except Exception as error:  # the exception is what is compared
        return type(error), str(error)


WRONG_CALLS = [
    ("mse_loss", (torch.ones(3), torch.ones(3)), {"reduction": "median"}),
    ("mse_loss", (torch.ones(3), torch.ones(3)), {"weight": torch.ones(1)}),
    ("mse_loss", (torch.ones(3), "text"), {}),
    ("mse_loss", (torch.ones(2, 3), torch.ones(4)), {}),
    ("mse_loss", (torch.ones(3, dtype=torch.int64), torch.ones(3, dtype=torch.int64)), {}),
    ("l1_loss", (torch.ones(3), None), {}),
    ("l1_loss", (torch.ones(3), torch.ones(3)), {"reduction": "batchmean"}),
    ("smooth_l1_loss", (torch.ones(3), torch.ones(3)), {"beta": -1.0}),
    ("smooth_l1_loss", (torch.ones(3), torch.ones(3)), {"beta": float("nan")}),
    ("huber_loss", (torch.ones(3), torch.ones(3)), {"delta": 0.0}),
    ("huber_loss", (torch.ones(3), torch.ones(3)), {"delta": "1"}),
    ("binary_cross_entropy", (torch.ones(3), torch.ones(4)), {}),
    ("binary_cross_entropy", (torch.ones(3), torch.ones(3)), {"weight": torch.ones(4)}),
    ("binary_cross_entropy", (torch.ones(3), torch.ones(3)), {"weight": torch.ones(3, requires_grad=True)}),
    ("binary_cross_entropy_with_logits", (torch.ones(3), torch.ones(4)), {}),
    ("binary_cross_entropy_with_logits", (torch.ones(3), torch.ones(3)), {"pos_weight": torch.ones(4)}),
    ("binary_cross_entropy_with_logits", (torch.ones(3), torch.ones(3)), {"weight": torch.ones(2, 3)}),
    ("kl_div", (torch.ones(3), torch.ones(3)), {"log_target": "yes"}),
    ("kl_div", (torch.ones(4, 3), torch.ones(4, 3)), {"reduction": "batchmean", "reduce": True}),
    ("kl_div", (torch.ones(0), torch.ones(0)), {}),
    ("mse_loss", (torch.ones(3), torch.ones(3, dtype=torch.float64)), {}),
    ("mse_loss", (torch.ones(3), torch.ones(3)), {"weight": torch.ones(3, requires_grad=True)}),
]


@pytest.mark.parametrize(("name", "arguments", "options"), WRONG_CALLS)
def test_what_the_kernels_refuse_is_stocks(name: str, arguments: tuple, options: dict, device: str) -> None:
    def move(value: object) -> object:
        return leaf(value.to(device)).requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value

    moved = tuple(map(move, arguments))
    options = {key: move(value) for key, value in options.items()}
    mine, theirs = (outcome(getattr(module, name), *moved, **options) for module in (autograd, F))
    if isinstance(theirs, Tensor):
        torch.testing.assert_close(mine, theirs, equal_nan=True)
    else:
        assert mine == theirs


@pytest.mark.skipif(ON_GPU, reason="a device assertion there, which ends the process")
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize(
    ("x", "t"), [(1.5, 0.5), (-0.1, 0.5), (float("nan"), 0.5), (0.5, 1.5), (0.5, -1.0), (0.5, float("nan"))]
)
def test_probabilities_out_of_range_raise_stocks_error(x: float, t: float, reduction: str) -> None:
    operands = [torch.full((5000,), 0.25) for _ in range(2)]
    operands[0][-3], operands[1][-3] = x, t
    mine, theirs = (outcome(m.binary_cross_entropy, *operands, reduction=reduction) for m in (autograd, F))
    assert isinstance(theirs, tuple)
    assert mine == theirs


@pytest.mark.skipif(ON_GPU, reason="a device assertion there, which ends the process")
def test_a_compiled_graph_raises_stocks_error() -> None:
    operands = [torch.full((5,), 0.25), torch.full((5,), 1.25)]
    compiled = torch.compile(autograd.binary_cross_entropy, fullgraph=True, backend="eager")
    with pytest.raises(RuntimeError, match="between 0 and 1"):
        compiled(*operands)


REFUSALS = [
    (autograd.mse_loss, (torch.ones(3), torch.ones(1)), {}, "input and target differ in shape"),
    (autograd.mse_loss, (torch.ones(3), torch.ones(3).half()), {}, "operands differ in dtype, device or layout"),
    (autograd.mse_loss, (torch.ones(3), torch.ones(3)), {"reduction": "median"}, "unknown reduction"),
    (autograd.l1_loss, (torch.ones(0), torch.ones(0)), {}, "no elements"),
    (autograd.smooth_l1_loss, (torch.ones(3), torch.ones(3)), {"beta": -1.0}, "the threshold is not positive"),
    (
        autograd.huber_loss,
        (torch.ones(3), torch.ones(3)),
        {"delta": torch.ones(())},
        "a parameter is not a Python number",
    ),
    (
        autograd.mse_loss,
        (torch.ones(3), torch.ones(3)),
        {"weight": torch.ones(3, requires_grad=True)},
        "the weights require gradients",
    ),
    (
        autograd.mse_loss,
        (torch.ones(3), torch.ones(3)),
        {"weight": torch.ones(1)},
        "the weights don't have the shape of the input",
    ),
    (
        autograd.binary_cross_entropy,
        (torch.ones(3), torch.ones(3)),
        {"weight": torch.ones(2, 3)},
        "the weights don't fit the input",
    ),
]


@needs_kernels
@pytest.mark.skipif(ON_GPU, reason="CPU tensors")
@pytest.mark.parametrize(("function", "arguments", "options", "reason"), REFUSALS)
def test_refusals_give_their_reason(function: Callable, arguments: tuple, options: dict, reason: str) -> None:
    choices: list[Choice] = []
    with observe_choices(choices.append):
        outcome(function, *arguments, **options)
    assert [(choice.path, choice.reason) for choice in choices] == [("stock", reason)]


@every_loss
def test_plain_calls_take_the_kernel(loss: Loss, device: str) -> None:
    choices: list[Choice] = []
    with observe_choices(choices.append):
        loss.ours()(*loss.operands(SHAPE, torch.float32, device))
    assert [choice.path for choice in choices] == ["kernel" if KERNELS_RUN else "stock"]


@every_loss
def test_autocast_is_stocks(loss: Loss, device: str) -> None:
    dtype = torch.bfloat16
    x, t = loss.operands(SHAPE, dtype, device)
    results = []
    for function in (loss.ours(), loss.stock()):
        operand = leaf(x)
        with torch.autocast(device, dtype=dtype):
            y = outcome(function, operand, t)
        if isinstance(y, Tensor):
            y = [y.dtype, y.detach(), *torch.autograd.grad(y, operand)]
        results.append(y)
    if isinstance(results[1], tuple):  # CUDA's autocast rejects binary cross-entropy
        assert results[0] == results[1]
    else:
        assert results[0][0] is results[1][0]
        torch.testing.assert_close(results[0][1:], results[1][1:])


@pytest.mark.parametrize("name", ["mse_loss", "l1_loss", "huber_loss"])
def test_autocast_of_a_weighted_loss_is_stocks(name: str, device: str) -> None:
    loss = Loss(name, {}, {"weight": torch.rand(SHAPE)})
    with torch.autocast(device, dtype=torch.bfloat16):
        results = [f(*loss.operands(SHAPE, torch.bfloat16, device)) for f in (loss.ours(), loss.stock())]
    torch.testing.assert_close(*results)


def test_autocast_knows_every_loss() -> None:
    for name in (*FUNCTIONS, "nll_loss"):
        registered = torch._C._dispatch_dump(f"aten::{name}")
        assert "AutocastCPU:" in registered
        assert "AutocastCUDA:" in registered


@every_loss
def test_func_transforms(loss: Loss, device: str) -> None:
    x, t = loss.operands((4, 5), torch.float64, device)
    batched = torch.vmap(loss.ours(reduction="sum"))(x, t)
    torch.testing.assert_close(batched, loss.stock(reduction="none")(x, t).sum(1))
    gradient = torch.func.grad(loss.ours())(x, t)
    operand = leaf(x)
    torch.testing.assert_close(gradient, *torch.autograd.grad(loss.stock()(operand, t), operand))
