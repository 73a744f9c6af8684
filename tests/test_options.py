"""Arguments of every type that code may pass, for every option of every function and batch norm: as stock takes them.

A value whose type decides is a value that may mean something else inside.
"""

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.device import DEVICE
from support.operations import ARGUMENTS
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import fusednn
from fusednn import autograd, layers
from fusednn.testing import random_tensor

VALUES: list[Any] = [
    *(True, False, 1, -1, 2**70, 0.3, float("nan"), float("inf"), 1j),
    *(torch.tensor(value) for value in (0.3, -0.5, 1, [1], [1, 1])),
    nn.Parameter(torch.tensor(0.3)),
    *(np.float64(0.3), np.int64(1), np.array([1, 1])),
    *(None, "valid", torch.float16),
    *((), (1,), [1, 1], (1.0, 1.0), (np.int64(1), np.int64(1))),
]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Stock warns of what is deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def outcome(function: Callable[..., Any], arguments: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a call gives, and what it makes of its operands; or the class of its error."""
    operands = tree_map(lambda value: value.clone().to(DEVICE) if type(value) is Tensor else value, dict(arguments))
    torch.manual_seed(0)
    try:
        return tuple(tree_leaves((function(**operands), operands)))
    except Exception as error:
        return (type(error),)


def assert_same_outcome(ours: tuple[Any, ...], stock: tuple[Any, ...], what: str, *, random: bool = False) -> None:
    """``random``: values are left to chance."""
    assert list(map(type, ours)) == list(map(type, stock)), f"{what}: {ours}, stock {stock}"
    for mine, theirs in zip(ours, stock, strict=True):
        if not isinstance(theirs, Tensor):
            assert mine is theirs or mine == theirs or mine != mine, f"{what}: {mine}, stock {theirs}"
        elif random:
            assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype), what
        else:
            rtol = 1e-2 if theirs.dtype is torch.float16 else 1e-3
            torch.testing.assert_close(mine, theirs, rtol=rtol, atol=1e-3, equal_nan=True, msg=lambda m: f"{what}: {m}")


@pytest.mark.kernels
@pytest.mark.parametrize("name", ARGUMENTS)
def test_options_of_functions(name: str) -> None:
    ours, stock = getattr(autograd, name), getattr(F, name)
    arguments = ARGUMENTS[name]
    random = "dropout" in name or name == "rrelu"
    options = [option for option in inspect.signature(ours).parameters if option != "input"]
    for option in options:
        for value in VALUES:
            changed = {**arguments, option: value}
            what = f"{name}({option}={value!r})"
            assert_same_outcome(outcome(ours, changed), outcome(stock, changed), what, random=random)


MOMENTA = [
    *(0.3, 1, True, None, 2.0),
    *(torch.tensor(value) for value in (0.3, 0.0, 2, True, [0.3], [2], [0.3, 0.2])),
    torch.tensor(0.3, dtype=torch.float64),
    nn.Parameter(torch.tensor(0.3)),
    *(np.float32(0.3), np.int64(1), np.array(0.3)),
    "0.3",
]


@pytest.mark.parametrize("momentum", MOMENTA, ids=repr)
@pytest.mark.parametrize("kind", ["BatchNorm1d", "BatchNormAct1d", "ConvBatchNormAct2d", "replaced", "fused"])
def test_momentum_of_batch_norm(kind: str, momentum: Any, device: str) -> None:
    """A tensor is a momentum like any other; the number of batches so far is another argument."""
    shape = (3, 2) if kind.endswith("1d") else (3, 2, 4, 5)
    xs = [random_tensor(shape, torch.float32, device, seed) for seed in range(2)]
    norm = (nn.BatchNorm1d if kind.endswith("1d") else nn.BatchNorm2d)(2, momentum=momentum)
    if kind.endswith("1d"):
        stock = nn.Sequential(norm, nn.ReLU() if "Act" in kind else nn.Identity()).to(device)
        ours = getattr(layers, kind)(2, momentum=momentum).to(device)
    else:
        stock = nn.Sequential(nn.Conv2d(2, 2, 1), norm, nn.ReLU()).to(device)
        ours = copy.deepcopy(stock)
        if kind == "ConvBatchNormAct2d":
            ours = layers.ConvBatchNormAct2d(2, 2, 1, momentum=momentum).to(device)
            ours.conv.load_state_dict(stock[0].state_dict())
        else:
            fusednn.replace_layers(ours, fuse=kind == "fused")

    def train(model: nn.Module) -> tuple[Tensor, ...]:
        return *(model(x) for x in xs), *model.buffers()

    assert_same_outcome(outcome(partial(train, ours), {}), outcome(partial(train, stock), {}), kind)
