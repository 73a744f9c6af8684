"""Every exact instruction that kernels use, on the virtual GPU, against NumPy or exact arithmetic."""

import math
import operator
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from support.ptx import execute
from torch import Tensor

pytestmark = pytest.mark.compiled

ELEMENTS = 512
DTYPES = {
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "f32": torch.float32,
    "f64": torch.float64,
    "s8": torch.int8,
    "s16": torch.int16,
    "s32": torch.int32,
    "s64": torch.int64,
    "u8": torch.uint8,
    "u16": torch.uint16,
    "u32": torch.uint32,
    "u64": torch.uint64,
}
NUMPY = {
    name: np.dtype(name.replace("f", "float").replace("u", "uint").replace("s", "int"))
    for name in DTYPES
    if name != "bf16"
}
Array = np.ndarray[Any, Any]


# --- Operands ---------------------------------------------------------------------------------------------------------


def operand(type_: str, seed: int) -> Tensor:
    """Special values, all kinds of bits, and numbers of like size, which cancel."""
    random = np.random.default_rng(seed)
    dtype = DTYPES[type_]
    mixed = torch.from_numpy(random.integers(0, 256, ELEMENTS * dtype.itemsize, dtype=np.uint8)).view(dtype).clone()
    if dtype.is_floating_point:
        info = torch.finfo(dtype)
        special = torch.tensor([0.0, 1, 0.5, 2.5, math.inf, math.nan, info.max, info.tiny, info.tiny / 4]).to(dtype)
        special = torch.cat([special, -special])
        usual = torch.from_numpy(random.normal(size=ELEMENTS)).to(dtype)
    else:
        info = np.iinfo(NUMPY[type_])
        special = torch.from_numpy(np.array([0, 1, 2, 3, 31, 32, 64, info.min, info.max], dtype=NUMPY[type_]))
        usual = torch.from_numpy(random.integers(0, 50, ELEMENTS).astype(NUMPY[type_]))
    kind = torch.from_numpy(random.integers(0, 3, ELEMENTS))
    specials = special[torch.from_numpy(random.integers(0, len(special), ELEMENTS))]
    return torch.where(kind == 0, specials, torch.where(kind == 1, usual, mixed))


def array(tensor: Tensor) -> Array:
    return tensor.double().numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


class Form(NamedTuple):
    """An instruction with its types, and what NumPy makes of the operands' arrays: the exact result, or one that needs
    no rounding but to the result's type."""

    instruction: str
    operands: str
    result: str
    expected: Callable[..., Any]
    body: str = ""

    def run(self) -> tuple[list[Tensor], Tensor]:
        operands = [operand(type_, seed) for seed, type_ in enumerate(self.operands.split())]
        names = ", ".join(f"%a{n}" for n in range(len(operands)))
        body = self.body or f"{self.instruction} %r0, {names};"
        (result,) = execute(body.replace("INSTRUCTION", self.instruction), *operands, results=[DTYPES[self.result]])
        return operands, result

    def reference(self, operands: Sequence[Tensor]) -> Tensor:
        with np.errstate(all="ignore"):
            expected = self.expected(*map(array, operands))
        if isinstance(expected, Tensor):
            return expected
        if self.result == "bf16":
            return torch.from_numpy(expected).to(torch.bfloat16)
        with np.errstate(all="ignore"):
            return torch.from_numpy(expected.astype(NUMPY[self.result]))


def same(result: Tensor, expected: Tensor) -> Tensor:
    """Element by element: the same bits, or both NaN."""
    equal = result.view(torch.uint8).view(len(result), -1).eq(expected.view(torch.uint8).view(len(result), -1)).all(1)
    return equal | (result.isnan() & expected.isnan()) if result.is_floating_point() else equal


def flush(x: Array) -> Array:
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


def nearest(x: Array) -> Array:
    return x  # rounded when it becomes the result's type


# --- Exact sums and products ------------------------------------------------------------------------------------------


