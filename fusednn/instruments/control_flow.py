"""What a program executes of a kernel's machine code: instructions by pipe, once and for each tile.

The listing is no measure: most of it is for what seldom happens.  Counted is the path of a whole tile: of all that move
the bytes of a tile the one with the fewest instructions, and without subroutines, which are for what seldom happens,
too.  Branches that the kernel's parameters decide, such as whether there is a bias, are taken as in the launch.
"""

from __future__ import annotations

import operator
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

from .instructions import LOADS, Instruction

__all__ = ["Flow", "flow_of"]

_BRANCHES = ("BRA", "EXIT", "RET", "BRX", "JMP")
_TARGET = re.compile(r"0x([0-9a-f]+)")
_WARP = 32
_EXIT = -1
_SUBROUTINE = 1000  # more instructions than the ways around it have


@dataclass(frozen=True)
class Flow:
    """Instructions of one warp, by pipe: ``once`` a program, ``each`` time through its loops over tiles, which are
    empty where a program has one tile, and each time through loops ``inside`` these, which are over parts of a line.
    Bytes are those that the warp loads before it must wait.
    """

    once: Counter[str]
    each: Counter[str]
    inside: Counter[str]
    bytes_in_flight: int

    def repeated(self, parts: float) -> dict[str, float]:
        """Each time through its loops, and so often through those inside."""
        return {pipe: self.each[pipe] + parts * self.inside[pipe] for pipe in {*self.each, *self.inside}}

    def counted(self, trips: float, parts: float = 1) -> dict[str, float]:
        """Of a program that goes through its loops so many times."""
        each = self.repeated(parts)
        return {pipe: self.once[pipe] + trips * each.get(pipe, 0) for pipe in {*self.once, *each}}


def flow_of(instructions: Iterable[Instruction], needed: float, parameters: Mapping[int, int]) -> Flow:
    """The path of a whole tile, of which one thread moves the bytes ``needed``.

    ``parameters`` are words of the kernel's, by their addresses in constant memory: branches on these are decided.
    """
    blocks = _blocks(list(instructions))
    graph = _Graph(blocks, _decided(_Graph(blocks), parameters))
    path = graph.shortest(graph.entry, _EXIT, needed)
    once, each, inside, ahead = _count(graph, path), Counter[str](), Counter[str](), []
    for loop in graph.loops_in():
        if not (body := _body(graph, loop, path, needed)):
            continue
        counted = _count(graph, body)
        each.update(counted)
        if loop.latch in path:
            once.subtract(counted)
        for inner in graph.loops_in(loop):
            part = _body(graph, inner, body, needed)
            counted = _count(graph, part)
            inside.update(counted)
            if inner.latch in body:
                each.subtract(counted)
            ahead.append(_loaded(graph, part, LOADS))
        # Asynchronous copies are waited for some trips later: those under way were begun before the loop.
        before = [block for block in path if block not in loop.blocks]
        ahead += [_loaded(graph, body, LOADS), _loaded(graph, before, ("LDGSTS",))]
    return Flow(+once, +each, +inside, _WARP * (max(ahead) if ahead else _loaded(graph, path, LOADS)))


def _body(graph: _Graph, loop: _Loop, path: Collection[int], needed: float) -> list[int]:
    """A loop's blocks, once through; none where the path leaves it aside."""
    if loop.header not in path:
        return []
    if loop.latch in path:
        return [block for block in path if block in loop.blocks]
    return graph.shortest(loop.header, loop.latch, needed, loop.blocks)


def _touches_memory(instruction: Instruction) -> bool:
    return bool(instruction.bytes_moved) or instruction.pipe == "tensor core"


def _count(graph: _Graph, path: Iterable[int]) -> Counter[str]:
    return Counter(instruction.pipe for block in path for instruction in graph.blocks[block])


def _loaded(graph: _Graph, path: Iterable[int], names: tuple[str, ...]) -> int:
    return sum(each.bytes_moved for block in path for each in graph.blocks[block] if each.name in names)


