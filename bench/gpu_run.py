"""Everything that needs a GPU, in one command: ``python3 bench/gpu_run.py [FOLDER]``, then with ``--rest``.

Installs the package from this checkout without a network, runs the tests on the GPU, then the quick benchmarks: the
headline cases of every family.  With ``--rest`` all other benchmarks instead of the tests.  Each step has its own time:
8 minutes in all at most.  Benchmarks go on with what the folder's result file holds, so a run that was cut short, or
ran out of time, is simply repeated.  Logs, JUnit XML, the result and its report go into the folder.  Benchmarks run
even where tests fail.  Exit code: 0 where everything passed, 1 where anything failed, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULT = "benchmarks.json"
GRACE_SECONDS = 6.0  # to write results after an interrupt
_TAIL_LINES = 60


@dataclass(frozen=True)
class Step:
    """A command and the seconds that it may take."""

    name: str
    command: tuple[str, ...]
    limit: float


@dataclass(frozen=True)
class Outcome:
    """How a step ended; ``code`` is None where it ran out of time."""

    name: str
    code: int | None
    seconds: float

    @property
    def passed(self) -> bool:
        return self.code == 0


def steps(folder: Path, *, rest: bool = False, tests: bool = True) -> list[Step]:
    """``rest``: every case, with torch.compile's max-autotune mode; there is no time for the tests then."""
    python = sys.executable
    pytest = (python, "-m", "pytest", "-p", "no:xdist")
    install = (python, "-m", "pip", "install", "--no-index", "--no-deps", "--no-build-isolation", "-e", ".")
    suite = (*pytest, "tests", "-m", "not compiles", "-x", "-q", f"--junitxml={folder / 'tests.xml'}")
    tested = [Step("tests", suite, 155)] if tests and not rest else []
    # The benchmarks stop by themselves before they are stopped, and so write their result.
    limit = 400 - sum(step.limit + GRACE_SECONDS for step in tested)
    selection = ("--full" if rest else "--quick", f"--time-limit={limit - 40:.0f}", f"--resume={folder / RESULT}")
    bench = (*pytest, "bench", *selection, "-q", f"--junitxml={folder / 'bench.xml'}")
    return [Step("install", install, 45), *tested, Step("bench", bench, limit)]


def run_step(step: Step, folder: Path, environment: Mapping[str, str]) -> Outcome:
    """Run a step with its output in ``<folder>/<name>.log``; interrupt it when its time is over, then kill it."""
    started = time.monotonic()
    with (folder / f"{step.name}.log").open("w", encoding="utf-8") as log:
        try:
            process = subprocess.Popen(
                step.command,
                cwd=ROOT,
                env=dict(environment),
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        except OSError as error:
            log.write(f"{error}\n")
            return Outcome(step.name, 127, 0.0)
        code: int | None
        try:
            code = process.wait(step.limit)
        except subprocess.TimeoutExpired:
            code = None
            _stop(process)
    return Outcome(step.name, code, round(time.monotonic() - started, 1))


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGINT)  # pytest finishes its reports
    try:
        process.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def write_reports(folder: Path) -> None:
    """A Markdown report beside the result."""
    result = folder / RESULT
    if result.exists():
        command = [sys.executable, str(ROOT / "bench" / "report.py"), "--uncommitted"]
        subprocess.run([*command, str(result), "-o", str(result.with_suffix(".md"))], check=False)


def _has_gpu(environment: Mapping[str, str]) -> bool:
    question = "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 3)"
    return subprocess.run([sys.executable, "-c", question], env=dict(environment), check=False).returncode == 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Install, test and benchmark on this machine's GPU.")
    parser.add_argument(
        "folder", type=Path, nargs="?", help="where logs and results go (default: bench/results/run-DATE)"
    )
    parser.add_argument("--commit", help="the commit of these sources, where they are no git checkout")
    parser.add_argument("--rest", action="store_true", help="the benchmarks that aren't in the folder's result yet")
    parser.add_argument("--no-tests", dest="tests", action="store_false", help="leave their time to the benchmarks")
    parsed = parser.parse_args(arguments)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONUNBUFFERED"] = "1"
    if parsed.commit:
        environment["FUSEDNN_COMMIT"] = parsed.commit
    if not _has_gpu(environment):
        print("gpu_run: PyTorch sees no GPU here", file=sys.stderr)
        return 2
    folder: Path = parsed.folder or ROOT / "bench" / "results" / f"run-{datetime.now():%Y%m%dT%H%M%S}"
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    outcomes = []
    for step in steps(folder, rest=parsed.rest, tests=parsed.tests):
        print(f"--- {step.name}: {' '.join(step.command)}", flush=True)
        outcome = run_step(step, folder, environment)
        outcomes.append(outcome)
        log = (folder / f"{step.name}.log").read_text(encoding="utf-8", errors="replace")
        print("\n".join(log.splitlines()[-_TAIL_LINES:]), flush=True)
    write_reports(folder)
    (folder / "steps.json").write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1) + "\n")
    for outcome in outcomes:
        ended = "out of time" if outcome.code is None else f"exit code {outcome.code}"
        print(f"{outcome.name:8} {'passed' if outcome.passed else 'FAILED'}, {ended}, {outcome.seconds} s")
    print(f"written to {folder}")
    return 0 if all(outcome.passed for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
