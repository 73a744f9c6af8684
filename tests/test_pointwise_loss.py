"""The pointwise losses against PyTorch's: values, gradients of both operands, reductions, weights, layouts, bytes."""

import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.accuracy import assert_accurate
from support.device import FLOAT_DTYPES, ON_GPU
from support.layouts import LAYOUTS
from support.samples import random_tensor
from support.standing import check_against_stock, leaf, value_and_gradients
from torch import Tensor, nn

import fusednn
from fusednn import autograd, kernels
from fusednn.autograd.dispatch import Choice, observe_choices
from fusednn.kernels.instruments.saved_tensors import saved_tensors

pytestmark = [pytest.mark.kernels, pytest.mark.filterwarnings("ignore:reduction:UserWarning")]

if kernels.INTERPRETING:
    from fusednn.kernels.instruments.traffic import measure_traffic

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mse": ("mse_loss", {}),
    "l1": ("l1_loss", {}),
    "smooth_l1": ("smooth_l1_loss", {"beta": 0.7}),
    "smooth_l1 of beta 0": ("smooth_l1_loss", {"beta": 0.0}),
    "huber": ("huber_loss", {"delta": 1.3}),
    "bce": ("binary_cross_entropy", {}),
    "bce with logits": ("binary_cross_entropy_with_logits", {}),
    "kl_div": ("kl_div", {}),
    "kl_div of logarithms": ("kl_div", {"log_target": True}),
}
REDUCTIONS = ("none", "mean", "sum")

every_case = pytest.mark.parametrize("case", CASES)
every_dtype = pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def functions(case: str, **options: Any) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Ours and stock's."""
    name, arguments = CASES[case]
    ours, stock = (partial(getattr(module, name), **arguments, **options) for module in (autograd, F))
    return ours, stock


