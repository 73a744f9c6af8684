"""Handlers that compute: one result a lane, of its own operands alone."""

from __future__ import annotations

from .ptx import SIZES, Instruction
from .steps import BITS, UNSIGNED, Operands, Unsupported, translates

__all__: list[str] = []

_FLOATS = ("f16", "bf16", "f32", "f64")
_PACKED = ("f16x2", "bf16x2")
_SIGNED = ("s16", "s32", "s64")
_INTEGERS = (*_SIGNED, "u16", "u32", "u64")
_ANY_BITS = ("b8", "b16", "b32", "b64")
_NUMBER = {"f16": "h2f({})", "bf16": "bf2f({})", "f32": "F({})", "f64": "D({})"}
_SHORT = {"f16": "h", "bf16": "bf"}


def _f32(operands: Operands, operand: str, flags: set[str]) -> str:
    """The bits of a float32 operand."""
    bits = operands.value(operand, "f32")
    return f"flush({bits})" if "ftz" in flags else bits


def _number(operands: Operands, operand: str, type_: str, flags: set[str]) -> str:
    """An operand as a C number; "-%r" is the negative of a register, which only contracted sums have."""
    sign = "-" if operand.startswith("-%") else ""
    bits = (
        _f32(operands, operand[len(sign) :], flags) if type_ == "f32" else operands.value(operand[len(sign) :], type_)
    )
    return sign + _NUMBER[type_].format(bits)


def _finish(bits: str, flags: set[str]) -> str:
    """The bits of a float32 result."""
    if "ftz" in flags:
        bits = f"flush({bits})"
    return f"saturate32({bits})" if "sat" in flags else bits


def _each(function: str, type_: str, values: list[str]) -> str:
    """A function of 16-bit values, or of both halves."""
    if not type_.endswith("x2"):
        return f"{function}_{type_}({', '.join(values)})"
    low, high = (", ".join(f"{half}({value})" for value in values) for half in ("low16", "high16"))
    return f"pack16({function}_{type_[:-2]}({low}), {function}_{type_[:-2]}({high}))"


def _rounding(flags: set[str], *known: str) -> str:
    return next((mode for mode in known if mode in flags), "rn")


# --- Sums, products, quotients ----------------------------------------------------------------------------------------


@translates("add", "sub", "mul")
def _sum_or_product(o: Operands, i: Instruction) -> str:
    sign = {"add": "+", "sub": "-", "mul": "*"}[i.opcode]
    _, x, y = i.operands
    if o.type in _FLOATS or o.type in _PACKED:
        flags = o.only("rn", "rz", "rm", "rp", "ftz", "sat", *_FLOATS, *_PACKED)
        mode = _rounding(flags, "rz", "rm", "rp")
        if o.type in ("f32", "f64"):
            a, b = (_number(o, operand, o.type, flags) for operand in (x, y))
            if o.type == "f64":
                if mode != "rn":
                    raise Unsupported("rounding of float64")
                return f"{o.result(i.operands[0])} = bits64({a} {sign} {b});"
            value = f"{a} {sign} {b}"
            if mode != "rn":
                value = f"mul_{mode}({a}, {b})" if sign == "*" else f"add_{mode}({a}, {sign}({b}))"
            return f"{o.result(i.operands[0])} = {_finish(f'result32({value})', flags)};"
        if flags & {"ftz", "sat", "rz", "rm", "rp"}:
            raise Unsupported("modifiers of 16-bit floats")
        return f"{o.result(i.operands[0])} = {_each(i.opcode, o.type, [o.value(v, o.type) for v in (x, y)])};"
    flags = o.only("lo", "hi", "wide", *_INTEGERS)
    if sign == "*":
        return f"{o.result(i.operands[0])} = {_integer_product(o, flags, x, y)};"
    return f"{o.result(i.operands[0])} = ({UNSIGNED[o.type]})({o.value(x, o.type)} {sign} {o.value(y, o.type)});"


