"""Instructions of machine code, as ``cuobjdump`` lists them, and the pipes that take them.

Warps issue one instruction a cycle in each quarter of a multiprocessor, and a pipe is busy for several with some.
Throughputs are those of the table of arithmetic instructions in CUDA's programming guide, compute capability 9.0.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple

__all__ = ["LOADS", "PIPES", "Instruction", "busy", "instructions_of"]

#: Cycles that an instruction of a warp keeps its pipe busy, in a quarter of a multiprocessor, and the opcodes that the
#: pipe takes, those with modifiers first.  What no pipe names takes an issue slot alone.
PIPES: dict[str, tuple[int, tuple[str, ...]]] = {
    "wide multiplication": (4, ("IMAD.WIDE", "IMAD.HI")),
    "integer multiplication": (2, ("IMAD", "IDP")),
    "ALU": (
        2,
        (
            *("LOP3", "LOP", "PLOP3", "SHF", "SGXT", "BMSK", "PRMT", "SEL", "FSEL", "ISETP", "FSETP", "P2R", "R2P"),
            *("IADD", "IADD3", "VIADD", "VIADDMNMX", "LEA", "IABS", "VABSDIFF", "MOV32I", "CS2R", "FCHK", "I2FP"),
            *("F2FP", "FMNMX", "FMNMX3", "IMNMX", "IMNMX3", "VIMNMX", "VIMNMX3", "HMNMX2"),
        ),
    ),
    "FMA": (1, ("FFMA", "FADD", "FMUL", "HFMA2", "HADD2", "HMUL2")),
    "special function": (8, ("MUFU", "I2F", "F2I", "F2F", "FRND", "POPC", "BREV", "FLO")),
    "float64": (2, ("DADD", "DFMA", "DMUL", "DSETP")),
    "shuffle and shared memory": (4, ("SHFL", "LDS", "STS", "LDSM", "STSM", "ATOMS", "MATCH")),
    "tensor core": (0, ("HMMA", "HGMMA", "DMMA", "QGMMA", "UTCHMMA", "IMMA", "IGMMA")),
}
#: Pipes that are one: multiplications of integers are done by half of the FMA pipe.
_SHARED = {"wide multiplication": "integer multiplication"}

LOADS, _STORES = ("LDG", "LDGSTS"), ("STG",)
_BYTES = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}

# An instruction's line: its address in a comment, a predicate perhaps, the opcode with its modifiers, the operands.
_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?);", re.MULTILINE)


class Instruction(NamedTuple):
    """A line of the listing; ``predicate`` is empty where the instruction is always executed."""

    address: int
    predicate: str
    opcode: str
    operands: str

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def pipe(self) -> str:
        for pipe, (_, opcodes) in PIPES.items():
            if any(self.opcode == opcode or self.opcode.startswith(opcode + ".") for opcode in opcodes):
                return pipe
        return "others"

    @property
    def bytes_moved(self) -> int:
        """Of global memory, by one thread."""
        if self.name not in (*LOADS, *_STORES):
            return 0
        return next((_BYTES[modifier] for modifier in self.opcode.split(".") if modifier in _BYTES), 4)


def instructions_of(listing: str) -> list[Instruction]:
    """The instructions of a listing by ``cuobjdump``."""
    return [Instruction(int(address, 16), *rest) for address, *rest in _LINE.findall(listing)]


def busy(counted: Mapping[str, float]) -> dict[str, float]:
    """Cycles that instructions of one warp keep each pipe busy, and the issue of instructions."""
    cycles: defaultdict[str, float] = defaultdict(float)
    for pipe, count in counted.items():
        cycles[_SHARED.get(pipe, pipe)] += count * PIPES.get(pipe, (0, ()))[0]
    return {"issue": sum(counted.values()), **{pipe: spent for pipe, spent in cycles.items() if spent}}
