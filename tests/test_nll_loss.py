"""Negative log likelihood against PyTorch's: values, gradients, weights, ignored and wrong targets, layouts, bytes."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.accuracy import assert_accurate, assert_same_bits
from support.device import FLOAT_DTYPES, ON_GPU
from support.samples import random_tensor
from support.standing import leaf, poisoned_memory
from torch import Tensor

from fusednn import autograd, kernels
from fusednn.kernels.instruments.saved_tensors import saved_tensors

pytestmark = pytest.mark.kernels

if kernels.INTERPRETING:
    from fusednn.kernels.instruments.traffic import measure_traffic

SHAPES = [(5,), (1, 1), (7, 5), (3, 4, 6), (2, 3, 4, 5), (2, 3, 1, 2, 2), (1100, 3)]
LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "expanded": lambda x: x[..., :1].expand(x.shape),
    "strided": lambda x: x.repeat_interleave(2, -1)[..., ::2],
}


def example(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Log-probabilities and targets, of which some are -100."""
    dim = 0 if len(shape) == 1 else 1
    x = random_tensor(shape, torch.float64, device).log_softmax(dim).to(dtype)
    places = shape[2:] if len(shape) > 1 else ()
    target = torch.randint(shape[dim], (*shape[:dim], *places), generator=torch.Generator().manual_seed(0)).to(device)
    return x, torch.where(torch.rand(target.shape, device=device) < 0.2, -100, target) if target.numel() > 4 else target


def results(function: Any, x: Tensor, target: Tensor, dtype: torch.dtype | None = None, **options: Any) -> list[Tensor]:
    """Value and gradient, for an upstream gradient that isn't 1."""
    x = leaf(x.to(dtype) if dtype else x)
    if options.get("weight") is not None:
        options["weight"] = options["weight"].to(x.dtype)
    loss = function(x, target, **options)
    seed = torch.linspace(0.5, 2, loss.numel(), dtype=torch.float64).view(loss.shape).to(x)
    return [loss.detach(), *torch.autograd.grad(loss, x, seed)]


def check(x: Tensor, target: Tensor, **options: Any) -> None:
    with poisoned_memory(0xA5):
        ours = results(autograd.nll_loss, x, target, **options)
    with poisoned_memory(0x5A):
        again = results(autograd.nll_loss, x, target, **options)
    for first, second in zip(ours, again, strict=True):
        assert_same_bits(first, second)
    x = x.contiguous()  # stock's gradient has no other layout of more than one place
    stock = results(F.nll_loss, x, target, **options)
    reference = results(F.nll_loss, x, target, torch.float64, **options)
    for triple in zip(ours, stock, reference, strict=True):
        assert_accurate(*triple)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.smoke
def test_values_and_gradients(shape: tuple[int, ...], dtype: torch.dtype, weighted: bool, device: str) -> None:
    x, target = example(shape, dtype, device)
    weight = torch.linspace(0.5, 1.5, x.shape[min(x.dim() - 1, 1)], device=device) if weighted else None
    for reduction in ("none", "mean", "sum"):
        check(x, target, weight=weight, reduction=reduction)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(7, 5), (2, 3, 4, 5)], ids=str)
def test_layouts(shape: tuple[int, ...], layout: str, device: str) -> None:
    x, target = example(shape, torch.float32, device)
    for reduction in ("none", "mean"):
        check(LAYOUTS[layout](x), target, reduction=reduction)


def test_channels_last(device: str) -> None:
    x, target = example((2, 3, 4, 5), torch.float32, device)
    check(x.contiguous(memory_format=torch.channels_last), target)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_all_ignored(reduction: str, device: str) -> None:
    x, target = example((4, 3), torch.float32, device)
    check(x, torch.full_like(target, 2), ignore_index=2, reduction=reduction)  # a mean of nothing is NaN


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_infinite_log_probabilities(reduction: str, device: str) -> None:
    x = torch.full((3, 4), -float("inf"), device=device)
    check(x, torch.tensor([0, 3, -100], device=device), reduction=reduction)


@pytest.mark.skipif(ON_GPU, reason="a failed device assertion ends the process's use of the GPU")
@pytest.mark.parametrize("wrong", [-1, 3, 2**40])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_targets_out_of_bounds_raise_stocks_error(wrong: int, reduction: str, device: str) -> None:
    for function in (autograd.nll_loss, F.nll_loss):
        with pytest.raises(IndexError, match="out of bounds"):
            function(torch.ones(2, 3, device=device), torch.tensor([0, wrong], device=device), reduction=reduction)


def test_empty_batch(device: str) -> None:
    x, target = torch.empty(0, 3, device=device), torch.empty(0, dtype=torch.int64, device=device)
    assert autograd.nll_loss(x, target).isnan()
    assert autograd.nll_loss(x, target, reduction="sum") == 0


def test_gradcheck_and_gradgradcheck(device: str) -> None:
    x, target = example((2, 3, 4), torch.float64, device)
    weight = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64, device=device)
    for reduction in ("none", "mean"):
        arguments = (leaf(x), target, weight, None, -100, None, reduction)
        assert torch.autograd.gradcheck(autograd.nll_loss, arguments)
        assert torch.autograd.gradgradcheck(autograd.nll_loss, arguments)


@pytest.mark.skipif(ON_GPU, reason="the traffic meter counts in the interpreter")
def test_bytes_and_launches(device: str) -> None:
    """The targets and one element for each are read, not the input; the gradient is zeroed, and scattered into."""
    positions, classes = 4096, 64
    x = leaf(torch.rand(positions, classes, device=device))
    target = torch.randint(classes, (positions,), device=device)
    with measure_traffic() as forward, saved_tensors() as saved:
        loss = autograd.nll_loss(x, target)
    with measure_traffic() as backward:
        torch.autograd.grad(loss, x)
    assert forward.bytes <= 1.05 * positions * (8 + 4)
    assert backward.bytes <= 1.05 * positions * (8 + 4)
    assert [operation.name for operation in backward.operations if operation.name != "ones_like"] == ["zeros_like"]
    assert saved.bytes_beside(x, target) <= 16


def test_compiled(device: str) -> None:
    compiled = torch.compile(autograd.nll_loss, fullgraph=True, backend="inductor" if ON_GPU else "aot_eager")
    x, target = example((5, 4), torch.float64, device)
    for ours, stock in zip(results(compiled, x, target), results(F.nll_loss, x, target), strict=True):
        torch.testing.assert_close(ours, stock)
