"""Compile each kernel for each GPU and write down what it takes: ``python -m fusednn bench resources [-o FILE]``.

Of each kernel one shipped configuration: the first in bfloat16, or else the first.  Then what the launches of
representative calls execute, with ``--instructions relu`` for those named so, and nothing written: see `instructions`.
With ``--executed`` it counts on the virtual GPU instead: see `executed`.  Needs no GPU.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # whoever imports this has decided
    os.environ.pop("TRITON_INTERPRET", None)
BENCH = Path(__file__).resolve().parent
sys.path.insert(0, str(BENCH))

from fusednn_bench.environment import describe_environment, describe_sources
from fusednn_bench.results import new_result, save_result

from fusednn import kernels


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="fusednn bench resources", description="What the compiler says of each kernel."
    )
    parser.add_argument("-o", "--output", type=Path, default=BENCH / "results" / "compiled.json", help="%(default)s")
    parser.add_argument("--instructions", nargs="+", metavar="NAME", help="print what launches of these execute")
    parser.add_argument("--executed", action="store_true", help="count on the virtual GPU instead; needs gcc")
    parsed = parser.parse_args(arguments)
    if parsed.executed:
        return _run("executed.py")
    if parsed.instructions:
        return _run("instructions.py", *parsed.instructions)
    result = new_result("compiled", describe_environment(), describe_sources(), {})
    result["cases"] = list(records())
    result["complete"] = True
    save_result(result, parsed.output)
    print(f"{len(result['cases'])} compiled kernels: {parsed.output}")
    return _run("instructions.py", "-o", str(parsed.output.with_name("instructions.json")))


def _run(program: str, *arguments: str) -> int:
    """In a process of its own, since where kernels run is settled in this one."""
    return subprocess.run([sys.executable, str(BENCH / program), *arguments], check=False).returncode


def representatives() -> dict[str, kernels.Configuration]:
    """A configuration of each kernel, by the kernel's name."""
    found: dict[str, kernels.Configuration] = {}
    for configuration in kernels.shipped():
        name = configuration.kernel.__name__
        in_bfloat16 = "*bf16" in dict(configuration.signature).values()
        if not configuration.rare and (name not in found or (in_bfloat16 and not _is_bfloat16(found[name]))):
            found[name] = configuration
    return found


def _is_bfloat16(configuration: kernels.Configuration) -> bool:
    return "*bf16" in dict(configuration.signature).values()


def records() -> Iterator[dict[str, Any]]:
    from fusednn.instruments.compile_check import TARGETS
    from fusednn.instruments.resources import resources_for

    for name, configuration in sorted(representatives().items()):
        for target in TARGETS:
            resources = resources_for(configuration, target)
            yield {
                "family": configuration.kernel.__module__.rpartition(".")[2],
                "kernel": name,
                "configuration": configuration.label,
                **asdict(resources),
                "occupancy": resources.occupancy,
            }


if __name__ == "__main__":
    sys.exit(main())
