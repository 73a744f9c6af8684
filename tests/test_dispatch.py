"""The choice between kernel and stock path, and the transforms and modes that it must respect."""

import contextlib
import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from support.device import DEVICE, KERNELS_RUN
from support.samples import CASES, Case
from torch import Tensor, nn
from torch.autograd import forward_ad

import fusednn
from fusednn import autograd, layers
from fusednn.autograd.dispatch import Choice, observe_choices
from fusednn.testing import random_tensor

every_case = pytest.mark.parametrize("case", CASES, ids=str)


def choice_of(function: object, *arguments: object, **options: object) -> Choice:
    choices: list[Choice] = []
    with observe_choices(choices.append), contextlib.suppress(Exception):
        function(*arguments, **options)
    (choice,) = choices
    return choice


@every_case
def test_plain_floating_point_tensors_take_the_kernel(case: Case, device: str) -> None:
    choice = choice_of(case.ours, *case.operands(torch.randn(2, 3, device=device)))
    assert choice.path == ("kernel" if KERNELS_RUN else "stock")
    assert KERNELS_RUN or choice.reason == "CPU tensor"


class Tagged(Tensor):
    """A tensor subclass."""


@pytest.mark.kernels
@pytest.mark.parametrize(
    ("function", "arguments", "reason"),
    [
        (autograd.relu, [torch.ones(3, dtype=torch.int32)], "no kernel for torch.int32"),
        (autograd.tanh, [torch.ones(3, dtype=torch.complex64)], "no kernel for torch.complex64"),
        (autograd.relu, [torch.ones(3).as_subclass(Tagged)], "Tagged is not a plain tensor"),
        (autograd.relu, ["text"], "str is not a plain tensor"),
        (autograd.relu, [torch.ones(3, device="meta")], "no kernels for meta tensors"),
        (autograd.relu, [torch.ones(3).to_sparse()], "torch.sparse_coo tensor"),
        (autograd.relu, [torch.nested.nested_tensor([torch.ones(3), torch.ones(2)])], "a nested tensor"),
        (autograd.relu, [torch.ones(0)], "no elements"),
        (autograd.elu, [torch.ones(3), -1.0, True], "in-place with an alpha that is not positive"),
        (autograd.celu, [torch.ones(3), 0.0], "alpha is 0"),
        (autograd.hardtanh, [torch.ones(3), 1.0, 1.0], "min_val is not below max_val"),
        (autograd.softplus, [torch.ones(3), 0.0], "beta is 0"),
        (autograd.leaky_relu, [torch.ones(3), torch.tensor(0.1)], "a parameter is not a Python number"),
        (autograd.leaky_relu, [torch.ones(3), -0.1, True], "in-place with a negative slope"),
        (partial(autograd.gelu, approximate="fast"), [torch.ones(3)], "unknown approximation"),
        (autograd.prelu, [torch.ones(3), torch.ones(1).double()], "operands differ in dtype, device or layout"),
        (autograd.mse_loss, [torch.ones(3), torch.ones(3).to_sparse()], "operands differ in dtype, device or layout"),
        (autograd.prelu, [torch.ones(2, 3), torch.ones(4)], "the slopes are neither one nor one per channel"),
        (autograd.rrelu, [torch.ones(3), 0.5, 0.1, True], "the bounds are not in order, or not finite"),
        (autograd.relu, [torch.ones(3, requires_grad=True), True], "in-place on a leaf that requires gradients"),
        (autograd.relu, [torch.ones(1).expand(3), True], "in-place on memory that overlaps itself"),
    ],
)
def test_refusals_give_their_reason(function: object, arguments: list, reason: str) -> None:
    moved = [
        argument.detach().to(DEVICE).requires_grad_(argument.requires_grad)
        if type(argument) is Tensor
        and argument.device.type == "cpu"
        and (argument.is_nested or argument.stride() != (0,))
        else argument
        for argument in arguments
    ]
    if DEVICE == "cuda" and "overlaps" in reason:
        moved[0] = torch.ones(1, device=DEVICE).expand(3)
    choice = choice_of(function, *moved)
    assert choice.path == "stock"
    assert choice.reason == reason


@pytest.mark.parametrize("stock", [F.relu, F.gelu, F.tanh, F.dropout, F.silu, F.softmax], ids=lambda f: f.__name__)
def test_nested_tensors(stock: Callable[..., Tensor], device: str) -> None:
    """Their layout is strided too, and so may their class be Tensor, as of others that were given before."""
    arguments = {F.softmax: (-1,), F.dropout: (0.5, False)}.get(stock, ())
    for _ in range(4):
        getattr(autograd, stock.__name__)(torch.ones(3, 4, device=device), *arguments)
    x = torch.nested.nested_tensor([torch.randn(3, 4), torch.randn(2, 4)], device=device)
    y = getattr(autograd, stock.__name__)(x, *arguments)
    for ours, theirs in zip(y.unbind(), stock(x, *arguments).unbind(), strict=True):
        assert torch.equal(ours, theirs)


