"""Predict device times from bytes and operations: ``python -m fusednn bench predict [-o FILE]``.  Needs no GPU.

A prediction is max(bytes / copy rate, operations / matrix rate), with the rates of ``machine.json``.  Cases are those
of a quick run which are large enough for a GPU's rates to decide, and whose products, if any, are of the type that the
matrix rate is of.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # whoever imports this has decided
    os.environ.setdefault("TRITON_INTERPRET", "1")  # the traffic meter is the interpreter's
BENCH = Path(__file__).resolve().parent
sys.path.insert(0, str(BENCH))

from fusednn_bench.environment import describe_environment, describe_settings, describe_sources
from fusednn_bench.results import new_result, save_result
from fusednn_bench.steps import StepCase, eager_step_work

from fusednn.benchmark.arithmetic import Work, eager_work
from fusednn.benchmark.cases import Case
from fusednn.benchmark.protocol import DIRECTIONS

LARGE_BYTES = 64_000_000

Machine = Mapping[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fusednn bench predict", description="Predict device times, without a GPU.")
    parser.add_argument("-o", "--output", type=Path, default=BENCH / "results" / "predicted.json", help="%(default)s")
    parsed = parser.parse_args(arguments)
    machine = json.loads((BENCH / "machine.json").read_text(encoding="utf-8"))
    result = new_result(
        "predicted", describe_environment(), describe_sources(), {"machine": machine, **describe_settings()}
    )
    result["cases"] = list(predictions(machine))
    result["complete"] = True
    save_result(result, parsed.output)
    print(f"{len(result['cases'])} predictions: {parsed.output}")
    return 0


def predictions(machine: Machine) -> Iterator[dict[str, Any]]:
    """Records of fusednn and eager for every case and direction that is predicted."""
    for path in sorted(BENCH.glob("bench_*.py")):
        for case in import_module(path.stem).timed_cases(full=False):
            if isinstance(case, StepCase):
                yield from _pair(case.record, case.budget(), eager_step_work(case), machine)
            elif isinstance(case, Case) and case.budget("forward_backward") >= LARGE_BYTES:
                yield from _of_case(case, machine)


def _of_case(case: Case, machine: Machine) -> Iterator[dict[str, Any]]:
    for direction in DIRECTIONS:
        if direction != "forward_backward" and not case.budget("backward"):
            continue  # gradients are made on the way forward: neither direction compares with eager's
        work = eager_work(case)[direction]
        budget = case.budget(direction)
        if not (work.operations and case.dtype_name != machine["matrix_dtype"]):

            def record(contestant: str, direction: Any = direction) -> dict[str, Any]:
                return case.record(contestant, direction)

            yield from _pair(record, budget, work, machine)


def _pair(record: Any, budget: float, work: Work, machine: Machine) -> Iterator[dict[str, Any]]:
    for contestant, moved in (("fusednn", budget), ("eager", work.bytes)):
        memory = moved / machine["copy_bytes_per_second"]
        products = work.operations / machine["matrix_operations_per_second"]
        yield {
            **record(contestant),
            "bytes": moved,
            "operations": work.operations,
            "operations_bound": products > memory,
            "predicted_us": 1e6 * max(memory, products),
        }


if __name__ == "__main__":
    sys.exit(main())
