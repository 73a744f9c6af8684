"""Handlers for what lanes, warps and warp groups do together, and what moves them through the program."""

from __future__ import annotations

import re

from .ptx import Instruction, split_operands
from .steps import Kind, Operands, Unsupported, translates

__all__: list[str] = []

_HERE = "block, warp, mask, step"


# --- Control flow -----------------------------------------------------------------------------------------------------


@translates("bra")
def _branch(o: Operands, i: Instruction) -> str:
    o.only("uni")
    o.kind, o.label = Kind.BRANCH, i.operands[0]
    return ""


@translates("brx")
def _branch_table(o: Operands, i: Instruction) -> str:
    o.only("idx")
    o.kind, o.labels = Kind.BRANCH_TABLE, o.layout.branch_targets[i.operands[1]]
    o.value(i.operands[0])
    return ""


@translates("ret", "exit")
def _exit(o: Operands, i: Instruction) -> str:
    o.kind = Kind.EXIT
    return ""


@translates("trap", "brkpt")
def _trap(o: Operands, i: Instruction) -> str:
    o.pure = False
    return "fail(block, TRAP, THREAD, step->index, 0, 0);"


@translates("call")
def _call(o: Operands, i: Instruction) -> str:
    o.only("uni")
    name = next(operand for operand in i.operands if re.fullmatch(r"[A-Za-z_][\w$]*", operand))
    if name != "__assertfail":
        raise Unsupported(f"call of {name}")
    o.pure = False
    message = o.value(o.layout.call_arguments[split_operands(i.operands[-1].strip("()"))[0]], "b64")
    return f"fail(block, ASSERTION, THREAD, step->index, {message}, 0);"


# --- Meetings ---------------------------------------------------------------------------------------------------------


@translates("bar", "barrier")
def _barrier(o: Operands, i: Instruction) -> str:
    flags = o.only("sync", "cta", "aligned", "warp")
    if "warp" in flags:
        _lanes(o, i.operands[0])
        return "meet(block, warp, mask, FIRST(ROW32(0)), step);"
    o.kind = Kind.BARRIER
    number, threads = [*i.operands, "0"][:2]
    o.value(number)
    o.value(threads)
    return ""


def _lanes(o: Operands, operand: str) -> None:
    """A row for the lanes that take part, all of which have to be there."""
    o.kind, o.members = Kind.WARP, 2 + len(o.rows)
    o.value(operand)


def _place(o: Operands, operand: str) -> int:
    """A row for a result that may be left out; whether it is there."""
    if operand in ("", "_"):
        o.constant(0, "u32")
        return 0
    o.result(operand)
    return 1


@translates("shfl")
def _shuffle(o: Operands, i: Instruction) -> str:
    flags = o.only("sync", "up", "down", "bfly", "idx", "b32")
    modes = {"up": "SHUFFLE_UP", "down": "SHUFFLE_DOWN", "bfly": "SHUFFLE_BUTTERFLY", "idx": "SHUFFLE_INDEX"}
    result, _, in_range = i.operands[0].partition("|")
    there = _place(o, result), _place(o, in_range)
    for operand in i.operands[1:-1]:
        o.value(operand)
    _lanes(o, i.operands[-1])
    return f"shuffle({_HERE}, {next(modes[flag] for flag in flags if flag in modes)}, {there[0]}, {there[1]});"


@translates("vote")
def _vote(o: Operands, i: Instruction) -> str:
    o.only("sync", "ballot", "any", "all", "uni", "b32", "pred")
    modes = {"ballot": "VOTE_BALLOT", "any": "VOTE_ANY", "all": "VOTE_ALL", "uni": "VOTE_UNIFORM"}
    o.result(i.operands[0])
    o.value(i.operands[1], "pred")
    _lanes(o, i.operands[2])
    return f"vote({_HERE}, {modes[i.modifiers[1]]});"


