"""``python -m fusednn check``: compile every kernel ahead of time, read its machine code, and test what it computes."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import product

from .. import kernels
from ..layers.table import format_table
from . import self_test
from .check_words import conclusion

__all__ = ["Outcome", "add_arguments", "run"]


Figures = tuple[int | None, int | None, int | None, int | None, int | None, int | None]


@dataclass(frozen=True)
class Outcome:
    """One configuration on one target.  Counts are of NVIDIA's machine code, None elsewhere."""

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
    parser.add_argument("--target", action="append", help="only this GPU (sm_80, sm_90, gfx942, ...); repeatable")
    parser.add_argument("--variants", action="store_true", help="also compile for extents that 16 doesn't divide")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes to run side by side")
    parser.add_argument("--no-compile", action="store_true", help="don't compile: only test the results")
    parser.add_argument("--no-self-test", action="store_true", help="don't test the results: only compile")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Compile, then test.  Returns 0 where all passes, 1 where something fails, 2 where it can't be done."""
    if refusal := _refusal(arguments):
        print(refusal, file=sys.stderr)
        return 2
    outcomes: list[Outcome] = []
    results: list[self_test.Result] = []
    if not arguments.no_compile:
        targets = arguments.target or _targets()
        outcomes = list(_compile_all(arguments.family, arguments.variants, targets, arguments.jobs))
        if not arguments.json:
            print(_table(outcomes))
            print(f"{_passed(outcomes)} of {len(outcomes)} pass")
    if not arguments.no_self_test:
        results = self_test.self_test(arguments.family, arguments.jobs)
        if not arguments.json:
            print(f"\nLayers, functions and optimizers against PyTorch's, with kernels {self_test.where()}")
            print(self_test.table(results))
            print(f"{_passed(results)} of {len(results)} pass")
    if arguments.json:
        facts = {"compiled": [vars(one) for one in outcomes], "tested": [vars(one) for one in results]}
        print(json.dumps(facts, indent=2))
    else:
        print(conclusion(outcomes, results, self_test.where(), arguments.family, arguments.variants))
    return 0 if _passed(outcomes) == len(outcomes) and _passed(results) == len(results) else 1


def _refusal(arguments: argparse.Namespace) -> str | None:
    """Why the command can't do what it is asked, or None."""
    if arguments.no_compile and arguments.no_self_test:
        return "nothing left to check: choose --no-compile or --no-self-test"
    if not kernels.AVAILABLE:
        return "fusednn check needs kernels: install triton"
    if kernels.INTERPRETING and not arguments.no_compile:
        return "fusednn check compiles kernels: unset TRITON_INTERPRET, or add --no-compile"
    if not arguments.no_compile:
        known = _targets()
        if unknown := [target for target in arguments.target or [] if target not in known]:
            return f"unknown target {', '.join(unknown)}; known: {', '.join(known)}"
    family = arguments.family
    if family is not None and family not in self_test.families() and not any(True for _ in kernels.shipped(family)):
        return f"no family is called {family}"
    return None


def _targets() -> list[str]:
    from ..instruments.compile_check import TARGETS

    return list(TARGETS)


def _passed(checked: Sequence[Outcome] | Sequence[self_test.Result]) -> int:
    return sum(not one.problems for one in checked)


def _compile_all(family: str | None, variants: bool, targets: list[str], jobs: int) -> Iterator[Outcome]:
    from ..instruments.compile_check import is_for

    configurations = enumerate(kernels.shipped(family, variants=variants))
    work = [(i, target) for (i, one), target in product(configurations, targets) if is_for(one, target)]
    with ProcessPoolExecutor(max_workers=jobs) as pool:
        yield from pool.map(partial(_compile_one, family, variants), *zip(*work, strict=True))


def _compile_one(family: str | None, variants: bool, index: int, target: str) -> Outcome:
    # Kernels can't be sent to another process; their place in the list can.
    from ..instruments.compile_check import compile_configuration

    result = compile_configuration(list(kernels.shipped(family, variants=variants))[index], target)
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
