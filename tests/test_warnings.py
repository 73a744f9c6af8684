"""What PyTorch warns of is warned of here, in its words, and nothing else is."""

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.operations import ARGUMENTS, OPERATIONS, Operation
from torch import Tensor

from fusednn import autograd

#: Options beside those of the arguments, which stock warns of with some functions.
OPTIONS: dict[str, tuple[Any, ...]] = {
    "dim": (None,),
    "inplace": (True,),
    "reduce": (True, False),
    "reduction": ("mean",),
    "size_average": (True, False),
}


def warned(function: Callable[[], Any]) -> list[tuple[type[Warning], str]]:
    """What a call warns of, each time; NumPy, in which Triton's interpreter computes, would warn of infinities."""
    with warnings.catch_warnings(record=True) as caught, np.errstate(all="ignore"):
        warnings.simplefilter("always")
        function()
    return [(one.category, str(one.message)) for one in caught]


@pytest.fixture(autouse=True)
def _warns_always() -> Iterator[None]:
    """Not once in a process, which another test may have been."""
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    yield
    torch.set_warn_always(before)


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations(name: str) -> None:
    """Forward and backward."""
    operation = Operation(name)

    def step(function: Callable[..., Any]) -> None:
        y = operation.call(function, operation.leaves())
        if y.requires_grad:
            y.sum().backward()

    assert warned(partial(step, operation.ours)) == warned(partial(step, operation.stock))


@pytest.mark.parametrize("name", ARGUMENTS)
def test_options(name: str, device: str) -> None:
    """Those of which stock warns, one by one; some functions refuse some."""
    ours, stock = getattr(autograd, name), getattr(F, name)

    def call(function: Callable[..., Any], given: dict[str, Any]) -> None:
        tensors = {key: value.clone().to(device) for key, value in given.items() if isinstance(value, Tensor)}
        with suppress(TypeError, ValueError):
            function(**{**given, **tensors})

    for key, values in OPTIONS.items():
        for value in values if key in inspect.signature(ours).parameters else ():
            given = {**ARGUMENTS[name], key: value}
            assert warned(partial(call, ours, given)) == warned(partial(call, stock, given)), f"{key}={value!r}"
