"""Activations: one table of pure device functions.

Each row of `ACTIVATIONS` defines an activation once: its value, its gradient, and the smallest thing that the gradient
needs (one bit an element, the output, or the input).  The device functions neither load nor store, so the epilogues of
batch norm, convolution and pooling use the same rows as the pointwise kernels.

All take the activation's two scalar parameters ``a`` and ``b``, used or not, in the type of the arithmetic.  A row with
its parameters is `Activated`, the value that travels from a layer to the kernels; `IDENTITY` stands for no activation.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal, NamedTuple

import torch

from ..base._triton import tl, triton
from ..base.numerics import erf, exp, expm1, log1p, normal_distribution, quotient, sigmoid, square_root, tanh

__all__ = [
    "ACTIVATIONS",
    "IDENTITY",
    "OVERWRITING",
    "PRELU",
    "Activated",
    "Activation",
    "activated",
    "gradient_from_input",
    "gradient_of",
    "value_of",
]

# --- Device functions: forward(x, a, b); mask(x, a, b); gradient(g, saved, a, b) ------------------------------------
#
# Where a function takes ``COARSE``, it may be as coarse as a result of 16 bits is: see `Activation.for_results_of`.
#
# Comparisons are written the way round that treats NaN as PyTorch's CUDA kernels and scalar CPU code do (its vectorised
# CPU code differs for some gradients).


@triton.jit
def identity_forward(x, a, b):
    return x


@triton.jit
def identity_gradient(g, saved, a, b):
    return g


@triton.jit
def relu_forward(x, a, b):
    return tl.where(x <= 0, 0.0, x)


@triton.jit
def relu_mask(x, a, b):
    return (x <= 0) == 0


@triton.jit
def kept_gradient(g, kept, a, b):
    return tl.where(kept, g, 0.0)


@triton.jit
def relu_squared_forward(x, a, b):
    return tl.where(x <= 0, 0.0, x * x)


@triton.jit
def relu_squared_gradient(g, x, a, b):
    return tl.where(x <= 0, 0.0, g * (2 * x))


@triton.jit
def leaky_relu_forward(x, a, b):
    return tl.where(x > 0, x, x * a)


@triton.jit
def leaky_relu_mask(x, a, b):
    return x > 0


@triton.jit
def leaky_relu_gradient(g, kept, a, b):
    return tl.where(kept, g, g * a)


@triton.jit
def prelu_gradient(g, x, a, b):
    return leaky_relu_gradient(g, leaky_relu_mask(x, a, b), a, b)


@triton.jit
def prelu_slope_gradient(g, x):
    """What an element adds to the gradient of its slope."""
    return tl.where(x > 0, 0.0, g * x)


@triton.jit
def threshold_forward(x, a, b):
    return tl.where(x <= a, b, x)


@triton.jit
def threshold_mask(x, a, b):
    return (x <= a) == 0


@triton.jit
def hardtanh_forward(x, a, b):
    return tl.where(x < a, a, tl.where(x > b, b, x))


@triton.jit
def hardtanh_mask(x, a, b):
    return ((x <= a) | (x >= b)) == 0


@triton.jit
def hardsigmoid_forward(x, a, b):
    return hardtanh_forward(x + 3, 0.0, 6.0) / 6


@triton.jit
def hardsigmoid_mask(x, a, b):
    return (x > -3) & (x < 3)


@triton.jit
def hardsigmoid_gradient(g, kept, a, b):
    return tl.where(kept, g / 6, 0.0)


@triton.jit
def hardswish_forward(x, a, b):
    return x * hardtanh_forward(x + 3, 0.0, 6.0) / 6


@triton.jit
def hardswish_gradient(g, x, a, b):
    return tl.where(x <= -3, 0.0, tl.where(x < 3, g * (x / 3 + 0.5), g))


@triton.jit
def elu_forward(x, a, b, COARSE: tl.constexpr = False):
    """ELU and SELU: a (exp(x) - 1) below 0, b x above."""
    return tl.where(x > 0, b * x, a * expm1(x, COARSE))


@triton.jit
def elu_gradient(g, x, a, b):
    return tl.where(x <= 0, g * a * exp(x), g * b)


@triton.jit
def elu_gradient_from_output(g, y, a, b):
    # a exp(x) = y + a: the output tells both the branch and the slope, as long as a > 0.
    return tl.where(y <= 0, g * (y + a), g * b)


@triton.jit
def celu_forward(x, a, b, COARSE: tl.constexpr = False):
    return tl.where(x > 0, x, a * expm1(x * (1 / a), COARSE))  # as PyTorch: one division, not one for each element


@triton.jit
def celu_gradient(g, x, a, b):
    return tl.where(x <= 0, g * exp(x * (1 / a)), g)


@triton.jit
def celu_gradient_from_output(g, y, a, b):
    return tl.where(y <= 0, g * (y * (1 / a) + 1), g)


@triton.jit
def gelu_forward(x, a, b, COARSE: tl.constexpr = False):
    if COARSE:
        cumulative, _density = normal_distribution(x)
        return x * cumulative
    else:
        return x * 0.5 * (1 + erf(x * 0.7071067811865476))


@triton.jit
def gelu_gradient(g, x, a, b, COARSE: tl.constexpr = False):
    # d/dx x Phi(x) = Phi(x) + x phi(x)
    if COARSE:
        cumulative, density = normal_distribution(x)
    else:
        cumulative = 0.5 * (1 + erf(x * 0.7071067811865476))
        density = exp(-0.5 * x * x) * 0.3989422804014327
    return g * (cumulative + x * density)


@triton.jit
def gelu_tanh_forward(x, a, b, COARSE: tl.constexpr = False):
    u = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    if COARSE:
        return x * sigmoid(2 * u, True)
    else:
        return 0.5 * x * (1 + tanh(u))


@triton.jit
def gelu_tanh_gradient(g, x, a, b, COARSE: tl.constexpr = False):
    u = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    inner = 0.7978845608028654 * (1 + 3 * 0.044715 * x * x)
    if COARSE:
        s = sigmoid(2 * u, True)  # (1 + tanh u) / 2
        return g * (s + 2 * x * (s * (1 - s)) * inner)
    else:
        t = tanh(u)
        return g * (0.5 * (1 + t) + 0.5 * x * (1 - t * t) * inner)


@triton.jit
def silu_forward(x, a, b, COARSE: tl.constexpr = False):
    return x / (1 + exp(-x, COARSE))


@triton.jit
def silu_gradient(g, x, a, b, COARSE: tl.constexpr = False):
    s = sigmoid(x, COARSE)
    return g * s * (1 + x * (1 - s))


@triton.jit
def quick_gelu_forward(x, a, b, COARSE: tl.constexpr = False):
    return x / (1 + exp(-1.702 * x, COARSE))


@triton.jit
def quick_gelu_gradient(g, x, a, b, COARSE: tl.constexpr = False):
    s = sigmoid(1.702 * x, COARSE)
    return g * (s + 1.702 * (x * s * (1 - s)))  # 1.702 x may overflow


@triton.jit
def mish_parts(x, COARSE: tl.constexpr):
    """tanh(softplus(x)) = n / (n + d), from one exponential that never overflows.

    With e = exp(x): tanh(log(1 + e)) = (e^2 + 2e) / (e^2 + 2e + 2); for x > 0 both are divided by e^2.
    """
    e = exp(-tl.abs(x), COARSE)
    n = tl.where(x > 0, 1 + 2 * e, e * (e + 2))
    d = tl.where(x > 0, 2 * e * e, 2.0)
    s = tl.where(x > 0, 1.0, e) / (1 + e)
    return n, d, s


@triton.jit
def mish_forward(x, a, b, COARSE: tl.constexpr = False):
    n, d, _ = mish_parts(x, COARSE)
    if COARSE:
        return quotient(x * n, n + d, True)  # n / (n + d) may be too small for it
    else:
        return x * (n / (n + d))


@triton.jit
def mish_gradient(g, x, a, b, COARSE: tl.constexpr = False):
    # t + x (1 - t^2) sigmoid(x), with 1 - t^2 = d (2n + d) / (n + d)^2: no cancellation where t is near 1.
    n, d, s = mish_parts(x, COARSE)
    t = quotient(n, n + d, COARSE)
    return g * (t + x * s * quotient(d, n + d, COARSE) * quotient(2 * n + d, n + d, COARSE))


@triton.jit
def softplus_forward(x, a, b, COARSE: tl.constexpr = False):
    """a = beta, b = threshold: x itself where beta x > threshold."""
    z = x * a
    return tl.where(z > b, x, (tl.where(z > 0, z, 0.0) + log1p(exp(-tl.abs(z), COARSE), COARSE)) / a)


@triton.jit
def softplus_gradient(g, x, a, b, COARSE: tl.constexpr = False):
    z = x * a
    return tl.where(z > b, g, g * sigmoid(z, COARSE))


@triton.jit
def softsign_forward(x, a, b):
    return x / (1 + tl.abs(x))


@triton.jit
def softsign_gradient(g, x, a, b):
    d = 1 + tl.abs(x)
    # PyTorch differentiates the quotient, so an infinite input gives NaN; x - x is 0 otherwise.
    return g / d / d + (x - x)


@triton.jit
def squareplus_root(x, a):
    """sqrt(x^2 + a), whose square may be out of range."""
    size, root = tl.abs(x), square_root(a)
    larger = tl.maximum(size, root)
    ratio = tl.minimum(size, root) / larger
    return larger * square_root(1 + ratio * ratio)


@triton.jit
def squareplus_forward(x, a, b):
    root = squareplus_root(x, a)
    # Of numbers below 0 the sum would cancel.
    return tl.where(x >= 0, 0.5 * x + 0.5 * root, 0.5 * a / (root - x))


@triton.jit
def squareplus_gradient(g, x, a, b):
    # PyTorch differentiates the root, so an infinite input gives NaN; x - x is 0 otherwise.
    return g * (squareplus_forward(x, a, b) / squareplus_root(x, a)) + (x - x)


@triton.jit
def sigmoid_forward(x, a, b, COARSE: tl.constexpr = False):
    return sigmoid(x, COARSE)


@triton.jit
def sigmoid_gradient(g, y, a, b):
    return g * (1 - y) * y


@triton.jit
def log_sigmoid_forward(x, a, b, COARSE: tl.constexpr = False):
    return tl.where(x > 0, 0.0, x) - log1p(exp(-tl.abs(x), COARSE), COARSE)


@triton.jit
def log_sigmoid_gradient(g, x, a, b, COARSE: tl.constexpr = False):
    return g * sigmoid(-x, COARSE)


@triton.jit
def tanh_forward(x, a, b):
    return tanh(x)


@triton.jit
def tanh_gradient(g, y, a, b):
    return g * (1 - y * y)


@triton.jit
def value_of(x, a, b, ACTIVATION: tl.constexpr):
    """The activation, as coarse as the row may be."""
    if ACTIVATION.coarse_forward:
        return ACTIVATION.forward(x, a, b, True)
    else:
        return ACTIVATION.forward(x, a, b)


@triton.jit
def gradient_of(g, saved, a, b, ACTIVATION: tl.constexpr):
    """Its gradient, likewise."""
    if ACTIVATION.coarse_gradient:
        return ACTIVATION.gradient(g, saved, a, b, True)
    else:
        return ACTIVATION.gradient(g, saved, a, b)


@triton.jit
def gradient_from_input(g, x, a, b, ACTIVATION: tl.constexpr):
    """The gradient where the activation's input is at hand: whatever it is read off is computed again."""
    if ACTIVATION.saves == "mask":
        saved = ACTIVATION.mask(x, a, b)
    elif ACTIVATION.saves == "output":
        saved = value_of(x, a, b, ACTIVATION)
    else:
        saved = x
    return gradient_of(g, saved, a, b, ACTIVATION)


