"""What PyTorch refuses is refused here, and nothing else: found by trying operands and sizes that don't fit."""

import inspect
import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.operations import ARGUMENTS, OWN_ARGUMENTS
from torch import Tensor, nn
from torch.overrides import BaseTorchFunctionMode

from fusednn import autograd, layers


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


#: What is no option of most functions, or out of its range, or only looks like one.
ODD = ("text", -1, 1.5, None, 0, float("nan"), True, torch.tensor(0.5), (1, 2), [1], 2**70, 1j)
FEW = ODD[:3]


def unfit_calls(
    function: Callable[..., Any], arguments: dict[str, Any], device: str, odd: tuple[Any, ...] | None
) -> Iterator[dict[str, Any]]:
    """Arguments with one operand that doesn't fit, or, where there are ``odd`` ones, one option."""
    given = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in arguments.items()}
    for key in inspect.signature(function).parameters:
        operand = given.get(key)
        if isinstance(operand, Tensor) == (odd is None):
            for other in unfit(operand) if odd is None else odd:
                yield {**given, key: other}


def words(arguments: dict[str, Any]) -> dict[str, Any]:
    return {
        key: f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else value
        for key, value in arguments.items()
    }


operands_and_options = pytest.mark.parametrize(
    "odd",
    [None, FEW, pytest.param(ODD[len(FEW) :], marks=pytest.mark.thorough)],
    ids=["operands", "options", "other options"],
)


@operands_and_options
@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_that_do_not_fit(name: str, odd: tuple[Any, ...] | None, device: str) -> None:
    ours, stock = getattr(autograd, name), getattr(F, name)
    for changed in unfit_calls(ours, ARGUMENTS[name], device, odd):
        assert outcome(ours, changed) == outcome(stock, changed), words(changed)


# --- What ``torch.nn`` lacks: its stock formulation, which serves under a mode, says what is right --------------------


@pytest.mark.kernels
@operands_and_options
@pytest.mark.parametrize("name", OWN_ARGUMENTS)
def test_own_functions_refuse_what_their_stock_formulation_does(
    name: str, odd: tuple[Any, ...] | None, device: str
) -> None:
    function = getattr(autograd, name)
    for changed in unfit_calls(function, OWN_ARGUMENTS[name], device, odd):
        ours = outcome(function, changed)
        with BaseTorchFunctionMode():
            assert ours == outcome(function, changed), words(changed)


def test_every_function_has_arguments() -> None:
    assert {*ARGUMENTS, *OWN_ARGUMENTS} == {*autograd.__all__} - {"sync_batch_norm"}  # of ranks: it has no stock path


_ROWS, _IMAGES = torch.randn(3, 4), torch.randn(2, 2, 5, 4)
OWN_LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    "BatchNormAct1d": (lambda: layers.BatchNormAct1d(4), (_ROWS, _ROWS.flip(0))),
    "BatchNormAct2d": (lambda: layers.BatchNormAct2d(2), (_IMAGES,)),
    "BatchNormAct3d": (lambda: layers.BatchNormAct3d(2), (_IMAGES.unsqueeze(2),)),
    "BiasActivationDropout": (lambda: layers.BiasActivationDropout(4), (_ROWS, _ROWS.flip(0))),
    "ConvAct2d": (lambda: layers.ConvAct2d(2, 3, 2), (_IMAGES,)),
    "ConvBatchNormAct2d": (lambda: layers.ConvBatchNormAct2d(2, 2, 3, padding=1), (_IMAGES, _IMAGES.flip(0))),
    "ConvMaxPool2d": (lambda: layers.ConvMaxPool2d(2, 3, 2), (_IMAGES,)),
    "DropConnect": (lambda: layers.DropConnect(4, 3), (_ROWS,)),
    "GlobalContrastNorm": (layers.GlobalContrastNorm, (_IMAGES,)),
    "InputNorm": (lambda: layers.InputNorm(4), (_ROWS,)),
    "Maxout": (lambda: layers.Maxout(4, 3, 2), (_ROWS,)),
    "MaxoutConv2d": (lambda: layers.MaxoutConv2d(2, 3, 2), (_IMAGES,)),
    "Standout": (layers.Standout, (_ROWS, _ROWS.flip(0))),
    "SyncBatchNormAct": (lambda: layers.SyncBatchNormAct(2), (_IMAGES,)),
}


@pytest.mark.kernels
@pytest.mark.parametrize("name", OWN_LAYERS)
@pytest.mark.parametrize(
    "training", [True, pytest.param(False, marks=pytest.mark.thorough)], ids=["training", "evaluation"]
)
def test_own_layers_refuse_what_their_stock_formulation_does(name: str, training: bool, device: str) -> None:
    make, operands = OWN_LAYERS[name]
    layer = make().to(device).train(training)
    parameters = list(inspect.signature(layer.forward).parameters)[: len(operands)]
    arguments = dict(zip(parameters, (operand.to(device) for operand in operands), strict=True))
    for key, operand in arguments.items():
        for other in unfit(operand):
            changed = {**arguments, key: other}
            ours = outcome(layer, changed)
            with BaseTorchFunctionMode():
                assert ours == outcome(layer, changed), words(changed)


WRONG_ACTIVATIONS = [
    ({"activation": "elu_"}, "unknown activation 'elu_'"),  # stock has it
    ({"activation": "rellu"}, "unknown activation 'rellu'"),
    ({"activation": "relu", "parameters": (0.1,)}, "relu has 0 parameters, but got 1"),
    ({"activation": "elu", "parameters": (0.1, 0.2)}, "elu has 1 parameter, but got 2"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG_ACTIVATIONS)
def test_activations_that_there_are_none_of(wrong: dict[str, Any], message: str, device: str) -> None:
    """Of every function and layer that has one."""
    asked = 0
    for function in (getattr(module, name) for module in (autograd, layers) for name in module.__all__):
        known = inspect.signature(function).parameters if callable(function) else {}
        options = {key if key in known else f"activation_{key}": value for key, value in wrong.items()}
        if not options.keys() <= known.keys() or function in (autograd.sync_batch_norm, layers.register_activation):
            continue
        arguments: dict[str, Any] = OWN_ARGUMENTS.get(function.__name__, {})
        moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in arguments.items()}
        sizes = [1 for one in known.values() if one.default is one.empty and one.kind is not one.VAR_KEYWORD]
        with pytest.raises(ValueError, match=message):
            function(*([] if arguments else sizes), **{**moved, **options})
        asked += 1
    assert asked > 10


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
