"""A kernel as the machine runs it: steps with their handlers, and the register file that their operands live in."""

from __future__ import annotations

import hashlib
import pickle
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .handlers import CACHE, handler_name, handlers, write_atomically
from .ptx import Instruction, Kernel, Label, Parameter, parse
from .steps import Kind, Row, Step
from .translate import memory_layout, translate

__all__ = ["LoadedKernel", "Program"]

LANES = 32
_STEP = np.dtype(
    [("handler", "<u8"), ("rows", "<u8"), ("predicate", "<i4"), *((name, "<u4") for name in (
        "target", "index", "kind", "negated", "class"))]
)  # fmt: skip
#: Programs on disk are of these sources.
_VERSION = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))).digest()


@dataclass
class Program:
    """What a kernel's PTX becomes, as it is kept on disk."""

    name: str
    threads: int
    parameters: list[Parameter]
    parameter_bytes: int
    local_bytes: int
    variables: dict[str, bytes]  # the module's own memory
    rows: dict[Row, int]  # where in a warp's register file
    register_bytes: int
    steps: NDArray[np.void]  # handlers missing, and rows as indices into `pool`
    pool: NDArray[np.uint32]
    handler_names: list[str]
    handler_steps: dict[str, Step]
    copies: bool  # whether there are asynchronous ones

    @classmethod
    def of(cls, kernel: Kernel) -> Program:
        layout, local_bytes = memory_layout(kernel)
        steps = translate(kernel, layout)
        rows: dict[Row, int] = {}
        register_bytes = 0
        for step in steps:
            for row in (*step.rows, *filter(None, [step.predicate])):
                if row not in rows:
                    rows[row] = register_bytes
                    register_bytes += LANES * int(row.type[1:]) // 8
        labels = {step.label: n for n, step in enumerate(steps) if step.kind is Kind.LABEL}
        encoded = np.zeros(len(steps), dtype=_STEP)
        pool: list[int] = []
        names, handler_steps = [], {}
        for entry, step in zip(encoded, steps, strict=True):
            entry["rows"] = len(pool)
            pool += [rows[row] for row in step.rows]
            if step.kind is Kind.BRANCH_TABLE:
                pool += [len(step.labels), *(labels[label] for label in step.labels)]
            entry["predicate"] = rows[step.predicate] if step.predicate else -1
            entry["target"] = labels[step.label] if step.kind is Kind.BRANCH else step.members
            entry["index"], entry["kind"], entry["negated"] = step.index, step.kind, step.negated
            entry["class"] = step.instruction_class
            names.append(handler_name(step) if step.handler else "")
            if step.handler:
                handler_steps[names[-1]] = step
        return cls(
            kernel.name,
            kernel.threads,
            kernel.parameters,
            kernel.parameter_bytes,
            local_bytes,
            {variable.name: variable.data for variable in kernel.variables if variable.data is not None},
            rows,
            -(-register_bytes // 64) * 64,
            encoded,
            np.array(pool, dtype=np.uint32),
            names,
            handler_steps,
            any("copies" in step.handler for step in steps),
        )


class LoadedKernel:
    """A program with its handlers and memory, ready to run; translated once for all runs."""

    def __init__(self, ptx: str) -> None:
        self.ptx = ptx
        path = CACHE / "programs" / hashlib.sha256(_VERSION + ptx.encode()).hexdigest()[:32]
        if path.exists():
            program = pickle.loads(path.read_bytes())
        else:
            program = Program.of(parse(ptx))
            write_atomically(path, pickle.dumps(program))
        self.program: Program = program
        addresses = handlers().addresses(program.handler_steps.items())
        self.steps = program.steps.copy()
        self.steps["rows"] = self.steps["rows"] * program.pool.itemsize + program.pool.ctypes.data
        self.steps["handler"] = [addresses[name] if name else 0 for name in program.handler_names]
        self._memory = {name: _aligned(np.frombuffer(data, np.uint8)) for name, data in program.variables.items()}
        specials = [
            part for row, place in program.rows.items() if row.kind == "special" for part in (row.content, place)
        ]
        self.specials = np.array([*specials, 0xFFFFFFFF], dtype=np.uint32)
        self._fresh = np.tile(self._register_file(), program.threads // LANES)
        self.registers = _aligned(self._fresh)

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """The module's own global memory."""
        return [(data.ctypes.data, data.ctypes.data + data.size) for data in self._memory.values()]

    def forget(self) -> None:
        """Poison all registers but constants: what nobody wrote is NaN, or -1."""
        np.copyto(self.registers, self._fresh)

    @cached_property
    def kernel(self) -> Kernel:
        """The kernel as text, for messages."""
        return parse(self.ptx)

    def instruction(self, index: int) -> Instruction:
        """The body's ``index``-th, or the one before a label."""
        while isinstance(item := self.kernel.body[index], Label):
            index -= 1
        return item

    def _register_file(self) -> NDArray[np.uint8]:
        """One warp's."""
        registers = np.full(self.program.register_bytes, 0xFF, dtype=np.uint8)
        for row, place in self.program.rows.items():
            if row.kind in ("constant", "address of"):
                value = row.content if row.kind == "constant" else self._memory[str(row.content)].ctypes.data
                values = np.full(LANES, value, dtype=f"<u{int(row.type[1:]) // 8}")
                registers[place : place + values.nbytes] = values.view(np.uint8)
        return registers


def _aligned(data: NDArray[Any]) -> NDArray[Any]:
    """A copy at a multiple of 64 bytes."""
    room = np.empty(data.size + 64, dtype=data.dtype)
    start = -room.ctypes.data % 64
    copy = room[start : start + data.size]
    copy[:] = data
    return copy
