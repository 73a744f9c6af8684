"""Handlers that move data: registers, memory, atomic operations, asynchronous copies."""

from __future__ import annotations

import re

from .ptx import SIZES, Instruction, split_operands
from .steps import BITS, UNSIGNED, Operands, Unsupported, translates

__all__: list[str] = []

_SPACES = ("global", "shared", "shared::cta", "local", "param", "const")
_VECTORS = ("v2", "v4", "v8")
#: What says how memory is kept in caches, or ordered between threads that don't run at the same time here.
_NO_EFFECT = tuple(
    "weak relaxed acquire release acq_rel volatile gpu cta sys nc ca cg cs lu cv wb wt noftz L1::evict_last"
    " L1::evict_first L1::evict_normal L1::evict_unchanged L1::no_allocate L2::evict_last L2::evict_first"
    " L2::evict_normal L2::cache_hint L2::64B L2::128B L2::256B".split()
)


# --- Registers --------------------------------------------------------------------------------------------------------


@translates("mov")
def _move(o: Operands, i: Instruction) -> str:
    o.only("pred", "b8", *(t for t in SIZES if not t.endswith("x2")))
    target, source = i.operands
    if target.startswith("{"):
        parts = split_operands(target)
        bits = BITS[o.type] // len(parts)
        text = f"{UNSIGNED[o.type]} whole = {o.value(source, o.type)}; "
        return text + " ".join(
            f"{o.result(part)} = (u{bits})(whole >> {n * bits});" for n, part in enumerate(parts) if part != "_"
        )
    if source.startswith("{"):
        parts = split_operands(source)
        bits = BITS[o.type] // len(parts)
        whole = " | ".join(
            f"({UNSIGNED[o.type]})(u{bits}){o.value(part, f'b{bits}')} << {n * bits}" for n, part in enumerate(parts)
        )
        return f"{o.result(target)} = {whole};"
    return f"{o.result(target)} = {o.value(source, o.type)};"


@translates("cvta")
def _convert_address(o: Operands, i: Instruction) -> str:
    """Generic addresses of global memory are themselves; nothing that Triton emits makes others."""
    o.only("to", "global", "u64")
    return f"{o.result(i.operands[0])} = {o.value(i.operands[1], 'b64')};"


# --- Memory -----------------------------------------------------------------------------------------------------------


def _space(o: Operands) -> str:
    space = next((modifier for modifier in o.instruction.modifiers if modifier in _SPACES), "global")
    return space.partition("::")[0]


def _pointer(o: Operands, space: str, operand: str, size: int, access: str, *, counted_as: str = "") -> str:
    """C for a checked pointer; the access is counted before the lanes' loop where the launch asks for it."""
    base, displacement = o.address(operand)
    o.pure = False
    if counted_as and space in ("global", "shared"):
        row, first = base.removesuffix("[lane]"), displacement.replace("lane", "0")
        count = f"count_{space}(block, mask, (void *){row}, {first}, {size}{counted_as if space == 'global' else ''});"
        o.before += f"if (block->launch->counters) {count} "
    address = f"{base} + {displacement}, {size}, step->index"
    if space == "local":
        return f"local_memory(block, warp, lane, {address})"
    if space == "shared":
        address += f", {access}"
    return f"{space}_memory(block, THREAD, {address})"


def _loaded(type_: str, pointer: str) -> str:
    """A register may be wider than what is loaded to it."""
    value = f"load{BITS[type_]}({pointer})"
    return f"(s64)({type_}){value}" if type_[0] == "s" else value


@translates("ld")
def _load(o: Operands, i: Instruction) -> str:
    o.only(*_SPACES, *_VECTORS, *_NO_EFFECT, *SIZES)
    space, size, targets = _space(o), SIZES[o.type], split_operands(i.operands[0])
    if space == "param":
        match = re.fullmatch(r"\[\s*([\w$]+)\s*(?:\+\s*(\d+))?\s*\]", i.operands[1])
        if not match:
            raise Unsupported("address of a parameter")
        if match[1] not in o.layout.parameters:
            return ""  # the result of a call that never returns
        start = o.layout.parameters[match[1]] + int(match[2] or "0")
        return " ".join(
            f"{o.result(target)} = {_loaded(o.type, f'block->launch->parameters + {place}')};"
            for n, target in enumerate(targets)
            for place in [o.constant(start + n * size, "u32")]
        )
    pointer = _pointer(o, space, i.operands[1], size * len(targets), "READS", counted_as=", LOADS")
    return f"const u8 *p = {pointer}; " + " ".join(
        f"{o.result(target)} = {_loaded(o.type, f'p + {n * size}')};"
        for n, target in enumerate(targets)
        if target != "_"
    )


