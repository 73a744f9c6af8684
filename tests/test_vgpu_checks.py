"""What the virtual GPU notices: each check is set off by a kernel with one fault."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from support.ptx import execute
from torch import Tensor
from vgpu import DeviceAssertionError, VirtualGpuError, counted, machine_options
from vgpu.launch import Argument, run
from vgpu.program import LoadedKernel
from vgpu.ptx import PtxError
from vgpu.steps import Unsupported

pytestmark = pytest.mark.compiled


# --- Memory -----------------------------------------------------------------------------------------------------------


@triton.jit
def copy_kernel(x, y, n, BLOCK: tl.constexpr, BEFORE: tl.constexpr, MASKED: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n if MASKED else i < n + BLOCK
    tl.store(y + i, tl.load(x + i - BEFORE, mask=mask), mask=i < n)


def test_right_accesses_pass() -> None:
    x, y = torch.randn(1000), torch.zeros(1000)
    copy_kernel[(8,)](x, y, 1000, BLOCK=128, BEFORE=0, MASKED=True)
    assert torch.equal(x, y)


def test_a_wrong_mask_on_the_tail() -> None:
    x, y = torch.randn(1001), torch.zeros(1001)
    with pytest.raises(
        VirtualGpuError, match=r"outside every tensor[^$]*test_vgpu_checks.py[^$]*\+0 bytes from its end"
    ):
        copy_kernel[(8,)](x, y, 1001, BLOCK=128, BEFORE=0, MASKED=False)


def test_an_element_before_the_tensor() -> None:
    memory = torch.randn(1001)  # the element is there, but isn't the tensor's
    with pytest.raises(VirtualGpuError, match=r"outside every tensor[^$]*-4 from its start"):
        copy_kernel[(8,)](memory[1:], torch.zeros(1000), 1000, BLOCK=128, BEFORE=1, MASKED=True)


def test_an_unaligned_vector_access() -> None:
    """Triton compiles vector accesses for aligned tensors; the same kernel is then launched on one that isn't."""
    x, y = torch.randn(1028), torch.zeros(1028)
    kernel = copy_kernel[(4,)](x[4:], y[4:], 1024, BLOCK=256, BEFORE=0, MASKED=True)
    assert "ld.global.v" in kernel.asm["ptx"]
    with pytest.raises(VirtualGpuError, match="misaligned"):
        kernel[(4, 1, 1)](x[1:], y[1:], 1024, 256, 0, True)
    copy_kernel[(4,)](x[1:], y[1:], 1024, BLOCK=256, BEFORE=0, MASKED=True)  # specialised anew
    assert torch.equal(x[1:1025], y[1:1025])


def test_shared_memory_has_an_end() -> None:
    execute(
        "st.shared.b32 [60], %a0; ld.shared.b32 %r0, [60];", torch.arange(32), results=[torch.int64], shared_bytes=64
    )
    with pytest.raises(VirtualGpuError, match="shared memory out of bounds"):
        execute("st.shared.b32 [64], %a0;", torch.arange(32), results=[torch.int64], shared_bytes=64)
    with pytest.raises(VirtualGpuError, match="misaligned"):
        execute("st.shared.b32 [2], %a0;", torch.arange(32), results=[torch.int64], shared_bytes=64)


def test_local_memory_has_an_end() -> None:
    """Of 16 bytes that a thread keeps for itself."""
    body = """
        {{ .reg .b64 %place; mov.u64 %place, depot; st.local.b32 [%place+{offset}], %a0;
        ld.local.b32 %r0, [%place+{offset}]; }}
    """
    depot, x = ".local .align 16 .b8 depot[16];", torch.arange(32, dtype=torch.int32)
    (y,) = execute(body.format(offset=12), x, results=[torch.int32], declarations=depot)
    assert torch.equal(y, x)
    with pytest.raises(VirtualGpuError, match="local memory out of bounds"):
        execute(body.format(offset=16), x, results=[torch.int32], declarations=depot)


def test_what_nobody_wrote_is_nan() -> None:
    register, shared = execute(
        "mov.b32 %r0, %unset; ld.shared.b32 %r1, [0];",
        torch.arange(32),
        results=[torch.float32] * 2,
        declarations=".reg .b32 %unset;",
        shared_bytes=64,
    )
    assert register.isnan().all()
    assert shared.isnan().all()