def rounded(exact: Fraction, mode: str, type_: Any) -> float:
    """A number to a type."""
    largest = np.finfo(type_).max
    excess = abs(exact) - Fraction(float(largest))
    if excess > 0:
        half_ulp = Fraction(float(largest - np.nextafter(largest, type_(0)))) / 2
        outward = excess >= half_ulp if mode == "rn" else mode == ("rp" if exact > 0 else "rm")
        return (1 if exact > 0 else -1) * (math.inf if outward else float(largest))
    near = type_(float(exact))
    candidates = [
        c for c in (np.nextafter(near, type_(-np.inf)), near, np.nextafter(near, type_(np.inf))) if np.isfinite(c)
    ]
    below = max((c for c in candidates if Fraction(float(c)) <= exact), key=float)
    above = min((c for c in candidates if Fraction(float(c)) >= exact), key=float)
    if mode in ("rm", "rp", "rz"):
        return float(below if mode == "rm" or (mode == "rz" and exact > 0) else above)
    low, high = exact - Fraction(float(below)), Fraction(float(above)) - exact
    even = below if int(below.view(f"u{below.itemsize}")) % 2 == 0 else above
    return float(even if low == high else below if low < high else above)


def exactly(function: Callable[..., Any], mode: str, type_: Any) -> Callable[..., Array]:
    """A function of fractions, rounded once; of floats for NaN, infinities and the sign of zero."""

    def each(*values: Any) -> float:
        exact = function(*map(Fraction, map(float, values))) if np.isfinite(values).all() else 0
        return rounded(exact, mode, type_) if exact else float(function(*map(np.float64, values)))

    return lambda *arrays: np.array([each(*values) for values in zip(*arrays, strict=True)])


def sum_of_product(a: Any, b: Any, c: Any) -> Any:
    return a * b + c


def of_flushed(function: Callable[..., Array]) -> Callable[..., Array]:
    return lambda *arrays: flush(function(*map(flush, arrays)).astype(np.float32))


# --- The table --------------------------------------------------------------------------------------------------------


def wrapping(function: Callable[..., Any], bits: int) -> Callable[..., Array]:
    """Integers of any length, cut to the lowest bits."""

    def each(*values: Any) -> int:
        return int(function(*map(int, values))) % (1 << bits)

    return lambda *arrays: np.array([each(*values) for values in zip(*arrays, strict=True)], dtype=f"u{bits // 8}")


def truncated(a: int, b: int) -> int:
    """Division of C; by zero all bits are ones."""
    return -1 if b == 0 else abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def remainder(a: int, b: int) -> int:
    return a if b == 0 else a - truncated(a, b) * b


def signed_field(a: int, start: int, length: int) -> int:
    """The lowest ``length`` % 256 bits of a >> ``start`` % 256, with their sign."""
    start, length = start % 256, length % 256
    field = a >> start & (1 << length) - 1
    return field - (1 << length) if length and field >> (length - 1) else field


def number_first(function: Callable[..., Array]) -> Callable[..., Array]:
    """Minimum or maximum that prefers a number to NaN, and knows the sign of zeros."""

    def ordered(a: Array, b: Array) -> Array:
        zero = (a == 0) & (b == 0)
        negative = np.signbit(a) | np.signbit(b) if function is np.fmin else np.signbit(a) & np.signbit(b)
        return np.where(zero, np.where(negative, -0.0, 0.0).astype(a.dtype), function(a, b))

    return ordered


def nan_first(function: Callable[..., Array]) -> Callable[..., Array]:
    ordered = number_first(function)
    return lambda a, b: np.where(np.isnan(a) | np.isnan(b), np.nan, ordered(a, b)).astype(a.dtype)


def bits16(x: Array, type_: str) -> Array:
    """The bits of float32 numbers in a 16-bit type; NaN as NVIDIA has it."""
    bits = torch.from_numpy(x).to(DTYPES[type_]).view(torch.int16).numpy().astype(np.uint16)
    return np.where(np.isnan(x), 0x7FFF, bits)