@translates("st")
def _store(o: Operands, i: Instruction) -> str:
    o.only(*_SPACES, *_VECTORS, *_NO_EFFECT, *SIZES)
    space, size, sources = _space(o), SIZES[o.type], split_operands(i.operands[1])
    if space == "param":
        o.layout.call_arguments[i.operands[0].strip("[]").split("+")[0].strip()] = sources[0]
        return ""
    pointer = _pointer(o, space, i.operands[0], size * len(sources), "WRITES", counted_as=", STORES")
    return f"u8 *p = {pointer}; " + " ".join(
        f"store{BITS[o.type]}(p + {n * size}, {o.value(source, o.type)});" for n, source in enumerate(sources)
    )


@translates("prefetch", "membar", "fence", "griddepcontrol", "nanosleep")
def _nothing(o: Operands, i: Instruction) -> str:
    """Warps run in turns, and see what others wrote at once."""
    return ""


@translates("createpolicy")
def _cache_policy(o: Operands, i: Instruction) -> str:
    return f"{o.result(i.operands[0])} = 0;"


# --- Atomic operations: lanes go one after another --------------------------------------------------------------------

_ATOMIC = {
    "exch": "{x}",
    "cas": "(old == {x} ? {y} : old)",
    "and": "old & {x}",
    "or": "old | {x}",
    "xor": "old ^ {x}",
    "min": "({cast}old < ({cast}{x}) ? old : {x})",
    "max": "({cast}old > ({cast}{x}) ? old : {x})",
}
_ATOMIC_SUM = {
    "f32": "result32(F(old) + F({x}))",
    "f64": "bits64(D(old) + D({x}))",
    "f16": "add_f16(old, {x})",
    "bf16": "add_bf16(old, {x})",
    "f16x2": "pack16(add_f16(low16(old), low16({x})), add_f16(high16(old), high16({x})))",
    "bf16x2": "pack16(add_bf16(low16(old), low16({x})), add_bf16(high16(old), high16({x})))",
}


@translates("atom", "red")
def _atomic(o: Operands, i: Instruction) -> str:
    o.only("add", *_ATOMIC, *_SPACES, *_VECTORS, *_NO_EFFECT, *SIZES)
    results = i.operands[0] if i.opcode == "atom" else "_"
    place, *rest = i.operands[1:] if i.opcode == "atom" else i.operands
    operation = next(modifier for modifier in i.modifiers if modifier == "add" or modifier in _ATOMIC)
    formula = _ATOMIC_SUM.get(o.type, "old + {x}") if operation == "add" else _ATOMIC[operation]
    values = split_operands(rest[0])
    targets = ["_"] * len(values) if results == "_" else split_operands(results)
    size, unsigned = SIZES[o.type], UNSIGNED[o.type]
    text = f"u8 *p = {_pointer(o, _space(o), place, size * len(values), 'UPDATES')}; "
    for n, (target, value) in enumerate(zip(targets, values, strict=True)):
        x = f"({unsigned}){o.value(value, o.type)}"
        y = o.value(rest[1], o.type) if operation == "cas" else ""
        cast = f"({o.type})" if o.type[0] in "su" else ""
        text += f"{{ {unsigned} old = load{BITS[o.type]}(p + {n * size}); "
        text += f"store{BITS[o.type]}(p + {n * size}, {formula.format(x=f'({x})', y=y, cast=cast)}); "
        text += f"{o.result(target)} = old; }} " if target != "_" else "} "
    return text


# --- Asynchronous copies ----------------------------------------------------------------------------------------------


@translates("cp")
def _copy(o: Operands, i: Instruction) -> str:
    flags = o.only("async", "commit_group", "wait_group", "wait_all", *_SPACES, *_NO_EFFECT)
    o.pure = False
    if "commit_group" in flags:
        return "warp->copies[lane].open++;"
    if "wait_all" in flags:
        return "wait_for_copies(block, warp, lane, ~0u);"
    if "wait_group" in flags:
        return f"wait_for_copies(block, warp, lane, {o.value(i.operands[0])});"
    target, displacement = o.address(i.operands[0])
    size = o.value(i.operands[2])
    source_size = o.value(i.operands[3]) if len(i.operands) > 3 else size
    base, offset = o.address(i.operands[1])
    row = base.removesuffix("[lane]")
    counted = f"count_global(block, mask, {row}, {offset.replace('lane', '0')}, {int(i.operands[2], 0)}, LOADS);"
    o.before = f"if (block->launch->counters) {counted} "
    places = f"(u32)({target} + {displacement}), {base} + {offset}"
    return f"copy_later(block, warp, lane, {places}, {size}, {source_size}, step->index);"