# --- Rows -----------------------------------------------------------------------------------------------------------


def _takes_all(a: float, b: float, inplace: bool) -> str | None:
    return None


def _refuses_negative_slope_inplace(a: float, b: float, inplace: bool) -> str | None:
    return "in-place with a negative slope" if inplace and a < 0 else None


def _needs_order(a: float, b: float, inplace: bool) -> str | None:
    return None if a < b else "min_val is not below max_val"


def _needs_positive_alpha_inplace(a: float, b: float, inplace: bool) -> str | None:
    return "in-place with an alpha that is not positive" if inplace and not a > 0 else None


def _needs_nonzero_alpha(a: float, b: float, inplace: bool) -> str | None:
    return _needs_positive_alpha_inplace(a, b, inplace) if a != 0 else "alpha is 0"


def _needs_positive_b(a: float, b: float, inplace: bool) -> str | None:
    return None if a > 0 else "b is not positive"


def _needs_nonzero_beta(a: float, b: float, inplace: bool) -> str | None:
    return None if a != 0 else "beta is 0"


@dataclass(frozen=True, eq=False)
class Activation:
    """An activation function: what every kernel that applies it needs to know, as one ``tl.constexpr``.

    ``forward(x, a, b)`` and ``gradient(g, saved, a, b)`` are device functions; ``saved`` is what ``saves`` names: the
    booleans of ``mask(x, a, b)``, one bit each, the ``"output"`` or the ``"input"``.  ``mask_gates`` says that the
    gradient vanishes where the mask's bit is 0: the bit can then tell of dropped elements, too.  ``keeps_order``: the
    largest of several inputs has the largest value, and values are equal only where inputs are, or the mask's bit is 0.

    ``parameters`` are PyTorch's names of ``a`` and ``b``, as far as a user may choose them, and ``defaults`` the values
    of both in the ``torch.nn`` module.  ``refuses(a, b, inplace)`` gives the reason why the kernels don't take these
    parameters, or None.  ``overwriting`` names the row that takes over in place, where the input is lost; not in 16
    bits, where the output holds too few digits to read the gradient off it: y + alpha would be 0 long before
    alpha exp(x) is.  ``coarse`` rows are made by `for_results_of`.
    """

    name: str
    forward: Any
    gradient: Any
    saves: Literal["nothing", "mask", "output", "input"]
    mask: Any = None
    mask_gates: bool = False
    keeps_order: bool = False
    parameters: tuple[str, ...] = ()
    defaults: tuple[float, float] = (0.0, 0.0)
    refuses: Callable[[float, float, bool], str | None] = _takes_all
    overwriting: str | None = None
    coarse: bool = False

    def __repr__(self) -> str:
        """Triton names what it compiles for a row by this."""
        return f"{self.name}{', coarse' * self.coarse}"

    def for_results_of(self, dtype: torch.dtype) -> "Activation":
        """The row for kernels that round to ``dtype`` what it gives them: in 16 bits its functions may be coarse."""
        return _coarse(self) if dtype.itemsize == 2 else self

    @property
    def coarse_forward(self) -> bool:
        return self.coarse and "COARSE" in self.forward.arg_names

    @property
    def coarse_gradient(self) -> bool:
        return self.coarse and "COARSE" in self.gradient.arg_names

    @property
    def label(self) -> str:
        """The name in the labels of configurations, where no activation has none."""
        return "" if self.saves == "nothing" else self.name

    @property
    def cache_key(self) -> str:
        """What a row is to Triton's cache on disk, which asks where it compiles: always what its functions are now."""
        functions = (self.forward, self.gradient, self.mask)
        keys = (None if function is None else function.cache_key for function in functions)
        return f"{self.saves} {self.mask_gates} {self.keeps_order} {self.coarse} {' '.join(map(str, keys))}"