FLOATS = {"f32": np.float32, "f64": np.float64, "f16": np.float16}
SIGNS = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
FORMS = [
    *(
        Form(f"{name}.{t}", f"{t} {t}", t, function)
        for name, function in SIGNS.items()
        for t in ("f32", "f64", "f16", "bf16")
        if not (name == "sub" and t == "f16")
    ),
    *(Form(f"{name}.ftz.f32", "f32 f32", "f32", of_flushed(function)) for name, function in SIGNS.items()),
    *(
        Form(f"{name}.{mode}.f32", "f32 f32", "f32", exactly(function, mode, np.float32))
        for name, function in (("add", operator.add), ("sub", operator.sub), ("mul", operator.mul))
        for mode in ("rz", "rm", "rp")
    ),
    *(Form(f"fma.rn.{t}", f"{t} {t} {t}", t, exactly(sum_of_product, "rn", FLOATS[t])) for t in FLOATS),
    *(Form(f"fma.{m}.f32", "f32 f32 f32", "f32", exactly(sum_of_product, m, np.float32)) for m in ("rz", "rm", "rp")),
    *(
        Form(f"fma.{mode}.ftz.f32", "f32 f32 f32", "f32", of_flushed(exactly(sum_of_product, mode, np.float32)))
        for mode in ("rn", "rm")
    ),
    Form("add.rz.ftz.f32", "f32 f32", "f32", of_flushed(exactly(operator.add, "rz", np.float32))),
    Form("div.rn.f32", "f32 f32", "f32", np.divide),
    Form("div.rn.f64", "f64 f64", "f64", np.divide),
    Form("sqrt.rn.f32", "f32", "f32", np.sqrt),
    *(Form(f"rcp.rn.{t}", t, t, lambda x: (1 / x.astype(np.float64)).astype(x.dtype)) for t in ("f32", "f64")),
    # Integers.
    *(
        Form(f"{name}.{t}", f"{t} {t}", "u" + t[1:], wrapping(function, int(t[1:])))
        for name, function in (("add", operator.add), ("sub", operator.sub), ("mul.lo", operator.mul))
        for t in ("s16", "s32", "s64", "u32", "u64")
    ),
    *(
        Form(f"{name}.{t}", f"{t} {t}", "u" + t[1:], wrapping(function, int(t[1:])))
        for name, function in (("div", truncated), ("rem", remainder))
        for t in ("s16", "s32", "s64", "u16", "u32", "u64")
    ),
    *(
        Form(f"mul.hi.{t}", f"{t} {t}", "u" + t[1:], wrapping(lambda a, b, n=int(t[1:]): a * b >> n, int(t[1:])))
        for t in ("s32", "u32", "s64", "u64")
    ),
    *(Form(f"mul.wide.{t}", f"{t} {t}", "u64", wrapping(operator.mul, 64)) for t in ("s32", "u32")),
    *(Form(f"mul.wide.{t}", f"{t} {t}", "u32", wrapping(operator.mul, 32)) for t in ("s16", "u16")),
    *(Form(f"mad.lo.{t}", f"{t} {t} {t}", f"u{t[1:]}", wrapping(sum_of_product, int(t[1:]))) for t in ("s32", "s64")),
    *(Form(f"mad.wide.{t}", f"{t} {t} u64", "u64", wrapping(sum_of_product, 64)) for t in ("s32", "u32")),
    *(
        Form(f"{name}.{t}", f"{t} {t}", t, function)
        for name, function in (("min", np.minimum), ("max", np.maximum))
        for t in ("s16", "s32", "s64", "u32")
    ),
    Form("abs.s32", "s32", "u32", wrapping(abs, 32)),
    *(Form(f"neg.{t}", t, "u" + t[1:], wrapping(operator.neg, int(t[1:]))) for t in ("s32", "s64")),
    # Signs and order of floats.
    *(
        Form(f"{name}.{t}", f"{t} {t}", t, number_first(function))
        for name, function in (("min", np.fmin), ("max", np.fmax))
        for t in ("f32", "f64", "f16", "bf16")
    ),
    *(
        Form(f"{name}.NaN.{t}", f"{t} {t}", t, nan_first(function))
        for name, function in (("min", np.fmin), ("max", np.fmax))
        for t in ("f32", "f16", "bf16")
    ),
    *(
        Form(f"{name}.{t}", t, t, function)
        for name, function in (("abs", np.abs), ("neg", np.negative))
        for t in ("f32", "f64", "f16", "bf16")
    ),
    Form("abs.ftz.f32", "f32", "f32", lambda x: flush(np.abs(x))),
    *(Form(f"copysign.{t}", f"{t} {t}", t, lambda sign, x: np.copysign(x, sign)) for t in ("f32", "f64")),
    # Bits.
    *(
        Form(f"{name}.b{n}", f"u{n} u{n}", f"u{n}", function)
        for name, function in (("and", np.bitwise_and), ("or", np.bitwise_or), ("xor", np.bitwise_xor))
        for n in (16, 32, 64)
    ),
    *(Form(f"not.b{n}", f"u{n}", f"u{n}", np.bitwise_not) for n in (16, 32, 64)),
    *(Form(f"shl.b{n}", f"u{n} u32", f"u{n}", wrapping(lambda a, k: a << min(k, 64), n)) for n in (16, 32, 64)),
    *(
        Form(f"shr.{t}", f"{t} u32", "u" + t[1:], wrapping(lambda a, k: a >> min(k, 64), int(t[1:])))
        for t in ("s16", "u16", "s32", "u32", "s64", "u64")
    ),
    Form("shf.l.wrap.b32", "u32 u32 u32", "u32", wrapping(lambda a, b, k: ((b << 32 | a) << k % 32) >> 32, 32)),
    Form("shf.r.wrap.b32", "u32 u32 u32", "u32", wrapping(lambda a, b, k: (b << 32 | a) >> k % 32, 32)),
    Form("shf.l.clamp.b32", "u32 u32 u32", "u32", wrapping(lambda a, b, k: ((b << 32 | a) << min(k, 32)) >> 32, 32)),
    Form("shf.r.clamp.b32", "u32 u32 u32", "u32", wrapping(lambda a, b, k: (b << 32 | a) >> min(k, 32), 32)),
    Form("popc.b32", "u32", "u32", wrapping(lambda a: a.bit_count(), 32)),
    Form("clz.b32", "u32", "u32", wrapping(lambda a: 32 - a.bit_length(), 32)),
    Form("brev.b32", "u32", "u32", wrapping(lambda a: int(f"{a:032b}"[::-1], 2), 32)),
    *(
        Form(f"bfe.{t}", f"{t} u32 u32", t, wrapping(lambda a, s, n: a >> s % 256 & (1 << n % 256) - 1, int(t[1:])))
        for t in ("u32", "u64")
    ),
    Form("bfe.s32", "s32 u32 u32", "u32", wrapping(signed_field, 32)),
    Form(
        "lop3.b32",
        "u32 u32 u32",
        "u32",
        wrapping(lambda a, b, c: a & b ^ c, 32),
        "INSTRUCTION %r0, %a0, %a1, %a2, 106;",
    ),
    Form(
        "prmt.b32",
        "u32 u32",
        "u32",
        wrapping(lambda a, b: a >> 24 & 255 | (a & 255) << 8 | (b & 255) << 16 | (b >> 8 & 255) << 24, 32),
        "INSTRUCTION %r0, %a0, %a1, 0x5403;",
    ),
    # Conversions.
    *(
        Form(f"cvt.{rounding}{b}.{a}", a, b, nearest)
        for rounding, pairs in {
            "": ("f16 f32", "f16 f64", "bf16 f32", "bf16 f64", "f32 f64"),
            "rn.": ("f32 f16", "f64 f16", "f64 f32"),
        }.items()
        for a, b in map(str.split, pairs)
    ),
    Form("cvt.rn.bf16.f32", "f32", "bf16", lambda x: torch.from_numpy(x).to(torch.bfloat16)),
    *(Form(f"cvt.rn.{b}.{a}", a, b, nearest) for a in ("s32", "u32", "s64") for b in ("f32", "f64")),
    *(Form(f"cvt.{m}.f32.f32", "f32", "f32", f) for m, f in (("rni", np.rint), ("rmi", np.floor), ("rpi", np.ceil))),
    Form("cvt.rzi.f32.f32", "f32", "f32", np.trunc),
    Form("cvt.ftz.sat.f32.f32", "f32", "f32", lambda x: np.where(x > 0, np.minimum(flush(x), 1), 0).astype(np.float32)),
    *(
        Form(f"cvt.rzi.{t}.f32", "f32", t, lambda x, t=t: _clamped(x, t))
        for t in ("s32", "u32", "s64")
    ),
    *(
        Form(f"cvt.{b}.{a}", a, "u" + b[1:], wrapping(lambda x: x, int(b[1:])))
        for a, b in (("s32", "s64"), ("u32", "u64"), ("u64", "u32"), ("u32", "u16"), ("u16", "u32"), ("s16", "s32"))
    ),
    # Selection.
    *(
        Form(
            f"selp.{t}",
            f"{x} {x} u32",
            x,
            lambda a, b, c: np.where(c < 50, a, b),
            "setp.lt.u32 %p, %a2, 50; INSTRUCTION %r0, %a0, %a1, %p;",
        )
        for t, x in (("b16", "u16"), ("b32", "u32"), ("b64", "u64"), ("f32", "f32"), ("f64", "f64"))
    ),
    Form(
        "not.pred",
        "u32",
        "u32",
        lambda a: a >= 50,
        "setp.lt.u32 %p, %a0, 50; INSTRUCTION %p, %p; selp.b32 %r0, 1, 0, %p;",
    ),
    *(
        Form(f"setp.{name}.{t}", f"{t} {t}", "u32", function, "INSTRUCTION %p, %a0, %a1; selp.b32 %r0, 1, 0, %p;")
        for t in ("s16", "s32", "s64", "u32", "u64", "f16", "f32", "f64")
        for name, function in {
            "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "eq": np.equal,
            "ne": np.not_equal if "f" not in t else lambda a, b: (a < b) | (a > b),
        }.items()
    ),
    *(
        Form(
            f"setp.{name}.{t}",
            f"{t} {t}",
            "u32",
            lambda a, b, f=function: np.isnan(a) | np.isnan(b) | f(a, b),
            "INSTRUCTION %p, %a0, %a1; selp.b32 %r0, 1, 0, %p;",
        )
        for t in ("f32", "f64")
        for name, function in {
            "ltu": np.less, "leu": np.less_equal, "gtu": np.greater, "geu": np.greater_equal, "equ": np.equal,
            "neu": np.not_equal,
        }.items()
    ),
    Form(
        "setp.nan.f32",
        "f32 f32",
        "u32",
        lambda a, b: np.isnan(a) | np.isnan(b),
        "INSTRUCTION %p, %a0, %a1; selp.b32 %r0, 1, 0, %p;",
    ),
    *(
        Form(
            f"setp.{name}.f16x2",
            "f16 f16 f16 f16",
            "u32",
            lambda a, b, c, d, f=f: f(a, c) * 1 + f(b, d) * 2,
            """{ .reg .b32 %v, %w, %one; mov.b32 %v, {%a0, %a1}; mov.b32 %w, {%a2, %a3};
            INSTRUCTION %p|%q, %v, %w; selp.b32 %r0, 1, 0, %p; selp.b32 %one, 2, 0, %q; or.b32 %r0, %r0, %one; }""",
        )
        for name, f in {
            "lt": np.less, "le": np.less_equal, "gt": np.greater,
            "nan": lambda a, b: np.isnan(a) | np.isnan(b), "num": lambda a, b: ~np.isnan(a) & ~np.isnan(b),
        }.items()
    ),
    *(
        Form(
            f"setp.{name}.{t}",
            f"{t} {t}",
            "u32",
            function,
            "INSTRUCTION %p, %a0, %a1; selp.b32 %r0, 1, 0, %p;",
        )
        for t in ("f16", "f32", "f64")
        for name, function in {
            "nan": lambda a, b: np.isnan(a) | np.isnan(b),
            "num": lambda a, b: ~np.isnan(a) & ~np.isnan(b),
        }.items()
        if (name, t) != ("nan", "f32")
    ),
    *(
        Form(f"setp.{name}.b{n}", f"u{n} u{n}", "u32", f, "INSTRUCTION %p, %a0, %a1; selp.b32 %r0, 1, 0, %p;")
        for n in (16, 32, 64)
        for name, f in (("eq", np.equal), ("ne", np.not_equal))
    ),
    *(
        Form(
            f"{name}.pred",
            "u32 u32",
            "u32",
            lambda a, b, f=f: f(a < 50, b < 50),
            "setp.lt.u32 %p, %a0, 50; setp.lt.u32 %q, %a1, 50; INSTRUCTION %p, %p, %q; selp.b32 %r0, 1, 0, %p;",
        )
        for name, f in (("and", np.logical_and), ("or", np.logical_or), ("xor", np.logical_xor))
    ),
    Form("add.rn.f64", "f64 f64", "f64", np.add),
    Form("sqrt.rn.f64", "f64", "f64", np.sqrt),
    Form("fma.rn.bf16", "bf16 bf16 bf16", "bf16", lambda a, b, c: a * b + c),
    *(
        Form(
            f"cvt.rn.{t}x2.f32",
            "f32 f32",
            "u32",
            lambda a, b, t=t: wrapping(lambda x, y: y | x << 16, 32)(*(bits16(v, t) for v in (a, b))),
        )
        for t in ("f16", "bf16")
    ),
    *(
        Form(
            f"{name}.f16x2",
            "f16 f16 f16",
            "f16",
            lambda a, b, c, f=f: f(b, c),
            """{ .reg .b32 %v, %w; .reg .b16 %low; mov.b32 %v, {%a0, %a1}; mov.b32 %w, {%a0, %a2};
            INSTRUCTION %v, %v, %w; mov.b32 {%low, %r0}, %v; }""",
        )
        for name, f in (("add", np.add), ("mul", np.multiply))
    ),
    Form(
        "fma.rn.bf16x2",
        "bf16 bf16 bf16",
        "bf16",
        lambda a, b, c: a * b + c,
        """{ .reg .b32 %u, %v, %w; .reg .b16 %low; mov.b32 %u, {%a1, %a0}; mov.b32 %v, {%a0, %a1};
        mov.b32 %w, {%a0, %a2}; INSTRUCTION %u, %u, %v, %w; mov.b32 {%low, %r0}, %u; }""",
    ),
    *(
        Form(f"cvt.{b}.{a}", a, "u" + b[1:], wrapping(lambda x: x, int(b[1:])))
        for a, b in (("u16", "u64"), ("u64", "u16"))
    ),
    Form("mov.b64", "u32 u32", "u64", wrapping(lambda a, b: a | b << 32, 64), "INSTRUCTION %r0, {%a0, %a1};"),
]  # fmt: skip


