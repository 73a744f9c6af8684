"""Which path a call takes, and why, where stock's values are right as well: a test of values sees no difference."""

import copy
import inspect
import warnings
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Any

import pytest
import torch
from support.operations import ARGUMENTS, OWN_ARGUMENTS
from torch import Tensor, nn
from torch.overrides import BaseTorchFunctionMode

import fusednn
from fusednn import autograd, layers
from fusednn.autograd.dispatch import Choice, observe_choices
from fusednn.testing import random_tensor

pytestmark = pytest.mark.kernels

KERNEL = "kernel"


class Tagged(Tensor):
    """A tensor subclass."""


def normal(*shape: int) -> Tensor:
    return random_tensor(shape, torch.float32, "cpu")


X, IMAGES, FILTERS, CLASSES = normal(4, 5), normal(2, 3, 6, 6), normal(4, 3, 3, 3), torch.arange(4)
WEIGHTS, PROBABILITIES = torch.ones(5, requires_grad=True), normal(4, 5).sigmoid().requires_grad_()


def assert_path(function: Callable[..., Any], arguments: tuple[Any, ...], expected: str, device: str) -> None:
    moved = [
        one.detach().to(device).requires_grad_(one.requires_grad) if type(one) is Tensor else one for one in arguments
    ]
    choices: list[Choice] = []
    with observe_choices(choices.append):
        function(*moved)
    (choice,) = [choice for choice in choices if choice.operation != "linear"]  # within maxout
    assert (choice.path if choice.kernel else choice.reason) == expected


@pytest.mark.parametrize(
    ("function", "arguments", "expected"),
    [
        *((autograd.conv_act_pool2d, (IMAGES, FILTERS, None, 1, how), KERNEL) for how in ("valid", "same", 1, (1, 0))),
        (autograd.maxout, (X, 1), "one piece is its own maximum"),
        (autograd.maxout, (X, 5), KERNEL),  # one group
        (autograd.maxout_linear, (X, normal(2, 1, 5)), KERNEL),  # one unit
        (autograd.maxout_linear, (X, normal(1, 3, 5)), "one piece is its own maximum"),
        (lambda x: autograd.relu(nn.Parameter(x)), (X,), KERNEL),
        (lambda x: autograd.relu(nn.Buffer(x)), (X,), KERNEL),
        (autograd.mse_loss, (X, PROBABILITIES), KERNEL),
        (autograd.cross_entropy, (X, PROBABILITIES), KERNEL),
        (autograd.linear_cross_entropy, (X, normal(5, 5), PROBABILITIES), "the probabilities require gradients"),
    ],
)
def test_path(function: Callable[..., Any], arguments: tuple[Any, ...], expected: str, device: str) -> None:
    assert_path(function, arguments, expected, device)


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (autograd.linear_cross_entropy, (X, normal(5, 5), PROBABILITIES)),
        (autograd.binary_cross_entropy, (X.sigmoid(), PROBABILITIES)),
        (autograd.cross_entropy, (X, CLASSES, WEIGHTS)),
        (autograd.nll_loss, (X, CLASSES, WEIGHTS)),
        (autograd.relu, (X.clone().requires_grad_(), True)),
    ],
)
def test_what_requires_gradients_is_no_reason_where_none_are_kept(
    function: Callable[..., Any], arguments: tuple[Any, ...], device: str
) -> None:
    with torch.no_grad():
        assert_path(function, arguments, KERNEL, device)


@pytest.mark.parametrize(
    ("function", "arguments", "expected"),
    [
        (autograd.relu, (X,), KERNEL),
        (autograd.prelu, (X, torch.ones(1)), KERNEL),
        (autograd.mse_loss, (X.bfloat16(), X), KERNEL),
        (autograd.cross_entropy, (X.bfloat16(), CLASSES, torch.ones(5)), KERNEL),
        (autograd.maxout_linear, (X, normal(2, 3, 5)), KERNEL),
        (autograd.drop_connect_linear, (X, normal(3, 5)), KERNEL),
        (autograd.conv_act_pool2d, (IMAGES, FILTERS), KERNEL),
        (autograd.prelu, (X, torch.ones(1).as_subclass(Tagged)), "Tagged is not a plain tensor"),
    ],
)
def test_path_under_autocast(
    function: Callable[..., Any], arguments: tuple[Any, ...], expected: str, device: str
) -> None:
    with torch.autocast(device, torch.bfloat16):
        assert_path(function, arguments, expected, device)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("keeps_graph", [True, False])
