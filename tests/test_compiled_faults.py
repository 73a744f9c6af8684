"""Faults planted in our own kernels: compiled code shows each of them.  Without the fault, the same call passes."""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
import vgpu.driver
from support.planting import forget_compiled, planted
from torch import Tensor
from vgpu import VirtualGpuError, machine_options
from vgpu.program import LoadedKernel

from fusednn import autograd, optim
from fusednn.kernels import gated, linear_maxout, optimizer, pool_window
from fusednn.kernels.base import channels, lines, numerics, tiles
from fusednn.kernels.functions import optimizer as optimizer_functions
from fusednn.testing import assert_accurate

pytestmark = pytest.mark.compiled


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


def holds(ours: Callable[..., Tensor], stock: Callable[..., Tensor], *operands: Tensor) -> None:
    """Hold value and gradients to the accuracy rule."""

    def results(function: Callable[..., Tensor], operands: Sequence[Tensor]) -> list[Tensor]:
        leaves = [operand.detach().requires_grad_() for operand in operands]
        y = function(*leaves)
        upstream = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape)
        return [y.detach(), *torch.autograd.grad(y, leaves, upstream.to(y.dtype))]

    reference = results(stock, [operand.double() for operand in operands])
    for each in zip(results(ours, operands), results(stock, operands), reference, strict=True):
        assert_accurate(*each, "value or gradient")


def relu(*shape: int) -> None:
    holds(autograd.relu, F.relu, normal(*shape))


def relu_of_unaligned() -> None:
    holds(autograd.relu, F.relu, normal(5001)[1:])


