"""What a call changes in memory that its caller sees, and what of that memory its result is: as stock's.

A version counter that stays behind lets a backward pass take what was overwritten; one that runs ahead refuses what
stock allows.
"""

import inspect
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from support.device import DEVICE, KERNELS_RUN
from support.operations import ARGUMENTS, OPERATIONS, OWN, OWN_ARGUMENTS, Operation
from support.optimizers import SHAPES, STOCK_CALLS, parameters, set_gradients, stock_of
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fusednn import autograd, layers, optim
from fusednn.testing import leaf

#: Where a call is made, and whether what it is given requires gradients.
WAYS = ((nullcontext, False), (nullcontext, True), (torch.no_grad, True), (torch.inference_mode, False))


class StockPath(TorchFunctionMode):
    """Changes nothing, but sends ours to the stock path: what is right where stock has no such function."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **kwargs or {})


class Effects(NamedTuple):
    """What a call does, as far as its caller can see."""

    #: For each result, of each tensor: is it the result, do they share memory, has its version advanced?  The error's
    #: class where the call is refused.
    tensors: Any
    #: Whether the first result may be changed by what requires gradients.
    changeable: bool


def effects(
    call: Callable[..., Any], operands: Sequence[Tensor], others: Sequence[Tensor], way: tuple[Any, bool]
) -> Effects:
    """Of a call of copies of the operands, which may be changed in place, on them and on ``others``."""
    mode, differentiable = way
    copies = [leaf(x) * 1 if differentiable and x.requires_grad else x.detach().clone() for x in operands]
    seen = [*copies, *others]
    versions = [tensor._version for tensor in seen]
    torch.manual_seed(0)
    try:
        with mode():
            result = call(*copies)
    except (RuntimeError, ValueError) as error:
        return Effects(type(error), False)
    results = result if isinstance(result, tuple) else (result,)
    tensors = [
        (y is x, y.data_ptr() == x.data_ptr() != 0, x._version > version)
        for y in results
        for x, version in zip(seen, versions, strict=True)
    ]
    try:
        results[0].mul_(torch.ones_like(results[0], requires_grad=True))
    except RuntimeError:
        return Effects(tensors, False)
    return Effects(tensors, True)


def assert_alike(ours: Effects, stock: Effects, case: object) -> None:
    assert ours.tensors == stock.tensors, case
    assert ours.changeable or not stock.changeable, case


#: Options with which functions that have them change their operands, or have little to do.
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"inplace": True},
    {"training": False},
    {"training": False, "inplace": True},
    {"training": True, "inplace": True},
    {"p": 0.0},
    {"p": 0.0, "inplace": True},
    {"p": 0.0, "bias": None, "residual": None},
    {"momentum": 0.0},
    {"kernel_size": 1},
    {"pieces": 1},
    {"pool_size": 1},
    {"pool_size": None, "residual": None, "activation": None},
    {"residual": None, "activation": None, "training": False},
    {"reduction": "none"},
)


#: What an empty batch is empty in.
BATCHES = ("input", "target", "belief", "residual")


@pytest.mark.parametrize("name", [*ARGUMENTS, *OWN_ARGUMENTS])
def test_functions(name: str) -> None:
    ours = getattr(autograd, name)
    stock = getattr(F, name, None)
    known = inspect.signature(ours).parameters
    chosen = [options for options in OPTIONS if options.keys() <= known.keys()]
    for options, size, way in product(chosen, (None, 0), WAYS):
        arguments = {**(ARGUMENTS | OWN_ARGUMENTS)[name], **options}
        tensors = {
            key: (value[:size] if key in BATCHES else value).to(DEVICE)
            for key, value in arguments.items()
            if isinstance(value, Tensor)
        }
        operands = [value if key.startswith("running") else leaf(value) for key, value in tensors.items()]
        mine = effects(partial(_call, ours, arguments, tensors), operands, (), way)
        with StockPath() if stock is None else nullcontext():
            theirs = effects(partial(_call, stock or ours, arguments, tensors), operands, (), way)
        assert_alike(mine, theirs, (options, size, way))


def _call(function: Callable[..., Any], arguments: dict[str, Any], keys: Iterable[str], *tensors: Tensor) -> Any:
    return function(**{**arguments, **dict(zip(keys, tensors, strict=True))})


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations(name: str) -> None:
    """Layers with their parameters and buffers, in training and in evaluation."""
    operation = Operation(name)
    stock = operation.stock
    if isinstance(stock, partial) and stock.args and isinstance(stock.args[0], nn.Module):
        stock = stock.args[0].to(DEVICE, torch.float64)  # the layer of dropout that is given a mask
    for training, way in product((True, False), WAYS):
        found = []
        for function in (operation.ours, stock):
            others: list[Tensor] = []
            if isinstance(function, nn.Module):
                function.train(training)
                others = [*function.parameters(), *function.buffers()]
            found.append(effects(function, operation.leaves(), others, way))
        ours, theirs = found
        if name in OWN and not KERNELS_RUN:
            theirs = theirs._replace(changeable=False)  # maxout's stock path returns views
        assert_alike(ours, theirs, (training, way))


@pytest.mark.parametrize(("_", "name", "arguments"), STOCK_CALLS)
def test_optimizers(_: str, name: str, arguments: dict[str, Any], device: str) -> None:
    """Parameters, gradients and state, in a step that finds all of them."""
    found = []
    for make in (getattr(optim, name), partial(stock_of, name)):
        params = parameters(SHAPES, torch.float32, device)
        optimizer = make(params, **arguments)
        set_gradients(0, params)
        optimizer.step()
        set_gradients(1, params)
        before = _tensors(optimizer, params)
        versions = {key: tensor._version for key, tensor in before.items()}
        optimizer.step()
        after = _tensors(optimizer, params)
        found.append({key: (after[key] is x, x._version > versions[key]) for key, x in before.items()})
    assert found[0] == found[1]


def _tensors(optimizer: torch.optim.Optimizer, params: Sequence[Tensor]) -> dict[tuple[int, str], Tensor]:
    return {
        (index, key): value
        for index, p in enumerate(params)
        for key, value in {"parameter": p, "gradient": p.grad, **optimizer.state[p]}.items()
        if isinstance(value, Tensor)
    }


def test_input_norm(device: str) -> None:
    layer = layers.InputNorm(3).to(device)
    versions = [buffer._version for buffer in layer.buffers()]
    layer.fit(torch.ones(2, 3, device=device))
    assert all(buffer._version > version for buffer, version in zip(layer.buffers(), versions, strict=True))
