"""Optimizers under test: calls of each algorithm, parameters and gradients in pairs, and the comparison with stock."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from fusednn import optim
from fusednn.optim.twin import stock_class

from .device import KERNELS_RUN
from .pytorch_samples import OPTIMIZERS

NAMES = ["SGD", "Adagrad", "Adadelta", "RMSprop", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "Lion"]

every_info = pytest.mark.parametrize("info", OPTIMIZERS, ids=lambda info: info.name)
every_name = pytest.mark.parametrize("name", NAMES)
interpreted = pytest.mark.interpreter

#: One call of each algorithm of the kernels' table.
CALLS: list[tuple[str, str, dict[str, Any]]] = [
    ("sgd", "SGD", {"lr": 0.1}),
    ("sgd_momentum", "SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    ("sgd_nesterov", "SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    ("adagrad", "Adagrad", {"lr_decay": 0.1}),
    ("adadelta", "Adadelta", {"weight_decay": 0.1}),
    ("rmsprop", "RMSprop", {}),
    ("rmsprop_momentum", "RMSprop", {"momentum": 0.9}),
    ("rmsprop_nesterov", "RMSprop", {"momentum": 0.9, "nesterov": True}),
    ("rmsprop_centered", "RMSprop", {"centered": True}),
    ("rmsprop_centered_momentum", "RMSprop", {"centered": True, "momentum": 0.9}),
    ("rmsprop_centered_nesterov", "RMSprop", {"centered": True, "momentum": 0.9, "nesterov": True}),
    ("adam", "Adam", {"weight_decay": 0.1}),
    ("adam_amsgrad", "AdamW", {"amsgrad": True}),
    ("adamax", "Adamax", {}),
    ("nadam", "NAdam", {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    ("radam", "RAdam", {"weight_decay": 0.1}),
    ("lion", "Lion", {"weight_decay": 0.1}),
]
STOCK_CALLS = [call for call in CALLS if not (call[1] == "RMSprop" and "nesterov" in call[2])]

SHAPES = [(3, 4), (2,), (), (0, 3)]


def parameters(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: str, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [
        nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)) for shape in shapes
    ]


def stock_of(name: str, params: Any, *, foreach: bool | None = False, **arguments: Any) -> torch.optim.Optimizer:
    """The optimizer that ours replaces, with its plainest update unless ``foreach`` asks for another that it has."""
    cls: Any = stock_class(getattr(optim, name))
    if "foreach" in inspect.signature(cls).parameters:
        arguments["foreach"] = foreach
    optimizer: torch.optim.Optimizer = cls(params, **arguments)
    return optimizer


def twins_of(tensors: Sequence[Tensor]) -> list[nn.Parameter]:
    """The same parameters again, strides included."""
    return [
        nn.Parameter(torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device).copy_(t)) for t in tensors
    ]


def set_gradients(step: int, *models: Sequence[Tensor], scale: float = 1.0) -> None:
    """The same new gradients for each."""
    generator = torch.Generator().manual_seed(100 + step)
    for group in zip(*models, strict=True):
        gradient = torch.randn(group[0].shape, generator=generator, dtype=torch.float64) * scale
        for parameter in group:
            parameter.grad = gradient.to(parameter.device, parameter.dtype)


def assert_like_stock(ours: torch.optim.Optimizer, stock: torch.optim.Optimizer, **tolerance: float) -> None:
    """Parameters and state, its keys included, are stock's."""
    for mine, theirs in zip(ours.param_groups, stock.param_groups, strict=True):
        for p, q in zip(mine["params"], theirs["params"], strict=True):
            torch.testing.assert_close(p, q, **tolerance)
            assert (p in ours.state) == (q in stock.state)
            assert list(ours.state.get(p, {})) == list(stock.state.get(q, {}))
            for key, value in stock.state.get(q, {}).items():
                torch.testing.assert_close(ours.state[p][key], value, msg=lambda m, key=key: f"{key}: {m}", **tolerance)


# Relative to stock's single-tensor update; where numbers cancel, to what they were computed from.
TOLERANCE = {torch.float32: {"rtol": 2e-5, "atol": 2e-6}, torch.float64: {"rtol": 1e-9, "atol": 1e-12}}


def in_both_paths(run: Callable[[], None]) -> None:
    """Once as it comes, and once where every group goes to stock."""
    run()
    if KERNELS_RUN:
        with mock.patch.object(optim.FusedOptimizer, "_refusal", return_value="told so"):
            run()


def proximal(weight: Tensor, lr: float, l1: float, l2: float, group_lasso: float) -> Tensor:
    """The proximal operators, as the literature writes them."""
    weight = torch.sign(weight) * torch.relu(weight.abs() - lr * l1) / (1 + lr * l2)
    if group_lasso and weight.dim() > 1:
        rows = weight.reshape(weight.shape[0], -1)
        bound = lr * group_lasso * rows.shape[1] ** 0.5
        weight = (rows * torch.relu(1 - bound / rows.norm(dim=1, keepdim=True))).reshape(weight.shape)
    return weight
