"""What PyTorch refuses is refused here, and nothing else: found by trying operands and sizes that don't fit."""

import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.operations import ARGUMENTS
from torch import Tensor

from fusednn import autograd


def outcome(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """The kind of error, or the shape and dtype of the result."""
    copies = {name: value.clone() if isinstance(value, Tensor) else value for name, value in arguments.items()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = function(**copies)
    except Exception as error:
        return type(error)
    return [(tuple(y.shape), y.dtype) for y in (result if isinstance(result, tuple) else (result,))]


def unfit(operand: Tensor) -> Iterator[Tensor]:
    """Operands of other shapes and dtypes in the place of one."""
    yield operand.unsqueeze(0)
    yield operand[..., :-1] if operand.dim() else operand
    yield operand[0] if operand.dim() else operand.expand(3)
    yield torch.cat([operand, operand]) if operand.dim() else operand.expand(1, 1)
    yield operand[:0] if operand.dim() else operand.new_empty(0)
    yield operand.sum()
    yield operand.flatten()
    yield operand.transpose(0, -1) if operand.dim() else operand
    for dtype in (torch.int64, torch.int32, torch.float64, torch.float16, torch.bool, torch.complex64):
        yield operand.to(dtype)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_operands_that_do_not_fit(name: str, device: str) -> None:
    arguments = {
        key: value.to(device) if isinstance(value, Tensor) else value for key, value in ARGUMENTS[name].items()
    }
    for key, operand in arguments.items():
        if isinstance(operand, Tensor):
            for other in unfit(operand):
                changed = {**arguments, key: other}
                ours, stock = (outcome(function, changed) for function in (getattr(autograd, name), getattr(F, name)))
                assert ours == stock, f"{key} of shape {tuple(other.shape)} and {other.dtype}"


@pytest.mark.parametrize("dims", [1, 2])
def test_windows_that_do_not_fit(dims: int, device: str) -> None:
    x = torch.randn(1, 1, *[5] * dims, device=device)
    name = f"max_pool{dims}d"
    sizes = ((0, 1, 2, 3, 6), (None, 0, 2), (-1, 0, 1, 2, 3), (0, 1, 2, 3))
    refused = 0
    for kernel, stride, padding, dilation in itertools.product(*sizes):
        arguments = {
            "input": x,
            **dict(
                zip(("kernel_size", "stride", "padding", "dilation"), (kernel, stride, padding, dilation), strict=True)
            ),
        }
        ours, stock = (outcome(function, arguments) for function in (getattr(autograd, name), getattr(F, name)))
        assert ours == stock, f"kernel_size={kernel}, {stride=}, {padding=}, {dilation=}"
        refused += isinstance(stock, type)
    assert 0 < refused < len(list(itertools.product(*sizes)))


# --- Signatures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gelu", "logsigmoid", "softplus"])
def test_results_into_a_given_tensor(name: str, device: str) -> None:
    """Where the namesake takes ``out``, and how."""
    x = torch.randn(7, device=device)
    out = torch.empty(7, device=device)
    result = getattr(autograd, name)(x, out=out)
    assert result is out
    torch.testing.assert_close(out, getattr(F, name)(x), rtol=0, atol=0)
    for wrong in (x.double(), x.long()):
        arguments = {"input": x, "out": wrong.clone()}
        assert outcome(getattr(autograd, name), arguments) == outcome(getattr(F, name), arguments)


def test_no_other_function_takes_out(device: str) -> None:
    """The list above is all: functions written in Python have no such argument, and convolution and PReLU refuse it."""
    taken = []
    for name, arguments in ARGUMENTS.items():
        x = arguments["input"].to(device)
        moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in arguments.items()}
        outcomes = [
            outcome(function, {**moved, "out": torch.empty_like(x)})
            for function in (getattr(F, name), getattr(autograd, name))
        ]
        assert outcomes[0] == outcomes[1], name
        if outcomes[0] is not TypeError:
            taken.append(name)
    assert taken == ["gelu", "logsigmoid", "softplus"]


def test_options_that_are_named_only(device: str) -> None:
    for function in (F.gelu, autograd.gelu):
        with pytest.raises(TypeError):
            function(torch.ones(2, device=device), "tanh")