def _integer_product(o: Operands, flags: set[str], x: str, y: str) -> str:
    a, b, bits, letter = o.value(x, o.type), o.value(y, o.type), BITS[o.type], o.type[0]
    if flags & {"wide", "hi"}:
        if bits == 64:
            return f"mul_hi_{o.type}({a}, {b})"
        wide = f"{letter}{2 * bits}"
        product = f"(({wide})({o.type}){a} * ({wide})({o.type}){b})"
        return f"(u{2 * bits}){product}" if "wide" in flags else f"(u{bits})({product} >> {bits})"
    return f"(u{bits})((u64){a} * {b})"


@translates("mad")
def _multiply_add(o: Operands, i: Instruction) -> str:
    flags = o.only("lo", "hi", "wide", *_INTEGERS)
    product = _integer_product(o, flags, *i.operands[1:3])
    sum_type = f"{o.type[0]}{2 * BITS[o.type]}" if "wide" in flags else o.type
    return f"{o.result(i.operands[0])} = ({UNSIGNED[sum_type]})({product} + {o.value(i.operands[3], sum_type)});"


@translates("fma")
def _fused(o: Operands, i: Instruction) -> str:
    flags = o.only("rn", "rz", "rm", "rp", "ftz", "sat", *_FLOATS, *_PACKED)
    mode = _rounding(flags, "rz", "rm", "rp")
    if o.type == "f32":
        a, b, c = (_number(o, operand, "f32", flags) for operand in i.operands[1:])
        function = "fmaf" if mode == "rn" else f"fma_{mode}"
        return f"{o.result(i.operands[0])} = {_finish(f'result32({function}({a}, {b}, {c}))', flags)};"
    if flags & {"ftz", "sat", "rz", "rm", "rp"}:
        raise Unsupported("modifiers of a type other than float32")
    if o.type == "f64":
        a, b, c = (_number(o, operand, "f64", flags) for operand in i.operands[1:])
        return f"{o.result(i.operands[0])} = bits64(fma({a}, {b}, {c}));"
    return f"{o.result(i.operands[0])} = {_each('fma', o.type, [o.value(v, o.type) for v in i.operands[1:]])};"


@translates("div")
def _quotient(o: Operands, i: Instruction) -> str:
    flags = o.only("rn", "full", "approx", "ftz", "f32", "f64", *_INTEGERS)
    d, x, y = i.operands
    if o.type == "f32":
        a, b = _f32(o, x, flags), _f32(o, y, flags)
        kind = "div_full" if "full" in flags else "div_approx" if "approx" in flags else ""
        value = f"{kind}({a}, {b}, NUDGE)" if kind else f"result32(F({a}) / F({b}))"
        return f"{o.result(d)} = {_finish(value, flags)};"
    if o.type == "f64":
        return f"{o.result(d)} = bits64({_number(o, x, 'f64', flags)} / {_number(o, y, 'f64', flags)});"
    return f"{o.result(d)} = div_{o.type}({o.value(x, o.type)}, {o.value(y, o.type)});"


@translates("rem")
def _remainder(o: Operands, i: Instruction) -> str:
    o.only(*_INTEGERS)
    return (
        f"{o.result(i.operands[0])} = rem_{o.type}({o.value(i.operands[1], o.type)}, {o.value(i.operands[2], o.type)});"
    )


