"""`fusednn.recompute`: second derivatives of every operation have the same bits, too."""

import contextlib
from typing import Any

import pytest
import torch
from support.operations import OPERATIONS, Operation
from torch import Tensor

import fusednn
from fusednn.testing import assert_same_bits


@pytest.mark.kernels
@pytest.mark.parametrize("name", OPERATIONS)
def test_second_derivatives(name: str) -> None:
    """Of a penalty on the gradients, by way of what was made again; where there are none, that is said all the same."""
    operation = Operation(name, torch.float32)

    def run(context: Any) -> list[Tensor | None] | str:
        leaves = operation.leaves()
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        with context():
            operands = [leaf.sin() if leaf.requires_grad else leaf for leaf in leaves]
            y = operation.call(operation.ours, operands)
            if not y.requires_grad:
                return []
            weight = torch.full_like(y.detach(), 0.5).requires_grad_()
            loss = (y * weight).square().sum()
        try:
            first = torch.autograd.grad(loss, [*wanted, weight], create_graph=True)
            penalty = sum(gradient.square().sum() for gradient in first)
            return list(torch.autograd.grad(penalty, [*wanted, weight], allow_unused=True))  # type: ignore[arg-type]
        except RuntimeError as error:
            return str(error)

    found, expected = run(fusednn.recompute), run(contextlib.nullcontext)
    if isinstance(expected, str) or isinstance(found, str):
        assert found == expected
        return
    for mine, other in zip(found, expected, strict=True):
        assert (mine is None) == (other is None)
        if mine is not None and other is not None:
            assert_same_bits(mine, other, "of second order")
