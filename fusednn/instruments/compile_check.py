"""The compile check: every shipped configuration, compiled ahead of time for GPUs that needn't be there.

NVIDIA's machine code is read too: none may spill registers to local memory; for sm_90 accesses to global memory must be
as wide as promised.  Triton's wheel carries the compiler, the assembler and ``cuobjdump``.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

from ..kernels import INTERPRETING
from ..kernels.base.device import Device
from ..kernels.base.launch import Configuration

__all__ = [
    "DEVICES",
    "TARGETS",
    "Arguments",
    "CompileResult",
    "MachineCode",
    "arguments_of",
    "compile_configuration",
    "compile_for",
    "disassembled",
    "is_for",
    "read_machine_code",
    "translate",
]

#: The GPUs that kernels are compiled for: A100, RTX 30, RTX 40, H100 / H200, B200, RTX 50, MI300.
DEVICES = {
    device.architecture: device
    for device in (
        Device("sm_80", 32, 163 * 1024),
        Device("sm_86", 32, 99 * 1024),
        Device("sm_89", 32, 99 * 1024),
        Device("sm_90", 32, 227 * 1024),
        Device("sm_100", 32, 227 * 1024),
        Device("sm_120", 32, 99 * 1024),
        Device("gfx942", 64, 64 * 1024),
    )
}

#: The same as Triton is told.
TARGETS = {
    name: GPUTarget("hip", name, 64) if device.is_amd else GPUTarget("cuda", int(name.removeprefix("sm_")), 32)
    for name, device in DEVICES.items()
}

#: Longest compile time of one configuration, in seconds of a processor: others may use the machine, too.
COMPILE_SECONDS = 20.0

_GLOBAL_ACCESSES = ("LDG", "LDGSTS", "STG")
_BITS = {"128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}
_TENSOR_CORE_INSTRUCTIONS = ("HMMA", "HGMMA", "DMMA", "QGMMA", "UTCHMMA", "IMMA", "IGMMA")


@dataclass(frozen=True)
class MachineCode:
    """What the SASS of a kernel shows: resources per thread, and instruction counts."""

    registers: int
    stack_bytes: int
    shared_bytes: int
    opcodes: Counter[str]

    def count(self, prefix: str, *modifiers: str) -> int:
        """Instructions whose opcode starts with ``prefix`` and carries all ``modifiers``."""
        return sum(
            n
            for opcode, n in self.opcodes.items()
            if opcode.split(".")[0] == prefix and all(modifier in opcode.split(".")[1:] for modifier in modifiers)
        )

    @property
    def wide_loads(self) -> int:
        """To registers, and asynchronous copies to shared memory."""
        return self.count("LDG", "128") + self.count("LDGSTS", "128")

    @property
    def wide_stores(self) -> int:
        return self.count("STG", "128")

    @property
    def access_bits(self) -> int:
        """Of the widest access to global memory; 0 without any."""
        accesses = [opcode.split(".") for opcode in self.opcodes if opcode.split(".")[0] in _GLOBAL_ACCESSES]
        return max((next((_BITS[m] for m in modifiers if m in _BITS), 32) for _, *modifiers in accesses), default=0)

    @property
    def spills(self) -> int:
        """Loads from and stores to local memory."""
        return self.count("LDL") + self.count("STL")

    @property
    def tensor_core_instructions(self) -> int:
        return sum(self.count(name) for name in _TENSOR_CORE_INSTRUCTIONS)


@dataclass(frozen=True)
class CompileResult:
    """One configuration, compiled for one target, and everything that is wrong with it.  Seconds are a processor's."""

    configuration: Configuration
    target: str
    seconds: float
    machine_code: MachineCode | None = None
    problems: list[str] = field(default_factory=list)


def compile_configuration(configuration: Configuration, target: str) -> CompileResult:
    """Compile for ``target`` (a key of `TARGETS`) and check the result against what the configuration promises.

    A compiler error is reported as a problem, not raised.  Raises RuntimeError in the interpreter, whose functions
    can't be compiled.
    """
    if INTERPRETING:
        raise RuntimeError("the compile check needs real kernels: unset TRITON_INTERPRET")
    started = _processor_seconds()
    try:
        compiled = compile_for(configuration, target)
    except Exception as error:
        message = f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else ''}"
        return CompileResult(configuration, target, _processor_seconds() - started, None, [message])
    seconds = _processor_seconds() - started
    problems = []
    if seconds > COMPILE_SECONDS:
        problems.append(f"took {seconds:.1f} s to compile, more than {COMPILE_SECONDS:.0f}")
    if (shared := compiled.metadata.shared) > (most := DEVICES[target].shared_bytes):
        problems.append(f"{shared} bytes of shared memory, more than {most}")
    machine_code = None
    if not DEVICES[target].is_amd:
        machine_code = read_machine_code(compiled.asm["cubin"])
        if machine_code.spills or machine_code.stack_bytes:
            spills, stack = machine_code.spills, machine_code.stack_bytes
            problems.append(f"spills: {spills} local-memory accesses, {stack} bytes of stack")
        if target == "sm_90":
            problems += _broken_promises(configuration, machine_code)
    return CompileResult(configuration, target, seconds, machine_code, problems)


