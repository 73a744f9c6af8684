"""Count what networks keep for the backward pass: ``python -m fusednn bench memory [-o FILE] [NETWORK...]``.

Needs no GPU: kernels run in Triton's interpreter.  torchvision and transformers have to be there, as ``make
test-thorough`` has them: ``PYTHONPATH=.build/models``.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # whoever imports this has decided
    os.environ.setdefault("TRITON_INTERPRET", "1")
BENCH = Path(__file__).resolve().parent
sys.path[:0] = [str(BENCH), str(BENCH.parent / "tests")]

from fusednn_bench.environment import describe_environment, describe_settings, describe_sources
from fusednn_bench.memory import NETWORKS, count_memory
from fusednn_bench.results import new_result, save_result
from support.torchvision import mend_torchvision


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fusednn bench memory", description="Count what networks keep.")
    parser.add_argument("-o", "--output", type=Path, default=BENCH / "results" / "memory.json", help="%(default)s")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="networks at a time: %(default)s")
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=", ".join(case.name for case in NETWORKS))
    parsed = parser.parse_args(arguments)
    result = new_result("memory", describe_environment(), describe_sources(), describe_settings())
    known = [case.name for case in NETWORKS]
    chosen = [name for name in known if not parsed.networks or name in parsed.networks]
    with ProcessPoolExecutor(parsed.jobs, get_context("spawn"), initializer=mend_torchvision) as pool:
        for name, records in zip(chosen, pool.map(_count, chosen), strict=True):
            result["cases"] += records
            shares = [
                f"{record['contestant']} {record['kept_bytes'] / records[0]['kept_bytes']:.2f}" for record in records
            ]
            print(f"{name}: {', '.join(shares)}", flush=True)
            save_result(result, parsed.output)
    result["complete"] = chosen == known
    save_result(result, parsed.output)
    return 0


def _count(name: str) -> list[dict[str, Any]]:
    """The records of a network, in a process of the pool."""
    return next(count_memory(case) for case in NETWORKS if case.name == name)


if __name__ == "__main__":
    sys.exit(main())
