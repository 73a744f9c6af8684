"""Conversions between types on the virtual GPU, of all numbers of 16 bits, and of others where rounding turns."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from support.ptx import execute
from torch import Tensor

from fusednn.kernels.base.numerics import narrow, widen

pytestmark = pytest.mark.compiled

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
#: The elements of one.
PROGRAM = 512


# --- Operands ---------------------------------------------------------------------------------------------------------


def all_of(dtype: torch.dtype) -> Tensor:
    """Every bit pattern of up to 16 bits."""
    half = 1 << (8 * dtype.itemsize - 1)
    return torch.arange(-half, half).to(BITS[dtype.itemsize]).view(dtype)


def around(numbers: Tensor) -> Tensor:
    """With the neighbours on both sides."""
    outward = torch.full_like(numbers, torch.inf)
    return torch.cat([numbers, torch.nextafter(numbers, outward), torch.nextafter(numbers, -outward)])


def turning(wide: torch.dtype, narrowed: torch.dtype) -> Tensor:
    """Numbers of ``wide`` around each of ``narrowed``, and around the middle between each two, where rounding turns:
    of 16 bits all, of float32 some.
    """
    if narrowed.itemsize == 2:
        numbers = all_of(narrowed)
    else:
        numbers = torch.randint(-(2**31), 2**31, (10_000,)).to(torch.int32).view(narrowed)
    following = (numbers.view(BITS[narrowed.itemsize]) + 1).view(narrowed)  # past the largest finite one infinity
    middles = numbers.to(wide) / 2 + following.to(wide) / 2
    beyond = torch.tensor([torch.finfo(narrowed).max], dtype=wide) * (1 + torch.finfo(narrowed).eps / 4)
    return around(torch.cat([numbers.to(wide), middles, beyond, -beyond]))


def whole(dtype: torch.dtype, digits: int) -> Tensor:
    """Integers around those that ``digits`` binary digits can't tell apart, in each power of two."""
    most = 8 * dtype.itemsize - 1
    steps = torch.arange(-40, 41)
    places = [(1 << n) + steps * (1 << max(n - digits - 1, 0)) + off for n in range(most) for off in (-1, 0, 1)]
    numbers = torch.cat([*places, torch.tensor([torch.iinfo(dtype).max, torch.iinfo(dtype).min])])
    return torch.cat([numbers, -numbers]).to(dtype)


def filled(x: Tensor) -> Tensor:
    """Up to whole programs."""
    return torch.cat([x, x[: -len(x) % PROGRAM]])


def differing(y: Tensor, expected: Tensor) -> Tensor:
    """Where bits differ, but between two NaNs."""
    bits = BITS[y.itemsize]
    both_nan = y.isnan() & expected.isnan()
    return (y.view(bits) != expected.view(bits)) & ~both_nan


def assert_converted(x: Tensor, y: Tensor, expected: Tensor) -> None:
    wrong = differing(y, expected)
    values = [each[wrong][:3].tolist() for each in (x, y, expected)]
    assert not wrong.any(), f"{int(wrong.sum())} of {len(x)}: from, to, expected {values}"


# --- Instructions -----------------------------------------------------------------------------------------------------