def test_registers_are_forgotten_between_launches() -> None:
    body, unset = "setp.eq.s64 %p, %a0, 1; @%p mov.b32 %kept, 0; mov.b32 %r0, %kept;", ".reg .b32 %kept;"
    for value in (1, 2):
        x = torch.full((32,), value)
        (result,) = execute(body, x, results=[torch.float32], declarations=unset)
        assert result.isnan().all() == (value == 2)


# --- Lanes, warps, programs -------------------------------------------------------------------------------------------


def reversal(barrier: bool) -> list[Tensor]:
    """128 threads exchange their values through shared memory, with a barrier in between or without."""
    body = f"""
        {{ .reg .b32 %mine, %others;
        shl.b32 %mine, %i, 2; sub.s32 %others, 508, %mine;
        st.shared.b32 [%mine], %a0; {"bar.sync 0;" if barrier else ""} ld.shared.b32 %r0, [%others]; }}
    """
    return execute(body, torch.arange(128.0), results=[torch.float32], threads=128, shared_bytes=512)


@pytest.mark.parametrize("order", ["forward", "reversed", "shuffled"])
def test_a_missing_barrier(order: str) -> None:
    with machine_options(order=order):
        (exchanged,) = reversal(True)
        assert torch.equal(exchanged, torch.arange(128.0).flip(0))
        with pytest.raises(VirtualGpuError, match=r"without a barrier[^$]*which warp \d used"):
            reversal(False)


@pytest.mark.parametrize("barrier", [True, False])
def test_a_missing_barrier_before_memory_is_used_again(barrier: bool) -> None:
    """All read the first word, and then the last warp writes it."""
    body = f"""
        setp.eq.s32 %p, %i, 0; @%p st.shared.b32 [0], %a0; bar.sync 0; ld.shared.b32 %r0, [0];
        {"bar.sync 0;" if barrier else ""} setp.eq.s32 %p, %i, 127; @%p st.shared.b32 [0], %a0;
    """
    with nullcontext() if barrier else pytest.raises(VirtualGpuError, match=r"st.shared[^$]*which several warps used"):
        (first,) = execute(body, torch.arange(128.0), results=[torch.float32], threads=128, shared_bytes=4)
        assert not first.any()


def test_warps_may_write_the_same_and_read_their_own() -> None:
    same = "st.shared.b32 [0], 7; mov.b32 %r0, 0;"
    execute(same, torch.arange(64), results=[torch.int32], threads=64, shared_bytes=4)
    body = "{ .reg .b32 %mine; shl.b32 %mine, %i, 2; st.shared.b32 [%mine], %a0; ld.shared.b32 %r0, [%mine]; }"
    (own,) = execute(body, torch.arange(64.0), results=[torch.float32], threads=64, shared_bytes=256)
    assert torch.equal(own, torch.arange(64.0))


def test_a_barrier_that_some_warps_miss() -> None:
    body = "setp.lt.s32 %p, %i, 32; @%p bra SKIP; bar.sync 0, 128; SKIP: mov.b32 %r0, 0;"
    with pytest.raises(VirtualGpuError, match="deadlock"):
        execute(body, torch.arange(128), results=[torch.int32], threads=128)


def test_a_barrier_that_some_lanes_miss() -> None:
    body = "setp.lt.s32 %p, %i, 7; @%p bar.sync 0; mov.b32 %r0, 0;"
    with pytest.raises(VirtualGpuError, match="meet at different instructions"):
        execute(body, torch.arange(32), results=[torch.int32])


def test_a_shuffle_that_a_named_lane_misses() -> None:
    body = "mov.b32 %r0, 0; setp.lt.s32 %p, %i, 7; @%p shfl.sync.bfly.b32 %r0, %a0, 1, 31, {members};"
    execute(body.format(members=0x7F), torch.arange(32, dtype=torch.int32), results=[torch.int32])
    with pytest.raises(VirtualGpuError, match="meet at different instructions"):
        execute(body.format(members=-1), torch.arange(32, dtype=torch.int32), results=[torch.int32])


def test_lanes_that_part_come_together_again() -> None:
    """Loops of different lengths, then a shuffle of all lanes."""
    body = """
        mov.b32 %r0, 0;
        AGAIN: add.s32 %r0, %r0, 1; setp.lt.s32 %p, %r0, %a0; @%p bra AGAIN;
        shfl.sync.bfly.b32 %r1, %r0, 31, 31, -1;
    """
    counts = torch.randperm(32, dtype=torch.int32) + 1
    own, others = execute(body, counts, results=[torch.int32] * 2)
    assert torch.equal(own, counts)
    assert torch.equal(others, counts.flip(0))


