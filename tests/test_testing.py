"""What proves kernels to others: `fusednn.testing` finds and names every planted fault, and passes what is right."""

import runpy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusednn import autograd, layers
from fusednn.testing import (
    DropIn,
    Sample,
    assert_same_signature,
    broken,
    check_against_stock,
    check_drop_in,
    random_tensor,
)
from fusednn.testing.pytorch_samples import samples_of

EXAMPLE = Path(__file__).parents[1] / "examples" / "prove_a_kernel.py"


def images(device: str = "cpu") -> Tensor:
    return random_tensor((2, 3, 4, 5), torch.float32, device)


# --- Kernels ----------------------------------------------------------------------------------------------------------


@pytest.mark.whole
@pytest.mark.kernels
@pytest.mark.parametrize(
    ("fault", "complaint"),
    [
        ("a modified input", "values and gradients: .*operand, after the call"),
        ("a wrong value", "values and gradients: .*outputs: error"),
        ("an unwritten tail", "outputs, run twice over different memory"),
        ("random gradient", "gradients, run twice over different memory"),
        ("wrong gradient", "gradients: error"),
        pytest.param("a missing mask", "OutOfBoundsError", marks=pytest.mark.interpreter),
    ],
)
def test_a_broken_kernel_is_found(fault: str, complaint: str, device: str) -> None:
    check = partial(check_drop_in, stock=F.relu, samples=[images(device)], dtypes=[torch.float32], skip=["signature"])
    check(lambda input: broken.faulty_relu(input))
    with pytest.raises(AssertionError, match=complaint):
        check(lambda input: broken.faulty_relu(input, fault))


@pytest.mark.kernels
def test_every_fault_is_met_by_a_test() -> None:
    text = "".join(path.read_text() for path in (Path(__file__), Path(__file__).with_name("test_instruments.py")))
    assert all(f'"{fault}"' in text for fault in broken.FAULTS)


@pytest.mark.interpreter  # its kernel is launched by Triton itself
def test_the_example_proves_its_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    example = runpy.run_path(str(EXAMPLE))
    example["main"]()
    printed = capsys.readouterr().out
    assert "values and gradients     3 passed" in printed
    assert "1 launch, 960 bytes for 480; 0 bytes kept" in printed
    _, _, proven = EXAMPLE.read_text().partition("@triton.jit\n")
    assert len([line for line in proven.partition("\n\n\ndef ")[0].splitlines() if line.strip()]) <= 20


OURS: dict[str, tuple[Any, Any, Sample]] = {
    "relu": (autograd.relu, F.relu, Sample((images(),))),
    "softmax": (autograd.softmax, F.softmax, Sample((images(),), {"dim": 1})),
    "mse_loss": (autograd.mse_loss, F.mse_loss, Sample((images(), images().flip(0)))),
    "PReLU": (layers.PReLU, nn.PReLU, Sample((images(),), {}, (3,))),
    "BatchNorm2d": (layers.BatchNorm2d, nn.BatchNorm2d, Sample((images(),), {}, (3,))),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.thorough] if name == "BatchNorm2d" else []) for name in OURS]
)
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64)], ids=[""])
def test_ours_are_drop_in(name: str, dtypes: tuple[torch.dtype, ...], device: str) -> None:
    ours, stock, sample = OURS[name]
    given = Sample(tuple(x.to(device) for x in sample.args), sample.kwargs, sample.init_args)
    found = check_drop_in(ours, stock, [given], dtypes=dtypes)
    assert found.checked["values and gradients"] == 2
    assert set(found.left_out) <= {"state_dict"}


@pytest.mark.parametrize("stock", [F.silu, nn.Softplus, nn.HuberLoss], ids=lambda stock: stock.__name__)
def test_pytorchs_samples_are_calls(stock: Any) -> None:
    ours = getattr(layers if isinstance(stock, type) else autograd, stock.__name__)
    samples = samples_of(stock)[:3]
    found = check_drop_in(ours, stock, samples, dtypes=[torch.float32], skip=["layouts", "extremes", "exceptions"])
    assert found.checked["values and gradients"] == len(samples) > 0


def test_what_pytorch_does_not_describe_is_said() -> None:
    with pytest.raises(LookupError, match="no OpInfo"):
        samples_of(autograd.squareplus)
    with pytest.raises(LookupError, match="no ModuleInfo"):
        samples_of(nn.RReLU)


# --- Faults that need no kernel ---------------------------------------------------------------------------------------


