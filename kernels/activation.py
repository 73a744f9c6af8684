"""Activations: one table of pure device functions, and the two pointwise kernels that apply them.

Each row of `ACTIVATIONS` defines an activation once: its value, its gradient, and the smallest thing that the gradient
needs (one bit an element, the output, or the input).  The device functions neither load nor store, so the epilogues of
batch norm, convolution and maxout use the same rows.

All take the activation's two scalar parameters ``a`` and ``b``, used or not, in the type of the arithmetic.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from ._triton import tl, triton
from .launch import COMPUTE, DTYPES, TRITON_TYPE, Configuration, launch, ships
from .layout import dense, dense_like
from .numerics import erf, exp, expm1, log1p, narrow, scalar, sigmoid, tanh, widen
from .tiles import (
    flat_tile,
    load_bits,
    load_tile,
    mask_bytes,
    programs_for,
    store_bits,
    store_tile,
    threads_for,
    tile_shape,
)

__all__ = [
    "ACTIVATIONS",
    "Activation",
    "activation_backward",
    "activation_forward",
    "activation_masked_backward",
    "activation_masked_forward",
]

# --- Device functions: value(x, a, b); keeps(x, a, b) for masks; gradient(g, saved, a, b) -----------------------------
#
# Comparisons are written the way round that treats NaN as PyTorch's CUDA kernels and scalar CPU code do (its vectorised
# CPU code differs for some gradients).


@triton.jit
def relu_value(x, a, b):
    return tl.where(x <= 0, 0.0, x)


@triton.jit
def relu_keeps(x, a, b):
    return (x <= 0) == 0


@triton.jit
def kept_gradient(g, kept, a, b):
    return tl.where(kept, g, 0.0)


@triton.jit
def leaky_relu_value(x, a, b):
    return tl.where(x > 0, x, x * a)


@triton.jit
def leaky_relu_keeps(x, a, b):
    return x > 0


@triton.jit
def leaky_relu_gradient(g, kept, a, b):
    return tl.where(kept, g, g * a)


@triton.jit
def threshold_value(x, a, b):
    return tl.where(x <= a, b, x)


@triton.jit
def threshold_keeps(x, a, b):
    return (x <= a) == 0


@triton.jit
def hardtanh_value(x, a, b):
    return tl.where(x < a, a, tl.where(x > b, b, x))


@triton.jit
def hardtanh_keeps(x, a, b):
    return ((x <= a) | (x >= b)) == 0


@triton.jit
def hardsigmoid_value(x, a, b):
    return hardtanh_value(x + 3, 0.0, 6.0) / 6


@triton.jit
def hardsigmoid_keeps(x, a, b):
    return (x > -3) & (x < 3)


@triton.jit
def hardsigmoid_gradient(g, kept, a, b):
    return tl.where(kept, g / 6, 0.0)


@triton.jit
def hardswish_value(x, a, b):
    return x * hardtanh_value(x + 3, 0.0, 6.0) / 6


@triton.jit
def hardswish_gradient(g, x, a, b):
    return tl.where(x <= -3, 0.0, tl.where(x < 3, g * (x / 3 + 0.5), g))


@triton.jit
def elu_value(x, a, b):
    """ELU and SELU: a (exp(x) - 1) below 0, b x above."""
    return tl.where(x > 0, b * x, a * expm1(x))


@triton.jit
def elu_gradient(g, y, a, b):
    # a exp(x) = y + a: the output tells both the branch and the slope, as long as a > 0.
    return tl.where(y <= 0, g * (y + a), g * b)


@triton.jit
def celu_value(x, a, b):
    return tl.where(x > 0, x, a * expm1(x / a))


@triton.jit
def celu_gradient(g, y, a, b):
    return tl.where(y <= 0, g * (y / a + 1), g)


@triton.jit
def elu_gradient_from_input(g, x, a, b):
    return tl.where(x <= 0, g * a * exp(x), g * b)


@triton.jit
def celu_gradient_from_input(g, x, a, b):
    return tl.where(x <= 0, g * exp(x / a), g)


@triton.jit
def gelu_value(x, a, b):
    return x * 0.5 * (1 + erf(x * 0.7071067811865476))


@triton.jit
def gelu_gradient(g, x, a, b):
    # d/dx x Phi(x) = Phi(x) + x phi(x)
    cumulative = 0.5 * (1 + erf(x * 0.7071067811865476))
    return g * (cumulative + x * (exp(-0.5 * x * x) * 0.3989422804014327))


@triton.jit
def gelu_tanh_value(x, a, b):
    return 0.5 * x * (1 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))


@triton.jit
def gelu_tanh_gradient(g, x, a, b):
    t = tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))
    inner = 0.7978845608028654 * (1 + 3 * 0.044715 * x * x)
    return g * (0.5 * (1 + t) + 0.5 * x * (1 - t * t) * inner)


@triton.jit
def silu_value(x, a, b):
    return x / (1 + exp(-x))


@triton.jit
def silu_gradient(g, x, a, b):
    s = sigmoid(x)
    return g * s * (1 + x * (1 - s))


@triton.jit
def mish_parts(x):
    """tanh(softplus(x)) = n / (n + d), from one exponential that never overflows.

    With e = exp(x): tanh(log(1 + e)) = (e^2 + 2e) / (e^2 + 2e + 2); for x > 0 both are divided by e^2.
    """
    e = exp(-tl.abs(x))
    n = tl.where(x > 0, 1 + 2 * e, e * (e + 2))
    d = tl.where(x > 0, 2 * e * e, 2.0)
    s = tl.where(x > 0, 1 / (1 + e), e / (1 + e))
    return n, d, s


@triton.jit
def mish_value(x, a, b):
    n, d, _ = mish_parts(x)
    return x * (n / (n + d))


@triton.jit
def mish_gradient(g, x, a, b):
    # t + x (1 - t^2) sigmoid(x), with 1 - t^2 = d (2n + d) / (n + d)^2: no cancellation where t is near 1.
    n, d, s = mish_parts(x)
    t = n / (n + d)
    return g * (t + x * s * (d / (n + d)) * ((2 * n + d) / (n + d)))


@triton.jit
def softplus_value(x, a, b):
    """a = beta, b = threshold: x itself where beta x > threshold."""
    z = x * a
    return tl.where(z > b, x, (tl.where(z > 0, z, 0.0) + log1p(exp(-tl.abs(z)))) / a)


@triton.jit
def softplus_gradient(g, x, a, b):
    z = x * a
    return tl.where(z > b, g, g * sigmoid(z))


@triton.jit
def softsign_value(x, a, b):
    return x / (1 + tl.abs(x))


@triton.jit
def softsign_gradient(g, x, a, b):
    d = 1 + tl.abs(x)
    # PyTorch differentiates the quotient, so an infinite input gives NaN; x - x is 0 otherwise.
    return g / d / d + (x - x)


@triton.jit
def sigmoid_value(x, a, b):
    return sigmoid(x)


@triton.jit
def sigmoid_gradient(g, y, a, b):
    return g * (1 - y) * y


@triton.jit
def log_sigmoid_value(x, a, b):
    return tl.where(x > 0, 0.0, x) - log1p(exp(-tl.abs(x)))


@triton.jit
def log_sigmoid_gradient(g, x, a, b):
    return g * sigmoid(-x)


@triton.jit
def tanh_value(x, a, b):
    return tanh(x)


@triton.jit
def tanh_gradient(g, y, a, b):
    return g * (1 - y * y)


# --- The table ----------------------------------------------------------------------------------------------------


def _takes_all(a: float, b: float, inplace: bool) -> str | None:
    return None


def _refuses_negative_slope_inplace(a: float, b: float, inplace: bool) -> str | None:
    return "in-place with a negative slope" if inplace and a < 0 else None


def _needs_order(a: float, b: float, inplace: bool) -> str | None:
    return None if a < b else "min_val is not below max_val"


def _needs_positive_alpha(a: float, b: float, inplace: bool) -> str | None:
    return None if a > 0 else "the gradient can't be read off the output unless alpha is positive"


def _needs_nonzero_beta(a: float, b: float, inplace: bool) -> str | None:
    return None if a != 0 else "beta is 0"


@dataclass(frozen=True)
class Activation:
    """An activation function: what every kernel that applies it needs to know.

    ``value(x, a, b)`` and ``gradient(g, saved, a, b)`` are device functions; ``saved`` is what ``saves`` names: the
    booleans of ``keeps(x, a, b)``, one bit each (``"mask"``), the ``"output"`` or the ``"input"``.  ``defaults`` are
    the parameters of the ``torch.nn`` module's defaults.  ``refuses(a, b, inplace)`` gives the reason why the kernels
    don't take these parameters, or None.  ``half`` names the row that takes over for 16-bit types, where the output
    holds too few digits to read the gradient off it: y + alpha would be 0 long before alpha exp(x) is.
    """

    name: str
    value: Any
    gradient: Any
    saves: Literal["mask", "output", "input"]
    keeps: Any = None
    defaults: tuple[float, float] = (0.0, 0.0)
    refuses: Callable[[float, float, bool], str | None] = _takes_all
    half: str | None = None

    def name_for(self, dtype: torch.dtype) -> str:
        """The row whose kernels serve ``dtype``."""
        return self.half if self.half and dtype.itemsize == 2 else self.name

    @property
    def gates(self) -> bool:
        """Whether the gradient vanishes where the mask's bit is 0: the bit can then tell of dropped elements, too."""
        return self.saves == "mask" and self.gradient is not leaky_relu_gradient

    def budget(self, numel: int, dtype: torch.dtype) -> tuple[float, float]:
        """Bytes of device memory that (forward, backward) must move: each operand once."""
        tensor = numel * dtype.itemsize
        if self.saves == "mask":
            return 2 * tensor + numel / 8, 2 * tensor + numel / 8
        return 2 * tensor, 3 * tensor


