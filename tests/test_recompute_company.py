"""`fusednn.recompute` in company: of every operation's in-place changes, of nested regions, transforms, and replays."""

import contextlib
import copy
import io
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from support.operations import OPERATIONS, Operation
from support.recompute import KEPT, assert_same, gradients, made_again, network
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fusednn
from fusednn.autograd.handles import Recipe


@pytest.fixture
def model(device: str) -> nn.Sequential:
    return network(device)


@pytest.fixture
def x(device: str) -> Tensor:
    return torch.randn(3, 4, device=device)


# --- Changes in place -------------------------------------------------------------------------------------------------

_MADE_AGAIN = [name for name in OPERATIONS if name.partition(" of ")[0].partition(" without ")[0] not in KEPT]
_QUICK = ("GELU", "Dropout", "MaxPool2d", "PReLU", "ReLU", "Softmax", "conv_batch_norm_act2d", "gated")


@pytest.mark.kernels
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.thorough] * (name not in _QUICK)) for name in _MADE_AGAIN]
)
def test_changes_are_noticed(name: str) -> None:
    """Of the result, which stock would have kept, and of what it is made of: each by its version, at the consumer.

    What it isn't made of may change: a convolution's images, where its product is kept, or what pooling chose from.
    """
    operation = Operation(name, torch.float32)
    for changes in ("result", "operand"):
        leaves = operation.leaves()
        with fusednn.recompute():
            operands = [leaf.sin() if leaf.requires_grad else leaf for leaf in leaves]
            kept = [operand * torch.ones_like(operand, requires_grad=True) for operand in operands]
            y = operation.call(operation.ours, operands)
            weight = torch.full_like(y.detach(), 0.5).requires_grad_()
            loss = (y * weight).sum()
        before = y.detach().clone()
        with torch.no_grad():
            (y if changes == "result" else operands[0]).mul_(2)
        if changes == "operand" and name.startswith(("act_pool", "conv_batch_norm", "linear_activation")):
            assert_same(list(torch.autograd.grad(loss, weight)), [before])
            continue
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(loss, weight)
        del kept


def test_a_part_that_is_changed_is_noticed(model: nn.Sequential, x: Tensor) -> None:
    """A view has the version of what it is a view of, also where it was saved."""
    weight = torch.ones(4, 2, device=x.device, requires_grad=True)
    with fusednn.recompute():
        result = model[1](model[0](x))
        y = result[:, :4] @ weight
    with torch.no_grad():
        result[:, 6:].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# --- Regions ----------------------------------------------------------------------------------------------------------


def test_regions_in_regions(model: nn.Sequential, x: Tensor) -> None:
    """The outer one decides; a part that makes results again by itself does so in it, too, and by itself behind it."""
    expected = gradients(model, x)
    whole = nn.Sequential(model[:3], model[3:])
    with made_again() as made, fusednn.recompute(whole), fusednn.recompute(whole[1], depth=0):
        assert_same(gradients(whole, x), expected)
    assert len(made) == 2
    fusednn.replace_layers(whole[0], recompute=True)
    fusednn.replace_layers(whole, recompute=True)
    ours = gradients(whole, x)
    with made_again() as made:
        assert_same(gradients(whole, x), ours)
    assert len(made) == 2
    with made_again() as made:
        whole[0](x).sum().backward()
    assert len(made) == 1


def test_gradients_that_are_added_up(model: nn.Sequential, x: Tensor) -> None:
    """Two forward passes before the first backward pass, and the second's graph is the one that is left."""

    def run(context: Any) -> list[Tensor]:
        model.zero_grad()
        with context():
            first, second = (model(part).square().sum() for part in (x, 2 * x))
        second.backward()
        first.backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    expected = run(contextlib.nullcontext)
    assert_same(run(lambda: fusednn.recompute(model)), expected)


def test_memory_that_ran_out_while_a_result_was_made(model: nn.Sequential, x: Tensor) -> None:
    """The pass fails as any would; the next one has the same bits."""
    expected = gradients(model, x)
    with fusednn.recompute(model):
        y = model(x).square().sum()
    with mock.patch.object(Recipe, "_make", side_effect=torch.OutOfMemoryError), pytest.raises(torch.OutOfMemoryError):
        y.backward(retain_graph=True)
    assert_same(list(torch.autograd.grad(y, list(model.parameters()))), expected)


# --- Models -----------------------------------------------------------------------------------------------------------


