"""Softmax, log-softmax and softmin: every size class of line, along and across memory."""

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.device import FLOAT_DTYPES
from support.losses import odd_lines
from torch import Tensor, nn

from fusednn import autograd, kernels, layers
from fusednn.catalogue import row_of
from fusednn.instruments.saved_tensors import saved_tensors
from fusednn.kernels.base import long_lines
from fusednn.kernels.base.lines import Lines, lines_of
from fusednn.testing import LAYOUTS, check_against_stock, leaf, random_tensor

if kernels.INTERPRETING:
    from fusednn.instruments.traffic import measure_traffic

pytestmark = pytest.mark.kernels

NAMES = ("softmax", "log_softmax", "softmin")
every_name = pytest.mark.parametrize("name", NAMES)
every_dtype = pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)


def functions(name: str, dim: int) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    return lambda x: getattr(autograd, name)(x, dim), lambda x: getattr(F, name)(x, dim)


def check(name: str, x: Tensor, gradient: Tensor, dim: int) -> None:
    check_against_stock(*functions(name, dim), [x], gradient)


# Shapes and dimensions: one for each width of tile and each way to walk memory, with ragged tails.
LINES = [
    ((), 0),
    ((1,), -1),
    ((37, 10), 1),
    ((5, 100), -1),
    ((3, 1000), 1),
    ((2, 4000), 1),
    ((2, 1, 3), 1),
    ((2, 3, 7, 9), 1),
    ((100, 40), 0),
    ((2, 300, 5), 1),
]
LONG = [((1, 12001), 1), ((2, 20000), 1), ((1, 40000), 1)]


@pytest.mark.parametrize(("shape", "dim"), LINES, ids=str)
@every_name
@every_dtype
def test_lines(name: str, shape: tuple[int, ...], dim: int, dtype: torch.dtype, device: str) -> None:
    check(name, random_tensor(shape, dtype, device), random_tensor(shape, dtype, device, seed=1), dim)


