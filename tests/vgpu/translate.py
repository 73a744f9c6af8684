"""Turns a kernel's body into steps."""

from __future__ import annotations

import re
from dataclasses import replace

from . import arithmetic, control, movement
from .ptx import Instruction, Kernel, Label, PtxError
from .steps import TRANSLATORS, Kind, Layout, Operands, Row, Step, Unsupported

__all__ = ["CLASSES", "memory_layout", "translate"]

assert all(module.__all__ == [] for module in (arithmetic, control, movement))  # imported for what they register

#: What instructions are counted as.
CLASSES = tuple(
    "global load|global store|shared load|shared store|atomic|shuffle|barrier|matrix product|special function|float16"
    "|float32|float64|integer|conversion|move or select|branch|other".split("|")
)
_CLASS_OF_OPCODE = {
    **dict.fromkeys(("atom", "red"), "atomic"),
    **dict.fromkeys(("shfl", "vote", "redux", "elect", "activemask"), "shuffle"),
    **dict.fromkeys(("bar", "barrier"), "barrier"),
    **dict.fromkeys(("mma", "wgmma"), "matrix product"),
    **dict.fromkeys(("ex2", "lg2", "sin", "cos", "tanh", "rcp", "rsqrt", "sqrt"), "special function"),
    **dict.fromkeys(("mov", "selp", "cvta"), "move or select"),
    **dict.fromkeys(("bra", "brx", "ret", "exit"), "branch"),
    "ldmatrix": "shared load",
    "stmatrix": "shared store",
    "cvt": "conversion",
    "cp": "global load",
}
_CLASS_OF_TYPE = {"16": "float16", "32": "float32", "64": "float64"}


def _class(instruction: Instruction) -> int:
    name = _CLASS_OF_OPCODE.get(instruction.opcode, "")
    type_ = instruction.modifiers[-1] if instruction.modifiers else ""
    if instruction.opcode in ("ld", "st"):
        space = "shared" if any(modifier.startswith("shared") for modifier in instruction.modifiers) else "global"
        name = f"{space} {'load' if instruction.opcode == 'ld' else 'store'}"
        if "param" in instruction.modifiers:
            name = "move or select"
    elif not name and (match := re.fullmatch(r"b?f(16|32|64)(?:x2)?", type_)):
        name = "special function" if instruction.opcode == "div" else _CLASS_OF_TYPE[match[1]]
    elif not name and re.fullmatch(r"[sub]\d+|pred", type_):
        name = "integer"
    return CLASSES.index(name or "other")


