"""The choice between a kernel and PyTorch's own operator, and its reason in words.

This is the only place that decides.  A family's kernels say in their tables which parameters they don't take; what
holds for every operation (device, dtype, layout, transforms) is here.  Whatever is refused goes to the stock operator,
which also raises the stock error where the arguments are wrong.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, wraps
from inspect import signature
from typing import Any, NamedTuple, ParamSpec, TypeGuard, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from ..kernels import AVAILABLE, WHERE
from ..kernels.base import launch as launching
from ..kernels.base.device import LaunchError
from ..kernels.base.figures import most_small_bytes
from ..kernels.base.launch import memory_refusal
from ..kernels.functions.activation import ACTIVATIONS
from .inductor import divides_channels, turns_images

__all__ = [
    "AUTOCAST_TYPES",
    "PLAIN_TYPES",
    "Choice",
    "Refusal",
    "always_kernels",
    "are_observed",
    "autocast_dtype",
    "compile_policy",
    "compiler_refusal",
    "else_stock",
    "in_low_precision",
    "in_single_precision",
    "is_beyond_kernels",
    "is_integer",
    "is_number",
    "judged_as_compiled",
    "judged_as_trained",
    "keeping_little",
    "leaves_small",
    "observe_choices",
    "or_stock",
    "record_kernels",
    "report_stock",
    "takes_kernel",
    "tensor_refusal",
    "transform_refusal",
]

#: The classes whose tensors kernels take: a subclass may override anything.
PLAIN_TYPES = (Tensor, torch.nn.Parameter)

#: The dtypes that autocast casts, and casts to.
AUTOCAST_TYPES = (torch.float16, torch.bfloat16, torch.float32)


_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


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


def are_observed() -> bool:
    """Whether somebody observes choices, or asks for those that `torch.compile` would make."""
    return bool(_observers) or _as_compiled is not None or _as_trained


def is_beyond_kernels(operand: object) -> bool:
    """Whether a call whose first operand this is has no kernel for it, on a CPU, and nobody asks why or looks on."""
    if launching.ON_CPU or type(operand) is not Tensor or torch._C._is_torch_function_mode_enabled():
        return False
    return operand.is_cpu and not are_observed()


def report_stock(operation: str, reason: Callable[[], str | None]) -> None:
    """Tell observers, where there are any, that a part of a call is PyTorch's own operator, if there is a reason."""
    if _observers and (words := reason()) is not None:
        for observer in _observers:
            observer(Choice(operation, False, words))


#: A family's own reason why its kernels don't take the arguments, or None; asked once all that is cheaper has passed.
Refusal = Callable[[], str | None]


def takes_kernel(
    operation: str,
    *tensors: Tensor,
    parameters: Sequence[Tensor] = (),
    inplace: bool = False,
    empty: bool = False,
    refusal: Refusal | None = None,
    outdoes_compiler: Callable[[], bool] | None = None,
) -> bool:
    """Whether ``operation`` on these tensors takes its kernel.

    ``tensors`` are the operands in order (a kernel wants them all on the first's device and of its dtype),
    ``parameters`` those that may also be float32 beside 16-bit operands, ``empty`` says that the operation has
    something to do where there are no elements, ``refusal`` finds the reason why the operation's kernels don't take
    its other arguments, or None, ``outdoes_compiler`` whether its kernel is the better one for these arguments where
    the compiler has the operation otherwise.
    """
    reason = _refusal(operation, tensors, parameters, inplace, empty, refusal, outdoes_compiler)
    if _observers:
        choice = Choice(operation, reason is None, reason or f"kernel {WHERE}")
        for observer in _observers:
            observer(choice)
    return reason is None