_SELU_ALPHA = 1.6732632423543772848170429916717
_SELU_SCALE = 1.0507009873554804934193349852946
_ELU = (1.0, 1.0)
_SELU = (_SELU_ALPHA * _SELU_SCALE, _SELU_SCALE)
_CELU = (1.0, 0.0)

#: Every activation with at most two scalar parameters, by name.
ACTIVATIONS: dict[str, Activation] = {
    row.name: row
    for row in (
        Activation("relu", relu_value, kept_gradient, "mask", relu_keeps),
        Activation("relu6", hardtanh_value, kept_gradient, "mask", hardtanh_keeps, (0.0, 6.0)),
        Activation(
            "leaky_relu",
            leaky_relu_value,
            leaky_relu_gradient,
            "mask",
            leaky_relu_keeps,
            (0.01, 0.0),
            _refuses_negative_slope_inplace,
        ),
        Activation("threshold", threshold_value, kept_gradient, "mask", threshold_keeps),
        Activation("hardtanh", hardtanh_value, kept_gradient, "mask", hardtanh_keeps, (-1.0, 1.0), _needs_order),
        Activation("hardsigmoid", hardsigmoid_value, hardsigmoid_gradient, "mask", hardsigmoid_keeps),
        Activation("hardswish", hardswish_value, hardswish_gradient, "input"),
        Activation("elu", elu_value, elu_gradient, "output", None, _ELU, _needs_positive_alpha, "elu_half"),
        Activation("elu_half", elu_value, elu_gradient_from_input, "input", None, _ELU, _needs_positive_alpha),
        Activation("selu", elu_value, elu_gradient, "output", None, _SELU, half="elu_half"),
        Activation("celu", celu_value, celu_gradient, "output", None, _CELU, _needs_positive_alpha, "celu_half"),
        Activation("celu_half", celu_value, celu_gradient_from_input, "input", None, _CELU, _needs_positive_alpha),
        Activation("gelu", gelu_value, gelu_gradient, "input"),
        Activation("gelu_tanh", gelu_tanh_value, gelu_tanh_gradient, "input"),
        Activation("silu", silu_value, silu_gradient, "input"),
        Activation("mish", mish_value, mish_gradient, "input"),
        Activation("softplus", softplus_value, softplus_gradient, "input", None, (1.0, 20.0), _needs_nonzero_beta),
        Activation("softsign", softsign_value, softsign_gradient, "input"),
        Activation("sigmoid", sigmoid_value, sigmoid_gradient, "output"),
        Activation("logsigmoid", log_sigmoid_value, log_sigmoid_gradient, "input"),
        Activation("tanh", tanh_value, tanh_gradient, "output"),
    )
}

