"""Benchmarks under pytest: timings with a GPU, counts without one.  What and how: ``bench/README.md``."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

# Triton decides for its interpreter when it is imported, so this comes before anything that imports it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

from fusednn_bench.cases import Case
from fusednn_bench.contest import CONTESTANTS, Contest, Effort, run_contest
from fusednn_bench.counting import count_case
from fusednn_bench.environment import describe_environment, describe_settings, describe_sources
from fusednn_bench.results import Result, new_result, write_result
from fusednn_bench.steps import StepCase, count_step_case, run_step_contest
from fusednn_bench.tables import counted_table, timed_tables
from fusednn_bench.timing import CopyRate, DeviceTimer, measure_copy

_RESULTS = Path(__file__).parent / "results"
_COPY_BYTES = 2 * 2**30
_QUICK_SECONDS = 270.0


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fusednn benchmarks")
    group.addoption("--quick", action="store_true", help="a selection of cases, within 5 minutes on an H200 (default)")
    group.addoption("--full", action="store_true", help="all cases, with torch.compile's max-autotune mode too")
    group.addoption("--output", type=Path, metavar="DIR", help="where the result file goes (default: bench/results)")
    group.addoption(
        "--time-limit",
        type=float,
        metavar="SECONDS",
        help=f"leave out the cases that are not begun by then (default: {_QUICK_SECONDS:.0f}, none with --full)",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("quick") and config.getoption("full"):
        raise pytest.UsageError("--quick or --full, not both")
    if getattr(config.option, "dist", "no") != "no" or hasattr(config, "workerinput"):
        raise pytest.UsageError("benchmarks run one after another: leave out -n")
    # The summary at the end tells more than pytest-benchmark's own table, which -v still prints.
    if hasattr(config.option, "benchmark_quiet"):
        config.option.benchmark_quiet = True
    config.stash[_RUN] = Run(config)


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Benchmarks are the files ``bench_*.py``; those named on the command line pytest collects itself."""
    if file_path.match("bench_*.py") and not parent.session.isinitpath(file_path):
        module: pytest.Module = pytest.Module.from_parent(parent, path=file_path)
        return module
    return None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``case`` runs over the module's cases, and ``contestant`` within it, so that a case is measured once."""
    run = metafunc.config.stash[_RUN]
    if "case" in metafunc.fixturenames:
        cases = metafunc.module.timed_cases(run.full) if run.timed else metafunc.module.counted_cases()
        metafunc.parametrize("case", cases, ids=lambda case: case.id, scope="session")
    if "contestant" in metafunc.fixturenames:
        peers = {name: None for case in metafunc.module.timed_cases(run.full) for name in case.operation.peers()}
        metafunc.parametrize("contestant", (*run.contestants, *peers))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Timings need a GPU, counts the interpreter: keep those that this machine can make."""
    wanted = "device_samples" if config.stash[_RUN].timed else "counts"
    other = [item for item in items if wanted not in getattr(item, "fixturenames", ())]
    config.hook.pytest_deselected(items=other)
    items[:] = [item for item in items if item not in set(other)]


class Run:
    """One session of benchmarks: what it measures, and the result that it gathers."""

    def __init__(self, config: pytest.Config) -> None:
        from fusednn.kernels import INTERPRETING

        self.timed = torch.cuda.is_available() and not INTERPRETING
        self.full: bool = config.getoption("full")
        self.contestants = CONTESTANTS if self.full else CONTESTANTS[:3]
        self.output: Path | None = config.getoption("output") or (_RESULTS if self.timed else None)
        limit = config.getoption("time_limit")
        self._limit = limit if limit is not None else float("inf") if self.full else _QUICK_SECONDS
        self._started = time.monotonic()
        self._timer: DeviceTimer | None = None
        self._contests: dict[str, Contest | Exception] = {}
        self.written: Path | None = None
        if self.timed:
            torch.backends.cudnn.benchmark = True
        settings = {"selection": "full" if self.full else "quick", **describe_settings()}
        kind = "timed" if self.timed else "counted"
        self.result: Result = new_result(kind, describe_environment(), describe_sources(), settings)

    def contest(self, case: Case | StepCase) -> Contest:
        """The contest of a case, held when it is first asked for."""
        if case.id not in self._contests:
            self._contests[case.id] = self._hold(case)
        held = self._contests[case.id]
        if isinstance(held, Exception):
            raise held
        return held

    def _hold(self, case: Case | StepCase) -> Contest | Exception:
        if time.monotonic() - self._started > self._limit:
            self._leave_out(case, None, "time limit")
            return Contest(left_out=dict.fromkeys(self.contestants, "time limit"))
        try:
            if isinstance(case, StepCase):
                contest = run_step_contest(case, self._ready_timer(), self.contestants, Effort())
            else:
                contest = run_contest(case, self._ready_timer(), self.contestants, Effort())
        except Exception as error:
            self._leave_out(case, None, f"{type(error).__name__}: {error}")
            return error
        for contestant, reason in contest.left_out.items():
            self._leave_out(case, contestant, reason)
        self.result["cases"] += contest.records
        return contest

    def _leave_out(self, case: Case | StepCase, contestant: str | None, reason: str) -> None:
        self.result["left_out"].append({"case": case.id, "contestant": contestant, "reason": reason})

    def _ready_timer(self) -> DeviceTimer:
        if self._timer is None:
            self._timer = DeviceTimer()
            self._measure_copy()
        return self._timer

    def _measure_copy(self) -> None:
        assert self._timer is not None
        copy = CopyRate(_COPY_BYTES)
        measure_copy(self._timer, copy)
        previous = self.result["copy"]["samples_us"] if self.result["copy"] else []
        self.result["copy"] = {"bytes": copy.bytes, "samples_us": previous + copy.samples_us}

    def finish(self, complete: bool) -> None:
        """Measure the copy once more, against drift, and write the result."""
        if not self.result["cases"]:
            return
        self.result["complete"] = complete
        if self.timed and complete:
            self._measure_copy()
        if self.output is not None:
            self.written = write_result(self.result, self.output)


_RUN: pytest.StashKey[Run] = pytest.StashKey()


@pytest.fixture(scope="session")
def run(request: pytest.FixtureRequest) -> Run:
    return request.config.stash[_RUN]


@pytest.fixture
def device_samples(run: Run, case: Case | StepCase, contestant: str) -> dict[str, list[float]]:
    """Device microseconds of a contestant by direction; skips where it was left out, with the reason."""
    contest = run.contest(case)
    if contestant in contest.left_out:
        pytest.skip(contest.left_out[contestant])
    if contestant not in (*run.contestants, *case.operation.peers()):
        pytest.skip(f"{contestant} has nothing for this operation")
    return {
        record["direction"]: record["device_us"] for record in contest.records if record["contestant"] == contestant
    }


@pytest.fixture
def counts(run: Run, case: Case | StepCase) -> list[dict[str, Any]]:
    """The counts of a case, ours and eager's."""
    records = count_step_case(case) if isinstance(case, StepCase) else count_case(case)
    run.result["cases"] += records
    return records


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    ended = exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
    session.config.stash[_RUN].finish(complete=ended and not session.config.option.collectonly)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    run = config.stash[_RUN]
    if not run.result["cases"]:
        return
    terminalreporter.section("fusednn benchmarks")
    environment = run.result["environment"]
    terminalreporter.line(f"{environment['device']}, torch {environment['torch']}, triton {environment['triton']}")
    terminalreporter.line(timed_tables(run.result) if run.timed else counted_table(run.result["cases"]))
    for left_out in run.result["left_out"]:
        who = left_out["contestant"] or "all"
        terminalreporter.line(f"left out: {left_out['case']} ({who}): {left_out['reason']}")
    terminalreporter.line(f"written: {run.written}" if run.written else "nothing written (--output DIR writes counts)")