class Kept(torch.autograd.Function):
    """SiLU that saves its result, too, for nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = F.silu(x)
        ctx.save_for_backward(x, y)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        x, _ = ctx.saved_tensors
        return torch.ops.aten.silu_backward(gradients[0], x)


class Once(torch.autograd.Function):
    """SiLU whose gradient is a constant to autograd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.silu(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return torch.ops.aten.silu_backward(gradients[0], *ctx.saved_tensors)


def as_silu(function: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """With its signature and its refusals."""

    def silu(input: Tensor, inplace: bool = False) -> Tensor:
        checked = F.silu(input, inplace)
        return function(input) if not inplace else checked

    return silu


FAULTS: dict[str, tuple[Callable[..., Tensor], str]] = {
    "one rounding too many": (as_silu(lambda x: F.silu(x).bfloat16().to(x)), "values and gradients: .*outputs: error"),
    "another dtype": (as_silu(lambda x: F.silu(x).double()), "dtype torch.float64, stock"),
    "another layout": (as_silu(lambda x: F.silu(x).contiguous()), "layouts: .*strides"),
    "NaN is lost": (as_silu(lambda x: F.silu(x).nan_to_num()), "extremes: .*not finite"),
    "a tensor kept": (as_silu(Kept.apply), "changes in place: .*the result can't be changed"),
    "no second derivative": (as_silu(Once.apply), "second derivatives: "),
    "other arguments": (lambda x, inplace=False: F.silu(x, inplace), "signature: .*stock's \\(input"),
    "no refusals": (
        lambda input, inplace=False: F.silu(input, inplace) if isinstance(input, Tensor) else input,
        "exceptions: .*a string for a tensor: stock raises TypeError",
    ),
    "other exceptions": (
        lambda input, inplace=False: {torch.float32: F.silu}[input.dtype](input, inplace),
        "exceptions: .*raises KeyError",
    ),
}


@pytest.mark.stock
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named(fault: str) -> None:
    ours, complaint = FAULTS[fault]
    with pytest.raises(AssertionError, match=complaint):
        check_drop_in(ours, F.silu, [images()], dtypes=[torch.float32])


@pytest.mark.stock
def test_stock_itself_passes() -> None:
    found = check_drop_in(as_silu(F.silu), F.silu, [images()])
    assert found.checked["exceptions"] == 8
    assert str(found).splitlines()[-1] == "state_dict            left out: these are no modules"


class Renamed(nn.PReLU):
    """Its parameter goes by another name."""

    def __init__(self, num_parameters: int = 1, init: float = 0.25, device: Any = None, dtype: Any = None) -> None:
        super().__init__(num_parameters, init, device, dtype)
        self.slopes = self.weight
        del self.weight

    def forward(self, input: Tensor) -> Tensor:
        return F.prelu(input, self.slopes)


@pytest.mark.stock
def test_another_state_dict_is_named() -> None:
    with pytest.raises(AssertionError, match="state_dict: "):
        check_drop_in(Renamed, nn.PReLU, [Sample((images(),), {}, (3,))], dtypes=[torch.float32])


@pytest.mark.stock
def test_nothing_is_checked_in_silence() -> None:
    with pytest.raises(ValueError, match="no samples"):
        check_drop_in(F.silu, F.silu, [])
    with pytest.raises(ValueError, match="no checks are called layout;"):
        check_drop_in(F.silu, F.silu, [images()], skip=["layout"])
    found = check_drop_in(F.silu, F.silu, [images()], dtypes=[torch.float32], skip=["extremes"])
    assert found.left_out["extremes"] == "told so"
    assert isinstance(found, DropIn)
    assert_same_signature(layers.ReLU, nn.ReLU)


@pytest.mark.stock
def test_luck_of_stocks_is_not_asked_of_ours() -> None:
    x, rounding = 1 + torch.rand(8), torch.finfo(torch.float32).eps

    def roundings_off(n: float, t: Tensor) -> Tensor:
        return t * 3 * (1 if t.dtype is torch.float64 else 1 + n * rounding)

    def stock(elsewhere: float, t: Tensor) -> Tensor:
        return roundings_off(0 if torch.equal(t.detach().float(), x) else elsewhere, t)

    ours = partial(roundings_off, 4)
    check_against_stock(ours, partial(stock, 2), [x], torch.ones_like(x))
    with pytest.raises(AssertionError, match=r"value: error .* allowed"):
        check_against_stock(ours, partial(stock, 0.5), [x], torch.ones_like(x))