def test_a_barrier_waits_for_lanes_that_lie_behind() -> None:
    """The way of some lanes lies behind the barrier in the program."""
    body = """
        setp.lt.s32 %p, %i, 16; @%p bra SLOW; mov.b32 %r0, 1;
        JOIN: bar.sync 0; bra END;
        SLOW: mov.b32 %r0, 2; bra JOIN;
        END:
    """
    (y,) = execute(body, torch.arange(32), results=[torch.int32])
    assert y.tolist() == [2] * 16 + [1] * 16


def test_an_endless_loop() -> None:
    with machine_options(instruction_limit=1000), pytest.raises(VirtualGpuError, match="endless loop"):
        execute("AGAIN: bra AGAIN;", torch.arange(32), results=[torch.int32])


def test_a_trap() -> None:
    body = "setp.eq.s32 %p, %i, {thread}; @%p trap; mov.b32 %r0, 0;"
    execute(body.format(thread=99), torch.arange(64), results=[torch.int32])
    with pytest.raises(VirtualGpuError, match=r"trap[^$]*program \(1, 0, 0\) of \(2, 1, 1\), thread 3 of 32"):
        execute(body.format(thread=35), torch.arange(64), results=[torch.int32])


def test_a_grid_that_is_too_large() -> None:
    with pytest.raises(VirtualGpuError, match="larger than CUDA allows"):
        copy_kernel[(1, 2**16)](torch.ones(1), torch.ones(1), 1, BLOCK=1, BEFORE=0, MASKED=True)


@triton.jit
def chain_kernel(x, y, n):
    """Each program reads what the one before it wrote: wrong, since programs have no order."""
    i = tl.program_id(0)
    before = tl.load(y + i - 1, mask=i > 0, other=0.0)
    tl.store(y + i, before + tl.load(x + i))


def test_the_order_of_programs_shows() -> None:
    x, results = torch.ones(9), []
    for order in ("forward", "reversed", "shuffled"):
        y = torch.zeros(9)
        with machine_options(order=order):
            chain_kernel[(9,)](x, y, 9)
        results.append(y.tolist())
    assert results[0] == list(range(1, 10))
    assert results[1] == [1] * 9
    assert results[2] not in results[:2]


def test_a_window_of_programs() -> None:
    x, y = torch.ones(9), torch.zeros(9)
    with machine_options(window=(2, 3)):
        copy_kernel[(9,)](x, y, 9, BLOCK=1, BEFORE=0, MASKED=True)
    assert y.tolist() == [1, 1, 0, 0, 0, 0, 1, 1, 1]


# --- Asynchronous copies ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("waits", ["", "cp.async.wait_group 1;", "cp.async.wait_group 0;", "cp.async.wait_all;"])
def test_copies_that_nobody_waited_for(waits: str) -> None:
    body = f"""
        {{ .reg .b32 %there; .reg .b64 %from;
        mul.wide.s32 %from, %i, 4; add.s64 %from, %from, %x0; shl.b32 %there, %i, 2;
        cp.async.ca.shared.global [%there], [%from], 4; cp.async.commit_group; {waits} ld.shared.b32 %r0, [%there]; }}
    """
    x = torch.arange(32.0)
    (y,) = execute(body, x, results=[torch.float32], shared_bytes=128)
    if waits in ("", "cp.async.wait_group 1;"):
        assert y.isnan().all()
    else:
        assert torch.equal(y, x)


