"""What a kernel becomes: steps, each of which calls a handler in C for the lanes of a warp.

A handler knows nothing of the kernel: its operands are rows of the warp's register file, 32 values each, and constants
and special registers have rows, too.  So a few hundred handlers serve all kernels, and gcc builds each of them once.

Every instruction has a translator, which writes the handler's text with `Operands`; it names the modifiers that it
knows, and anything else raises `Unsupported`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

from .ptx import SIZES, Instruction, PtxError

__all__ = [
    "BITS",
    "TRANSLATORS",
    "UNSIGNED",
    "Kind",
    "Layout",
    "Operands",
    "Row",
    "Step",
    "Unsupported",
    "translates",
]

#: The C type that holds the bits of a PTX type, and its size.
UNSIGNED = {name: f"u{8 * size}" for name, size in SIZES.items() if size <= 8}
BITS = {name: 8 * size for name, size in SIZES.items()}

#: Special registers, in the order of `enum Special` in machine.c.  Grids have one dimension of threads, no clusters.
_SPECIALS = tuple(
    "tid.x ctaid.x ctaid.y ctaid.z nctaid.x nctaid.y nctaid.z ntid.x laneid warpid nwarpid ntid.y tid.y lanemask_eq"
    " lanemask_lt lanemask_le lanemask_gt lanemask_ge dynamic_smem_size".split()
)
_SAME = {"ntid.z": "ntid.y", "tid.z": "tid.y", "cluster_ctarank": "tid.y", "cluster_nctarank": "ntid.y"}


class Unsupported(PtxError):  # noqa: N818  (what it is, not a fault of the reader's)
    """An instruction, or a form of one, that the virtual GPU doesn't know."""


class Kind(IntEnum):
    """How a step runs; numbered as in machine.h."""

    LANES = 0  # one lane after another
    LABEL = 1  # nothing, but lanes that parted may meet here
    BRANCH = 2
    EXIT = 3
    BARRIER = 4
    WARP = 5  # the lanes that it names together
    WARP_GROUP = 6  # four warps together
    BRANCH_TABLE = 7


class Row(NamedTuple):
    """32 values of ``type`` in the register file: a register, or ``kind`` says what the content is."""

    type: str
    kind: str  # "register", "constant", "special", "address of"
    content: str | int


@dataclass
class Step:
    """One entry of the program; ``handler`` is C text, run for one ``lane`` where the kind is LANES."""

    kind: Kind
    index: int  # of the instruction in the kernel's body
    handler: str = ""
    rows: tuple[Row, ...] = ()
    before: str = ""  # of the loop over lanes
    pure: bool = True  # touches nothing but the rows, and can't fail
    predicate: Row | None = None
    negated: bool = False
    members: int = 0  # who has to be there: 0 all, 1 whoever is, 2 + n those in row n
    label: str = ""
    labels: tuple[str, ...] = ()
    instruction_class: int = 0


@dataclass
class Layout:
    """What names in a kernel stand for."""

    registers: dict[str, str]  # type by name
    parameters: dict[str, int]  # offset
    shared: dict[str, int]  # offset
    local: dict[str, int]  # offset
    module: set[str]  # variables in global memory
    branch_targets: dict[str, tuple[str, ...]]
    call_arguments: dict[str, str] = field(default_factory=dict)  # what was stored last to a call's parameter


class Operands:
    """Collects the rows of one instruction's handler, and writes how the handler names them."""

    def __init__(self, layout: Layout, instruction: Instruction) -> None:
        self.layout = layout
        self.instruction = instruction
        self.rows: list[Row] = []
        self.kind = Kind.LANES
        self.members = 0
        self.before = ""
        self.pure = True
        self.label = ""
        self.labels: tuple[str, ...] = ()

    def only(self, *known: str) -> set[str]:
        """The instruction's modifiers, all of which have to be ``known``."""
        if unknown := set(self.instruction.modifiers) - set(known):
            raise Unsupported(f"modifier .{', .'.join(sorted(unknown))}")
        return set(self.instruction.modifiers)

    @property
    def type(self) -> str:
        """The last modifier that is a type."""
        return next(modifier for modifier in reversed(self.instruction.modifiers) if modifier in SIZES)

    def row(self, type_: str, kind: str, content: str | int) -> str:
        self.rows.append(Row(type_, kind, content))
        return f"P{len(self.rows) - 1}[lane]"

    def constant(self, value: int, type_: str) -> str:
        return self.row(type_, "constant", value % (1 << int(type_[1:])))

    def value(self, operand: str, type_: str = "b32") -> str:
        """An operand's bits, an unsigned integer of the register's size, or of that of ``type_`` for constants."""
        unsigned = UNSIGNED[type_]
        if operand in self.layout.registers:
            return self.row(UNSIGNED[self.layout.registers[operand]], "register", operand)
        if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", operand):
            return self.constant(int(operand[2:], 16), "u32")
        if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", operand):
            return self.constant(int(operand[2:], 16), "u64")
        if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", operand):
            return self.constant(int(operand.rstrip("U"), 0), unsigned)
        if operand in ("true", "false"):
            return self.constant(int(operand == "true"), unsigned)
        if operand.startswith("!"):
            return f"(!{self.value(operand[1:], type_)})"
        for offsets in (self.layout.shared, self.layout.local):
            if operand in offsets:
                return self.constant(offsets[operand], unsigned)
        if operand in self.layout.module:
            return self.row("u64", "address of", operand)
        special = operand.removeprefix("%")
        special = _SAME.get(special, special)
        if special in _SPECIALS:
            return self.row("u32", "special", _SPECIALS.index(special))
        raise Unsupported(f"operand {operand!r}")

    def result(self, operand: str) -> str:
        """Where the handler writes."""
        return self.row(UNSIGNED[self.layout.registers[operand]], "register", operand)

    def address(self, operand: str) -> tuple[str, str]:
        """``[base + displacement]``."""
        match = re.fullmatch(r"\[\s*([%\w$.]+)\s*(?:\+\s*(-?\w+))?\s*\]", operand)
        if not match:
            raise Unsupported(f"address {operand!r}")
        return self.value(match[1], "b64"), self.constant(int(match[2] or "0", 0), "u64")


Translator = Callable[[Operands, Instruction], str]
TRANSLATORS: dict[str, Translator] = {}


def translates(*opcodes: str) -> Callable[[Translator], Translator]:
    """Register the function that writes the handlers of these instructions; an empty text is no step at all."""

    def register(translator: Translator) -> Translator:
        TRANSLATORS.update(dict.fromkeys(opcodes, translator))
        return translator

    return register