def to(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda x: x.to(dtype)


def cut(x: Tensor) -> Tensor:
    """float32's upper half."""
    return (x.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)


def tf32_to_nearest(x: Tensor) -> Tensor:
    """10 bits of the mantissa; a tie goes away from zero.  Infinity stays, for its mantissa is 0."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def saturated(x: Tensor) -> Tensor:
    """Into [0, 1], NaN to 0."""
    return torch.where(x > 0, x.clamp_max(1), 0.0)


def flushed(x: Tensor) -> Tensor:
    return torch.where(x.abs() < torch.finfo(torch.float32).smallest_normal, 0.0, x)


def finite_float32(narrowed: torch.dtype) -> Callable[[], Tensor]:
    def make() -> Tensor:
        x = turning(torch.float32, narrowed)
        return x[x.isfinite()]

    return make


INSTRUCTIONS: dict[str, tuple[Callable[[], Tensor], Callable[[Tensor], Tensor]]] = {
    "cvt.f32.f16": (lambda: all_of(torch.float16), to(torch.float32)),
    "cvt.f64.f16": (lambda: all_of(torch.float16), to(torch.float64)),
    "cvt.f32.bf16": (lambda: all_of(torch.bfloat16), to(torch.float32)),
    "cvt.rn.f16.f32": (lambda: turning(torch.float32, torch.float16), to(torch.float16)),
    "cvt.rn.bf16.f32": (lambda: turning(torch.float32, torch.bfloat16), to(torch.bfloat16)),
    "cvt.rz.bf16.f32": (finite_float32(torch.bfloat16), cut),
    "cvt.f64.f32": (lambda: turning(torch.float32, torch.bfloat16), to(torch.float64)),
    "cvt.rn.f32.f64": (lambda: turning(torch.float64, torch.float32), to(torch.float32)),
    "cvt.rna.tf32.f32": (finite_float32(torch.float16), tf32_to_nearest),
    "cvt.sat.f32.f32": (lambda: turning(torch.float32, torch.float16), saturated),
    "cvt.ftz.sat.f32.f32": (lambda: turning(torch.float32, torch.float16), lambda x: saturated(flushed(x))),
    "cvt.rni.f32.f32": (lambda: turning(torch.float32, torch.float16), torch.round),
    # Integers: to floating-point numbers, and wider or narrower.
    **{
        f"cvt.rn.f{8 * f.itemsize}.s{8 * i.itemsize}": (lambda i=i, digits=digits: whole(i, digits), to(f))
        for f, digits in ((torch.float32, 24), (torch.float64, 53))
        for i in (torch.int32, torch.int64)
    },
    "cvt.rn.f32.u32": (lambda: whole(torch.uint32, 24), to(torch.float32)),
    "cvt.rn.f64.u32": (lambda: whole(torch.uint32, 53), to(torch.float64)),
    **{
        f"cvt.s{8 * wide.itemsize}.s{8 * x.itemsize}": (lambda x=x: all_of(x), to(wide))
        for x, wide in ((torch.int8, torch.int16), (torch.int8, torch.int32), (torch.int16, torch.int32))
    },
    "cvt.s64.s32": (lambda: whole(torch.int32, 24), to(torch.int64)),
    "cvt.s8.s32": (lambda: whole(torch.int32, 8), to(torch.int8)),
}


@pytest.mark.parametrize("instruction", INSTRUCTIONS)
def test_instruction(instruction: str) -> None:
    make, expected = INSTRUCTIONS[instruction]
    x = filled(make())
    (y,) = execute(f"{instruction} %r0, %a0;", x, results=[expected(x).dtype])
    assert_converted(x, y, expected(x))


WRONG = {
    "cvt.rn.f16.f32": lambda x: torch.nextafter(x, torch.zeros_like(x)).half(),  # ties towards 0
    "cvt.rn.bf16.f32": cut,
    "cvt.rn.f32.f64": lambda x: x.bfloat16().float(),
    "cvt.rna.tf32.f32": lambda x: (x.view(torch.int32) & ~0x1FFF).view(torch.float32),
    "cvt.sat.f32.f32": lambda x: x.clamp(0, 1),  # of NaN NaN
    "cvt.rni.f32.f32": torch.trunc,
    "cvt.rn.f32.s32": lambda x: (x - x.sign()).float(),
}


@pytest.mark.parametrize("instruction", WRONG)
def test_a_wrong_rounding_shows(instruction: str) -> None:
    make, expected = INSTRUCTIONS[instruction]
    x = filled(make())
    with pytest.raises(AssertionError, match="from, to, expected"):
        assert_converted(x, expected(x), WRONG[instruction](x))


# --- Loads and stores of kernels --------------------------------------------------------------------------------------


@triton.jit
def convert_kernel(x, y, COMPUTE: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, narrow(widen(tl.load(x + i), COMPUTE), y.dtype.element_ty))


#: What is loaded, computed in, and stored; and the instruction that makes the difference, of two numbers at once.
KERNELS: dict[str, tuple[Callable[[], Tensor], Any, torch.dtype, str]] = {
    "float16": (lambda: all_of(torch.float16), tl.float32, torch.float32, "cvt.f32.f16"),
    "bfloat16": (lambda: all_of(torch.bfloat16), tl.float32, torch.float32, "cvt.f32.bf16"),
    "float64": (lambda: turning(torch.float64, torch.float32), tl.float32, torch.float32, "cvt.rn.f32.f64"),
    "to float16": (lambda: turning(torch.float32, torch.float16), tl.float32, torch.float16, "cvt.rn.f16x2.f32"),
    "to bfloat16": (lambda: turning(torch.float32, torch.bfloat16), tl.float32, torch.bfloat16, "cvt.rn.bf16x2.f32"),
    "to float64": (lambda: turning(torch.float32, torch.bfloat16), tl.float64, torch.float64, "cvt.f64.f32"),
}


@pytest.mark.parametrize("name", KERNELS)
def test_kernel(name: str) -> None:
    make, compute, result, instruction = KERNELS[name]
    x = filled(make())
    y = torch.empty(len(x), dtype=result)
    kernel = convert_kernel[(len(x) // PROGRAM,)](x, y, COMPUTE=compute, BLOCK=PROGRAM)
    assert instruction in kernel.asm["ptx"]
    assert_converted(x, y, x.to(result))