@translates("ex2", "lg2", "sin", "cos", "tanh", "rcp", "rsqrt", "sqrt")
def _special_function(o: Operands, i: Instruction) -> str:
    flags = o.only("approx", "rn", "ftz", *_FLOATS)
    d, x = i.operands
    name = i.opcode
    if o.type == "f64":
        if "approx" in flags and name in ("rcp", "rsqrt"):
            return f"{o.result(d)} = {name}_approx64({o.value(x, 'f64')});"
        exact = {"sqrt": "sqrt({})", "rcp": "1.0 / {}"}[name].format(_number(o, x, "f64", flags))
        return f"{o.result(d)} = bits64({exact});"
    if o.type == "f32":
        a = _f32(o, x, flags)
        exact = {"sqrt": f"__builtin_sqrtf(F({a}))", "rcp": f"1.0f / F({a})"}.get(name, "")
        value = f"{name}_approx({a}, NUDGE)" if "approx" in flags else f"result32({exact})"
        return f"{o.result(d)} = {_finish(value, flags)};"
    short, number = _SHORT[o.type], _NUMBER[o.type].format(o.value(x, "b16"))
    return f"{o.result(d)} = f2{short}(F({name}_approx(bits32({number}), NUDGE)));"


# --- Signs, order -----------------------------------------------------------------------------------------------------

_SIGN_BIT = {"f16": "0x8000", "bf16": "0x8000", "f32": "0x80000000u", "f64": "0x8000000000000000ull"}
_SIGN_BIT |= {"f16x2": "0x80008000u", "bf16x2": "0x80008000u"}


@translates("abs", "neg")
def _sign(o: Operands, i: Instruction) -> str:
    flags = o.only("ftz", *_FLOATS, *_PACKED, *_SIGNED)
    d, x = i.operands
    if o.type in _SIGN_BIT:
        bits = _f32(o, x, flags) if o.type == "f32" else o.value(x, o.type)
        return f"{o.result(d)} = {bits} {'& ~' if i.opcode == 'abs' else '^ '}{_SIGN_BIT[o.type]};"
    value, unsigned = o.value(x, o.type), UNSIGNED[o.type]
    if i.opcode == "neg":
        return f"{o.result(d)} = ({unsigned})(0 - {value});"
    return f"{o.result(d)} = ({o.type}){value} < 0 ? ({unsigned})(0 - {value}) : {value};"


@translates("copysign")
def _copy_sign(o: Operands, i: Instruction) -> str:
    o.only("f32", "f64")
    d, sign, magnitude = i.operands
    bit = _SIGN_BIT[o.type]
    return f"{o.result(d)} = ({o.value(magnitude, o.type)} & ~{bit}) | ({o.value(sign, o.type)} & {bit});"


@translates("min", "max")
def _extreme(o: Operands, i: Instruction) -> str:
    flags = o.only("ftz", "NaN", *_FLOATS, *_PACKED, *_INTEGERS)
    d, *rest = i.operands
    function = i.opcode + ("_nan" if "NaN" in flags else "")
    if o.type == "f32":
        value, *others = (_f32(o, operand, flags) for operand in rest)
        for other in others:
            value = f"{function}_f32({value}, {other})"
        return f"{o.result(d)} = {value};"
    x, y = (o.value(operand, o.type) for operand in rest)
    if o.type in _FLOATS or o.type in _PACKED:
        return f"{o.result(d)} = {_each(function, o.type, [x, y])};"
    sign = "<" if i.opcode == "min" else ">"
    return f"{o.result(d)} = ({o.type}){x} {sign} ({o.type}){y} ? {x} : {y};"