# --- Control flow -----------------------------------------------------------------------------------------------------


class _Loop(NamedTuple):
    header: int
    latch: int  # from which it is entered again
    blocks: frozenset[int]

    def is_in(self, other: _Loop) -> bool:
        """Whether it is a part of the other one."""
        return self.header in other.blocks and self.header != other.header


def _blocks(instructions: list[Instruction]) -> dict[int, list[Instruction]]:
    """Instructions that run one after another, by the first address."""
    following = {a.address: b.address for a, b in pairwise(instructions)}
    leaders = {instructions[0].address}
    for each in instructions:
        if each.name in _BRANCHES:
            leaders |= {following[each.address]} if each.address in following else set()
            leaders |= {_target(each)} if each.name == "BRA" else set()
    blocks: dict[int, list[Instruction]] = {}
    for each in instructions:
        if each.address in leaders:
            blocks[each.address] = current = []
        current.append(each)
    return blocks


def _condition(branch: Instruction) -> str:
    """The predicate under which a branch is taken, or an empty string."""
    return branch.predicate or next(iter(re.findall(r"^!?U?P\d", branch.operands)), "")


def _target(branch: Instruction) -> int:
    found = _TARGET.search(branch.operands)
    assert found is not None, branch
    return int(found[1], 16)


@dataclass(frozen=True)
class _Graph:
    """Blocks, by their first address.  ``decided`` tells which branches are taken, where that is known."""

    blocks: dict[int, list[Instruction]]
    decided: Mapping[int, bool] = field(default_factory=dict)

    @cached_property
    def entry(self) -> int:
        return next(iter(self.blocks))

    @cached_property
    def successors(self) -> dict[int, list[int]]:
        after = dict(zip(self.blocks, [*list(self.blocks)[1:], _EXIT], strict=True))
        return {block: list(self._leads_to(code[-1], after[block])) for block, code in self.blocks.items()}

    def _leads_to(self, last: Instruction, following: int) -> Iterator[int]:
        decided = self.decided.get(last.address)
        if last.name not in _BRANCHES:
            yield following
        else:
            if decided is not False:
                yield _target(last) if last.name == "BRA" else _EXIT
            if decided is False or (decided is None and _condition(last)):
                yield following

    @cached_property
    def order(self) -> list[int]:
        """Blocks that the entry leads to, each after those that lead to it but for loops' ends."""
        finished: list[int] = []
        seen = {self.entry, _EXIT}
        stack = [(self.entry, iter(self.successors[self.entry]))]
        while stack:
            block, remaining = stack[-1]
            found = next((each for each in remaining if each not in seen), None)
            if found is None:
                finished.append(block)
                stack.pop()
            else:
                seen.add(found)
                stack.append((found, iter(self.successors[found])))
        return finished[::-1]

    @cached_property
    def predecessors(self) -> dict[int, list[int]]:
        found: dict[int, list[int]] = defaultdict(list)
        for block in self.order:
            for successor in self.successors[block]:
                found[successor].append(block)
        return found

    @cached_property
    def dominators(self) -> dict[int, set[int]]:
        """The blocks that every way to a block leads through, itself included."""
        found = {block: set(self.order) for block in self.order}
        found[self.entry] = {self.entry}
        changed = True
        while changed:
            changed = False
            for block in self.order[1:]:
                ways = set.intersection(*(found[each] for each in self.predecessors[block])) | {block}
                if ways != found[block]:
                    found[block], changed = ways, True
        return found

    @cached_property
    def returns(self) -> set[tuple[int, int]]:
        """The steps back to where a loop begins."""
        return {(a, b) for a in self.order for b in self.successors[a] if b in self.dominators[a]}

    @cached_property
    def loops(self) -> list[_Loop]:
        """Those over tiles and parts of these: all that touch memory."""
        loops = []
        for latch, header in self.returns:
            blocks, waiting = {header, latch}, [latch]
            while waiting:
                block = waiting.pop()
                if block != header:
                    waiting += [each for each in self.predecessors[block] if each not in blocks]
                    blocks.update(self.predecessors[block])
            if any(_touches_memory(each) for block in blocks for each in self.blocks[block]):
                loops.append(_Loop(header, latch, frozenset(blocks)))
        return loops

    @cached_property
    def _outermost(self) -> list[_Loop]:
        return self.loops_in()

    def loops_in(self, outer: _Loop | None = None) -> list[_Loop]:
        """Loops that are in this one, or anywhere, and in no other there."""
        loops = [loop for loop in self.loops if outer is None or loop.is_in(outer)]
        return [loop for loop in loops if not any(loop.is_in(other) for other in loops)]

    def shortest(self, start: int, end: int, needed: float, within: Iterable[int] | None = None) -> list[int]:
        """The way from ``start`` to ``end`` with the fewest instructions, no loop twice, of those that enter all loops
        and move the bytes ``needed``, or else come the nearest to it.
        """
        allowed = {*self.order, _EXIT} if within is None else set(within)
        # Of each block: the fewest instructions from there on, with the block that follows, by what is done on the way.
        ways: dict[int, dict[_Done, tuple[int, int, _Done]]] = {end: {self._done(end): (0, _EXIT, _NOTHING)}}
        for block in reversed(self.order):
            if block == end or block not in allowed:
                continue
            found: dict[_Done, tuple[int, int, _Done]] = {}
            own, length = self._done(block), self._length(block)
            for successor in self.successors[block]:
                if successor in allowed and (block, successor) not in self.returns:
                    for then, (rest, _, _) in ways.get(successor, {}).items():
                        done = _Done(own.loops + then.loops, min(own.bytes + then.bytes, needed))
                        if done not in found or length + rest < found[done][0]:
                            found[done] = length + rest, successor, then
            ways[block] = found
        path = [start]
        done = max(ways[start], key=lambda done: (done, -ways[start][done][0]), default=_NOTHING)
        while path[-1] != end and ways[path[-1]]:
            _, successor, done = ways[path[-1]][done]
            path.append(successor)
        return [block for block in path if block != _EXIT]

    def _done(self, block: int) -> _Done:
        if block == _EXIT:
            return _NOTHING
        return _Done(
            sum(loop.header == block for loop in self._outermost), sum(each.bytes_moved for each in self.blocks[block])
        )

    def _length(self, block: int) -> int:
        return len(self.blocks[block]) + _SUBROUTINE * sum(each.name == "CALL" for each in self.blocks[block])


