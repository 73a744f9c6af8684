"""Gradients of every operation, however they are asked for: alone, with a graph, many at once, and theirs in turn."""

from collections.abc import Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from support.operations import OPERATIONS, Operation
from torch import Tensor, nn

from fusednn.autograd import dispatch

#: Stock has no second derivative of it.
ONCE = ("Hardsigmoid",)
#: There is nothing to differentiate.
NEVER = ("channel_statistics",)

Gradients = Sequence[Tensor | None]


def gradients(operation: Operation, function: Any) -> dict[str, Gradients]:
    """By how they were asked for, the gradients of operands and parameters."""
    generator = torch.Generator().manual_seed(1)

    def seeds(tensor: Tensor) -> Tensor:
        return torch.randn((2, *tensor.shape), generator=generator, dtype=torch.float64).to(tensor)

    leaves = operation.leaves()
    wanted = [operand for operand in leaves if operand.requires_grad]
    wanted += function.parameters() if isinstance(function, nn.Module) else []

    def grad(outputs: Any, gradients: Any, **options: bool) -> Gradients:
        return torch.autograd.grad(outputs, wanted, gradients, allow_unused=True, **options)

    def result() -> Tensor:
        return operation.call(function, leaves)

    upstream = seeds(result())
    found = {
        "alone": grad(result(), upstream[0]),
        "with a graph": grad(result(), upstream[0], create_graph=True),
        "several": grad(result(), upstream, is_grads_batched=True),
        "several with a graph": grad(result(), upstream, is_grads_batched=True, create_graph=True),
    }
    if operation.name in ONCE:
        return found
    second = [seeds(operand) for operand in wanted]
    for name, of_both in (("second", [seed[0] for seed in second]), ("several second", second)):
        batched = name.startswith("several")
        first = grad(result(), upstream[0], create_graph=True)
        reached = [(g, seed) for g, seed in zip(first, of_both, strict=True) if g is not None and g.requires_grad]
        found[name] = grad(*zip(*reached, strict=True), is_grads_batched=batched) if reached else [None] * len(wanted)
    return found


def assert_same_gradients(ours: Gradients, stock: Gradients, what: str) -> None:
    for mine, theirs in zip(ours, stock, strict=True):
        given = [gradient for gradient in (mine, theirs) if gradient is not None]
        if len(given) == 2:
            torch.testing.assert_close(*given, rtol=1e-6, atol=1e-7, msg=lambda message: f"{what}: {message}")
        assert len(given) != 1 or not given[0].any(), f"{what}: one is missing"


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name not in NEVER])
def test_gradients_of_every_kind(name: str) -> None:
    operation = Operation(name)
    ours, stock = gradients(operation, operation.ours), gradients(operation, operation.stock)
    assert_same_gradients(ours["alone"], ours["with a graph"], "with and without a graph")
    for kind in ours:
        assert_same_gradients(ours[kind], stock[kind], kind)


#: Whose results and gradients are chosen, not computed, or computed from integers.
CHOICES = (
    *("Hardtanh", "MaxPool1d", "MaxPool2d", "ReLU", "ReLU6", "Threshold", "max_pool2d of overlapping windows"),
    *("maxout", "maxout_conv2d", "maxout_linear"),
)


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", CHOICES)
def test_choices_among_integers_are_exact(name: str, dtype: torch.dtype) -> None:
    """With many ties, of which the first wins, and sums that 16 bits hold: no rounding hides a wrong winner."""
    operation = Operation(name, dtype)
    operands = [operand.clamp(-2, 2).round() for operand in operation.operands]

    def result_and_gradients() -> list[Tensor]:
        leaves = [operand.clone().requires_grad_() for operand in operands]
        y = operation.call(operation.ours, leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))]

    ours = result_and_gradients()
    with mock.patch.object(dispatch, "AVAILABLE", False):
        stock = result_and_gradients()
    for mine, theirs in zip(ours, stock, strict=True):
        assert torch.equal(mine, theirs)
