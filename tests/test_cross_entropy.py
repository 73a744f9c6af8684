"""Cross-entropy: every kind of target and option, every size class of line, along and across memory."""

import itertools
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.device import FLOAT_DTYPES, ON_GPU
from support.gpu import check_capture, no_recompilation
from support.launches import assert_shipped, note_launches
from support.losses import odd_lines
from torch import Tensor, nn

import fusednn
from fusednn import autograd, kernels, layers
from fusednn.instruments.saved_tensors import saved_tensors
from fusednn.kernels.base import long_lines
from fusednn.testing import LAYOUTS, check_against_stock, leaf, random_tensor

if kernels.INTERPRETING:
    from fusednn.instruments.traffic import measure_traffic

pytestmark = pytest.mark.kernels

REDUCTIONS = ("none", "mean", "sum")
SHAPES = [(7,), (1, 1), (40, 10), (6, 100), (3, 1000), (2, 5001), (2, 21, 5, 7), (2, 40, 3), (3, 1, 4)]
every_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)
every_dtype = pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)


def classes_of(shape: tuple[int, ...]) -> int:
    return shape[min(len(shape) - 1, 1)]


def lines_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    return () if len(shape) == 1 else (shape[0], *shape[2:])


def indices(shape: tuple[int, ...], device: str, *, ignored: int = -100) -> Tensor:
    """Class indices, of which every fifth is ignored."""
    target = torch.randint(classes_of(shape), lines_of(shape), device=device)
    if target.dim():
        target.view(-1)[2::5] = ignored
    return target


