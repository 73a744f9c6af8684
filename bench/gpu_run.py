"""Everything that needs a GPU, in one command, for a quarter of an hour: ``python3 bench/gpu_run.py [FOLDER]``, twice.

A call takes 6.5 minutes at most.  The second, given the first one's folder (or ``--after FOLDER``), goes on where it
ended.  The parts (``--list``), their order and their times are in ``fusednn_bench/parts.py``; what fails or hangs takes
no other part with it.  At most eight files are left in the folder, written as results come: ``summary.json`` (each
command's outcome), ``report.md``, ``logs.tar.gz``, ``benchmarks.json``, ``thresholds.json``, ``peak.json``,
``host-times.json``, ``counters.json``.

``--rehearse`` runs the same commands without a GPU: tests on kernels compiled for the virtual GPU, the host's time over
a driver that does nothing, all else in Triton's interpreter, and scripts in the place of Nsight Compute and
compute-sanitizer.  Its files say so, and none of them is a measurement.

Exit code: 0 where all that ran passed, 1 where something failed, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from shutil import copy

sys.path.insert(0, str(Path(__file__).resolve().parent))

from fusednn_bench.parts import BENCH, ROOT, Machine, Part, parts
from fusednn_bench.schedule import Outcome, run_parts

SECONDS = 390.0  # of a call
SUMMARY, LOGS, REPORT = "summary.json", "logs.tar.gz", "report.md"
_TAIL_LINES = 15
_FOR_INSTALL = 60.0  # seconds, at the beginning of a call
_FOR_REPORTS = 25.0  # at its end

#: Without a network.
_INSTALL = ("-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--editable", ".")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Test and measure on this machine's GPU, for minutes.")
    parser.add_argument("folder", type=Path, nargs="?", help="for results (default: bench/results/run-DATE)")
    parser.add_argument("--after", type=Path, metavar="FOLDER", help="go on with what an earlier call left there")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of the whole call (default: %(default)s)")
    parser.add_argument("--only", action="append", metavar="PART", help="only this part; repeatable")
    parser.add_argument("--commit", help="the commit of these sources, where they are no git checkout")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU: stand-ins take its place")
    parser.add_argument("--scale", type=float, default=1.0, help="multiply the parts' times, for a short rehearsal")
    parser.add_argument("--most", type=int, metavar="N", help="only N commands of each part, likewise")
    parser.add_argument("--list", action="store_true", help="print the parts and their times")
    parsed = parser.parse_args(arguments)
    folder: Path = (parsed.folder or ROOT / "bench" / "results" / f"run-{datetime.now():%Y%m%dT%H%M%S}").resolve()
    machine = Machine(os.cpu_count() or 1, parsed.rehearse, parsed.scale, parsed.most)
    started = time.monotonic()
    environment = _environment(machine, parsed.commit)
    if not (parsed.rehearse or parsed.list):
        if not _has_gpu(environment):
            print("gpu_run: PyTorch sees no GPU here", file=sys.stderr)
            return 2
        subprocess.run([sys.executable, *_INSTALL], cwd=ROOT, check=True, timeout=_FOR_INSTALL)
    chosen = [part for part in parts(folder, machine, _families()) if not parsed.only or part.name in parsed.only]
    if parsed.list:
        for part in chosen:
            print(f"{part.name:12} {part.seconds:4.0f} s  {len(part.commands):3} commands  {part.purpose}")
        return 0
    seconds = parsed.seconds - (time.monotonic() - started)
    return call(chosen, folder, parsed.after, machine, environment, seconds)


def call(
    chosen: Sequence[Part],
    folder: Path,
    after: Path | None,
    machine: Machine,
    environment: Mapping[str, str],
    seconds: float,
) -> int:
    """One call: run what is open of the chosen parts, print how it ended, and return the exit code."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(after.iterdir()) if after else ():
        copy(file, folder)
    before = read_outcomes(folder)
    logs = ROOT / ".build" / "gpu_run" / folder.name
    logs.mkdir(parents=True, exist_ok=True)

    def written(outcomes: list[Outcome]) -> None:
        _write_summary(folder, logs, machine, outcomes)

    outcomes = run_parts(chosen, logs, environment, seconds - _FOR_REPORTS, before, written)
    _write_report(folder, outcomes)
    for left in folder.glob(".*.json.*"):  # of what was killed while it wrote
        left.unlink()
    new = [outcome for outcome in outcomes if outcome not in before]
    for outcome in new:
        if not outcome.passed:
            log = (logs / f"{outcome.command}.log").read_text(encoding="utf-8", errors="replace")
            print(f"--- {outcome.part}: {outcome.command}: {outcome.words}", *log.splitlines()[-_TAIL_LINES:], sep="\n")
    print(table(chosen, outcomes))
    print(f"written to {folder}")
    return 0 if all(outcome.passed for outcome in new) else 1


