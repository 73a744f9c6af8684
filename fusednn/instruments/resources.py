"""What the compiler says of a kernel on each GPU: registers, spills, shared memory, access widths, tensor cores.

NVIDIA's machine code is disassembled, AMD's assembly read with its metadata.  Occupancy is computed from these, with
the limits of CUDA's programming guide (table of compute capabilities) and of AMD's CDNA 3 instruction set guide.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from ..kernels.base.launch import Configuration
from .compile_check import TARGETS, MachineCode, compile_for, read_machine_code

__all__ = ["Resources", "occupancy", "programs_at_once", "resources_for"]


@dataclass(frozen=True)
class _Multiprocessor:
    """What programs share.  Registers are of 32 bits, in one of the four parts that a multiprocessor has; a warp's are
    allotted in units of ``register_unit`` for each of its threads.
    """

    warps: int
    programs: int
    registers: int
    register_unit: int
    shared_bytes: int
    shared_overhead: int  # for each program


_PARTS = 4
_MULTIPROCESSORS = {
    "sm_80": _Multiprocessor(64, 32, 16384, 8, 164 * 1024, 1024),
    "sm_86": _Multiprocessor(48, 16, 16384, 8, 100 * 1024, 1024),
    "sm_89": _Multiprocessor(48, 24, 16384, 8, 100 * 1024, 1024),
    "sm_90": _Multiprocessor(64, 32, 16384, 8, 228 * 1024, 1024),
    "sm_100": _Multiprocessor(64, 32, 16384, 8, 228 * 1024, 1024),
    "sm_120": _Multiprocessor(48, 24, 16384, 8, 100 * 1024, 1024),
    "gfx942": _Multiprocessor(32, 32, 32768, 8, 64 * 1024, 0),
}

_AMD_ACCESS = re.compile(r"^\s+(?:global|buffer)_(?:load|store)_(\w+)", re.MULTILINE)
_AMD_BITS = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "short": 16, "ushort": 16}


@dataclass(frozen=True)
class Resources:
    """Of one configuration on one target.  ``registers`` are those of a thread, ``access_bits`` its widest access to
    global memory; asynchronous copies by descriptor have no width of their own.
    """

    target: str
    threads: int
    registers: int
    spills: int
    shared_bytes: int
    access_bits: int
    tensor_cores: bool

    @property
    def occupancy(self) -> float:
        return occupancy(self.target, self.threads, self.registers, self.shared_bytes)


def occupancy(target: str, threads: int, registers: int, shared_bytes: int) -> float:
    """The share of a multiprocessor's warps that programs with these needs can fill; 0 where none fits."""
    warps = -(-threads // TARGETS[target].warp_size)
    programs = programs_at_once(target, threads, registers, shared_bytes)
    return float(programs * warps / _MULTIPROCESSORS[target].warps)


def programs_at_once(target: str, threads: int, registers: int, shared_bytes: int) -> int:
    """Programs with these needs that a multiprocessor has room for."""
    processor, warp_size = _MULTIPROCESSORS[target], TARGETS[target].warp_size
    warps = -(-threads // warp_size)
    of_a_warp = -(-registers // processor.register_unit) * processor.register_unit * warp_size
    programs: int = min(
        processor.programs,
        processor.warps // warps,
        _PARTS * (processor.registers // of_a_warp) // warps,
        processor.shared_bytes // max(1, shared_bytes + processor.shared_overhead),
    )
    return programs


def resources_for(configuration: Configuration, target: str) -> Resources:
    """Compile ``configuration`` for a key of `TARGETS`, and read what it takes.  Raises what the compiler raises."""
    compiled = compile_for(configuration, target)
    threads = configuration.num_warps(TARGETS[target].warp_size) * TARGETS[target].warp_size
    shared = int(compiled.metadata.shared)
    if TARGETS[target].backend == "cuda":
        return _of_machine_code(target, threads, shared, read_machine_code(compiled.asm["cubin"]))
    return _of_assembly(target, threads, shared, compiled.asm["amdgcn"])


def _of_machine_code(target: str, threads: int, shared: int, code: MachineCode) -> Resources:
    return Resources(
        target,
        threads,
        code.registers,
        code.spills,
        max(shared, code.shared_bytes),
        code.access_bits,
        code.tensor_core_instructions > 0,
    )


def _of_assembly(target: str, threads: int, shared: int, assembly: str) -> Resources:
    def metadata(key: str) -> int:
        found = re.search(rf"^\s+\.{key}:\s+(\d+)", assembly, re.MULTILINE)
        assert found is not None, key
        return int(found[1])

    widths: list[Any] = [_AMD_BITS.get(kind.split("_")[0], 8) for kind in _AMD_ACCESS.findall(assembly)]
    return Resources(
        target,
        threads,
        metadata("vgpr_count"),
        metadata("vgpr_spill_count"),  # scalar registers spill to vector registers, not to memory
        max(shared, metadata("group_segment_fixed_size")),
        max(widths, default=0),
        re.search(r"^\s+v_mfma_", assembly, re.MULTILINE) is not None,
    )