class _Done(NamedTuple):
    """On a way through the code: loops over tiles entered, and bytes of global memory moved."""

    loops: int
    bytes: float


_NOTHING = _Done(0, 0)


# --- Branches that a kernel's parameters decide -----------------------------------------------------------------------

#: Registers and predicates whose values are known.
_Known = dict[str, int]

_COMPARED = {
    "EQ": operator.eq,
    "NE": operator.ne,
    "LT": operator.lt,
    "LE": operator.le,
    "GT": operator.gt,
    "GE": operator.ge,
}
_COMBINED = {"AND": operator.and_, "OR": operator.or_, "XOR": operator.xor}
_PARAMETER = re.compile(r"c\[0x0\]\[0x([0-9a-f]+)\]$")
_REGISTER = re.compile(r"(U?R)(\d+)$")


def _decided(graph: _Graph, parameters: Mapping[int, int]) -> dict[int, bool]:
    """Which branches are taken, as far as parameters tell: constants are carried along all ways through the code."""
    known: dict[int, _Known] = {graph.entry: {}}
    waiting = [graph.entry]
    while waiting:
        block = waiting.pop()
        after = _after(graph.blocks[block], known[block], parameters)
        for successor in graph.successors[block]:
            if successor == _EXIT:
                continue
            before = known.get(successor)
            met = after if before is None else {k: v for k, v in before.items() if after.get(k) == v}
            if met != before:
                known[successor] = met
                waiting.append(successor)
    found = {}
    for block, before in known.items():
        last = graph.blocks[block][-1]
        if last.name in _BRANCHES and (condition := _condition(last)):
            value = _value(condition, _after(graph.blocks[block], before, parameters), parameters)
            if value is not None:
                found[last.address] = bool(value)
    return found


