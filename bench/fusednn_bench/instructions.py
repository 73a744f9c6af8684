"""What the launches of a call execute, against what they move: instructions by pipe, from the machine code for an H100.

A kernel whose instructions take more than 0.7 of the time that its bytes take isn't bound by memory: no kernel issues
one in each cycle.  Nothing runs: see `launched`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

from torch import Tensor

from fusednn.benchmark.cases import Case, forward, gradients, make_inputs

from .launched import Launched, launches_of
from .steps import StepCase

__all__ = ["Call", "calls_of", "execution_of", "records_of", "seconds_of"]

TARGET = "sm_90"
_LEAST = 1 / 64  # of a call's bytes: smaller launches (sums of partial results) don't count
QUARTERS = 4  # of a multiprocessor, each of which issues an instruction a cycle

Machine = Mapping[str, Any]


class Call(NamedTuple):
    """A direction of a case, and what it launches."""

    record: dict[str, Any]
    launches: list[Launched]


def calls_of(case: Case | StepCase) -> Iterator[Call]:
    import torch

    if isinstance(case, StepCase):
        parameters = [torch.empty(shape, dtype=case.dtype) for shape in case.shapes]
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        step = case.operation.contestants()["fusednn"](parameters, 1e-3)
        launches_of(step)  # the first step makes the state
        yield Call(case.record("fusednn"), launches_of(step))
        return
    made: list[Any] = []
    launches_of(lambda: made.append(make_inputs(case, torch.device("cpu"), seed=0)))
    (inputs,) = made
    outputs: list[Tensor] = []
    ahead = launches_of(lambda: outputs.append(forward(case.operation.ours, inputs)))
    yield Call(case.record("fusednn", "forward"), ahead)
    back = launches_of(lambda: gradients(outputs[0], inputs))
    yield Call(case.record("fusednn", "backward"), back)


class Execution(NamedTuple):
    """Of a launch: what the machine code takes and executes."""

    programs: int
    threads: int
    registers: int
    spills: int
    once: dict[str, float]  # instructions of a warp, by pipe
    each: dict[str, float]  # each time through its loops
    trips: float  # in the mean
    cycles: dict[str, float]  # of a warp, by pipe
    programs_at_once: int
    bytes_in_flight: int  # of a program

    def seconds(self, machine: Machine, pipe: str) -> float:
        warps = self.programs * self.threads // 32
        rate = QUARTERS * machine["multiprocessors"] * machine["clock_hertz"]
        return float(warps * self.cycles[pipe] / rate)


@cache
def _compiled(configuration: Any, arguments: Any) -> tuple[Any, Any, int]:
    """Machine code, its instructions, and shared memory."""
    from fusednn.instruments.compile_check import compile_for, disassembled, read_machine_code
    from fusednn.instruments.instructions import instructions_of

    compiled = compile_for(configuration, TARGET, arguments)
    cubin = compiled.asm["cubin"]
    return read_machine_code(cubin), instructions_of(disassembled(cubin)), int(compiled.metadata.shared)


def execution_of(launched: Launched, elements: int, moved: float) -> Execution:
    """``moved`` are the bytes of the whole launch."""
    from fusednn.instruments.control_flow import flow_of
    from fusednn.instruments.instructions import busy
    from fusednn.instruments.resources import programs_at_once

    configuration = launched.configuration
    constants = configuration.keywords_for(launched.arguments)  # ALIGN is of these arguments
    configuration = replace(
        configuration, constants=tuple((name, constants[name]) for name, _ in configuration.constants)
    )
    code, instructions, shared = _compiled(configuration, _specialised(launched))
    threads = 32 * configuration.num_warps(32)
    tiles, parts = _walked(launched, elements)
    trips = max(tiles / launched.programs, 1)
    flow = flow_of(instructions, moved / (launched.programs * threads * trips), _parameters(launched))
    if flow.inside:
        trips /= parts
    elif not flow.each:
        trips = 0
    return Execution(
        launched.programs,
        threads,
        code.registers,
        code.spills,
        dict(flow.once),
        flow.repeated(parts),
        trips,
        busy(flow.counted(trips, parts)),
        programs_at_once(TARGET, threads, code.registers, max(shared, code.shared_bytes)),
        flow.bytes_in_flight * threads // 32,
    )


def _specialised(launched: Launched) -> Any:
    """What Triton would be told of a launch's arguments."""
    from fusednn.instruments.compile_check import Arguments

    configuration = launched.configuration
    given = dict(zip(configuration.names, launched.arguments, strict=True))
    fixed = {each.name for each in configuration.kernel.params if each.do_not_specialize}
    typed = {each.name for each in configuration.kernel.params if each.annotation_type}
    ones, wide, divisible = [], [], []
    for name, kind in configuration.signature:
        value = given[name]
        if isinstance(value, Tensor):
            if value.data_ptr() % 16 == 0 and name not in fixed:
                divisible.append(name)
        elif kind[0] in "iu":
            if value == 1 and name not in fixed:
                ones.append(name)
            elif value % 16 == 0 and name not in fixed:
                divisible.append(name)
            if not -(2**31) <= value < 2**31 and name not in typed:
                wide.append(name)
    return Arguments(tuple(ones), tuple(wide), divisible=tuple(divisible))


