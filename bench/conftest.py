"""Benchmarks under pytest: timings with a GPU, counts without one.  What and how: ``bench/README.md``."""

# ruff: noqa: E402
from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from fusednn_bench.where import TIMED, prepare

prepare()

# isort: split
from fusednn_bench.results import InvalidResultError
from fusednn_bench.run import ResumeError, Run
from fusednn_bench.tables import counted_tables, timed_tables

from fusednn.benchmark.protocol import Measured

_RESULTS = Path(__file__).parent / "results"
_QUICK_SECONDS = 270.0
_RUN: pytest.StashKey[Run] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fusednn benchmarks")
    group.addoption("--quick", action="store_true", help="a selection of cases, within 5 minutes on an H200 (default)")
    group.addoption("--full", action="store_true", help="all cases, with torch.compile's max-autotune mode too")
    group.addoption("--output", type=Path, metavar="DIR", help="where the result file goes (default: bench/results)")
    group.addoption("--resume", type=Path, metavar="FILE", help="go on with this result file, or begin it")
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
    config.stash[_RUN] = _begin(config)


def _begin(config: pytest.Config) -> Run:
    from fusednn.kernels import INTERPRETING

    timed, full = TIMED and not INTERPRETING, config.getoption("full")
    limit = config.getoption("time_limit")
    try:
        return Run(
            timed=timed,
            full=full,
            folder=config.getoption("output") or (_RESULTS if timed else None),
            file=config.getoption("resume"),
            seconds=limit if limit is not None else float("inf") if full else _QUICK_SECONDS,
        )
    except (InvalidResultError, ResumeError) as error:
        raise pytest.UsageError(f"--resume: {error}") from error


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
        names = {name: None for case in metafunc.module.timed_cases(run.full) for name in case.contestants(run.usual)}
        metafunc.parametrize("contestant", names)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Timings need a GPU, counts the interpreter: keep those that this machine can make.

    The families take turns, each with its most important case first, so that a time limit cuts the end of each.
    """
    wanted = "device_samples" if config.stash[_RUN].timed else "counts"
    kept = [item for item in items if wanted in getattr(item, "fixturenames", ())]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    places: dict[Path, dict[str, int]] = {}  # of the cases within their families
    for item in kept:
        of_family = places.setdefault(item.path, {})
        of_family.setdefault(_case_id(item), len(of_family))
    items[:] = sorted(kept, key=lambda item: places[item.path][_case_id(item)])


def _case_id(item: pytest.Item) -> str:
    case_id: str = item.callspec.params["case"].id  # type: ignore[attr-defined]
    return case_id


@pytest.fixture(scope="session")
def run(request: pytest.FixtureRequest) -> Run:
    return request.config.stash[_RUN]


@pytest.fixture
def device_samples(run: Run, case: Measured, contestant: str) -> dict[str, list[float]]:
    """Device microseconds of a contestant by direction; skips where it was left out, with the reason."""
    if contestant not in case.contestants(run.usual):
        pytest.skip(f"{contestant} has nothing for this operation")
    contest = run.contest(case)
    if contestant in contest.left_out:
        pytest.skip(contest.left_out[contestant])
    return {
        record["direction"]: record["device_us"] for record in contest.records if record["contestant"] == contestant
    }


@pytest.fixture
def counts(run: Run, case: Measured) -> list[dict[str, Any]]:
    """The counts of a case, ours and eager's."""
    return run.counts(case)


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
    terminalreporter.line(timed_tables(run.result) if run.timed else counted_tables(run.result["cases"]))
    for left_out in run.result["left_out"]:
        who = left_out["contestant"] or "all"
        terminalreporter.line(f"left out: {left_out['case']} ({who}): {left_out['reason']}")
    terminalreporter.line(f"written: {run.written}" if run.written else "nothing written (--output DIR writes counts)")