def _after(block: Iterable[Instruction], before: _Known, parameters: Mapping[int, int]) -> _Known:
    known = dict(before)
    for each in block:
        operands = [operand.strip().replace(".reuse", "") for operand in each.operands.split(",")]
        results = {} if each.predicate else _results(each, operands, known, parameters)
        for operand in operands[:3]:
            if re.match(r"U?P\d$", operand):
                known.pop(operand, None)
        if found := _REGISTER.match(operands[0]):
            for number in range(int(found[2]), int(found[2]) + _registers_written(each)):
                known.pop(f"{found[1]}{number}", None)
        known.update(results)
    return known


def _registers_written(each: Instruction) -> int:
    """At most, from the first on."""
    if each.pipe == "tensor core":
        return 256
    modifiers = set(each.opcode.split("."))
    if "128" in modifiers or each.name == "LDSM":
        return 4
    return 2 if modifiers & {"64", "F64", "WIDE"} or each.name == "CS2R" or each.pipe == "float64" else 1


def _results(each: Instruction, operands: list[str], known: _Known, parameters: Mapping[int, int]) -> _Known:
    """What an instruction computes from known values; only what tests of a parameter are made of."""

    def value(operand: str) -> int | None:
        return _value(operand, known, parameters)

    modifiers = each.opcode.split(".")
    if each.name in ("LDC", "ULDC", "MOV", "UMOV") or each.opcode in ("IMAD.MOV.U32", "IMAD.U32"):
        if each.name == "IMAD" and operands[1:3] != ["RZ", "RZ"]:
            return {}
        sources = [operands[-1]]
        if "64" in modifiers and (place := _PARAMETER.match(operands[-1])):
            sources.append(f"c[0x0][{int(place[1], 16) + 4:#x}]")
        register = _REGISTER.match(operands[0])
        values = [value(source) for source in sources]
        if register is None:
            return {}
        return {f"{register[1]}{int(register[2]) + n}": v for n, v in enumerate(values) if v is not None}
    if each.name in ("ISETP", "UISETP") and "EX" not in modifiers:
        a, b, other = (value(operand) for operand in operands[2:5])
        if a is None or b is None or other is None:
            return {}
        if "U32" not in modifiers:
            a, b = (v - 2**32 if v >= 2**31 else v for v in (a, b))
        combine = _COMBINED[next(m for m in modifiers if m in _COMBINED)]
        return {operands[0]: combine(int(_COMPARED[modifiers[1]](a, b)), other)}
    if each.name in ("PLOP3", "UPLOP3"):
        bits = [value(operand) for operand in operands[2:5]]
        if any(bit is None for bit in bits):
            return {}
        column = sum(bit << n for n, bit in enumerate(reversed(bits)) if bit)
        return {operands[0]: int(operands[5], 16) >> column & 1}
    return {}


def _value(operand: str, known: _Known, parameters: Mapping[int, int]) -> int | None:
    negated = operand.startswith("!")
    name = operand.removeprefix("!")
    if name in ("PT", "UPT"):
        found: int | None = 1
    elif name in ("RZ", "URZ"):
        found = 0
    elif place := _PARAMETER.match(name):
        found = parameters.get(int(place[1], 16))
    elif re.match(r"-?0x[0-9a-f]+$", name):
        found = int(name, 16) & 0xFFFFFFFF
    else:
        found = known.get(name)
    return found if found is None or not negated else 1 - found
