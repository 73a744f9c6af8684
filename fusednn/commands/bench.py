"""``python -m fusednn bench``: the suite of the source checkout, which isn't installed; ``bench one``, which is."""

from __future__ import annotations

import argparse
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from . import bench_one

__all__ = ["add_arguments", "find_benchmarks", "run"]

_REQUIRED = ("pytest", "pytest_benchmark")

#: Programs beside the benchmarks, by the first argument.
_PROGRAMS = ("report", "predict", "resources", "inductor", "host", "baseline", "memory")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # Every argument is pytest's.  Argparse would claim those that start with a dash, and reject them; no argument
    # starts with this character.
    parser.prefix_chars = "\0"
    parser.add_argument(
        "pytest_arguments",
        nargs=argparse.REMAINDER,
        metavar="argument",
        help="one OPERATION ..., anywhere; in a checkout, passed on to pytest: --full, --output DIR, --resume FILE, "
        "-k relu, ...; or a program with its own: report FILE... (or --help), predict, resources, inductor, host, "
        "baseline, memory",
    )
    parser.set_defaults(print_help=parser.print_help)


def run(arguments: argparse.Namespace) -> int:
    """Run pytest on the benchmarks, or a program beside them, and return its exit code.

    2 where there are none to run, or nothing to run them.
    """
    passed = list(arguments.pytest_arguments)
    if passed in (["-h"], ["--help"]):
        arguments.print_help()
        return 0
    if passed[:1] == ["one"]:
        return bench_one.main(passed[1:])
    folder = find_benchmarks()
    if folder is None:
        message = (
            "the suite isn't installed: run this in a checkout of fusednn's sources; single operations are measured by "
            "'fusednn bench one'"
        )
        print(f"fusednn bench: {message}", file=sys.stderr)
        return 2
    if passed and passed[0] in _PROGRAMS:
        return subprocess.run([sys.executable, str(folder / f"{passed[0]}.py"), *passed[1:]], check=False).returncode
    if missing := [name for name in _REQUIRED if find_spec(name) is None]:
        packages = " ".join(name.replace("_", "-") for name in missing)
        print(f"fusednn bench: needs {packages}: pip install {packages}", file=sys.stderr)
        return 2
    return subprocess.run([sys.executable, "-m", "pytest", str(folder), *passed], check=False).returncode


def find_benchmarks() -> Path | None:
    """The folder ``bench`` of the checkout that this package was imported from, or of the current directory."""
    checkout = Path(__file__).resolve().parents[2]
    for root in (checkout, Path.cwd()):
        folder = root / "bench"
        if (folder / "fusednn_bench" / "__init__.py").is_file():
            return folder
    return None
