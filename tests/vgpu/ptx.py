"""Reads the PTX that Triton emits: a module of one kernel, flat, with nested scopes where there was inline assembly."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

__all__ = ["SIZES", "Instruction", "Kernel", "Label", "Parameter", "PtxError", "Variable", "parse", "split_operands"]

#: Bytes of a value of each type.
SIZES = {
    **dict.fromkeys(("pred", "b8", "u8", "s8"), 1),
    **dict.fromkeys(("b16", "u16", "s16", "f16", "bf16"), 2),
    **dict.fromkeys(("b32", "u32", "s32", "f32", "f16x2", "bf16x2", "s16x2", "u16x2"), 4),
    **dict.fromkeys(("b64", "u64", "s64", "f64"), 8),
    "b128": 16,
}


class PtxError(Exception):
    """PTX that the virtual GPU doesn't understand."""


class Label(NamedTuple):
    """A place that is jumped to."""

    name: str


@dataclass(frozen=True)
class Instruction:
    """``@!predicate opcode.modifiers operands;``"""

    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[str, ...]
    predicate: str | None
    negated: bool
    text: str
    line: int  # of the PTX
    source: str  # file and line of the kernel


@dataclass(frozen=True)
class Variable:
    """Memory that the module or the kernel declares; ``size`` 0 is the shared memory that the launch gives."""

    name: str
    space: str
    alignment: int
    size: int
    data: bytes | None


class Parameter(NamedTuple):
    """An argument's place in the parameter space."""

    name: str
    offset: int
    size: int


@dataclass
class Kernel:
    """One entry point."""

    name: str
    parameters: list[Parameter] = field(default_factory=list)
    threads: int = 0
    registers: dict[str, str] = field(default_factory=dict)  # type by name
    variables: list[Variable] = field(default_factory=list)
    body: list[Instruction | Label] = field(default_factory=list)
    branch_targets: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def parameter_bytes(self) -> int:
        return max((place.offset + place.size for place in self.parameters), default=0)


def split_operands(text: str) -> list[str]:
    """The parts between commas, brackets of all kinds kept together; without the braces around them, if there are."""
    if text.startswith("{") and text.endswith("}"):
        text = text[1:-1]
    parts, depth = [""], 0
    for character in text:
        depth += (character in "{[(") - (character in "}])")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def parse(ptx: str) -> Kernel:
    """The kernel of a module."""
    entries = list(re.finditer(r"\.visible\s+\.entry\s+([\w$]+)\s*\(", ptx))
    if len(entries) != 1:
        raise PtxError(f"{len(entries)} entries")
    (entry,) = entries
    kernel = Kernel(entry.group(1), variables=_module_variables(ptx[: entry.start()]))
    end = ptx.index(")", entry.end())
    kernel.parameters = _parameters(ptx[entry.end() : end])
    start = ptx.index("{", end)
    if threads := re.search(r"\.reqntid\s+(\d+)", ptx[end:start]):
        kernel.threads = int(threads.group(1))
    _Body(kernel).read(ptx[start + 1 :], 1 + ptx.count("\n", 0, start))
    return kernel


def _module_variables(head: str) -> list[Variable]:
    head = re.sub(r"//[^\n]*|^\s*\.(?:version|target|address_size)\b[^\n]*$", "", head, flags=re.MULTILINE)
    variables = []
    for statement in filter(None, map(str.strip, head.split(";"))):
        if re.match(r"\.extern\s+\.func\b", statement):
            continue  # __assertfail, vprintf
        variables.append(_variable(statement))
    return variables


_VARIABLE = re.compile(
    r"(?:\.(?:visible|extern|weak|common)\s+)*\.(?P<space>global|const|shared|local)\s+(?:\.align\s+(?P<alignment>\d+)\s+)?"
    r"\.(?P<type>\w+)\s+(?P<name>[\w$.]+)(?P<dimensions>(?:\[[^\]]*\])*)\s*(?:=\s*(?P<values>.*))?",
    re.DOTALL,
)


def _variable(text: str) -> Variable:
    match = _VARIABLE.fullmatch(text)
    if not match:
        raise PtxError(f"statement {text[:200]!r}")
    size = SIZES[match["type"]]
    count = 1
    for dimension in re.findall(r"\[([^\]]*)\]", match["dimensions"]):
        count *= int(dimension) if dimension.strip() else 0
    data = None
    if match["space"] in ("global", "const"):
        data = b"".join(_constant_bytes(value, size) for value in split_operands((match["values"] or "").strip()))
        data = data.ljust(size * count, b"\0")
    return Variable(match["name"], match["space"], int(match["alignment"] or size), size * count, data)


def _constant_bytes(text: str, size: int) -> bytes:
    value = int(text[2:], 16) if text[:2] in ("0f", "0d") else int(text.rstrip("U"), 0)
    return (value % (1 << 8 * size)).to_bytes(size, "little")