def operands(case: str, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Input and target, in the loss's range."""
    x, target = (random_tensor(shape, torch.float64, device, seed) for seed in (0, 1))
    if case == "bce":
        x = x.sigmoid().clamp(0.01, 0.99)
    if case.startswith("bce"):
        target = target.sigmoid()
    if case.startswith("kl_div"):
        x, target = -x.abs(), -target.abs()
    if case == "kl_div":
        target = target.exp()
    return x.to(dtype), target.to(dtype)


def upstream(x: Tensor, reduction: str) -> Tensor:
    """The gradient of the loss: not 1."""
    shape = tuple(x.shape) if reduction == "none" else ()
    return random_tensor(shape, x.dtype, str(x.device), seed=2)


def check(
    case: str, x: Tensor, target: Tensor, reduction: str = "none", g: Tensor | None = None, **options: Any
) -> None:
    ours, stock = functions(case, reduction=reduction, **options)
    g = upstream(x, reduction) if g is None else g
    if reduction == "none":
        check_against_stock(ours, stock, [x, target], g)
        return
    # A scalar has no memory format to keep; sums of terms of both signs may be near 0, so the rule is applied to the
    # terms' sizes.
    y, gradients = value_and_gradients(ours, [x, target], g)
    again, _ = value_and_gradients(ours, [x, target], g)
    assert torch.equal(y, again)
    y_stock, gradients_stock = value_and_gradients(stock, [x, target], g)
    exact = [tensor.double() for tensor in (x, target, g)]
    y_exact, gradients_exact = value_and_gradients(stock, exact[:2], exact[2])
    terms = functions(case, reduction="none", **options)[1](*exact[:2]).abs()
    largest = float(terms.sum() if reduction == "sum" else terms.mean())
    epsilon = torch.finfo(torch.float32 if x.dtype != torch.float64 else x.dtype).eps
    assert_accurate(y, y_stock, y_exact, "value", inherent=8 * epsilon * largest)
    for triple in zip(gradients, gradients_stock, gradients_exact, strict=True):
        assert_accurate(*triple, "gradient")


@every_case
@every_dtype
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.smoke
def test_values_and_gradients(case: str, dtype: torch.dtype, reduction: str, device: str) -> None:
    check(case, *operands(case, (3, 5, 16, 17), dtype, device), reduction)


@every_case
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(case: str, layout: str, reduction: str, device: str) -> None:
    x, target = operands(case, (2, 3, 4, 5), torch.float32, device)
    check(case, LAYOUTS[layout](x), target, reduction)
    if reduction == "none":
        check(case, x, target, g=LAYOUTS[layout](upstream(x, "none")))
    else:
        check(case, x, LAYOUTS[layout](target), reduction)


@every_case
@pytest.mark.parametrize("shape", [(), (1,), (2048,), (2049,), (5, 2048), (1, 3, 1, 1)])
def test_shapes(case: str, shape: tuple[int, ...], device: str) -> None:
    x, target = operands(case, shape, torch.float32, device)
    for reduction in REDUCTIONS:
        check(case, x, target, reduction)


@every_case
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_empty_tensors(case: str, reduction: str, device: str) -> None:
    ours, stock = functions(case, reduction=reduction)
    x, target = operands(case, (0, 3), torch.float32, device)
    torch.testing.assert_close(ours(x, target), stock(x, target), equal_nan=True)


def test_batchmean(device: str) -> None:
    check("kl_div", *operands("kl_div", (6, 300), torch.float32, device), "batchmean")


@pytest.mark.parametrize("case", ["mse", "l1", "huber", "bce", "bce with logits"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_weights(case: str, reduction: str, device: str) -> None:
    x, target = operands(case, (4, 5, 6), torch.float32, device)
    check(case, x, target, reduction, weight=torch.rand(4, 5, 6, device=device))


@pytest.mark.parametrize("shape", [(), (1,), (6,), (5, 1), (4, 1, 1), (4, 1, 6), (1, 5, 6), (4, 5, 6)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_weights_that_broadcast_are_read_as_they_are(shape: tuple[int, ...], layout: str, device: str) -> None:
    x, target = operands("bce with logits", (4, 5, 6), torch.float64, device)
    weight, positive = torch.rand(shape, dtype=x.dtype, device=device), torch.rand(6, dtype=x.dtype, device=device)
    if layout == "transposed":
        x = x.transpose(0, 2).contiguous().transpose(0, 2)
    check("bce with logits", x, target, "mean", weight=weight, pos_weight=positive)
    check("bce with logits", x, target, "none", weight=positive, pos_weight=weight)


@pytest.mark.parametrize("case", ["mse", "l1", "smooth_l1", "huber", "bce with logits", "kl_div of logarithms"])
def test_nan_and_infinities(case: str, device: str) -> None:
    infinity = float("inf")
    x = torch.tensor([float("nan"), infinity, -infinity, 1.0, 1.0, 0.0, infinity], device=device)
    target = torch.tensor([1.0, 1.0, 1.0, float("nan"), infinity, 0.0, infinity], device=device)
    check(case, x, target)


@every_dtype
def test_logits_far_out(dtype: torch.dtype, device: str) -> None:
    x = torch.tensor([0.0, -0.0, 1e-6, 20.0, -20.0, 88.0, -88.0, 110.0, -110.0, 1000.0, -1000.0], dtype=dtype)
    for target in (0.0, 1.0, 0.3):
        check("bce with logits", x.to(device), torch.full_like(x, target, device=device))


@every_dtype
def test_certain_probabilities(dtype: torch.dtype, device: str) -> None:
    x = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.5], dtype=dtype, device=device)
    target = torch.tensor([0.0, 1.0, 1.0, 0.0, 0.5], dtype=dtype, device=device)
    ours, stock = functions("bce", reduction="none")
    torch.testing.assert_close(ours(x, target), stock(x, target))


@pytest.mark.skipif(ON_GPU, reason="a failed device assertion ends the process's use of the GPU")
@pytest.mark.parametrize(("x", "target"), [(1.5, 0.5), (-0.1, 0.5), (float("nan"), 0.5)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_probabilities_out_of_range_raise_stocks_error(x: float, target: float, reduction: str, device: str) -> None:
    for function in functions("bce", reduction=reduction):
        with pytest.raises(RuntimeError, match="between 0 and 1"):
            function(torch.tensor([x], device=device), torch.tensor([target], device=device))


@every_case
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_gradcheck_and_gradgradcheck(case: str, reduction: str, device: str) -> None:
    ours, _ = functions(case, reduction=reduction)
    leaves = [leaf(tensor) for tensor in operands(case, (2, 3), torch.float64, device)]
    assert torch.autograd.gradcheck(ours, leaves)
    assert torch.autograd.gradgradcheck(ours, leaves)


@every_case
def test_only_wanted_gradients(case: str, device: str) -> None:
    ours, stock = functions(case)
    x, target = operands(case, (3, 4), torch.float64, device)
    for wanted in (0, 1):
        pairs = []
        for function in (ours, stock):
            leaves = [x.detach(), target.detach()]
            leaves[wanted] = leaf(leaves[wanted])
            pairs.append(torch.autograd.grad(function(*leaves), leaves[wanted])[0])
        torch.testing.assert_close(*pairs)


@pytest.mark.parametrize(
    ("deprecated", "reduction"),
    [
        ({"size_average": True}, "mean"),
        ({"size_average": False}, "sum"),
        ({"reduce": False}, "none"),
        ({"size_average": True, "reduce": True}, "mean"),
    ],
)
def test_deprecated_arguments_warn_as_stocks(deprecated: dict[str, bool], reduction: str, device: str) -> None:
    x, target = operands("mse", (3, 4), torch.float32, device)
    with pytest.warns(UserWarning, match=f"reduction='{reduction}'"):
        y = autograd.mse_loss(x, target, **deprecated)
    torch.testing.assert_close(y, F.mse_loss(x, target, reduction=reduction))


def test_broadcasting_warns_and_takes_the_stock_path(device: str) -> None:
    choices: list[Choice] = []
    with observe_choices(choices.append), pytest.warns(UserWarning, match="broadcasting"):
        y = autograd.mse_loss(torch.ones(3, 4, device=device), torch.zeros(4, device=device))
    assert [choice.reason for choice in choices] == ["input and target differ in shape"]
    assert float(y) == 1


def test_kl_div_warns_of_its_mean(device: str) -> None:
    x, target = operands("kl_div", (3, 4), torch.float32, device)
    with pytest.warns(UserWarning, match="batchmean"):
        autograd.kl_div(x, target)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="reduction")
        autograd.kl_div(x, target, reduction="batchmean")


@pytest.mark.parametrize("case", ["mse", "l1", "smooth_l1", "huber", "bce with logits", "kl_div"])
def test_autocast_computes_in_float32(case: str, device: str) -> None:
    x, target = operands(case, (4, 33), torch.bfloat16, device)
    ours, stock = functions(case)
    with torch.autocast(device, torch.bfloat16):
        results = [
            value_and_gradients(function, [x, target.float()], torch.ones((), device=device))
            for function in (ours, stock)
        ]
    assert results[0][0].dtype == results[1][0].dtype == torch.float32
    assert [gradient.dtype for gradient in results[0][1]] == [torch.bfloat16, torch.float32]
    torch.testing.assert_close(*results)


@pytest.mark.skipif(ON_GPU, reason="the traffic meter counts in the interpreter")
@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_and_launches(case: str, dtype: torch.dtype, device: str) -> None:
    x, target = operands(case, (64, 2048), dtype, device)
    x = leaf(x)
    tensor = x.numel() * x.itemsize
    ours, _ = functions(case)
    g = upstream(x, "mean")
    with measure_traffic() as forward, saved_tensors() as saved:
        loss = ours(x, target)
    with measure_traffic() as backward:
        torch.autograd.grad(loss, x, g)
    assert 2 * tensor <= forward.bytes <= 2.05 * tensor
    assert 3 * tensor <= backward.bytes <= 3.05 * tensor
    assert (forward.launches, backward.launches) == (2, 1)  # the second adds the programs' sums
    assert not forward.operations
    assert not backward.operations
    assert saved.bytes_beside(x, target) <= 16


def test_layers_are_replaced_and_restored(device: str) -> None:
    model = nn.ModuleDict({name: getattr(nn, name)() for name in layer_names()}).to(device)
    report = fusednn.replace_layers(model)
    assert len(report.replaced) == len(model)
    for name, layer in model.items():
        assert type(layer) is getattr(fusednn.layers, name)
        assert isinstance(layer, getattr(nn, name))
    fusednn.restore_layers(model)
    assert all(type(layer) is getattr(nn, name) for name, layer in model.items())


def layer_names() -> Iterable[str]:
    return ("BCELoss", "BCEWithLogitsLoss", "HuberLoss", "KLDivLoss", "L1Loss", "MSELoss", "NLLLoss", "SmoothL1Loss")


@pytest.mark.parametrize("case", ["mse", "bce with logits"])
def test_compiled(case: str, device: str) -> None:
    ours, stock = functions(case)
    compiled = torch.compile(ours, fullgraph=True, backend="inductor" if ON_GPU else "aot_eager")
    x, target = operands(case, (4, 33), torch.float64, device)
    gradient = torch.ones((), dtype=torch.float64, device=device)
    torch.testing.assert_close(*(value_and_gradients(f, [x, target], gradient) for f in (compiled, stock)))