# --- Kernels --------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["numel"])
def activation_forward_kernel(
    x_pointer,  # input, flat
    y_pointer,  # output, flat; may be the input
    mask_pointer,  # packed bits of KEEPS, or None where none are saved
    numel: tl.int64,
    a: tl.float64,
    b: tl.float64,
    VALUE: tl.constexpr,
    KEEPS: tl.constexpr,
    COMPUTE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tile_index, start, offsets, inside, whole = flat_tile(numel, ROWS, COLUMNS)
    a = scalar(a, COMPUTE)
    b = scalar(b, COMPUTE)

    x = widen(load_tile(x_pointer + start, offsets, inside, whole), COMPUTE)
    y = VALUE(x, a, b)
    store_tile(y_pointer + start, offsets, narrow(y, y_pointer.dtype.element_ty), inside, whole)
    if mask_pointer is not None:
        store_bits(mask_pointer, KEEPS(x, a, b), tile_index, ROWS, COLUMNS)


@triton.jit(do_not_specialize=["numel"])
def activation_backward_kernel(
    g_pointer,  # gradient of the output, flat
    saved_pointer,  # packed bits, or the output or input, flat
    dx_pointer,  # gradient of the input, flat
    numel: tl.int64,
    a: tl.float64,
    b: tl.float64,
    GRADIENT: tl.constexpr,
    MASKED: tl.constexpr,  # saved_pointer holds packed bits
    COMPUTE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tile_index, start, offsets, inside, whole = flat_tile(numel, ROWS, COLUMNS)
    a = scalar(a, COMPUTE)
    b = scalar(b, COMPUTE)

    g = widen(load_tile(g_pointer + start, offsets, inside, whole), COMPUTE)
    if MASKED:
        dx = GRADIENT(g, load_bits(saved_pointer, tile_index, ROWS, COLUMNS), a, b)
    else:
        dx = GRADIENT(g, widen(load_tile(saved_pointer + start, offsets, inside, whole), COMPUTE), a, b)
    store_tile(dx_pointer + start, offsets, narrow(dx, dx_pointer.dtype.element_ty), inside, whole)


# --- Configurations and launchers -----------------------------------------------------------------------------------


@cache
def _forward(name: str, dtype: torch.dtype, masked: bool) -> Configuration:
    row = ACTIVATIONS[name]
    rows, columns = tile_shape(dtype)
    element = "*" + TRITON_TYPE[dtype]
    mask = (("mask_pointer", "*u8"),) if masked else ()
    return Configuration(
        label=f"{name} forward{' + mask' if masked else ''} {TRITON_TYPE[dtype]}",
        kernel=activation_forward_kernel,
        signature=(
            ("x_pointer", element),
            ("y_pointer", element),
            *mask,
            ("numel", "i64"),
            ("a", "fp64"),
            ("b", "fp64"),
        ),
        constants=(
            *(() if masked else (("mask_pointer", None),)),  # a missing pointer is a constant
            ("VALUE", row.value),
            ("KEEPS", row.keeps if masked else None),
            ("COMPUTE", COMPUTE[dtype]),
            ("ROWS", rows),
            ("COLUMNS", columns),
        ),
        threads=threads_for(dtype),
        wide_loads=rows,
        wide_stores=rows,
    )


@cache
def _backward(name: str, dtype: torch.dtype) -> Configuration:
    row = ACTIVATIONS[name]
    rows, columns = tile_shape(dtype)
    element = "*" + TRITON_TYPE[dtype]
    masked = row.saves == "mask"
    return Configuration(
        label=f"{name} backward {TRITON_TYPE[dtype]}",
        kernel=activation_backward_kernel,
        signature=(
            ("g_pointer", element),
            ("saved_pointer", "*u8" if masked else element),
            ("dx_pointer", element),
            ("numel", "i64"),
            ("a", "fp64"),
            ("b", "fp64"),
        ),
        constants=(
            ("GRADIENT", row.gradient),
            ("MASKED", masked),
            ("COMPUTE", COMPUTE[dtype]),
            ("ROWS", rows),
            ("COLUMNS", columns),
        ),
        threads=threads_for(dtype),
        wide_loads=rows if masked else 2 * rows,
        wide_stores=rows,
    )


@ships("activation")
def configurations() -> Iterator[Configuration]:
    served = dict.fromkeys((row.name_for(dtype), dtype) for row in ACTIVATIONS.values() for dtype in DTYPES)
    for name, dtype in served:
        yield _forward(name, dtype, False)
        if ACTIVATIONS[name].saves == "mask":
            yield _forward(name, dtype, True)
        yield _backward(name, dtype)


def activation_forward(x: Tensor, name: str, a: float, b: float, *, inplace: bool = False) -> Tensor:
    """value(x), in the memory order of ``x``; with ``inplace`` written over the dense ``x``."""
    x = dense(x)
    y = x if inplace else torch.empty_like(x)
    launch(_forward(name, x.dtype, False), programs_for(x.numel()), x, y, x.numel(), a, b)
    return y


def activation_masked_forward(
    x: Tensor, name: str, a: float, b: float, *, inplace: bool = False
) -> tuple[Tensor, Tensor]:
    """The value, and the packed mask that the backward pass needs (in the memory order of the value)."""
    x = dense(x)
    y = x if inplace else torch.empty_like(x)
    mask = torch.empty(mask_bytes(x.numel()), dtype=torch.uint8, device=x.device)
    launch(_forward(name, x.dtype, True), programs_for(x.numel()), x, y, mask, x.numel(), a, b)
    return y, mask


def activation_backward(g: Tensor, saved: Tensor, name: str, a: float, b: float) -> Tensor:
    """Gradient of the input from that of the output, and the saved output or input."""
    saved = dense(saved)
    g = dense_like(g, saved.stride())
    dx = torch.empty_like(saved)
    launch(_backward(name, g.dtype), programs_for(g.numel()), g, saved, dx, g.numel(), a, b)
    return dx


def activation_masked_backward(
    g: Tensor, mask: Tensor, strides: Sequence[int], name: str, a: float, b: float
) -> Tensor:
    """Gradient of the input from that of the output (whose strides were ``strides``) and the packed mask."""
    g = dense_like(g, strides)
    dx = g.new_empty_strided(g.shape, strides)
    launch(_backward(name, g.dtype), programs_for(g.numel()), g, mask, dx, g.numel(), a, b)
    return dx