def memory_layout(kernel: Kernel) -> tuple[Layout, int]:
    """Places for what a kernel declares, and the bytes of local memory that a thread has."""
    places: dict[str, dict[str, int]] = {"shared": {}, "local": {}}
    ends = {"shared": 0, "local": 0}
    for variable in sorted(kernel.variables, key=lambda variable: variable.size == 0):
        if variable.space in places:
            start = -(-ends[variable.space] // variable.alignment) * variable.alignment
            places[variable.space][variable.name] = start
            ends[variable.space] = start + variable.size
    layout = Layout(
        registers=kernel.registers,
        parameters={parameter.name: parameter.offset for parameter in kernel.parameters},
        shared=places["shared"],
        local=places["local"],
        module={variable.name for variable in kernel.variables if variable.data is not None},
        branch_targets=kernel.branch_targets,
    )
    return layout, -(-ends["local"] // 16) * 16


def translate(kernel: Kernel, layout: Layout) -> list[Step]:
    """The kernel's steps; `Unsupported` names the instruction that the virtual GPU doesn't know."""
    steps = []
    for index, item in enumerate(_contracted(kernel)):
        if isinstance(item, Label):
            steps.append(Step(Kind.LABEL, index, label=item.name))
        elif item is not None and (step := _step(item, index, layout)):
            steps.append(step)
    return [*steps, Step(Kind.EXIT, max(len(kernel.body) - 1, 0))]


def _step(instruction: Instruction, index: int, layout: Layout) -> Step | None:
    operands = Operands(layout, instruction)
    where = f"{instruction.text!r} (line {instruction.line}, {instruction.source})"
    translator = TRANSLATORS.get(instruction.opcode)
    if translator is None:
        raise Unsupported(f"instruction {where}")
    try:
        handler = translator(operands, instruction)
    except Unsupported as error:
        raise Unsupported(f"{error}: {where}") from None
    except (KeyError, ValueError, StopIteration) as error:
        raise PtxError(f"{type(error).__name__} {error}: {where}") from error
    if operands.kind in (Kind.LANES, Kind.WARP, Kind.WARP_GROUP) and not handler:
        return None
    return Step(
        operands.kind,
        index,
        handler,
        tuple(operands.rows),
        operands.before,
        operands.pure,
        Row("u8", "register", instruction.predicate) if instruction.predicate else None,
        instruction.negated,
        operands.members,
        operands.label,
        operands.labels,
        _class(instruction),
    )


# --- Contraction ------------------------------------------------------------------------------------------------------

_REGISTER = re.compile(r"%[A-Za-z_][\w$]*")
_CONTRACTED = ({"f32"}, {"ftz", "f32"}, {"f64"})


def _contracted(kernel: Kernel) -> list[Instruction | Label | None]:
    """The body as the assembler makes it: ``mul`` and ``add`` without a rounding are one ``fma`` where the product is
    used nowhere else; None in place of such products.

    The assembler may, and does not always, do so; kernels must be right either way.
    """
    body: list[Instruction | Label | None] = list(kernel.body)
    written, read = _counts(kernel)
    products: dict[str, tuple[int, Instruction]] = {}  # of the present basic block, that may still be contracted
    for n, item in enumerate(kernel.body):
        if isinstance(item, Label) or item.opcode in ("bra", "brx", "ret", "exit"):
            products = {}
            continue
        flags = set(item.modifiers)
        if item.opcode in ("add", "sub") and flags in _CONTRACTED and not item.predicate:
            for side in (1, 2):
                at, product = products.get(item.operands[side], (-1, item))
                if at >= 0 and set(product.modifiers) == flags:
                    body[n], body[at] = _fused(product, item, side), None
                    break
        for register in _REGISTER.findall(item.operands[0]) if item.operands else []:
            products = {name: pair for name, pair in products.items() if register not in pair[1].operands}
        if item.opcode == "mul" and flags in _CONTRACTED and not item.predicate:
            name = item.operands[0]
            if written.get(name) == 1 and read.get(name) == 1:
                products[name] = n, item
    return body


def _counts(kernel: Kernel) -> tuple[dict[str, int], dict[str, int]]:
    """How often registers are written and read."""
    written: dict[str, int] = {}
    read: dict[str, int] = {}
    for item in kernel.body:
        if isinstance(item, Label):
            continue
        for n, operand in enumerate(item.operands):
            target = n == 0 and item.opcode not in ("st", "red") and not operand.startswith("[")
            for register in _REGISTER.findall(operand):
                counts = written if target else read
                counts[register] = counts.get(register, 0) + 1
    return written, read


def _fused(product: Instruction, total: Instruction, side: int) -> Instruction:
    a, b = product.operands[1:]
    c = total.operands[3 - side]
    if total.opcode == "sub" and side == 1:
        c = _negative(c)
    elif total.opcode == "sub":
        a = _negative(a)
    return replace(total, opcode="fma", modifiers=("rn", *total.modifiers), operands=(total.operands[0], a, b, c))


def _negative(operand: str) -> str:
    """Of a register, or of a constant's bits."""
    if operand.startswith("%"):
        return f"-{operand}"
    return f"{operand[:2]}{int(operand[2:], 16) ^ 1 << 4 * len(operand[2:]) - 1:0{len(operand) - 2}X}"
