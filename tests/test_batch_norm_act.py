"""Batch norm with an activation and a residual behind it."""

import copy
import pickle
import warnings
from functools import partial
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from support.activations import PARAMETERS, STOCK
from support.batch_norm import mostly_thorough, vectors
from support.device import KERNELS_RUN
from torch import Tensor, nn

from fusednn import autograd, layers
from fusednn.testing import LAYOUTS, check_against_stock, leaf, random_tensor

modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
needs_kernels = pytest.mark.kernels


ACTS = [None, *sorted(STOCK)]


def compose(
    activation: str | None, training: bool, x: Tensor, weight: Tensor, bias: Tensor, *residual: Tensor
) -> Tensor:
    """What the fused function stands for, of stock operators."""
    mean, variance, *_ = vectors(x.shape[1], weight.dtype, x.device.type)
    y = F.batch_norm(x, mean, variance, weight, bias, training)
    for added in residual:
        y = y + added
    return y if activation is None else STOCK[activation](y)


def fused(activation: str | None, training: bool, x: Tensor, weight: Tensor, bias: Tensor, *residual: Tensor) -> Tensor:
    mean, variance, *_ = vectors(x.shape[1], weight.dtype, x.device.type)
    added = residual[0] if residual else None
    return autograd.batch_norm_act(x, mean, variance, weight, bias, training, residual=added, activation=activation)


@needs_kernels
@pytest.mark.parametrize("activation", mostly_thorough(ACTS, (None, "relu", "gelu")))
@pytest.mark.parametrize("joined", [False, True], ids=["alone", "residual"])
@modes
def test_fused_forms(activation: str | None, joined: bool, training: bool, device: str) -> None:
    shape = (3, 18, 5, 4)
    x, gradient, residual = (random_tensor(shape, torch.float32, device, seed) for seed in range(3))
    _, _, weight, bias = vectors(shape[1], torch.float32, device)
    ours, stock = (partial(function, activation, training) for function in (fused, compose))
    for layout in ("contiguous", "channels_last"):
        operands = [LAYOUTS[layout](x), weight, bias, *([residual] if joined else [])]
        check_against_stock(ours, stock, operands, gradient)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_fused_forms_in_other_dtypes(activation: str, dtype: torch.dtype, device: str) -> None:
    shape = (3, 5, 70)
    x, gradient, residual = (random_tensor(shape, dtype, device, seed) for seed in range(3))
    if activation == "relu":
        residual = 64 * residual.sign()  # no rounding decides which sums are positive
    _, _, weight, bias = vectors(5, dtype, device)
    ours, stock = (partial(function, activation, True) for function in (fused, compose))
    check_against_stock(ours, stock, [x, weight, bias, residual], gradient)


@needs_kernels
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_strided_and_expanded_residuals(activation: str, device: str) -> None:
    x, gradient = (random_tensor((3, 6, 5, 4), torch.float32, device, seed) for seed in (0, 1))
    _, _, weight, bias = vectors(6, torch.float32, device)
    ours, stock = (partial(function, activation, True) for function in (fused, compose))
    for layout in ("sliced", "expanded", "transposed"):
        residual = LAYOUTS[layout](random_tensor((3, 6, 5, 4), torch.float32, device, seed=2))
        check_against_stock(ours, stock, [x, weight, bias, residual], gradient)
    broadcast = random_tensor((1, 6, 1, 1), torch.float32, device)  # takes the stock path
    torch.testing.assert_close(ours(x, weight, bias, broadcast), stock(x, weight, bias, broadcast))


@needs_kernels
@pytest.mark.parametrize(
    ("activation", "joined", "training"),
    mostly_thorough(
        product((None, "relu", "leaky_relu", "tanh", "silu"), (False, True), (True, False)),
        {("relu", True, True), ("silu", False, True), ("relu", False, False)},
    ),
    ids=str,
)
def test_gradcheck(activation: str | None, joined: bool, training: bool, device: str) -> None:
    x, residual = (random_tensor((3, 2, 3), torch.float64, device, seed).requires_grad_() for seed in (0, 1))
    parameters = [leaf(vector) for vector in vectors(2, torch.float64, device)[2:]]
    operands = [x, *parameters, *([residual] if joined else [])]
    function = partial(fused, activation, training)
    assert torch.autograd.gradcheck(function, operands, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, operands, fast_mode=True)


@pytest.mark.parametrize("activation", ["relu", "gelu_tanh", None])
def test_fused_layers_on_either_path(activation: str | None, device: str) -> None:
    for cls, stock, shape in (
        (layers.BatchNormAct1d, nn.BatchNorm1d, (5, 4)),
        (layers.BatchNormAct2d, nn.BatchNorm2d, (2, 4, 3, 5)),
        (layers.BatchNormAct3d, nn.BatchNorm3d, (2, 4, 3, 2, 2)),
    ):
        ours, plain = cls(4, activation=activation).to(device), stock(4).to(device)
        assert not isinstance(ours, nn.modules.batchnorm._BatchNorm)
        ours.load_state_dict(plain.state_dict())
        x, residual = (random_tensor(shape, torch.float32, device, seed) for seed in (0, 1))
        for training in (True, False):
            y = plain.train(training)(x) + residual
            expected = y if activation is None else STOCK[activation](y)
            torch.testing.assert_close(ours.train(training)(x, residual), expected)
        assert ours.running_var.equal(plain.running_var) or KERNELS_RUN
        assert f"activation={activation!r}" in repr(ours)
        for duplicate in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            torch.testing.assert_close(duplicate(x, residual), ours(x, residual))
        with pytest.raises(ValueError, match="expected"):
            ours(torch.ones(3, device=device))


def test_scripting() -> None:
    x = random_tensor((5, 4), torch.float32, "cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(layers.BatchNorm1d(4))
        torch.testing.assert_close(scripted(x), nn.BatchNorm1d(4)(x))
        with pytest.raises(NotImplementedError, match=r"BatchNormAct1d has no torch\.nn class"):
            torch.jit.script(layers.BatchNormAct1d(4))


@needs_kernels
@pytest.mark.parametrize("name", sorted(PARAMETERS))
@pytest.mark.parametrize("joined", [False, True], ids=["alone", "residual"])
def test_parameters_of_activations(name: str, joined: bool, device: str) -> None:
    parameters = PARAMETERS[name]
    x, residual, gradient = (random_tensor((3, 4, 5), torch.float32, device, seed) for seed in range(3))
    layer = layers.BatchNormAct1d(4, activation=name, activation_parameters=parameters).to(device)
    assert f"activation={name!r}, activation_parameters={parameters}" in repr(layer)

    def stock(x: Tensor, *residual: Tensor) -> Tensor:
        y = F.batch_norm(x, None, None, layer.weight.to(x.dtype), layer.bias.to(x.dtype), True)
        return STOCK[name](sum(residual, y), *parameters)

    check_against_stock(layer, stock, [x, residual] if joined else [x], gradient)


def test_unknown_activations_are_named() -> None:
    for wrong in ("rellu", "elu_"):
        with pytest.raises(ValueError, match=f"unknown activation '{wrong}'"):
            layers.BatchNormAct2d(3, activation=wrong)
        with pytest.raises(ValueError, match=f"unknown activation '{wrong}'"):
            autograd.batch_norm_act(torch.ones(2, 3), None, None, training=True, activation=wrong)