def in_bfloat16(function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> Callable[[], None]:
    """Rounded to nearest, once."""

    def call() -> None:
        operands = [normal(*shape, dtype=torch.bfloat16) for shape in shapes]
        assert torch.equal(function(*operands), function(*(each.float() for each in operands)).bfloat16())

    return call


def softmax(dim: int, *shape: int) -> None:
    holds(lambda x: autograd.softmax(x, dim), lambda x: F.softmax(x, dim), normal(*shape))


def cross_entropy(*shape: int) -> None:
    target = torch.arange(shape[0])
    holds(lambda x: autograd.cross_entropy(x, target), lambda x: F.cross_entropy(x, target), normal(*shape))


def batch_norm(channels: int, layout: torch.memory_format) -> None:
    holds(
        lambda x, weight, bias: autograd.batch_norm(x, None, None, weight, bias, True),
        lambda x, weight, bias: F.batch_norm(x, None, None, weight, bias, True),
        *(normal(8, channels, 20, 20).contiguous(memory_format=layout), normal(channels), normal(channels)),
    )


def prelu(*shape: int) -> None:
    holds(autograd.prelu, F.prelu, normal(*shape), torch.full((shape[1],), 0.25))


def biased_relu(rows: int, columns: int) -> None:
    options: dict[str, Any] = {"activation": "relu", "p": 0.0, "training": True}
    holds(
        lambda x, bias: autograd.bias_activation_dropout(x, bias, **options),
        lambda x, bias: F.relu(x + bias),
        *(normal(rows, columns), normal(columns)),
    )


def padded_pool() -> None:
    holds(lambda x: autograd.max_pool2d(x, 3, 2, 1), lambda x: F.max_pool2d(x, 3, 2, 1), normal(1, 2, 9, 9))


def adamax_of_nan() -> None:
    """Its infinity norm is a maximum of the last one and the gradient."""
    norms = []
    for optimizer_class in (torch.optim.Adamax, optim.Adamax):
        weight = torch.zeros(100, requires_grad=True)
        weight.grad = torch.where(torch.arange(100) == 7, torch.nan, 1.0)
        optimizer = optimizer_class([weight])
        optimizer.step()
        norms.append(optimizer.state[weight]["exp_inf"].isnan())
    assert torch.equal(*norms)


def maxout_of_one_unit() -> None:
    weight = normal(2, 1, 48)
    holds(autograd.maxout_linear, lambda x, w: (x @ w.mT).amax(0), normal(20, 48), weight)


def maximum_with_nan() -> None:
    x = torch.where(torch.arange(64) == 9, torch.nan, 1.0).view(1, 1, 8, 8)
    torch.testing.assert_close(autograd.max_pool2d(x, 2), F.max_pool2d(x, 2), equal_nan=True)


def sgd(numel: int) -> None:
    weights = [torch.ones(numel, requires_grad=True) for _ in range(2)]
    for weight, optimizer_class in zip(weights, (torch.optim.SGD, optim.SGD), strict=True):
        weight.grad = torch.linspace(-1, 1, numel)
        optimizer_class([weight], lr=0.5).step()
    torch.testing.assert_close(*weights)


def halves(*shape: int) -> None:
    holds(autograd.gated_halves, F.glu, normal(*shape))


class Fault(NamedTuple):
    function: Any
    right: str
    wrong: str
    call: Callable[[], None]
    error: type[BaseException]
    match: str | None = None


OUTSIDE, MISALIGNED = "outside every tensor", "misaligned address"
FAULTS = {
    "a flat tile's mask on the tail": Fault(
        tiles.place_tile,
        "offsets < inside,",
        "offsets <= inside,",
        lambda: relu(5000),
        VirtualGpuError,
        OUTSIDE,
    ),
    "a line's mask on the tail": Fault(
        lines.line_tile,
        "place < lines.dim_size",
        "place <= lines.dim_size",
        lambda: softmax(1, 3, 100),
        VirtualGpuError,
        OUTSIDE,
    ),
    "a mask of the lines": Fault(
        lines.line_block, "line < count", "line <= count", lambda: softmax(1, 3, 100), VirtualGpuError, OUTSIDE
    ),
    "lines across: a mask of the lines": Fault(
        lines.line_block,
        "first + within < inner_size",
        "first + within <= inner_size",
        lambda: softmax(0, 7, 50),
        VirtualGpuError,
        OUTSIDE,
    ),
    "a product's mask": Fault(
        linear_maxout.linear_maxout_forward_kernel,
        "(unit < units)[:, None] & within,",
        "within,",
        maxout_of_one_unit,
        VirtualGpuError,
        OUTSIDE,
    ),
    "an element before the tensor": Fault(
        tiles.load,
        "pointer + tile.offsets, mask=tile.inside",
        "pointer + tile.offsets - 1, mask=tile.inside",
        lambda: relu(100),
        VirtualGpuError,
        OUTSIDE,
    ),
    "channels: a mask of the places": Fault(
        channels.tile_place,
        "column < columns - inner_block * TILING.width",
        "column <= columns - inner_block * TILING.width",
        lambda: batch_norm(3, torch.contiguous_format),
        VirtualGpuError,
        OUTSIDE,
    ),
    "channels_last: a mask of the channels": Fault(
        channels.tile_place,
        "column < columns - channel_block * TILING.width",
        "column <= columns - channel_block * TILING.width",
        lambda: batch_norm(6, torch.channels_last),
        VirtualGpuError,
        OUTSIDE,
    ),
    "a matrix's mask": Fault(
        tiles.matrix_tile,
        "tl.arange(0, HEIGHT)[:, None] < rows - row",
        "tl.arange(0, HEIGHT)[:, None] <= rows - row",
        lambda: halves(5, 80),
        VirtualGpuError,
        OUTSIDE,
    ),
    "a window's mask": Fault(
        pool_window.within,
        "place.to(tl.uint32) < extent.to(tl.uint32)",
        "place <= extent",
        padded_pool,
        VirtualGpuError,
        OUTSIDE,
    ),
    "a chunk's end": Fault(
        optimizer.chunk_place,
        "tl.minimum(length, tl.load(extents + tensor) - start)",
        "length",
        lambda: sgd(100),
        VirtualGpuError,
        OUTSIDE,
    ),
    "a vector access that isn't aligned": Fault(
        tiles.load,
        "tl.load(pointer + tile.offsets)",
        "tl.load(tl.multiple_of(pointer + tile.offsets, (1, 16)))",
        relu_of_unaligned,
        VirtualGpuError,
        MISALIGNED,
    ),
    "a maximum that drops NaN": Fault(
        optimizer_functions.maximum, ", propagate_nan=tl.PropagateNan.ALL", "", adamax_of_nan, AssertionError
    ),
    "a window's maximum that drops NaN": Fault(
        pool_window.surpasses, "(rank > best) | (rank != rank)", "rank > best", maximum_with_nan, AssertionError
    ),
    "a conversion that truncates": Fault(
        numerics.narrow,
        "return x.to(dtype)",
        'return x.to(dtype, fp_downcast_rounding="rtz")',
        in_bfloat16(autograd.gelu, (3000,)),
        AssertionError,
    ),
    "an argument of 1 that has to be a tensor": Fault(
        linear_maxout.linear_maxout_forward_kernel,
        "tl.cast(units, tl.int64)",
        "units.to(tl.int64)",
        maxout_of_one_unit,
        RuntimeWarning,
        "can't be launched",
    ),
    "a gate's argument of 1 that has to be a tensor": Fault(
        gated.gate_tile,
        "[:, None] * pitch",
        "[:, None] * pitch.to(tl.int32) * columns.to(tl.int32) // columns",
        lambda: halves(5, 2),
        RuntimeWarning,
        "can't be launched",
    ),
}


@pytest.mark.whole
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_shows(name: str) -> None:
    fault = FAULTS[name]
    fault.call()
    with planted(fault.function, fault.right, fault.wrong), pytest.raises(fault.error, match=fault.match):
        fault.call()
    fault.call()


#: Other families that show a fault of what they share.
ELSEWHERE: dict[str, list[Callable[[], None]]] = {
    "a flat tile's mask on the tail": [
        lambda: holds(autograd.gated, lambda gate, other: F.silu(gate) * other, normal(2, 700), normal(2, 700)),
        lambda: holds(autograd.mse_loss, F.mse_loss, normal(5000), normal(5000)),
        lambda: holds(
            lambda x: autograd.rrelu(x, 0.25, 0.25, training=True), lambda x: F.leaky_relu(x, 0.25), normal(5000)
        ),
    ],
    "a line's mask on the tail": [lambda: cross_entropy(3, 100)],
    "a mask of the lines": [lambda: cross_entropy(3, 100)],
    "a matrix's mask": [lambda: biased_relu(5, 80)],
    "an element before the tensor": [
        lambda: softmax(1, 3, 100),
        lambda: batch_norm(3, torch.contiguous_format),
        lambda: holds(autograd.mse_loss, F.mse_loss, normal(100), normal(100)),
        lambda: prelu(2, 3, 5, 5),
    ],
    "a vector access that isn't aligned": [
        lambda: holds(autograd.gelu, F.gelu, normal(5001)[1:]),
        lambda: holds(autograd.mse_loss, F.mse_loss, normal(5001)[1:], normal(5001)[1:]),
    ],
    "a conversion that truncates": [
        in_bfloat16(autograd.gated, (50, 60), (50, 60)),
        in_bfloat16(lambda x: autograd.softmax(x, 1), (30, 100)),
        in_bfloat16(autograd.prelu, (4, 3, 50), (3,)),
        in_bfloat16(autograd.gated_halves, (30, 100)),
    ],
}


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "number"), [(name, n) for name, calls in ELSEWHERE.items() for n in range(len(calls))]
)
def test_a_fault_shows_in_other_families(name: str, number: int) -> None:
    fault, call = FAULTS[name], ELSEWHERE[name][number]
    call()
    with planted(fault.function, fault.right, fault.wrong), pytest.raises(fault.error, match=fault.match):
        call()


