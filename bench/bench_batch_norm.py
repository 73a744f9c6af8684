"""Batch norm at ResNet-50's layers: alone, with ReLU, with a residual and ReLU; statistics alone; synchronised."""

from __future__ import annotations

import atexit
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from fusednn_bench.families import counted
from fusednn_bench.replay import test_device_time  # noqa: F401 (pytest collects it here)
from torch import Tensor

from fusednn import autograd
from fusednn.benchmark.cases import Case, Inputs, Operation
from fusednn.benchmark.protocol import WrongResultError
from fusednn.benchmark.validity import LIMIT
from fusednn.catalogue import row_of
from fusednn.kernels.base.channels import plan_of

# Channels, and height and width, of the batch norms of ResNet-50; those after which a block adds its input.
LAYERS = (
    (64, 112),
    (64, 56),
    (256, 56),
    (128, 56),
    (128, 28),
    (512, 28),
    (256, 28),
    (256, 14),
    (1024, 14),
    (512, 14),
    (512, 7),
    (2048, 7),
)
BLOCK_ENDS = ((256, 56), (512, 28), (1024, 14), (2048, 7))
SIZES = {
    f"{batch}x{channels}x{side}x{side}": (batch, channels, side, side)
    for batch in (256, 32)
    for channels, side in LAYERS
}
DTYPES = (torch.bfloat16, torch.float32)
COUNTED_SHAPE = (4, 16, 16, 16)  # whole tiles; the interpreter is slow
FORMATS = {"": torch.contiguous_format, "_channels_last": torch.channels_last}

# A quick run has the most common operations, on one large tensor and on one that a layer's overhead bounds.
QUICK = ("batch_norm", "batch_norm_act_relu", "batch_norm_act_add_relu")
QUICK_SIZES = ("256x256x56x56", "32x2048x7x7")

# --- Operands ---------------------------------------------------------------------------------------------------------


def _vectors(x: Tensor) -> tuple[Tensor, ...]:
    """Running mean and variance, weight and bias: float32 beside 16 bits."""
    channels = x.shape[1]
    mean, variance, weight, bias = torch.linspace(0.5, 1.5, 4 * channels, device=x.device).view(4, channels).unbind()
    return mean, variance, weight.detach().requires_grad_(), bias.detach().requires_grad_()


def _operands(x: Tensor) -> tuple[Tensor, ...]:
    return x.requires_grad_(), *_vectors(x)


def _with_residual(x: Tensor) -> tuple[Tensor, ...]:
    return *_operands(x), x.detach().flip(0).requires_grad_()


def _with_constants(x: Tensor) -> tuple[Tensor, ...]:
    """As in a network whose batch norms are frozen."""
    return x.requires_grad_(), *(vector.detach() for vector in _vectors(x))


def _with_origin(x: Tensor) -> tuple[Tensor, ...]:
    return x, x.new_zeros((2, x.shape[1]), requires_grad=True)


# --- Both implementations ---------------------------------------------------------------------------------------------


def _ours(
    x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None
) -> Tensor:
    return autograd.batch_norm_act(x, mean, variance, weight, bias, True, residual=residual)


def _stock(
    x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None
) -> Tensor:
    y = F.batch_norm(x, mean, variance, weight, bias, True)
    return F.relu(y if residual is None else y + residual)


def _statistics(function: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor, origin: Tensor) -> Tensor:
    """Mean and variance about an origin: statistics have no gradient of their own, and a benchmark wants one."""
    return torch.stack(function(x)).to(x.dtype) - origin


def _stock_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    variance, mean = torch.var_mean(x.detach().to(torch.promote_types(x.dtype, torch.float32)), (0, 2, 3), correction=0)
    return mean, variance


