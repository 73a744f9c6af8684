"""Pure device functions: conversions, and elementary functions that are stable at the extremes.

Nothing here loads or stores.  Compiled, the transcendental functions are those of the vendor's device library
(libdevice on NVIDIA, ocml on AMD), accurate to a unit or two in the last place.  The interpreter has no device library,
so there each is written out in NumPy's double precision, by Kahan's formulas for ``expm1`` and ``log1p``.  NumPy's
single precision differs from processor to processor, double precision rounded to single doesn't: so kernels take every
function of this kind, and matrix products, from here.

``COARSE`` functions are for results of 16 bits.  They take half of the instructions or fewer, and are off by some 1e-6
of the result, a hundredth of what rounding it does; the interpreter computes the formula, with accurate parts.
"""

from ._triton import INTERPRETED, libdevice, tl, triton


@triton.jit
def scalar(value, dtype: tl.constexpr):
    """A kernel's float argument as a 0-d tensor: compiled it is a tensor already, in the interpreter a Python float."""
    return tl.full((), value, dtype)


@triton.jit
def widen(x, dtype: tl.constexpr):
    """``x`` in the type that arithmetic is done in: float32, or float64 for float64.  Or in its own: ``x`` itself."""
    if INTERPRETED and x.dtype == tl.bfloat16 and dtype != tl.bfloat16:
        # The interpreter holds bfloat16 as 16-bit integers and converts subnormals wrongly; their bits are a float32's
        # upper half.
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True).to(dtype)
    return x.to(dtype)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """``x`` rounded to nearest even in the type that is stored."""
    if INTERPRETED and dtype == tl.bfloat16:
        # The interpreter truncates.  Adding half a unit, less one where the kept part is even, rounds to nearest even;
        # it would carry a NaN's payload into the sign, hence the selection.
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x != x, 0x7FC0, rounded).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def negative(x):
    """-x, of zeros, too: a unary minus is ``0 - x`` in Triton, and 0 for zeros of either sign."""
    return x * -1


@triton.jit
def exp(x, COARSE: tl.constexpr = False):
    if INTERPRETED:
        return tl.exp(x.to(tl.float64)).to(x.dtype)
    elif COARSE:
        return tl.exp(x)
    else:
        return libdevice.exp(x)


@triton.jit
def fast_exp(x):
    """exp(x) for terms beside exp(0): compiled, in few instructions, with a relative error that grows with abs(x)."""
    if INTERPRETED:
        return exp(x)
    return tl.exp(x)


@triton.jit
def exp_of_term(x):
    """exp(x) for what is added to exp(0): as `fast_exp`, but numbers below 1e-38 may count as 0."""
    if INTERPRETED or x.dtype == tl.float64:
        return fast_exp(x)
    else:
        return libdevice.fast_expf(x)


@triton.jit
def log(x):
    if INTERPRETED:
        return tl.log(x.to(tl.float64)).to(x.dtype)
    return libdevice.log(x)


@triton.jit
def expm1(x, COARSE: tl.constexpr = False):
    """exp(x) - 1, without cancellation near 0."""
    if COARSE:
        return tl.where(tl.abs(x) < 0.03125, x * (1 + x * (0.5 + x * 0.16666667)), exp(x, True) - 1)
    elif INTERPRETED:
        wide = x.to(tl.float64)
        u = tl.exp(wide)
        # Where exp rounds to 1 the answer is x; where exp(x) - 1 rounds to -1, or exp overflows, log(u) has lost x.
        kahan = (u - 1) * (wide / tl.log(tl.where((u == 1) | (u == 0), 2.0, u)))
        return tl.where(u == 1, wide, tl.where((u - 1 == -1) | (u == float("inf")), u - 1, kahan)).to(x.dtype)
    else:
        return libdevice.expm1(x)


@triton.jit
def log1p(x, COARSE: tl.constexpr = False):
    """log(1 + x), without cancellation near 0; the coarse one for x from 0 to 1."""
    if COARSE:  # 2 artanh(x / (2 + x)), whose argument is at most 1/3
        s = quotient(x, 2 + x, True)
        square = s * s
        return s * (2 + square * (0.66666667 + square * (0.4 + square * (0.28571429 + square * 0.22222222))))
    elif INTERPRETED:
        wide = x.to(tl.float64)
        u = 1 + wide
        kahan = tl.log(u) * (wide / tl.where(u == 1, 1.0, u - 1))
        return tl.where(u == 1, wide, tl.where(u == float("inf"), u, kahan)).to(x.dtype)
    else:
        return libdevice.log1p(x)


