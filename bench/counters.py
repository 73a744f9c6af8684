"""Hardware counters of a family's kernels: ``python bench/counters.py bench_pool -o FILE``.  Needs Nsight Compute.

The first quick case of each operation runs once under ``ncu``, with cold caches.  Each launch becomes a record: the
DRAM bytes that it moved, beside the bytes that the case must move; the share of cycles in which its schedulers issued;
its bank conflicts.  ``FILE`` holds all families; those that it has are replaced.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import csv
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parent
sys.path.insert(0, str(BENCH))

from fusednn_bench.where import TIMED, prepare

if __name__ == "__main__":  # whoever imports this has decided
    prepare()
# isort: split
from fusednn_bench.environment import describe_environment, describe_settings, describe_sources
from fusednn_bench.results import load_result, new_result, save_result

from fusednn.benchmark.cases import Case, forward, gradients, make_inputs

#: Of a record, and what Nsight Compute calls them.
METRICS = {
    "dram_bytes": ("dram__bytes_read.sum", "dram__bytes_write.sum"),
    "duration_us": ("gpu__time_duration.sum",),
    "issue_percent": ("smsp__issue_active.avg.pct_of_peak_sustained_active",),
    "bank_conflicts": ("l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum",),
}
_UNITS = {"Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9, "ns": 1e-3, "nsecond": 1e-3, "ms": 1e3, "msecond": 1e3}
_MOST_CASES = 6


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Hardware counters of a family's kernels.")
    parser.add_argument("family", help="a module of benchmarks: bench_pool, ...")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--run", metavar="CASE", help=argparse.SUPPRESS)  # under ncu
    parsed = parser.parse_args(arguments)
    cases = {case.id: case for case in _cases(parsed.family)}
    if parsed.run:
        _run(cases[parsed.run])
        return 0
    result = _result(parsed.output)
    result["cases"] = [record for record in result["cases"] if record["size"] != parsed.family]
    for case in cases.values():
        result["cases"] += _records(case, parsed.family, parsed.output)
        save_result(result, parsed.output)
    return 0


def _cases(family: str) -> list[Case]:
    module = import_module(family)
    cases = module.timed_cases(full=False) if TIMED else module.counted_cases()
    first = {case.operation.name: case for case in reversed(cases) if isinstance(case, Case)}
    return [case for case in cases if case in first.values()][:_MOST_CASES]


def _run(case: Case) -> None:
    """One call each way that is counted, behind one that compiles."""
    import torch

    device = torch.device("cuda" if TIMED else "cpu")
    inputs = make_inputs(case, device, seed=0)
    gradients(forward(case.operation.ours, inputs), inputs)
    if TIMED:
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStart()
    gradients(forward(case.operation.ours, inputs), inputs)
    if TIMED:
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStop()


def _records(case: Case, family: str, output: Path) -> Iterator[dict[str, Any]]:
    names = ",".join(name for names in METRICS.values() for name in names)
    options = ("--clock-control", "none", "--profile-from-start", "off", "--csv", "--metrics", names)
    line = [sys.executable, str(BENCH / "counters.py"), family, "-o", str(output), "--run", case.id]
    done = subprocess.run(["ncu", *options, *line], capture_output=True, text=True, check=True)
    record = case.record("fusednn", "forward_backward")
    for launch, (kernel, figures) in enumerate(parse(done.stdout)):
        yield {**record, "kernel": f"{launch} {kernel}", **figures}


def parse(text: str) -> list[tuple[str, dict[str, float]]]:
    """Launches in their order, from Nsight Compute's CSV: a line a launch and metric, behind lines of its own talk."""
    lines = text.splitlines()
    head = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    launches: dict[str, tuple[str, dict[str, float]]] = {}
    of_metric = {metric: name for name, metrics in METRICS.items() for metric in metrics}
    for row in csv.DictReader(lines[head:]):
        _, figures = launches.setdefault(row["ID"], (row["Kernel Name"], dict.fromkeys(METRICS, 0.0)))
        value = float(row["Metric Value"].replace(",", "")) * _UNITS.get(row["Metric Unit"], 1.0)
        figures[of_metric[row["Metric Name"]]] += value
    return list(launches.values())


def _result(output: Path) -> dict[str, Any]:
    if output.exists():
        return load_result(output)
    return new_result("counters", describe_environment(), describe_sources(), describe_settings())


if __name__ == "__main__":
    sys.exit(main())