# --- Barriers ---------------------------------------------------------------------------------------------------------

SHARED_ACCESS = re.compile(r"\b(ld|st|cp\.async|ldmatrix)\.\S*shared")
BARRIER = re.compile(r"bar\.sync[^;]*;")


def products() -> None:
    """Of one step, and of several: what is written behind the last one overlaps with different steps' operands."""
    for features in (32, 64, 160):
        operands = normal(50, features).half(), normal(2, 40, features).half() / 12
        holds(autograd.maxout_linear, lambda x, weight: (x @ weight.mT).amax(0), *operands)


def convolution() -> None:
    shapes = (2, 16, 12, 12), (32, 16, 3, 3)
    x, weight = (normal(*shape).half().contiguous(memory_format=torch.channels_last) for shape in shapes)
    with torch.no_grad():
        y = autograd.conv_act_pool2d(x, weight / 12, None, 1, 1, activation="relu", pool_size=2)
    expected = F.max_pool2d(F.relu(F.conv2d(x.float(), weight.float() / 12, padding=1)), 2)
    torch.testing.assert_close(y.float(), expected, rtol=4e-3, atol=4e-3)


BARRIERS: dict[str, Callable[[], None]] = {
    "channels' sums": lambda: prelu(8, 3, 20, 20),
    "sums over rows": lambda: softmax(0, 64, 40),
    "sums over columns": lambda: softmax(1, 3, 1000),
}


