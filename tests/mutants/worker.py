"""A process that has imported what takes long, and forks for each run of tests: the mutant's own time is left.

``python -m mutants.worker`` reads one line of JSON for each run, and answers with one.
"""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

TESTS = Path(__file__).parents[1]
PASSED = (0, 5)  # 5: no test has anything to say in this mode
QUICK = "not thorough and not grid"
#: The suite's modes: their environment, and the tests that ``make test`` runs in them.
MODES = {
    "stock": ({"FUSEDNN_VGPU": "0", "TRITON_INTERPRET": "0"}, f"{QUICK} and not compiles"),
    "compiled": ({"FUSEDNN_VGPU": "80", "TRITON_INTERPRET": "0"}, QUICK),
    "interpreter": ({"FUSEDNN_VGPU": "0", "TRITON_INTERPRET": "1"}, f"(interpreter or smoke) and {QUICK}"),
}


class Selection(NamedTuple):
    """Test files, and those of all operations: of these, where there are ``names``, the cases that have one of them."""

    tests: Sequence[str]
    of_all: Sequence[str] = ()
    names: Sequence[str] = ()


class Outcome(NamedTuple):
    """Of a run of tests."""

    status: int  # pytest's, or the signal that ended it, negative
    failed: str  # the test that did
    seconds: float  # of processor time


class Worker:
    """Runs tests on copies of the library, in one of the `MODES`."""

    def __init__(self, mode: str) -> None:
        self.mode = mode
        variables, markers = MODES[mode]
        environment = {**os.environ, **variables, "OMP_NUM_THREADS": "1"}
        environment.setdefault("VGPU_CACHE", str(TESTS.parent / ".cache" / "vgpu"))  # not the copy's
        command = [sys.executable, "-m", "mutants.worker", markers]
        self._process: Any = subprocess.Popen(
            command, cwd=TESTS, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, library: Path, selection: Selection, limit: int) -> Outcome:
        """Tests on the library in the folder ``library``, up to the first that fails, for ``limit`` seconds of
        processor time at most.
        """
        print(json.dumps([str(library), selection, limit]), file=self._process.stdin, flush=True)
        return Outcome(*json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


class _Plugin:
    """Runs of every test function one case, then of every function another, since a fault is seldom seen by one case
    alone; and tells which test fails.
    """

    def __init__(self, pipe: int, selection: Selection) -> None:
        self._pipe, self._selection = pipe, selection

    def _is_of_another(self, test: str) -> bool:
        file, _, rest = test.partition("::")
        case = rest.partition("[")[2].lower()
        of_all = bool(case and self._selection.names) and file in self._selection.of_all
        return of_all and not any(name in case for name in self._selection.names)

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = [item for item in items if not self._is_of_another(item.nodeid)]
        cases: dict[str, int] = {}
        rank = {}
        for item in items:
            function = item.nodeid.partition("[")[0]
            rank[item] = cases[function] = cases.get(function, -1) + 1
        items.sort(key=rank.__getitem__)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            os.write(self._pipe, report.nodeid.encode())

    pytest_collectreport = pytest_runtest_logreport


def _run(markers: str, library: str, selection: Selection, limit: int) -> Outcome:
    read, write = os.pipe()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 1))
        nothing = os.open(os.devnull, os.O_RDWR)
        for stream in range(3):
            os.dup2(nothing, stream)
        os.chdir(TESTS.parent)
        sys.path.insert(0, library)
        os.environ["PYTHONPATH"] = library  # for processes that tests start
        pytest, status = import_module("pytest"), 0
        # Of one family those of all are few, and see most: first.
        parts = [selection.of_all, selection.tests] if selection.names else [selection.tests, selection.of_all]
        for tests in filter(None, parts):
            status = pytest.main(["-x", "-q", "-m", markers, *tests], plugins=[_Plugin(write, selection)])
            if status not in PASSED:
                break
        os._exit(int(status))
    os.close(write)
    with os.fdopen(read) as pipe:
        failed = pipe.read()
    _, status = os.waitpid(child, 0)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Outcome(os.waitstatus_to_exitcode(status), failed, round(seconds, 1))


if __name__ == "__main__":
    for name in ("pytest", "torch._dynamo", "triton"):
        if find_spec(name.partition(".")[0]):
            import_module(name)
    for line in sys.stdin:
        library, selection, limit = json.loads(line)
        print(json.dumps(_run(sys.argv[1], library, Selection(*selection), limit)), flush=True)
