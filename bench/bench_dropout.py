"""The dropout family: stock's six functions, the fused chain, DropConnect and Standout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from fusednn_bench.replay import test_device_time  # noqa: F401 (pytest collects it here)
from torch import Tensor

from fusednn import autograd
from fusednn.benchmark.cases import Case, Inputs, Operation
from fusednn.benchmark.protocol import WrongResultError
from fusednn.benchmark.validity import compare
from fusednn.catalogue import row_of

P = 0.25
IMAGES = {"large": (64, 64, 128, 128), "cifar": (128, 64, 16, 16), "lenet": (64, 6, 28, 28)}
MATRICES = {"large": (8192, 8192), "medium": (1024, 1024), "small": (128, 128)}
SIZES = (*IMAGES, *MATRICES)
COUNTED_SHAPES = {"images": (2, 16, 32, 16), "matrices": (128, 128)}
DTYPES = (torch.bfloat16, torch.float32)

# --- Checks -----------------------------------------------------------------------------------------------------------


def _check(
    case: Case,
    y: Tensor,
    gradients: Sequence[Tensor],
    inputs: Inputs,
    *,
    masked: Callable[..., Tensor],
    probability: Callable[..., Tensor],
    dropped_operand: int = 0,
    together: int = 1,
) -> float:
    """Value and gradients are plain PyTorch's, ``masked(keep, *operands)``, with the mask that one gradient shows.

    ``probability(*operands)`` is that of each element to have a gradient; ``together`` elements share one draw.
    """
    keep = gradients[dropped_operand] != 0
    error = compare(case, (y, *gradients), inputs, partial(masked, keep))
    chance = probability(*inputs.operands).detach().double()
    deviation = (together * (chance * (1 - chance)).sum()).sqrt()
    excess = (keep.double() - chance).sum().abs()
    if not excess <= 6 * deviation:
        raise WrongResultError(f"{case.id}: the number of kept elements is {excess / deviation:.3g} deviations off")
    return error


def _always(x: Tensor, *rest: Tensor) -> Tensor:
    return torch.full_like(x, 1 - P)


# --- Stock's functions ------------------------------------------------------------------------------------------------


def _masked(keep: Tensor, x: Tensor) -> Tensor:
    return x * (keep / (1 - P))


def _masked_alpha(keep: Tensor, x: Tensor) -> Tensor:
    saturation = -1.7580993408473766
    scale = ((1 + saturation**2 * P) * (1 - P)) ** -0.5
    return scale * (torch.where(keep, x, saturation) - saturation * P)


def _reshaped(x: Tensor, shape: Callable[[torch.Size], Sequence[int]]) -> tuple[Tensor, ...]:
    return (x.view(tuple(shape(x.shape))).requires_grad_(),)


def _in_1d(shape: torch.Size) -> Sequence[int]:
    return *shape[:2], shape[2] * shape[3]


def _in_2d(shape: torch.Size) -> Sequence[int]:
    return shape


def _in_3d(shape: torch.Size) -> Sequence[int]:
    return *shape[:2], 4, shape[2] // 4, shape[3]


def _dropout(
    function: str,
    shape: Callable[[torch.Size], Sequence[int]] = _in_2d,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Operation:
    ours, stock = (partial(getattr(module, function), p=P, training=True) for module in (autograd, F))
    channels = function not in ("dropout", "alpha_dropout")

    def check(case: Case, y: Tensor, gradients: Sequence[Tensor], inputs: Inputs) -> float:
        masked = _masked_alpha if "alpha" in function else _masked
        together = y[0, 0].numel() if channels else 1
        return _check(case, y, gradients, inputs, masked=masked, probability=_always, together=together)

    return Operation(
        function + ("_channels_last" if memory_format is torch.channels_last else ""),
        "dropout",
        ours,
        stock,
        row_of(function).budget,
        operands=partial(_reshaped, shape=shape),
        output_shape=shape,
        memory_format=memory_format,
        check=check,
    )


# --- The chain --------------------------------------------------------------------------------------------------------

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "leaky_relu": F.leaky_relu, "gelu": F.gelu}


def _chain_operands(x: Tensor, residual: bool) -> tuple[Tensor, ...]:
    bias = torch.linspace(-1, 1, x.shape[-1], device=x.device, dtype=x.dtype)
    others = (bias, x.flip(0).contiguous()) if residual else (bias,)
    return tuple(operand.requires_grad_() for operand in (x, *others))


def _chain(name: str, residual: bool = False) -> Operation:
    activation = ACTIVATIONS[name]

    def stock(x: Tensor, bias: Tensor, *residual: Tensor) -> Tensor:
        return sum(residual, F.dropout(activation(x + bias), P))

    def masked(keep: Tensor, x: Tensor, bias: Tensor, *residual: Tensor) -> Tensor:
        return sum(residual, activation(x + bias) * (keep / (1 - P)))

    def probability(x: Tensor, bias: Tensor, *residual: Tensor) -> Tensor:
        alive = (x.double() + bias > 0) if name == "relu" else torch.ones_like(x)
        return alive * (1 - P)

    return Operation(
        f"bias_activation_dropout_{name}{'_residual' if residual else ''}",
        "bias_activation_dropout",
        partial(autograd.bias_activation_dropout, p=P, activation=name),
        stock,
        partial(row_of("bias_activation_dropout").budget, alternative=2 * residual + (name == "gelu")),
        operands=partial(_chain_operands, residual=residual),
        check=partial(_check, masked=masked, probability=probability),
    )


# --- DropConnect and Standout -----------------------------------------------------------------------------------------


def _linear_operands(x: Tensor) -> tuple[Tensor, ...]:
    """A square matrix of weights; scaled such that results and the weights' gradients are of the size of 1."""
    weight = x.flip(0) / (2 * x.shape[1] ** 0.5)
    bias = torch.linspace(-1, 1, x.shape[1], device=x.device, dtype=x.dtype)
    return tuple(operand.detach().requires_grad_() for operand in (x / x.shape[0] ** 0.5, weight, bias))