def test_path_of_frozen_layers(training: bool, keeps_graph: bool, device: str) -> None:
    layer = layers.BatchNorm2d(3).requires_grad_(False).train(training).to(device)
    with nullcontext() if keeps_graph else torch.no_grad():
        assert_path(layer, (IMAGES.clone().requires_grad_(),), KERNEL, device)
        assert_path(layer, (IMAGES.half(),), KERNEL, device)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"activation": "softplus", "parameters": (0.0, 20.0)}, "beta is 0"),
        ({"kernel_size": 300}, "the window has more positions than a byte can tell"),
        ({"pool_size": 300}, "the window has more positions than a byte can tell"),
    ],
)
def test_path_of_options_that_one_part_refuses(options: dict[str, Any], expected: str, device: str) -> None:
    """Of every function that has them, however many parts it computes in one; stock may raise its own error then."""
    found = 0
    for name, arguments in (ARGUMENTS | OWN_ARGUMENTS).items():
        parameters = inspect.signature(getattr(autograd, name)).parameters
        known = {key if key in parameters else f"activation_{key}": value for key, value in options.items()}
        if not known.keys() <= parameters.keys():
            continue
        moved = {key: one.to(device) if isinstance(one, Tensor) else one for key, one in arguments.items()}
        choices: list[Choice] = []
        with observe_choices(choices.append), suppress(RuntimeError):
            getattr(autograd, name)(**{**moved, **known})
        assert expected in [choice.reason for choice in choices if not choice.kernel], name
        found += 1
    assert found > 1


CONVOLUTION = "cuDNN: no kernel of a plain convolution was measured faster"
IDENTITY = "the identity in evaluation"

#: Operands with and without a batch, and with another dimension; others, like weights, have none.
BATCHES: dict[str, Callable[[Tensor], Tensor]] = {
    "batch": lambda operand: operand,
    "no batch": lambda operand: operand[0],
    "more": lambda operand: operand.unsqueeze(0),
}
OPERANDS = {"input", "target", "residual", "gate", "other", "belief", "transformed", "carried"}
PRODUCT = "cuBLAS: the features are no multiple of 16"
#: Why some of these calls are stock's.
TO_STOCK: dict[str, dict[str, str]] = {
    **{
        f"conv{transposed}{n}d": dict.fromkeys(("batch", "no batch"), CONVOLUTION)
        for transposed in ("", "_transpose")
        for n in (1, 2, 3)
    },
    "block_end": {"no batch": "the scale is not one number for each element of a dimension behind the first"},
    "conv_batch_norm_act2d": {"batch": CONVOLUTION, "no batch": "not a batch of images"},
    "dropout2d": {"no batch": "3 dimensions", "more": "5 dimensions"},
    "dropout3d": {"no batch": "3 dimensions"},
    "gated_channels": dict.fromkeys(("no batch", "more"), "the gate hasn't one element for each sample's channel"),
    "maxout_linear": dict.fromkeys(BATCHES, PRODUCT),
}


@pytest.mark.parametrize("name", [*ARGUMENTS, *OWN_ARGUMENTS])
def test_path_of_batches(name: str, device: str) -> None:
    """Whatever stock takes."""
    arguments, function = (ARGUMENTS | OWN_ARGUMENTS)[name], getattr(autograd, name)
    moved = {key: one.to(device) if isinstance(one, Tensor) else one for key, one in arguments.items()}
    found = {}
    for batch, change in BATCHES.items():
        given = {key: change(one) if key in OPERANDS else one for key, one in moved.items()}
        try:
            with BaseTorchFunctionMode(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                function(**copy.deepcopy(given))
        except (IndexError, RuntimeError):
            continue
        choices: list[Choice] = []
        with observe_choices(choices.append):
            function(**given)
        assert choices
        for choice in choices:
            if not choice.kernel:
                found[batch] = choice.reason
    assert found == TO_STOCK.get(name, {})


@pytest.mark.parametrize(
    ("fuse", "evaluated", "expected"),
    [
        (True, (), {"conv2d": CONVOLUTION, "batch_norm_act": KERNEL, "bias_activation_dropout": KERNEL}),
        (True, (0, 2, 4, 5), {"conv2d": CONVOLUTION, "batch_norm_act": KERNEL, "bias_activation_dropout": KERNEL}),
        (True, (1,), {"conv_act2d": KERNEL, "bias_activation_dropout": KERNEL}),
        (True, (6,), {"conv2d": CONVOLUTION, "batch_norm_act": KERNEL, "bias_activation": KERNEL}),
        (True, (1, 6), {"conv_act2d": KERNEL, "bias_activation": KERNEL}),
        (False, (1,), {"conv2d": CONVOLUTION, "batch_norm": KERNEL, "relu": KERNEL, "dropout": KERNEL}),
        (False, (6,), {"conv2d": CONVOLUTION, "batch_norm": KERNEL, "relu": KERNEL, "dropout": IDENTITY}),
    ],
)
def test_path_of_mixed_modes(fuse: bool, evaluated: tuple[int, ...], expected: dict[str, str], device: str) -> None:
    """Some layers in training, some in evaluation: each layer's own mode decides, not the model's."""
    members = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5), nn.ReLU(), nn.Dropout()
    model = nn.Sequential(*members).to(device)
    fusednn.replace_layers(model, fuse=fuse)
    for index in evaluated:
        model[index].eval()
    choices: list[Choice] = []
    with observe_choices(choices.append):
        model(IMAGES.to(device))
    found = {choice.operation: choice.path if choice.kernel else choice.reason for choice in choices}
    assert found == expected