_PARAMETER = re.compile(r"\.param\s+(?:\.align\s+\d+\s+)?\.(?P<type>\w+)\s+(?:.*\s)?(?P<name>[\w$]+)", re.DOTALL)


def _parameters(text: str) -> list[Parameter]:
    """Every one aligned to its size."""
    places, offset = [], 0
    for declaration in split_operands(re.sub(r"//[^\n]*", "", text)):
        match = _PARAMETER.fullmatch(declaration)
        if not match:
            raise PtxError(f"parameter {declaration!r}")
        size = SIZES[match["type"]]
        offset = -(-offset // size) * size
        places.append(Parameter(match["name"], offset, size))
        offset += size
    return places


_PIECE = re.compile(
    r"(?P<comment>//[^\n]*|/\*.*?\*/)|\.loc\b[^\n]*?(?://\s*(?P<location>[^\n]*))?(?=\n)"
    r"|(?P<label>[A-Za-z_$][\w$]*)\s*:(?!:)|(?P<mark>[{};])|(?P<text>[A-Za-z_$%][\w$]*(?:::\w+)?|\s+|.)",
    re.DOTALL,
)
_NAME = re.compile(r"%?[A-Za-z_$][\w$]*")
_PREDICATED = re.compile(r"(?:@(?P<negated>!?)(?P<predicate>%?[\w$]+)\s+)?(?P<opcode>[\w.:]+)\s*(?P<operands>.*)")


class _Body:
    """The statements between a kernel's braces.  Names that an inner scope declares are made unique."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._scopes: list[dict[str, str]] = [{}]
        self._label = ""

    def read(self, text: str, line: int) -> None:
        for statement, at, source in self._statements(text, line):
            if statement.startswith("."):
                self._declare(statement)
            else:
                self._kernel.body.append(self._instruction(statement, at, source))

    def _statements(self, text: str, line: int) -> Iterator[tuple[str, int, str]]:
        """Statements with their lines, here and in the kernel's source; scopes and labels are taken in on the way."""
        statement, started, source, braces = "", line, "", 0
        for piece in _PIECE.finditer(text):
            kind = piece.lastgroup
            begun = bool(statement.strip())
            if kind == "location":
                source = piece["location"].strip()
            elif kind == "label" and not begun:
                self._label = piece["label"]
                self._kernel.body.append(Label(self._label))
            elif kind == "mark" and piece["mark"] == "{" and not begun:
                self._scopes.append({})
            elif kind == "mark" and piece["mark"] == "}" and not braces:
                self._scopes.pop()
                if not self._scopes:
                    return
            elif kind == "mark" and piece["mark"] == ";":
                if begun:
                    yield " ".join(statement.split()), started, source
                statement, braces = "", 0
            elif kind in ("text", "mark"):
                if not begun:
                    started = line
                braces += (piece.group() == "{") - (piece.group() == "}")
                statement += piece.group()
            line += piece.group().count("\n")
        raise PtxError("the kernel's last brace is missing")

    def _declare(self, text: str) -> None:
        directive, _, rest = text.partition(" ")
        if directive == ".reg":
            kind, _, names = rest.partition(" ")
            for item in split_operands(names):
                name, _, count = item.rstrip(">").partition("<")
                for full in [f"{name}{i}" for i in range(int(count))] if count else [name]:
                    unique = full if len(self._scopes) == 1 else f"%inner{len(self._kernel.registers)}"
                    self._scopes[-1][full] = unique
                    self._kernel.registers[unique] = kind.lstrip(".")
        elif directive in (".local", ".shared"):
            self._kernel.variables.append(_variable(text))
        elif directive == ".branchtargets":
            self._kernel.branch_targets[self._label] = tuple(split_operands(rest))
        elif directive not in (".pragma", ".param", ".callprototype"):  # .param: a call's; st.param fills it
            raise PtxError(f"directive {text!r}")

    def _instruction(self, text: str, line: int, source: str) -> Instruction:
        if len(self._scopes) > 1:
            text = _NAME.sub(self._unique, text)
        match = _PREDICATED.fullmatch(text)
        if not match:
            raise PtxError(f"statement {text!r} (line {line})")
        opcode, *modifiers = match["opcode"].split(".")
        operands = tuple(_top_level(match["operands"]))
        negated = match["negated"] == "!"
        return Instruction(opcode, tuple(modifiers), operands, match["predicate"], negated, text, line, source)

    def _unique(self, name: re.Match[str]) -> str:
        for scope in reversed(self._scopes):
            if name.group() in scope:
                return scope[name.group()]
        return name.group()


def _top_level(text: str) -> list[str]:
    """Operands, braces of a vector kept."""
    return split_operands(f"{{{text}}}")