def test_names_and_states_stay(model: nn.Sequential, x: Tensor) -> None:
    stock = copy.deepcopy(model)
    fusednn.replace_layers(model, recompute=True)
    assert list(model.state_dict()) == list(stock.state_dict())
    assert [name for name, _ in model.named_modules()] == [name for name, _ in stock.named_modules()]
    state = {name: 2 * value for name, value in stock.state_dict().items()}
    for one in (model, stock):
        one.load_state_dict(state)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    with made_again() as made:
        torch.testing.assert_close(gradients(torch.load(file, weights_only=False), x), gradients(stock, x))
    assert made


def test_tracers_see_the_model_as_it_is(model: nn.Sequential, x: Tensor) -> None:
    fusednn.replace_layers(model, recompute=True)
    expected = model(x)
    for traced in (torch.fx.symbolic_trace(model), torch.export.export(model, (x,)).module()):
        torch.testing.assert_close(traced(x), expected)


# --- PyTorch's own modes ----------------------------------------------------------------------------------------------


def _batched(model: nn.Module, x: Tensor) -> list[Tensor]:
    y = model(x)
    directions = torch.eye(y.numel(), device=x.device).view(-1, *y.shape)
    return list(torch.autograd.grad(y, list(model.parameters()), directions, is_grads_batched=True))


def _anomalies(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.autograd.detect_anomaly(check_nan=True):
        return list(torch.autograd.grad(model(x).square().sum(), list(model.parameters())))


def _forward_mode(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.autograd.forward_ad.dual_level():
        y = model(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
        tangent = torch.autograd.forward_ad.unpack_dual(y).tangent
        return [tangent.detach(), *torch.autograd.grad(tangent.sum(), list(model.parameters())[:-1])]


def _mutation(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        y = model(x)
        loss = y.square().sum()
        with torch.no_grad():
            y.zero_()
        return list(torch.autograd.grad(loss, list(model.parameters())))


def _no_hooks(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.autograd.graph.disable_saved_tensors_hooks("none here"):
        return gradients(model, x)


def _each_sample(model: nn.Module, x: Tensor) -> list[Tensor]:
    parameters = dict(model.named_parameters())

    def loss(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        y: Tensor = torch.func.functional_call(model, parameters, (row,))
        return y.square().sum()

    return list(torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x).values())


def _curvature(model: nn.Module, x: Tensor) -> list[Tensor]:
    return [torch.func.hessian(lambda x: model(x).square().sum())(x).detach()]


_MODES = (_batched, _anomalies, _forward_mode, _mutation)
#: Which PyTorch refuses where there are hooks on saved tensors.
_WITHOUT_HOOKS = (_no_hooks, _each_sample, _curvature)


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("outside", [True, False], ids=["region outside", "model's own"])
@pytest.mark.parametrize("run", [*_MODES, *_WITHOUT_HOOKS], ids=lambda run: run.__name__.strip("_"))
def test_modes(
    run: Callable[[nn.Module, Tensor], list[Tensor]], outside: bool, model: nn.Sequential, x: Tensor
) -> None:
    fusednn.replace_layers(model)
    expected = run(model, x)
    if outside and run in _WITHOUT_HOOKS:
        with fusednn.recompute(model), pytest.raises(RuntimeError, match=r"saved tensor|none here"):
            run(model, x)
        return
    if outside:
        with fusednn.recompute(model):
            found = run(model, x)
    else:
        fusednn.replace_layers(model, recompute=True)
        found = run(model, x)
    assert_same(found, expected)


# --- Graphs -----------------------------------------------------------------------------------------------------------


class Captured(TorchDispatchMode):
    """The stand-in of a graph on a device: replays the operators of the ``with`` block in the same memory.

    As there, nothing of Python runs again, and nothing may be asked of the device.
    """

    takes_kernels = True

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert function is not torch.ops.aten._local_scalar_dense.default, "a number was fetched from the device"
        results = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, results))
        return results

    def replay(self) -> None:
        with torch.no_grad():
            for function, args, kwargs, before in self.calls:
                now = function(*args, **kwargs)
                for old, new in zip(tree_leaves(before), tree_leaves(now), strict=True):
                    # What has no memory is there for its version.
                    if isinstance(old, Tensor) and old.numel() > 0 and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


def test_a_graph_that_is_replayed(model: nn.Sequential, x: Tensor) -> None:
    """What is made again is made in every replay, of what is there then."""
    parameters = list(model.parameters())
    other = torch.randn_like(x)
    expected = gradients(model, other)
    with Captured() as graph, made_again() as made, fusednn.recompute(model):
        found = torch.autograd.grad(model(x).square().sum(), parameters)
    assert len(made) == 2
    with made_again() as made, torch.no_grad():
        x.copy_(other)
        graph.replay()
    assert not made
    assert_same(list(found), expected)
