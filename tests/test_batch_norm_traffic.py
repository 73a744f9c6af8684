"""Bytes that batch norm moves, its launches, and how they fill a GPU."""

import pytest
import torch
from support.batch_norm import vectors

from fusednn import autograd, kernels
from fusednn.instruments.saved_tensors import saved_tensors
from fusednn.testing import leaf, random_tensor

if kernels.INTERPRETING:
    from fusednn.instruments.traffic import measure_traffic

needs_kernels = pytest.mark.kernels
counts_traffic = [pytest.mark.kernels, pytest.mark.interpreter]


SHAPE = (4, 16, 16, 16)  # 8 whole tiles, in both memory formats


class Counted:
    """Bytes of a forward and a backward pass in units of the input's, and what was kept."""

    def __init__(self, activation: str | None, joined: bool, layout: torch.memory_format, dtype: torch.dtype) -> None:
        x, gradient, residual = (
            random_tensor(SHAPE, dtype, "cpu", seed).contiguous(memory_format=layout) for seed in range(3)
        )
        x, residual = leaf(x), leaf(residual)
        mean, variance, weight, bias = vectors(SHAPE[1], torch.float32, "cpu")
        weight, bias = leaf(weight), leaf(bias)
        added = residual if joined else None
        with measure_traffic() as forward, saved_tensors() as saved:
            y = autograd.batch_norm_act(x, mean, variance, weight, bias, True, residual=added, activation=activation)
        with measure_traffic() as backward:
            torch.autograd.grad(y, [x, weight, bias, *([residual] if joined else [])], gradient)
        unit = x.numel() * x.itemsize
        self.forward, self.backward = forward.bytes / unit, backward.bytes / unit
        self.bit = x.numel() / 8 / unit
        # Statistics, partial sums and parameters are vectors of the channels, for each program: apart from the budget.
        # So is what programs left, which those of the pass that follows read.
        plan = kernels.base.channels.plan_of(x)
        channels = plan.tiling.width if plan.tiling.axis == 0 else plan.tiling.height
        self.apart = (16 + 5 * plan.splits) * plan.programs * channels * 4 / unit
        self.kept = saved.bytes_beside(x, weight, bias) / unit
        self.launches = forward.launches, backward.launches
        self.operations = [operation.name for operation in (*forward.operations, *backward.operations)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
class TestBudget:
    pytestmark = counts_traffic

    @pytest.mark.parametrize("activation", [None, pytest.param("relu", marks=pytest.mark.thorough), "gelu"])
    def test_alone_and_with_an_activation(
        self, activation: str | None, layout: torch.memory_format, dtype: torch.dtype
    ) -> None:
        counted = Counted(activation, False, layout, dtype)
        assert 3 <= counted.forward <= 3 + counted.apart
        assert 5 <= counted.backward <= 5 + counted.apart
        assert counted.kept <= 0.05
        assert counted.launches == (2, 2)
        assert not counted.operations

    def test_with_residual_and_relu(self, layout: torch.memory_format, dtype: torch.dtype) -> None:
        counted = Counted("relu", True, layout, dtype)
        assert 4 + counted.bit <= counted.forward <= 4 + counted.bit + counted.apart
        assert 6 + counted.bit <= counted.backward <= 6 + 2 * counted.bit + counted.apart
        assert counted.bit <= counted.kept <= counted.bit + 0.05
        assert counted.launches == (2, 2)

    def test_with_residual_and_a_smooth_activation(self, layout: torch.memory_format, dtype: torch.dtype) -> None:
        counted = Counted("gelu", True, layout, dtype)
        assert counted.forward <= 4 + counted.apart
        assert counted.backward <= 7 + counted.apart
        assert counted.kept <= 1 + 0.05  # the residual itself


@pytest.mark.kernels
@pytest.mark.interpreter
def test_evaluation_moves_each_operand_once(device: str) -> None:
    x, gradient = (random_tensor(SHAPE, torch.float32, device, seed) for seed in (0, 1))
    unit = x.numel() * x.itemsize
    running = vectors(SHAPE[1], torch.float32, device)
    with measure_traffic() as forward:
        autograd.batch_norm(x, *running)
    assert forward.bytes <= 2.05 * unit
    assert forward.launches == 1
    assert not forward.operations
    y = autograd.batch_norm(leaf(x), *running)
    with measure_traffic() as backward:
        y.backward(gradient)
    assert backward.bytes <= 2.05 * unit  # the parameters need no gradients, so the input isn't read
    assert backward.launches == 1


@needs_kernels
@pytest.mark.parametrize(
    ("shape", "memory_format"),
    [
        ((32, 64, 112, 112), torch.contiguous_format),
        ((32, 64, 112, 112), torch.channels_last),
        ((32, 256, 56, 56), torch.contiguous_format),
        ((32, 512, 28, 28), torch.channels_last),
        ((32, 1024, 14, 14), torch.contiguous_format),
        ((32, 2048, 7, 7), torch.contiguous_format),
        ((32, 2048, 7, 7), torch.channels_last),
        ((1, 1, 1000, 1000), torch.contiguous_format),
        ((1, 3, 1000, 1000), torch.contiguous_format),
        ((65536, 16, 1, 1), torch.contiguous_format),
    ],
    ids=str,
)
def test_programs_fill_a_gpu(shape: tuple[int, ...], memory_format: torch.memory_format) -> None:
    x = torch.empty(1, dtype=torch.bfloat16).expand(shape)
    strides = torch.empty(shape, device="meta").contiguous(memory_format=memory_format).stride()
    plan = kernels.base.channels.plan_of(torch.empty_strided(shape, strides, device="meta"))
    assert x.numel() >= 10**6
    threads = plan.programs * plan.tiling.threads(x.dtype)
    assert 112 * 512 <= threads <= 1024 * 128  # of an H200, all but a seventh at 16 warps each
    assert plan.splits <= plan.tiling.lanes  # which one tile holds