def _clamped(x: Array, type_: str) -> Array:
    """Into an integer's range, NaN to 0, or to the smallest 64-bit integer."""
    bits, signed = int(type_[1:]), type_[0] == "s"
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)

    def each(value: float) -> int:
        if math.isnan(value):
            return low if bits == 64 else 0
        return int(min(max(value, low), high)) if math.isfinite(value) else low if value < 0 else high

    return np.array([min(max(each(float(value)), low), high) for value in x], dtype=NUMPY[type_])


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.instruction)
def test_is_exact(form: Form) -> None:
    operands, result = form.run()
    expected = form.reference(operands)
    if any(f".{mode}." in form.instruction for mode in ("rz", "rm", "rp")):
        result, expected = result + 0.0, expected + 0.0  # an exact zero's sign apart
    wrong = ~same(result, expected)
    values = [each[wrong][:3].tolist() for each in (*operands, result, expected)]
    assert not wrong.any(), f"{int(wrong.sum())} of {len(wrong)}: operands, result, expected {values}"


def test_notices_a_wrong_result() -> None:
    operands, result = Form("add.f32", "f32 f32", "f32", np.subtract).run()
    assert not same(result, Form("add.f32", "f32 f32", "f32", np.subtract).reference(operands)).all()


# --- Warps ------------------------------------------------------------------------------------------------------------