#: Whose operands are copied to shared memory in the background, ahead of what is computed.
STAGED: dict[str, Callable[[], None]] = {
    "batch norm": lambda: batch_norm(3, torch.contiguous_format),
    "batch norm in channels_last": lambda: batch_norm(16, torch.channels_last),
    "products": products,
    "convolution": convolution,
}
#: Of threads that may read what others copied: behind what waits for their own copies.
BEHIND_COPIES = re.compile(r"cp\.async\.wait_group\s+\d+;\s*$")


class Barrier(NamedTuple):
    kernel: str
    number: int
    behind_copies: bool


class Barriers:
    """Those that Triton puts between accesses to shared memory, of the kernels that a call launches."""

    def __init__(self, call: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
        self.call, self.found = call, set[Barrier]()
        self._load, self._patch = vgpu.driver._load, monkeypatch
        assert self.passes_without(None)

    def passes_without(self, which: Barrier | None) -> bool:
        """Whether nothing is noticed without it: no error, and right results, whichever warp comes first."""

        def load(ptx: bytes) -> LoadedKernel:
            text, kernel = ptx.decode(), self._load(ptx).program.name
            for n, barrier in enumerate(BARRIER.finditer(text)):
                before, after = text[: barrier.start()], text[barrier.end() :]
                if SHARED_ACCESS.search(before) and SHARED_ACCESS.search(after):
                    self.found.add(Barrier(kernel, n, bool(BEHIND_COPIES.search(before))))
                if which is not None and which[:2] == (kernel, n):
                    return LoadedKernel(before + after)
            return self._load(ptx)

        self._patch.setattr(vgpu.driver, "_load", load)
        try:
            for order in ("forward", "reversed"):
                forget_compiled()
                torch.manual_seed(0)
                with machine_options(order=order):
                    self.call()
        except (VirtualGpuError, AssertionError):
            return False
        finally:
            forget_compiled()
        return True


@pytest.mark.parametrize("name", BARRIERS)
def test_a_missing_barrier_shows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One at a time is left out."""
    barriers = Barriers(BARRIERS[name], monkeypatch)
    assert barriers.found
    assert not [which for which in sorted(barriers.found) if barriers.passes_without(which)]


@pytest.mark.thorough
@pytest.mark.parametrize("name", STAGED)
def test_a_missing_barrier_behind_copies_shows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where products read what other threads copied.  Most of batch norm's threads read their own copies: results are
    right without a barrier, whichever warp comes first.
    """
    barriers = Barriers(STAGED[name], monkeypatch)
    behind = sorted(barrier for barrier in barriers.found if barrier.behind_copies)
    unnoticed = [which for which in behind if barriers.passes_without(which)]
    assert behind
    assert all(which.kernel.startswith("batch_norm") for which in unnoticed), unnoticed
    assert name == "batch norm in channels_last" or len(unnoticed) < len(behind)
