"""The command line: ``python -m fusednn info | check | explain-model | compare | demo | bench``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import __version__
from .commands import bench, check, compare, demo, explain_model, info

_COMMANDS = {
    "info": (info, "what is installed, which GPU is there, and what runs where"),
    "check": (check, "compile every kernel and read its machine code, and test what it computes"),
    "explain-model": (explain_model, "what replacing serves of a model of yours, what it leaves to PyTorch, and why"),
    "compare": (compare, "train copies of your model, stock, replaced and fused: right, faster, smaller?"),
    "demo": (demo, "train a network on handwritten digits, stock beside fusednn"),
    "bench": (bench, "measure an operation (bench one gelu), or run the suite of a source checkout"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code: 0 for success, 1 where problems were found, 2 where it can't be done."""
    parser = argparse.ArgumentParser(prog="fusednn", description="Fused Triton kernels for PyTorch, drop-in.")
    parser.add_argument("--version", action="version", version=f"fusednn {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (module, summary) in _COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary.capitalize() + ".")
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    parsed = parser.parse_args(arguments)
    code: int = parsed.run(parsed)
    return code


if __name__ == "__main__":
    sys.exit(main())