#: Where a kernel's parameters begin in constant memory.
_FIRST_PARAMETER = 0x210


def _parameters(launched: Launched) -> dict[int, int]:
    """The words of a launch's integers, by their addresses in constant memory, as the machine code names them."""
    words, place = {}, _FIRST_PARAMETER
    dropped = _specialised(launched).ones
    for (name, kind), value in zip(launched.configuration.signature, launched.arguments, strict=True):
        size = 4 if kind in ("i32", "u32") else 8
        if name in dropped:
            continue
        place = -(-place // size) * size
        if not isinstance(value, Tensor | float):
            words.update({place + 4 * n: value >> 32 * n & 0xFFFFFFFF for n in range(size // 4)})
        place += size
    return words


#: The terms of a product's sums, from what a kernel's arguments and constants are called.
_SUMMED: dict[str, Callable[[Mapping[str, Any]], int]] = {
    "linear_maxout_forward_kernel": lambda a: a["features"],
    "linear_maxout_data_gradient_kernel": lambda a: a["units"],
    "linear_maxout_weight_gradient_kernel": lambda a: a["rows"],
    "conv_pool_kernel": lambda a: a["depth"],
}
#: The extents of a tile, from what constants are called, and of the rows that it is a part of.
_TILES = (("HEIGHT", "WIDTH"), ("LINES", "WIDTH"), ("ROWS", "COLUMNS"), ("TILE",), ("BLOCK",), ("WIDTH",))
_ROWS = ("columns", "dim_size")


def _walked(launched: Launched, elements: int) -> tuple[int, int]:
    """The tiles that a launch's programs go through, and how many of them are parts of the same lines."""
    constants = dict(launched.configuration.constants)
    given = {**constants, **dict(zip(launched.configuration.names, launched.arguments, strict=True))}
    name = launched.configuration.kernel.__name__
    if name in _SUMMED:
        return launched.programs * math.ceil(_SUMMED[name](given) / constants["DEPTH"]), 1
    tile = next(([constants[each] for each in names] for names in _TILES if set(names) <= set(constants)), None)
    if tile is None:
        return launched.programs, 1
    row = next((given[each] for each in _ROWS if each in given), None)
    if row is None or len(tile) < 2:
        return math.ceil(elements / math.prod(tile)), 1
    height, width = tile
    parts = math.ceil(row / width)
    return math.ceil(elements / row / height) * parts, parts


def records_of(case: Case | StepCase, machine: Machine) -> Iterator[dict[str, Any]]:
    """What is written down of every launch of a case."""
    for call in calls_of(case):
        whole = sum(launched.bytes for launched in call.launches)
        for launched in call.launches:
            if launched.bytes >= _LEAST * whole:
                yield {**call.record, **_record(launched, call.record, machine)}


def seconds_of(case: Case | StepCase, machine: Machine) -> dict[str, float]:
    """The least time that the instructions of each direction take, one launch after another."""
    return {
        call.record["direction"]: sum(
            execution.seconds(machine, max(execution.cycles, key=execution.cycles.__getitem__))
            for launched in call.launches
            for execution in [execution_of(launched, *_extent(launched, call.record))]
        )
        for call in calls_of(case)
    }


def _extent(launched: Launched, of_call: Mapping[str, Any]) -> tuple[int, float]:
    """Elements and bytes that a launch is about.  Optimizers reach their tensors by addresses, in one launch."""
    if of_call["direction"] == "step":
        return of_call["shape"][-1], of_call["budget_bytes"]
    return launched.elements, launched.bytes


def _record(launched: Launched, of_call: Mapping[str, Any], machine: Machine) -> dict[str, Any]:
    elements, moved = _extent(launched, of_call)
    execution = execution_of(launched, elements, moved)
    memory = moved / machine["copy_bytes_per_second"]
    warps = execution.programs * execution.threads / 32
    total = {
        pipe: execution.once.get(pipe, 0) + execution.trips * execution.each.get(pipe, 0)
        for pipe in {*execution.once, *execution.each}
    }
    an_element = {pipe: round(32 * warps * count / elements, 3) for pipe, count in sorted(total.items())}
    ratios = {pipe: execution.seconds(machine, pipe) / memory for pipe in execution.cycles}
    busiest = max((pipe for pipe in ratios if pipe != "issue"), key=ratios.__getitem__)
    resident = min(execution.programs_at_once, execution.programs / machine["multiprocessors"])
    return {
        "kernel": launched.configuration.kernel.__name__,
        "configuration": launched.configuration.label,
        "programs": execution.programs,
        "threads": execution.threads,
        "registers": execution.registers,
        "spills": execution.spills,
        "bytes": moved,
        "elements": elements,
        "instructions": round(math.fsum(an_element.values()), 3),
        "instructions_by_pipe": an_element,
        "once": sum(execution.once.values()),
        "each": sum(execution.each.values()),
        "trips": round(execution.trips, 1),
        "issue_over_bytes": round(ratios["issue"], 3),
        "busiest_pipe": busiest,
        "busiest_over_bytes": round(ratios[busiest], 3),
        "programs_at_once": round(resident, 1),
        "bytes_in_flight": round(resident * execution.bytes_in_flight),
    }
