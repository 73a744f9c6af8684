"""Gradients of every operation, however they are asked for: alone, with a graph, many at once, and theirs in turn."""

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from support.device import DEVICE
from support.operations import ARGUMENTS, OPERATIONS, Operation
from torch import Tensor, nn

from fusednn import autograd
from fusednn.autograd import dispatch
from fusednn.autograd.anchors import anchors_of
from fusednn.testing import ARRANGEMENTS

#: Stock has no second derivative of it.
ONCE = ("Hardsigmoid",)
#: There is nothing to differentiate.
NEVER = ("channel_statistics",)

#: Whose masks follow memory: in another layout they are others.
MASKED = ("AlphaDropout", "Dropout", "bias_activation_dropout", "standout")
#: In which gradients with a graph, and their own, must be the same.
LAYOUTS = ("channels_last, sliced", "transposed")

Gradients = Sequence[Tensor | None]


class Differentiated:
    """A call's gradients of operands and parameters, for two incoming ones."""

    def __init__(self, operation: Operation, function: Any, change: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        first, *rest = operation.leaves()
        leaves = [change(first.detach()).requires_grad_(first.requires_grad), *rest]
        self._wanted = [operand for operand in leaves if operand.requires_grad]
        self._wanted += function.parameters() if isinstance(function, nn.Module) else []
        self._generator = torch.Generator().manual_seed(1)
        self._result = operation.call(function, leaves)
        self._upstream = self._seeds(self._result)
        self._seconds = [] if operation.name in ONCE else [self._seeds(operand) for operand in self._wanted]

    def _seeds(self, tensor: Tensor) -> Tensor:
        return torch.randn((2, *tensor.shape), generator=self._generator, dtype=torch.float64).to(tensor)

    def _grad(self, outputs: Any, gradients: Any, **options: bool) -> Gradients:
        return torch.autograd.grad(outputs, self._wanted, gradients, allow_unused=True, retain_graph=True, **options)

    def one(self, **options: bool) -> Gradients:
        return self._grad(self._result, self._upstream[0], **options)

    def several(self, **options: bool) -> Gradients:
        return self._grad(self._result, self._upstream, is_grads_batched=True, **options)

    def second(self, first: Gradients, *, batched: bool) -> Gradients:
        """Of ``first``, `one` with a graph."""
        if not self._seconds:
            return [None] * len(self._wanted)
        reached = [(g, seed) for g, seed in zip(first, self._seconds, strict=True) if g is not None and g.requires_grad]
        if not reached:
            return [None] * len(self._wanted)
        outputs, seeds = zip(*reached, strict=True)
        return self._grad(outputs, seeds if batched else [seed[0] for seed in seeds], is_grads_batched=batched)


def assert_same_gradients(ours: Gradients, stock: Gradients, what: str) -> None:
    for mine, theirs in zip(ours, stock, strict=True):
        given = [gradient for gradient in (mine, theirs) if gradient is not None]
        if len(given) == 2:
            torch.testing.assert_close(*given, rtol=1e-6, atol=1e-7, msg=lambda message: f"{what}: {message}")
        assert len(given) != 1 or not given[0].any(), f"{what}: one is missing"


def of_the_first(batched: Gradients) -> Gradients:
    return [None if gradient is None else gradient[0] for gradient in batched]


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name not in NEVER])
def test_gradients_of_every_kind(name: str) -> None:
    operation = Operation(name)
    stock = Differentiated(operation, operation.stock)
    several = stock.several()
    several_second = stock.second(stock.one(create_graph=True), batched=True)
    one, second = of_the_first(several), of_the_first(several_second)

    ours = Differentiated(operation, operation.ours)
    with_graph = ours.one(create_graph=True)
    assert_same_gradients(ours.one(), one, "alone")
    assert_same_gradients(with_graph, one, "with a graph")
    assert_same_gradients(ours.several(), several, "several")
    assert_same_gradients(ours.several(create_graph=True), several, "several with a graph")
    assert_same_gradients(ours.second(with_graph, batched=False), second, "second")
    assert_same_gradients(ours.second(with_graph, batched=True), several_second, "several second")
    for layout in () if name in MASKED else LAYOUTS:
        ours = Differentiated(operation, operation.ours, ARRANGEMENTS[layout])
        with_graph = ours.one(create_graph=True)
        assert_same_gradients(with_graph, one, f"with a graph, {layout}")
        assert_same_gradients(ours.second(with_graph, batched=False), second, f"second, {layout}")


