"""What PyTorch allows or refuses to be changed in place, and what hooks of saved tensors may do: the same for ours."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.device import KERNELS_RUN
from support.operations import OPERATIONS, Operation
from torch import Tensor, nn

from fusednn import layers

every_operation = pytest.mark.parametrize("name", OPERATIONS)


def gradients_after(
    operation: Operation, function: Callable[..., Any], change: Callable[[list[Tensor], Tensor], None]
) -> list[Tensor | None] | None:
    """The operands' gradients where something is changed before the backward pass; None where that is refused."""
    leaves = [leaf for leaf in operation.leaves() if leaf.is_floating_point()]
    copies = iter([leaf * 1 for leaf in leaves])
    operands = [next(copies) if x.is_floating_point() else x for x in operation.operands]
    y = operation.call(function, operands)
    if not y.requires_grad:
        return [None] * len(leaves)
    g = torch.linspace(-1, 2, y.numel(), dtype=y.dtype, device=y.device).view_as(y)
    try:
        with torch.no_grad():
            change(operands, y)
        return list(torch.autograd.grad(y, leaves, g, allow_unused=True))
    except RuntimeError as error:
        assert "inplace" in str(error)  # noqa: PT017 (nothing has to raise)
        return None


def assert_alike(ours: list[Tensor | None], stock: list[Tensor | None]) -> None:
    for mine, theirs in zip(ours, stock, strict=True):
        if mine is None or theirs is None:
            assert not any(g.any() for g in (mine, theirs) if g is not None)
        else:
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


@every_operation
def test_results_may_be_changed(name: str) -> None:
    """Wherever stock's result may be."""
    operation = Operation(name)

    def change(_: list[Tensor], y: Tensor) -> None:
        y.add_(1)

    stock = gradients_after(operation, operation.stock, change)
    if stock is None:
        pytest.skip("stock refuses it, too")
    ours = gradients_after(operation, operation.ours, change)
    assert ours is not None
    assert_alike(ours, stock)


#: Operations that save an operand where stock's save what they make of it, and which.  There ours refuse what stock
#: allows, in the same words; nothing is silent.
KEEPS_MORE: dict[str, set[int]] = {
    "CrossEntropyLoss": {0},
    "L1Loss": {0, 1},
    "activation_pool of maxima": {0, 1},
    "activation_pool of means": {0, 1},
    "batch_norm_act in evaluation": {1, 4},
    "batch_norm_chain of everything": {0, 1, 2, 5},
    "batch_norm_pool of maxima": {2},
    "batch_norm_pool of means": {2},
    "conv_batch_norm_act2d of a residual": {2, 4},
    "cross_entropy of probabilities": {0},
    "cross_entropy of some": {0},
    "cross_entropy of weights": {0},
    "drop_connect_linear": {1},
    "gated_channels": {1},
    "highway": {0},
    "kl_div of logarithms": {0, 1},
    "linear_activation_dropout of gelu": {2},
    "relu_squared": {0},
}


@every_operation
def test_operands_may_be_changed(name: str) -> None:
    operation = Operation(name)
    for index, operand in enumerate(operation.operands):
        if not operand.is_floating_point():
            continue

        def change(operands: list[Tensor], _: Tensor, index: int = index) -> None:
            operands[index].add_(1)

        stock = gradients_after(operation, operation.stock, change)
        if stock is None:
            continue
        ours = gradients_after(operation, operation.ours, change)
        if KERNELS_RUN and index in KEEPS_MORE.get(name, ()):
            assert ours is None
        else:
            assert ours is not None, f"operand {index}"
            assert_alike(ours, stock)


@every_operation
@pytest.mark.kernels
def test_hooks_of_saved_tensors(name: str) -> None:
    """Hooks that measure or compress what is saved: they meet no tensor that PyTorch wouldn't give them."""
    operation = Operation(name)
    seen = 0

    def pack(saved: Tensor) -> tuple[torch.dtype, Tensor]:
        nonlocal seen
        seen += 1
        assert saved.max() >= saved.min()
        # Integers of 64 bits, classes or a seed, aren't compressed: no other type holds them all.
        return saved.dtype, saved if saved.dtype is torch.int64 else saved.to(torch.float64)

    def unpack(packed: tuple[torch.dtype, Tensor]) -> Tensor:
        return packed[1].to(packed[0])

    leaves = [leaf for leaf in operation.leaves() if leaf.is_floating_point()]
    rest = iter(leaves)
    operands = [next(rest) if x.is_floating_point() else x for x in operation.operands]
    plain = operation.call(operation.ours, operands).sum()
    if not plain.requires_grad:
        pytest.skip("has no gradients")
    expected = torch.autograd.grad(plain, leaves, allow_unused=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        y = operation.call(operation.ours, operands).sum()
    found = torch.autograd.grad(y, leaves, create_graph=True, allow_unused=True)
    assert_alike(list(found), list(expected))


INPLACE: dict[str, nn.Module] = {
    cls.__name__: cls(*{"Threshold": (0.1, 1.0)}.get(cls.__name__, ()), inplace=True)
    for cls in (
        *(layers.ReLU, layers.ReLU6, layers.LeakyReLU, layers.Threshold, layers.Hardtanh, layers.Hardsigmoid),
        *(layers.Hardswish, layers.ELU, layers.SELU, layers.CELU, layers.SiLU, layers.Mish, layers.RReLU),
        *(layers.Dropout, layers.Dropout1d, layers.Dropout2d, layers.Dropout3d),
    )
}


@pytest.mark.parametrize("name", INPLACE)
def test_tensors_of_inference_mode(name: str, device: str) -> None:
    """They are changed in place inside of it alone."""
    layer = INPLACE[name].train()
    with torch.inference_mode():
        x = -torch.ones((2, 3, 4, 2, 2) if "3d" in name else (2, 3, 4), device=device)
    with pytest.raises(RuntimeError, match="Inplace update to inference tensor"):
        layer(x)
    with torch.inference_mode():
        assert layer(x) is x