def test_nested_tensors_in_a_chain(device: str) -> None:
    stock = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Dropout(0.0)).to(device)
    model = copy.deepcopy(stock)
    fusednn.replace_layers(model, fuse=True)
    for _ in range(4):
        model(torch.ones(3, 4, device=device))
    x = torch.nested.nested_tensor([torch.randn(3, 4), torch.randn(2, 4)], device=device)
    for ours, theirs in zip(model(x).unbind(), stock(x).unbind(), strict=True):
        torch.testing.assert_close(ours, theirs)


@every_case
def test_func_transforms(case: Case, device: str) -> None:
    operands = case.operands(random_tensor((4, 3, 5), torch.float64, device))
    x, rest = operands[0], operands[1:]
    if case.name != "rrelu":  # stock has no rule for it either
        batched = torch.vmap(lambda row: case.ours(row.unsqueeze(0), *rest).squeeze(0))(x)
        torch.testing.assert_close(batched, case.stock(x, *rest))
        value, tangent = torch.func.jvp(lambda x: case.ours(x, *rest), (x,), (torch.ones_like(x),))
        torch.testing.assert_close(value, case.stock(x, *rest))
        torch.testing.assert_close(tangent, _derivative(case.stock, x, *rest))
    gradient = torch.func.grad(lambda x: case.ours(x, *rest).sum())(x)
    torch.testing.assert_close(gradient, _derivative(case.stock, x, *rest))


def _derivative(function: object, x: Tensor, *rest: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(function(x, *rest).sum(), x)[0]


@every_case
def test_forward_mode(case: Case, device: str) -> None:
    if case.name == "rrelu":
        pytest.skip("stock has no forward-mode derivative of it")
    x, *rest = case.operands(random_tensor((2, 3, 5), torch.float64, device))
    with forward_ad.dual_level():
        dual = case.ours(forward_ad.make_dual(x, torch.ones_like(x)), *rest)
        tangent = forward_ad.unpack_dual(dual).tangent
    torch.testing.assert_close(tangent, _derivative(case.stock, x, *rest))


def test_functional_call(device: str) -> None:
    layer = layers.PReLU(3).to(device)
    x = random_tensor((2, 3, 5), torch.float32, device)
    weight = torch.tensor([0.5, -0.5, 2.0], device=device)
    torch.testing.assert_close(torch.func.functional_call(layer, {"weight": weight}, x), F.prelu(x, weight))


@every_case
def test_devices_without_kernels_or_autocast_take_the_stock_path(case: Case) -> None:
    x = torch.ones(2, 3, device="meta")
    assert case.ours(*case.operands(x)).shape == case.stock(*case.operands(x)).shape


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_stocks_dtypes(case: Case, dtype: torch.dtype, device: str) -> None:
    for input_dtype in (torch.float32, dtype):
        operands = case.operands(random_tensor((2, 3, 5), input_dtype, device))
        with torch.autocast(device, dtype=dtype):
            assert case.ours(*operands).dtype == case.stock(*operands).dtype


def test_autocast_lists_hold_no_other_activation() -> None:
    """PyTorch registers its autocast rules for CUDA in every build; ours for softplus and PReLU must be all of them."""
    names = {"gelu", "silu", "mish", "elu", "celu", "selu", "hardtanh", "hardswish", "hardsigmoid", "rrelu", "relu"}
    names |= {"sigmoid", "tanh", "threshold", "log_sigmoid", "leaky_relu", "relu6", "softplus", "prelu"}
    for device, expected in (("CUDA", {"softplus", "prelu"}), ("CPU", {"prelu"})):
        registered = {name for name in names if f"Autocast{device}:" in torch._C._dispatch_dump(f"aten::{name}")}
        assert registered == expected


@pytest.mark.kernels
def test_neg_and_conj_views(device: str) -> None:
    x = torch.randn(100, dtype=torch.complex64, device=device)
    negative_view = torch._neg_view(x.real)
    torch.testing.assert_close(autograd.relu(negative_view), F.relu(negative_view))


def test_saved_tensor_hooks_see_what_is_saved(device: str) -> None:
    x = random_tensor((2, 3, 5), torch.float32, device).requires_grad_()
    with torch.autograd.graph.save_on_cpu():
        y = layers.ReLU()(x)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], (x > 0).float())


def test_export_and_fx_see_stock_operators(device: str) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.GELU()).to(device)
    fusednn.replace_layers(model)
    x = torch.randn(2, 4, device=device)
    exported = torch.export.export(model, (x,))
    torch.testing.assert_close(exported.module()(x), model(x))
    traced = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(traced(x), model(x))


def test_the_choice_is_traced_on_either_path(device: str) -> None:
    """``test_compile.py`` runs where kernels do; this runs on the stock path too."""
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(True), nn.PReLU(8), nn.RReLU(), nn.Softplus(), nn.Hardtanh())
    fusednn.replace_layers(model.to(device).eval())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 4, device=device)
    torch.testing.assert_close(compiled(x), model(x))
    compiled(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_choices_are_not_observed_after_the_block(device: str) -> None:
    choices: list[Choice] = []
    with observe_choices(choices.append):
        pass
    autograd.relu(torch.ones(2, device=device))
    assert not choices
