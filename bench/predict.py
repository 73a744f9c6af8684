"""Predict device times from what is moved and computed: ``python -m fusednn bench predict [-o FILE]``.  Needs no GPU.

A prediction is the largest of bytes / copy rate, operations / matrix rate, and, of ours, the time of the instructions
of our kernels: see `fusednn_bench.instructions`.  The rates are those of ``machine.json``.  Cases are those of a quick
run which are large enough for a GPU's rates to decide, and whose products, if any, are of the type that the matrix rate
is of.
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

BENCH = Path(__file__).resolve().parent
sys.path.insert(0, str(BENCH))

from fusednn_bench.launched import take_cpu_tensors

if __name__ == "__main__":  # whoever imports this has decided
    os.environ.pop("TRITON_INTERPRET", None)
    take_cpu_tensors()

from fusednn_bench.environment import describe_environment, describe_settings, describe_sources
from fusednn_bench.instructions import seconds_of
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
                seconds = seconds_of(case, machine)["step"]
                yield from _pair(case.record, case.budget(), eager_step_work(case), seconds, machine)
            elif isinstance(case, Case) and case.budget("forward_backward") >= LARGE_BYTES:
                yield from _of_case(case, machine)


def _of_case(case: Case, machine: Machine) -> Iterator[dict[str, Any]]:
    seconds = seconds_of(case, machine)
    seconds["forward_backward"] = sum(seconds.values())
    for direction in DIRECTIONS:
        if direction != "forward_backward" and not case.budget("backward"):
            continue  # gradients are made on the way forward: neither direction compares with eager's
        work = eager_work(case)[direction]
        budget = case.budget(direction)
        if not (work.operations and case.dtype_name != machine["matrix_dtype"]):

            def record(contestant: str, direction: Any = direction) -> dict[str, Any]:
                return case.record(contestant, direction)

            yield from _pair(record, budget, work, seconds[direction], machine)


def _pair(record: Any, budget: float, work: Work, seconds: float, machine: Machine) -> Iterator[dict[str, Any]]:
    """Of fusednn, whose instructions take so many ``seconds``, and of eager, whose instructions aren't known."""
    for contestant, moved, executed in (("fusednn", budget, seconds), ("eager", work.bytes, 0.0)):
        memory = moved / machine["copy_bytes_per_second"]
        products = work.operations / machine["matrix_operations_per_second"]
        yield {
            **record(contestant),
            "bytes": moved,
            "operations": work.operations,
            "operations_bound": products > max(memory, executed),
            "instructions_us": 1e6 * executed,
            "predicted_us": 1e6 * max(memory, products, executed),
        }


if __name__ == "__main__":
    sys.exit(main())