@cache
def _coarse(row: Activation) -> Activation:
    return replace(row, coarse=True)


class Activated(NamedTuple):
    """An activation with its parameters, as it travels from a layer to the kernels."""

    row: Activation
    a: float = 0.0
    b: float = 0.0

    @property
    def saves(self) -> str:
        return self.row.saves

    @property
    def arguments(self) -> tuple[str, float, float]:
        """What an operator is given in its place, which `activated` makes it from again."""
        return self.row.name, self.a, self.b

    def refusal(self, inplace: bool = False) -> str | None:
        """Why the kernels don't take these parameters, or None."""
        return self.row.refuses(self.a, self.b, inplace)

    def overwriting(self, dtype: torch.dtype) -> "Activated":
        """The same activation as it is computed in place."""
        name = self.row.overwriting
        return self if name is None or dtype.itemsize == 2 else self._replace(row=_ROWS[name])


# --- The table ------------------------------------------------------------------------------------------------------

_SELU_ALPHA = 1.6732632423543772848170429916717
_SELU_SCALE = 1.0507009873554804934193349852946
_SELU = (_SELU_ALPHA * _SELU_SCALE, _SELU_SCALE)


#: Every activation with at most two scalar parameters, by name.
ACTIVATIONS: dict[str, Activation] = {
    row.name: row
    for row in (
        Activation("relu", relu_forward, kept_gradient, "mask", relu_mask, mask_gates=True, keeps_order=True),
        Activation(
            "relu6", hardtanh_forward, kept_gradient, "mask", hardtanh_mask, mask_gates=True, defaults=(0.0, 6.0)
        ),
        Activation("relu_squared", relu_squared_forward, relu_squared_gradient, "input"),
        Activation(
            *("leaky_relu", leaky_relu_forward, leaky_relu_gradient, "mask", leaky_relu_mask),
            parameters=("negative_slope",),
            defaults=(0.01, 0.0),
            refuses=_refuses_negative_slope_inplace,
        ),
        Activation(
            *("threshold", threshold_forward, kept_gradient, "mask", threshold_mask),
            mask_gates=True,
            parameters=("threshold", "value"),
        ),
        Activation(
            *("hardtanh", hardtanh_forward, kept_gradient, "mask", hardtanh_mask),
            mask_gates=True,
            parameters=("min_val", "max_val"),
            defaults=(-1.0, 1.0),
            refuses=_needs_order,
        ),
        Activation("hardsigmoid", hardsigmoid_forward, hardsigmoid_gradient, "mask", hardsigmoid_mask, mask_gates=True),
        Activation("hardswish", hardswish_forward, hardswish_gradient, "input"),
        Activation(
            *("elu", elu_forward, elu_gradient, "input"),
            parameters=("alpha",),
            defaults=(1.0, 1.0),
            refuses=_needs_positive_alpha_inplace,
            overwriting="elu_",
        ),
        Activation("selu", elu_forward, elu_gradient, "input", defaults=_SELU, overwriting="elu_"),
        Activation(
            *("celu", celu_forward, celu_gradient, "input"),
            parameters=("alpha",),
            defaults=(1.0, 0.0),
            refuses=_needs_nonzero_alpha,
            overwriting="celu_",
        ),
        Activation("gelu", gelu_forward, gelu_gradient, "input"),
        Activation("gelu_tanh", gelu_tanh_forward, gelu_tanh_gradient, "input"),
        Activation("quick_gelu", quick_gelu_forward, quick_gelu_gradient, "input"),
        Activation("silu", silu_forward, silu_gradient, "input"),
        Activation("mish", mish_forward, mish_gradient, "input"),
        Activation(
            *("softplus", softplus_forward, softplus_gradient, "input"),
            parameters=("beta", "threshold"),
            defaults=(1.0, 20.0),
            refuses=_needs_nonzero_beta,
        ),
        Activation("softsign", softsign_forward, softsign_gradient, "input"),
        Activation(
            *("squareplus", squareplus_forward, squareplus_gradient, "input"),
            parameters=("b",),
            defaults=(4.0, 0.0),
            refuses=_needs_positive_b,
        ),
        Activation("sigmoid", sigmoid_forward, sigmoid_gradient, "output"),
        Activation("logsigmoid", log_sigmoid_forward, log_sigmoid_gradient, "input"),
        Activation("tanh", tanh_forward, tanh_gradient, "output"),
    )
}

#: Rows that take over in place.
OVERWRITING: dict[str, Activation] = {
    row.name: row
    for row in (
        Activation("elu_", elu_forward, elu_gradient_from_output, "output", defaults=(1.0, 1.0)),
        Activation("celu_", celu_forward, celu_gradient_from_output, "output", defaults=(1.0, 0.0)),
    )
}

#: No activation.
IDENTITY = Activated(Activation("identity", identity_forward, identity_gradient, "nothing"))

#: PReLU, whose ``a`` kernels read from memory: a tensor of slopes is no parameter.
PRELU = Activated(Activation("prelu", leaky_relu_forward, prelu_gradient, "input"))

_ROWS = {**ACTIVATIONS, **OVERWRITING, **{one.row.name: one.row for one in (IDENTITY, PRELU)}}


def activated(name: str, a: float, b: float) -> Activated:
    """From an operator's arguments."""
    return Activated(_ROWS[name], a, b)
