"""Handwritten PTX on the virtual GPU: a few instructions, for every element of some operands."""

from collections.abc import Sequence

import torch
from torch import Tensor
from vgpu.launch import Argument, run
from vgpu.program import LoadedKernel


def execute(
    body: str,
    *operands: Tensor,
    results: Sequence[torch.dtype],
    declarations: str = "",
    threads: int = 32,
    shared_bytes: int = 0,
) -> list[Tensor]:
    """Thread ``i`` has element i of each operand in ``%a0``, ``%a1``, ..., its number in ``%i``, and leaves element i
    of each result in ``%r0``, ``%r1``, ...; addresses of the operands are in ``%x0``, ...

    Operands have as many elements as there are threads, or a multiple: that many programs.
    """
    elements = operands[0].numel()
    assert elements % threads == 0
    outputs = [torch.zeros(elements, dtype=dtype) for dtype in results]
    loads = "".join(_access("ld", f"%a{n}", f"%x{n}", n, each) for n, each in enumerate(operands))
    stores = "".join(_access("st", f"%r{n}", f"%y{n}", len(operands) + n, each) for n, each in enumerate(outputs))
    registers = "".join(f".reg .b{8 * each.itemsize} %a{n};\n" for n, each in enumerate(operands))
    registers += "".join(f".reg .b{8 * each.itemsize} %r{n};\n" for n, each in enumerate(outputs))
    parameters = ", ".join(f".param .u64 .ptr .global p{n}" for n in range(len(operands) + len(outputs)))
    ptx = f"""
        .version 8.3
        .target sm_80
        .address_size 64
        .extern .shared .align 16 .b8 memory[];
        .visible .entry tested({parameters})
        .reqntid {threads}
        {{
            {registers}
            .reg .b32 %i, %block; .reg .pred %p, %q;
            .reg .b64 %place; .reg .b64 %x<{len(operands)}>, %y<{len(outputs)}>;
            {declarations}
            mov.u32 %block, %ctaid.x;
            mov.u32 %i, %tid.x;
            mad.lo.s32 %i, %block, {threads}, %i;
            {loads}
            {body}
            {stores}
            ret;
        }}
    """
    arguments = [Argument(f"p{n}", "*b8", tensor) for n, tensor in enumerate([*operands, *outputs])]
    run(LoadedKernel(ptx), (elements // threads, 1, 1), shared_bytes, arguments)
    return outputs


def _access(opcode: str, register: str, address: str, parameter: int, tensor: Tensor) -> str:
    size = tensor.itemsize
    places = f"{register}, [%place]" if opcode == "ld" else f"[%place], {register}"
    return f"""
        ld.param.b64 {address}, [p{parameter}];
        mul.wide.s32 %place, %i, {size};
        add.s64 %place, {address}, %place;
        {opcode}.global.b{8 * size} {places};
    """