def check(x: Tensor, target: Tensor, reduction: str, *, weighted: bool = False, **options: Any) -> None:
    """Value and gradients of logits and of probabilities."""
    weight = torch.linspace(0.2, 1.5, classes_of(x.shape), dtype=torch.float64, device=x.device)
    shape = lines_of(x.shape) if reduction == "none" else ()
    gradient = random_tensor(shape, x.dtype, str(x.device), seed=5)
    operands = [x, target] if target.is_floating_point() else [x]

    def function(namespace: Any, x: Tensor, target: Tensor = target) -> Tensor:
        rescaling = weight.to(x.dtype) if weighted else None
        loss: Tensor = namespace.cross_entropy(x, target, rescaling, reduction=reduction, **options)
        return loss

    check_against_stock(
        lambda *tensors: function(autograd, *tensors), lambda *tensors: function(F, *tensors), operands, gradient
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@every_dtype
@pytest.mark.smoke
def test_indices(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    for reduction, weighted in zip(REDUCTIONS, (False, True, False), strict=True):
        check(random_tensor(shape, dtype, device), indices(shape, device), reduction, weighted=weighted)


@pytest.mark.parametrize("shape", [(5,), (7, 10), (3, 1000), (2, 2100), (2, 21, 5, 7), (2, 40, 3)], ids=str)
@pytest.mark.parametrize("smoothing", [0.1, pytest.param(1.0, marks=pytest.mark.thorough)])
def test_smoothed_indices(shape: tuple[int, ...], smoothing: float, device: str) -> None:
    for (reduction, weighted), dtype in zip(
        itertools.product(REDUCTIONS, (False, True)), itertools.cycle((torch.float32, torch.bfloat16)), strict=False
    ):
        x, target = random_tensor(shape, dtype, device), indices(shape, device)
        check(x, target, reduction, weighted=weighted, label_smoothing=smoothing)
    check(random_tensor(shape, torch.float64, device), indices(shape, device), "mean", label_smoothing=smoothing)


@pytest.mark.parametrize("shape", [(5,), (7, 10), (3, 1000), (2, 2100), (2, 21, 5, 7), (2, 40, 3)], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_probabilities(shape: tuple[int, ...], smoothing: float, device: str) -> None:
    for dtype, reduction, weighted in (
        (torch.float32, "mean", False),
        (torch.float32, "none", True),
        (torch.bfloat16, "sum", True),
        (torch.float64, "mean", True),
    ):
        target = random_tensor(shape, dtype, device, seed=1).softmax(min(len(shape) - 1, 1))
        check(random_tensor(shape, dtype, device), target, reduction, weighted=weighted, label_smoothing=smoothing)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.smoke
def test_layouts(layout: str, device: str) -> None:
    shape = (3, 6, 5, 4)
    x = LAYOUTS[layout](random_tensor(shape, torch.float32, device))
    for reduction in ("none", "mean"):
        check(x, indices(shape, device), reduction)
    target = LAYOUTS[layout](random_tensor(shape, torch.float32, device, seed=1).sigmoid())
    check(x, target, "none")
    check(random_tensor(shape, torch.float32, device), target, "none")
    transposed = torch.randint(6, (3, 4, 5), device=device).transpose(1, 2)
    check(x, transposed, "none", label_smoothing=0.1)


@pytest.mark.parametrize("shift", [1000.0, -1000.0, -110.0])
def test_shifted_logits(shift: float, device: str) -> None:
    """A log-sum-exp in one number would lose the digits that gradient and loss need."""
    for shape in ((4, 30), (2, 5000), (2, 40, 3)):
        x = random_tensor(shape, torch.float32, device) + shift
        check(x, indices(shape, device), "none")
        check(x, indices(shape, device), "mean", label_smoothing=0.1)
        check(x, random_tensor(shape, torch.float32, device, seed=1).softmax(1), "none")


def test_odd_values(device: str) -> None:
    for length in (6, 5000):
        x = odd_lines(6, length, device)
        target = torch.tensor([1, 1, 2, 3, length - 1, 0], device=device)
        for options in ({}, {"label_smoothing": 0.1}):
            for data in (target, F.one_hot(target, length).float()):
                ours, stock = (f.cross_entropy(x, data, reduction="none", **options) for f in (autograd, F))
                torch.testing.assert_close(ours, stock, equal_nan=True)


@every_reduction
def test_lines_that_programs_share(reduction: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_lines, "_SHARED_FROM", 8000)
    monkeypatch.setattr(long_lines, "_SPLIT", 1)
    x = random_tensor((3, 9000), torch.bfloat16 if reduction == "sum" else torch.float32, device)
    x[0, :4096] = -float("inf")
    target = torch.tensor([5000, 8999, -100], device=device)
    check(x, target, reduction, weighted=True)
    check(x[1:], target[1:], reduction)
    if not ON_GPU:
        with pytest.raises(IndexError):
            autograd.cross_entropy(x, target + 4000)


@every_reduction
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_all_ignored(reduction: str, smoothing: float, device: str) -> None:
    for weight in (None, torch.ones(5, device=device)):
        results = []
        for function in (autograd.cross_entropy, F.cross_entropy):
            x = leaf(random_tensor((4, 5), torch.float32, device))
            target = torch.full((4,), 3, device=device)
            loss = function(x, target, weight, ignore_index=3, reduction=reduction, label_smoothing=smoothing)
            results.append((loss, *torch.autograd.grad(loss.sum(), x)))
        for ours, stock in zip(*results, strict=True):
            torch.testing.assert_close(ours, stock, equal_nan=True)


@pytest.mark.parametrize("ignored", [-100, 0, 255, -1])
def test_ignore_index(ignored: int, device: str) -> None:
    shape = (11, 6)
    for reduction in REDUCTIONS:
        target = indices(shape, device, ignored=ignored)
        check(random_tensor(shape, torch.float32, device), target, reduction, ignore_index=ignored, weighted=True)


def test_many_programs(device: str) -> None:
    for rows, reduction in itertools.product((10, 700), ("mean", "sum")):
        check_sums(rows, reduction, device)


@pytest.mark.thorough
def test_more_partial_sums_than_one_program_adds(device: str) -> None:
    check_sums(150_000, "mean", device)


def check_sums(rows: int, reduction: str, device: str) -> None:
    x = random_tensor((rows, 3), torch.float32, device)
    target = torch.randint(3, (rows,), device=device)
    ours, stock = (f.cross_entropy(x, target, reduction=reduction) for f in (autograd, F))
    torch.testing.assert_close(ours, stock, rtol=1e-5, atol=0)


@pytest.mark.skipif(ON_GPU, reason="on a GPU it is a device assertion, which ends the process")
@pytest.mark.parametrize("wrong", [10, -1, 2**40])
@pytest.mark.parametrize("shape", [(3, 10), (2, 10, 4)], ids=str)
def test_targets_out_of_bounds(wrong: int, shape: tuple[int, ...], device: str) -> None:
    target = indices(shape, device)
    target.view(-1)[1] = wrong
    outcomes = []
    for function in (F.cross_entropy, autograd.cross_entropy):
        with pytest.raises((IndexError, RuntimeError)) as caught:
            function(random_tensor(shape, torch.float32, device), target)
        outcomes.append((caught.type, str(caught.value)))
    assert outcomes[0] == outcomes[1]


def test_deprecated_arguments(device: str) -> None:
    x, target = random_tensor((4, 5), torch.float32, device), torch.arange(4, device=device)
    for size_average, reduce in itertools.product((None, True, False), repeat=2):
        results, caught = [], []
        for function in (autograd.cross_entropy, F.cross_entropy):
            with warnings.catch_warnings(record=True) as recorded:
                warnings.simplefilter("always")
                results.append(function(x, target, size_average=size_average, reduce=reduce))
            caught.append([str(warning.message) for warning in recorded if warning.category is UserWarning])
        torch.testing.assert_close(*results)
        assert caught[0] == caught[1]


WRONG = [
    ((4, 5), torch.zeros(3, dtype=torch.int64), {}),
    ((4, 5), torch.zeros(4, dtype=torch.int32), {}),
    ((4, 5), torch.zeros(4), {}),
    ((4, 5), torch.zeros(4, dtype=torch.int64), {"reduction": "average"}),
    ((4, 5), torch.zeros(4, dtype=torch.int64), {"weight": torch.ones(4)}),
    ((4, 5), torch.zeros(4, dtype=torch.int64), {"weight": torch.ones(5).double()}),
    ((4, 5), torch.zeros(4, dtype=torch.int64), {"label_smoothing": 1.5}),
    ((4, 5), torch.zeros(4, dtype=torch.int64), {"label_smoothing": -0.5}),
    ((4, 5), torch.zeros(4, dtype=torch.int64), {"ignore_index": 1.5}),
    ((4, 5), torch.zeros(4, 5), {"ignore_index": 1}),
    ((4, 5), torch.zeros(4, 5, dtype=torch.int64), {}),
    ((0, 5), torch.zeros(0, dtype=torch.int64), {}),
    ((), torch.zeros((), dtype=torch.int64), {}),
    ((4, 5), None, {}),
]


@pytest.mark.whole
@pytest.mark.parametrize(("shape", "target", "options"), WRONG, ids=str)
def test_what_the_kernels_refuse_is_stocks(shape: tuple[int, ...], target: object, options: dict, device: str) -> None:
    moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
    target = target.to(device) if isinstance(target, Tensor) else target
    outcomes = []
    for function in (F.cross_entropy, autograd.cross_entropy):
        try:
            outcomes.append(function(torch.ones(shape, device=device), target, **moved))
        except Exception as error:  # the exception is what is compared
            outcomes.append((type(error), str(error)))
    if isinstance(outcomes[0], Tensor):
        torch.testing.assert_close(*outcomes, equal_nan=True)
    else:
        assert outcomes[0] == outcomes[1]


def test_derivatives_in_float64(device: str) -> None:
    x = leaf(random_tensor((2, 3, 2), torch.float64, device))
    target = torch.randint(3, (2, 2), device=device)
    weight = torch.rand(3, dtype=torch.float64, device=device) + 0.5
    for reduction, smoothing in (("none", 0.0), ("mean", 0.1)):

        def loss(x: Tensor, reduction: str = reduction, smoothing: float = smoothing) -> Tensor:
            return autograd.cross_entropy(x, target, weight, reduction=reduction, label_smoothing=smoothing)

        assert torch.autograd.gradcheck(loss, x)
        assert torch.autograd.gradgradcheck(loss, x)
    x = leaf(random_tensor((2, 3), torch.float64, device))
    q = leaf(random_tensor((2, 3), torch.float64, device, seed=1).softmax(1))
    assert torch.autograd.gradcheck(autograd.cross_entropy, (x, q))
    assert torch.autograd.gradgradcheck(autograd.cross_entropy, (x, q))


@pytest.mark.parametrize("needed", [(True, False), (False, True), (False, False)], ids=str)
def test_gradients_only_where_required(needed: tuple[bool, bool], device: str) -> None:
    x = random_tensor((4, 5), torch.float32, device).requires_grad_(needed[0])
    q = random_tensor((4, 5), torch.float32, device, seed=1).softmax(1).requires_grad_(needed[1])
    loss = autograd.cross_entropy(x, q)
    assert loss.requires_grad == any(needed)
    if any(needed):
        loss.backward()
    assert (x.grad is not None, q.grad is not None) == needed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_the_loss_in_float32(dtype: torch.dtype, device: str) -> None:
    shape = (4, 5)
    for target in (indices(shape, device), torch.rand(shape, device=device)):
        results = []
        for function in (autograd.cross_entropy, F.cross_entropy):
            x = leaf(random_tensor(shape, dtype, device))
            with torch.autocast(device, dtype=dtype):
                loss = function(x, target, torch.ones(5, device=device))
            assert loss.dtype is torch.float32
            results.append((loss, *torch.autograd.grad(loss, x)))
        tolerance = {"rtol": 1e-2, "atol": 1e-2} if ON_GPU else {}  # there, stock rounds log-probabilities to 16 bits
        for ours, stock in zip(*results, strict=True):
            torch.testing.assert_close(ours, stock, **tolerance)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((8, 1000), torch.contiguous_format),
        ((1, 32768), torch.contiguous_format),
        ((1, 131072), torch.contiguous_format),
        ((2, 96, 8, 8), torch.contiguous_format),
        ((2, 96, 8, 8), torch.channels_last),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_budget(shape: tuple[int, ...], layout: torch.memory_format, dtype: torch.dtype, device: str) -> None:
    """Forward 1e, backward 2e, with few bytes beside for each line; what is saved are these."""
    x = leaf(random_tensor(shape, dtype, device).contiguous(memory_format=layout))
    target = indices(shape, device)
    with measure_traffic() as forward, saved_tensors() as saved:
        loss = autograd.cross_entropy(x, target)
    with measure_traffic() as backward:
        torch.autograd.grad(loss, x, torch.ones_like(loss))
    tensor, lines = x.numel() * x.itemsize, target.numel()
    # Target, statistics, the target's logit, partial sums.
    assert tensor <= forward.bytes <= tensor + lines * 32 + 128
    piece = 1024 if len(shape) == 2 else 128
    assert 2 * tensor <= backward.bytes <= 2 * tensor + lines * 32 * -(-shape[1] // piece) + 128
    assert saved.bytes_beside(x, target) <= 8 * lines + 8
    assert forward.launches <= 2
    assert backward.launches == 1
    copies = [operation for operation in (*forward.operations, *backward.operations) if operation.read_bytes > 64]
    assert not copies


def test_segmentation_targets_are_not_copied(device: str) -> None:
    x = random_tensor((2, 5, 3, 4), torch.float32, device)
    strides = kernels.cross_entropy.line_strides
    assert strides(x) == strides(x.to(memory_format=torch.channels_last)) == torch.empty(2, 3, 4).stride()
    assert strides(x.permute(0, 1, 3, 2)) == (12, 1, 4)
    assert strides(torch.empty(5)) == ()
    assert strides(torch.empty(3, 1, 4)) == (4, 1)


def test_layer_replaces_checkpoints_and_compiles(device: str) -> None:
    torch._dynamo.reset()
    loss_function = nn.CrossEntropyLoss(torch.linspace(0.5, 1, 5).to(device), ignore_index=1, label_smoothing=0.1)
    x, target = random_tensor((6, 5, 3), torch.float32, device), torch.randint(5, (6, 3), device=device)
    expected = loss_function(x, target)
    fusednn.replace_layers(loss_function)
    assert type(loss_function) is layers.CrossEntropyLoss
    for function in (
        loss_function,
        lambda *operands: torch.utils.checkpoint.checkpoint(loss_function, *operands, use_reentrant=False),
        torch.compile(loss_function, fullgraph=True, backend="aot_eager"),
    ):
        logits = leaf(x)
        loss = function(logits, target)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(
            torch.autograd.grad(loss, logits)[0], torch.autograd.grad(loss_function(logits, target), logits)[0]
        )


def test_opcheck(device: str) -> None:
    operators = torch.ops.fusednn
    for layout in ("channels_last", "strided"):
        x = LAYOUTS[layout](random_tensor((2, 6, 3, 4), torch.float32, device))
        for target in (indices((2, 6, 3, 4), device), x.sigmoid()):
            for reduction, smoothing in (("none", 0.1), ("mean", 0.0)):
                options = (reduction, -100, smoothing)
                operands = (x, target, torch.ones(6, device=device))
                torch.library.opcheck(operators.cross_entropy.default, (*operands, *options, torch.float32))
                loss, *statistics = operators.cross_entropy(*operands, *options, torch.float32)
                needed = (True, target.is_floating_point())
                torch.library.opcheck(
                    operators.cross_entropy_backward.default, (loss, *operands, *statistics, *options, *needed)
                )


def test_launches_are_shipped_configurations(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = note_launches(monkeypatch, kernels.cross_entropy, kernels.softmax)
    for dtype in FLOAT_DTYPES:
        for shape in ((3, 10), (2, 6, 3)):
            x = leaf(random_tensor(shape, dtype, device))
            autograd.log_softmax(x, 1).sum().backward()
            for target in (indices(shape, device), x.detach().sigmoid()):
                autograd.cross_entropy(x, target, label_smoothing=0.1).backward()
                autograd.cross_entropy(x, target, reduction="none").sum().backward()
    assert_shipped(launched)


# --- On a GPU -------------------------------------------------------------------------------------------------------

STEPS = {
    "softmax": lambda x, target: autograd.softmax(x, 1).square().sum(),
    "log_softmax": lambda x, target: autograd.log_softmax(x, 1).square().sum(),
    "cross_entropy": lambda x, target: autograd.cross_entropy(x, target, label_smoothing=0.1),
    "cross_entropy_none": lambda x, target: autograd.cross_entropy(x, target, reduction="none").sum(),
    "probabilities": lambda x, target: autograd.cross_entropy(x, F.one_hot(target, x.shape[1]).float()),
    "linear": lambda x, target: autograd.linear_cross_entropy(x, x.detach(), target % x.shape[0]),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in STEPS if name != "probabilities"])  # one_hot itself waits
def test_no_host_synchronisation_and_graph_capture(name: str, device: str) -> None:
    x = leaf(random_tensor((64, 500), torch.float32, device))
    target = torch.randint(500, (64,), device=device)

    def step() -> tuple[Tensor, Tensor]:
        loss = STEPS[name](x, target)
        return loss, torch.autograd.grad(loss, x)[0]

    check_capture(step)


@pytest.mark.gpu
def test_no_recompilation_over_fifty_steps(device: str) -> None:
    def train(index: int, batch: int) -> None:
        x, target = leaf(torch.randn(batch, 100, device=device)), torch.randint(100, (batch,), device=device)
        for function in STEPS.values():
            function(x, target).backward()
        autograd.cross_entropy(x, target, ignore_index=index, label_smoothing=0.01 * (1 + index)).backward()

    for batch in (3200, 17, 16, 1):
        train(0, batch)
    with no_recompilation("softmax", "cross_entropy"):
        for index in range(50):
            train(index, (3200, 1700, 16, 1)[index % 4])


@pytest.mark.gpu
def test_wrong_targets_fail_a_device_assertion() -> None:
    """In a process of its own: a failed assertion ends its use of the GPU."""
    call = "autograd.cross_entropy(torch.zeros(4, 3, device='cuda'), torch.full((4,), 3, device='cuda'))"
    script = f"import torch\nfrom fusednn import autograd\n{call}\ntorch.cuda.synchronize()"
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert process.returncode != 0
    assert "device-side assert" in process.stderr
