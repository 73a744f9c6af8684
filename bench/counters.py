"""Hardware counters of a family's kernels: ``python bench/counters.py bench_pool -o FILE``.  Needs Nsight Compute.

The first quick case of each operation runs once under ``ncu``, all in one process, with cold caches.  Each launch is
a record: the DRAM bytes that it moved, beside the bytes that the case must move; the share of cycles in which its
schedulers issued; its bank conflicts.  ``FILE`` holds all families; those that it has are replaced.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import csv
import fcntl
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
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
#: A kernel of PyTorch's that no case launches (`torch.cuda._sleep`): it stands before each case's.
MARK = "spin_kernel"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Hardware counters of a family's kernels.")
    parser.add_argument("family", help="a module of benchmarks: bench_pool, ...")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)  # under ncu
    parsed = parser.parse_args(arguments)
    cases = _cases(parsed.family)
    if parsed.run:
        _run(cases)
        return 0
    found = _records(cases, parsed.family, parsed.output)
    with _alone(parsed.output):
        result = _result(parsed.output)
        names = {case.operation.name for case in cases}
        result["cases"] = [record for record in result["cases"] if record["operation"] not in names] + found
        save_result(result, parsed.output)
    return 0


@contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Families run side by side, and add to one file."""
    with Path(tempfile.gettempdir(), f"{output.name}.{os.getuid()}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _cases(family: str) -> list[Case]:
    module = import_module(family)
    cases = module.timed_cases(full=False) if TIMED else module.counted_cases()
    first = {case.operation.name: case for case in reversed(cases) if isinstance(case, Case)}
    return [case for case in cases if case in first.values()][:_MOST_CASES]


def _run(cases: Sequence[Case]) -> None:
    """Of each case one call each way that is counted, behind one that compiles."""
    import torch

    device = torch.device("cuda" if TIMED else "cpu")
    for case in cases:
        inputs = make_inputs(case, device, seed=0)
        gradients(forward(case.operation.ours, inputs), inputs)
        with _profiled():
            gradients(forward(case.operation.ours, inputs), inputs)
        print(f"counted {case.id}", flush=True)


@contextmanager
def _profiled() -> Iterator[None]:
    import torch

    if not TIMED:
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStart()
    torch.cuda._sleep(1)
    yield
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()


def _records(cases: Sequence[Case], family: str, output: Path) -> list[dict[str, Any]]:
    names = ",".join(name for names in METRICS.values() for name in names)
    options = ("--clock-control", "none", "--profile-from-start", "off", "--csv", "--metrics", names)
    line = [sys.executable, str(BENCH / "counters.py"), family, "-o", str(output), "--run"]
    done = subprocess.run(["ncu", *options, *line], stdout=subprocess.PIPE, text=True, check=True)
    found = []
    for case, launches in zip(cases, by_case(parse(done.stdout)), strict=True):
        record = case.record("fusednn", "forward_backward")
        found += [{**record, "kernel": f"{n} {kernel}", **figures} for n, (kernel, figures) in enumerate(launches)]
    return found


_Launch = tuple[str, dict[str, float]]


def by_case(launches: Iterable[_Launch]) -> list[list[_Launch]]:
    """The launches behind each mark."""
    found: list[list[_Launch]] = []
    for launch in launches:
        if MARK in launch[0]:
            found.append([])
        else:
            found[-1].append(launch)
    return found


def parse(text: str) -> list[_Launch]:
    """Launches in their order, from Nsight Compute's CSV: a line a launch and metric, behind lines of its own talk."""
    lines = text.splitlines()
    head = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    launches: dict[str, _Launch] = {}
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