_ORDERED = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_UNSIGNED_ORDERED = {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
_INVERSE = {"equ": "!=", "neu": "==", "ltu": ">=", "leu": ">", "gtu": "<=", "geu": "<"}
_LOGIC = {"and": "&", "or": "|", "xor": "^"}


def _condition(comparison: str, type_: str, x: str, y: str) -> str:
    """A C condition on the bits of two operands.  Unordered comparisons (equ, ltu, ...) hold for NaN; ordered ones, .ne
    too, don't."""
    if type_ not in _FLOATS:
        cast = type_ if type_ in _SIGNED and comparison in _ORDERED else f"u{BITS[type_]}"
        return f"(({cast}){x} {({**_ORDERED, **_UNSIGNED_ORDERED})[comparison]} ({cast}){y})"
    a, b = _NUMBER[type_].format(x), _NUMBER[type_].format(y)
    unordered = f"({a} != {a} || {b} != {b})"
    if comparison in ("num", "nan"):
        return f"({'!' if comparison == 'num' else ''}{unordered})"
    if comparison in _INVERSE:
        return f"({unordered} || !({a} {_INVERSE[comparison]} {b}))"
    return f"(!{unordered} && {a} {_ORDERED[comparison]} {b})"


@translates("setp")
def _set_predicate(o: Operands, i: Instruction) -> str:
    """To a predicate and, behind a bar, its opposite; of packed values to one for the lower and one for the upper."""
    comparisons = (*_ORDERED, *_UNSIGNED_ORDERED, *_INVERSE, "num", "nan")
    flags = o.only("ftz", *comparisons, *_LOGIC, *_FLOATS, *_PACKED, *_INTEGERS, "b16", "b32", "b64")
    targets, x, y = i.operands[0].split("|"), *i.operands[1:3]
    a, b = (_f32(o, operand, flags) if o.type == "f32" else o.value(operand, o.type) for operand in (x, y))
    if o.type in _PACKED:
        low, high = (
            _condition(i.modifiers[0], o.type[:-2], f"{half}({a})", f"{half}({b})") for half in ("low16", "high16")
        )
    else:
        low = _condition(i.modifiers[0], o.type, a, b)
        high = f"!{low}"
    logic = next((f" {sign} {o.value(i.operands[3], 'pred')}" for name, sign in _LOGIC.items() if name in flags), "")
    return f"u8 first = {low}{logic}, second = {high}{logic}; " + " ".join(
        f"{o.result(target)} = {value};"
        for target, value in zip(targets, ("first", "second"), strict=False)
        if target != "_"
    )


@translates("selp")
def _select(o: Operands, i: Instruction) -> str:
    o.only(*_FLOATS, *_INTEGERS, *_ANY_BITS)
    d, x, y, condition = i.operands
    return f"{o.result(d)} = {o.value(condition, 'pred')} ? {o.value(x, o.type)} : {o.value(y, o.type)};"


# --- Bits -------------------------------------------------------------------------------------------------------------


@translates("and", "or", "xor")
def _logic(o: Operands, i: Instruction) -> str:
    o.only("pred", *_ANY_BITS)
    d, x, y = i.operands
    return f"{o.result(d)} = {o.value(x, o.type)} {_LOGIC[i.opcode]} {o.value(y, o.type)};"


@translates("not")
def _not(o: Operands, i: Instruction) -> str:
    o.only("pred", *_ANY_BITS)
    d, x = i.operands
    return f"{o.result(d)} = {'!' if o.type == 'pred' else '~'}{o.value(x, o.type)};"


@translates("shl", "shr")
def _shift(o: Operands, i: Instruction) -> str:
    """A shift by the width or more leaves nothing, or the sign alone."""
    o.only(*_INTEGERS, *_ANY_BITS)
    d, x, n = i.operands
    bits, value, count = BITS[o.type], o.value(x, o.type), o.value(n, "u32")
    if i.opcode == "shr" and o.type in _SIGNED:
        return f"{o.result(d)} = ({o.type}){value} >> ({count} < {bits} ? {count} : {bits - 1});"
    sign = "<<" if i.opcode == "shl" else ">>"
    return f"{o.result(d)} = {count} < {bits} ? (u{bits})({value} {sign} ({count} & {bits - 1})) : 0;"


@translates("shf")
def _funnel_shift(o: Operands, i: Instruction) -> str:
    o.only("l", "r", "wrap", "clamp", "b32")
    d, low, high, count = i.operands
    return f"{o.result(d)} = shf_{i.modifiers[0]}_{i.modifiers[1]}({o.value(low)}, {o.value(high)}, {o.value(count)});"


#: Functions of bits in numbers.h, and the types that they take.
_BIT_FUNCTIONS = {
    "prmt": ("prmt", ("b32",)),
    "lop3": ("lop3", ("b32",)),
    "bfe": ("bfe_{}", ("u32", "s32", "u64")),
    "bfi": ("bfi_{}", ("b32",)),
    "clz": ("clz{bits}", ("b32", "b64")),
    "brev": ("brev{bits}", ("b32",)),
    "popc": ("__builtin_popcountll", ("b32", "b64")),
}


@translates(*_BIT_FUNCTIONS)
def _bit_function(o: Operands, i: Instruction) -> str:
    function, types = _BIT_FUNCTIONS[i.opcode]
    o.only(*types)
    typed = 2 if i.opcode == "bfi" else 3 if i.opcode == "lop3" else 1  # those after are positions, or a table
    values = [o.value(x, o.type if n < typed else "b32") for n, x in enumerate(i.operands[1:])]
    return f"{o.result(i.operands[0])} = {function.format(o.type, bits=BITS[o.type])}({', '.join(values)});"


# --- Conversions ------------------------------------------------------------------------------------------------------

_TO_INTEGER = {"rni": "rint", "rzi": "trunc", "rmi": "floor", "rpi": "ceil"}


@translates("cvt")
def _convert(o: Operands, i: Instruction) -> str:
    flags = o.only("rn", "rz", "rna", *_TO_INTEGER, "ftz", "sat", "tf32", "s8", "u8", *_FLOATS, *_PACKED, *_INTEGERS)
    to, source = (modifier for modifier in i.modifiers if modifier in SIZES or modifier == "tf32")
    if "sat" in flags and to != "f32":
        raise Unsupported("saturation")
    result = o.result(i.operands[0])
    if to in _PACKED:
        high, low = (_number(o, operand, "f32", flags) for operand in i.operands[1:])
        function = f"f2{_SHORT[to[:-2]]}{'_rz' if 'rz' in flags else ''}"
        return f"{result} = pack16({function}({low}), {function}({high}));"
    x = i.operands[1]
    if to == "tf32":
        return f"{result} = f2tf32_{_rounding(flags, 'rna')}({o.value(x, 'f32')});"
    if source in _FLOATS and to in _FLOATS:
        return f"{result} = {_between_floats(o, x, source, to, flags)};"
    if source in _FLOATS:
        function = next(function for mode, function in _TO_INTEGER.items() if mode in flags)
        integer = f"to_{to}({function}((double){_number(o, x, source, flags)}))"
        return f"{result} = {'(s64)' if to[0] == 's' else ''}{integer};"
    size = BITS[source]
    value = f"({source[0] if source[0] == 's' else 'u'}{size}){o.value(x, source)}"
    if to in _FLOATS:
        if flags & {"rz", "rm", "rp"}:
            raise Unsupported("rounding")
        return (
            result
            + {
                "f32": f" = bits32((float){value});",
                "f64": f" = bits64((double){value});",
                "f16": f" = d2h((double){value});",
                "bf16": f" = d2bf((double){value});",
            }[to]
        )
    # From an integer to an integer: into the type, then extended to the register.
    return f"{result} = {'(s64)' if to[0] == 's' else ''}({to}){value};"


def _between_floats(o: Operands, x: str, source: str, to: str, flags: set[str]) -> str:
    number = _number(o, x, source, flags)
    whole = next((function for mode, function in _TO_INTEGER.items() if mode in flags), "")
    if whole:
        if to != source:
            raise Unsupported("types")
        number = f"{whole}{'' if to == 'f64' else 'f'}({number})"
    truncated = "_rz" if "rz" in flags else ""
    if to == "f64":
        return f"bits64({number})"
    if to == "f32":
        return _finish(
            f"result32({f'd2f_rz({number})' if truncated and source == 'f64' else f'(float){number}'})", flags
        )
    short = _SHORT[to]
    if source == "f64":
        if truncated:
            raise Unsupported("rounding")
        return f"d2{short}({number})"
    return f"f2{short}{truncated}({number})"
