"""``python -m fusednn check``: compile every kernel ahead of time, read its machine code, print a table."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product

from .. import kernels
from ..layers.table import format_table

__all__ = ["Outcome", "add_arguments", "run"]


Figures = tuple[int | None, int | None, int | None, int | None, int | None, int | None]


@dataclass(frozen=True)
class Outcome:
    """One configuration on one target.  Counts are of sm_90's machine code, None elsewhere."""

    kernel: str
    target: str
    seconds: float
    registers: int | None
    spills: int | None
    shared_bytes: int | None
    wide_loads: int | None
    wide_stores: int | None
    instructions: int | None
    problems: tuple[str, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--family", help="only this family's kernels (activation, prelu, ...)")
    parser.add_argument("--target", action="append", help="only this GPU (sm_80, sm_90, sm_100, gfx942); repeatable")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilers to run side by side")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    if not kernels.AVAILABLE or kernels.INTERPRETING:
        print("fusednn check compiles kernels: install triton, and unset TRITON_INTERPRET", file=sys.stderr)
        return 2
    from ..kernels.instruments.compile_check import TARGETS

    targets = arguments.target or list(TARGETS)
    count = sum(1 for _ in kernels.shipped(arguments.family))
    if unknown := [target for target in targets if target not in TARGETS]:
        print(f"unknown target {', '.join(unknown)}; known: {', '.join(TARGETS)}", file=sys.stderr)
        return 2
    if not count:
        print(f"no family is called {arguments.family}", file=sys.stderr)
        return 2
    outcomes = list(_compile_all(arguments.family, count, targets, arguments.jobs))
    failed = [outcome for outcome in outcomes if outcome.problems]
    if arguments.json:
        print(json.dumps([vars(outcome) for outcome in outcomes], indent=2))
    else:
        print(_table(outcomes))
        print(f"{len(outcomes) - len(failed)} of {len(outcomes)} pass")
    return 1 if failed else 0


def _compile_all(family: str | None, count: int, targets: list[str], jobs: int) -> Iterator[Outcome]:
    work = list(product(range(count), targets))
    with ProcessPoolExecutor(max_workers=jobs) as pool:
        yield from pool.map(_compile_one, [family] * len(work), *zip(*work, strict=True))


def _compile_one(family: str | None, index: int, target: str) -> Outcome:
    # Kernels can't be sent to another process; their place in the list can.
    from ..kernels.instruments.compile_check import compile_configuration

    result = compile_configuration(list(kernels.shipped(family))[index], target)
    code = result.machine_code
    figures: Figures = (None, None, None, None, None, None)
    if code:
        figures = (
            code.registers,
            code.spills,
            code.shared_bytes,
            code.wide_loads,
            code.wide_stores,
            sum(code.opcodes.values()),
        )
    return Outcome(result.configuration.label, target, round(result.seconds, 2), *figures, tuple(result.problems))


def _table(outcomes: list[Outcome]) -> str:
    head = ("kernel", "target", "s", "registers", "spills", "shared", "ld128", "st128", "instructions", "result")
    rows = []
    for outcome in outcomes:
        figures = [value if value is not None else "" for value in list(vars(outcome).values())[2:-1]]
        rows.append((outcome.kernel, outcome.target, *map(str, figures), "; ".join(outcome.problems) or "pass"))
    return format_table(head, rows)