def table(chosen: Sequence[Part], outcomes: Sequence[Outcome]) -> str:
    """A line a part: how many of its commands passed, failed, ran out of time, and weren't begun."""
    lines = []
    for part in chosen:
        own = [outcome for outcome in outcomes if outcome.part == part.name]
        late = sum(outcome.code is None for outcome in own)
        passed = sum(outcome.passed for outcome in own)
        counts = {
            "passed": passed,
            "failed": len(own) - passed - late,
            "out of time": late,
            "not begun": len(part.commands) - len(own),
        }
        lines.append(f"{part.name:12} " + ", ".join(f"{n} {words}" for words, n in counts.items() if n))
    return "\n".join(lines)


def read_outcomes(folder: Path) -> list[Outcome]:
    """What an earlier call left in the folder."""
    file = folder / SUMMARY
    if not file.exists():
        return []
    return [Outcome(**one) for one in json.loads(file.read_text(encoding="utf-8"))["outcomes"]]


def _write_summary(folder: Path, logs: Path, machine: Machine, outcomes: Sequence[Outcome]) -> None:
    failed = {
        outcome.command: (logs / f"{outcome.command}.log").read_text(encoding="utf-8", errors="replace")[-4000:]
        for outcome in outcomes
        if not outcome.passed and (logs / f"{outcome.command}.log").exists()
    }
    summary = {"rehearsal": machine.rehearsal, "outcomes": [asdict(outcome) for outcome in outcomes], "failed": failed}
    (folder / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    with tarfile.open(folder / LOGS, "w:gz") as archive:
        archive.add(logs, arcname="logs")


#: What measured results are compared with.
_MADE_WITHOUT_A_GPU = ("predicted.json", "host.json", "instructions.json")


def _write_report(folder: Path, outcomes: Sequence[Outcome]) -> None:
    """What failed, and behind it the report of what was measured."""
    failed = [f"1. {one.command}: {one.words}" for one in outcomes if not one.passed]
    head = "\n".join(["# Failed, or out of time", "", *(failed or ["Nothing."]), "", ""])
    (folder / REPORT).write_text(head, encoding="utf-8")
    known = [ROOT / "bench" / "results" / name for name in _MADE_WITHOUT_A_GPU]
    beside = [word for path in known if path.exists() for word in ("--beside", str(path))]
    files = [str(path) for path in sorted(folder.glob("*.json")) if path.name != SUMMARY]
    line = [sys.executable, str(BENCH / "report.py"), "--uncommitted", *beside, *files]
    try:
        done = subprocess.run(line, check=False, timeout=_FOR_REPORTS, capture_output=True, text=True)
    except subprocess.TimeoutExpired:  # what was measured is written already
        print(f"no time was left for {REPORT}: python -m fusednn bench report {folder}/*.json")
        return
    with (folder / REPORT).open("a", encoding="utf-8") as file:
        file.write(done.stdout)
    print(done.stderr, end="")


def _environment(machine: Machine, commit: str | None) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONUNBUFFERED"] = "1"
    if commit:
        environment["FUSEDNN_COMMIT"] = commit
    if machine.rehearsal:
        stand_ins = str(BENCH / "stand_ins")
        environment |= {"TRITON_INTERPRET": "1", "PATH": f"{stand_ins}{os.pathsep}{environment.get('PATH', '')}"}
    return environment


def _families() -> list[str]:
    """Of the self-test; asked in another process, since this one must not make a context on the GPU."""
    line = "from fusednn.commands.self_test import families; print(*families())"
    done = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, check=False, cwd=ROOT)
    return done.stdout.split()


def _has_gpu(environment: Mapping[str, str]) -> bool:
    question = "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 3)"
    return subprocess.run([sys.executable, "-c", question], env=dict(environment), check=False).returncode == 0


if __name__ == "__main__":
    sys.exit(main())