def _refusal(
    operation: str,
    tensors: tuple[Tensor, ...],
    parameters: Sequence[Tensor],
    inplace: bool,
    empty: bool,
    refusal: Refusal | None,
    outdoes_compiler: Callable[[], bool] | None,
) -> str | None:
    """Why no kernel takes these operands, or None.

    From the cheapest question to the dearest.  Nothing of a tensor is looked at while a mode or a tracer would see it,
    and no argument is validated that stock serves anyway.
    """
    if not AVAILABLE:
        return "Triton is not installed"
    if torch._C._is_torch_function_mode_enabled() and (reason := _function_mode_refusal()):
        return reason
    for tensor in (*tensors, *parameters):
        if type(tensor) not in PLAIN_TYPES:
            return f"{type(tensor).__name__} is not a plain tensor"
    first = tensors[0]
    if reason := memory_refusal(first):
        return reason
    if reason := _tracer_refusal():
        return reason
    if (_as_compiled is not None or torch.compiler.is_compiling()) and (
        reason := compiler_refusal(operation, *tensors, outdoes_compiler=outdoes_compiler)
    ):
        return reason
    if refusal is not None and (reason := refusal()):
        return reason
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
    if _leaves_small and first.device.type in HOST_BOUND and _is_small(operation, (*tensors, *parameters)):
        return "small: PyTorch's own operator costs the host less"
    if inplace:
        if first.requires_grad and first.is_leaf and torch.is_grad_enabled():
            return "in-place on a leaf that requires gradients"
        if any(stride == 0 and size > 1 for size, stride in zip(first.shape, first.stride(), strict=True)):
            return "in-place on memory that overlaps itself"
        if not torch.compiler.is_compiling() and first.is_inference() and not torch.is_inference_mode_enabled():
            return "in-place on an inference tensor outside of inference mode"
    return None