@triton.jit
def tanh(x):
    if INTERPRETED:
        # tanh|x| = -m / (2 + m) with m = expm1(-2|x|) in (-1, 0].
        m = expm1(-2 * tl.abs(x.to(tl.float64)))
        return tl.where(x == 0, x, tl.where(x < 0, m / (2 + m), -m / (2 + m)).to(x.dtype))  # keeps -0
    return libdevice.tanh(x)


@triton.jit
def erf(x):
    return tl.erf(x)


@triton.jit
def sigmoid(x, COARSE: tl.constexpr = False):
    """1 / (1 + exp(-x)); exp overflows to infinity for very negative x, and the quotient is the right 0.

    Near 1 gradients have the absolute error of this: its quotient is correctly rounded, but for the coarse one.
    """
    if COARSE:
        return 1 / (1 + exp_of_term(-x))
    else:
        return divide(1.0, 1 + exp(-x))


@triton.jit
def quotient(x, y, COARSE: tl.constexpr = False):
    """x / y; coarse, for y that is far from the smallest and largest numbers."""
    if COARSE and not INTERPRETED:
        return libdevice.fast_dividef(x, y)
    else:
        return x / y


@triton.jit
def normal_distribution(x):
    """Phi(x) and phi(x), as coarse as 16 bits are: Phi to 7.5e-8, its tail below 0 to some thousandths of itself.

    Source: Abramowitz, Stegun, "Handbook of Mathematical Functions" (1964), formula 7.1.26.
    """
    exponential = exp(-0.5 * x * x, True)
    t = quotient(1.0, 1 + tl.abs(x) * 0.23164189, True)
    series = t * (0.127414796 + t * (-0.142248368 + t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145))))
    tail = series * exponential  # Phi(-|x|)
    return tl.where(x > 0, 1 - tail, tail), exponential * 0.3989422804014327


@triton.jit
def divide(x, y):
    """x / y, correctly rounded: compiled, ``/`` is so in float64 alone."""
    if y.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def square_root(x):
    """The square root, correctly rounded: compiled, ``tl.sqrt`` is so in float64 alone."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def precise_sum(x, AXIS: tl.constexpr):
    """The sums of ``x`` along an axis, which stays, as accurate as float64's: in float32, which all GPUs are fast at.

    Added to a number that no sum reaches a quarter of, all terms are rounded to multiples of the same: these add up
    without rounding, in any order.  What they lost is little, and so is the rounding of its sum.
    """
    if x.dtype == tl.float64:
        return tl.sum(x, axis=AXIS, keep_dims=True)
    beyond = tl.max(tl.abs(x), axis=AXIS, keep_dims=True) * (4 * x.shape[AXIS])
    upper = tl.where(beyond < float("inf"), (beyond + x) - beyond, x)
    lower = tl.where(beyond < float("inf"), x - upper, 0.0)
    return tl.sum(upper, axis=AXIS, keep_dims=True) + tl.sum(lower, axis=AXIS, keep_dims=True)


@triton.jit
def add_product(sums, a, b, PRECISION: tl.constexpr):
    """sums + a @ b; ``PRECISION`` is that of float32 operands."""
    if INTERPRETED:
        # In double precision, so that the order of NumPy's sums, which depends on the processor, doesn't show.
        a = widen(a, tl.float64)
        b = widen(b, tl.float64)
        return tl.dot(a, b, sums.to(tl.float64), out_dtype=tl.float64).to(sums.dtype)
    return tl.dot(a, b, sums, input_precision=PRECISION)


@triton.jit
def require(condition, MESSAGE: tl.constexpr):
    """A device assertion on a tensor of booleans.  The kernel's `Configuration` has to say that it ``asserts``."""
    if INTERPRETED:
        # The interpreter ignores ``tl.device_assert``, but stops at Python's own statement.
        assert tl.min(condition.to(tl.int32)) == 1, MESSAGE
    else:
        tl.device_assert(condition, MESSAGE)
