"""Layers whose parameters and inputs differ in dtype, with and without autocast, and empty batches: as stock's."""

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusednn

LAYERS = {
    "Conv1d": (nn.Conv1d(3, 4, 2), (2, 3, 5)),
    "Conv2d": (nn.Conv2d(3, 4, 2), (2, 3, 5, 5)),
    "BatchNorm1d": (nn.BatchNorm1d(3), (4, 3)),
    "BatchNorm2d": (nn.BatchNorm2d(3), (2, 3, 4, 4)),
    "SyncBatchNorm": (nn.SyncBatchNorm(3), (4, 3, 2)),
    "PReLU": (nn.PReLU(3), (4, 3)),
    "ReLU": (nn.ReLU(), (4, 3)),
    "MaxPool2d": (nn.MaxPool2d(2), (2, 3, 4, 4)),
    "LogSoftmax": (nn.LogSoftmax(1), (2, 3)),
}
WEIGHTS = (torch.float32, torch.float64, torch.bfloat16)
INPUTS = (torch.float32, torch.float64, torch.int64)


def outcome(layer: nn.Module, x: Tensor, autocast: bool, device: str) -> tuple[Any, ...] | type:
    """Values, gradients and buffers; or the error."""
    operand = x.clone().requires_grad_(x.is_floating_point())
    try:
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            y = layer(operand)
        y.sum().backward()
    except Exception as error:  # whatever stock raises, ours has to
        return type(error)
    return (y, operand.grad, *(parameter.grad for parameter in layer.parameters()), *layer.buffers())


@pytest.mark.parametrize("name", LAYERS)
def test_outcomes_are_stocks(name: str, device: str) -> None:
    base, shape = LAYERS[name]
    weights = WEIGHTS if list(base.parameters()) else WEIGHTS[:1]
    for weight, dtype, autocast, batch in itertools.product(weights, INPUTS, (False, True), (shape[0], 0)):
        stock = copy.deepcopy(base).to(device, weight)
        replaced = copy.deepcopy(stock)
        fusednn.replace_layers(replaced)
        x = torch.randn(batch, *shape[1:], device=device).to(dtype)
        ours, theirs = (outcome(layer, x, autocast, device) for layer in (replaced, stock))
        where = f"weight {weight}, input {dtype} of {tuple(x.shape)}, autocast {autocast}"
        if isinstance(ours, type) or isinstance(theirs, type):
            assert ours is theirs, where
        else:
            torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2, msg=lambda m, where=where: f"{where}: {m}")