def is_for(configuration: Configuration, target: str) -> bool:
    """Whether launches on a key of `TARGETS` take the configuration."""
    return not configuration.large or DEVICES[target].takes_large_tiles


def _processor_seconds() -> float:
    """Of this process, and of the assemblers that it ran."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


@dataclass(frozen=True)
class Arguments:
    """What Triton is told of the arguments of a launch, and makes a kernel of its own for.

    Integers named in ``ones`` are 1, which Triton makes Python constants; those in ``wide`` need 64 bits; unless
    ``aligned``, pointers and integers aren't known to be multiples of 16.  By default they are what the configuration
    promises.
    """

    ones: tuple[str, ...] = ()
    wide: tuple[str, ...] = ()
    aligned: bool = True
    divisible: tuple[str, ...] | None = None  # the multiples of 16, pointers and integers, where that is known

    def __str__(self) -> str:
        described = [f"{name} = 1" for name in self.ones] + [f"{name} > 2^31" for name in self.wide]
        return ", ".join(described + ["unaligned"] * (not self.aligned))


def arguments_of(configuration: Configuration) -> Iterator[Arguments]:
    """Every kind of arguments that a launch may come with, beside those that the configuration promises."""
    kernel = configuration.kernel
    integers = [name for name, kind in configuration.signature if kind[0] in "iu"]
    fixed = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
    typed = {parameter.name for parameter in kernel.params if parameter.annotation_type}
    specialised = tuple(name for name in integers if name not in fixed)
    untyped = tuple(name for name in integers if name not in typed)
    yield Arguments(aligned=False)
    yield from (Arguments(ones=(name,)) for name in specialised)
    yield from (Arguments(wide=(name,)) for name in untyped)
    if len(specialised) > 1:
        yield Arguments(ones=specialised)
    if len(untyped) > 1:
        yield Arguments(wide=untyped)


def compile_for(configuration: Configuration, target: str, arguments: Arguments = Arguments()) -> Any:
    """Triton's compiled kernel, for a key of `TARGETS`.  Raises what the compiler raises."""
    options = configuration.options(DEVICES[target])
    return triton.compile(_source(configuration, arguments), target=TARGETS[target], options=options)


def translate(configuration: Configuration, target: str, arguments: Arguments) -> None:
    """The first part of `compile_for`, in which a kernel's code meets the types of its arguments; takes a tenth of it.
    Raises what the compiler raises.
    """
    gpu = TARGETS[target]
    backend = make_backend(gpu)
    options = backend.parse_options(configuration.options(DEVICES[target]))
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions, modules = backend.get_codegen_implementation(options), backend.get_module_map()
    _source(configuration, arguments).make_ir(gpu, options, functions, modules, context)


def _source(configuration: Configuration, arguments: Arguments) -> Any:
    types = dict(configuration.signature)
    types.update((name, "i64") for name in arguments.wide)
    constants = {**dict(configuration.constants), **dict.fromkeys(arguments.ones, 1)}
    if configuration.aligned and not arguments.aligned:
        constants["ALIGN"] = 1
    names = configuration.kernel.arg_names
    pointers = {name for name, kind in types.items() if kind.startswith("*")}
    promised = pointers | set(configuration.divisible) if arguments.divisible is None else set(arguments.divisible)
    aligned = promised - {*arguments.ones} if arguments.aligned else set()
    return ASTSource(
        configuration.kernel,
        {name: "constexpr" if name in constants else types[name] for name in names},
        constants,
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )


def _broken_promises(configuration: Configuration, code: MachineCode) -> list[str]:
    problems = []
    if code.wide_loads < configuration.wide_loads:
        problems.append(f"{code.wide_loads} loads of 128 bits, {configuration.wide_loads} promised")
    if code.wide_stores < configuration.wide_stores:
        problems.append(f"{code.wide_stores} stores of 128 bits, {configuration.wide_stores} promised")
    if configuration.tensor_cores and not code.tensor_core_instructions:
        problems.append("no tensor-core instructions")
    return problems


def read_machine_code(cubin: bytes) -> MachineCode:
    """What the disassembled cubin shows."""
    listing = disassembled(cubin)
    resources = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED):(\d+)", listing)}
    # An instruction's line: its address in a comment, a predicate perhaps, then the opcode with its modifiers.
    opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", listing, re.MULTILINE)
    return MachineCode(resources["REG"], resources["STACK"], resources["SHARED"], Counter(opcodes))


def disassembled(cubin: bytes) -> str:
    """The listing of a cubin, by the ``cuobjdump`` of Triton's wheel."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        flags = ["--dump-resource-usage", "--dump-sass"]
        return subprocess.run([tool, *flags, path], check=True, capture_output=True, text=True).stdout