LANES = torch.arange(32)
SHUFFLES = {
    "bfly": ("5, 31", LANES ^ 5),
    "up": ("3, 0", torch.where(LANES >= 3, LANES - 3, LANES)),
    "down": ("3, 31", torch.where(LANES < 29, LANES + 3, LANES)),
    "idx": ("7, 31", torch.full((32,), 7)),
}


@pytest.mark.parametrize("mode", SHUFFLES)
def test_shuffle(mode: str) -> None:
    rest, source = SHUFFLES[mode]
    x = torch.randint(-(2**31), 2**31 - 1, (32,), dtype=torch.int32)
    (y,) = execute(f"shfl.sync.{mode}.b32 %r0, %a0, {rest}, -1;", x, results=[torch.int32])
    assert torch.equal(y, x[source])


@pytest.mark.parametrize(
    ("operation", "function"),
    [
        ("add.s32", lambda x: x.sum()),
        ("min.s32", lambda x: x.min()),
        ("max.s32", lambda x: x.max()),
        ("max.u32", lambda x: x[(x.long() % 2**32).argmax()]),
        ("or.b32", lambda x: np.bitwise_or.reduce(x.numpy())),
        ("xor.b32", lambda x: np.bitwise_xor.reduce(x.numpy())),
    ],
)
def test_reduction(operation: str, function: Callable[[Tensor], Any]) -> None:
    x = torch.randint(-1000, 1000, (32,), dtype=torch.int32)
    (y,) = execute(f"redux.sync.{operation} %r0, %a0, -1;", x, results=[torch.int32])
    assert (y == int(function(x))).all()