def gradients_of(operation: Operation, wanted: Collection[int] | None = None) -> dict[int, Tensor | None]:
    """Ours of operands and parameters by their places, where these alone require gradients."""
    operands = operation.leaves()
    tensors = [*operands, *(operation.ours.parameters() if isinstance(operation.ours, nn.Module) else ())]
    places = [place for place, one in enumerate(tensors) if one.requires_grad and (wanted is None or place in wanted)]
    for place, one in enumerate(tensors):
        one.requires_grad_(place in places)
    y = operation.call(operation.ours, operands)
    if not y.requires_grad:
        return dict.fromkeys(places)
    gradient = torch.linspace(-1, 2, y.numel(), dtype=y.dtype, device=y.device).view_as(y)
    found = torch.autograd.grad(y, [tensors[place] for place in places], gradient, allow_unused=True)
    return dict(zip(places, found, strict=True))


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name not in NEVER])
@pytest.mark.filterwarnings("ignore:reduction")  # of KLDivLoss
def test_gradients_of_some(name: str) -> None:
    """Of the first operands and parameters, of the last, and of one: those that they have where all are wanted."""
    everything = gradients_of(Operation(name))
    places = sorted(everything)
    parts = [part for index in range(len(places)) for part in (places[:index], places[index:], [places[index]])]
    for part in {tuple(part) for part in parts if 0 < len(part) < len(places)}:
        for place, gradient in gradients_of(Operation(name), part).items():
            torch.testing.assert_close(gradient, everything[place], rtol=1e-9, atol=1e-12, msg=f"{place} of {part}")


@pytest.mark.kernels
@pytest.mark.parametrize("name", ["cross_entropy", "max_pool1d", "prelu", "silu", "softmax"])
def test_vectorised_hessians(name: str) -> None:
    """The public call that asks for many gradients at once."""
    options = {
        key: value.to(DEVICE, torch.float64 if value.is_floating_point() else None)
        if isinstance(value, Tensor)
        else value
        for key, value in ARGUMENTS[name].items()
    }
    x = options.pop("input")

    def loss(function: Callable[..., Tensor], x: Tensor) -> Tensor:
        return function(x, **options).pow(3).sum()

    ours = torch.autograd.functional.hessian(partial(loss, getattr(autograd, name)), x, vectorize=True)
    torch.testing.assert_close(ours, torch.autograd.functional.hessian(partial(loss, getattr(F, name)), x))


def test_nothing_is_kept_for_second_derivatives_where_no_gradients_are(device: str) -> None:
    x = torch.ones(2, device=device, requires_grad=True)
    assert [anchor.numel() for anchor in anchors_of(x * 1, None, x.detach())] == [0]
    assert anchors_of(x) == (x,)  # which the graph holds anyway
    with torch.no_grad():
        assert anchors_of(x) == ()


#: Whose results and gradients are chosen, not computed, or computed from integers.
CHOICES = (
    *("Hardtanh", "MaxPool1d", "MaxPool2d", "MaxPool3d", "PReLU", "ReLU", "ReLU6", "Threshold"),
    *("conv_act_pool2d", "max_pool2d of overlapping windows", "maxout", "maxout_conv2d", "maxout_linear"),
    *("Dropout", "Dropout1d", "Dropout2d", "Dropout3d"),  # of half, so that the others are doubled
)


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", CHOICES)
def test_choices_among_integers_are_exact(name: str, dtype: torch.dtype) -> None:
    """With many ties, of which the first wins, and sums that 16 bits hold: no rounding hides a wrong winner."""
    operation = Operation(name, dtype)
    operands = [operand.clamp(-2, 2).round() for operand in operation.operands]

    def result_and_gradients(function: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [operand.clone().requires_grad_() for operand in operands]
        y = operation.call(function, leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))]

    ours = result_and_gradients(operation.ours)
    if name.startswith("Dropout"):  # which is given the same mask
        stock = result_and_gradients(operation.stock)
    else:
        with mock.patch.object(dispatch, "AVAILABLE", False):
            stock = result_and_gradients(operation.ours)
    for mine, theirs in zip(ours, stock, strict=True):
        assert torch.equal(mine, theirs)