def _synchronised(x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return autograd.sync_batch_norm(x, mean, variance, weight, bias, 0.1, 1e-5, _this_process(x.device.type))


@cache
def _this_process(device: str) -> dist.ProcessGroup:
    """A group of one: collectives that communicate with nobody show what the rest of the operation costs."""
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    atexit.register(leave_group)
    group = dist.group.WORLD
    assert group is not None
    return group


def leave_group() -> None:
    """End the group of one, where there is one: a process that goes on would synchronise batch norms in it."""
    _this_process.cache_clear()
    if dist.is_initialized():
        dist.destroy_process_group()


# --- Validity ---------------------------------------------------------------------------------------------------------


def _check_relu(case: Case, y: Tensor, gradients: Sequence[Tensor], inputs: Inputs) -> float:
    """The error in epsilons.  Near 0 rounding decides which elements ReLU keeps: gradients are compared for these."""
    exact = inputs.upcast()
    x, mean, variance, weight, bias, *residual = exact.operands
    z = F.batch_norm(x, mean, variance, weight, bias, True)
    z = sum(residual, z)
    kept = y > 0
    undecided = float((kept != (z > 0)).double().mean())
    expected = (z.relu(), *torch.autograd.grad(z, exact.differentiable, exact.g * kept))
    error = (
        max(
            float(((actual.detach() - reference).abs() / (1 + reference.abs())).max())
            for actual, reference in zip((y, *gradients), expected, strict=True)
        )
        / torch.finfo(case.dtype).eps
    )
    if not (error <= LIMIT[case.dtype] and undecided < torch.finfo(case.dtype).eps):
        raise WrongResultError(f"{case.id}: {error:.3g} epsilons from eager PyTorch's, {undecided:.3g} other zeros")
    return error


# --- Budgets: bytes of (forward, backward); vectors of the channels apart ---------------------------------------------


def _statistics_budget(shape: torch.Size, dtype: torch.dtype) -> tuple[float, float]:
    vectors = 2 * shape[1] * dtype.itemsize
    return shape.numel() * dtype.itemsize + 2 * vectors, 2 * vectors


def _scalar_vectors(shape: torch.Size) -> Sequence[int]:
    return 2, shape[1]


def _operations(suffix: str, memory_format: torch.memory_format) -> tuple[Operation, ...]:
    make = partial(Operation, family="batch_norm", memory_format=memory_format)
    plain = row_of("batch_norm").budget
    training, evaluation = (
        tuple(partial(_call, module.batch_norm, training) for module in (autograd, F)) for training in (True, False)
    )
    return (
        make("batch_norm" + suffix, ours=training[0], stock=training[1], budget=plain, operands=_operands),
        make(
            "batch_norm_act_relu" + suffix,
            ours=_ours,
            stock=_stock,
            budget=row_of("batch_norm_act").budget,
            operands=_operands,
            check=_check_relu,
        ),
        make(
            "batch_norm_act_add_relu" + suffix,
            ours=_ours,
            stock=_stock,
            budget=partial(row_of("batch_norm_act").budget, alternative=1),
            operands=_with_residual,
            check=_check_relu,
        ),
        make(
            "batch_norm_evaluation" + suffix,
            ours=evaluation[0],
            stock=evaluation[1],
            budget=partial(plain, alternative=1),
            operands=_with_constants,
        ),
        make(
            "channel_statistics" + suffix,
            ours=partial(_statistics, autograd.channel_statistics),
            stock=partial(_statistics, _stock_statistics),
            budget=_statistics_budget,
            operands=_with_origin,
            output_shape=_scalar_vectors,
        ),
        make(
            "sync_batch_norm" + suffix,
            ours=_synchronised,
            stock=training[1],
            budget=plain,
            operands=_operands,
        ),
    )


def _call(function: Callable[..., Tensor], training: bool, *operands: Tensor) -> Tensor:
    return function(*operands, training)


OPERATIONS = {
    operation.name: operation
    for suffix, memory_format in FORMATS.items()
    for operation in _operations(suffix, memory_format)
}


# --- Cases ------------------------------------------------------------------------------------------------------------


def timed_cases(full: bool) -> list[Case]:
    """The most important first: a time limit cuts the end."""
    everything = [
        Case(operation, dtype, size, shape)
        for dtype in DTYPES
        for size, shape in SIZES.items()
        for operation in OPERATIONS.values()
        if shape[1:3] in BLOCK_ENDS or "_add_" not in operation.name
    ]
    return everything if full else [case for case in everything if _in_quick_run(case)]


def _in_quick_run(case: Case) -> bool:
    usual = case.operation.name.removesuffix("_channels_last") in QUICK
    return usual and case.dtype is torch.bfloat16 and case.size in QUICK_SIZES


def counted_cases() -> list[Case]:
    return counted(OPERATIONS.values(), DTYPES, COUNTED_SHAPE)


def test_traffic(case: Case, counts: list[dict[str, Any]]) -> None:
    """Bytes within the budget (5 % over at most, beside the vectors of the channels, which each program leaves)."""
    x = torch.empty(case.shape, device="meta").contiguous(memory_format=case.operation.memory_format)
    vectors = 16 * (plan_of(x).programs + 1) * x.shape[1] * torch.float32.itemsize
    for record in counts:
        if record["contestant"] == "fusednn":
            assert record["bytes"] <= 1.05 * record["budget_bytes"] + vectors
