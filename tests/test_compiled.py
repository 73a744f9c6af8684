"""What only compiled kernels get wrong, in every operation: specialised arguments, order, approximate functions."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from support.operations import OPERATIONS, Operation
from support.optimizers import (
    CALLS,
    STOCK_CALLS,
    TOLERANCE,
    assert_like_stock,
    parameters,
    set_gradients,
    stock_of,
)
from support.planting import planted
from torch import Tensor, nn
from vgpu import machine_options

from fusednn import autograd, optim
from fusednn.kernels.base import numerics
from fusednn.testing import assert_accurate, assert_same_bits, one_rounding

pytestmark = pytest.mark.compiled

#: Nothing to differentiate.
NEVER = ("channel_statistics",)
every_operation = pytest.mark.parametrize("name", [name for name in OPERATIONS if name not in NEVER])


# --- Operands as users have them --------------------------------------------------------------------------------------


def unaligned(operand: Tensor) -> Tensor:
    """One element behind an address that is a multiple of 16."""
    shifted = torch.empty(operand.numel() + 1, dtype=operand.dtype)[1:].view(operand.shape)
    assert shifted.data_ptr() % 16
    return shifted.copy_(operand)


def first_row(operand: Tensor) -> Tensor:
    return operand[:1] if operand.dim() > 1 else operand


def no_rows(operand: Tensor) -> Tensor:
    return operand[:0] if operand.dim() > 1 else operand


def sixteens(operand: Tensor) -> Tensor:
    """The first two dimensions are multiples of 16, so that rows, columns and channels are."""
    if operand.dim() > 4 or operand.numel() > 500:
        return operand
    repeated = operand.repeat([16] * min(operand.dim(), 2) + [1] * (operand.dim() - 2))
    if not operand.is_floating_point():
        return repeated
    # The same elements would have the same errors, which sums don't average out.
    return repeated * torch.linspace(0.5, 1, repeated.numel(), dtype=torch.float64).to(operand.dtype).view_as(repeated)


def one_of_each(operand: Tensor) -> Tensor:
    """Every dimension 1."""
    return operand[(slice(1),) * operand.dim()]


def repeated(operand: Tensor) -> Tensor:
    """Rows, or elements of a bias, that share their memory: a stride of 0.  Filters stay: ties have no one gradient."""
    return operand if operand.dim() > 2 else operand[:1].expand_as(operand) if operand.dim() else operand


VARIANTS: dict[str, Callable[[Tensor], Tensor]] = {
    "unaligned": unaligned,
    "no rows": no_rows,
    "one row": first_row,
    "sixteens": sixteens,
    "one element": one_of_each,
    "repeated": repeated,
}


#: Roundings of the largest result that sums cost beyond the accuracy rule.  What programs leave of a channel is added
#: by PyTorch's ``sum``, and a processor's adds one row after another.
SUMMED = dict.fromkeys(
    ("batch_norm_act in evaluation", "batch_norm_chain of everything", "batch_norm_pool of means"), 12
)


class Outcome(NamedTuple):
    """The value, and the gradients of operands and parameters from the gradient ``upstream``."""

    value: Tensor
    gradients: tuple[Tensor | None, ...]
    upstream: Tensor


def differentiate(operation: Operation, function: Any) -> Outcome:
    leaves = operation.leaves()
    wanted = [operand for operand in leaves if operand.requires_grad]
    wanted += function.parameters() if isinstance(function, nn.Module) else []
    value = operation.call(function, leaves)
    upstream = torch.linspace(-1, 1, value.numel(), dtype=torch.float64).to(value.dtype).view(value.shape)
    if leaves[0].data_ptr() % 16:
        upstream = unaligned(upstream)
    return Outcome(value.detach(), torch.autograd.grad(value, wanted, upstream, allow_unused=True), upstream)


def check(name: str, change: Callable[[Tensor], Tensor] = lambda operand: operand, margin: int = 0) -> None:
    """Hold float32 to the accuracy rule, with ``margin`` more roundings of the largest value."""
    try:
        operation, exact = (Operation(name, dtype, change=change) for dtype in (torch.float32, torch.float64))
        stock, reference = differentiate(operation, operation.stock), differentiate(exact, exact.stock)
    except (RuntimeError, ValueError, IndexError):
        return  # stock refuses such operands
    assert_right(differentiate(operation, operation.ours), stock, reference, margin)


def assert_right(ours: Outcome, stock: Outcome, reference: Outcome, margin: int = 0) -> None:
    def roundings(tensor: Tensor) -> float:
        largest = tensor.double().abs().nan_to_num().max() if tensor.numel() else torch.zeros((), dtype=torch.float64)
        return float(one_rounding(largest, torch.float32))

    # Operands are whatever the operation's sample has: of one element all may cancel.
    assert_accurate(
        *(each.value for each in (ours, stock, reference)),
        "value",
        inherent=margin * roundings(reference.value),
        chosen=False,
    )
    saved = roundings(reference.value)  # where the gradient is read off the value
    for n, gradients in enumerate(zip(*(each.gradients for each in (ours, stock, reference)), strict=True)):
        given = [gradient for gradient in gradients if gradient is not None]
        assert len(given) in (0, 3)
        if given:
            assert_accurate(*given, f"gradient {n}", inherent=saved + margin * roundings(given[2]), chosen=False)


@pytest.mark.parametrize("variant", VARIANTS)
@every_operation
def test_operands_as_users_have_them(name: str, variant: str) -> None:
    check(name, VARIANTS[variant], SUMMED.get(name, 0) if variant == "sixteens" else 0)


def test_sums_of_a_processor_need_a_margin() -> None:
    with pytest.raises(AssertionError, match="allowed"):
        check("batch_norm_act in evaluation", sixteens)


@pytest.mark.parametrize("name", SUMMED)
def test_no_sum_of_a_program_needs_a_margin(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    add = Tensor.sum
    monkeypatch.setattr(Tensor, "sum", lambda x, *of, **options: add(x.double(), *of, **options).to(x.dtype))
    check(name, sixteens)


def test_notices_a_wrong_gradient() -> None:
    operation, exact = (Operation("gelu of tanh", dtype, change=unaligned) for dtype in (torch.float32, torch.float64))
    stock, reference = differentiate(operation, operation.stock), differentiate(exact, exact.stock)
    ours = differentiate(operation, operation.ours)
    assert_right(ours, stock, reference)
    (gradient,) = ours.gradients
    assert gradient is not None
    with pytest.raises(AssertionError, match="gradient 0"):
        assert_right(ours._replace(gradients=(gradient * 1.00001,)), stock, reference)


# --- Order ------------------------------------------------------------------------------------------------------------


EVERY_ORDER: tuple[dict[str, Any], ...] = ({"order": "reversed"}, {"order": "shuffled", "seed": 5})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_operation
def test_any_order_gives_the_same_bits(name: str, dtype: torch.dtype) -> None:
    operation = Operation(name, dtype)
    first = differentiate(operation, operation.ours)
    for options in EVERY_ORDER:
        with machine_options(**options):
            again = differentiate(operation, operation.ours)
        assert_same_bits(first.value, again.value, f"value, {options}")
        for one, other in zip(first.gradients, again.gradients, strict=True):
            if one is not None and other is not None:
                assert_same_bits(one, other, f"gradient, {options}")


def two_steps(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    for step in range(2):
        set_gradients(step, optimizer.param_groups[0]["params"])
        optimizer.step()
    return optimizer


def several() -> list[nn.Parameter]:
    """Parameters, some of more than a program's elements."""
    return parameters([(33,), (16, 300), ()], torch.float32, "cpu")


