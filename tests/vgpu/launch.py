"""Runs one kernel on the machine, and puts into words what went wrong."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from .counters import Counters
from .handlers import handlers
from .program import LoadedKernel

__all__ = [
    "Argument",
    "DeviceAssertionError",
    "Options",
    "VirtualGpuError",
    "address_book",
    "counted",
    "machine_options",
    "run",
]

#: In the order of `enum Error` in machine.h.
_ERRORS = (
    "",
    "global memory outside every tensor of the launch",
    "misaligned address",
    "shared memory out of bounds",
    "local memory out of bounds",
    "trap",
    "assertion",
    "lanes of a warp meet at different instructions",
    "deadlock at a barrier",
    "an endless loop",
    "more than the virtual GPU can do",
    "warps use the same shared memory without a barrier in between",
)
#: `SEVERAL` in memory.h.
_SEVERAL = 63
_ORDERS = ("forward", "reversed", "shuffled")


class VirtualGpuError(RuntimeError):
    """What a GPU reports as an illegal access, a misaligned address and so on; or worse, doesn't."""


class DeviceAssertionError(AssertionError, VirtualGpuError):
    """A device-side assertion."""


@dataclass(frozen=True)
class Options:
    """How launches run.

    ``order`` is that of programs and of the warps in one, ``"forward"``, ``"reversed"`` or ``"shuffled"`` by ``seed``.
    ``nudge`` moves the results of approximate instructions within their documented bounds.  ``window`` runs a grid's
    first and last programs alone, for tensors that are too large to work on.
    """

    order: str = "forward"
    seed: int = 1
    nudge: bool = False
    window: tuple[int, int] = (0, 0)
    instruction_limit: int = 1_000_000_000


_options = Options()
_counts: list[Counters] | None = None
#: Memory that kernels find through addresses in a table, beside their arguments: bytes by address.
address_book: dict[int, int] = {}


@contextmanager
def machine_options(**changes: Any) -> Iterator[None]:
    """Run launches in the ``with`` block with other `Options`."""
    global _options
    before, _options = _options, replace(_options, **changes)
    try:
        yield
    finally:
        _options = before


@contextmanager
def counted() -> Iterator[list[Counters]]:
    """Count what launches in the ``with`` block do: a list that gets an entry for each."""
    global _counts
    before, _counts = _counts, []
    try:
        yield _counts
    finally:
        _counts = before


class Argument(NamedTuple):
    """A run-time argument; ``type`` is Triton's, ``"*fp32"`` for a pointer."""

    name: str
    type: str
    value: Any