@pytest.mark.parametrize("order", ["forward", "reversed"])
@pytest.mark.parametrize("missing", [None, 0, 1, 2])
def test_copies_that_others_read_need_barriers(missing: int | None, order: str) -> None:
    """A warp copies, another reads, and the first copies anew, twice: a barrier on each side of a reading."""
    barriers = ["" if n == missing else "bar.sync 0;" for n in range(3)]
    copy = "cp.async.ca.shared.global [%mine], [%from], 4; cp.async.commit_group; cp.async.wait_group 0;"
    body = f"""
        {{ .reg .b32 %mine, %others; .reg .b64 %from;
        mul.wide.s32 %from, %i, 4; add.s64 %from, %from, %x0; shl.b32 %mine, %i, 2; xor.b32 %others, %mine, 252;
        {copy} {barriers[0]} ld.shared.b32 %r0, [%others]; {barriers[1]}
        xor.b64 %from, %from, 4; {copy} {barriers[2]} ld.shared.b32 %r1, [%others]; }}
    """
    x = torch.arange(64.0)
    with machine_options(order=order):
        if missing is None:
            first, second = execute(body, x, results=[torch.float32] * 2, threads=64, shared_bytes=256)
            assert torch.equal(first, x.flip(0))
            assert torch.equal(second, x.view(32, 2).flip(1).flatten().flip(0))
        else:
            with pytest.raises(VirtualGpuError, match="without a barrier"):
                execute(body, x, results=[torch.float32] * 2, threads=64, shared_bytes=256)


# --- Kernels that can't be run ----------------------------------------------------------------------------------------


def test_unknown_instructions_are_named() -> None:
    for body in ("bogus.b32 %r0, %r0;", "add.cc.s32 %r0, %r0, 1;", "ld.global.weird.b32 %r0, [%x0];"):
        with pytest.raises(Unsupported, match=body.split(maxsplit=1)[0].replace(".", r"\.")):
            execute(body, torch.arange(32), results=[torch.int32])
    with pytest.raises(PtxError):
        LoadedKernel(".version 8.3\n.visible .entry a() { ret; } .visible .entry b() { ret; }")


def test_arguments_have_to_fit() -> None:
    ptx = ".version 8.3\n.visible .entry f(.param .u32 a)\n.reqntid 32\n{\n ret;\n}\n"
    run(LoadedKernel(ptx), (1, 1, 1), 0, [Argument("a", "i32", 3)])
    with pytest.raises(VirtualGpuError, match="4 bytes"):
        run(LoadedKernel(ptx), (1, 1, 1), 0, [Argument("a", "i64", 3)])


@triton.jit
def asserting_kernel(x):
    tl.device_assert(tl.load(x) > 0, "must be positive")


def test_device_assertions() -> None:
    asserting_kernel[(1,)](torch.ones(1), debug=True)
    with pytest.raises(DeviceAssertionError, match="must be positive"):
        asserting_kernel[(1,)](torch.zeros(1), debug=True)


# --- Arithmetic that only compiled kernels do -------------------------------------------------------------------------


@triton.jit
def largest_kernel(x, y, PROPAGATES: tl.constexpr):
    a, b = tl.load(x), tl.load(x + 1)
    if PROPAGATES:
        tl.store(y, tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL))
    else:
        tl.store(y, tl.maximum(a, b))


def test_a_maximum_that_drops_nan() -> None:
    """In the interpreter both propagate."""
    x, y = torch.tensor([torch.nan, 1.0]), torch.zeros(1)
    largest_kernel[(1,)](x, y, PROPAGATES=True)
    assert y.isnan()
    largest_kernel[(1,)](x, y, PROPAGATES=False)
    assert y == 1


@triton.jit
def narrow_kernel(x, y, n, BLOCK: tl.constexpr, TRUNCATES: tl.constexpr):
    i = tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < n)
    if TRUNCATES:
        bits = (value.to(tl.int32, bitcast=True) >> 16).to(tl.int16)
        tl.store(y + i, bits.to(tl.bfloat16, bitcast=True), mask=i < n)
    else:
        tl.store(y + i, value, mask=i < n)


def test_a_truncating_conversion() -> None:
    """In the interpreter both truncate."""
    x, y = torch.randn(300), torch.zeros(300, dtype=torch.bfloat16)
    narrow_kernel[(1,)](x, y, 300, BLOCK=512, TRUNCATES=False)
    assert torch.equal(y, x.bfloat16())
    narrow_kernel[(1,)](x, y, 300, BLOCK=512, TRUNCATES=True)
    assert not torch.equal(y, x.bfloat16())


@triton.jit
def widening_kernel(y, n, WIDENS: tl.constexpr):
    tl.store(y, n.to(tl.int64) if WIDENS else n * 1)


def test_an_argument_of_1_is_a_constant() -> None:
    """In the interpreter it never is."""
    y = torch.zeros(1, dtype=torch.int64)
    widening_kernel[(1,)](y, 2, WIDENS=True)
    assert y == 2
    with pytest.raises(triton.CompilationError, match="to"):
        widening_kernel[(1,)](y, 1, WIDENS=True)
    widening_kernel[(1,)](y, 1, WIDENS=False)
    assert y == 1