@pytest.mark.parametrize(("name", "arguments"), [call[1:] for call in CALLS], ids=[call[0] for call in CALLS])
def test_optimizers_give_the_same_bits_in_any_order(name: str, arguments: dict[str, Any]) -> None:
    def results() -> list[Tensor]:
        optimizer = two_steps(getattr(optim, name)(several(), **arguments))
        states = [value for state in optimizer.state.values() for value in state.values()]
        return [each for each in (*optimizer.param_groups[0]["params"], *states) if isinstance(each, Tensor)]

    first = results()
    for options in EVERY_ORDER:
        with machine_options(**options):
            for one, other in zip(first, results(), strict=True):
                assert_same_bits(one.detach(), other.detach(), f"{options}")


@pytest.mark.parametrize(
    ("name", "arguments"), [call[1:] for call in STOCK_CALLS], ids=[call[0] for call in STOCK_CALLS]
)
def test_optimizers_bear_approximate_functions(name: str, arguments: dict[str, Any]) -> None:
    stock = two_steps(stock_of(name, several(), **arguments))
    with machine_options(nudge=True):
        ours = two_steps(getattr(optim, name)(several(), **arguments))
    assert_like_stock(ours, stock, **TOLERANCE[torch.float32])


# --- Approximate functions --------------------------------------------------------------------------------------------


@every_operation
def test_approximate_functions_may_be_as_bad_as_documented(name: str) -> None:
    with machine_options(nudge=True):
        check(name)


def test_a_quotient_near_1_has_to_be_rounded_correctly() -> None:
    """1 - s of a sigmoid s near 1 has the absolute error of s, in stock's gradients too, whose quotients are exact."""
    with (
        machine_options(nudge=True),
        planted(numerics.sigmoid, "divide(1.0, 1 + exp(-x))", "1 / (1 + exp(-x))"),
        pytest.raises(AssertionError, match="gradient"),
    ):
        check("gated_channels")


# --- TF32 -------------------------------------------------------------------------------------------------------------


def tf32(x: Tensor) -> Tensor:
    """Without the 13 bits that tensor cores don't read."""
    return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)


@contextmanager
def precision(of: Any, value: str) -> Iterator[None]:
    """What float32 operands of products or convolutions are read as."""
    before, of.fp32_precision = of.fp32_precision, value
    try:
        yield
    finally:
        of.fp32_precision = before


def relative_error(y: Tensor, reference: Tensor) -> float:
    return float((y - reference).norm() / reference.norm())


def test_products_in_tf32_read_10_bits() -> None:
    def exact(x: Tensor, weight: Tensor) -> Tensor:
        return (x.double() @ weight.double().mT).amax(0)

    operands = torch.randn(40, 96), torch.randn(2, 20, 96)
    with precision(torch.backends.cuda.matmul, "ieee"):
        assert relative_error(autograd.maxout_linear(*operands), exact(*operands)) < 1e-6
    with precision(torch.backends.cuda.matmul, "tf32"):
        y = autograd.maxout_linear(*operands)
    assert relative_error(y, exact(*map(tf32, operands))) < 1e-6 < 1e-5 < relative_error(y, exact(*operands))


def test_convolutions_in_tf32_read_10_bits() -> None:
    def exact(x: Tensor, weight: Tensor) -> Tensor:
        return F.max_pool2d(F.relu(F.conv2d(x.double(), weight.double(), padding=1)), 2)

    operands = [
        torch.randn(shape).contiguous(memory_format=torch.channels_last) for shape in ((2, 16, 12, 12), (32, 16, 3, 3))
    ]
    with precision(torch.backends.cudnn.conv, "tf32"), torch.no_grad():
        y = autograd.conv_act_pool2d(*operands, None, 1, 1, activation="relu", pool_size=2)
    assert relative_error(y, exact(*map(tf32, operands))) < 1e-6 < 1e-5 < relative_error(y, exact(*operands))