@translates("redux")
def _reduce(o: Operands, i: Instruction) -> str:
    o.only("sync", "add", "min", "max", "and", "or", "xor", "b32", "u32", "s32")
    mode = f"REDUCE_{i.modifiers[1].upper()}"
    if i.modifiers[1] in ("min", "max"):
        mode += f"_{o.type[0].upper()}"
    o.result(i.operands[0])
    o.value(i.operands[1])
    _lanes(o, i.operands[2])
    return f"reduce({_HERE}, {mode});"


@translates("elect")
def _elect(o: Operands, i: Instruction) -> str:
    o.only("sync")
    result, _, elected = i.operands[0].partition("|")
    there = _place(o, result)
    o.result(elected)
    _lanes(o, i.operands[1])
    return f"elect({_HERE}, {there});"


@translates("activemask")
def _active_mask(o: Operands, i: Instruction) -> str:
    o.only("b32")
    o.result(i.operands[0])
    o.kind, o.members = Kind.WARP, 1
    return "FOR_LANES(mask) ROW32(0)[lane] = mask;"


@translates("ldmatrix", "stmatrix")
def _matrices(o: Operands, i: Instruction) -> str:
    flags = o.only("sync", "aligned", "m8n8", "x1", "x2", "x4", "trans", "shared", "shared::cta", "b16")
    registers, place = i.operands if i.opcode == "ldmatrix" else reversed(i.operands)
    parts = split_operands(registers)
    for part in parts:
        o.value(part)
    o.address(place)
    o.kind = Kind.WARP
    function = "load_matrices" if i.opcode == "ldmatrix" else "store_matrices"
    return f"{function}({_HERE}, {len(parts)}, {int('trans' in flags)});"


# --- Products ---------------------------------------------------------------------------------------------------------


@translates("mma")
def _product(o: Operands, i: Instruction) -> str:
    shape = next(modifier for modifier in i.modifiers if re.fullmatch(r"m\d+n8k\d+", modifier))
    o.only("sync", "aligned", "row", "col", shape, "f16", "bf16", "tf32", "f32", "f64", "rn")
    result, element, other, accumulator = [m for m in i.modifiers if m in ("f16", "bf16", "tf32", "f32", "f64")]
    for operand in i.operands:
        for part in split_operands(operand):
            o.value(part, "b64" if element == "f64" else "b32")
    o.kind = Kind.WARP
    m, k = map(int, re.findall(r"[mk](\d+)", shape))
    match result, element, m, k:
        case ("f32" | "f16", "f16" | "bf16", 16, 8 | 16) if (other, accumulator) == (element, result):
            return f"product_16({_HERE}, E_{element.upper()}, {k}, {int(result == 'f16')});"
        case ("f32", "tf32", 16, 4 | 8):
            return f"product_tf32({_HERE}, {k});"
        case ("f64", "f64", 8 | 16, 4 | 8 | 16):
            return f"product_f64({_HERE}, {m}, {k});"
    raise Unsupported("product")


@translates("wgmma")
def _group_product(o: Operands, i: Instruction) -> str:
    if i.modifiers[0] in ("fence", "commit_group", "wait_group"):
        return ""
    o.kind = Kind.WARP_GROUP
    shape = next(modifier for modifier in i.modifiers if modifier.startswith("m64"))
    o.only("mma_async", "sync", "aligned", shape, "f32", "f16", "bf16", "tf32")
    result, element, _ = [m for m in i.modifiers if m in ("f16", "bf16", "tf32", "f32")]
    accumulators, a, b, add, sign_a, sign_b, *major = i.operands
    registers = split_operands(a) if a.startswith("{") else []
    for part in split_operands(accumulators):
        o.value(part)
    for part in registers:
        o.value(part)
    if not registers:
        o.value(a, "b64")
    o.value(b, "b64")
    o.value(add, "pred")
    o.value(sign_a)
    o.value(sign_b)
    n, k = map(int, re.findall(r"[nk](\d+)", shape))
    majors = [0] * (2 - len(major)) + [int(flag) for flag in major]
    product = f"E_{element.upper()}, {n}, {k}, {int(bool(registers))}, {majors[0]}, {majors[1]}, {int(result == 'f16')}"
    return f"group_product(block, warp, step, (Product){{{product}}});"