@pytest.mark.parametrize(("shape", "dim"), LONG, ids=str)
@every_name
def test_long_lines(name: str, shape: tuple[int, ...], dim: int, device: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        check(name, random_tensor(shape, dtype, device), random_tensor(shape, dtype, device, seed=1), dim)


@pytest.mark.parametrize("length", [9000, 70_000, 300_000], ids=str)
def test_splits_of_shared_lines(length: int) -> None:
    """They cover the line, with whole chunks, and one program can join them."""
    splits = long_lines.splits_of(Lines(3, length, 1))
    assert splits.size % long_lines.CHUNK == 0
    assert (splits.number - 1) * splits.size < length <= splits.number * splits.size
    assert splits.number <= long_lines.SPLITS


def test_lines_are_shared_from_a_length_on() -> None:
    from_here = long_lines._SHARED_FROM
    shared = [long_lines.are_shared(Lines(3, length, 1), torch.float32) for length in (from_here - 1, from_here)]
    assert shared == [False, True]


@every_name
def test_lines_that_programs_share(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_lines, "_SHARED_FROM", 8000)
    monkeypatch.setattr(long_lines, "_SPLIT", 1)
    for dtype in (torch.float32, torch.bfloat16):
        x = random_tensor((2, 9000), dtype, device)
        x[0, :4096] = -float("inf")
        check(name, x if name != "softmin" else -x, random_tensor((2, 9000), dtype, device, seed=1), 1)


@pytest.mark.thorough
def test_a_line_of_262144_elements(device: str) -> None:
    shape = (1, 262144)
    check("log_softmax", random_tensor(shape, torch.float32, device), torch.ones(shape, device=device), 1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dim", [0, 1, 3])
@pytest.mark.smoke
def test_layouts(layout: str, dim: int, device: str) -> None:
    x, gradient = (LAYOUTS[layout](random_tensor((3, 6, 5, 4), torch.float32, device, seed)) for seed in (0, 1))
    check("softmax", x, gradient, dim)
    check("log_softmax", x, LAYOUTS["expanded"](gradient), dim)


@every_name
@pytest.mark.parametrize("shift", [1000.0, -1000.0, -110.0])
def test_shifted_logits(name: str, shift: float, device: str) -> None:
    """The gradient y (g - sum of y g) is read off the saved y: |g| = 1 bounds the derivative of it by 2."""
    for shape, dim in (((4, 30), 1), ((2, 9000), 1), ((2, 300, 3), 1)):
        x = random_tensor(shape, torch.float32, device) + shift
        upstream = random_tensor(shape, torch.float32, device, seed=1).sign()
        check_against_stock(*functions(name, dim), [x], upstream, saved_output_scale=2.0 * (name != "log_softmax"))


@every_name
def test_odd_values(name: str, device: str) -> None:
    """Whole lines of -inf, NaN and infinities; in chunks, too, where a chunk is all -inf and the line isn't."""
    for length in (5, 5000):
        x = odd_lines(7, length, device)
        x[5, 1:] = float("inf")
        ours, stock = (function(x) for function in functions(name, 1))
        torch.testing.assert_close(ours, stock, equal_nan=True)
        ours, stock = (function(x.T) for function in functions(name, 0))
        torch.testing.assert_close(ours, stock, equal_nan=True)


@every_name
def test_derivatives_in_float64(name: str, device: str) -> None:
    ours, _ = functions(name, 1)
    x = leaf(random_tensor((2, 3, 2), torch.float64, device))
    assert torch.autograd.gradcheck(ours, x)
    assert torch.autograd.gradgradcheck(ours, x)


@every_name
def test_dtype_argument(name: str, device: str) -> None:
    for dtype, wanted in (
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float16),
        (torch.int64, torch.float32),
    ):
        results = []
        for module in (autograd, F):
            x = random_tensor((3, 20), torch.float32, device).to(dtype)
            x = leaf(x)
            y = getattr(module, name)(x, 1, dtype=wanted)
            assert y.dtype is wanted
            results.append([y.detach(), *(torch.autograd.grad(y.square().sum(), x) if x.requires_grad else ())])
        coarser = max(torch.finfo(t).eps for t in (dtype, wanted) if t.is_floating_point)
        for ours, stock in zip(*results, strict=True):
            torch.testing.assert_close(ours, stock, rtol=4 * coarser, atol=4 * coarser)


@every_name
def test_no_dimension_warns_as_stock(name: str, device: str) -> None:
    layer = {"softmax": "Softmax", "log_softmax": "LogSoftmax", "softmin": "Softmin"}[name]
    for shape in ((3,), (3, 4), (2, 3, 4), (2, 3, 4, 5)):
        x = random_tensor(shape, torch.float32, device)
        warned = []
        for namespaces in ((autograd, layers), (F, nn)):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                results = getattr(namespaces[0], name)(x), getattr(namespaces[1], layer)()(x)
            ours = [warning for warning in caught if warning.category is UserWarning]  # numpy warns too
            warned.append([str(warning.message) for warning in ours])
            assert ours[0].filename == __file__
            torch.testing.assert_close(*results)
        assert warned[0] == warned[1]
        assert len(warned[0]) == 2


@pytest.mark.parametrize("dim", [2, -3, 1.0, True, "1"], ids=str)
def test_wrong_dimensions_raise_stocks_error(dim: object, device: str) -> None:
    outcomes = []
    for module in (autograd, F):
        try:
            outcomes.append(module.softmax(torch.ones(2, 3, device=device), dim))
        except Exception as error:  # the exception is what is compared
            outcomes.append(type(error))
    if isinstance(outcomes[1], Tensor):
        torch.testing.assert_close(*outcomes)
    else:
        assert outcomes[0] is outcomes[1]


def test_softmax2d(device: str) -> None:
    for shape in ((2, 5, 4, 3), (5, 4, 3)):
        x = random_tensor(shape, torch.float32, device)
        torch.testing.assert_close(layers.Softmax2d()(x), nn.Softmax2d()(x))
    for wrong in (torch.ones(2, 3, device=device), torch.ones(1, 1, 1, 1, 1, device=device)):
        with pytest.raises(ValueError, match="3D or 4D"):
            layers.Softmax2d()(wrong)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("shape", "dim", "layout"),
    [
        ((128, 10), 1, torch.contiguous_format),
        ((8, 1000), 1, torch.contiguous_format),
        ((1, 16384), 1, torch.contiguous_format),
        ((2, 200, 8, 8), 1, torch.contiguous_format),
        ((2, 200, 8, 8), 1, torch.channels_last),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_budget(name: str, shape: tuple[int, ...], dim: int, layout: torch.memory_format, device: str) -> None:
    """No copies, whatever the dimension."""
    for dtype in (torch.float32, torch.bfloat16):
        x, gradient = (random_tensor(shape, dtype, device, seed).contiguous(memory_format=layout) for seed in (0, 1))
        x = leaf(x)
        with measure_traffic() as forward, saved_tensors() as saved:
            y = getattr(autograd, name)(x, dim)
        with measure_traffic() as backward:
            torch.autograd.grad(y, x, gradient)
        assert (forward.bytes, backward.bytes) == row_of(name).budget(x.shape, dtype)
        assert (forward.launches, backward.launches) == (1, 1)
        assert not forward.operations
        assert not backward.operations
        assert saved.bytes_beside(y) == 0


@pytest.mark.interpreter
def test_lines_longer_than_the_registers_are_read_twice(device: str) -> None:
    for length, ahead, back in ((32768, 2, 5), (40000, 3, 5)):
        x = leaf(random_tensor((1, length), torch.float32, device))
        with measure_traffic() as forward:
            y = autograd.softmax(x, 1)
        with measure_traffic() as backward:
            torch.autograd.grad(y, x, torch.ones_like(y))
        assert (forward.bytes, backward.bytes) == (ahead * 4 * length, back * 4 * length)


def test_lines_of_any_dense_memory() -> None:
    x = torch.empty(2, 3, 4, 5)
    assert lines_of(x, 3).extents == (24, 5, 1)
    assert lines_of(x, 1).extents == (40, 3, 20)
    assert lines_of(x.to(memory_format=torch.channels_last), 1).extents == (40, 3, 1)
    assert lines_of(torch.empty(7, 1, 3), 1).extents == (21, 1, 1)
    assert lines_of(x, 1).blocks(32) == 2  # a block for each sample: none spans the gap


@pytest.mark.usefixtures("keeps_kernels")
@every_name
def test_compiles_without_graph_breaks(name: str, device: str) -> None:
    torch._dynamo.reset()
    ours, _ = functions(name, 1)
    compiled = torch.compile(lambda x: ours(x) * 2, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((4, 10), (3, 10, 2)):
        for layout in (lambda x: x, lambda x: x.transpose(0, 1)):
            x = leaf(layout(random_tensor(shape, torch.float32, device)))
            y = compiled(x)
            expected = ours(x) * 2
            torch.testing.assert_close(y, expected, rtol=0, atol=0)
            assert y.stride() == expected.stride()
            gradients = (torch.autograd.grad(result.square().sum(), x)[0] for result in (y, expected))
            torch.testing.assert_close(*gradients, rtol=0, atol=0)


@every_name
def test_opcheck(name: str, device: str) -> None:
    for x in (random_tensor((3, 5, 4), torch.float32, device), random_tensor((4, 6, 5), torch.float32, device)[:, ::2]):
        torch.library.opcheck(torch.ops.fusednn.softmax.default, (x, 1, name))
        torch.library.opcheck(torch.ops.fusednn.softmax_backward.default, (x, x, 1, name))
