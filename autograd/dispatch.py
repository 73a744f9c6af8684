"""The choice between a kernel and PyTorch's own operator, and its reason in words.

This is the only place that decides.  A family's kernels say in their tables which parameters they don't take; what
holds for every operation (device, dtype, layout, transforms) is here.  Whatever is refused goes to the stock operator,
which also raises the stock error where the arguments are wrong.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..kernels import AVAILABLE, WHERE
from ..kernels.launch import memory_refusal

__all__ = [
    "AUTOCAST_TYPES",
    "PLAIN_TYPES",
    "Choice",
    "autocast_dtype",
    "in_low_precision",
    "is_integer",
    "is_number",
    "observe_choices",
    "takes_kernel",
    "tensor_refusal",
    "transform_refusal",
]

#: The classes whose tensors kernels take: a subclass may override anything.
PLAIN_TYPES = (Tensor, torch.nn.Parameter)

#: The dtypes that autocast casts, and casts to.
AUTOCAST_TYPES = (torch.float16, torch.bfloat16, torch.float32)


class Choice(NamedTuple):
    """The path that one call took."""

    operation: str
    kernel: bool
    reason: str

    @property
    def path(self) -> str:
        return "kernel" if self.kernel else "stock"


_observers: list[Callable[[Choice], None]] = []


@contextmanager
def observe_choices(observer: Callable[[Choice], None]) -> Iterator[None]:
    """Call ``observer`` with every choice that is made inside the ``with`` block."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


def takes_kernel(
    operation: str,
    *tensors: Tensor,
    parameters: Sequence[Tensor] = (),
    inplace: bool = False,
    empty: bool = False,
    refusal: str | None = None,
) -> bool:
    """Whether ``operation`` on these tensors takes its kernel.

    ``tensors`` are the operands in order (a kernel wants them all on the first's device and of its dtype),
    ``parameters`` those that may also be float32 beside 16-bit operands, ``empty`` says that the operation has
    something to do where there are no elements, ``refusal`` is the reason why the operation's kernels don't take its
    other arguments, or None.
    """
    refusal = refusal or _refusal(tensors, parameters, inplace, empty)
    if _observers:
        choice = Choice(operation, refusal is None, refusal or f"kernel {WHERE}")
        for observer in _observers:
            observer(choice)
    return refusal is None


def _refusal(tensors: tuple[Tensor, ...], parameters: Sequence[Tensor], inplace: bool, empty: bool) -> str | None:
    """Why no kernel takes these operands, or None."""
    if not AVAILABLE:
        return "Triton is not installed"
    for tensor in (*tensors, *parameters):
        if type(tensor) not in PLAIN_TYPES:
            return f"{type(tensor).__name__} is not a plain tensor"
    first = tensors[0]
    if refusal := memory_refusal(first):
        return refusal
    if first.numel() == 0 and not empty:
        return "no elements"
    for other in tensors[1:]:
        if other.dtype != first.dtype or other.device != first.device or other.layout is not torch.strided:
            return "operands differ in dtype, device or layout"
    if parameters:
        dtype = parameters[0].dtype
        if dtype != first.dtype and (dtype is not torch.float32 or first.dtype.itemsize > 2):
            return "no kernel for these parameters' dtypes"
        for parameter in parameters:
            if parameter.dtype != dtype or parameter.device != first.device or parameter.layout is not torch.strided:
                return "the parameters differ in dtype, device or layout"
    if inplace:
        if first.requires_grad and first.is_leaf and torch.is_grad_enabled():
            return "in-place on a leaf that requires gradients"
        if any(stride == 0 and size > 1 for size, stride in zip(first.shape, first.stride(), strict=True)):
            return "in-place on memory that overlaps itself"
    return transform_refusal()


def tensor_refusal(tensor: Tensor) -> str | None:
    """Why no kernel takes this operand, whatever the operation, or None."""
    return _refusal((tensor,), (), False, False)


def is_integer(value: object) -> TypeGuard[int]:
    """Whether an argument is a Python integer, of 64 bits as PyTorch's are, and nothing that only looks like one."""
    return type(value) is int and -(2**63) <= value < 2**63


def is_number(value: object) -> TypeGuard[float]:
    """Whether an argument is a Python number as of `is_integer`, or a float."""
    return type(value) is float or is_integer(value)


def transform_refusal() -> str | None:
    """Why a kernel can't run under the transforms that are active, or None."""
    if torch._C._are_functorch_transforms_active():
        return "inside a torch.func transform"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation"
    if not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None:
        return "recorded by torch.jit.trace"
    return None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _has_autocast(kind: str) -> bool:
    """A property of the device, which PyTorch's compiler can't read while it traces in every version."""
    return torch.amp.is_autocast_available(kind)


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The low-precision dtype of the autocast region that ``tensor``'s device is in, or None outside one."""
    kind = tensor.device.type
    if not _has_autocast(kind) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def in_low_precision(*operands: Any) -> tuple[Any, ...]:
    """The operands as autocast gives them to an operator that it computes in its low precision.

    Outside a region, which the first operand's device decides, they come back as they are; float64 always does.
    """
    dtype = autocast_dtype(operands[0]) if isinstance(operands[0], Tensor) else None
    if dtype is None:
        return operands
    return tuple(t.to(dtype) if isinstance(t, Tensor) and t.dtype in AUTOCAST_TYPES else t for t in operands)