def test_votes() -> None:
    x = torch.arange(32, dtype=torch.int32)
    body = """
        setp.lt.s32 %p, %a0, 5;
        vote.sync.ballot.b32 %r0, %p, -1;
        vote.sync.any.pred %q, %p, -1; selp.b32 %r1, 1, 0, %q;
        vote.sync.all.pred %q, %p, -1; selp.b32 %r2, 1, 0, %q;
    """
    ballot, any_, all_ = execute(body, x, results=[torch.int32] * 3)
    assert ballot.tolist() == [31] * 32
    assert any_.all()
    assert not all_.any()


def test_matrices_in_shared_memory() -> None:
    """`stmatrix` lays out what `ldmatrix` reads; transposed it is the transposed matrix."""
    x = torch.randint(0, 2**15, (32, 2), dtype=torch.int16)
    packed = x.view(torch.int32).flatten()
    body = """
        { .reg .b32 %row; and.b32 %row, %i, 7; shl.b32 %row, %row, 4;
        stmatrix.sync.aligned.m8n8.x1.shared.b16 [%row], {%a0};
        ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r0}, [%row];
        ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%r1}, [%row]; }
    """
    plain, transposed = execute(body, packed, results=[torch.int32] * 2, shared_bytes=128)
    assert torch.equal(plain, packed)
    matrix = x.reshape(8, 8)
    assert torch.equal(transposed.view(torch.int16).reshape(8, 8), matrix.T)


@pytest.mark.parametrize("opcode", ["add.f32", "add.s32", "max.s32", "min.u32", "and.b32", "or.b32", "exch.b32"])
def test_atomic(opcode: str) -> None:
    kind = torch.float32 if "f32" in opcode else torch.int32
    x = torch.arange(1, 33).to(kind)
    target = x.clone()
    name, _, _ = opcode.partition(".")
    execute(f"atom.global.{opcode} %r0, [%x1], %a0;", x, target, results=[kind])
    operations = {"add": torch.sum, "max": torch.max, "min": torch.min, "exch": lambda v: v[-1]}
    operations |= {"and": lambda v: np.bitwise_and.reduce(v.numpy()), "or": lambda v: np.bitwise_or.reduce(v.numpy())}
    started = [1] if name == "add" else []  # the first element was there before
    assert target[0] == (operations[name](x) + sum(started))
    assert torch.equal(target[1:], x[1:])
