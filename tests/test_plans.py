"""Plans of operators: whatever changes between two calls, the second gives what a call without a plan would."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from support.operations import OPERATIONS, Operation
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fusednn import autograd
from fusednn.autograd import activation, plans
from fusednn.kernels.base import launch as launching
from fusednn.testing import assert_same_bits, poisoned_memory

pytestmark = pytest.mark.kernels


class Unplanned(TorchDispatchMode):
    """Operators go through PyTorch's dispatcher to their functions."""

    takes_kernels = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.fixture
def followed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the functions that were called by plan, not those whose plan is to call them."""
    names = []
    find = plans.Plans.find

    def noted(self: plans.Plans, arguments: tuple[Any, ...]) -> Any:
        plan = find(self, arguments)
        if plan not in (None, self._function):
            names.append(self._function.__name__)
        return plan

    monkeypatch.setattr(plans.Plans, "find", noted)
    return names


@pytest.fixture
def planned_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first call is recorded, the second goes by plan."""
    monkeypatch.setattr(plans, "_RECORDED_CALL", 1)


def step(operation: Operation, function: Any, call: int) -> list[Tensor]:
    """Value and gradients, from operands that ``call`` changes and that lie elsewhere."""
    leaves = [
        (leaf.detach() * (1 - call / 8)).requires_grad_() if leaf.requires_grad else leaf.clone()
        for leaf in operation.leaves()
    ]
    value = operation.call(function, leaves)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    wanted += function.parameters() if isinstance(function, nn.Module) else []
    given = torch.rand_like(value)
    gradients = torch.autograd.grad(value, wanted, given, allow_unused=True) if value.requires_grad else ()
    return [value.detach(), *(gradient for gradient in gradients if gradient is not None)]


#: Their products obey PyTorch's switches of precision, or are all that they are.
WITHOUT_PLANS = {
    *("Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"),
    *("LinearCrossEntropyLoss", "linear_cross_entropy", "maxout_linear"),
}


@pytest.mark.usefixtures("planned_at_once")
@pytest.mark.parametrize("name", OPERATIONS)
def test_same_bits_by_plan(name: str, followed: list[str]) -> None:
    """Of which every element is written, too."""
    operation = Operation(name, torch.float32)
    with poisoned_memory(0xA5):
        step(operation, operation.ours, 0)
        followed.clear()
        found = step(operation, operation.ours, 1)
    assert bool(followed) == (name not in WITHOUT_PLANS)
    with Unplanned():
        expected = step(operation, operation.ours, 1)
    for n, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert_same_bits(one, other, f"result {n}")


X = torch.linspace(-2, 2, 12).view(3, 4)


@pytest.mark.usefixtures("planned_at_once")
@pytest.mark.parametrize(
    ("operator", "calls"),
    [
        (activation._forward, [(X, "gelu", 0.0, 0.0), (X[:2], "gelu", 0.0, 0.0), (X[0], "gelu", 0.0, 0.0)]),
        (activation._forward, [(X, "gelu", 0.0, 0.0), (X.t(), "gelu", 0.0, 0.0), (X.view(4, 3), "gelu", 0.0, 0.0)]),
        (activation._forward, [(X, "gelu", 0.0, 0.0), (X.double(), "gelu", 0.0, 0.0), (X, "tanh", 0.0, 0.0)]),
        (activation._forward, [(X, "gelu", 0.0, 0.0), (X[:, ::2], "gelu", 0.0, 0.0), (X[:, 1::2], "gelu", 0.0, 0.0)]),
        (activation._forward, [(X, "leaky_relu", slope, 0.0) for slope in (0.0, -0.0, 0.5, float("inf"))]),
        (activation._backward, [(X, X, "gelu", 0.0, 0.0), (-X, X, "gelu", 0.0, 0.0), (X[:2], X[1:], "gelu", 0.0, 0.0)]),
        (activation._backward, [(-X, X, "gelu", 0.0, 0.0), (X, X, "gelu", 0.0, 0.0)]),
        (activation._backward, [(X, X.view(3, 4), "gelu", 0.0, 0.0), (-X, X, "gelu", 0.0, 0.0)]),
    ],
)
def test_whatever_changes(operator: Callable[..., Tensor], calls: list[tuple[Any, ...]], device: str) -> None:
    """Between two calls: shape, strides, dtype, values (the sign of a zero), and which operands are the same."""

    def moved(arguments: tuple[Any, ...]) -> list[Any]:
        copies = {id(each): each.to(device) for each in arguments if isinstance(each, Tensor)}
        return [copies.get(id(each), each) for each in arguments]

    for arguments in (*calls, *calls[::-1], *calls):
        found = operator(*moved(arguments))
        with Unplanned():
            expected = operator(*moved(arguments))
        assert_same_bits(found, expected, "result")
        assert found.stride() == expected.stride()