class _Launch(ctypes.Structure):
    """`Launch` in machine.h."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("parameters", "program", "ranges", "counters", "registers", "specials")]
        + [(name, ctypes.c_uint64) for name in ("instruction_limit", "head", "tail", "address", "detail")]
        + [(name, ctypes.c_uint32) for name in ("register_bytes", "threads")]
        + [("grid", ctypes.c_uint32 * 3)]
        + [(name, ctypes.c_uint32) for name in ("shared_bytes", "local_bytes", "n_ranges", "order", "seed", "copies")]
        + [(name, ctypes.c_uint32) for name in ("nudge", "error", "index", "thread")]
        + [("program_id", ctypes.c_uint32 * 3)]
    )


def run(loaded: LoadedKernel, grid: tuple[int, int, int], shared_bytes: int, arguments: Sequence[Argument]) -> None:
    """Launch a kernel; raises `VirtualGpuError` where it goes wrong."""
    program = loaded.program
    buffer = bytearray(program.parameter_bytes + 16)
    for argument, place in zip(arguments, program.parameters, strict=True):
        content = _pack(argument)
        if len(content) != place.size:
            raise VirtualGpuError(f"{program.name}: {argument} for a parameter of {place.size} bytes")
        buffer[place.offset : place.offset + place.size] = content
    parameters = np.frombuffer(buffer, dtype=np.uint8)
    ranges = np.array([*_ranges(arguments), *loaded.ranges] or [(1, 0)], dtype=np.uint64)
    counters = np.zeros(Counters.WORDS, dtype=np.uint64) if _counts is not None else None
    loaded.forget()
    record = _Launch(
        parameters=parameters.ctypes.data,
        program=loaded.steps.ctypes.data,
        ranges=ranges.ctypes.data,
        n_ranges=len(ranges),
        counters=None if counters is None else counters.ctypes.data,
        registers=loaded.registers.ctypes.data,
        register_bytes=program.register_bytes,
        specials=loaded.specials.ctypes.data,
        instruction_limit=_options.instruction_limit,
        head=_options.window[0],
        tail=_options.window[1],
        threads=program.threads,
        grid=grid,
        shared_bytes=shared_bytes,
        local_bytes=program.local_bytes,
        order=_ORDERS.index(_options.order),
        seed=_options.seed,
        copies=program.copies,
        nudge=_options.nudge,
    )
    machine = handlers().machine
    assert machine.size_of_launch() == ctypes.sizeof(_Launch), [field[0] for field in _Launch._fields_]
    if machine.run_launch(ctypes.addressof(record)):
        raise _error(loaded, record, arguments)
    if counters is not None and _counts is not None:
        _counts.append(Counters(program.name, grid, program.threads, counters))


# --- Arguments --------------------------------------------------------------------------------------------------------

_FORMATS = {"i1": "<?", "u1": "<?", "i8": "<b", "u8": "<B", "i16": "<h", "u16": "<H", "i32": "<i", "u32": "<I"}
_FORMATS |= {"i64": "<q", "u64": "<Q", "fp16": "<e", "fp32": "<f", "f32": "<f", "fp64": "<d"}


def _pack(argument: Argument) -> bytes:
    if argument.type.startswith("*"):
        pointer = argument.value
        address = 0 if pointer is None else pointer.data_ptr() if hasattr(pointer, "data_ptr") else int(pointer)
        return struct.pack("<Q", address)
    if argument.type == "bf16":
        return struct.pack("<h", torch.tensor(argument.value, dtype=torch.bfloat16).view(torch.int16).item())
    if argument.type in ("fp32", "f32"):
        return np.float32(argument.value).tobytes()  # infinity where struct would refuse
    return struct.pack(_FORMATS[argument.type], argument.value)


def _tensor(value: Any) -> torch.Tensor | None:
    """A pointer's tensor, also where `triton.reinterpret` wraps it."""
    value = getattr(value, "base", value)
    return value if isinstance(value, torch.Tensor) else None


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """Address of the first byte of a tensor's elements, and of the first one after them."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return start, start + (last + 1) * tensor.element_size() if tensor.numel() else start


def _ranges(arguments: Sequence[Argument]) -> Iterator[tuple[int, int]]:
    """Memory that a launch may reach: the elements of its tensors, and what their addresses in tables point to."""
    for argument in arguments:
        tensor = _tensor(argument.value) if argument.type.startswith("*") else None
        if tensor is None or not tensor.numel():
            continue
        yield _extent(tensor)
        if address_book and tensor.dtype == torch.int64:
            for address in address_book.keys() & set(tensor.flatten().tolist()):
                yield address, address + address_book[address]


# --- Errors -----------------------------------------------------------------------------------------------------------


def _error(loaded: LoadedKernel, record: _Launch, arguments: Sequence[Argument]) -> VirtualGpuError:
    kind = _ERRORS[record.error]
    if kind == "assertion":
        return DeviceAssertionError(ctypes.string_at(record.address).decode(errors="replace"))
    instruction = loaded.instruction(record.index)
    lines = [
        f"{loaded.program.name}: {kind}",
        f"  at {instruction.text}",
        f"  from {instruction.source} (PTX line {instruction.line})",
        f"  program {tuple(record.program_id)} of {tuple(record.grid)}, thread {record.thread} of {record.threads}",
    ]
    if kind in _ERRORS[1:5]:
        lines.append(f"  address {record.address:#x}, {record.detail} bytes")
        lines += [line for argument in arguments if (line := _distance(argument, record.address))]
    if kind == _ERRORS[-1]:
        other = "several warps" if record.detail == _SEVERAL else f"warp {record.detail}"
        lines.append(f"  byte {record.address}, which {other} used, too")
    return VirtualGpuError("\n".join(lines))


def _distance(argument: Argument, address: int) -> str:
    """Where an address lies as seen from an argument."""
    tensor = _tensor(argument.value) if argument.type.startswith("*") else None
    if tensor is None:
        return ""
    start, end = _extent(tensor)
    where = ""
    if start <= address < end:
        where = f", {address - start} bytes in"
    elif min(abs(address - start), abs(address - end)) < 1 << 24:
        where = f", {address - end:+d} bytes from its end, {address - start:+d} from its start"
    return f"  {argument.name}: {tuple(tensor.shape)} {tensor.dtype} at {start:#x} to {end:#x}{where}"