def or_stock(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """A function that is called once more where a kernel of its couldn't be launched, since it now chooses otherwise.

    In compiled code, and in backward passes, there is no other choice: these raise, once.
    """

    @wraps(function)
    def call(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        try:
            return function(*args, **kwargs)
        except LaunchError:
            return function(*args, **kwargs)

    return call


def else_stock(
    stock: Callable[..., Tensor],
) -> Callable[[Callable[_Arguments, Tensor | None]], Callable[_Arguments, Tensor]]:
    """`or_stock` for a function that returns None where ``stock`` has to compute, of the same arguments."""

    def decorate(function: Callable[_Arguments, Tensor | None]) -> Callable[_Arguments, Tensor]:
        @wraps(function)
        def call(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> Tensor:
            if torch.compiler.is_compiling():
                result = function(*args, **kwargs)
            else:
                try:
                    result = function(*args, **kwargs)
                except LaunchError:
                    result = function(*args, **kwargs)
            return stock(*args, **kwargs) if result is None else result

        shown = signature(function).replace(return_annotation=Tensor)
        call.__signature__ = shown  # type: ignore[attr-defined]
        return call

    return decorate


def tensor_refusal(tensor: Tensor) -> str | None:
    """Why no kernel takes this operand, whatever the operation, or None."""
    return _refusal("", (tensor,), (), False, False, None, None)


# --- Small tensors ----------------------------------------------------------------------------------------------------

#: Devices that the host enqueues work for.  On CPU tensors kernels are tested, by the interpreter and the like.
HOST_BOUND = {"cuda"}

_leaves_small = True
_as_trained = False


class _Thread(threading.local):
    keeps_little = False


_thread = _Thread()


def leaves_small() -> bool:
    """Whether operations on small tensors are left to PyTorch where that costs the host less."""
    return _leaves_small and not _thread.keeps_little


@contextmanager
def keeping_little() -> Iterator[None]:
    """Let kernels take tensors of any size in this thread: they keep less for the backward pass."""
    before, _thread.keeps_little = _thread.keeps_little, True
    try:
        yield
    finally:
        _thread.keeps_little = before


class always_kernels:  # noqa: N801 (it is called like a function)
    """Let kernels take tensors of any size: from here on, or, as a context manager, inside the ``with`` block.

    A GPU is done with a small tensor before the host comes with the next one.  So a single operation, no fused one, on
    a tensor of a few MB is left to PyTorch where its operator costs the host less than ours: `fusednn.explain` says so.
    Kernels are the better choice nevertheless where the host doesn't count, while a CUDA graph is captured, and where
    less memory is wanted.  ``always_kernels(False)`` lets PyTorch have them again.  It is a switch of all threads:
    those that PyTorch runs backward passes in are to make the same choices.
    """

    def __init__(self, always: bool = True) -> None:
        global _leaves_small
        self._before, _leaves_small = _leaves_small, not always

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        global _leaves_small
        _leaves_small = self._before


@contextmanager
def judged_as_trained() -> Iterator[None]:
    """Inside, choices are those of calls with a backward pass, though no gradients are computed."""
    global _as_trained
    before, _as_trained = _as_trained, True
    try:
        yield
    finally:
        _as_trained = before


def _is_small(operation: str, operands: Sequence[Tensor]) -> bool:
    """Whether PyTorch's operator is the quicker way, by the model of `fusednn.kernels.base.figures`."""
    if torch.compiler.is_compiling() or _as_compiled is not None:  # compiled code doesn't wait for Python
        return False
    if not leaves_small():
        return False
    differentiable = _as_trained or (torch.is_grad_enabled() and any(operand.requires_grad for operand in operands))
    return operands[0].nbytes <= _most_small_bytes(operation, differentiable=differentiable)


_most_small_bytes = cache(most_small_bytes)


# --- What torch.compile does itself -----------------------------------------------------------------------------------

#: What is left to Inductor while it traces.  It fuses these with what stands before and behind them, which it couldn't
#: with an operator that it can't look into: counted in bytes and launches of training steps, ours lose, but where a
#: call knows that its kernel ``outdoes_compiler``: an activation of large images behind a convolution, in one with its
#: gradients' sums.  Not here, and so kernels of ours, is what Inductor doesn't fuse: an activation with dropout behind
#: a linear layer, pooling (whose gradient it scatters), maxout, and cross-entropy, whose logits it reads twice.
_FUSED_BY_COMPILER = frozenset(
    (
        *ACTIVATIONS,
        *("prelu", "rrelu"),
        *("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"),
        *("softmax", "log_softmax", "softmin"),
        *("batch_norm", "batch_norm_chain", "batch_norm_pool", "channel_statistics"),
        *("conv_act1d", "conv_act2d", "conv_act3d"),
        *("bias_activation", "block_end", "channel_bias_activation_dropout", "gated", "gated_channels", "gated_halves"),
        *("glu", "highway"),
        *("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "kl_div", "nll_loss"),
        *("binary_cross_entropy", "binary_cross_entropy_with_logits"),
    )
)

#: Batch norm with an activation, and with pooling: ours without a residual, where Inductor reads a channel twice.
_BATCH_NORMS = frozenset(("batch_norm_act", *(f"batch_norm_act_pool{directions}d" for directions in (1, 2, 3))))

#: What keeps codes of images as they lie in memory: ours unless Inductor makes channels last of them.
_OF_IMAGES = frozenset(
    f"{name}{directions}d"
    for name in ("act_pool", "conv_act", "conv_act_pool", "batch_norm_act_pool", "max_pool")
    for directions in (1, 2, 3)
)

_KEEPS_KERNELS = {"keep": True, "fuse": False}

_keeps_kernels = False
_as_compiled: torch.nn.Module | None = None


class compile_policy:  # noqa: N801 (it is called like a function)
    """What `torch.compile` makes of kernels: from here on, or, as a context manager, inside the ``with`` block.

    ``"fuse"``, as it is from the beginning, leaves to the compiler what it fuses by itself, activations, dropout,
    softmax and the like, and keeps the kernels that move less memory than its own.  ``"keep"`` keeps all kernels that
    take their operands.  What was compiled under another policy is compiled again.
    """

    def __init__(self, policy: str) -> None:
        global _keeps_kernels
        if policy not in _KEEPS_KERNELS:
            raise ValueError(f"unknown policy {policy!r}; known: {', '.join(_KEEPS_KERNELS)}")
        self._before, _keeps_kernels = _keeps_kernels, _KEEPS_KERNELS[policy]

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        global _keeps_kernels
        _keeps_kernels = self._before


@contextmanager
def judged_as_compiled(model: torch.nn.Module) -> Iterator[None]:
    """Inside, choices are those of `torch.compile(model)`, though nothing is compiled."""
    global _as_compiled
    before, _as_compiled = _as_compiled, model
    try:
        yield
    finally:
        _as_compiled = before


def compiler_refusal(
    operation: str, *tensors: Tensor, outdoes_compiler: Callable[[], bool] | None = None
) -> str | None:
    """Why the compiler gets PyTorch's operators where a kernel could be had, or None; of `takes_kernel`'s arguments."""
    if _keeps_kernels or torch.compiler._is_exporting_flag:
        return None
    fused = operation in _FUSED_BY_COMPILER and (outdoes_compiler is None or not outdoes_compiler())
    if fused or (operation in _BATCH_NORMS and (len(tensors) > 1 or not divides_channels(tensors[0]))):
        return "fused by torch.compile"
    if operation in _OF_IMAGES and turns_images(tensors[0], _as_compiled):
        return "torch.compile makes channels last of these images"
    return None


# --- What surrounds a call --------------------------------------------------------------------------------------------

# PyTorch's modes that change or record nothing that an operator of ours would spoil: a default device for factories,
# and those that only watch what runs.
_HARMLESS_MODES = {
    "torch.cuda._sanitizer.CUDASanitizerDispatchMode",
    "torch.distributed._tools.mem_tracker.MemTracker",
    "torch.distributed._tools.memory_tracker.MemoryProfileDispatchMode",
    "torch.distributed.tensor.debug._comm_mode.CommDebugMode",
    "torch.utils._debug_mode._mode.DebugMode",
    "torch.utils._device.DeviceContext",
    "torch.utils.flop_counter._FlopCounterMode",
}

_records_kernels = False


@contextmanager
def record_kernels() -> Iterator[None]:
    """Let ``torch.export.export(model, ..., strict=True)`` record operators of fusednn inside the ``with`` block.

    The program then needs fusednn where it is loaded, and inputs on a device that kernels run on.  Outside, exported
    programs hold PyTorch's operators alone, whatever replaced the layers.
    """
    global _records_kernels
    before, _records_kernels = _records_kernels, True
    try:
        yield
    finally:
        _records_kernels = before


def is_integer(value: object) -> TypeGuard[int]:
    """Whether an argument is a Python integer, of 64 bits as PyTorch's are, and nothing that only looks like one."""
    return type(value) is int and -(2**63) <= value < 2**63


def is_number(value: object) -> TypeGuard[float]:
    """Whether an argument is a Python number as of `is_integer`, or a float."""
    return type(value) is float or is_integer(value)


def transform_refusal() -> str | None:
    """Why a kernel can't run under the modes, transforms and tracers that are active, or None."""
    return _function_mode_refusal() or _tracer_refusal()


def _function_mode_refusal() -> str | None:
    if not torch._C._is_torch_function_mode_enabled():
        return None
    return _mode_refusal([torch._C._get_function_stack_at(i) for i in range(torch._C._len_torch_function_stack())])


def _tracer_refusal() -> str | None:
    if torch._C._are_functorch_transforms_active():
        return "inside a torch.func transform"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation"
    if torch.compiler.is_compiling():
        # The flag itself: is_exporting() is true in every graph of older compilers.
        exports = torch.compiler._is_exporting_flag and not _records_kernels
        return "recorded by torch.export" if exports else None
    if torch._C._len_torch_dispatch_stack() and (reason := _mode_refusal(_get_current_dispatch_mode_stack())):
        return reason
    if torch._C._get_tracing_state() is not None:
        return "recorded by torch.jit.trace"
    return None


def _mode_refusal(modes: Sequence[object]) -> str | None:
    """Why a mode must see PyTorch's functions and operators in place of ours, or None.

    A mode whose class has a true ``takes_kernels`` sees ours.
    """
    for mode in modes:
        kind = type(mode)
        harmless = f"{kind.__module__}.{kind.__qualname__}" in _HARMLESS_MODES
        if not (harmless or getattr(kind, "takes_kernels", False)):
            return f"under {kind.__name__}, a mode that may look for PyTorch's own operators"
    return None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _has_autocast(kind: str) -> bool:
    """A property of the device, which PyTorch's compiler can't read while it traces in every version."""
    return torch.amp.is_autocast_available(kind)


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The low-precision dtype of the autocast region that ``tensor``'s device is in, or None outside one."""
    if not torch._C._is_any_autocast_enabled():
        return None
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


def in_single_precision(*operands: Any) -> tuple[Any, ...]:
    """The operands as autocast gives them to a loss, which it computes in float32; else as of `in_low_precision`."""
    if not isinstance(operands[0], Tensor) or autocast_dtype(operands[0]) is None:
        return operands
    halves = (torch.float16, torch.bfloat16)
    return tuple(t.float() if isinstance(t, Tensor) and t.dtype in halves else t for t in operands)