@pytest.mark.usefixtures("planned_at_once")
def test_where_it_is_called(device: str, followed: list[str]) -> None:
    """In inference mode results are of another kind; a plan of one is none of the other's."""
    x = X.to(device)
    for inference in (False, True) * 2:
        with torch.inference_mode(inference):
            assert activation._forward(x, "gelu", 0.0, 0.0).is_inference() == inference
    assert len(followed) == 2


def test_shapes_that_never_come_back_are_not_recorded(device: str, followed: list[str]) -> None:
    for numel in range(1, 9):
        activation._forward(torch.ones(numel, device=device), "gelu", 0.0, 0.0)
    assert not followed
    for _ in range(4):
        activation._forward(torch.ones(3, device=device), "gelu", 0.0, 0.0)
    assert followed == ["activation_forward"] * 2


def test_memory_is_bounded(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "_RECORDED_CALL", 1)
    monkeypatch.setattr(plans, "_MOST", 4)
    own = plans.Plans(lambda x, value: x.new_empty(3))
    for n in range(30):
        own.call(torch.ones(n, device=device), float("nan"))
        (form,) = own._calls._forms.values()
        assert 1 <= len(form.kept) <= len(form.counts) <= 5


@pytest.mark.usefixtures("planned_at_once")
@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.rand_like(x),
        lambda x: torch.ones_like(x) * x.sum().item(),
        lambda x, memory=X: memory.clone(),
    ],
    ids=["random", "read by the host", "memory from elsewhere"],
)
def test_what_cannot_be_repeated_is_done_again(function: Callable[[Tensor], Tensor], followed: list[str]) -> None:
    own = plans.Plans(function)
    for seed in range(4):
        x = torch.full((3, 4), float(seed))
        torch.manual_seed(seed)
        found = (own.find((x,)) or own.call)(x)
        torch.manual_seed(seed)
        assert torch.equal(found, function(x))
    assert not followed


def test_failures_leave_nothing_behind(device: str) -> None:
    """An error while a call is recorded is the call's own, and the next call is as ever."""
    own = plans.Plans(failing := mock.Mock(side_effect=[torch.ones(1), torch.ones(1), MemoryError, torch.zeros(2)]))
    x = torch.ones(3, device=device)
    for _ in range(2):
        own.call(x)
    with pytest.raises(MemoryError):
        own.call(x)
    assert launching.recorder is None
    assert torch.equal(own.call(x), torch.zeros(2))
    assert failing.call_count == 4


@pytest.mark.usefixtures("planned_at_once")
def test_which_of_two_operands_is_missing_matters(followed: list[str], device: str) -> None:
    """Of the same shape, either alone, in both orders."""
    x, target, weight = (torch.rand(4, 4, device=device).requires_grad_(n == 0) for n in range(3))
    loss = autograd.binary_cross_entropy_with_logits
    for options in ({"weight": weight}, {"pos_weight": weight}, {"weight": weight, "pos_weight": weight}) * 3:
        y = loss(x, target, **options)
        (gradient,) = torch.autograd.grad(y, x)
        with Unplanned():
            expected = loss(x, target, **options)
            (expected_gradient,) = torch.autograd.grad(expected, x)
        assert_same_bits(y, expected)
        assert_same_bits(gradient, expected_gradient)
    assert followed


def test_memory_of_another_gpu_is_not_a_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans allocate on the current GPU; where that is another one, the function itself does."""
    allocated = mock.Mock(side_effect=lambda shape, strides, dtype: (shape, strides, dtype))
    monkeypatch.setitem(plans.ALLOCATORS, "cuda", allocated)
    current = mock.Mock(return_value=1)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", current, raising=False)
    function = mock.Mock(return_value="its own")
    made = mock.Mock(torch.Tensor, device=torch.device("cuda", 1), shape=torch.Size((2, 3)), dtype=torch.float16)
    made.stride.return_value = (1, 2)
    plan = plans._Writer(function, (X, 0.5)).write([("allocate", made)], made)
    assert plan(X, 0.5) == ((2, 3), (1, 2), torch.float16)
    current.return_value = 0
    assert plan(X, 0.5) == "its own"
    function.assert_called_once_with(X, 0.5)
    assert allocated.call_count == 1