def _stock_drop_connect(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, F.dropout(weight, P), bias)


def _masked_drop_connect(keep: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, _masked(keep, weight), bias)


def _drop_connect_budget(shape: torch.Size, dtype: torch.dtype) -> tuple[float, float]:
    """A pass over the weights before each product that they enter, one over their gradient; the products themselves."""
    square = shape.numel() * dtype.itemsize
    return (2 + 3) * square, (2 + 3 + 3 + 2 + 1) * square


def _standout_operands(x: Tensor) -> tuple[Tensor, ...]:
    return x.requires_grad_(), x.detach().flip(0)


def _stock_standout(x: Tensor, belief: Tensor) -> Tensor:
    return x * torch.bernoulli(torch.sigmoid(belief))


def _masked_standout(keep: Tensor, x: Tensor, belief: Tensor) -> Tensor:
    return x * keep


def _belief(x: Tensor, belief: Tensor) -> Tensor:
    return torch.sigmoid(belief.double())


_IMAGE_OPERATIONS = (
    _dropout("dropout"),
    _dropout("alpha_dropout"),
    _dropout("dropout2d"),
    _dropout("dropout2d", memory_format=torch.channels_last),
    _dropout("feature_alpha_dropout"),
    _dropout("dropout1d", _in_1d),
    _dropout("dropout3d", _in_3d),
)
_MATRIX_OPERATIONS = (
    _chain("relu"),
    _chain("relu", residual=True),
    _chain("gelu"),
    _chain("leaky_relu"),
    Operation(
        "drop_connect_linear",
        "drop_connect",
        partial(autograd.drop_connect_linear, p=P),
        _stock_drop_connect,
        _drop_connect_budget,
        operands=_linear_operands,
        check=partial(_check, masked=_masked_drop_connect, probability=lambda x, *_: _always(x), dropped_operand=1),
    ),
    Operation(
        "standout",
        "standout",
        autograd.standout,
        _stock_standout,
        row_of("standout").budget,
        operands=_standout_operands,
        check=partial(_check, masked=_masked_standout, probability=_belief),
    ),
)
OPERATIONS = {operation.name: operation for operation in (*_IMAGE_OPERATIONS, *_MATRIX_OPERATIONS)}
QUICK = ("dropout", "dropout2d", "bias_activation_dropout_relu", "bias_activation_dropout_gelu", "standout")


def timed_cases(full: bool) -> list[Case]:
    """The most important first: a time limit cuts the end."""
    everything = [
        Case(operation, dtype, size, sizes[size])
        for image_size, matrix_size in zip(IMAGES, MATRICES, strict=True)
        for dtype in DTYPES
        for operations, sizes, size in (
            (_MATRIX_OPERATIONS, MATRICES, matrix_size),
            (_IMAGE_OPERATIONS, IMAGES, image_size),
        )
        for operation in operations
    ]
    return everything if full else [case for case in everything if _in_quick_run(case)]


def _in_quick_run(case: Case) -> bool:
    if case.size == "large" and case.dtype is torch.bfloat16:
        return True
    return case.operation.name in QUICK and case.size in ("large", "cifar", "small")


def counted_cases() -> list[Case]:
    return [
        Case(operation, dtype, "counted", COUNTED_SHAPES[kind])
        for kind, operations in (("images", _IMAGE_OPERATIONS), ("matrices", _MATRIX_OPERATIONS))
        for operation in operations
        for dtype in DTYPES
    ]


def test_traffic(case: Case, counts: list[dict[str, Any]]) -> None:
    """Bytes within the budget (5 % over at most, beside what there is of each channel).

    A program of the chain reads the bias of its columns, and leaves a sum for each, which is read once more: three
    times 4 bytes for a column of at least 8 elements.
    """
    of_channels = 12 * case.numel / 8 if case.operation.family == "bias_activation_dropout" else 0
    for record in counts:
        if record["contestant"] == "fusednn":
            assert record["bytes"] <= 1.05 * record["budget_bytes"] + of_channels + 2048