# --- Counters ---------------------------------------------------------------------------------------------------------


@triton.jit
def strided_kernel(x, y, stride: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i * stride))


@pytest.mark.parametrize(("stride", "sectors"), [(1, 16), (2, 32), (8, 128), (32, 128)])
def test_sectors_are_counted(stride: int, sectors: int) -> None:
    x, y = torch.randn(128 * stride), torch.zeros(128)
    with counted() as counts:
        strided_kernel[(1,)](x, y, stride, BLOCK=128)
    (launch,) = counts
    assert launch.kernel == "strided_kernel"
    assert (launch.loads.sectors, launch.loads.bytes_used) == (sectors, 512)
    assert (launch.stores.sectors, launch.stores.bytes_used) == (16, 512)
    assert launch.instructions["global load"] >= 1


@pytest.mark.parametrize(("stride", "waves"), [(4, 1), (8, 2), (128, 32), (0, 1)])
def test_bank_conflicts_are_counted(stride: int, waves: int) -> None:
    body = f"{{ .reg .b32 %place; mul.lo.s32 %place, %i, {stride}; ld.shared.b32 %r0, [%place]; }}"
    with counted() as counts:
        execute(body, torch.arange(32), results=[torch.int32], shared_bytes=4096)
    assert counts[0].shared == (1, waves, 1)


# --- Products ---------------------------------------------------------------------------------------------------------


@triton.jit
def product_kernel(
    a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr, ADD: tl.constexpr
):
    rows, columns = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros((BM, BN), ADD)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        x = tl.load(a + rows[:, None] * K + k[None, :], mask=(rows[:, None] < M) & (k[None, :] < K), other=0)
        y = tl.load(b + k[:, None] * N + columns[None, :], mask=(k[:, None] < K) & (columns[None, :] < N), other=0)
        total = tl.dot(x, y, total, input_precision=PRECISION, out_dtype=ADD)
    inside = (rows[:, None] < M) & (columns[None, :] < N)
    tl.store(c + rows[:, None] * N + columns[None, :], total, mask=inside)


def tf32(x: Tensor) -> Tensor:
    """Cut to TF32's 10 bits: tensor cores read no others, and Triton doesn't round operands before."""
    return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)


def exact_tf32(a: Tensor, b: Tensor) -> Tensor:
    return tf32(a).double() @ tf32(b).double()


PRODUCTS: list[tuple[torch.dtype, str, float, Callable[..., Any]]] = [
    (torch.float16, "ieee", 1e-6, lambda a, b: a.double() @ b.double()),
    (torch.bfloat16, "ieee", 1e-6, lambda a, b: a.double() @ b.double()),
    (torch.float32, "tf32", 1e-6, exact_tf32),
    (torch.float32, "tf32x3", 1e-6, lambda a, b: a.double() @ b.double()),
    (torch.float32, "ieee", 1e-6, lambda a, b: a.double() @ b.double()),
    (torch.float64, "ieee", 1e-14, lambda a, b: a @ b),
]


@pytest.mark.parametrize(("dtype", "precision", "tolerance", "exact"), PRODUCTS, ids=lambda value: str(value)[:13])
@pytest.mark.parametrize("stages", [1, 3])
def test_products(
    dtype: torch.dtype, precision: str, tolerance: float, exact: Callable[..., Tensor], stages: int
) -> None:
    m, n, k = 100, 48, 80
    a, b = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
    add = torch.float64 if dtype is torch.float64 else torch.float32
    c = torch.full((m, n), torch.nan, dtype=add)
    kernel = product_kernel[(triton.cdiv(m, 64), triton.cdiv(n, 32))](
        *(a, b, c, m, n, k),
        BM=64,
        BN=32,
        BK=32,
        PRECISION=precision,
        num_stages=stages,
        ADD=tl.float64 if dtype is torch.float64 else tl.float32,
    )
    assert ("mma" in kernel.asm["ptx"]) == ((dtype, precision) != (torch.float32, "ieee"))
    reference = exact(a, b)
    assert (c.double() - reference).norm() / reference.norm() < tolerance
    assert (c.double() - 1.01 * reference).norm() / reference.norm() > tolerance
