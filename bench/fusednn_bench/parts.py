"""What is done on a GPU that is there for minutes: parts in the order of their worth, each of commands with a budget.

A part never takes another with it: its commands are processes of their own, one a family or a file, so that a kernel
that crashes the CUDA context fails alone, and one that hangs is killed when its part's time is over.
"""

from __future__ import annotations

import math
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

__all__ = ["Command", "Machine", "Part", "parts"]

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "bench"

#: Of ``thresholds.py``.
QUESTIONS = ("conv", "maxout", "maxout_backward", "small", "clusters")

_SHORTEST = 15.0  # seconds of a part, however short the whole is made: Python and PyTorch have to start

#: What pytest says where nothing was left to run.
NO_TESTS = 5


@dataclass(frozen=True)
class Command:
    """A process; its output goes into a log of its name."""

    name: str
    line: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """Commands that may run side by side, ``jobs`` at a time, for ``seconds`` in all, each for ``limit`` at most."""

    name: str
    purpose: str
    commands: tuple[Command, ...]
    seconds: float
    jobs: int = 1
    limit: float = math.inf


@dataclass(frozen=True)
class Machine:
    """Where the parts run: on a GPU, or in rehearsal, where Triton's interpreter takes its place, for tests the virtual
    GPU (where there is gcc), for the host's time a driver that does nothing, and stand-ins that of tools.

    ``scale`` multiplies all times; a part has no more than ``most`` commands.
    """

    cores: int
    rehearsal: bool = False
    scale: float = 1.0
    most: int | None = None

    @property
    def only(self) -> str:
        """Tests that can be made on a GPU alone; in rehearsal, a few that the interpreter makes."""
        return "smoke" if self.rehearsal else "gpu"

    @property
    def tests_environment(self) -> dict[str, str]:
        virtual = self.rehearsal and shutil.which("gcc") is not None
        return {"FUSEDNN_VGPU": "80", "TRITON_INTERPRET": "0"} if virtual else {}

    def shortened(self, part: Part) -> Part:
        seconds = part.seconds if self.scale == 1 else max(_SHORTEST, part.seconds * self.scale)
        return replace(part, seconds=seconds, commands=part.commands[: self.most])


def parts(folder: Path, machine: Machine, families: Sequence[str]) -> list[Part]:
    """All parts, the most valuable first.  Results go into ``folder``; one call has time for about the first half."""
    return [machine.shortened(part) for part in _parts(folder, machine, families)]


def _parts(folder: Path, machine: Machine, families: Sequence[str]) -> list[Part]:
    python, cores = sys.executable, machine.cores
    ahead = (
        *(Command(f"ahead-{name}", (python, str(BENCH / "warm.py"), name)) for name in _benchmarks()),
        *(Command(f"ahead-{name}", (python, str(BENCH / "thresholds.py"), name, "--warm")) for name in QUESTIONS),
        Command("ahead-host", (python, str(BENCH / "host.py"), "--warm")),
    )
    return [
        Part("smoke", "every family once, every dtype, against stock", tuple(_checks(families)), 45, cores),
        Part(
            "gpu-tests",
            "tests that only a GPU can make; beside them, kernels of the benchmarks are compiled",
            (*_tests("gpu", machine.only, _marked("gpu"), machine), *ahead),
            90,
            cores,
        ),
        Part("headline", "one case or two a family: device and host time beside stock", _bench(folder, "quick"), 130),
        Part(
            "tests",
            "all other tests",
            tuple(_tests("rest", f"not compiles and not {machine.only}", _files(), machine)),
            110,
            cores,
        ),
        Part(
            "thresholds",
            "where one of our two ways becomes the faster one",
            _programs(folder, "thresholds", QUESTIONS),
            75,
            limit=25,
        ),
        Part("peak", "what training steps of networks hold at most", (Command("peak", _peak(folder, machine)),), 40),
        Part("host", "what calls of tiny tensors cost the host", (Command("host", _host(folder)),), 50, limit=45),
        Part(
            "counters",
            "DRAM bytes, issue slots and bank conflicts by Nsight Compute",
            _programs(folder, "counters", _benchmarks()),
            90,
            max(1, cores // 4),
            limit=40,
        ),
        Part(
            "sanitizers", "memcheck and racecheck on the smoke set", tuple(_sanitizers(families)), 90, cores, limit=60
        ),
        Part("benchmarks", "all other cases", _bench(folder, "full"), 240),
    ]


def _checks(families: Sequence[str], *prefix: str, name: str = "smoke") -> Iterator[Command]:
    for family in families:
        line = (*prefix, sys.executable, "-m", "fusednn", "check", "--no-compile", "--family", family)
        yield Command(f"{name}-{family}", line)


def _sanitizers(families: Sequence[str]) -> Iterator[Command]:
    for tool in ("memcheck", "racecheck"):
        prefix = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--print-limit", "5")
        for command in _checks(families, *prefix, name=tool):
            # Neighbours within one block of PyTorch's cache would hide what lies out of bounds.
            yield Command(command.name, command.line, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


def _tests(name: str, markers: str, files: Sequence[Path], machine: Machine) -> Iterator[Command]:
    for file in files:
        line = (sys.executable, "-m", "pytest", str(file.relative_to(ROOT)), "-m", markers)
        whole = (*line, "-q", "-p", "no:xdist", "-p", "no:cacheprovider")
        yield Command(f"{name}-{file.stem}", whole, machine.tests_environment)


def _bench(folder: Path, selection: str) -> tuple[Command, ...]:
    # They stop by themselves, some time before they are stopped.
    limit = {"quick": 105, "full": 210}[selection]
    options = (f"--{selection}", f"--time-limit={limit}", f"--resume={folder / 'benchmarks.json'}")
    line = (sys.executable, "-m", "pytest", "bench", *options, "-q", "-p", "no:xdist", "-p", "no:cacheprovider")
    return (Command(f"bench-{selection}", line),)


def _programs(folder: Path, name: str, arguments: Iterable[str]) -> tuple[Command, ...]:
    """One after another: they add to one file."""
    line = (sys.executable, str(BENCH / f"{name}.py"), "-o", str(folder / f"{name}.json"))
    return tuple(Command(f"{name}-{argument}", (*line, argument)) for argument in arguments)


def _host(folder: Path) -> tuple[str, ...]:
    return (sys.executable, str(BENCH / "host.py"), "-o", str(folder / "host-times.json"), "--seconds", "0.3")


def _peak(folder: Path, machine: Machine) -> tuple[str, ...]:
    line = (sys.executable, str(BENCH / "memory.py"), "--peak", "-o", str(folder / "peak.json"))
    return (*line, "--rehearse", "LeNet") if machine.rehearsal else line


def _benchmarks() -> list[str]:
    return [path.stem for path in sorted(BENCH.glob("bench_*.py"))]


def _files() -> list[Path]:
    """Test files, the largest first: what takes longest must not begin last."""
    return sorted((ROOT / "tests").glob("test_*.py"), key=lambda path: (-path.stat().st_size, path.name))


def _marked(marker: str) -> list[Path]:
    return [path for path in _files() if re.search(rf"pytest\.mark\.{marker}\b", path.read_text(encoding="utf-8"))]
